"""How strong a plan may be: the largest dose, |c v| / |h|, that a server takes, against norms that its workers measure
when they start.

    worker: norms of the residual stream -> front end -> a plan is read: dose at each hook point <= max_dose
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from faststeer.compile import Entry
from faststeer.ops.tables import EntryKind
from faststeer.plan import site_name
from faststeer.vllm.layers import find_layers, replaced

N_TOKENS = 64  # of the measured prompt; the median over them is not moved by the first one, whose norm is often huge
MEND = 'use a smaller coefficient, or start the server with a larger "max_dose" (null: no limit)'


def check_dose(entries: Sequence[Entry], norms: Mapping[int, float], n_layers: int, max_dose: float) -> None:
    """Raise ValueError where a plan changes the residual stream by more than a server allows.

    The dose of a hook point is the sum over its entries, each as if its gate were open and its position reached:
    |c| |v| / |h| for Add; for Clamp the largest projection that it can set beyond the row's own, max(low, -high, 0) /
    |h|; the strength for Ablate, which is at most that times |h| / |h|. Project and Rotate never make a row larger.

    Args:
        entries: of the plan.
        norms: |h| between the layers, by the number of the layer that it enters; `n_layers` is behind the last one.
        n_layers: of the model.
        max_dose: the limit.
    """
    doses: dict[int, float] = {}
    for entry in entries:
        norm = norms[-(-entry.site // 4)]  # a branch is measured by the stream behind it
        doses[entry.site] = doses.get(entry.site, 0.0) + _length(entry) / norm + _share(entry)
    for number, dose in doses.items():
        if not dose <= max_dose:
            at, layer = site_name(number, n_layers)
            raise ValueError(
                f"the plan's dose at {at} of layer {layer} is {dose:.4g}: it changes the hidden states by up to that "
                f"many times their norm, {norms[-(-number // 4)]:.4g}; this server takes at most {max_dose:.4g}: {MEND}"
            )


def _length(entry: Entry) -> float:
    """What an entry adds at most, in units of the residual stream."""
    first, second = map(float, entry.scalars)
    if entry.kind == EntryKind.ADD:
        # In fp64: squares of what fp32 holds overflow in fp32.
        return abs(first) * float(entry.basis.detach().double().norm())
    if entry.kind == EntryKind.CLAMP:
        return max(0.0, first if math.isfinite(first) else 0.0, -second if math.isfinite(second) else 0.0)
    return 0.0


def _share(entry: Entry) -> float:
    """What an entry changes at most, as a share of the row itself."""
    return abs(float(entry.scalars[0])) if entry.kind == EntryKind.ABLATE else 0.0


@torch.inference_mode()
def measure_norms(model: nn.Module, config: Any, device: torch.device) -> dict[int, float]:
    """The median norm of the residual stream in front of each layer on this rank, and behind each, by the number of the
    layer that it enters. One uncompiled pass over random tokens, with causal attention in place of vLLM's, which needs
    caches that are not there yet.

    Args:
        model: as the worker has loaded it; every rank of a server has to measure at the same time.
        config: vLLM's.
        device: of the model.

    Raises:
        RuntimeError: the model cannot be run so.
    """
    from vllm.distributed import get_pp_group, get_tp_group
    from vllm.forward_context import set_forward_context
    from vllm.sequence import IntermediateTensors

    layers = find_layers(model)
    stack = next(module for module in model.modules() if _holds(module, next(iter(layers.values()))))
    generator, vocabulary = torch.Generator().manual_seed(0), int(config.model_config.hf_text_config.vocab_size)
    ids = torch.randint(vocabulary, (N_TOKENS,), generator=generator).to(device)
    positions = torch.arange(N_TOKENS, device=device)
    if getattr(config.model_config, "uses_mrope", False):
        positions = positions.expand(3, -1)
    norms: dict[int, float] = {}

    def note(number: int, hidden: Tensor, residual: Tensor | None) -> None:
        h = hidden.float() if residual is None else hidden.float() + residual.float()
        norms[number] = float(h.norm(dim=-1).median())

    def noting(number: int, original: Any) -> Any:
        def forward(
            positions: Tensor, hidden_states: Tensor, residual: Tensor | None = None, *args: Any, **more: Any
        ) -> Any:
            note(number, hidden_states, residual)
            out = original(positions, hidden_states, residual, *args, **more)
            note(number + 1, *out)
            return out

        return forward

    stand_ins = {module: causal_attention(module) for module in stack.modules() if _is_attention(module)}
    stand_ins |= {module: noting(number, module.forward) for number, module in layers.items()}
    # LoRA's layers look up which adapters a step uses, and there is no step yet.
    stand_ins |= {m: m.base_layer.forward for m in stack.modules() if hasattr(m, "base_layer")}  # type: ignore[union-attr]
    stages, tensors = get_pp_group(), None
    try:
        with ExitStack() as during:
            during.enter_context(replaced(stand_ins))
            during.enter_context(set_forward_context(None, config, num_tokens=N_TOKENS))
            if not stages.is_first_rank:
                tensors = IntermediateTensors(stages.recv_tensor_dict(all_gather_group=get_tp_group()))
            out = stack.forward(ids, positions, tensors, None)
            if not stages.is_last_rank:
                stages.send_tensor_dict(out.tensors, all_gather_group=get_tp_group())
    except Exception as error:
        raise RuntimeError(
            f"the norms of {type(model).__name__}'s hidden states, which max_dose is measured by, cannot be taken "
            f'({type(error).__name__}: {error}): start with the setting "max_dose": null, which sets no limit'
        ) from error
    if not all(math.isfinite(norm) and norm > 0 for norm in norms.values()):
        raise RuntimeError(
            f"the norms of {type(model).__name__}'s hidden states are {norms}: its weights are not those of a model "
            'that computes; start with the setting "max_dose": null to run it nevertheless'
        )
    return norms


def causal_attention(module: Any) -> Any:
    """Plain causal attention of one sequence with the heads of one of vLLM's attention modules."""

    def forward(query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> Tensor:
        tokens, groups = len(query), module.num_heads // module.num_kv_heads
        q, k, v = (
            x.reshape(tokens, heads, -1).transpose(0, 1).float()
            for x, heads in ((query, module.num_heads), (key, module.num_kv_heads), (value, module.num_kv_heads))
        )
        k, v = (x.repeat_interleave(groups, dim=0) for x in (k, v))
        out = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=module.impl.scale)
        return out.transpose(0, 1).reshape(tokens, -1).to(query.dtype)

    return forward


def _is_attention(module: nn.Module) -> bool:
    return all(hasattr(module, name) for name in ("num_heads", "num_kv_heads", "impl"))


def _holds(module: nn.Module, layer: nn.Module) -> bool:
    """Whether the layer is in a list that is the module's own."""
    return any(isinstance(child, nn.ModuleList) and any(x is layer for x in child) for child in module.children())
