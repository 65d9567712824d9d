"""FASTSTEER_TRITON_ELEMENTS, by which a benchmark compares launch configurations. The file is loaded by itself: the
package around it would import Triton."""

import importlib.util
import sys
from pathlib import Path

import pytest

PATH = Path(__file__).parents[2] / "kernels" / "triton" / "launch.py"


@pytest.fixture
def launch():
    spec = importlib.util.spec_from_file_location("launch_of_a_test", PATH)
    module = importlib.util.module_from_spec(spec)
    sys.modules["launch_of_a_test"] = module
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("elements", [8, 16, 32, 64])
@pytest.mark.parametrize("hidden", [64, 1000, 4096, 5120, 8192])
def test_elements_that_are_asked_for(launch, monkeypatch, elements, hidden):
    monkeypatch.setenv(launch.ELEMENTS_VARIABLE, str(elements))
    how = launch.Launch.of(hidden, 2, True, 2)
    threads = 32 * how.num_warps
    assert how.block >= hidden > how.block // 2
    assert threads * elements == how.block or (threads == 32 and how.block < 32 * elements)
    assert how.registers * threads <= 65_536 and threads <= 1024


def test_too_few_elements_for_a_wide_row(launch, monkeypatch):
    monkeypatch.setenv(launch.ELEMENTS_VARIABLE, "8")
    with pytest.raises(ValueError, match="must be at least 16 for rows of 16384 columns; got 8"):
        launch.Launch.of(16384, 2, True)


@pytest.mark.parametrize("text", ["0", "12", "128", "-8", "eight", "8 ", "08"])
def test_no_other_number_is_taken(launch, monkeypatch, text):
    monkeypatch.setenv(launch.ELEMENTS_VARIABLE, text)
    with pytest.raises(ValueError, match="must be 8, 16, 32 or 64"):
        launch.Launch.of(4096, 2, True)


@pytest.mark.parametrize("text", [None, ""])
def test_the_rule_where_nothing_is_asked_for(launch, monkeypatch, text):
    monkeypatch.delenv(launch.ELEMENTS_VARIABLE, raising=False)
    rule = [launch.Launch.of(hidden, 2, True, 2) for hidden in (64, 4096, 5120, 8192, 16384)]
    if text is not None:
        monkeypatch.setenv(launch.ELEMENTS_VARIABLE, text)
    launch.Launch.of.cache_clear()
    assert [launch.Launch.of(hidden, 2, True, 2) for hidden in (64, 4096, 5120, 8192, 16384)] == rule
    assert (rule[1].block, rule[1].num_warps, rule[1].early_weight, rule[1].registers) == (4096, 4, True, 168)
