"""What a worker writes into the table of rows, against one row after the other."""

from __future__ import annotations

from types import SimpleNamespace

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from faststeer.vllm.worker import LoadedPlan, Running, WorkerSteering

ROWS = 64
REQUEST = st.tuples(
    st.integers(1, 6),  # its tokens in this step
    st.sampled_from(["none", "not in this step", "a", "b"]),  # its plan
    st.integers(1, 9),  # tokens of its prompt
    st.integers(0, 12),  # tokens before this step
    st.integers(-1, 3),  # its sequence
    st.booleans(),  # whether it is probed
)


@settings(deadline=None, max_examples=100)
@given(st.lists(st.lists(REQUEST, max_size=9), min_size=1, max_size=3), st.integers(0, 2))
def test_rows_are_those_of_one_token_after_the_other(steps, repeats):
    """Also where a step is as the one before, but for tokens that have been computed since."""
    steering = object.__new__(WorkerSteering)
    steering.pool, steering._rows_in_use = SimpleNamespace(slots={"a": 5, "b": 2}), 0
    steering.tables = SimpleNamespace(rows=torch.full((3, ROWS), -1, dtype=torch.int32))
    steering.probes = SimpleNamespace(rows=[])
    for step in steps:
        ids = [f"r{i}" for i in range(len(step))]
        steering.requests, steering._stepping, steering._layout = {}, set(), None
        for name, (_, plan, prompt, _, sequence, watched) in zip(ids, step, strict=True):
            if plan != "none":
                loaded = LoadedPlan(plan, None, {3: 1} if watched else {}, False)
                steering.requests[name] = Running(loaded, prompt, sequence)
            if plan in steering.pool.slots:
                steering._stepping.add(name)
        for since in range(repeats + 1):
            steering._computed = {
                name: since + computed for name, (_, _, _, computed, *_) in zip(ids, step, strict=True)
            }
            steering.map_rows(list(ids), [tokens for tokens, *_ in step])
            check_rows(steering, ids, step, since)


def check_rows(steering, ids, step, since):
    slots, positions, sequences, probed, row = [], [], [], [], 0
    for name, (tokens, plan, prompt, computed, sequence, watched) in zip(ids, step, strict=True):
        acts = plan in steering.pool.slots
        for token in range(tokens):
            slots.append(steering.pool.slots[plan] if acts else -1)
            positions.append(computed + since + token - prompt)
            sequences.append(sequence)
        if acts and watched:
            probed.append((name, row, row + tokens, computed + since))
        row += tokens
    table = steering.tables.rows
    assert table[0, : len(slots)].tolist() == slots and (table[0, len(slots) :] == -1).all()
    for found, expected in ((table[1], positions), (table[2], sequences)):
        assert all(found[i] == expected[i] for i, slot in enumerate(slots) if slot >= 0)
    assert steering.probes.rows == probed
