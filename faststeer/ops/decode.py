"""What the Engine computes on a CPU besides steering: attention of one new token per row, with the rotation and the
cache before it; linear layers and gated MLPs; and both branches of a decoder layer in one call each. Where one token
per row is read of a small model, calls cost more than what they compute.

For inference, in C++ (csrc/cpu/attention.h, linear.h); each has its formula in PyTorch beside it, which is also what
other back ends run.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from faststeer.ops.dispatch import Backend, backend_of, refuse_gradient
from faststeer.ops.schema import DTYPES, library

Projection = tuple[Tensor, Tensor | None]
Activation = Literal["silu", "gelu_tanh"]
ACTIVATIONS: tuple[Activation, ...] = ("silu", "gelu_tanh")  # in the order of csrc/cpu/rows.h

_DEFINITIONS = {
    "linear": "(Tensor x, Tensor weight, Tensor? bias) -> Tensor",
    "gated_linear": "(Tensor x, Tensor weight, Tensor up, int activation) -> Tensor",
    "gated_mlp": "(Tensor x, Tensor weight, Tensor up, Tensor down, Tensor? bias, int activation) -> Tensor",
    "attention_branch_": "(Tensor x, Tensor query, Tensor key, Tensor value, Tensor? query_bias, Tensor? key_bias, "
    "Tensor? value_bias, Tensor output, Tensor? output_bias, Tensor(a!) keys, Tensor(b!) values, Tensor cosine, "
    "Tensor sine, Tensor column, int tokens, int window, float scaling, float softcap) -> Tensor",
    "decode_attention": "(Tensor query, Tensor keys, Tensor values, Tensor mask, float scaling, float softcap) "
    "-> Tensor",
    "rotary_attention_": "(Tensor query, Tensor key, Tensor value, Tensor(a!) keys, Tensor(b!) values, Tensor cosine, "
    "Tensor sine, Tensor column, Tensor? mask, int tokens, int window, float scaling, float softcap) -> Tensor",
}


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, backend: Backend | None = None) -> Tensor:
    """x W^T + b, `[rows, outputs]`: summed in fp32, rounded once. On a CPU a row's result does not depend on the rows
    beside it.

    Args:
        x: `[rows, inputs]`.
        weight: `[outputs, inputs]`, bias: `[outputs]`, of x's dtype.

    Raises:
        RuntimeError: a gradient would be needed.
        TypeError, ValueError: dtypes or shapes that do not fit.
    """
    refuse_gradient("linear", *(t for t in (x, weight, bias) if t is not None))
    if backend_of(x, backend) != "cpu":
        if x.dtype != torch.float64:
            _check_linear(x, weight, bias)
        return F.linear(x, weight, bias)
    return _run("linear", x, weight, bias)


def gated_linear(
    x: Tensor, weight: Tensor, up: Tensor, activation: Activation, *, backend: Backend | None = None
) -> Tensor:
    """The first half of a gated MLP, act(x W^T) * (x U^T), `[rows, outputs]`: in fp32, rounded once.

    Args:
        x: `[rows, inputs]`.
        weight, up: `[outputs, inputs]`, of x's dtype.
        activation: "silu", or "gelu_tanh" for GELU by its tanh.

    Raises:
        RuntimeError: a gradient would be needed.
        TypeError, ValueError: dtypes, shapes or an activation that do not fit.
    """
    refuse_gradient("gated_linear", x, weight, up)
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation is {activation!r}: expected one of {', '.join(map(repr, ACTIVATIONS))}")
    if backend_of(x, backend) == "cpu":
        return _run("gated_linear", x, weight, up, ACTIVATIONS.index(activation))
    if x.dtype != torch.float64:
        _check_gated(x, weight, up)
    kind = torch.promote_types(x.dtype, torch.float32)
    gate, other = (F.linear(x.to(kind), w.to(kind)) for w in (weight, up))
    gate = F.silu(gate) if activation == "silu" else F.gelu(gate, approximate="tanh")
    return (gate * other).to(x.dtype)


def gated_mlp(
    x: Tensor,
    weight: Tensor,
    up: Tensor,
    down: Tensor,
    bias: Tensor | None,
    activation: Activation,
    *,
    backend: Backend | None = None,
) -> Tensor:
    """A gated MLP in one call, `linear(gated_linear(x, weight, up, activation), down, bias)`: see there."""
    refuse_gradient("gated_mlp", *(t for t in (x, weight, up, down, bias) if t is not None))
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation is {activation!r}: expected one of {', '.join(map(repr, ACTIVATIONS))}")
    if backend_of(x, backend) == "cpu":
        return _run("gated_mlp", x, weight, up, down, bias, ACTIVATIONS.index(activation))
    if x.dtype != torch.float64:
        _check_mlp(x, weight, up, down, bias)
    return linear(gated_linear(x, weight, up, activation, backend=backend), down, bias, backend=backend)


def decode_attention(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    mask: Tensor,
    scaling: float,
    softcap: float = 0.0,
    *,
    backend: Backend | None = None,
) -> Tensor:
    """Attention of one new token per row: softmax(softcap tanh(scaling q . k / softcap) + mask) v, in fp32 (fp64 for
    fp64 rows), rounded once. A column whose mask is the dtype's least number, or less, is not looked at; a row that may
    look at none gets zeros.

    Args:
        query: `[rows, heads, size]`.
        keys, values: `[rows, key heads, columns, size]` and `[..., value size]`; each of the key heads serves
            heads / key heads heads of the query, which stand side by side.
        mask: `[rows, columns]`, added to the scores.
        softcap: 0 for none.

    Returns:
        `[rows, heads, value size]`.

    Raises:
        RuntimeError: a gradient would be needed.
        TypeError, ValueError: dtypes or shapes that do not fit.
    """
    refuse_gradient("decode_attention", query, keys, values, mask)
    if backend_of(query, backend) == "cpu":
        return _run("decode_attention", query, keys, values, mask, scaling, softcap)
    if query.dtype != torch.float64:
        _check_attention(query, keys, values, mask)
    kind = torch.promote_types(query.dtype, torch.float32)
    rows, heads, _ = query.shape
    grouped = query.to(kind).view(rows, keys.shape[1], -1, query.shape[2])
    scores = scaling * grouped @ keys.to(kind).transpose(2, 3)
    if softcap:
        scores = softcap * (scores / softcap).tanh()
    hidden = mask <= torch.finfo(mask.dtype).min
    scores = scores + mask.to(kind).masked_fill(hidden, -torch.inf)[:, None, None]
    weights = scores.softmax(-1).masked_fill(hidden.all(1)[:, None, None, None], 0)
    return (weights @ values.to(kind)).reshape(rows, heads, -1).to(query.dtype)


def rotary_attention_(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    keys: Tensor,
    values: Tensor,
    cosine: Tensor,
    sine: Tensor,
    column: Tensor,
    mask: Tensor | None,
    scaling: float,
    softcap: float = 0.0,
    window: int = 0,
    tokens: int = 1,
    *,
    backend: Backend | None = None,
) -> Tensor:
    """New tokens, one or more of each sequence: rotate queries and keys to their positions, write keys and values into
    the cache, attend.

    The first `rotary` numbers of a head, in two halves (a, b), rotate to (a cos - b sin, b cos + a sin), rounded after
    each product and sum as PyTorch's operators round. Then `keys[row, :, column[row]]` and the values there are
    written, and the result is `decode_attention`'s over the mask's columns.

    Args:
        query: `[rows, heads, size]`; key: `[rows, key heads, size]`; value: `[rows, key heads, value size]`.
        keys, values: the cache, `[at least rows / tokens, key heads, columns, size]` and `[..., value size]`.
        cosine, sine: `[rows, rotary]`, rotary even and at most `size`.
        column: `[rows]`, int64.
        mask: `[rows, columns that are looked at]`, as for `decode_attention`; None: each row looks at its own column
            and those before it, with a window at the last `window` of them.
        tokens: rows that share keys and values: rows r `tokens`, r `tokens` + 1, ... are tokens of one sequence, whose
            keys and values are row r of the cache.

    Returns:
        `[rows, heads, value size]`.

    Raises:
        RuntimeError: a gradient would be needed.
        TypeError, ValueError: dtypes or shapes that do not fit.
    """
    refuse_gradient("rotary_attention_", *(t for t in (query, key, value, keys, values, mask) if t is not None))
    if backend_of(query, backend) == "cpu":
        arguments = query, key, value, keys, values, cosine, sine, column, mask
        return _run("rotary_attention_", *arguments, tokens, window, scaling, softcap)
    if query.dtype != torch.float64:
        _check_rotary(query, key, value, keys, values, cosine, sine, column, mask, tokens, window)
    if mask is None:
        behind = column.unsqueeze(1) - torch.arange(keys.shape[2], device=query.device)
        hidden = (behind < 0) | (behind >= (window or keys.shape[2]))
        mask = query.new_zeros(hidden.shape).masked_fill(hidden, torch.finfo(query.dtype).min)
    n, width = mask.shape
    row = torch.arange(n, device=query.device) // tokens
    keys[row, :, column] = _rotated(key, cosine, sine)
    values[row, :, column] = value
    seen = keys[row, :, :width], values[row, :, :width]
    return decode_attention(_rotated(query, cosine, sine), *seen, mask, scaling, softcap, backend=backend)


def attention_branch_(
    x: Tensor,
    query: Projection,
    key: Projection,
    value: Projection,
    output: Projection,
    keys: Tensor,
    values: Tensor,
    cosine: Tensor,
    sine: Tensor,
    column: Tensor,
    scaling: float,
    softcap: float = 0.0,
    window: int = 0,
    tokens: int = 1,
    *,
    backend: Backend | None = None,
) -> Tensor:
    """What attention adds to the residual stream for one new token per row, in one call: the three projections of x
    `[rows, hidden]`, `rotary_attention_` without a mask, and the projection back. A projection is (weight
    `[outputs, inputs]`, bias `[outputs]` or None), of x's dtype; the rest as there."""
    read = *query, *key, *value, *output
    refuse_gradient("attention_branch_", x, *(t for t in read if t is not None))
    if backend_of(x, backend) == "cpu":
        weights = query[0], key[0], value[0], query[1], key[1], value[1], *output
        return _run(
            "attention_branch_", x, *weights, keys, values, cosine, sine, column, tokens, window, scaling, softcap
        )
    sizes = keys.shape[3], keys.shape[3], values.shape[3]
    projections = zip((query, key, value), sizes, strict=True)
    q, k, v = (linear(x, *p, backend=backend).unflatten(1, (-1, size)) for p, size in projections)
    stored = keys, values, cosine, sine, column, None
    attended = rotary_attention_(q, k, v, *stored, scaling, softcap, window, tokens, backend=backend)
    return linear(attended.flatten(1), *output, backend=backend)


def _rotated(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    size = cosine.shape[1]
    a, b = x[..., :size].chunk(2, dim=-1)
    rotated = x[..., :size] * cosine.unsqueeze(1) + torch.cat([-b, a], -1) * sine.unsqueeze(1)
    return torch.cat([rotated, x[..., size:]], -1)


# Checks ---------------------------------------------------------------------------------------------------------------


def _check(first: Tensor, **wanted: tuple[Tensor | None, tuple[int | None, ...]]) -> None:
    """Each tensor has the shape wanted (None: any size), and the dtype and device of the first."""
    if first.dtype not in DTYPES:
        raise TypeError(f"{next(iter(wanted))} has dtype {first.dtype}: expected float32, float16 or bfloat16")
    for name, (tensor, shape) in wanted.items():
        if tensor is None:
            continue
        fits = tensor.dim() == len(shape) and all(n is None or n == m for n, m in zip(shape, tensor.shape, strict=True))
        if not fits or tensor.shape[-1] < 1:
            expected = ["any" if n is None else n for n in shape]
            raise ValueError(f"{name} has shape {list(tensor.shape)}: expected {expected}".replace("'", ""))
        if tensor.dtype != first.dtype or tensor.device != first.device:
            raise ValueError(
                f"{name} is {tensor.dtype} on {tensor.device}, {next(iter(wanted))} {first.dtype} on {first.device}: "
                "expected the same"
            )
        if tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
            raise ValueError(f"{name} has stride {tensor.stride(-1)} in its last dimension: expected 1")


def _check_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    inputs = x.shape[-1] if x.dim() else None
    _check(x, x=(x, (None, None)), weight=(weight, (None, inputs)), bias=(bias, (weight.shape[0],)))


def _check_gated(x: Tensor, weight: Tensor, up: Tensor, activation: int = 0) -> None:
    _check_linear(x, weight, None)
    _check(x, x=(x, (None, None)), up=(up, tuple(weight.shape)))


def _check_mlp(x: Tensor, weight: Tensor, up: Tensor, down: Tensor, bias: Tensor | None, activation: int = 0) -> None:
    _check_gated(x, weight, up)
    _check(x, x=(x, (None, None)), down=(down, (None, weight.shape[0])), bias=(bias, (down.shape[0],)))


def _check_attention(query: Tensor, keys: Tensor, values: Tensor, mask: Tensor, *_: float) -> None:
    wanted: dict[str, Any] = {"query": (query, (None,) * 3), "keys": (keys, (None,) * 4)}
    _check(query, **wanted, values=(values, (None,) * 4), mask=(mask, (None,) * 2))
    rows, heads, size = query.shape
    if keys.shape[0] != rows or keys.shape[3] != size or heads % keys.shape[1]:
        raise ValueError(
            f"keys is {list(keys.shape)}, the query {list(query.shape)}: expected the same rows and size, and a number "
            "of heads that divides the query's"
        )
    if values.shape[:3] != keys.shape[:3]:
        raise ValueError(f"values is {list(values.shape)}, keys {list(keys.shape)}: expected the same but for the size")
    if mask.shape != (rows, keys.shape[2]):
        raise ValueError(f"mask has shape {list(mask.shape)}: expected {[rows, keys.shape[2]]}")


def _check_rotary(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    keys: Tensor,
    values: Tensor,
    cosine: Tensor,
    sine: Tensor,
    column: Tensor,
    mask: Tensor | None,
    tokens: int,
    window: int,
    *_: float,
) -> None:
    _check(query, query=(query, (None,) * 3), keys=(keys, (None,) * 4), values=(values, (None,) * 4))
    rows, (n_rows, heads, columns, size) = query.shape[0], keys.shape
    _check(query, query=(query, (None, None, size)), cosine=(cosine, (rows, None)))
    if cosine.shape[1] % 2 or cosine.shape[1] > size:
        raise ValueError(f"cosine has {cosine.shape[1]} columns: expected an even number, at most {size}")
    _check(
        query,
        query=(query, (None, None, size)),
        key=(key, (rows, heads, size)),
        value=(value, (rows, heads, values.shape[3])),
        sine=(sine, (rows, cosine.shape[-1])),
        mask=(mask, (rows, None)),
    )
    if tokens < 1 or rows % tokens:
        raise ValueError(f"tokens is {tokens}: expected a divisor of the {rows} rows")
    looks = columns if mask is None else mask.shape[1]
    if n_rows < rows // tokens or looks > columns:
        raise ValueError(
            f"keys is {list(keys.shape)}, for {rows} rows that look at {looks} columns: expected a cache of at least "
            "as many rows and columns"
        )
    if window < 0:
        raise ValueError(f"window is {window}: expected 0 (none) or more")
    if column.dtype != torch.int64 or column.shape != (rows,) or not column.is_contiguous():
        raise ValueError(f"column is {column.dtype} of shape {list(column.shape)}: expected int64 of shape {[rows]}")
    if column.device != query.device:
        raise ValueError(f"column is on {column.device}, the query on {query.device}: expected the same")
    if column.is_cpu and rows and not 0 <= int(column.min()) <= int(column.max()) < columns:
        raise ValueError(f"column has {column.tolist()}: expected columns of the keys, 0 to {columns - 1}")
    _check_attention(
        query[::tokens], keys[: rows // tokens], values[: rows // tokens], query.new_empty(rows // tokens, columns)
    )


def _check_branch(
    x: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    query_bias: Tensor | None,
    key_bias: Tensor | None,
    value_bias: Tensor | None,
    output: Tensor,
    output_bias: Tensor | None,
    keys: Tensor,
    values: Tensor,
    *others: Any,
) -> None:
    cosine, sine, column, tokens, window = others[:5]
    _check(x, x=(x, (None, None)), keys=(keys, (None,) * 4), values=(values, (None,) * 4))
    inputs, (_, heads, _, size), value_size = x.shape[1], keys.shape, values.shape[3]
    _check(
        x,
        x=(x, (None, None)),
        query=(query, (None, inputs)),
        key=(key, (heads * size, inputs)),
        value=(value, (heads * value_size, inputs)),
        query_bias=(query_bias, (query.shape[0],)),
        key_bias=(key_bias, (key.shape[0],)),
        value_bias=(value_bias, (value.shape[0],)),
    )
    if query.shape[0] % size:
        raise ValueError(f"query has {query.shape[0]} outputs: expected a multiple of the keys' size {size}")
    n, n_heads = len(x), query.shape[0] // size
    made = x.new_empty(n, n_heads, size), x.new_empty(n, heads, size), x.new_empty(n, heads, value_size)
    _check_rotary(*made, keys, values, cosine, sine, column, None, tokens, window)
    _check(x, x=(x, (None, None)), output=(output, (None, n_heads * value_size)))
    _check(x, x=(x, (None, None)), output_bias=(output_bias, (output.shape[0],)))


# Registration ---------------------------------------------------------------------------------------------------------


def _fake_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    _check_linear(x, weight, bias)
    return x.new_empty(x.shape[0], weight.shape[0])


def _fake_gated(x: Tensor, weight: Tensor, up: Tensor, activation: int) -> Tensor:
    return _fake_linear(x, weight, None)


def _fake_mlp(x: Tensor, weight: Tensor, up: Tensor, down: Tensor, bias: Tensor | None, activation: int) -> Tensor:
    return x.new_empty(x.shape[0], down.shape[0])


def _fake_branch(x: Tensor, *others: Any) -> Tensor:
    return x.new_empty(x.shape[0], others[6].shape[0])


def _fake_attention(query: Tensor, keys: Tensor, values: Tensor, mask: Tensor, *others: float) -> Tensor:
    _check_attention(query, keys, values, mask)
    return query.new_empty(query.shape[0], query.shape[1], values.shape[3])


def _fake_rotary(query: Tensor, key: Tensor, value: Tensor, keys: Tensor, values: Tensor, *others: Any) -> Tensor:
    return query.new_empty(query.shape[0], query.shape[1], values.shape[3])


_CHECKS: dict[str, Callable[..., None]] = {
    "linear": _check_linear,
    "gated_linear": _check_gated,
    "gated_mlp": _check_mlp,
    "attention_branch_": _check_branch,
    "decode_attention": _check_attention,
    "rotary_attention_": _check_rotary,
}
_FAKES: dict[str, Callable[..., Tensor]] = {
    "linear": _fake_linear,
    "gated_linear": _fake_gated,
    "gated_mlp": _fake_mlp,
    "attention_branch_": _fake_branch,
    "decode_attention": _fake_attention,
    "rotary_attention_": _fake_rotary,
}
for _name, _definition in _DEFINITIONS.items():
    library.define(f"{_name}.cpp{_definition}", tags=(torch.Tag.pt2_compliant_tag,))
    torch.library.register_fake(f"faststeer::{_name}.cpp", _FAKES[_name], lib=library)
_OPS = {name: getattr(torch.ops.faststeer, name).cpp for name in _DEFINITIONS}


def _run(name: str, *arguments: Any) -> Any:
    try:
        return _OPS[name](*arguments)
    except RuntimeError:
        _CHECKS[name](*arguments)  # bad arguments get the same error from every back end
        raise
