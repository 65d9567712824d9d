"""What the engine decides of plans without any vLLM: whether they have room, which blocks of the prefix cache they
share, and which requests wait."""

import json
import time
from types import SimpleNamespace
from typing import Any

import hypothesis
import pytest
import torch
from hypothesis import strategies as st

import faststeer as fs
from faststeer.compile import compile_plan
from faststeer.vllm.prefix_cache import block_key, with_block_key
from faststeer.vllm.requests import PAYLOAD_KEY, Wire
from faststeer.vllm.settings import ServerSettings
from faststeer.vllm.tables import check_fits, make_program
from faststeer.vllm.waiting import PATIENCE, held_back, too_many

BLOCK = 4


def direction(seed: int = 0, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, 16, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    ("plan", "settings", "message"),
    [
        (fs.Plan([fs.Ablate(direction(), layers=1, at="attn_out")]), {}, "attn_out of layer 1"),
        (fs.Plan([fs.Add(direction(i), layers=0) for i in range(3)]), {"max_entries": 2}, '"max_entries": 3'),
        (fs.Plan([fs.Ablate(direction(0, 5), layers=0)]), {"max_vectors": 4}, '"max_vectors": 5'),
        (fs.Plan([fs.Probe(direction(0, 5), layers=0)]), {}, '"probe_columns": 5'),
        (fs.Plan([fs.Add(direction(), layers=2, when=fs.Gate(direction(1), latched=True))]), {}, '"latched_gates": 1'),
    ],
)
def test_a_plan_without_room_is_refused_with_the_setting_it_needs(plan: fs.Plan, settings: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_fits(compile_plan(plan, 3, 16), ServerSettings(**settings), 3)


def test_every_slot_holds_the_largest_plan_that_has_room() -> None:
    settings = ServerSettings(max_vectors=5, max_entries=7)
    program = make_program(settings, 3, 16, slots=4, device="cpu")
    for slot in range(4):
        plan = fs.Plan([fs.Ablate(direction(slot, 5), layers=[0, 1, 2]), fs.Project(direction(slot, 5), layers=0)])
        check_fits(compile_plan(plan, 3, 16), settings, 3)
        program.load(slot, plan)


bounds = st.integers(-12, 12)
ranges = st.lists(st.tuples(bounds, bounds).map(sorted).filter(lambda r: r[0] < r[1]), max_size=3)


@hypothesis.given(ranges, st.integers(1, 20), st.integers(1, 20), st.booleans())
def test_blocks_have_the_same_keys_where_the_same_is_done_to_their_tokens(
    acts: list[list[int]], prompt: int, other_prompt: int, same_plan: bool
) -> None:
    """Against what is done to each token, written down token by token."""
    plans = [Wire("", "a", acts), Wire("", "a" if same_plan else "b", acts)]
    keys, done = [], []
    for wire, length in zip(plans, (prompt, other_prompt), strict=True):
        keys.append([block_key(wire, length, start, start + BLOCK) for start in range(0, 24, BLOCK)])
        tokens = [[n for n, (low, high) in enumerate(acts) if low <= token - length < high] for token in range(24)]
        done.append(
            [(wire.digest if any(tokens[s : s + BLOCK]) else "", tokens[s : s + BLOCK]) for s in range(0, 24, BLOCK)]
        )
    assert [a == b for a, b in zip(*keys, strict=True)] == [a == b for a, b in zip(*done, strict=True)]


def test_keys_join_those_of_the_engine() -> None:
    wire = {"plan": "{}", "digest": "d", "ranges": [[0, 9]], "room": 0, "probes": False}
    request = SimpleNamespace(sampling_params=SimpleNamespace(extra_args={PAYLOAD_KEY: wire}), num_prompt_tokens=6)
    assert with_block_key(None, request, 0, 4) is None
    assert with_block_key(("lora",), request, 0, 4) == ("lora",)
    assert with_block_key(("lora",), request, 4, 8) == ("lora", (PAYLOAD_KEY, "d", ((2, 4),)))
    request.sampling_params.extra_args = None
    assert with_block_key(("lora",), request, 4, 8) == ("lora",)


class Request(SimpleNamespace):
    """A request as the scheduler has it, as far as waiting is concerned."""

    __hash__ = object.__hash__  # type: ignore[assignment]

    def __init__(self, digest: str | None, arrival_time: float = 0.0) -> None:
        wire = {"plan": json.dumps({}), "digest": digest, "ranges": [], "room": 0, "probes": False}
        parameters = SimpleNamespace(extra_args={PAYLOAD_KEY: wire} if digest else None)
        super().__init__(name=digest, arrival_time=arrival_time, sampling_params=parameters)


def test_requests_wait_whose_plan_would_be_one_too_many() -> None:
    waiting = [Request(digest) for digest in ("b", None, "c", "a", "b", "d")]
    late = too_many(waiting, [Request("a"), Request(None)], 2, now=0.0)
    assert sorted(r.name for r in late) == ["c", "d"]


def test_nobody_is_overtaken_for_ever() -> None:
    """Requests under the plan that runs keep arriving; the other one gets its turn."""
    queue, running, turn = [Request("other", 0.0)], [Request("usual", 0.0)], None
    for now in range(60):
        queue.append(Request("usual", float(now)))
        late = too_many(queue, running, 1, float(now))
        running = [*running[1:], *(r for r in queue if r not in late)]  # one ends in each step
        queue = [r for r in queue if r in late]
        if turn is None and any(r.name == "other" for r in running):
            turn = now
        assert len({r.name for r in running}) <= 1
    assert turn is not None and turn > PATIENCE
    assert all(r.name == "usual" for r in queue)


@pytest.mark.parametrize("name", ["waiting", "kv_holding_waiting"])
def test_those_that_wait_keep_their_turn(name: str) -> None:
    class Queue(list):  # type: ignore[type-arg]
        def remove_requests(self, requests: Any) -> None:
            self[:] = [r for r in self if r not in requests]

        def prepend_request(self, request: Any) -> None:
            self.insert(0, request)

    requests = [Request(digest, time.time()) for digest in ("a", "b", None, "b", "c")]
    scheduler = SimpleNamespace(**({"running": [], "faststeer_slots": 1, "waiting": Queue()} | {name: Queue(requests)}))
    with held_back(scheduler):
        assert getattr(scheduler, name) == [requests[0], requests[2]]
        scheduler.running += [getattr(scheduler, name).pop(0)]
    assert getattr(scheduler, name) == [requests[1], requests[3], requests[4], requests[2]]
    scheduler.running.clear()
    with held_back(scheduler):
        assert getattr(scheduler, name) == [requests[1], requests[3], requests[2]]
