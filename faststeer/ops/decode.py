"""What the Engine computes on a CPU besides steering, where PyTorch has nothing good: attention of one new token per
row, and linear layers of 16-bit weights on machines without instructions for them.

For inference, in C++ (csrc/cpu/attention.h, linear.h); each has its formula in PyTorch beside it, which is also what
other back ends run.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from faststeer.ops.dispatch import Backend, backend_of, refuse_gradient
from faststeer.ops.schema import DTYPES, library

_DEFINITIONS = {
    "linear": "(Tensor x, Tensor weight, Tensor? bias) -> Tensor",
    "decode_attention": "(Tensor query, Tensor keys, Tensor values, Tensor mask, float scaling, float softcap) "
    "-> Tensor",
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


# Registration ---------------------------------------------------------------------------------------------------------


def _fake_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    _check_linear(x, weight, bias)
    return x.new_empty(x.shape[0], weight.shape[0])


def _fake_attention(query: Tensor, keys: Tensor, values: Tensor, mask: Tensor, *others: float) -> Tensor:
    _check_attention(query, keys, values, mask)
    return query.new_empty(query.shape[0], query.shape[1], values.shape[3])


_CHECKS: dict[str, Callable[..., None]] = {"linear": _check_linear, "decode_attention": _check_attention}
_FAKES: dict[str, Callable[..., Tensor]] = {"linear": _fake_linear, "decode_attention": _fake_attention}
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
