"""Every test here runs on each back end that a CUDA tensor can have. One that does not work fails: on a machine with a
GPU all of them must.

A dry run (FASTSTEER_DRY_RUN=1, on a machine without a GPU) has CPU tensors and the back ends that take them, so that
the tests themselves are tried before a GPU is there; of tests that need the device it says so and skips them.
"""

import sys
from pathlib import Path

import pytest

# backend_cases, random_tables, models, support
sys.path += [str(Path(__file__).parents[1] / folder) for folder in ("ops", "cuda", "", "engine")]

from device import BACKENDS, CUDA

from faststeer import ops


def pytest_report_header() -> str:
    return "tests/gpu on a GPU" if CUDA else "tests/gpu: DRY RUN, no GPU: CPU tensors"


@pytest.fixture(params=BACKENDS)
def backend(request) -> str:
    return working(request.param)


@pytest.fixture(params=BACKENDS[:2])
def kernels(request) -> str:
    """The back ends that are kernels: all but the reference."""
    return working(request.param)


def working(name: str) -> str:
    state = ops.states()[name]
    if not state.works:
        (pytest.fail if CUDA else pytest.skip)(f"the back end {name} does not work here: {state.reason}")
    return name
