"""Runs the interpreted kernels through faststeer.ops. Runs in a process of its own (triton_process.py): a function here
is one case of test_dispatch.py, and what it finds wrong it raises."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import pytest
import torch
from interpreted_cases import arguments, bits, generator, random_slot, rows_of, tables_of, where
from placing import numbers_of
from torch import Tensor
from triton.runtime.interpreter import GridExecutor

import faststeer.kernels as kernels
from faststeer import ops
from faststeer.ops import Field, Tables

assert kernels.row.INTERPRETED
assert ops.states()["triton"].works  # the first look registers the kernels, which opcheck calls by their overload

NORM = 1e-6, 1.0, True  # eps, weight_offset, fp32_weight
COLUMNS = 5


class Case(NamedTuple):
    """Rows and all that steers them."""

    x: Tensor
    residual: Tensor
    weight: Tensor
    tables: Tables
    rows: Tensor
    gates: Tensor

    @property
    def given(self) -> tuple[Tables, Tensor, Tensor]:
        return self.tables, self.rows, self.gates

    @property
    def flat(self) -> tuple[Any, ...]:
        return arguments(*self.given)


def case_of(dtype: torch.dtype, n_rows: int = 5, hidden: int = 48) -> Case:
    g = generator(dtype, hidden)  # the tables are the same for any number of rows
    tables = tables_of([random_slot(g, n, hidden, 2, COLUMNS) for n in (4, 0, 2)], hidden)
    x, residual = (rows_of(g, n_rows, hidden, dtype) for _ in range(2))
    weight = torch.randn(hidden, generator=g).to(dtype)
    return Case(x, residual, weight, tables, where(g, n_rows, 3, 4), torch.rand(2, 4, generator=g) < 0.5)


@contextmanager
def launches(expected: int) -> Iterator[None]:
    """That many kernels are launched inside the block."""
    launch, seen = GridExecutor.__call__, []
    GridExecutor.__call__ = lambda self, *args, **options: (seen.append(self), launch(self, *args, **options))[1]
    try:
        yield
    finally:
        GridExecutor.__call__ = launch
    assert len(seen) == expected, f"{len(seen)} kernels were launched, expected {expected}"


# Results --------------------------------------------------------------------------------------------------------------


def through_ops(c: Case, **options: Any) -> list[Tensor]:
    """What every operator returns or writes, by faststeer.ops."""
    probes = [torch.zeros(len(c.x), COLUMNS) for _ in range(4)]
    steered = ops.steer(c.x, *c.given, probes[0], **options)
    gates = c.gates.clone()
    added = ops.add_steer(c.x, c.residual, *c.given, probes[1], **options)
    normed, hidden = ops.add_steer_rmsnorm(c.x, c.residual, c.weight, *NORM, *c.given, probes[2], **options)
    pair = c.x.clone(), c.residual.clone()
    ops.steer_pair_(*pair, *c.given, probes[3], **options)
    ops.latch_(c.x, c.tables, c.rows, gates, residual=c.residual, **options)
    return [steered, added, normed, hidden, *pair, gates, *probes]


def through_kernels(c: Case) -> list[Tensor]:
    """The same, by calling the kernels."""
    steered, probe = kernels.steer(c.x, *c.flat, None, COLUMNS)
    gates = c.gates.clone()
    added, added_probe = kernels.add_steer(c.x, c.residual, *c.flat, None, COLUMNS)
    norm = c.weight, *NORM
    normed, hidden, normed_probe = kernels.add_steer_rmsnorm(c.x, c.residual, *norm, *c.flat, None, COLUMNS)
    pair, pair_probe = (c.x.clone(), c.residual.clone()), torch.zeros_like(probe)
    kernels.steer_pair_(*pair, *c.flat, pair_probe)
    kernels.latch_(c.x, c.residual, *c.flat[:-1], gates)
    probes = probe, added_probe, normed_probe, pair_probe
    return [steered, added, normed, hidden, *pair, gates, *probes]


def same_results(dtype: torch.dtype) -> None:
    """Chosen by the context or by the argument, and not otherwise, the kernels run, and what they compute comes out."""
    c = case_of(dtype)
    expected = through_kernels(c)
    before = ops.backend_for("cpu")
    assert before != "triton", "interpreted kernels were chosen unasked"
    with ops.backend("triton"):
        assert ops.backend_for("cpu") == "triton"
        with launches(5):
            by_context = through_ops(c)
    assert ops.backend_for("cpu") == before
    with launches(5):
        by_argument = through_ops(c, backend="triton")
    with launches(0):
        through_ops(c)
    for found in (by_context, by_argument):
        for i, (ours, theirs) in enumerate(zip(found, expected, strict=True)):
            assert torch.equal(bits(ours), bits(theirs)), f"result {i} differs"


# Refusals -------------------------------------------------------------------------------------------------------------

BAD: dict[str, tuple[Callable[[Case], Case], type[Exception], str]] = {
    "x dtype": (lambda c: c._replace(x=c.x.double()), TypeError, "x has dtype torch.float64"),
    "x dimensions": (lambda c: c._replace(x=c.x[None]), ValueError, "x has 3 dimensions"),
    "x stride": (lambda c: c._replace(x=c.x.T.contiguous().T), ValueError, "x has stride 5"),
    "x overlap": (lambda c: c._replace(x=c.x[:1].expand(5, -1)), ValueError, "x has row stride 0"),
    "residual shape": (lambda c: c._replace(residual=c.residual[1:]), ValueError, "residual is .4, 48."),
    "residual dtype": (lambda c: c._replace(residual=c.residual.half()), ValueError, "residual is .* torch.float16"),
    "weight shape": (lambda c: c._replace(weight=c.weight[1:]), ValueError, "weight has shape .47."),
    "weight dtype": (lambda c: c._replace(weight=c.weight.int()), TypeError, "weight has dtype torch.int32"),
    "bank shape": (
        lambda c: with_table(c, bank=c.tables.bank[:, :-1].contiguous()),
        ValueError,
        "bank has shape .*expected .any, 48.",
    ),
    "bank dtype": (lambda c: with_table(c, bank=c.tables.bank.half()), TypeError, "bank has dtype torch.float16"),
    "bank device": (lambda c: with_table(c, bank=c.tables.bank.to("meta")), ValueError, "bank is on meta, x on cpu"),
    "bank strided": (lambda c: with_table(c, bank=c.tables.bank[::2]), ValueError, "bank is not contiguous"),
    "entries dtype": (lambda c: with_table(c, entries=c.tables.entries.long()), TypeError, "entries has dtype .*int64"),
    "ranges strided": (lambda c: with_table(c, ranges=c.tables.ranges[::2]), ValueError, "ranges is not contiguous"),
    "rows shape": (lambda c: c._replace(rows=c.rows[:, 1:]), ValueError, "rows has shape .3, 4."),
    "rows dtype": (lambda c: c._replace(rows=c.rows.long()), TypeError, "rows has dtype torch.int64"),
    "rows device": (lambda c: c._replace(rows=c.rows.to("meta")), ValueError, "rows is on meta"),
    "gate_state dtype": (lambda c: c._replace(gates=c.gates.int()), TypeError, "gate_state has dtype torch.int32"),
}


def with_table(c: Case, **changes: Tensor) -> Case:
    return c._replace(tables=c.tables._replace(**changes))


def refused(what: str) -> None:
    """A bad argument is named, by every operator that takes it, before any kernel runs or anything is written."""
    good = case_of(torch.float32)
    change, error, message = BAD[what]
    c = change(good)
    calls = {
        "steer": lambda: ops.steer(c.x, *c.given),
        "add_steer": lambda: ops.add_steer(c.x, c.residual, *c.given),
        "steer_pair_": lambda: ops.steer_pair_(
            c.x, c.residual if what.startswith("residual") else c.x.clone(), *c.given
        ),
        "add_steer_rmsnorm": lambda: ops.add_steer_rmsnorm(c.x, c.residual, c.weight, *NORM, *c.given),
        "latch_": lambda: ops.latch_(c.x, *c.given, residual=c.residual),
    }
    if what.startswith(("residual", "weight")):
        del calls["steer"]
    if what.startswith("weight"):
        del calls["add_steer"], calls["steer_pair_"], calls["latch_"]
    before = [t.clone() for t in (good.x, good.gates)]
    with ops.backend("triton"), launches(0):
        for call in calls.values():
            with pytest.raises(error, match=message):
                call()
    assert torch.equal(good.x, before[0]) and torch.equal(good.gates, before[1])


def pair_refused(what: str) -> None:
    """Rows and probe may have room for more rows than x has, and none for fewer."""
    c = case_of(torch.float32)
    short = c._replace(rows=c.rows[:, 1:]) if what == "rows" else c
    probe = {"probe": torch.zeros(4, COLUMNS), "probe dtype": torch.zeros(9, COLUMNS).double()}.get(what)
    error = TypeError if what == "probe dtype" else ValueError
    before = c.x.clone(), c.residual.clone()
    with (
        ops.backend("triton"),
        launches(0),
        pytest.raises(error, match=f"{what.split()[0]} has (shape .(3, )?4|dtype)"),
    ):
        ops.steer_pair_(c.x, c.residual, *short.given, probe)
    assert torch.equal(c.x, before[0]) and torch.equal(c.residual, before[1])


# Torch ----------------------------------------------------------------------------------------------------------------


def opcheck(operator: str) -> None:
    """PyTorch's own checks of the overload: schema, fake tensors, autograd registration, tracing."""
    c = case_of(torch.float32, n_rows=2)
    given = {
        "steer": (c.x.requires_grad_(), *c.flat, None, COLUMNS),
        "add_steer": (c.x, c.residual.requires_grad_(), *c.flat, None, COLUMNS),
        "steer_pair_": (c.x.detach(), c.residual.detach(), *c.flat, torch.zeros(4, COLUMNS)),
        "add_steer_rmsnorm": (c.x, c.residual, c.weight.requires_grad_(), *NORM, *c.flat, None, COLUMNS),
        "latch_": (c.x.detach(), None, *c.flat),
    }[operator]
    torch.library.opcheck(getattr(torch.ops.faststeer, operator).triton, given)


def gradients() -> None:
    """Those of the reference, bit for bit: backward recomputes with it."""
    c = case_of(torch.float32)
    grads = []
    for name in ("triton", "reference"):
        numbers = numbers_of(c.tables.entries)[:, Field.A : Field.B + 1]
        leaves = [t.clone().requires_grad_() for t in (c.x, c.residual, c.weight, c.tables.bank, numbers)]
        x, residual, weight, bank, scalars = leaves
        given = c.tables._replace(bank=bank, scalars=scalars), c.rows, c.gates
        normed, hidden = ops.add_steer_rmsnorm(x, residual, weight, *NORM, *given, backend=name)
        # Linear in the results, whose last bits may differ, so that the same gradients come in.
        (normed * c.residual + hidden * c.x).sum().backward()
        grads.append([leaf.grad for leaf in leaves])
    for ours, theirs in zip(*grads, strict=True):
        assert ours.any()
        assert torch.equal(ours, theirs)


def one_graph(dtype: torch.dtype) -> None:
    """A function of the operators is one graph for any number of rows, with the kernels in it while they are chosen,
    and computes what it does uncompiled."""
    graphs: list[torch.fx.GraphModule] = []

    def eager(graph: torch.fx.GraphModule, inputs: Any) -> Callable[..., Any]:
        graphs.append(graph)
        return torch._dynamo.lookup_backend("eager")(graph, inputs)

    def run(x: Tensor, residual: Tensor, weight: Tensor, tables: Tables, rows: Tensor, gates: Tensor) -> Any:
        normed, hidden = ops.add_steer_rmsnorm(x, residual, weight, *NORM, tables, rows, gates)
        ops.steer_pair_(normed, residual.clone(), tables, rows, gates)
        return ops.steer(hidden, tables, rows, gates), normed

    compiled = torch.compile(run, fullgraph=True, backend=eager, dynamic=True)
    with ops.backend("triton"):
        for n_rows in (5, 7, 9):  # 3 are the slots: PyTorch would take equal sizes for the same
            c = case_of(dtype, n_rows)
            with launches(3):
                found = compiled(*c)
            for ours, theirs in zip(found, run(*c), strict=True):
                assert torch.equal(bits(ours), bits(theirs))
    assert len(graphs) == 1, f"{len(graphs)} graphs"
    called = {node.target for node in graphs[0].graph.nodes if node.op == "call_function"}
    triton = {getattr(torch.ops.faststeer, name).triton for name in ("add_steer_rmsnorm", "steer_pair_", "steer")}
    assert triton <= called
    with launches(0):
        compiled(*c)
    assert len(graphs) == 2, "the back end that was chosen is not what the graph depends on"
