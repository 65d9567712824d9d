"""The room that plans need, against counting by hand; compilation itself is tested with plans and interventions."""

from __future__ import annotations

import hypothesis
import torch
from hypothesis import strategies as st
from strategies import plans, randn

import faststeer as fs
from faststeer.compile import Need, compile_plan, probed_columns
from faststeer.ops.tables import EntryKind
from faststeer.program import Capacity, Program

N_LAYERS, HIDDEN = 3, 8


@hypothesis.settings(parent=hypothesis.settings(), max_examples=60)
@hypothesis.given(several=st.lists(plans(HIDDEN, N_LAYERS), max_size=4))
def test_need_is_what_a_program_takes(several):
    """A program of exactly this room holds the plans, and one of a row less does not."""
    compiled = [compile_plan(plan, N_LAYERS, HIDDEN) for plan in several]
    need = Need.of(compiled)
    blocks = [block for entries in compiled for e in entries for block in (e.basis, e.gate_vector) if block is not None]
    rows = {block.float().contiguous().numpy().tobytes() for block in blocks}
    assert need.slots == len(several) and need.vectors == sum(len(row) // (4 * HIDDEN) for row in rows)
    assert need.entries == max(map(len, compiled), default=0)
    assert need.latched_gates == max((sum(e.kind == EntryKind.LATCH for e in each) for each in compiled), default=0)
    program = Program(N_LAYERS, HIDDEN, Capacity(max(need.slots, 1), max(need.vectors, 1), max(need.entries, 1)))
    program.change(dict(enumerate(several)))
    assert need.probe_columns == max(program.columns)
    if need.vectors > 1:
        less = Program(N_LAYERS, HIDDEN, Capacity(max(need.slots, 1), need.vectors - 1, max(need.entries, 1)))
        try:
            less.change(dict(enumerate(several)))
        except ValueError as error:
            assert "capacity exceeded" in str(error)
        else:
            raise AssertionError("it fits into less")


def test_equal_vectors_count_once_and_trained_ones_each():
    v = randn(0, HIDDEN)
    plan = fs.Plan([fs.Add(v, 1.0, layers="all"), fs.Add(v.clone(), 2.0, layers=0)])
    trained = fs.Plan([fs.Add(v.clone().requires_grad_(), layers="all")])
    one, other = compile_plan(plan, N_LAYERS, HIDDEN), compile_plan(trained, N_LAYERS, HIDDEN)
    assert Need.of([one]).vectors == Need.of([one, one]).vectors == 1
    assert Need.of([one, other]).vectors == 1 + N_LAYERS
    assert Need.of([]) == Need(0, 0, 0, 0, 0)


def test_probed_columns_of_each_site():
    plan = fs.Plan([fs.Probe(torch.stack([randn(i, HIDDEN) for i in range(3)]), layers=(0, 2)),
                    fs.Ablate(randn(4, HIDDEN), layers=2, probe=True)])  # fmt: skip
    assert sorted(probed_columns(compile_plan(plan, N_LAYERS, HIDDEN)).values()) == [3, 4]
