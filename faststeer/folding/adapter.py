"""A plan as a LoRA adapter for peft: W -> M W with M = I + U V^T is W + U (V^T W), of the rank of what is removed, and
a constant is the adapter's own bias. So it also holds additions in architectures whose linear layers have no bias."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from faststeer.extras import needed_for
from faststeer.files import new_folder
from faststeer.folding.affine import FoldError
from faststeer.folding.weights import (
    Check,
    Expected,
    Writer,
    add_rows,
    apply,
    changed_tables,
    check_writers,
    own_scale,
    prepare,
    write_report,
)
from faststeer.intervention import Intervention
from faststeer.plan import Plan


@dataclass(frozen=True)
class Adapter:
    """What `fold_adapter` gives: a PeftModel around the model, and the check against the hooks."""

    model: Any
    plan: Plan
    changed: tuple[str, ...]
    check: Check
    replaced: Mapping[str, nn.Module]  # modules of the model whose copies peft uses

    def report(self) -> dict[str, Any]:
        """JSON-serialisable."""
        return {"changed": list(self.changed), "check": dict(vars(self.check))}

    def save(self, folder: str | os.PathLike[str]) -> Path:
        """Write the adapter with peft's `save_pretrained`, and `faststeer_fold.json` with the plan and the check. The
        folder appears whole or not at all.

        Raises:
            ValueError: the folder is there and not empty.
        """
        with new_folder(folder) as path:
            self.model.save_pretrained(path, save_embedding_layers=False)
            write_report(path, self.plan, self.report())
        return Path(folder)

    def unload(self) -> nn.Module:
        """The model without the adapter, as it was."""
        return _unload(self.model, self.replaced)


def fold_adapter(model: nn.Module, plan: Plan | Intervention, *, tokens: Tensor | None = None) -> Adapter:
    """Make a plan permanent as a peft adapter, leaving the model's weights as they are.

    What can be folded is what `fold` can, without its limits on biases; Project cannot (what it removes has full rank),
    nor can mixtures of experts. Where the embedding changes and linear layers need biases, the adapter holds the whole
    changed embedding, since peft's embedding adapters take no bias.

    Args:
        model: wrapped in place, as peft does: `adapter.unload()` gives it back.
        plan, tokens: as for `fold`.

    Raises:
        FoldError (a ValueError): the plan cannot be folded into this architecture, and why; or the check failed. The
            model is as before.
        ImportError: peft is not installed.
    """
    peft = _library()
    plan, writers, points = prepare(model, plan)
    check_writers(model, writers)
    changed = [writer for writer in writers if writer.is_changed]
    for writer in changed:
        if writer.kind == "experts":
            raise FoldError(f"{writer.name} is a mixture of experts: fold into the weights instead (fold)")
        if writer.change.scale != 1:
            raise FoldError(
                f"{writer.name} is projected onto few directions: what is removed has no low rank; use fold"
            )
    expected = Expected(model, plan, points, tokens)
    config = _config(peft, model, changed)
    replaced = {path: model.get_submodule(path) for path in config.modules_to_save or ()}
    with _quiet():
        wrapped = peft.get_peft_model(model, config)
    try:
        with torch.no_grad():
            for writer in changed:
                _fill(wrapped, writer, config)
        check = expected.compare(wrapped)
    except BaseException:
        _unload(wrapped, replaced)
        raise
    names = tuple(part.full_name for writer in changed for part in writer.parts)
    return Adapter(wrapped.eval(), plan, names, check, replaced)


def _unload(wrapped: Any, replaced: Mapping[str, nn.Module]) -> nn.Module:
    model = wrapped.unload()
    for path, module in replaced.items():  # peft leaves its copies in
        model.set_submodule(path, module)
    return model


def _library() -> ModuleType:
    with needed_for("an adapter", "peft"):
        import peft
    return peft


def _bias_change(writer: Writer) -> Tensor:
    """M b + c - b."""
    bias = writer.parts[0].module.bias
    if bias is None:
        return writer.constant
    before = bias.detach().to("cpu", torch.float64)
    return writer.change(before) + writer.constant - before


def _rank(writer: Writer) -> int:
    constant = 1 if writer.kind == "embedding" and bool(writer.constant.any()) else 0
    return max(1, writer.change.rank + constant)


def _config(peft: ModuleType, model: Any, changed: list[Writer]) -> Any:
    linear = [writer for writer in changed if writer.kind == "linear"]
    tables = [part.path for writer in changed if writer.kind == "embedding" for part in changed_tables(writer)]
    biased = any(bool(_bias_change(writer).any()) for writer in linear)
    plain = all(_is_plain(model.get_submodule(path)) for path in tables)
    whole = tables if (biased and linear) or not plain else []
    targets = {writer.parts[0].path: _rank(writer) for writer in linear}
    targets |= {path: _rank(changed[0]) for path in tables if not whole}
    if not targets:
        raise FoldError("the plan changes the embedding alone, which is of a kind that peft cannot adapt: use fold")
    rank = max(targets.values())
    return peft.LoraConfig(
        task_type="CAUSAL_LM",
        r=rank,
        lora_alpha=rank,  # the factor alpha / r is 1
        rank_pattern={f"^{path}": n for path, n in targets.items() if n != rank},
        alpha_pattern={f"^{path}": n for path, n in targets.items() if n != rank},
        target_modules=sorted(targets),
        modules_to_save=whole or None,
        lora_bias=biased,
        fan_in_fan_out=any(isinstance(writer.parts[0].module, Conv1D) for writer in linear),
        base_model_name_or_path=getattr(model, "name_or_path", None) or None,
    )


def _is_plain(table: nn.Module) -> bool:
    """Whether peft can adapt an embedding: one that is looked up by ids, and at most scaled."""
    return type(table) is nn.Embedding or hasattr(table, "embed_scale")


@contextmanager
def _quiet() -> Iterator[None]:
    """Without peft's warnings about layers that have no bias and tied embeddings: both are meant."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _fill(wrapped: Any, writer: Writer, config: Any) -> None:
    base = wrapped.base_model.model
    if writer.kind == "linear":
        part = writer.parts[0]
        layer, name = base.get_submodule(part.path), "default"
        weight = part.parameter.detach().movedim(part.axis, 0)
        down, up = layer.lora_A[name], layer.lora_B[name]
        _put(down.weight, (writer.change.right.to(weight.device).T @ weight.double()), 0)
        _put(up.weight, writer.change.left, 1)
        if up.bias is not None:
            up.bias.copy_(_bias_change(writer))
        return
    tables = changed_tables(writer)
    for part in tables:
        constant = writer.constant / (writer.scale * own_scale(part.module)) if part is writer.parts[-1] else None
        layer = base.get_submodule(part.path)
        if config.modules_to_save:
            part.module = layer.modules_to_save["default"]
            if not writer.change.is_identity:
                apply(writer.change, part)
            if constant is not None:
                add_rows(part.parameter, constant)
            continue
        table = part.parameter.detach()
        down, up = table.double() @ writer.change.right.to(table.device), writer.change.left
        if constant is not None and bool(constant.any()):
            down = torch.cat([down, torch.ones_like(table[:, :1], dtype=torch.float64)], 1)
            up = torch.cat([up, constant.unsqueeze(1)], 1)
        _put(layer.lora_embedding_A["default"], down.T, 0)
        _put(layer.lora_embedding_B["default"], up, 1)


def _put(parameter: Tensor, values: Tensor, axis: int) -> None:
    """Copy into the first rows (axis 0) or columns; the rest is zero."""
    parameter.zero_()
    parameter.narrow(axis, 0, values.shape[axis]).copy_(values)
