"""The weights of a layer as the formulas of interpretability name them: the norms that attention and MLP read through,
W_V and W_O of every head, whatever the architecture calls them and however it fuses them.

Nothing is taken by its name: which module reads what is seen in one forward pass over four tokens, bit for bit, and so
is where the values lie in a fused projection. What cannot be seen is refused.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from faststeer.hf.anatomy import Call, find_hook_points, watch
from faststeer.hf.attention import AttentionCall, attention_modules, exchange_attention
from faststeer.hf.hook_points import HookPoints, quiet
from faststeer.hf.known import known_of


@dataclass(frozen=True)
class Norm:
    """A norm y = r(x) C x * w + b, with r(x) = (mean((C x)^2) + eps)^-1/2: RMSNorm (C = 1, b = 0) or LayerNorm
    (C subtracts the mean).

    Attributes:
        path: of the module inside its layer (or the model, for the last norm).
        weight_offset: 1 where w = 1 + weight, as in Gemma.
    """

    path: str
    eps: float
    centred: bool
    weight_offset: float

    def scale(self, x: Tensor) -> Tensor:
        """r(x) `[..., 1]`, in fp32 or better."""
        x = self._centre(_wide(x))
        return torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps)

    def linear(self, holder: nn.Module, x: Tensor) -> Tensor:
        """C x * w: what the norm does to x but for the scale that the whole stream gives it. `[..., hidden]`, in fp32
        or better. `holder`: what `path` is a path in."""
        weight = getattr(holder.get_submodule(self.path), "weight", None)
        x = self._centre(_wide(x))
        return x if weight is None else x * (self.weight_offset + _wide(weight)).to(x)

    def _centre(self, x: Tensor) -> Tensor:
        return x - x.mean(-1, keepdim=True) if self.centred else x


@dataclass(frozen=True)
class Parts:
    """Where a decoder layer keeps what attention and MLP read and write. Paths are inside the layer.

    Attributes:
        attention: module that computes attention.
        attention_norm: the norm it reads the residual stream through; None where it reads the stream itself.
        value: projection that makes the values; may make queries and keys as well.
        value_rows: which of its outputs are the values, `[kv_heads * head_dim]`, head after head.
        output: projection behind the heads.
        output_norm: the norm between it and the residual stream (sandwich norms); None mostly.
        mlp: first module of the MLP. mlp_norm: the norm it reads through.
    """

    attention: str
    attention_norm: Norm | None
    value: str
    value_rows: Tensor
    output: str
    output_norm: Norm | None
    mlp: str
    mlp_norm: Norm | None
    heads: int
    kv_heads: int
    head_dim: int

    def value_matrix(self, layer: nn.Module) -> Tensor:
        """W_V `[kv_heads, head_dim, hidden]` in fp32 or better: values = W_V x (+ bias)."""
        rows = matrix(layer.get_submodule(self.value))[self.value_rows.to(_device(layer.get_submodule(self.value)))]
        return _wide(rows).view(self.kv_heads, self.head_dim, -1)

    def output_matrix(self, layer: nn.Module) -> Tensor:
        """W_O `[heads, hidden, head_dim]` in fp32 or better."""
        whole = _wide(matrix(layer.get_submodule(self.output)))
        return whole.view(whole.shape[0], self.heads, self.head_dim).transpose(0, 1)

    def output_bias(self, layer: nn.Module) -> Tensor | None:
        return getattr(layer.get_submodule(self.output), "bias", None)


def find_parts(model: nn.Module) -> tuple[Parts, ...]:
    """The parts of every layer, found once per model by a forward pass over four tokens.

    Raises:
        ValueError: an architecture of another kind: attention that transformers cannot exchange, values that are no
            linear function of what attention reads, a norm that is neither RMSNorm nor LayerNorm, quantised weights.
    """

    def find() -> tuple[Parts, ...]:
        points = find_hook_points(model)
        points.check_uniform(model, "an analysis of attention and MLP")
        return tuple(_find(model, points))

    return known_of(model).get("parts", find)


def matrix(projection: nn.Module) -> Tensor:
    """The weight `[out, in]` of a linear module."""
    weight: Tensor = projection.weight  # type: ignore[assignment]
    return weight.T if isinstance(projection, Conv1D) else weight


def _find(model: nn.Module, points: HookPoints) -> Iterator[Parts]:
    values: dict[int, tuple[AttentionCall, Tensor]] = {}

    def note(call: AttentionCall) -> Tensor:
        out = call.attend()
        values[call.layer] = call, out.detach().cpu()
        return out

    modules = attention_modules(model, points)
    layers = [points.layer(model, i) for i in range(points.n_layers)]
    paths = [f"{points.layers}.{i}" for i in range(points.n_layers)]
    inner = [f"{path}.{name}" for path, layer in zip(paths, layers, strict=True) for name, _ in _named(layer)]
    with quiet(model), exchange_attention(model, note, points):
        calls = watch(model, [*paths, *inner])
    for i, layer in enumerate(layers):
        inside = {name: calls[f"{paths[i]}.{name}"] for name, _ in _named(layer) if f"{paths[i]}.{name}" in calls}
        attention = next(name for name, module in layer.named_modules() if module is modules[i])
        try:
            yield _Layer(layer, attention, calls[paths[i]], inside, points).parts(*values[i])
        except _Unseen as error:
            raise ValueError(f"{type(model).__name__}: {error} in layer {i}: its weights cannot be read") from error


class _Unseen(ValueError):
    """What a forward pass does not show."""


@dataclass(frozen=True)
class _Layer:
    """A layer and what its modules received and sent."""

    layer: nn.Module
    attention: str
    whole: Call
    calls: dict[str, Call]
    points: HookPoints

    def parts(self, call: AttentionCall, mixed: Tensor) -> Parts:
        """`mixed` `[1, tokens, heads, head_dim]`: what attention made of the values."""
        kv_heads, head_dim = call.value.shape[1], call.value.shape[3]
        read = self.calls[self.attention].received
        attention_norm = self._norm_between(self.whole.received, read, "attention")
        values = call.value.detach().cpu().transpose(1, 2).reshape(-1, kv_heads * head_dim)
        value, rows = self._value(read, values, mixed.shape[2], kv_heads)
        output = self._reader_of(mixed.flatten(2), inside=True, what="the projection behind the heads")
        _check_linear(self.layer, output)
        middle = self.whole.received
        if (mid := self.points.branch("resid_mid", 0)) is not None:
            middle = self.calls[mid].received
        mlp, mlp_norm = self._mlp(middle)
        return Parts(
            self.attention,
            attention_norm,
            value,
            rows,
            output,
            self._output_norm(self.calls[output].sent),
            mlp,
            mlp_norm,
            mixed.shape[2],
            kv_heads,
            head_dim,
        )

    def _is_inside(self, name: str) -> bool:
        return name == self.attention or name.startswith(f"{self.attention}.")

    def _norm_between(self, stream: Tensor, read: Tensor, who: str) -> Norm | None:
        """The norm that makes `read` of the residual stream."""
        if torch.equal(stream, read):
            return None
        for name, call in self.calls.items():
            if not self._is_inside(name) and _same(call.received, stream) and _same(call.sent, read):
                return norm_form(self.layer, name)
        raise _Unseen(f"no module that makes what {who} reads of the residual stream")

    def _value(self, read: Tensor, values: Tensor, heads: int, kv_heads: int) -> tuple[str, Tensor]:
        """The projection that the values come from, and where in its output they are."""
        for name, call in self.calls.items():
            if not self._is_inside(name) or name == self.attention or not _same(call.received, read):
                continue
            sent = call.sent.reshape(values.shape[0], -1)
            for rows in _layouts(sent.shape[1], values.shape[1], heads, kv_heads):
                if torch.equal(sent[:, rows], values):
                    _check_linear(self.layer, name)
                    return name, rows
        raise _Unseen(
            "no projection whose output holds the values as they are (a norm or another step stands between them?)"
        )

    def _reader_of(self, sent: Tensor, inside: bool, what: str) -> str:
        """The shallowest, then first, module that receives a tensor."""
        found = [
            name
            for name, call in self.calls.items()
            if self._is_inside(name) == inside and name != self.attention and _same(call.received, sent)
        ]
        if not found:
            raise _Unseen(f"no module that is {what}")
        return min(found, key=lambda name: (name.count("."), self.calls[name].order))

    def _output_norm(self, sent: Tensor) -> Norm | None:
        """The norm between attention's output and the residual stream."""
        end = self.points.branch("attn_out", 0) or ""
        if _same(self.calls[end].sent, sent):
            return None
        if _same(self.calls[end].received, sent):
            return norm_form(self.layer, end)
        raise _Unseen("no module that makes attn_out of attention's output")

    def _mlp(self, middle: Tensor) -> tuple[str, Norm | None]:
        """The MLP's first module and its norm."""
        norms = [
            name
            for name, call in self.calls.items()
            if not self._is_inside(name) and _same(call.received, middle) and is_norm(self.layer.get_submodule(name))
        ]
        for name in norms:
            try:
                return self._mlp_behind(self.calls[name].sent), norm_form(self.layer, name)
            except _Unseen:  # the norm of attention alone
                continue
        return self._mlp_behind(middle), None

    def _mlp_behind(self, read: Tensor) -> str:
        return self._reader_of(read, inside=False, what="the MLP")


def _layouts(width: int, n_values: int, heads: int, kv_heads: int) -> Iterator[Tensor]:
    """Where values may lie in a projection's outputs: alone; behind all queries and keys; behind the query and key of
    each head; behind the queries and key of each group of heads."""
    every = torch.arange(width)
    if width < n_values:
        return
    if width == n_values:
        yield every
        return
    yield every[-n_values:]
    head_dim = n_values // kv_heads
    if width == 3 * n_values:
        yield every.view(kv_heads, 3, head_dim)[:, 2].reshape(-1)
    if width == (heads + 2 * kv_heads) * head_dim:
        yield every.view(kv_heads, heads // kv_heads + 2, head_dim)[:, -1].reshape(-1)


def _named(layer: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    return ((name, module) for name, module in layer.named_modules() if name)


def _same(a: Tensor, b: Tensor) -> bool:
    return a.numel() == b.numel() and torch.equal(a.reshape(-1), b.reshape(-1))


def _check_linear(layer: nn.Module, name: str) -> None:
    module = layer.get_submodule(name)
    weight = getattr(module, "weight", None)
    known = isinstance(weight, Tensor) and weight.ndim == 2 and weight.is_floating_point() and not weight.is_meta
    if not known or not isinstance(module, (nn.Linear, Conv1D)) or hasattr(module, "base_layer"):
        raise _Unseen(f"{name} is a {type(module).__name__}, whose weight is no plain matrix (quantised? an adapter?)")


# Norms ----------------------------------------------------------------------------------------------------------------


def is_norm(module: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    return next(module.children(), None) is None and (weight is None or weight.ndim == 1) and _eps(module) is not None


def norm_form(holder: nn.Module, path: str) -> Norm:
    """What a norm computes, found by comparing with the formulas, in fp32 and on a copy with a random weight (at its
    first value two of them are the same).

    Raises:
        ValueError: neither RMSNorm nor LayerNorm.
    """
    module = holder.get_submodule(path)
    eps, weight = _eps(module), getattr(module, "weight", None)
    if eps is not None and isinstance(weight, Tensor) and not weight.is_meta:
        generator = torch.Generator().manual_seed(0)
        trial = copy.deepcopy(module).float()
        trial._forward_hooks.clear()
        trial._forward_pre_hooks.clear()
        x = (3 * torch.randn(7, weight.shape[-1], generator=generator) + 0.5).to(weight.device)
        with torch.no_grad():
            trial.weight.copy_(torch.randn(weight.shape, generator=generator))  # type: ignore[operator]
            if (bias := getattr(trial, "bias", None)) is not None:
                bias.zero_()
            expected = trial(x)
            for centred in (False, True):
                for offset in (0.0, 1.0):
                    norm = Norm("", eps, centred, offset)
                    if torch.allclose(norm.scale(x) * norm.linear(trial, x), expected, rtol=1e-5, atol=1e-5):
                        return dataclasses.replace(norm, path=path)
    raise _Unseen(f"{path} is a {type(module).__name__}, neither RMSNorm nor LayerNorm")


def _eps(module: nn.Module) -> float | None:
    for name in ("variance_epsilon", "eps"):
        if isinstance(eps := getattr(module, name, None), float):
            return eps
    return None


def _wide(x: Tensor) -> Tensor:
    """In fp32, or fp64 where it is that already."""
    return x if x.dtype == torch.float64 else x.float()


def _device(module: nn.Module) -> torch.device:
    return next(module.parameters()).device
