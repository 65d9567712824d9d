"""Steering inside vLLM's decoder layers: their `forward` on the instances calls our ops, as part of what vLLM compiles
and captures. Nothing here decides anything per request: ops read tables and rows that others write.

vLLM's layers hand on a pair (hidden, residual) whose sum, which the next norm takes, is the residual stream. A row that
is steered becomes (0, h) in place: exactly h after that sum, in every dtype. Other rows are not written, and those
without an entry here not even read: they keep their pair, and so their bits.

Our ops get tensors for every argument, buffers whole and not the part that a pass uses, so that all layers are one
compiled piece in which nothing is copied for them. One op with the norm would be a pass over the rows less, but give
rows without a plan other bits (benchmarks/vllm/forms.py).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from faststeer.ops import overload
from faststeer.ops.schema import DTYPES
from faststeer.plan import site
from faststeer.program import Program
from faststeer.vector import HookPoint

LAYER_LISTS = ("layers", "h", "blocks")


@dataclass(frozen=True)
class Operators:
    """The ops of the back end for a device."""

    steer: Callable[..., Any]
    steer_pair: Callable[..., Any]
    latch: Callable[..., Any]

    @classmethod
    def of(cls, device: torch.device) -> Operators:
        return cls(*(overload(name, device) for name in ("steer", "steer_pair_", "latch_")))


@dataclass(frozen=True)
class StepTables:
    """What ops read and write beside the program's tables; addresses never change.

    Attributes:
        rows: `[3, max_rows]` int32: slot, position, sequence of every row of a step.
        gate_state: `[gates, sequences]` bool; None where no plan may have latched gates.
        probes: per site that is built in, `[max_rows, columns]` fp32; empty where nothing may be probed.
    """

    program: Program
    rows: Tensor
    gate_state: Tensor | None
    probes: dict[int, Tensor]


class Site(nn.Module):
    """One site in the model. Its tensors are buffers, so that the compiler takes them for inputs of a layer."""

    rows: Tensor
    gate_state: Tensor | None
    probe: Tensor | None

    def __init__(self, number: int, tables: StepTables, operators: Operators) -> None:
        super().__init__()
        program = tables.program
        probe = tables.probes.get(number)
        tensors = {
            "bank": program.bank, "entries": program.entries, "ranges": program.ranges[number],
            "rows": tables.rows, "gate_state": tables.gate_state, "probe": probe,
        }  # fmt: skip
        for name, tensor in tensors.items():
            self.register_buffer(name, tensor, persistent=False)
        self.operators, self.columns = operators, 0 if probe is None else probe.shape[1]

    def tables(self) -> tuple[Tensor | None, ...]:
        """The op's tables, rows whole: a slice of them would tie the compiler to a number of rows."""
        return self.bank, self.entries, self.ranges, self.rows, self.gate_state  # type: ignore[return-value]

    def one(self, x: Tensor) -> Tensor:
        """Steer a tensor that is the hook point's."""
        tables = self.tables()
        if self.gate_state is not None:
            self.operators.latch(x, None, *tables)
        steered, seen = self.operators.steer(x, *tables, None, self.columns)
        self._keep(seen)
        return steered

    def pair(self, hidden: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        """Steer the sum of a pair that nobody else reads, in place: (0, h) for the rows on which something acts."""
        if self.gate_state is not None:
            self.operators.latch(hidden, residual, *self.tables())
        self.operators.steer_pair(hidden, residual, *self.tables(), self.probe)
        return hidden, residual

    def _keep(self, seen: Tensor) -> None:
        if self.probe is not None:
            self.probe[: seen.shape[0]].copy_(seen)


def find_layers(model: nn.Module) -> dict[int, nn.Module]:
    """The decoder layers on this rank, by their number in the whole model.

    Raises:
        RuntimeError: there are none.
    """
    language = model.get_language_model() if hasattr(model, "get_language_model") else model  # type: ignore[operator]
    lists = [
        module
        for name, module in language.named_modules()
        if isinstance(module, nn.ModuleList) and name.rpartition(".")[2] in LAYER_LISTS
    ]
    if not lists:
        raise RuntimeError(
            f"{type(model).__name__} has no list of layers called {', '.join(LAYER_LISTS)}: faststeer cannot steer it"
        )
    longest = max(lists, key=len)
    return {i: layer for i, layer in enumerate(longest) if type(layer).__name__ != "PPMissingLayer"}


def patch_layers(
    layers: dict[int, nn.Module], tables: StepTables, hook_points: tuple[HookPoint, ...], n_layers: int
) -> None:
    """Build steering at these hook points into the layers.

    Raises:
        RuntimeError: layers of another form than (hidden, residual) -> (hidden, residual); a hook point that they do
            not have. Nothing is changed then.
    """
    operators = Operators.of(tables.program.device)
    kinds = {number: check_layer(layer, tables) for number, layer in layers.items()}
    inside = {"attn_out", "resid_mid", "mlp_out"} & set(hook_points)
    for number, branches in kinds.items():
        if inside and branches is None:
            raise RuntimeError(
                f"layer {number}, {type(layers[number]).__name__}, keeps no {', '.join(sorted(inside))} that could be "
                'steered: start with "hook_points": ["resid_pre", "resid_post"]'
            )
    for number, layer in layers.items():
        site_numbers = {at: site(at, number) for at in hook_points}
        if number > 0:  # what enters a layer is what left the one before, and is steered there
            site_numbers.pop("resid_pre", None)
        if number < n_layers - 1 and "resid_pre" in hook_points:
            site_numbers["resid_post"] = site("resid_post", number)
        sites = {at: Site(number_, tables, operators) for at, number_ in site_numbers.items()}
        for at, built in sites.items():
            layer.add_module(f"faststeer_{at}", built)
        _patch_layer(layer, sites)
        branches = kinds[number]
        if branches is not None:
            _patch_branches(branches, sites)


@dataclass(frozen=True)
class LayerBranches:
    """The modules of a layer that give attn_out and mlp_out, and the norm that sums up resid_mid."""

    attention: nn.Module
    norm: nn.Module
    mlp: nn.Module


def _patch_layer(layer: nn.Module, sites: dict[Any, Site]) -> None:
    original, before, after = layer.forward, sites.get("resid_pre"), sites.get("resid_post")

    def forward(
        positions: Tensor, hidden_states: Tensor, residual: Tensor | None = None, *args: Any, **kwargs: Any
    ) -> Any:
        if before is not None:
            if residual is None:
                hidden_states = before.one(hidden_states)
            else:
                hidden_states, residual = before.pair(hidden_states, residual)
        hidden_states, residual = original(positions, hidden_states, residual, *args, **kwargs)
        return after.pair(hidden_states, residual) if after is not None else (hidden_states, residual)

    layer.forward = forward


def _patch_branches(branches: LayerBranches, sites: dict[Any, Site]) -> None:
    for module, at in ((branches.attention, "attn_out"), (branches.mlp, "mlp_out")):
        if at in sites:
            module.forward = _steered(module.forward, sites[at].one)
    if "resid_mid" in sites:
        branches.norm.forward = _norm_of_steered(branches.norm.forward, sites["resid_mid"].pair)


def _steered(original: Callable[..., Any], steer: Callable[[Tensor], Tensor]) -> Callable[..., Tensor]:
    def forward(*args: Any, **kwargs: Any) -> Tensor:
        return steer(original(*args, **kwargs))

    return forward


def _norm_of_steered(original: Callable[..., Any], steer: Callable[..., Any]) -> Callable[..., Any]:
    def forward(x: Tensor, residual: Tensor, *args: Any, **kwargs: Any) -> Any:
        x, residual = steer(x, residual)
        return original(x, residual, *args, **kwargs)

    return forward


# What a layer computes, found out ------------------------------------------------------------------------------------


def find_branches(layer: nn.Module) -> LayerBranches | None:
    """The branches of a layer with norms before its branches (Llama, Qwen) or around them (Gemma 2 and 3)."""
    children = dict(layer.named_children())
    attention, mlp = children.get("self_attn") or children.get("attn"), children.get("mlp")
    if attention is None or mlp is None:
        return None
    names = "post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm"
    sandwich = [children.get(name) for name in names]
    if all(module is not None for module in sandwich):
        return LayerBranches(*sandwich)  # type: ignore[arg-type]
    norm = children.get("post_attention_layernorm") or children.get("ln_2")
    return None if norm is None else LayerBranches(attention, norm, mlp)


@contextlib.contextmanager
def replaced(forwards: Mapping[nn.Module, Callable[..., Any]]) -> Iterator[None]:
    """Give modules other `forward`s for a while."""
    before = {module: module.__dict__.get("forward") for module in forwards}
    try:
        for module, forward in forwards.items():
            module.forward = forward
        yield
    finally:
        for module, instance_forward in before.items():
            if instance_forward is not None:
                module.forward = instance_forward
            elif "forward" in module.__dict__:
                del module.forward


@torch.no_grad()
def check_layer(layer: nn.Module, tables: StepTables) -> LayerBranches | None:
    """Run a layer with its attention replaced by a fixed tensor: it must take and give a pair whose sum is the stream.

    Returns:
        Its branches; None where they do not give attn_out, resid_mid and mlp_out as tensors of their own.

    Raises:
        RuntimeError: it does not work with such pairs.
    """
    refused = (
        f"{type(layer).__name__} does not hand on a pair (hidden, residual) whose sum is the residual stream: "
        "in vLLM, faststeer steers models with fused residual additions (Llama, Mistral, Qwen, Phi-3, Gemma, ...)"
    )
    attention = layer._modules.get("self_attn") or layer._modules.get("attn")
    weights = [p for p in layer.parameters() if p.dtype in DTYPES]
    if attention is None or not weights:
        raise RuntimeError(refused)
    dtype, hidden_size = weights[0].dtype, tables.program.hidden_size
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(3, hidden_size, generator=generator).to(weights[0].device, dtype) for _ in range(3)]
    hidden, residual, attended = tensors
    positions = torch.zeros(3, dtype=torch.long, device=hidden.device)
    seen: dict[str, Any] = {}
    branches = find_branches(layer)
    watched = {} if branches is None else {"attention": branches.attention, "norm": branches.norm, "mlp": branches.mlp}
    handles = [
        module.register_forward_hook(lambda _, args, out, name=name: seen.__setitem__(name, (args, out)))
        for name, module in watched.items()
    ]
    # LoRA's layers look up which adapters a step uses, and there is no step yet.
    stand_ins: dict[nn.Module, Callable[..., Any]] = {attention: lambda *args, **kwargs: attended.clone()}
    stand_ins |= {m: m.base_layer.forward for m in layer.modules() if hasattr(m, "base_layer")}  # type: ignore[union-attr]
    try:
        with replaced(stand_ins):
            results = [
                layer(positions, h.clone(), r.clone())
                for h, r in ((torch.zeros_like(hidden), hidden + residual), (hidden, residual))
            ]
    except Exception as error:
        raise RuntimeError(f"{refused} (a trial run failed: {error})") from error
    finally:
        for handle in handles:
            handle.remove()
    if not all(isinstance(r, tuple) and len(r) == 2 and all(isinstance(t, Tensor) for t in r) for r in results):
        raise RuntimeError(refused)
    (h0, r0), (h1, r1) = results
    tolerance = 64 * torch.finfo(dtype).eps
    if not torch.allclose((h0 + r0).float(), (h1 + r1).float(), rtol=tolerance, atol=tolerance * float(r0.abs().max())):
        raise RuntimeError(refused)
    if not {"attention", "norm", "mlp"} <= set(seen):
        return None
    (x, *_), summed = seen["norm"]
    one = isinstance(summed, tuple) and len(summed) == 2
    if not one or x is not seen["attention"][1] or h1 is not seen["mlp"][1] or r1 is not summed[1]:
        return None
    return branches
