"""What the scheduler and the worker do about requests that overflow, without any vLLM."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from faststeer.vllm.fresh_blocks import FreshBlocks
from faststeer.vllm.isolation import REASONS, Isolation, reason_of
from faststeer.vllm.overflow import StepSums, final_states
from faststeer.vllm.switch import NEW_BLOCKS_KEY, OVERFLOWS_KEY

ROW = st.sampled_from(["usual", "nan", "inf", "-inf", "zero", "large"])


@settings(deadline=None)
@given(st.lists(st.tuples(st.lists(ROW, min_size=1, max_size=5), st.booleans(), st.integers(0, 9)), min_size=1, max_size=6), st.sampled_from([torch.float32, torch.bfloat16, torch.float16]), st.integers(0, 3))  # fmt: skip # noqa: E501
def test_the_first_bad_token_of_every_request(requests, dtype, padding):
    """Rows in which one number is bad, or all are zero; rows behind the requests' are nobody's."""
    generator, rows, expected = torch.Generator().manual_seed(len(requests)), [], {}
    for number, (kinds, is_steered, computed) in enumerate(requests):
        for token, kind in enumerate(kinds):
            row = torch.randn(32, generator=generator).to(dtype)
            if kind == "zero":
                row.zero_()
            elif kind == "large":  # finite, and so is the sum of absolute values
                row.fill_(torch.finfo(dtype).max / 64)
            elif kind != "usual":
                row[int(torch.randint(32, (1,), generator=generator))] = float(kind)
            rows.append(row)
            if kind not in ("usual", "large"):
                expected.setdefault(f"r{number}", (computed + token, "plan" if is_steered else "model"))
    hidden = torch.stack(rows + [torch.full((32,), torch.nan, dtype=dtype)] * padding)
    ids = [f"r{i}" for i in range(len(requests))]
    steered = {name for name, (_, is_steered, _) in zip(ids, requests, strict=True) if is_steered}
    computed = {name: before for name, (*_, before) in zip(ids, requests, strict=True)}
    sums = StepSums.of(hidden, (ids, [len(kinds) for kinds, *_ in requests]), computed, steered)
    assert sums.overflows() == expected
    for h, row, kind in zip(hidden, rows, [kind for kinds, *_ in requests for kind in kinds], strict=False):
        assert torch.equal(h, row) if kind in ("usual", "large") else not h.any()
    later = sums.attach(SimpleNamespace(get_output=lambda: SimpleNamespace()))
    for output in (sums.attach(SimpleNamespace()), later.get_output()):
        assert getattr(output, OVERFLOWS_KEY, {}) == expected
    assert sums.attach(None) is None


def test_final_states():
    hidden = torch.ones(2, 8)
    assert final_states(SimpleNamespace(), 8) is None
    assert final_states(SimpleNamespace(execute_model_state=None), 8) is None
    assert final_states(SimpleNamespace(execute_model_state=SimpleNamespace(hidden_states=hidden)), 8) is hidden
    assert final_states(SimpleNamespace(execute_model_state=SimpleNamespace(hidden_states=None)), 8) is None
    assert final_states(SimpleNamespace(execute_model_state=(torch.ones(2, 9), None, hidden)), 8) is hidden


@pytest.mark.parametrize("pieces", [1, 2])
@pytest.mark.parametrize("leading", [(), (2,)], ids=["blocks first", "keys and values first"])
def test_blocks_are_zeroed_in_every_cache(pieces, leading):
    n_blocks = 7
    caches = [torch.full((*leading, pieces * n_blocks, 3, 4), torch.nan) for _ in range(3)]
    layers = {str(i): SimpleNamespace(kv_cache=cache) for i, cache in enumerate([*caches, caches[0]])}
    layers |= {"none": SimpleNamespace(), "empty": SimpleNamespace(kv_cache=torch.empty(0)), "listed": SimpleNamespace(kv_cache=[caches[1]])}  # fmt: skip # noqa: E501
    runner = SimpleNamespace(
        device=torch.device("cpu"), kv_cache_config=SimpleNamespace(num_blocks=n_blocks),
        compilation_config=SimpleNamespace(static_forward_context=layers),
    )  # fmt: skip
    fresh = FreshBlocks(runner)
    fresh.zero([])
    fresh.zero([5, 2])
    for cache in caches:
        by_block = cache.reshape(*leading, n_blocks, pieces * 12).movedim(-2, 0).reshape(n_blocks, -1)
        assert [bool((block == 0).all()) for block in by_block] == [i in (2, 5) for i in range(n_blocks)]
        assert by_block.isnan().sum() == by_block[0].numel() * (n_blocks - 2)


class Request(SimpleNamespace):
    def __init__(self, name: str, computed: int, in_flight: int = 0) -> None:
        super().__init__(request_id=name, num_computed_tokens=computed, num_in_flight_tokens=in_flight)


@pytest.fixture
def scheduler():
    """Blocks of four tokens, and of eight in the second group."""
    blocks = {"a": ([1, 2, 3, 4], [11, 12]), "b": ([5, 2], [13])}
    pool = SimpleNamespace(get_new_blocks=lambda n: [SimpleNamespace(block_id=100 + i) for i in range(n)])
    manager = SimpleNamespace(
        block_pool=pool, evicted=set(), freed=[], get_block_ids=blocks.__getitem__,
        evict_blocks=lambda ids: manager.evicted.update(ids), free=lambda request: manager.freed.append(request),
    )  # fmt: skip
    groups = [SimpleNamespace(kv_cache_spec=SimpleNamespace(block_size=size)) for size in (4, 8)]
    return SimpleNamespace(
        kv_cache_manager=manager, kv_cache_config=SimpleNamespace(kv_cache_groups=groups), requests={},
        vllm_config=SimpleNamespace(parallel_config=SimpleNamespace(decode_context_parallel_size=1)),
    )  # fmt: skip


def test_every_block_that_is_handed_out_is_announced_once(scheduler):
    isolation = Isolation(scheduler)
    pool, steps = scheduler.kv_cache_manager.block_pool, [SimpleNamespace() for _ in range(3)]
    for number, step in enumerate(steps):
        for _ in range(number):
            pool.get_new_blocks(2)
        isolation.announce(step)
    assert [getattr(step, NEW_BLOCKS_KEY) for step in steps] == [[], [100, 101], [100, 101, 100, 101]]


@pytest.mark.parametrize(
    ("request_", "overflow", "evicted"),
    [
        (Request("a", 16), None, set()),  # all of its rows were looked at
        (Request("a", 16), 0, {1, 2, 3, 4, 11, 12}),
        (Request("a", 16), 9, {3, 4, 12}),  # its own prefix, which may be everybody's, stays
        (Request("a", 16, in_flight=1), None, {4, 12}),  # aborted or preempted before anyone looked
        (Request("a", 16, in_flight=12), None, {2, 3, 4, 11, 12}),
        (Request("a", 16, in_flight=1), 13, {4, 12}),
    ],
)
def test_the_prefix_cache_forgets_what_is_bad_or_unknown(scheduler, request_, overflow, evicted):
    isolation, manager = Isolation(scheduler), scheduler.kv_cache_manager
    scheduler.requests = {"a": request_}
    isolation.note(
        SimpleNamespace() if overflow is None else SimpleNamespace(**{OVERFLOWS_KEY: {"a": (overflow, "plan")}})
    )
    manager.free(request_)
    assert manager.evicted == evicted and manager.freed == [request_]


@pytest.mark.parametrize("reason", REASONS)
def test_a_request_that_overflowed_ends_with_the_reason(scheduler, reason):
    isolation, request, other = Isolation(scheduler), Request("a", 16), Request("b", 4)
    scheduler.requests = {"a": request, "b": other}
    isolation.note(SimpleNamespace(**{OVERFLOWS_KEY: {"a": (7, reason), "gone": (1, "plan")}}))
    isolation.note(SimpleNamespace(**{OVERFLOWS_KEY: {"a": (9, "plan")}}))  # the next piece of its prompt
    assert not isolation.ends(other, "error") and not hasattr(other, "status")
    assert isolation.ends(request, "error") and request.status == "error" and not request.resumable
    assert "token 7" in request.stop_reason and ("coefficient" in request.stop_reason) == (reason != "model")
    assert reason_of(request.stop_reason) == reason
    assert all(reason_of(other) is None for other in (None, 3, "</s>"))
