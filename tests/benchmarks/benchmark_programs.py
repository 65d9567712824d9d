"""The benchmarks' folders on the path, and how tests look for processes that must not outlive them."""

import importlib.util
import os
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
BENCHMARKS = ROOT / "benchmarks"
sys.path += [str(BENCHMARKS), str(BENCHMARKS / "gpu"), str(BENCHMARKS / "kernels")]


def load(path: str):
    """A program of benchmarks/ as a module: several are named gpu.py."""
    name = "benchmarks_" + path.replace("/", "_").removesuffix(".py")
    spec = importlib.util.spec_from_file_location(name, BENCHMARKS / path)
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def processes_with(marker: str) -> list[int]:
    """Processes, zombies apart, whose command line or environment holds the marker."""
    pids = []
    for folder in Path("/proc").iterdir():
        if not folder.name.isdigit() or int(folder.name) == os.getpid():
            continue
        try:
            text = (folder / "cmdline").read_bytes() + (folder / "environ").read_bytes()
        except OSError:
            continue
        if marker.encode() in text:
            pids.append(int(folder.name))
    return pids


def wait_for(condition, seconds: float = 60.0):
    """The first true value of `condition()`."""
    end = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.05)
    return value
