"""Where tests/gpu runs: on the GPU, or dry (conftest.py says what that is)."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import Tensor

CUDA = torch.cuda.is_available()
DRY_RUN = not CUDA and os.environ.get("FASTSTEER_DRY_RUN") == "1"
DEVICE = "cuda" if CUDA else "cpu"
BACKENDS = ("cuda", "triton", "reference") if CUDA else ("cpu", "triton", "reference")
MARKS = [pytest.mark.gpu, pytest.mark.skipif(not (CUDA or DRY_RUN), reason="no GPU that PyTorch can use")]
needs_device = pytest.mark.skipif(not CUDA, reason="dry run: there is no such thing on the CPU")
if DRY_RUN and os.environ.get("TRITON_INTERPRET") == "1":
    sys.path.append(str(Path(__file__).parents[1] / "kernels"))
    importlib.import_module("triton_interpreter").mend()

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
# Triton's interpreter, which a dry run has, takes milliseconds per entry and row.
HIDDEN = (64, 111, 896, 2048, 3584, 4096, 8192, 16384) if CUDA else (64, 111)
OTHER_HIDDEN = (40, 1000, 5120) if CUDA else (40,)
# One row, few, and more than there are multiprocessors, which is another launch configuration of the CUDA kernels.
ROWS = (1, 2, 7, 33, 199) if CUDA else (1, 7)


@contextmanager
def no_synchronisation() -> Iterator[None]:
    """PyTorch raises where it waits for the device; and something that runs there for long must still be running at the
    end, which it is not if anybody else waited."""
    if not CUDA:
        yield
        return
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        torch.cuda._sleep(100_000_000)  # some 50 ms
        asleep = torch.cuda.Event()
        asleep.record()
        yield
        assert not asleep.query(), "something waited for the device"
    finally:
        torch.cuda.set_sync_debug_mode("default")
        torch.cuda.synchronize()


def allocations() -> int:
    """How many times memory was asked for so far on this device."""
    return torch.cuda.memory_stats()["allocation.all.allocated"] if CUDA else 0


def captured(run: Callable[[], tuple[Tensor, ...]]) -> tuple[tuple[Tensor, ...], Callable[[], None]]:
    """A CUDA graph of `run`: its results, and what writes them again. Dry: `run` itself."""
    if not CUDA:
        results = run()

        def again() -> None:
            for old, new in zip(results, run(), strict=True):
                old.copy_(new)

        return results, again
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run()  # what is compiled or loaded at its first use
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = run()
    return results, graph.replay
