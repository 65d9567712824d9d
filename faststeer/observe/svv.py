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

from faststeer.compile import layer_numbers
from faststeer.hf.anatomy import find_hook_points
from faststeer.hf.attention import AttentionCall, exchange_attention
from faststeer.hf.changes import Changes
from faststeer.hf.hook_points import HookPoints, first_tensor, with_first
from faststeer.hf.hooks import read
from faststeer.hf.norms import wide
from faststeer.hf.steering import Path, Steering
from faststeer.observe.additions import Addition, acting, additions
from faststeer.observe.lens import LogitLens
from faststeer.observe.parts import LayerParts, Norm, find_parts
from faststeer.plan import Plan, Plans, site
from faststeer.program import Capacity
from faststeer.vector import SteeringVector, check_direction

ANALYSIS = "steering value vectors are those of added vectors"
Ablated = Literal["svv", "mlp"]
Share = Callable[[Tensor], Tensor | None]  # what of a reader's tensor is the steering's; None: nothing


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
    numbers = tuple(layer_numbers(range(first, points.n_layers) if layers is None else layers, points.n_layers))
    parts = find_parts(model)
    vectors = []
    for number in numbers:
        layer, part = points.layer(model, number), parts[number]
        vectors.append(_heads(layer, part, coefficient * _linear(part.attention_norm, layer, _like(layer, direction))))
    return SteeringValueVectors(torch.stack([heads.to(vectors[0].device) for heads in vectors]), numbers)


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
        self._plans: list[Plan | None] | None = None  # that the additions are of
        self._additions: list[Addition] = []
        self._withheld: dict[tuple[str, int], Tensor] = {}

    def check(self, plan: Plan) -> None:
        """Raise ValueError for a plan that does not only add."""
        additions({0: plan}, self._points, ANALYSIS)

    def check_generate(self, model: Any, given: Mapping[str, Any]) -> None:
        """Any generation will do."""

    def additions(self, steering: Steering) -> list[Addition]:
        """What the plans that are loaded now add."""
        loaded = list(steering.loaded)
        if self._plans is None or any(old is not new for old, new in zip(self._plans, loaded, strict=True)):
            self._additions = additions(dict(enumerate(loaded)), self._points, ANALYSIS)
            self._plans = loaded
            self._withheld.clear()
        return self._additions

    def enter(self, changes: Changes, steering: Steering) -> None:
        """Withhold from every layer's readers."""
        for number, part in enumerate(self._parts):
            layer = self._points.layer(steering.model, number)
            if "svv" in self._kinds:
                share = self._watch(changes, steering, number, "svv")
                changes.hook(layer.get_submodule(part.value).register_forward_hook, _values_withheld(part, share))
            if "mlp" in self._kinds:
                share = self._watch(changes, steering, number, "mlp")
                withhold = _input_withheld(share)
                changes.hook(layer.get_submodule(part.mlp).register_forward_pre_hook, withhold, with_kwargs=True)

    def _watch(self, changes: Changes, steering: Steering, number: int, kind: Ablated) -> Share:
        """What of a tensor `[..., out]` of a layer's reader is the steering's: r(h) times the product of which
        additions act on each row and what they add there (`[additions, out]`, made once). Watches the norm for r(h)."""
        part, layer = self._parts[number], self._points.layer(steering.model, number)
        norm = part.attention_norm if kind == "svv" else part.mlp_norm
        where = site("resid_pre" if kind == "svv" or self._points.resid_mid is None else "resid_mid", number)
        scale: Tensor | None = None

        def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            nonlocal scale
            scale = None if norm is None else norm.scale(first_tensor(args, kwargs))

        if norm is not None:
            changes.hook(layer.get_submodule(norm.path).register_forward_pre_hook, note, with_kwargs=True)

        def share(like: Tensor) -> Tensor | None:
            loaded = self.additions(steering)
            if not any(n <= where for addition in loaded for n in addition.by_site):
                return None
            if (kind, number) not in self._withheld:
                added = torch.stack([addition.before(where) for addition in loaded])
                table = _linear(norm, layer, _like(layer, added))
                table = table @ part.value_matrix(layer).flatten(0, 1).T if kind == "svv" else table
                self._withheld[kind, number] = table.detach()
            table = self._withheld[kind, number]
            slot, position, _ = steering.passes.rows_on(table.device)
            withheld = (acting(loaded, slot, position, table) @ table).view(*like.shape[:-1], -1)
            return withheld if scale is None else withheld * scale.view(*like.shape[:-1], 1)

        return share


def _values_withheld(part: LayerParts, share: Share) -> Callable[..., Tensor]:
    def hook(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        if (less := share(output)) is None:
            return output
        if part.value_rows.numel() == output.shape[-1]:
            return (output - less).to(output.dtype)
        rows = part.value_rows.to(output.device)
        return output.index_copy(output.ndim - 1, rows, (output[..., rows] - less).to(output.dtype))

    return hook


def _input_withheld(share: Share) -> Callable[..., Any]:
    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        x = first_tensor(args, kwargs)
        less = share(x)
        return None if less is None else with_first(args, kwargs, (x - less).to(x.dtype))

    return hook


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
    numbers = sorted(set(layer_numbers(layers, points.n_layers)))
    halves: dict[int, tuple[Tensor, Tensor, Tensor]] = {}
    ablating = Ablating(model, ())
    steering = Steering(model, plans, part=ablating)

    def attend(call: AttentionCall) -> Tensor:
        out = call.attend()
        if call.layer in numbers:
            part, layer = parts[call.layer], points.layer(model, call.layer)
            added = _added(ablating.additions(steering), steering, call.layer, streams[call.layer])
            x = _linear(part.attention_norm, layer, added)
            if part.attention_norm is not None:
                x = x * part.attention_norm.scale(streams[call.layer])
            values = torch.einsum("khd,btd->bkth", part.value_matrix(layer), x).to(call.value.dtype)
            halves[call.layer] = call.attend(value=call.value - values), call.attend(value=values), out
        return out

    with (
        exchange_attention(model, attend),
        steering,
        read(model, "resid_pre", numbers) as streams,
    ):
        steering.set_prompt(set_prompt)
        model(**batch, use_cache=False)
    for number in numbers:
        yield number, _split(points.layer(model, number), parts[number], *halves.pop(number))


def _added(loaded: Sequence[Addition], steering: Steering, number: int, stream: Tensor) -> Tensor:
    """S `[batch, tokens, hidden]` at a layer's input."""
    if not loaded:
        return torch.zeros_like(wide(stream))
    table = torch.stack([addition.before(site("resid_pre", number)) for addition in loaded]).to(wide(stream))
    slot, position, _ = steering.passes.rows_on(stream.device)
    return (acting(loaded, slot, position, table) @ table).view(stream.shape)


def _split(layer: nn.Module, part: LayerParts, base: Tensor, steering: Tensor, whole: Tensor) -> AttentionSplit:
    matrix = part.output_matrix(layer)
    of_base, of_steering = (torch.einsum("bthd,hod->btho", x.to(matrix.dtype), matrix) for x in (base, steering))
    rest, bias = torch.zeros_like(of_base[:, :, 0]), part.output_bias(layer)
    rest = rest if bias is None else rest + bias
    norm = part.output_norm
    if norm is None:
        return AttentionSplit(of_base, of_steering, rest)
    scale = norm.scale(torch.einsum("bthd,hod->bto", whole.to(matrix.dtype), matrix) + rest)
    of_base, of_steering = (norm.linear(layer, x) * scale.unsqueeze(-1) for x in (of_base, of_steering))
    behind = getattr(layer.get_submodule(norm.path), "bias", None)
    rest = norm.linear(layer, rest) * scale
    return AttentionSplit(of_base, of_steering, rest if behind is None else rest + behind)
