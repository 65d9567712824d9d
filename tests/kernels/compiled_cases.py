"""Compiles the kernels as their launch would, without a GPU: a driver that only names a target, and launches that stop
after the compilation. Runs in a process of its own (triton_process.py)."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction


class NoDriver:
    """Says that it is a GPU. Each capability is another device, so that Triton keeps their kernels apart."""

    capability = 90

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        return self.capability

    def get_current_stream(self, device: int | None = None) -> int:
        return 0


no_driver = NoDriver()
compiled: list[Any] = []  # what the launches since the last look have compiled, or found compiled
only_aligned = False  # whether to pass over the launches of unaligned rows


def only_compile(self: JITFunction, grid: Any) -> Any:
    def launch(*args: Any, **kwargs: Any) -> None:
        if kwargs.get("ALIGNED", True) or not only_aligned:
            compiled.append(self.run(*args, grid=grid, warmup=True, **kwargs))

    return launch


driver.set_active(no_driver)
JITFunction.__getitem__ = only_compile  # type: ignore[method-assign]

import faststeer.kernels as kernels  # noqa: E402
from faststeer.kernels.residual import residual_kernel  # noqa: E402
from faststeer.ops.tables import N_FIELDS  # noqa: E402


def machine_code(capability: int, hidden: int, dtype: torch.dtype, operator: str) -> list[SimpleNamespace]:
    """The kernels that `warmup` compiles for an operator, for aligned rows if the hidden size has them."""
    global only_aligned
    no_driver.capability, only_aligned = capability, hidden * dtype.itemsize % 16 == 0
    compiled.clear()
    kernels.warmup(hidden, dtype, "cpu", operators=(operator,))
    only_aligned = False
    return [describe(kernel) for kernel in compiled]


def describe(kernel: Any) -> SimpleNamespace:
    """What a kernel was compiled to.

    Attributes:
        kernel, num_warps, fp_fusion: its name and options.
        registers, stack: per thread; stack is the bytes that registers could not hold.
        local_in_loops: instructions inside a loop that read or write those bytes.
        fma, sass_fma: the fused multiply-adds of fp32 in PTX and in the machine's code.
        layout_conversions: exchanges of elements between threads that no formula asks for.
        loads, stores: counted by width, such as v4.b32.
        roots: the instructions for reciprocal square roots.
    """
    ptx = kernel.asm["ptx"]
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder, "kernel.cubin")
        cubin.write_bytes(kernel.asm["cubin"])
        usage = tool("cuobjdump", "--dump-resource-usage", str(cubin))
        sass = tool("nvdisasm", "-c", str(cubin))
    registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", usage).groups()
    access = r"\b{}\.global[\w.:]*?\.((?:v\d\.)?b\d+)\b"
    return SimpleNamespace(
        kernel=kernel.name,
        num_warps=kernel.metadata.num_warps,
        fp_fusion=kernel.metadata.enable_fp_fusion,
        registers=int(registers),
        stack=int(stack),
        local_in_loops=local_in_loops(sass),
        fma=len(re.findall(r"\bfma\.\S*f32", ptx)),
        sass_fma=len(re.findall(r"\bFFMA2?\b", sass)),
        layout_conversions=kernel.asm["ttgir"].count("ttg.convert_layout"),
        loads=dict(Counter(re.findall(access.format("ld"), ptx))),
        stores=dict(Counter(re.findall(access.format("st"), ptx))),
        roots=re.findall(r"\brsqrt\S*", ptx),
    )


def local_in_loops(sass: str) -> int:
    lines = sass.splitlines()
    labels = {line.rstrip(":"): i for i, line in enumerate(lines) if re.fullmatch(r"\.L_x_\d+:", line)}
    looped: set[int] = set()
    for i, line in enumerate(lines):
        branch = re.search(r"\bBRA\b.*?`\((\.L_x_\d+)\)", line)
        if branch and labels[branch[1]] <= i:
            looped.update(range(labels[branch[1]], i + 1))
    assert looped, "a kernel without a loop over its entries"
    return sum(bool(re.search(r"\b(STL|LDL)\b", lines[i])) for i in looped)


def tool(name: str, *args: str) -> str:
    path = Path(triton.__file__).parent / "backends/nvidia/bin" / name
    return subprocess.run([path, *args], check=True, capture_output=True, text=True).stdout


def cache() -> dict[Any, Any]:
    """The compiled variants of the kernel, for the device that the driver names."""
    return residual_kernel.device_caches[no_driver.get_current_device()][0]


def compilations(hidden: int, dtype: torch.dtype) -> tuple[int, int]:
    """How many kernels `warmup` compiles, and how many more all sorts of calls do after it."""
    no_driver.capability = 90
    cache().clear()  # of what was compiled for other tests
    kernels.warmup(hidden, dtype, "cpu")
    warm = len(cache())
    for rows in (1, 2, 3, 15, 16, 17, 32, 1000, 4096):
        for start, gap in ((0, 0), (0, 1), (0, 16), (1, 0), (8, 8)):
            call_all(rows, hidden, dtype, start, gap, large=rows % 2 == 0)
    return warm, len(cache()) - warm


def call_all(rows: int, hidden: int, dtype: torch.dtype, start: int, gap: int, large: bool) -> None:
    def matrix() -> torch.Tensor:
        memory = torch.zeros(rows * (hidden + gap) + start, dtype=dtype)
        return memory[start:].view(rows, hidden + gap)[:, :hidden]

    n = 16 if large else 1
    bank = torch.zeros(n * hidden + start)[start:].view(n, hidden)
    places = torch.zeros(3, rows + start, dtype=torch.int32)[:, start:]
    tables = (bank, torch.zeros(n, N_FIELDS, dtype=torch.int32), torch.zeros(n, 2, dtype=torch.int32), places)
    gates = torch.zeros(n, n, dtype=torch.bool)
    weight = torch.zeros(hidden + start, dtype=dtype)[start:]
    for gate_state, columns, probe in (
        (None, 0, None),
        (gates, n, torch.zeros(rows, n)),
        (gates[:0], 1, torch.zeros(rows, 0)),
    ):
        kernels.steer(matrix(), *tables, gate_state, None, columns)
        kernels.add_steer(matrix(), matrix(), *tables, gate_state, None, columns)
        kernels.steer_pair_(matrix(), matrix(), *tables, gate_state, probe)
        for eps, offset, fp32_weight in ((1e-6, 0.0, False), (0.0, 1.0, True), (1, 1, True)):
            kernels.add_steer_rmsnorm(
                matrix(), matrix(), weight, eps, offset, fp32_weight, *tables, gate_state, None, columns
            )
    kernels.latch_(matrix(), None, *tables, gates)
    kernels.latch_(matrix(), matrix(), *tables, gates)
