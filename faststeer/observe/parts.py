"""The weights of a layer as the formulas of interpretability name them: the norms that attention and MLP read through,
W_V and W_O of every head, whatever the architecture calls them and however it fuses them.

Nothing is taken by its name: which module reads what is seen in one forward pass over four tokens, bit for bit, and so
is where the values lie in a fused projection. What cannot be seen is refused.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from faststeer.hf.anatomy import Call, find_hook_points, watch
from faststeer.hf.attention import AttentionCall, attention_modules, exchange_attention
from faststeer.hf.hook_points import HookPoints, quiet
from faststeer.hf.known import known_of
from faststeer.hf.norms import Norm, NotSeen, is_norm, norm_form, wide


@dataclass(frozen=True)
class LayerParts:
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
        weight = matrix(layer.get_submodule(self.value))
        return wide(weight[self.value_rows.to(weight.device)]).view(self.kv_heads, self.head_dim, -1)

    def output_matrix(self, layer: nn.Module) -> Tensor:
        """W_O `[heads, hidden, head_dim]` in fp32 or better."""
        whole = wide(matrix(layer.get_submodule(self.output)))
        return whole.view(whole.shape[0], self.heads, self.head_dim).transpose(0, 1)

    def output_bias(self, layer: nn.Module) -> Tensor | None:
        """The bias of a layer's output projection, None where it has none."""
        return getattr(layer.get_submodule(self.output), "bias", None)


def find_parts(model: nn.Module) -> tuple[LayerParts, ...]:
    """The parts of every layer, found once per model by a forward pass over four tokens.

    Raises:
        ValueError: an architecture of another kind: attention that transformers cannot exchange, values that are no
            linear function of what attention reads, a norm that is neither RMSNorm nor LayerNorm, quantised weights.
    """

    def find() -> tuple[LayerParts, ...]:
        points = find_hook_points(model)
        points.check_uniform(model, "an analysis of attention and MLP")
        return tuple(_find(model, points))

    return known_of(model).get("parts", find)


def matrix(projection: nn.Module) -> Tensor:
    """The weight `[out, in]` of a linear module."""
    weight: Tensor = projection.weight  # type: ignore[assignment]
    return weight.T if isinstance(projection, Conv1D) else weight


def _find(model: nn.Module, points: HookPoints) -> Iterator[LayerParts]:
    values: dict[int, tuple[AttentionCall, Tensor]] = {}

    def note(call: AttentionCall) -> Tensor:
        out = call.attend()
        values[call.layer] = call, out.detach().cpu()
        return out

    modules = attention_modules(model, points)
    layers = [points.layer(model, i) for i in range(points.n_layers)]
    paths = [f"{points.layers}.{i}" for i in range(points.n_layers)]
    inner = [[name for name, _ in layer.named_modules() if name] for layer in layers]
    with quiet(model), exchange_attention(model, note, points):
        calls = watch(
            model, paths + [f"{path}.{name}" for path, names in zip(paths, inner, strict=True) for name in names]
        )
    for i, layer in enumerate(layers):
        inside = {name: calls[f"{paths[i]}.{name}"] for name in inner[i] if f"{paths[i]}.{name}" in calls}
        attention = next(name for name, module in layer.named_modules() if module is modules[i])
        try:
            yield _Layer(layer, attention, calls[paths[i]], inside, points).parts(*values[i])
        except NotSeen as error:
            raise ValueError(f"{type(model).__name__}: {error} in layer {i}: its weights cannot be read") from error


@dataclass(frozen=True)
class _Layer:
    """A layer and what its modules received and sent."""

    layer: nn.Module
    attention: str
    whole: Call
    calls: dict[str, Call]
    points: HookPoints

    def parts(self, call: AttentionCall, mixed: Tensor) -> LayerParts:
        """`mixed` `[1, tokens, heads, head_dim]`: what attention made of the values."""
        kv_heads, head_dim = call.value.shape[1], call.value.shape[3]
        read = self.calls[self.attention].received
        attention_norm = self._attention_norm(self.whole.received, read)
        values = call.value.detach().cpu().transpose(1, 2).reshape(-1, kv_heads * head_dim)
        value, rows = self._value(read, values, mixed.shape[2], kv_heads)
        output = self._reader_of(mixed.flatten(2), inside=True, what="the projection behind the heads")
        _check_linear(self.layer, output)
        middle = self.whole.received
        if (mid := self.points.branch("resid_mid", 0)) is not None:
            middle = self.calls[mid].received
        mlp, mlp_norm = self._mlp(middle)
        return LayerParts(
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

    def _attention_norm(self, stream: Tensor, read: Tensor) -> Norm | None:
        """The norm that makes what attention reads of the residual stream."""
        if torch.equal(stream, read):
            return None
        for name, call in self.calls.items():
            if not self._is_inside(name) and _same(call.received, stream) and _same(call.sent, read):
                return norm_form(self.layer, name, self.points.hidden_size)
        raise NotSeen("no module that makes what attention reads of the residual stream")

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
        raise NotSeen(
            "no projection whose output holds the values as they are (a norm or another step stands between them?)"
        )

    def _reader_of(self, sent: Tensor, inside: bool, what: str) -> str:
        """The shallowest, then first, module that receives a tensor."""
        readers = [
            name
            for name, call in self.calls.items()
            if self._is_inside(name) == inside and name != self.attention and _same(call.received, sent)
        ]
        if not readers:
            raise NotSeen(f"no module that is {what}")
        return min(readers, key=lambda name: (name.count("."), self.calls[name].order))

    def _output_norm(self, sent: Tensor) -> Norm | None:
        """The norm between attention's output and the residual stream."""
        end = self.points.branch("attn_out", 0) or ""
        if _same(self.calls[end].sent, sent):
            return None
        if _same(self.calls[end].received, sent):
            return norm_form(self.layer, end, self.points.hidden_size)
        raise NotSeen("no module that makes attn_out of attention's output")

    def _mlp(self, middle: Tensor) -> tuple[str, Norm | None]:
        """The MLP's first module and its norm."""
        for name, call in self.calls.items():
            if self._is_inside(name) or not _same(call.received, middle) or not is_norm(self.layer.get_submodule(name)):
                continue
            try:
                mlp = self._reader_of(call.sent, inside=False, what="the MLP")
                return mlp, norm_form(self.layer, name, self.points.hidden_size)
            except NotSeen:  # the norm of attention alone
                continue
        return self._reader_of(middle, inside=False, what="the MLP"), None


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


def _same(a: Tensor, b: Tensor) -> bool:
    return a.numel() == b.numel() and torch.equal(a.reshape(-1), b.reshape(-1))


def _check_linear(layer: nn.Module, name: str) -> None:
    module = layer.get_submodule(name)
    weight = getattr(module, "weight", None)
    known = isinstance(weight, Tensor) and weight.ndim == 2 and weight.is_floating_point() and not weight.is_meta
    if not known or not isinstance(module, (nn.Linear, Conv1D)) or hasattr(module, "base_layer"):
        raise NotSeen(f"{name} is a {type(module).__name__}, whose weight is no plain matrix (quantised? an adapter?)")
