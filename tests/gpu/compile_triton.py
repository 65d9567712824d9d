"""Compiles, side by side, the Triton kernels that tests/gpu and the benchmarks launch, into Triton's cache on disk: one
test process after the other would otherwise wait for them.

    python tests/gpu/compile_triton.py --processes 12
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor

import torch
from device import CUDA, DEVICE, DTYPES, HIDDEN, OTHER_HIDDEN


def compile_for(hidden: int, dtype: str) -> str:
    from faststeer import kernels

    kernels.warmup(hidden, DTYPES[dtype], DEVICE)
    if CUDA:
        torch.cuda.synchronize()
    return f"{hidden} {dtype}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, default=max(1, len(os.sched_getaffinity(0)) - 4))
    processes = parser.parse_args().processes
    # The widest take longest. bf16 first: it is what the benchmarks run.
    jobs = sorted(
        ((hidden, dtype) for hidden in (*HIDDEN, *OTHER_HIDDEN) for dtype in DTYPES), key=lambda job: (-job[0], job[1])
    )
    with ProcessPoolExecutor(processes, multiprocessing.get_context("spawn")) as pool:
        for done in pool.map(compile_for, *zip(*jobs, strict=True)):
            print(done, flush=True)


if __name__ == "__main__":
    main()
