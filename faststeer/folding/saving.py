"""Whether a model can be saved as it stands, and whether what was saved is what is in memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from faststeer.folding.affine import FoldError
from faststeer.hf.anatomy import run_four_tokens, same_but_for_rounding
from faststeer.hf.hook_points import quiet


def check_unadapted(model: Any) -> None:
    """Raise FoldError for a model with peft's adapters: they are saved apart from the weights or under other names."""
    wrapped = next(
        (path for path, m in model.named_modules() if isinstance(getattr(m, "base_layer", None), nn.Module)), ""
    )
    if wrapped or hasattr(model, "peft_config"):
        what = f"{wrapped} has an adapter" if wrapped else "it is a peft model"
        mend = "model = model.merge_and_unload()"
        if not hasattr(model, "merge_and_unload"):  # transformers puts an adapter in by itself
            mend = "model = peft.PeftModel.from_pretrained(model without it, adapter).merge_and_unload()"
        raise FoldError(
            f"{type(model).__name__} cannot be folded: {what}, which would be saved apart from what is folded or under "
            f"other names: merge it first, {mend}"
        )


def check_savable(model: Any) -> None:
    """Raise FoldError if `save_pretrained` would fail: transformers saves not every quantised model, nor every
    generation config that it loads."""
    quantizer = getattr(model, "hf_quantizer", None)
    if quantizer is not None and not _is_plain(model) and not quantizer.is_serializable():
        raise FoldError(
            f"{type(model).__name__} cannot be folded: its weights are quantised in a way that cannot be saved: load "
            "it without quantisation, fold that, and quantise what was folded"
        )
    if (settings := getattr(model, "generation_config", None)) is not None:
        try:
            settings.validate(strict=True)
        except ValueError as error:
            raise FoldError(
                f"{type(model).__name__} cannot be saved with this model.generation_config: correct it first: {error}"
            ) from error


def leave_quantizer(model: Any) -> None:
    """Make a plain model of one whose weights were dequantised when it was loaded (from GGUF), which transformers would
    not save."""
    if getattr(model, "hf_quantizer", None) is not None and _is_plain(model):
        model.hf_quantizer, model.is_quantized = None, False
        for config in {id(c): c for c in (model.config, model.config.get_text_config())}.values():
            if hasattr(config, "quantization_config"):
                del config.quantization_config


def _is_plain(model: nn.Module) -> bool:
    return all(type(p) is nn.Parameter and p.is_floating_point() and p.itemsize > 1 for p in model.parameters())


def check_saved(model: Any, folder: Path) -> None:
    """Raise FoldError unless the model that transformers loads from a folder has the weights in memory, bit for bit,
    and computes the same of them."""
    attention = getattr(model.config, "_attn_implementation", None)
    again = type(model).from_pretrained(folder, dtype="auto", attn_implementation=attention)
    loaded: dict[str, torch.Tensor] = again.state_dict()
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
            "written. Save .model by hand and compare what is loaded, or fold into an adapter (fold_adapter, faststeer "
            "fold --adapter)"
        )
    with quiet(model):
        own = run_four_tokens(model)
    with quiet(again.to(model.device)):
        other = run_four_tokens(again)
    if not same_but_for_rounding(other, own):  # in the dtype that is loaded
        raise FoldError(
            f"the saved {type(model).__name__} has the weights in memory and computes something else of them: nothing "
            "was written. Hooks, a replaced forward and what was set on modules but not in model.config are not saved: "
            "fold the model as transformers loads it"
        )
