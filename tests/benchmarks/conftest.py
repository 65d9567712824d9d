import os
import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parent))

from benchmark_programs import processes_with


@pytest.fixture
def marker(tmp_path) -> str:
    """Stands in the environment of everything that a test starts; at its end none of it may be left."""
    name = f"marker-{os.getpid()}-{tmp_path.name}"
    yield name
    assert processes_with(name) == []
