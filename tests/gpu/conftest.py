"""Every test here runs on each back end that a CUDA tensor can have. One that does not work fails.

A dry run (FASTSTEER_DRY_RUN=1, on a machine without a GPU) has CPU tensors and the back ends that take them, so that
the tests themselves are tried before a GPU is there; a back end that does not work fails there, too, or nothing would
be tried. Of tests that need the device it says so and skips them.

A failure is printed as soon as it happens: a run that is stopped at its time limit never comes to pytest's own summary.
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


def pytest_configure(config: pytest.Config) -> None:
    if not hasattr(config, "workerinput"):  # a process of pytest-xdist hands its reports to the one that began it
        config.pluginmanager.register(PrintedFailures(config))


class PrintedFailures:
    def __init__(self, config: pytest.Config) -> None:
        self.config = config

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        terminal = self.config.pluginmanager.get_plugin("terminalreporter")
        if report.failed and terminal is not None:
            terminal.write_line(f"\nFAILURE {report.nodeid} ({report.when})\n{report.longreprtext[-4000:]}\n")


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
        pytest.fail(f"the back end {name} does not work here: {state.reason}", pytrace=False)
    return name
