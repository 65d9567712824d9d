"""Steering value vectors: what a vector added to the residual stream says through the values of each attention head,
whatever the input is; and steering with that contribution, or the one that the MLPs read directly, taken out again.

With h_c = H_c + S_c in the stream at token c (S: what steering added), a norm N(h) = r(h) C h * w + b in front, and the
attention pattern A^h of the steered run,

    Attn(H + S)_t = sum_h sum_c A^h_tc r(h_c) [ (C H_c * w) W_V^h W_O^h  +  svv^h(S_c) ] + biases
    svv^h(s) = (C s * w) W_V^h W_O^h          (times the output norm's weight where there is one: sandwich norms)

Source: arXiv 2604.08524. C is 1 for RMSNorm and subtracts the mean for LayerNorm.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from faststeer.hf.anatomy import find_hook_points
from faststeer.hf.attention import AttentionCall, exchange_attention
from faststeer.hf.changes import Changes
from faststeer.hf.hook_points import HookPoints, first_tensor, layer_numbers
from faststeer.hf.hooks import read
from faststeer.hf.steering import Path, Plans, Steering
from faststeer.observe.additions import additions
from faststeer.observe.lens import LogitLens
from faststeer.observe.parts import LayerParts, Norm, find_parts
from faststeer.plan import Plan, site
from faststeer.program import Capacity
from faststeer.vector import SteeringVector, check_direction

Ablated = Literal["svv", "mlp"]


@dataclass(frozen=True, eq=False)
class SteeringValueVectors:
    """svv^h of every head of some layers.

    Attributes:
        vectors: `[layers, heads, hidden]`, fp32 or better, in the units of the residual stream, without the scales r(h)
            that the input gives (positive, the same for all heads of a layer).
        layers: their layers.
    """

    vectors: Tensor
    layers: tuple[int, ...]

    def __getitem__(self, layer: int) -> Tensor:
        """`[heads, hidden]` of a layer."""
        if layer not in self.layers:
            raise KeyError(f"no steering value vectors for layer {layer}: there are those of {self.layers}")
        return self.vectors[self.layers.index(layer)]

    @property
    def norms(self) -> Tensor:
        """`[layers, heads]`: the length of each."""
        return self.vectors.norm(dim=-1)

    def top_tokens(
        self, model: nn.Module, tokenizer: Any, k: int = 10, *, largest: bool = True
    ) -> dict[tuple[int, int], list[str]]:
        """The k tokens that each head's vector raises most (lowers most: `largest=False`), by the logit lens:
        `{(layer, head): tokens}`, the strongest heads first."""
        lens, n_heads = LogitLens(model), self.vectors.shape[1]
        words = [lens.top_tokens(heads, tokenizer, k, direction=True, largest=largest) for heads in self.vectors]
        order = self.norms.flatten().argsort(descending=True).tolist()
        cells = ((i // n_heads, i % n_heads) for i in order)
        return {(self.layers[layer], head): words[layer][head] for layer, head in cells}


@torch.no_grad()
def svv(
    model: nn.Module, vector: SteeringVector | Tensor, layers: Iterable[int] | None = None, coefficient: float = 1.0
) -> SteeringValueVectors:
    """svv^h(coefficient * vector) of every head. No forward pass over text: weights alone.

    Args:
        vector: `[hidden]`, or a SteeringVector of one layer.
        layers: of the heads; by default those that read the stream behind the SteeringVector's hook point, all for a
            tensor.
        coefficient: as in `Add`.

    Raises:
        ValueError: a vector of several layers or of another hidden size, layers out of range, an architecture whose
            weights cannot be read (`find_parts`).
    """
    points = find_hook_points(model)
    first, direction = 0, vector
    if isinstance(vector, SteeringVector):
        if len(vector.layers) != 1:
            raise ValueError(
                f"the vector has the layers {vector.layers}: pass the one that is added, such as vector[layer], or a "
                "SteeringVector of that layer alone"
            )
        first = vector.layers[0] + (vector.at != "resid_pre")
        direction = vector[vector.layers[0]]
    direction = check_direction(direction, "the vector")
    if direction.shape[0] != points.hidden_size:
        raise ValueError(f"the vector has hidden size {direction.shape[0]}, the model {points.hidden_size}")
    if layers is None and first >= points.n_layers:
        raise ValueError("the vector is added behind the last layer: no layer reads it")
    chosen = tuple(layer_numbers(range(first, points.n_layers) if layers is None else layers, points.n_layers))
    parts = find_parts(model)
    made = []
    for number in chosen:
        layer, part = points.layer(model, number), parts[number]
        made.append(_heads(layer, part, coefficient * _linear(part.attention_norm, layer, _like(layer, direction))))
    return SteeringValueVectors(torch.stack([each.to(made[0].device) for each in made]), chosen)


def _heads(layer: nn.Module, part: LayerParts, x: Tensor) -> Tensor:
    """x W_V^h W_O^h, times the output norm's weight: `[heads, hidden]` from `[hidden]`."""
    values = part.value_matrix(layer) @ x  # [kv_heads, head_dim]
    values = values.repeat_interleave(part.heads // part.kv_heads, 0)
    return _linear(part.output_norm, layer, torch.einsum("hod,hd->ho", part.output_matrix(layer), values))


def _linear(norm: Norm | None, layer: nn.Module, x: Tensor) -> Tensor:
    return x if norm is None else norm.linear(layer, x)


def _like(layer: nn.Module, x: Tensor) -> Tensor:
    """A direction on a layer's device, fp32 or the model's dtype if that is better."""
    weight = next(layer.parameters())
    return x.to(weight.device, torch.promote_types(weight.dtype, torch.float32))


# What plans add to the stream -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Group:
    """What one plan adds to the same tokens: at each site a vector `[hidden]`, fp64 on the CPU."""

    slot: int
    low: int
    high: int
    added: dict[int, Tensor]

    def before(self, number: int) -> Tensor:
        """What has been added when the stream passes a site, that site included."""
        return sum((v for n, v in self.added.items() if n <= number), torch.zeros_like(next(iter(self.added.values()))))


def _groups(by_slot: Mapping[int, Plan | None], n_layers: int, hidden_size: int) -> list[_Group]:
    """The additions of plans by the slots they are in.

    Raises:
        ValueError: a plan that does something else than add vectors.
    """
    found: dict[tuple[int, int, int], _Group] = {}
    for slot, plan in by_slot.items():
        if plan is None:
            continue
        for entry, step in additions(plan, n_layers, hidden_size, "steering value vectors are those of added vectors"):
            key = slot, *entry.position_range
            group = found.setdefault(key, _Group(*key, {}))
            group.added[entry.site] = group.added[entry.site] + step if entry.site in group.added else step
    return list(found.values())


def _active(groups: Sequence[_Group], rows: Tensor, like: Tensor) -> Tensor:
    """`[rows, groups]`: 1 where a row has had a group's vectors added, else 0."""
    slot, position, _ = rows
    masks = [(slot == g.slot) & (position >= g.low) & (position < g.high) for g in groups]
    return torch.stack(masks, dim=-1).to(like)


# Ablation -------------------------------------------------------------------------------------------------------------


def ablate(
    model: nn.Module,
    plans: Plans,
    what: Ablated | Sequence[Ablated],
    *,
    hook_points: HookPoints | None = None,
    capacity: Capacity | None = None,
    path: Path | None = None,
) -> Steering:
    """Steer a model inside a `with` block, with what steering added withheld from some of its readers, in every layer
    from the steered one on:

        "svv": the values; x_c -> x_c - r(h_c) (C S_c * w) at the input of W_V, queries and keys untouched
        "mlp": the MLPs' direct reading; the same at their input

    h is the steered stream, so norms scale as they do under steering. The steering that has passed through other layers
    stays. Taken out behind the projection, so that fused QKV projections serve, at the cost of one small product per
    layer. Everything else is `steer`. Source: arXiv 2604.08524.

    Raises:
        TypeError, ValueError: as `steer`; another name; a plan that does not only `Add`; weights that cannot be read.
    """
    kinds = (what,) if isinstance(what, str) else tuple(what)
    if not kinds or set(kinds) - {"svv", "mlp"}:
        raise ValueError(f"ablate what? {what!r}: expected 'svv', 'mlp' or both")
    return Steering(model, plans, hook_points, capacity, path, Ablating(model, kinds))


class Ablating:
    """What acts beside a steering that `ablate` returns."""

    copies, alone = 1, ""

    def __init__(self, model: nn.Module, kinds: tuple[Ablated, ...]) -> None:
        self._kinds, self._parts, self._points = kinds, find_parts(model), find_hook_points(model)
        self._plans: list[Plan | None] | None = None  # that the groups are of
        self._groups: list[_Group] = []
        self._withheld: dict[tuple[str, int], Tensor] = {}

    def check(self, plan: Plan) -> None:
        """Raise ValueError for a plan that does not only add."""
        _groups({0: plan}, self._points.n_layers, self._points.hidden_size)

    def check_generate(self, model: Any, given: Mapping[str, Any]) -> None:
        """Any generation will do."""

    def groups(self, steering: Steering) -> list[_Group]:
        """What the plans that are loaded now add."""
        loaded = list(steering.loaded)
        if self._plans is None or any(old is not new for old, new in zip(self._plans, loaded, strict=True)):
            self._groups = _groups(dict(enumerate(loaded)), self._points.n_layers, self._points.hidden_size)
            self._plans = loaded
            self._withheld.clear()
        return self._groups

    def enter(self, changes: Changes, steering: Steering) -> None:
        """Withhold from every layer's readers."""
        for number, part in enumerate(self._parts):
            layer = self._points.layer(steering.model, number)
            scales: dict[str, Tensor] = {}
            if "svv" in self._kinds:
                self._watch_scale(changes, layer, part.attention_norm, part.attention, scales)
                withhold = self._values_withheld(steering, number, part, layer, scales)
                changes.hook(layer.get_submodule(part.value).register_forward_hook, withhold)
            if "mlp" in self._kinds:
                self._watch_scale(changes, layer, part.mlp_norm, part.mlp, scales)
                take = self._input_withheld(steering, number, part, layer, scales)
                changes.hook(layer.get_submodule(part.mlp).register_forward_pre_hook, take, with_kwargs=True)

    def _watch_scale(
        self, changes: Changes, layer: nn.Module, norm: Norm | None, reader: str, scales: dict[str, Tensor]
    ) -> None:
        """Note the scale that the stream gives its reader."""
        if norm is None:
            return

        def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            scales[reader] = norm.scale(first_tensor(args, kwargs))

        changes.hook(layer.get_submodule(norm.path).register_forward_pre_hook, note, with_kwargs=True)

    def _values_withheld(
        self, steering: Steering, number: int, part: LayerParts, layer: nn.Module, scales: Mapping[str, Tensor]
    ) -> Callable[..., Tensor]:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
            def make(added: Tensor) -> Tensor:
                x = _linear(part.attention_norm, layer, _like(layer, added))
                return x @ part.value_matrix(layer).flatten(0, 1).T

            where = site("resid_pre", number)
            share = self._share(steering, "svv", number, where, make, output, scales.get(part.attention))
            if share is None:
                return output
            if part.value_rows.numel() == output.shape[-1]:
                return (output - share).to(output.dtype)
            rows = part.value_rows.to(output.device)
            values = (output[..., rows] - share).to(output.dtype)
            return output.index_copy(output.ndim - 1, rows, values)

        return hook

    def _input_withheld(
        self, steering: Steering, number: int, part: LayerParts, layer: nn.Module, scales: Mapping[str, Tensor]
    ) -> Callable[..., Any]:
        where = site("resid_pre" if self._points.resid_mid is None else "resid_mid", number)

        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            def make(added: Tensor) -> Tensor:
                return _linear(part.mlp_norm, layer, _like(layer, added))

            x = first_tensor(args, kwargs)
            share = self._share(steering, "mlp", number, where, make, x, scales.get(part.mlp))
            if share is None:
                return None
            less = (x - share).to(x.dtype)
            return (
                ((less, *args[1:]), kwargs) if args else (args, {k: less if v is x else v for k, v in kwargs.items()})
            )

        return hook

    def _share(
        self,
        steering: Steering,
        kind: str,
        number: int,
        where: int,
        make: Callable[[Tensor], Tensor],
        like: Tensor,
        scale: Tensor | None,
    ) -> Tensor | None:
        """What of a tensor `[..., out]` is the steering's: r(h) times the product of which groups act on each row and
        what they add there (`make`, of vectors `[groups, hidden]`; made once)."""
        groups = self.groups(steering)
        if not any(n <= where for group in groups for n in group.added):
            return None
        key = kind, number
        if key not in self._withheld:
            self._withheld[key] = make(torch.stack([group.before(where) for group in groups])).detach()
        table = self._withheld[key]
        share = _active(groups, steering.passes.rows_on(table.device), table) @ table
        share = share.view(*like.shape[:-1], -1)
        return share if scale is None else share * scale.view(*like.shape[:-1], 1)


# The identity ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class AttentionSplit:
    """A layer's attention output in a steered run, in parts: attn_out = sum over heads of base + steering, + bias.

    Attributes:
        base: `[batch, tokens, heads, hidden]`: what the heads carry of H = h - S, under the steered pattern and norms.
        steering: `[batch, tokens, heads, hidden]`: what the heads carry of S: sum_c A^h_tc r(h_c) svv^h(S_c).
        bias: `[batch, tokens, hidden]`: output bias (and output norm's bias).
    """

    base: Tensor
    steering: Tensor
    bias: Tensor


@torch.no_grad()
def split(
    model: nn.Module,
    plans: Plans,
    batch: Mapping[str, Tensor],
    layers: Iterable[int] | None = None,
    set_prompt: Sequence[int] | int | None = None,
) -> Iterator[tuple[int, AttentionSplit]]:
    """Split the attention output of some layers (all) in one steered forward pass over `batch` (the arguments of the
    model) into what the heads carry of the steering and of the rest; yields (layer, its split).

    A split takes 2 batch x tokens x heads x hidden numbers per layer, all kept until the pass ends: ask for few layers.

    Args:
        set_prompt: as `Steering.set_prompt`, where the batch holds completions too.

    Raises:
        ValueError: as `ablate`.
    """
    points, parts = find_hook_points(model), find_parts(model)
    wanted = sorted(set(layer_numbers(layers, points.n_layers)))
    taken: dict[int, tuple[Tensor, Tensor, Tensor]] = {}
    ablating = Ablating(model, ())
    steering = Steering(model, plans, part=ablating)

    def attend(call: AttentionCall) -> Tensor:
        out = call.attend()
        if call.layer in wanted:
            part, layer = parts[call.layer], points.layer(model, call.layer)
            added = _added(ablating.groups(steering), steering, call.layer, streams[call.layer])
            x = _linear(part.attention_norm, layer, added)
            if part.attention_norm is not None:
                x = x * part.attention_norm.scale(streams[call.layer])
            values = torch.einsum("khd,btd->bkth", part.value_matrix(layer), x).to(call.value.dtype)
            taken[call.layer] = call.attend(value=call.value - values), call.attend(value=values), out
        return out

    with (
        exchange_attention(model, attend),
        steering,
        read(model, "resid_pre", wanted) as streams,
    ):
        steering.set_prompt(set_prompt)
        model(**batch, use_cache=False)
    for number in wanted:
        yield number, _split(points.layer(model, number), parts[number], *taken.pop(number))


def _added(groups: Sequence[_Group], steering: Steering, number: int, stream: Tensor) -> Tensor:
    """S `[batch, tokens, hidden]` at a layer's input."""
    wide = torch.promote_types(stream.dtype, torch.float32)
    if not groups:
        return torch.zeros_like(stream, dtype=wide)
    table = torch.stack([group.before(site("resid_pre", number)) for group in groups])
    table = table.to(stream.device, wide)
    return (_active(groups, steering.passes.rows_on(stream.device), table) @ table).view(stream.shape)


def _split(layer: nn.Module, part: LayerParts, base: Tensor, steering: Tensor, whole: Tensor) -> AttentionSplit:
    matrix = part.output_matrix(layer)
    of_base, of_steering = (torch.einsum("bthd,hod->btho", x.to(matrix.dtype), matrix) for x in (base, steering))
    bias = part.output_bias(layer)
    rest = torch.zeros_like(of_base[:, :, 0])
    if bias is not None:
        rest = rest + bias
    norm = part.output_norm
    if norm is None:
        return AttentionSplit(of_base, of_steering, rest)
    scale = norm.scale(torch.einsum("bthd,hod->bto", whole.to(matrix.dtype), matrix) + rest)
    of_base, of_steering = (norm.linear(layer, x) * scale.unsqueeze(-1) for x in (of_base, of_steering))
    behind = getattr(layer.get_submodule(norm.path), "bias", None)
    rest = norm.linear(layer, rest) * scale
    return AttentionSplit(of_base, of_steering, rest if behind is None else rest + behind)
