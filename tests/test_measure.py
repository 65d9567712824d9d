"""Times are checked with a clock that the timed calls themselves move on: nothing here depends on the machine."""

import pytest
import torch
import transformers

from faststeer import measure


class Clock:
    """Seconds that pass only where a test says so."""

    def __init__(self, monkeypatch) -> None:
        self.now = 100.0
        monkeypatch.setattr(measure.time, "perf_counter", lambda: self.now)

    def passes(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def clock(monkeypatch) -> Clock:
    return Clock(monkeypatch)


def test_each_call_is_timed_once_per_replay(clock):
    calls, costs = [], {0: 1e-6, 1: 2e-6, 2: 6e-6}

    def run(i: int) -> None:
        calls.append(i)
        clock.passes(costs[i])

    timing = measure.time_calls(run, 3, "cpu", replays=5, cold=False)
    assert (timing.us, timing.us_low, timing.us_high) == (3.0, 3.0, 3.0)
    assert (timing.calls, timing.replays) == (3, 5)
    assert calls[-15:] == [0, 1, 2] * 5


def test_quartiles_are_over_replays(clock):
    costs = iter([0.0, *(n * 1e-6 for n in (5, 1, 2, 4, 3))])  # the first call warms up
    timing = measure.time_calls(lambda i: clock.passes(next(costs)), 1, "cpu", replays=5, cold=False)
    assert (timing.us_low, timing.us, timing.us_high) == (2.0, 3.0, 4.0)


def test_what_is_made_before_a_call_is_no_part_of_its_time(clock):
    order = []

    def call(name: str, seconds: float):
        return lambda i: (order.append((name, i)), clock.passes(seconds))

    timing = measure.time_calls(call("run", 5e-6), 2, "cpu", replays=3, before=call("before", 3e-6), cold=False)
    assert timing.us == 5.0
    first_replay = order[-3 * 6 :][:6]
    assert first_replay == [("before", 0), ("run", 0), ("before", 1), ("run", 1), ("before", 0), ("before", 1)]


def test_restoring_is_no_part_of_the_time_and_comes_before_each_replay(clock):
    rows, seen = torch.ones(4), []

    def restore() -> None:
        rows.fill_(1)
        clock.passes(1.0)

    def run(i: int) -> None:
        seen.append(rows.sum().item())
        rows.zero_()
        clock.passes(2e-6)

    timing = measure.time_calls(run, 1, "cpu", replays=4, restore=restore, cold=False)
    assert timing.us == 2.0 and seen[-4:] == [4.0] * 4


def test_a_step_is_apart_from_prefill(clock):
    asked = []

    def generate(n: int) -> None:
        asked.append(n)
        clock.passes(0.25 + 0.002 * (n - 1))

    timing = measure.time_steps(generate, 65, "cpu", repeats=3)
    assert timing.prefill_ms == 250.0
    assert timing.step_ms == timing.step_ms_low == timing.step_ms_high == 2.0
    assert asked == [1, 3, *[1, 65] * 3]


def test_one_token_has_no_step():
    with pytest.raises(ValueError, match="tokens is 1"):
        measure.time_steps(lambda n: None, 1, "cpu")


def test_host_time(clock):
    timing = measure.time_host(lambda: clock.passes(4e-6), "cpu", calls=10, repetitions=3)
    assert timing == measure.Timing(4.0, 4.0, 4.0, 10, 3)


def test_a_copy_counts_bytes_read_and_written(monkeypatch):
    monkeypatch.setattr(measure, "time_calls", lambda *_, **__: measure.Timing(1000.0, 1000.0, 1000.0, 4, 1))
    speed, _ = measure.copy_bandwidth("cpu", 2**20)
    assert speed == 2 * 2**20 / 1e-3


def test_a_copy_on_this_machine():
    speed, timing = measure.copy_bandwidth("cpu", 2**20, replays=2)
    assert speed == pytest.approx(2 * 2**20 / timing.us * 1e6) and timing.us > 0


@pytest.mark.parametrize("bytes_per_call", [1, 2**20, 2**24, 2**29, 2**33])
def test_tensor_sets_pass_the_cache_or_are_as_many_as_allowed(bytes_per_call):
    sets = measure.tensor_sets(bytes_per_call)
    assert measure.FEWEST_SETS <= sets <= measure.MOST_SETS
    assert sets in (measure.MOST_SETS, measure.FEWEST_SETS) or sets * bytes_per_call > measure.ROTATED_BYTES / 2


@pytest.mark.parametrize("tied", [True, False])
def test_weight_bytes(tied):
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = transformers.LlamaConfig(**sizes, num_key_value_heads=1, vocab_size=37, tie_word_embeddings=tied)
    model = transformers.LlamaForCausalLM(config)
    layer = 16 * 16 * 2 + 16 * 8 * 2 + 3 * 16 * 24 + 2 * 16  # q, o; k, v; MLP; norms
    assert measure.weight_bytes(model) == 4 * (2 * layer + 16 + 37 * 16)


def test_machine_is_plain_data():
    record = measure.machine("cpu")
    assert record["torch"] == torch.__version__ and record["cores"] >= 1 and record["cpu"]
    assert "gpu" not in record


def test_version_of_what_is_not_installed():
    assert measure.version("torch") and measure.version("no-such-package-of-that-name") is None
