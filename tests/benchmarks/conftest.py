"""The benchmarks are scripts beside the package: their folder is put on the path."""

import os
import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

from benchmark_programs import processes_with


@pytest.fixture
def marker(tmp_path) -> str:
    """Stands in the environment of everything that a test starts; at its end none of it may be left."""
    name = f"marker-{os.getpid()}-{tmp_path.name}"
    yield name
    assert processes_with(name) == []
