"""A process of its own for tests of the Triton back end. Whether kernels are interpreted is decided when Triton is
first imported, for a whole process, and the other tests must not notice; nor may they have imported Triton before."""

from __future__ import annotations

import importlib
import importlib.util
import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor
from typing import Any

MISSING = None if importlib.util.find_spec("triton") else "Triton is not installed: pip install triton"


def begin(environment: dict[str, str]) -> None:
    """The first thing that the process does."""
    os.environ.update(environment)
    import torch

    torch.set_num_threads(1)
    if environment["TRITON_INTERPRET"] == "1":
        importlib.import_module("triton_interpreter").mend()


def call(module: str, function: str, args: tuple[Any, ...], options: dict[str, Any]) -> Any:
    return getattr(importlib.import_module(module), function)(*args, **options)


class TritonProcess:
    """Calls the functions of one module in a process that lives as long as this object. The module is named, not given,
    since it may only be imported there."""

    def __init__(self, module: str, environment: dict[str, str]) -> None:
        context = multiprocessing.get_context("spawn")
        self._module = module
        self._pool = ProcessPoolExecutor(1, mp_context=context, initializer=begin, initargs=(environment,))

    def __call__(self, function: str, *args: Any, **options: Any) -> Any:
        return self._pool.submit(call, self._module, function, args, options).result()

    def close(self) -> None:
        self._pool.shutdown()
