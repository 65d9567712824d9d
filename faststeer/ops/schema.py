"""What the operators are: one schema each, the checks of their arguments, their fake implementations and their
gradients. Back ends only compute; they are registered under the overloads `cpp` and `triton` of these schemas.
docs/kernels.md is the specification.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from faststeer.ops import reference
from faststeer.ops.tables import N_FIELDS, N_PLACES, N_SCALARS, Field, Tables

MAX_HIDDEN = 16_384
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
OVERLOADS = ("cpp", "triton")

_TABLES = "Tensor bank, Tensor entries, Tensor ranges, Tensor rows, Tensor? gate_state"
_LIVE = f"{_TABLES}, Tensor? scalars"  # where gradients flow to the entries' numbers
_NORM = "Tensor weight, float eps, float weight_offset, bool fp32_weight"
SCHEMAS = {
    "steer": f"(Tensor x, {_LIVE}, int columns) -> (Tensor, Tensor)",
    "add_steer": f"(Tensor x, Tensor residual, {_LIVE}, int columns) -> (Tensor, Tensor)",
    "steer_pair_": f"(Tensor(a!) x, Tensor(b!) residual, {_TABLES}, Tensor(c!)? probe) -> ()",
    "add_steer_rmsnorm": f"(Tensor x, Tensor residual, {_NORM}, {_LIVE}, int columns) -> (Tensor, Tensor, Tensor)",
    "latch_": f"(Tensor x, Tensor? residual, {_TABLES.replace('Tensor? gate_state', 'Tensor(a!) gate_state')}) -> ()",
}

# The arguments of each operator, by name.
ARGUMENTS = {op: tuple(re.findall(r" (\w+)[,)]", " " + text.partition("->")[0])) for op, text in SCHEMAS.items()}

library = torch.library.Library("faststeer", "DEF")


# Checks ---------------------------------------------------------------------------------------------------------------


def check_float(x: Tensor, name: str) -> None:
    """Raise TypeError unless `x` has a supported dtype."""
    if x.dtype not in DTYPES:
        raise TypeError(f"{name} has dtype {x.dtype}: expected float32, float16 or bfloat16")


def check_rows(x: Tensor, name: str, like: Tensor | None = None) -> None:
    """Raise TypeError or ValueError unless `x` is `[rows, hidden]` of a supported dtype, and of the shape, dtype and
    device of `like`."""
    check_float(x, name)
    if x.dim() != 2:
        raise ValueError(f"{name} has {x.dim()} dimensions: expected [rows, hidden]; reshape it to two")
    if not 1 <= x.shape[1] <= MAX_HIDDEN:
        raise ValueError(f"{name} has hidden size {x.shape[1]}: expected 1 to {MAX_HIDDEN}")
    if x.shape[1] > 1 and x.stride(1) != 1:
        raise ValueError(f"{name} has stride {x.stride(1)} in its last dimension: expected 1; call .contiguous()")
    if x.shape[0] > 1 and x.stride(0) < x.shape[1]:
        raise ValueError(f"{name} has row stride {x.stride(0)}, less than its hidden size: rows may not overlap")
    if like is not None and (x.shape != like.shape or x.dtype != like.dtype or x.device != like.device):
        raise ValueError(
            f"{name} is {list(x.shape)} {x.dtype} on {x.device}, x is {list(like.shape)} {like.dtype} on "
            f"{like.device}: expected the same"
        )


def check_table(
    table: Tensor, name: str, shape: Sequence[int | None], dtype: torch.dtype, x: Tensor, contiguous: bool = True
) -> None:
    """Raise TypeError or ValueError unless `table` has the shape (None: any), dtype and device, and is contiguous: as a
    whole, or in its last dimension."""
    if table.dtype != dtype:
        raise TypeError(f"{name} has dtype {table.dtype}: expected {dtype}")
    fits = table.dim() == len(shape) and all(w is None or n == w for n, w in zip(table.shape, shape, strict=True))
    if not fits:
        # Not sooner: a number of rows that a compiler keeps open is fixed by being written down.
        expected = "[" + ", ".join("any" if n is None else str(n) for n in shape) + "]"
        raise ValueError(f"{name} has shape {list(table.shape)}: expected {expected}")
    if table.device != x.device:
        raise ValueError(f"{name} is on {table.device}, x on {x.device}: move it there")
    if contiguous and not table.is_contiguous():
        raise ValueError(f"{name} is not contiguous: call .contiguous() (once, where it is made)")
    if table.shape[-1] > 1 and table.stride(-1) != 1:
        raise ValueError(f"{name} has stride {table.stride(-1)} in its last dimension: expected 1; call .contiguous()")


def rows_of(table: Tensor, dimension: int, x: Tensor) -> int:
    """How many of x's rows a table should have room for along a dimension: all, or more, as a server's buffers do."""
    n_rows = x.shape[0]
    # A number of rows that a compiler keeps open is not compared: that would limit it.
    if table.dim() > dimension and (not isinstance(n_rows, int) or table.shape[dimension] > n_rows):
        return table.shape[dimension]
    return n_rows


def check(op: str, *arguments: Any) -> None:
    """Raise TypeError or ValueError unless the arguments of an operator fit each other (docs/kernels.md, 'Operators').
    They are in the order of its schema."""
    by_name = dict(zip(ARGUMENTS[op], arguments, strict=True))
    x, entries, rows, columns = by_name["x"], by_name["entries"], by_name["rows"], by_name.get("columns", 0)
    check_rows(x, "x")
    check_table(by_name["bank"], "bank", (None, x.shape[1]), torch.float32, x)
    check_table(entries, "entries", (None, N_FIELDS), torch.int32, x)
    if not torch.compiler.is_compiling() and entries.storage_offset() % 4:
        raise ValueError("entries does not start at a multiple of 16 bytes: call .clone()")
    check_table(by_name["ranges"], "ranges", (None, 2), torch.int32, x)
    check_table(rows, "rows", (N_PLACES, rows_of(rows, 1, x)), torch.int32, x, contiguous=False)
    if (gate_state := by_name["gate_state"]) is not None:
        check_table(gate_state, "gate_state", (None, None), torch.bool, x)
    if (scalars := by_name.get("scalars")) is not None:
        check_table(scalars, "scalars", (entries.shape[0], N_SCALARS), torch.float32, x)
    if columns < 0:
        raise ValueError(f"columns is {columns}: expected the number of probe columns, 0 for none")
    if (probe := by_name.get("probe")) is not None:
        check_table(probe, "probe", (rows_of(probe, 0, x), None), torch.float32, x)
    if (residual := by_name.get("residual")) is not None:
        check_rows(residual, "residual", like=x)
    if (weight := by_name.get("weight")) is not None:
        check_float(weight, "weight")
        check_table(weight, "weight", (x.shape[1],), weight.dtype, x)
        if (offset := by_name["weight_offset"]) != 0 and not by_name["fp32_weight"]:
            raise ValueError(f"weight_offset is {offset} without fp32_weight: no model rounds before adding it")


def implements(overload: str, *devices: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register a function as an operator's overload, such as "steer.triton", for tensors on these devices ("CPU",
    "CUDA"). Called through the operator, its arguments are checked first. The function itself stays as it is."""
    op = overload.partition(".")[0]

    def register(kernel: Callable[..., Any]) -> Callable[..., Any]:
        def run(*arguments: Any) -> Any:
            check(op, *arguments)
            return kernel(*arguments)

        for device in devices:
            library.impl(overload, run, device)
        return kernel

    return register


# Fake implementations -------------------------------------------------------------------------------------------------


def fake(name: str) -> Callable[..., Any]:
    """The op's checks, then outputs without values: contiguous hidden-like tensors, and the probe behind them."""
    n_outputs = {"steer": 1, "add_steer": 1, "add_steer_rmsnorm": 2}.get(name)

    def run(x: Tensor, *rest: Any) -> Any:
        check(name, x, *rest)
        if n_outputs is None:
            return None
        probe = x.new_empty((x.shape[0], rest[-1]), dtype=torch.float32)
        return *(x.new_empty(x.shape) for _ in range(n_outputs)), probe

    return run


def define(name: str, overload: str) -> Any:
    """Define an operator's overload, with its fake implementation; returns it."""
    library.define(f"{name}.{overload}{SCHEMAS[name]}", tags=(torch.Tag.pt2_compliant_tag,))
    op = getattr(getattr(torch.ops.faststeer, name), overload)
    torch.library.register_fake(op, fake(name), lib=library)
    return op


# Gradients ------------------------------------------------------------------------------------------------------------

library.define(
    "backward(Tensor? grad_normed, Tensor grad_hidden, Tensor x, Tensor? residual, Tensor? weight, float eps, "
    f"float weight_offset, bool fp32_weight, {_LIVE}) -> (Tensor, Tensor, Tensor, Tensor)"
)


def _backward(
    grad_normed: Tensor | None,
    grad_hidden: Tensor,
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    *rest: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients to (s, weight, bank, scalars), where s = x or x + residual: the reference, run again with gradients.
    Those of what is not given are empty."""
    *norm, bank, entries, ranges, rows, gate_state, scalars = rest
    with torch.enable_grad():
        s = (x if residual is None else x + residual).detach().requires_grad_()
        bank = bank.detach().requires_grad_()
        scale, numbers = (torch.zeros(0, device=x.device) if t is None else t.detach() for t in (weight, scalars))
        inputs = (s, scale.requires_grad_(), bank, numbers.requires_grad_())
        tables = host_tables(bank, entries, ranges, None if scalars is None else numbers)
        hidden = reference.steer(s, tables, rows, gate_state)
        outputs, grads = [hidden], [grad_hidden]
        if grad_normed is not None:
            outputs.append(reference.rmsnorm(hidden, scale, *norm))
            grads.append(grad_normed)
        gradients = torch.autograd.grad(outputs, inputs, grads, allow_unused=True, materialize_grads=True)
    return gradients  # type: ignore[return-value]


def host_tables(bank: Tensor, entries: Tensor, ranges: Tensor, scalars: Tensor | None = None) -> Tables:
    """Tables for the reference from tensors alone: its loop bounds are read from them, which on a GPU waits for it."""
    depth = int(ranges[:, 1].max()) if ranges.numel() else 0
    width = int(entries[:, int(Field.COUNT)].clamp(1, bank.shape[0]).max()) if entries.numel() and len(bank) else 1
    return Tables(bank, entries, ranges, max(depth, 0), width, scalars)


def _fake_backward(
    grad_normed: Tensor | None,
    grad_hidden: Tensor,
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    *rest: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    none = x.new_empty(0, dtype=torch.float32)
    grads = (torch.empty_like(none if t is None else t) for t in (weight, rest[3], rest[-1]))
    return x.new_empty(x.shape), *grads  # type: ignore[return-value]


library.impl("backward", _backward, "CompositeExplicitAutograd")
torch.library.register_fake("faststeer::backward", _fake_backward, lib=library)


def _gradient(op: str) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """The formula and the setup of a functional op."""
    names = ARGUMENTS[op]

    def setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        by_name = dict(zip(names, inputs, strict=True))
        leading = (by_name.get(name) for name in ("x", "residual", "weight"))
        ctx.save_for_backward(*leading, *inputs[names.index("bank") : -1])
        ctx.norm = inputs[3:6] if "weight" in by_name else (0.0, 0.0, False)

    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        saved = ctx.saved_tensors  # once: checkpointing computes them when they are asked for
        grad_normed, grad_hidden = grads[:2] if "weight" in names else (None, grads[0])
        grad_s, grad_weight, grad_bank, grad_scalars = torch.ops.faststeer.backward(
            grad_normed, grad_hidden, *saved[:3], *ctx.norm, *saved[3:]
        )
        gradients = {"x": grad_s, "residual": grad_s, "weight": grad_weight, "bank": grad_bank}
        gradients["scalars"] = None if saved[-1] is None else grad_scalars
        return tuple(gradients.get(name) for name in names)

    return backward, setup


for _name in SCHEMAS:
    for _overload in OVERLOADS:
        _op = define(_name, _overload)
        if "scalars" in ARGUMENTS[_name]:
            _formula, _setup = _gradient(_name)
            torch.library.register_autograd(_op, _formula, setup_context=_setup, lib=library)
