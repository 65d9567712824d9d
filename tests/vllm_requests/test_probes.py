"""What a worker keeps of what probes saw: whose it is, how much of it, and that it is forgotten."""

from __future__ import annotations

import asyncio
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from faststeer.vllm.packed_projections import choices, unpack
from faststeer.vllm.server import _from_workers
from faststeer.vllm.worker import Probes

SITES, ROWS, COLUMNS = (4, 8), 16, 3


@pytest.fixture
def probes():
    tensors = {number: torch.zeros(ROWS, COLUMNS) for number in SITES}
    return Probes(SimpleNamespace(probes=tensors), n_layers=3, max_bytes=10_000)


def step(probes, rows, base=0.0):
    """A pass whose probe values say which site, row and column they are."""
    for number, tensor in probes.tables.probes.items():
        tensor.copy_(base + 100 * number + torch.arange(ROWS * COLUMNS).view(ROWS, COLUMNS))
    probes.rows = rows
    probes.take()
    for tensor in probes.tables.probes.values():
        tensor.fill_(-1)  # what was taken is a copy


def given(probes, request_id):
    return unpack(probes.give(request_id))


def test_each_request_has_its_own_rows(probes):
    probes.begin("a-0badc0de", {4: 2, 8: 1})
    probes.begin("b-0badc0de", {8: 3})
    step(probes, [("a-0badc0de", 1, 3, 0), ("b-0badc0de", 5, 6, 7), ("unknown", 6, 9, 0)])
    step(probes, [("b-0badc0de", 0, 1, 8), ("a-0badc0de", 4, 5, 2)], base=1000.0)
    assert given(probes, "a") == {
        "resid_pre.1": {"tokens": [0, 1, 2], "values": [[403.0, 404.0], [406.0, 407.0], [1412.0, 1413.0]]},
        "resid_pre.2": {"tokens": [0, 1, 2], "values": [[803.0], [806.0], [1812.0]]},
    }
    assert probes.give("a") is None
    expected = {"resid_pre.2": {"tokens": [7, 8], "values": [[815.0, 816.0, 817.0], [1800.0, 1801.0, 1802.0]]}}
    assert unpack(probes.of_answer("b")[0]["projections"]) == given(probes, "b-0badc0de") == expected


def test_each_sample_of_a_request_has_its_own(probes):
    """vLLM calls the samples of the request 5 "0_5-...", "1_5-...", and the only one of the request 0 "0-..."."""
    for number, name in enumerate(("0_5-0badc0de", "1_5-0badc0de", "0-0badc0de", "5_0-0badc0de")):
        probes.begin(name, {4: 1})
        step(probes, [(name, number, number + 1, 0)])
    asked = [("5", 1), ("5", 0), ("0", 5), ("0", 0)]
    found = [unpack(probes.give(*each))["resid_pre.1"]["values"] for each in asked]
    assert found == [[[403.0]], [[400.0]], [[409.0]], [[406.0]]]
    assert probes.give("5") is probes.give("5", 1) is None


def test_a_token_computed_twice_counts_as_the_second_time(probes):
    probes.begin("a", {4: 1})
    step(probes, [("a", 0, 3, 0)])
    step(probes, [("a", 0, 2, 1)], base=1000.0)
    assert given(probes, "a") == {"resid_pre.1": {"tokens": [0, 1, 2], "values": [[400.0], [1400.0], [1403.0]]}}


def test_the_oldest_are_forgotten(probes):
    row = len(SITES) * COLUMNS * 4
    probes.max_bytes = 5 * row
    for name in "abc":
        probes.begin(name, {4: 1, 8: 1})
        step(probes, [(name, 0, 2, 0)])
    assert probes._bytes == 4 * row and probes.give("a") is None
    step(probes, [("b", 0, 1, 2), ("c", 1, 2, 2), ("a", 2, 9, 2)])  # b runs on, and is the oldest
    assert probes.give("b") is None and len(given(probes, "c")["resid_pre.1"]["tokens"]) == 3
    assert probes._bytes == 0 and not probes._seen and not probes._columns
    for number in range(1100):
        probes.begin(str(number), {4: 1})
    assert len(probes._columns) == len(probes._seen) == 1024 and "0" not in probes._columns


class TestAnswers:
    def test_a_choice_is_known_by_vllms_name_for_it(self, probes):
        names = ["0_cmpl-a-0-0badc0de", "1_cmpl-a-0-0badc0de", "1_cmpl-a-1-1badc0de", "0_cmpl-a-1-1badc0de"]
        others = ["cmpl-ab-0-0badc0de", "chatcmpl-a-0badc0de", "cmpl-a-0-0badc0de0", "x_cmpl-a-0"]
        for name in (*names, *others):
            probes.begin(name, {4: 1})
        found = probes.of_answer("cmpl-a")
        assert [(c["prompt"], c["sample"]) for c in found] == [(0, 0), (0, 1), (1, 1), (1, 0)]
        assert [(c["prompt"], c["sample"]) for c in probes.of_answer("chatcmpl-a")] == [(0, 0)]
        assert probes.of_answer("cmpl-.") == probes.of_answer("") == []

    def test_nothing_seen_yet(self, probes):
        probes.begin("cmpl-a-0-0badc0de", {4: 1, 8: 2})
        (choice,) = choices([probes.of_answer("cmpl-a")])
        nothing = {"tokens": [], "values": []}
        assert choice == {"prompt": 0, "sample": 0, "projections": {"resid_pre.1": nothing, "resid_pre.2": nothing}}

    def test_workers_are_joined(self):
        def choice(sample, name, value):
            packed = {"tokens": b"\1\0\0\0", "sites": {name: [1, np.float32(value).tobytes()]}}
            return {"prompt": 0, "sample": sample, "projections": packed}

        stages = [[choice(1, "a", 2.5), choice(0, "a", 0.5)], [choice(1, "b", 1.5)], []]
        assert choices(stages) == [
            {"prompt": 0, "sample": 0, "projections": {"a": {"tokens": [1], "values": [[0.5]]}}},
            {
                "prompt": 0,
                "sample": 1,
                "projections": {n: {"tokens": [1], "values": [[v]]} for n, v in (("a", 2.5), ("b", 1.5))},
            },
        ]
        assert choices([[], []]) == []

    def test_every_engine_is_asked(self, monkeypatch):
        class HTTPException(Exception):
            """Stands for Starlette's, which comes with vLLM."""

        starlette = SimpleNamespace(HTTPException=HTTPException)
        monkeypatch.setitem(sys.modules, "starlette", starlette)
        monkeypatch.setitem(sys.modules, "starlette.exceptions", starlette)

        async def utility(name, method, timeout, arguments, more):
            return [[f"{name} {method} {arguments[0]} {engine}"] for engine in range(2)]

        async def rpc(method, args):
            return [f"{method} {args[0]}"]

        core = SimpleNamespace(core_engines=[b"0", b"1"], call_utility_all_async=utility)
        client = SimpleNamespace(engine_core=core, collective_rpc=rpc)
        asked = ["collective_rpc m id 0", "collective_rpc m id 1"]
        assert asyncio.run(_from_workers(client, "m", "id")) == asked
        del core.call_utility_all_async
        with pytest.raises(HTTPException, match="asks one of its engines alone"):
            asyncio.run(_from_workers(client, "m", "id"))
        core.core_engines = [b"0"]
        assert asyncio.run(_from_workers(client, "m", "id")) == ["m id"]
