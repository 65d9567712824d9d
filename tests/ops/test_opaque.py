"""The reference as operators, in graphs that outlive plans."""

from __future__ import annotations

import pytest
import torch
from backend_cases import steered

import faststeer.ops.opaque  # noqa: F401  (it registers operators)
from faststeer.ops import reference

MIXES = [["Add", "Ablate"], ["Clamp", "Rotate"], ["Probe", "Project"], ["Gated"]]


def arguments(seed: int):
    case = steered(MIXES, 9, 48, torch.float32, "cpu", seed=seed)
    return case, [*case.tables[:3], case.rows, case.gate_state]


@pytest.mark.parametrize("op", ["steer", "steer_pair_", "latch_"])
def test_opcheck(op):
    case, tables = arguments(1)
    given = {
        "steer": (case.x, *tables, None, case.columns),
        "steer_pair_": (case.x, case.residual, *tables, torch.zeros(12, case.columns)),
        "latch_": (case.x, case.residual, *tables),
    }[op]
    torch.library.opcheck(getattr(torch.ops.faststeer, op).reference, given)
    with pytest.raises(ValueError, match=r"residual is|bank has shape"):
        getattr(torch.ops.faststeer, op).reference(given[0], given[1][:, :-1], *given[2:])


def test_a_compiled_graph_follows_the_tables():
    graph = torch.compile(torch.ops.faststeer.steer.reference, backend="aot_eager", fullgraph=True)
    for seed in (2, 3):
        case, tables = arguments(seed)
        probe = torch.zeros(9, case.columns)
        expected = reference.steer(case.x, case.tables, case.rows, case.gate_state, probe)
        found, seen = graph(case.x, *tables, None, case.columns)
        assert torch.equal(found, expected) and torch.equal(seen, probe)
        assert not torch.equal(found, case.x)


def test_a_compiled_pair_follows_the_tables():
    """In place, with room for more rows in the tables and the probe than there are now."""
    graph = torch.compile(torch.ops.faststeer.steer_pair_.reference, backend="aot_eager", fullgraph=True)
    for seed in (2, 3):
        case, tables = arguments(seed)
        pairs = [(case.x[:5].clone(), case.residual[:5].clone(), torch.full((9, case.columns), 7.0)) for _ in range(2)]
        hidden, residual, probe = pairs[0]
        reference.steer_pair_(hidden, residual, case.tables, case.rows, case.gate_state, probe)
        graph(*pairs[1][:2], *tables, pairs[1][2])
        for ours, theirs in zip(*pairs, strict=True):
            assert torch.equal(ours, theirs)
        assert not hidden[0].any() and not torch.equal(residual, case.residual[:5])
        assert (probe[5:] == 7).all() and not (probe == 7).all()
