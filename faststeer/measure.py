"""Times and speeds on one device, and the record of the machine that they belong to.

A time is a median over repetitions. On a GPU the calls are replayed as one CUDA graph, so that launches are free, and
the L2 cache is filled with something else first; on a CPU the same calls are made one after the other and the clock is
the host's. Ratios are to be taken within one process. Nothing here prints, writes a file, or knows what it measures.
"""

from __future__ import annotations

import os
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

# Bytes that a replay moves through its tensor sets at least, several times the L2 cache of any GPU, and sets at most.
ROTATED_BYTES, MOST_SETS, FEWEST_SETS = 2**30, 64, 2
CACHES_READ = 4  # times the size of the L2 cache that is read to empty it
CPU_CACHE_BYTES = 2**25  # taken for a CPU's last level, which torch does not name


@dataclass(frozen=True)
class Timing:
    """Microseconds of one call: the median and the quartiles over `replays` repetitions of `calls` calls each."""

    us: float
    us_low: float
    us_high: float
    calls: int
    replays: int


@dataclass(frozen=True)
class StepTiming:
    """Milliseconds of a prefill with its first token, and of each decode step behind it: medians, and the least and the
    most over `repeats`."""

    prefill_ms: float
    step_ms: float
    step_ms_low: float
    step_ms_high: float
    repeats: int


# Calls ----------------------------------------------------------------------------------------------------------------


TENSORS_MOVED = {"copy": 2, "steer": 2, "add_steer": 3, "steer_pair_": 4, "add_steer_rmsnorm": 4}
"""How many tensors of the rows' size an op on steered rows reads and writes, if it touches each byte once."""


def tensor_sets(bytes_per_call: int, most: int = MOST_SETS) -> int:
    """How many sets of tensors a replay should rotate through, so that no call finds its own in the L2 cache."""
    return max(FEWEST_SETS, min(most, ROTATED_BYTES // max(bytes_per_call, 1)))


def time_calls(
    run: Callable[[int], Any],
    calls: int,
    device: torch.device | str,
    *,
    replays: int = 11,
    before: Callable[[int], Any] | None = None,
    restore: Callable[[], Any] | None = None,
    cold: bool = True,
) -> Timing:
    """Time of `run(i)`, each i in 0..calls-1 once per replay, with its own tensors for each i.

    Args:
        run: what is timed. On a GPU it is captured in a CUDA graph: it must not wait for the device.
        before: made before each `run(i)`, such as what leaves x in the cache. The time of the same calls without `run`
            is subtracted, each measured between the others.
        restore: made before each replay, outside of the time, such as writing rows afresh that `run` changes in place.
        cold: empty the cache before each replay.
    """
    device = torch.device(device)
    with_before = run if before is None else (lambda i: (before(i), run(i)))
    laps = [_lap(with_before, calls, device)]
    if before is not None:
        laps.append(_lap(before, calls, device))
    seconds: list[list[float]] = [[] for _ in laps]
    for _ in range(replays):
        for lap, times in zip(laps, seconds, strict=True):
            if restore is not None:
                restore()
            if cold:
                empty_cache(device)
            times.append(_elapsed(lap, device) / calls)
    less = statistics.median(seconds[1]) if before is not None else 0.0
    low, middle, high = (max(s - less, 0.0) * 1e6 for s in _quartiles(seconds[0]))
    return Timing(round(middle, 3), round(low, 3), round(high, 3), calls, replays)


def time_host(run: Callable[[], Any], device: torch.device | str, *, calls: int = 100, repetitions: int = 21) -> Timing:
    """Time that the host spends on one call; the device is left behind."""
    seconds = []
    run()
    for _ in range(repetitions):
        synchronize(device)
        start = time.perf_counter()
        for _ in range(calls):
            run()
        seconds.append((time.perf_counter() - start) / calls)
    synchronize(device)
    low, middle, high = (round(s * 1e6, 3) for s in _quartiles(seconds))
    return Timing(middle, low, high, calls, repetitions)


def time_steps(
    generate: Callable[[int], Any], tokens: int, device: torch.device | str, *, repeats: int = 3
) -> StepTiming:
    """Decode steps apart from prefill: `generate(n)` must produce n tokens per row, of which the first comes from the
    prefill. A step takes (time of `generate(tokens)` - median time of `generate(1)`) / (tokens - 1), so that whatever
    both do, such as prefill and loading plans, is no part of it.

    One round of each warms up: captured graphs, compiled kernels, plans in their slots.

    Raises:
        ValueError: fewer than 2 tokens have no step.
    """
    if tokens < 2:
        raise ValueError(f"tokens is {tokens}: a step is timed from 2 on")

    def seconds(n: int) -> float:
        synchronize(device)
        start = time.perf_counter()
        generate(n)
        synchronize(device)
        return time.perf_counter() - start

    for n in (1, min(tokens, 3)):
        seconds(n)
    first, all_tokens = [], []
    for _ in range(repeats):
        first.append(seconds(1))
        all_tokens.append(seconds(tokens))
    prefill = statistics.median(first)
    steps = [max(s - prefill, 0.0) / (tokens - 1) for s in all_tokens]
    first_ms, middle, low, high = (
        round(s * 1e3, 4) for s in (prefill, statistics.median(steps), min(steps), max(steps))
    )
    return StepTiming(first_ms, middle, low, high, repeats)


def synchronize(device: torch.device | str) -> None:
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


def _lap(run: Callable[[int], Any], calls: int, device: torch.device) -> Callable[[], Any]:
    """All calls, once each: a captured graph on a GPU."""
    if device.type != "cuda":
        run(0)
        return lambda: [run(i) for i in range(calls)]
    with torch.cuda.device(device):
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # compiles and loads what a capture cannot
            for i in range(min(3, calls)):
                run(i)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            results = [run(i) for i in range(calls)]  # held, or a call would write where the last one did

    def replay() -> Any:
        graph.replay()
        return results

    return replay


def _elapsed(lap: Callable[[], Any], device: torch.device) -> float:
    if device.type != "cuda":
        start = time.perf_counter()
        lap()
        return time.perf_counter() - start
    with torch.cuda.device(device):
        start_event, end_event = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start_event.record()
        lap()
        end_event.record()
        end_event.synchronize()
    return start_event.elapsed_time(end_event) / 1e3


def _quartiles(seconds: Sequence[float]) -> list[float]:
    return statistics.quantiles(seconds, n=4, method="inclusive") if len(seconds) > 1 else [seconds[0]] * 3


_fillers: dict[torch.device, Tensor] = {}


def empty_cache(device: torch.device | str) -> None:
    """Read several times what the device's last cache holds. Read, not written: what is written would have to be
    written back later, in somebody else's time."""
    device = torch.device(device)
    if device not in _fillers:
        size = torch.cuda.get_device_properties(device).L2_cache_size if device.type == "cuda" else CPU_CACHE_BYTES
        _fillers[device] = torch.ones(max(CACHES_READ * size, 2**26) // 4, dtype=torch.int32, device=device)
    _fillers[device].amax()


# Limits ---------------------------------------------------------------------------------------------------------------


def copy_bandwidth(device: torch.device | str, n_bytes: int = 2**30, *, replays: int = 11) -> tuple[float, Timing]:
    """Bytes per second, read and written, of a copy of `n_bytes`, and its time: the limit of everything that is bound
    by memory. On a GPU take more than its cache holds."""
    source = torch.ones(n_bytes // 2, dtype=torch.bfloat16, device=device)
    source.normal_()  # what is constant may be copied faster
    targets = [torch.empty_like(source) for _ in range(2)]
    timing = time_calls(lambda i: targets[i % 2].copy_(source), 4, device, replays=replays)
    return 2 * source.nbytes / max(timing.us, 1e-3) * 1e6, timing


def weight_bytes(model: nn.Module) -> int:
    """Bytes of weights that every decode step of a causal language model reads: all parameters but an embedding that
    serves the input alone. Divided by `copy_bandwidth`, the least time of a step at few rows."""
    embedding = model.get_input_embeddings().weight  # type: ignore[operator]
    head = model.get_output_embeddings()  # type: ignore[operator]
    tied = head is None or head.weight is embedding
    return sum(p.nbytes for p in model.parameters() if p is not embedding or tied)


# Machine --------------------------------------------------------------------------------------------------------------


def machine(device: torch.device | str | None = None) -> dict[str, Any]:
    """Processor, versions and, for a CUDA device (default: the current one, where there is one), the GPU."""
    record: dict[str, Any] = {
        "cpu": _cpu_name(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if torch.device(device).type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        record |= {
            "gpu": properties.name,
            "capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "l2_bytes": properties.L2_cache_size,
            "memory_bytes": properties.total_memory,
            "cuda": torch.version.cuda,
            "triton": version("triton"),
        }
    return record


def version(package: str) -> str | None:
    """Of an installed distribution; None where there is none."""
    from importlib import metadata

    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _cpu_name() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())
