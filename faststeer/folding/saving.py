"""Whether a model can be saved as it stands, and whether what was saved is what is in memory."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn

from faststeer.folding.affine import FoldError


def check_savable(model: nn.Module) -> None:
    """Raise FoldError if `save_pretrained` would leave something of the model out, or fail: peft's adapters are saved
    apart from the weights, and transformers saves no model that it has dequantised while loading."""
    peft: Any = sys.modules.get("peft.tuners.tuners_utils")
    if peft is not None and any(
        isinstance(module, (peft.BaseTuner, peft.BaseTunerLayer)) for module in model.modules()
    ):
        raise FoldError(
            f"{type(model).__name__} holds a peft adapter, which is saved apart from the weights: merge it first, "
            "model = peft_model.merge_and_unload()"
        )
    quantizer: Any = getattr(model, "hf_quantizer", None)
    if quantizer is not None and not quantizer.is_serializable():
        method = quantizer.quantization_config.quant_method
        raise FoldError(
            f"{type(model).__name__} was loaded from {getattr(method, 'value', method)} weights, and transformers does "
            "not save such a model: load a GGUF file with faststeer.load(path), or the original weights"
        )


def check_saved(model: Any, folder: Path) -> None:
    """Raise FoldError unless the model that transformers loads from a folder has the weights in memory, bit for bit."""
    loaded: dict[str, torch.Tensor] = type(model).from_pretrained(folder, dtype="auto").state_dict()
    weights: dict[str, torch.Tensor] = model.state_dict()
    differing = sorted(loaded.keys() ^ weights.keys())
    differing += [
        name
        for name in sorted(loaded.keys() & weights.keys())
        if not torch.equal(loaded[name], weights[name].to(loaded[name].device, loaded[name].dtype))
    ]
    if differing:
        raise FoldError(
            f"{', '.join(differing[:3])} of the saved {type(model).__name__} is not what is in memory: nothing was "
            "written. Save .model by hand, and compare what is loaded"
        )
