"""Steering with one half of attention frozen: what of its effect goes through where tokens look (QK), what through what
they carry (OV).

Every row runs twice in each forward pass, unsteered and steered, over the same tokens, with both halves in the cache:
so a token costs one pass of two rows, whatever came before it. The authors' code recomputes both whole sequences for
every token. Source: arXiv 2604.08524, section on freezing.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.utils import ModelOutput

from faststeer.hf.attention import AttentionCall, exchange_attention
from faststeer.hf.cache import cache_in
from faststeer.hf.changes import Changes
from faststeer.hf.hook_points import HookPoints
from faststeer.hf.known import by_name, parameters
from faststeer.hf.steering import Path, Steering
from faststeer.plan import Plan, Plans
from faststeer.program import Capacity

Frozen = Literal["qk", "ov"]


def freeze(
    model: nn.Module,
    plans: Plans,
    what: Frozen,
    *,
    hook_points: HookPoints | None = None,
    capacity: Capacity | None = None,
    path: Path | None = None,
) -> Steering:
    """Steer a model inside a `with` block, with part of every layer's attention taken from the unsteered run over the
    same tokens (prompt and completion alike, position by position):

        "qk": softmax(Q_base K_base^T) V_steered      where the model looks stays, what it moves is steered
        "ov": softmax(Q_steered K_steered^T) V_base   where it looks is steered, what it moves stays

        with freeze(model, plan, "qk"):
            model.generate(**batch)

    Everything else is `steer`: plans for all rows or one per row, changed by `assign`; `model(...)` and
    `model.generate(...)`, greedy or sampled, with any cache, padding on either side, gradients. The model takes and
    gives B rows; inside, a pass has 2 B: `read` and other observers see the unsteered rows first, then the steered
    ones. With coefficient 0, or without a plan, a row is as the model gives it (to rounding). PEFT's `adapter_names`,
    one per row of a pass, is given twice: `names * 2`.

    Cost: two rows per row, one attention pass over [V_base || V_steered] for "qk", and a cache of twice the size.

    Raises:
        TypeError, ValueError: as `steer`; `what` is none of these; an architecture whose attention cannot be exchanged
            (see `exchange_attention`, which also says what becomes of flash attention).
        RuntimeError: on entering, where the model is steered already. ValueError: beam search, continuous batching.
    """
    if what not in _ATTENTION:
        raise ValueError(f"freeze what? {what!r}: expected 'qk' (the attention pattern) or 'ov' (the values)")
    return Steering(model, plans, hook_points, capacity, path, Freezing(what))


class Freezing:
    """Acts beside a steering whose attention is partly frozen: each row runs twice, and the first is not steered."""

    copies = 2
    alone = "freeze(...) acts beside no other steering of the model: leave that one and give its plan to freeze(...)"

    def __init__(self, what: Frozen) -> None:
        self._attend = _ATTENTION[what]

    def check(self, plan: Plan) -> None:
        """Any plan will do."""

    def check_generate(self, model: Any, given: Mapping[str, Any]) -> None:
        """Raise ValueError for beam search."""
        configs = (given.get("generation_config"), getattr(model, "generation_config", None))
        told = [given.get("num_beams"), *(getattr(config, "num_beams", None) for config in configs)]
        beams = next((beams for beams in told if beams is not None), 1)
        if beams > 1:
            raise ValueError(f"num_beams is {beams}: frozen generation is greedy or sampled; set num_beams=1")

    def enter(self, changes: Changes, steering: Steering) -> None:
        """Double the rows that reach the layers, and halve what comes out."""
        model, points = steering.model, steering.points
        owner = points.owner(model)
        names, run = parameters(type(owner).forward), owner.forward

        @functools.wraps(run)
        def forward(*args: Any, **kwargs: Any) -> Any:
            if not changes.live:
                return run(*args, **kwargs)
            given = by_name(names, args, kwargs)
            tokens: Tensor = given["inputs_embeds"] if given.get("input_ids") is None else given["input_ids"]
            rows = tokens.shape[0]
            _check_cache(cache_in(given), rows)
            return _halved(run(*_doubled(args, rows), **_doubled(kwargs, rows)))

        changes.replace(owner, "forward", forward)
        exchange_attention(model, self._attend, points).enter(changes)


# Attention ------------------------------------------------------------------------------------------------------------


def _qk_frozen(call: AttentionCall) -> Tensor:
    """The unsteered pattern over the values of both halves: one pass over [V_base || V_steered] for a new token. Of a
    prompt each half has its own, as fast kernels take no values wider than the keys.

    A cache made for it keeps the unsteered keys alone, and the values side by side already (`engine.cache`)."""
    half = call.query.shape[0] // 2
    base = slice(0, half)
    query, key = call.query[base], call.key[base]
    side_by_side = call.value.shape[0] == half
    if call.query.shape[2] == 1:
        both = call.value if side_by_side else torch.cat(call.value.chunk(2), dim=-1)
        return torch.cat(call.attend(query, key, both, rows=base).chunk(2, dim=-1))
    values = torch.cat(call.value.chunk(2, dim=-1)) if side_by_side else call.value
    return call.attend(torch.cat([query, query]), torch.cat([key, key]), values)


def _ov_frozen(call: AttentionCall) -> Tensor:
    """Each half's own pattern over the unsteered values."""
    base = call.value[: call.value.shape[0] // 2]
    return call.attend(value=torch.cat([base, base]))


_ATTENTION: dict[str, Callable[[AttentionCall], Tensor]] = {"qk": _qk_frozen, "ov": _ov_frozen}


# Rows -----------------------------------------------------------------------------------------------------------------


def _doubled(x: Any, rows: int) -> Any:
    """Arguments of the model's forward pass for twice the rows."""
    if isinstance(x, Tensor):
        # Position ids of multimodal models are [axes, batch, tokens].
        dim = int(x.ndim == 3 and x.dtype == torch.long and x.shape[1] == rows)
        return torch.cat([x, x], dim) if x.ndim > 1 and x.shape[dim] == rows else x
    if isinstance(x, Mapping):  # masks by kind of attention, say
        return {name: _doubled(value, rows) for name, value in x.items()}
    return tuple(_doubled(each, rows) for each in x) if type(x) is tuple else x


def _check_cache(cache: Any, rows: int) -> None:
    """Both halves must be in a cache that is continued."""
    layer: Any = cache.layers[0] if isinstance(cache, DynamicCache) and cache.layers else None
    if layer is not None and layer.is_initialized and layer.keys.shape[0] != 2 * rows:
        raise ValueError(
            f"the cache holds {layer.keys.shape[0]} rows, expected {2 * rows} for {rows} frozen rows: it was filled "
            "outside of freeze(...); read the prompt inside"
        )


def _halved(part: Any) -> Any:
    """What a pass gives, of its steered rows alone; a cache keeps both halves."""
    if isinstance(part, Tensor):
        return part[part.shape[0] // 2 :]
    if isinstance(part, (tuple, list)):
        return tuple(_halved(each) for each in part)
    if isinstance(part, ModelOutput):
        for name, each in list(part.items()):
            part[name] = _halved(each)
    return part
