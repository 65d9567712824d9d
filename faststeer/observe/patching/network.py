"""A model as a graph of parts: its layers run one by one from the steered one on, with what each head and MLP writes to
the residual stream taken out, and what each query, key, value and MLP reads put in.

The model computes everything itself: rotary embeddings, norms of queries and keys, masks, soft caps, experts. Only
three things are done beside it, each from weights that `find_parts` has confirmed: what one head writes
(z W_O^h, through the output norm where there is one), what one query, key or value makes of its own input (norm, then
its rows of the projection), and the derivative of a norm.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from faststeer.hf.anatomy import find_hook_points, run_four_tokens
from faststeer.hf.attention import AttentionCall, exchange_attention
from faststeer.hf.batching import check_evaluating, forward_arguments
from faststeer.hf.changes import Changes, Context, changing
from faststeer.hf.hook_points import HookPoints, first_output, first_tensor, quiet, with_first
from faststeer.hf.known import known_of
from faststeer.hf.norms import wide
from faststeer.hf.steering import is_steered
from faststeer.observe.lens import LogitLens
from faststeer.observe.parts import LayerParts, Norm, find_parts, matrix
from faststeer.observe.patching.graph import Graph

SAMPLES = 4  # random directions in which it is felt what a row of a projection moves


@dataclass(frozen=True)
class HeadRows:
    """Where a layer makes its queries (keys, values): outputs `rows` `[heads, size]` of the projection `path`."""

    path: str
    rows: Tensor


@dataclass
class LayerPass:
    """What a layer read and wrote in one pass, `[batch, tokens, ...]`.

    Attributes:
        stream: the residual stream it read.
        middle: the stream that its MLP's norm read.
        mixed: what enters the output projection, head after head.
        scale: of the output norm, `[..., 1]`; None where there is none.
        mlp_out: what its MLP wrote.
        left: the residual stream that it leaves.
    """

    stream: Tensor
    middle: Tensor
    mixed: Tensor
    scale: Tensor | None
    mlp_out: Tensor
    left: Tensor


@dataclass
class Gradients:
    """d metric / d (a layer's tensors), fp32 or better.

    Attributes:
        stream: `[batch, tokens, hidden]` with respect to what the layer reads, by all ways.
        attn_out: with respect to what attention writes.
        readers: `[batch, receivers, tokens, hidden]` with respect to the pre-norm input of each query, key, value and
            the MLP, by that reader alone.
    """

    stream: Tensor
    attn_out: Tensor
    readers: Tensor


@dataclass
class _Tap:
    """What the hooks of a layer put in and note during one call."""

    projected: dict[str, Tensor] = field(default_factory=dict)  # noted, or put in place where `putting`
    putting: bool = False
    watching: bool = False  # gradients are asked for: the MLP's input gets a node of its own
    attn_out: Tensor | None = None
    mixed: Tensor | None = None
    attended: Tensor | None = None
    middle: Tensor | None = None
    mlp_in: Tensor | None = None
    mlp_out: Tensor | None = None
    replace_mlp_in: Callable[[], Tensor] | None = None


class Network(Context["Network"]):
    """A model from one layer on, as a `Graph`. Enter it (`with network:`) before running anything: that sets hooks,
    which are gone behind the block.

    Raises:
        ValueError: an architecture whose heads cannot be told apart (`find_parts`), layers with different numbers of
            heads, a model in training mode or on several devices. RuntimeError: a model that is being steered.
    """

    def __init__(self, model: nn.Module, start: int) -> None:
        check_evaluating(model)
        if is_steered(model):
            raise RuntimeError("the model is being steered: leave that context; patching steers by itself")
        self.model, self.points = model, find_hook_points(model)
        parts, rows = find_parts(model), find_rows(model)
        shapes = {(part.heads, part.kv_heads, part.head_dim) for part in parts[start:]}
        if len(shapes) > 1:
            raise ValueError(f"{type(model).__name__}: layers with different heads {sorted(shapes)} make no one graph")
        devices = {str(parameter.device) for parameter in model.parameters()}
        if len(devices) > 1:
            raise ValueError(f"the model is on several devices {sorted(devices)}: load it on one for patching")
        parallel = self.points.resid_mid is None
        self.graph = Graph(start, self.points.n_layers, parts[0].heads, parts[0].kv_heads, parallel)
        self.parts, self.rows = parts[start:], rows[start:]
        self.layers = [self.points.layer(model, start + i) for i in range(self.graph.depth)]
        self.lens = LogitLens(model)
        self.device = next(model.parameters()).device
        self._taps = [_Tap() for _ in self.layers]
        self._callers: list[Callable[[Tensor], Any]] = []

    def enter(self, changes: Changes) -> Network:
        changes.on_undo(self._forget)
        for number in range(self.graph.depth):
            self._hook(changes, number)
        return self

    def _forget(self) -> None:
        self._callers = []
        self._reset()

    # Passes -----------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def base(self, batch: Mapping[str, Tensor]) -> list[LayerPass]:
        """Run the model unsteered over a batch; later runs are over the same tokens."""
        self._callers = []
        streams: list[Tensor] = []  # that enter the layers, and the one that the last layer leaves

        def note(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            streams.append(first_tensor(args, kwargs))
            self._callers.append(_caller(layer, args, kwargs))

        with changing() as changes:
            for layer in self.layers:
                changes.hook(layer.register_forward_pre_hook, note, with_kwargs=True)
            last = self.layers[-1].register_forward_hook
            changes.hook(last, lambda module, args, output: streams.append(first_output(output)))
            self._reset()
            self.model(**forward_arguments(self.model, batch))
        return [self._noted(i, *streams[i : i + 2]) for i in range(self.graph.depth)]

    @torch.no_grad()
    def run(self, stream: Tensor) -> Iterator[LayerPass]:
        """Run the layers over another stream `[batch, tokens, hidden]`."""
        for i in range(self.graph.depth):
            self._reset()
            left = self._call(i, stream)
            yield self._noted(i, stream, left)
            stream = left

    @torch.no_grad()
    def run_reading(
        self, i: int, base: LayerPass, attention: Tensor, mlp: Callable[[Tensor | None], Tensor]
    ) -> LayerPass:
        """Run layer i with an input of its own for each reader. Of what is returned, the streams are the base's.

        Args:
            base: what the layer read and wrote unsteered; says how many rows there are.
            attention: `[batch, queries + keys + values, tokens, hidden]`: the streams that they read.
            mlp: from what the heads of this layer write, `[batch, heads, tokens, hidden]` (None where the MLP runs in
                parallel), to the stream that the MLP reads, `[batch, tokens, hidden]`.
        """
        self._reset()
        tap, part, layer = self._taps[i], self.parts[i], self.layers[i]
        tap.projected, tap.putting = self._project(i, attention), True

        def stream_of_mlp() -> Tensor:
            stream = mlp(None if self.graph.parallel else self._written(i, *self._mixed(i)))
            return stream if part.mlp_norm is None else layer.get_submodule(part.mlp_norm.path)(stream)

        tap.replace_mlp_in = stream_of_mlp
        self._call(i, base.stream)
        mixed, scale = self._mixed(i)
        assert tap.mlp_out is not None
        return replace(base, mixed=mixed, scale=scale, mlp_out=tap.mlp_out.view(base.stream.shape))

    def gradients(self, i: int, stream: Tensor, gradient: Tensor) -> Gradients:
        """The derivatives in layer i, which reads `stream`, of a metric whose derivative with respect to what the layer
        leaves is `gradient` (both `[batch, tokens, hidden]`). The layer is run again for it; nothing is kept after."""
        self._reset()
        tap = self._taps[i]
        tap.watching = True
        with torch.enable_grad():
            leaf = stream.detach().requires_grad_()
            left = self._call(i, leaf)
            assert tap.attn_out is not None and tap.mlp_in is not None and tap.middle is not None
            paths, middle = list(tap.projected), tap.middle
            inputs = [leaf, tap.attn_out, tap.mlp_in, *(tap.projected[path] for path in paths)]
            of_stream, of_attn_out, of_mlp_in, *rest = torch.autograd.grad(left, inputs, gradient.to(left.dtype))
        self._reset()
        shape = stream.shape
        readers = wide(stream).new_empty(shape[0], self.graph.receivers_per_layer, *shape[1:])
        self._back_to_stream(i, stream, dict(zip(paths, rest, strict=True)), readers[:, :-1])
        readers[:, -1] = norm_gradient(self.parts[i].mlp_norm, self.layers[i], middle.detach(), of_mlp_in).view(shape)
        return Gradients(of_stream, of_attn_out.view(shape), readers)

    def writes(self, i: int, layer_pass: LayerPass) -> Tensor:
        """What each head of layer i writes to the residual stream, `[batch, heads, tokens, hidden]` in the model's
        dtype."""
        return self._written(i, layer_pass.mixed, layer_pass.scale)

    # Inside -----------------------------------------------------------------------------------------------------------

    def _written(self, i: int, mixed: Tensor, scale: Tensor | None) -> Tensor:
        """The same from what enters the output projection (and the scale of the output norm)."""
        part, layer = self.parts[i], self.layers[i]
        weight = matrix(layer.get_submodule(part.output)).unflatten(1, (part.heads, -1))
        written = torch.einsum("bthd,ohd->bhto", mixed.unflatten(-1, (part.heads, -1)), weight)
        if part.output_norm is None:
            return written
        bias = part.output_bias(layer)
        if bias is not None:  # of no head in particular, but scaled with them
            written = written + bias / part.heads
        assert scale is not None
        return (part.output_norm.linear(layer, written) * scale.unsqueeze(1)).to(mixed.dtype)

    def _reset(self) -> None:
        self._taps = [_Tap() for _ in self.layers]

    def _call(self, i: int, stream: Tensor) -> Tensor:
        return first_output(self._callers[i](stream)).view(stream.shape)

    def _noted(self, i: int, stream: Tensor, left: Tensor) -> LayerPass:
        tap = self._taps[i]
        mixed, scale = self._mixed(i)
        assert tap.middle is not None and tap.mlp_out is not None
        shape = stream.shape
        return LayerPass(stream, tap.middle.reshape(shape), mixed, scale, tap.mlp_out.reshape(shape), left)

    def _mixed(self, i: int) -> tuple[Tensor, Tensor | None]:
        tap, norm = self._taps[i], self.parts[i].output_norm
        assert tap.mixed is not None and tap.attended is not None
        return tap.mixed, None if norm is None else norm.scale(tap.attended)

    def _project(self, i: int, streams: Tensor) -> dict[str, Tensor]:
        """The outputs of layer i's projections `[batch, tokens, out]`, where each query, key and value has read a
        stream of its own."""
        part, layer = self.parts[i], self.layers[i]
        if part.attention_norm is not None:
            streams = layer.get_submodule(part.attention_norm.path)(streams)
        outputs: dict[str, Tensor] = {}
        first = 0
        for each in self.rows[i]:
            projection, heads = layer.get_submodule(each.path), each.rows.shape[0]
            rows = each.rows.to(streams.device)
            weight, bias = matrix(projection), getattr(projection, "bias", None)
            out = torch.einsum("bhti,hdi->bthd", streams[:, first : first + heads], weight[rows])
            out = out if bias is None else out + bias[rows]
            if each.path not in outputs:
                outputs[each.path] = out.new_zeros(*out.shape[:2], weight.shape[0])
            outputs[each.path][..., rows.flatten()] = out.flatten(2)
            first += heads
        return outputs

    def _back_to_stream(self, i: int, stream: Tensor, projected: Mapping[str, Tensor], out: Tensor) -> None:
        """From derivatives with respect to projections' outputs to those with respect to each reader's own stream,
        `[batch, readers, tokens, hidden]`."""
        layer, first = self.layers[i], 0
        for each in self.rows[i]:
            heads, size = each.rows.shape
            rows = each.rows.to(stream.device)
            weight = matrix(layer.get_submodule(each.path))[rows].to(out.dtype)
            g = projected[each.path].view(*stream.shape[:2], -1)[..., rows.flatten()].to(out.dtype)
            for head in range(heads):  # one at a time: all together take as much memory again
                back = g[..., head * size : (head + 1) * size] @ weight[head]
                out[:, first + head] = norm_gradient(self.parts[i].attention_norm, layer, stream, back)
            first += heads

    def _hook(self, changes: Changes, i: int) -> None:
        part, layer = self.parts[i], self.layers[i]
        for path in dict.fromkeys(each.path for each in self.rows[i]):

            def projection(module: nn.Module, args: Any, output: Tensor, path: str = path) -> Tensor:
                tap = self._taps[i]
                if tap.putting:
                    return tap.projected[path].view(output.shape)
                if tap.watching:
                    tap.projected[path] = output
                return output

            changes.hook(layer.get_submodule(path).register_forward_hook, projection)

        def noting_output(name: str) -> Callable[..., None]:
            return lambda module, args, output: setattr(self._taps[i], name, first_output(output))

        def mixed(module: nn.Module, args: Any, kwargs: Any) -> None:
            self._taps[i].mixed = first_tensor(args, kwargs)

        def middle(module: nn.Module, args: Any, kwargs: Any) -> None:
            # The first reading counts: a norm that is called on streams of our own comes later.
            if self._taps[i].middle is None:
                self._taps[i].middle = first_tensor(args, kwargs)

        def mlp_in(module: nn.Module, args: Any, kwargs: Any) -> Any:
            tap, x = self._taps[i], first_tensor(args, kwargs)
            if part.mlp_norm is None:
                tap.middle = x
            if tap.replace_mlp_in is not None:
                other = tap.replace_mlp_in().view(x.shape)
            elif tap.watching:
                other = tap.mlp_in = x.view_as(x)  # apart from the residual branch, and from attention's reading
            else:
                return None
            return with_first(args, kwargs, other)

        output = layer.get_submodule(part.output)
        changes.hook(output.register_forward_pre_hook, mixed, with_kwargs=True)
        changes.hook(output.register_forward_hook, noting_output("attended"))
        for name in ("attn_out", "mlp_out"):
            branch = layer.get_submodule(self.points.branch(name, i) or "")
            changes.hook(branch.register_forward_hook, noting_output(name))
        if part.mlp_norm is not None:
            changes.hook(layer.get_submodule(part.mlp_norm.path).register_forward_pre_hook, middle, with_kwargs=True)
        changes.hook(layer.get_submodule(part.mlp).register_forward_pre_hook, mlp_in, with_kwargs=True)


def _caller(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Callable[[Tensor], Any]:
    """Calls a layer as it was called, on another stream; does not hold the old one."""
    if args:
        rest = args[1:]
        return lambda stream: layer(stream, *rest, **kwargs)
    old = first_tensor(args, kwargs)
    name = next(name for name, value in kwargs.items() if value is old)
    others = {key: value for key, value in kwargs.items() if key != name}
    return lambda stream: layer(**{name: stream}, **others)


def norm_gradient(norm: Norm | None, layer: nn.Module, x: Tensor, gradient: Tensor) -> Tensor:
    """The derivative with respect to a norm's input x, from that with respect to its output; broadcast.

    With c = C x, r = (mean(c^2) + eps)^-1/2 and g' = C (g * w): r g' - r^3 c mean(c g')."""
    if norm is None:
        return wide(gradient)
    g, c, r = norm.transposed(layer, gradient), wide(x), norm.scale(x)
    c = c - c.mean(-1, keepdim=True) if norm.centred else c
    return r * g - r**3 * c * (c * g).mean(-1, keepdim=True)


# Where queries, keys and values are made ------------------------------------------------------------------------------


def find_rows(model: nn.Module) -> list[list[HeadRows]]:
    """Of each layer, the rows of projections that make its queries, keys and values, head by head (one of the three
    after the other). Felt, not named: a row belongs to the head whose query (key) moves most with it. Two
    passes over four tokens, once per model.

    Raises:
        ValueError: no linear projection of what attention reads makes the queries (or keys), or heads share rows.
    """
    parts = find_parts(model)
    return known_of(model).get("rows of projections", lambda: _find_rows(model, find_hook_points(model), parts))


def _find_rows(model: nn.Module, points: HookPoints, parts: Sequence[LayerParts]) -> list[list[HeadRows]]:
    calls: dict[int, tuple[Tensor, Tensor]] = {}
    outputs: list[dict[str, tuple[Tensor, Tensor]]] = [{} for _ in parts]

    def note(call: AttentionCall) -> Tensor:
        calls[call.layer] = call.query, call.key
        return call.attend()

    def begin_graph(number: int, name: str, module: nn.Module, args: Any, output: Tensor) -> Tensor:
        """Note a projection's input and output, and begin a new graph behind it."""
        leaf = output.detach().requires_grad_()
        outputs[number][name] = args[0].detach(), leaf
        return leaf

    with quiet(model), changing() as changes:
        for number, part in enumerate(parts):
            attention = points.layer(model, number).get_submodule(part.attention)
            for name, module in attention.named_modules(prefix=part.attention):
                weight = getattr(module, "weight", None)
                if isinstance(weight, Tensor) and weight.ndim == 2:
                    changes.hook(module.register_forward_hook, partial(begin_graph, number, name))
        with exchange_attention(model, note, points), torch.enable_grad():
            run_four_tokens(model)
            return [_rows_of(model, number, part, *calls[number], outputs[number]) for number, part in enumerate(parts)]


def _rows_of(
    model: nn.Module,
    number: int,
    part: LayerParts,
    query: Tensor,
    key: Tensor,
    outputs: Mapping[str, tuple[Tensor, Tensor]],
) -> list[HeadRows]:
    head_rows = []
    read = outputs[part.value][0]
    projections = {path: out for path, (received, out) in outputs.items() if torch.equal(received, read)}
    for what, tensor in (("queries", query), ("keys", key)):
        makers = [HeadRows(path, rows) for path, x in projections.items() if (rows := _felt(tensor, x)) is not None]
        if len(makers) != 1:
            raise ValueError(
                f"{type(model).__name__}: layer {number} makes its {what} in {len(makers)} linear projections whose "
                "rows can be told apart by heads, expected one: single edges cannot be patched in this architecture"
            )
        head_rows += makers
    return [*head_rows, HeadRows(part.value, part.value_rows.view(part.kv_heads, -1))]


def _felt(tensor: Tensor, projection: Tensor) -> Tensor | None:
    """The outputs `[heads, size]` of a projection that make each head of `tensor` `[1, heads, tokens, head_dim]`; None
    where it has no part in them or no equal one."""
    heads = tensor.shape[1]
    if not tensor.requires_grad:
        return None
    generator = torch.Generator().manual_seed(0)
    moved = torch.zeros(heads, projection.shape[-1], dtype=torch.float64)
    for _ in range(SAMPLES):
        direction = torch.randn(tensor.shape[2:], generator=generator).to(tensor)
        for head in range(heads):
            (g,) = torch.autograd.grad(
                (tensor[:, head] * direction).sum(), projection, retain_graph=True, allow_unused=True
            )
            if g is None:
                return None
            moved[head] += g.double().cpu().square().view(-1, g.shape[-1]).sum(0)
    owner, own = moved.argmax(0), moved.amax(0) > 0
    rows = [torch.nonzero(own & (owner == head)).flatten() for head in range(heads)]
    if len({len(each) for each in rows}) > 1 or not len(rows[0]):
        return None
    return torch.stack(rows)
