"""`add_steer_rmsnorm` of a bf16 row of 4,096 columns, as compiled for a GPU and executed by sass.py: what a warp
issues, which loads wait for which, and whether the row comes out right. Needs no GPU."""

from __future__ import annotations

import functools
import hashlib
import re
import shutil
import struct
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cases
import sass
import torch
from torch import Tensor

from faststeer import build, ops

ROOT = Path(__file__).parents[2]
HIDDEN, THREADS, ROWS, ROW = 4096, 128, 2, 1  # the second of two rows, so that its number is not 0
STEERINGS = cases.STEERINGS
TABLES = ("bank", "entries", "ranges", "rows")


@dataclass(frozen=True)
class Code:
    """A compiled kernel: its SASS and what that is for, registers per thread, bytes of local memory per thread, and
    threads of a block."""

    sass: str
    arch: str
    registers: int
    stack: int
    threads: int = THREADS


@dataclass(frozen=True)
class Execution:
    """What became of one row.

    Attributes:
        trace: what a warp did.
        hidden, normed: `[4096]`, as computed. expected: both, by the reference.
    """

    trace: sass.Trace
    hidden: Tensor
    normed: Tensor
    expected: tuple[Tensor, Tensor]

    @property
    def row_loads(self) -> list[int]:
        """The numbers of the instructions that load x and residual."""
        return [load.number for name in ("x", "residual") for load in self.trace.of(name)]

    @property
    def first_wait(self) -> int:
        """The number of the first instruction that uses a number from a table."""
        return min(number for name, number in self.trace.waits.items() if name in TABLES)

    @property
    def hops(self) -> int:
        """Loads that the first load of a vector waits for, one after another; 0: no vector is loaded."""
        return min((load.depth - 1 for load in self.trace.of("bank")), default=0)


# Compiling ------------------------------------------------------------------------------------------------------------


def tool(name: str) -> str | None:
    """nvdisasm or cuobjdump of the CUDA toolkit or of Triton, which brings them along."""
    places = Path(build.torch_folder()).parent.glob(f"triton/backends/nvidia/bin/{name}")
    return shutil.which(name) or next(map(str, places), None)


@functools.cache
def compile_cuda(arch: str = "90") -> Code:
    """The kernel of csrc/cuda for rows of this size, compiled alone. Kept in build/executed by a digest of sources."""
    csrc, nvcc = ROOT / "csrc", build.find_nvcc()
    source = f"""#include "{csrc / "cuda" / "row.cuh"}"
        template __global__ void faststeer::row_kernel<__nv_bfloat16, 8, 4, {HIDDEN},
            faststeer::RowOp::ADD_STEER_RMSNORM>(const __grid_constant__ faststeer::RowArguments);"""
    flags = [*build.NVCC_FLAGS, f"-arch=sm_{arch}", "--cubin"]
    digest = hashlib.sha256(repr((source, flags, subprocess.check_output([nvcc, "--version"]))).encode())
    for path in sorted([*(csrc / "cuda").iterdir(), *(csrc / "common").iterdir()]):
        digest.update(path.read_bytes())
    cubin = ROOT / "build" / "executed" / f"{digest.hexdigest()[:16]}.cubin"
    if not cubin.exists():
        cubin.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cubin.parent) as folder:
            unit, output = Path(folder, "kernel.cu"), Path(folder, "kernel.cubin")
            unit.write_text(source)
            subprocess.run([nvcc, *flags, "-o", str(output), str(unit)], check=True, capture_output=True)
            output.replace(cubin)
    return _code(cubin, "row_kernel", arch)


@functools.cache
def compile_triton(arch: str = "90") -> Code:
    """Triton's kernel for such rows, compiled as its launcher has it compiled."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from faststeer.kernels.launch import Launch
    from faststeer.kernels.residual import residual_kernel

    how = Launch.of(HIDDEN, 2, True, 2)
    constants = {
        "FP32_WEIGHT": False, "EARLY_WEIGHT": how.early_weight, "IN_PLACE": False, "LATCHES": False, "HIDDEN": HIDDEN,
        "BLOCK": how.block, "ALIGNED": True,
    }  # fmt: skip
    parameters = {p.name: p for p in residual_kernel.params}
    constants |= {n: p.default for n, p in parameters.items() if p.is_constexpr and n not in constants}
    types = {"bank": "*fp32", "probe": "*fp32", "gate_state": "*u1"}
    types |= dict.fromkeys(("x", "residual", "weight", "normed", "hidden"), "*bf16")
    types |= dict.fromkeys((n for n in TABLES if n not in types), "*i32")
    annotated = {"int64": "i64", "int32": "i32", "float32": "fp32", "fp32": "fp32"}
    for name, parameter in parameters.items():
        if name not in types:
            annotation = str(parameter.annotation).rpartition(".")[2]
            types[name] = "constexpr" if name in constants else annotated.get(annotation, annotation)
    options = {
        "num_warps": how.num_warps, "num_stages": 1, "maxnreg": how.registers, "enable_fp_fusion": False,
    }  # fmt: skip
    signature = {name: types[name] for name in parameters}
    indices = {(list(parameters).index(name),): value for name, value in constants.items()}
    kernel = triton.compile(
        ASTSource(residual_kernel, signature, indices), target=GPUTarget("cuda", int(arch), 32), options=options
    )
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        return _code(Path(file.name), "residual_kernel", arch, 32 * how.num_warps)


def _code(cubin: Path, kernel: str, arch: str, threads: int = THREADS) -> Code:
    disassembler, dump = tool("nvdisasm"), tool("cuobjdump")
    assert disassembler and dump, "nvdisasm and cuobjdump are needed: install the CUDA toolkit or Triton"
    usage = subprocess.run([dump, "--dump-resource-usage", str(cubin)], check=True, capture_output=True, text=True)
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage.stdout)
    assert found, usage.stdout
    return Code(sass.disassemble(disassembler, cubin, kernel), arch, int(found[1]), int(found[2]), threads)


# Executing ------------------------------------------------------------------------------------------------------------


def operands(steering: str) -> tuple[cases.Case, dict[str, Tensor]]:
    """A case, and every buffer of a kernel by name; "none" is a row whose slot is -1."""
    case = cases.case("add" if steering == "none" else steering, ROWS, HIDDEN, torch.bfloat16, "cpu")
    if steering == "none":
        case.rows[0] = -1
    buffers = {"x": case.x, "residual": case.residual, "weight": case.weight}
    buffers |= {name: torch.zeros_like(case.x) for name in ("normed", "hidden")}
    buffers["probe"] = torch.zeros(ROWS, 1)
    tables = case.tables
    buffers |= {"bank": tables.bank, "entries": tables.entries, "ranges": tables.ranges, "rows": case.rows}
    buffers["gate_state"] = torch.zeros(4, dtype=torch.uint8)
    return case, buffers


def _execute(steering: str, code: Code, pack: Any) -> Execution:
    case, tensors = operands(steering)
    buffers = {n: t.view(torch.int16).numpy() if t.dtype == torch.bfloat16 else t.numpy() for n, t in tensors.items()}
    addresses = {name: sass.address(buffers, name) for name in buffers}
    trace = sass.Block(code.sass, buffers, pack(case, addresses), code.threads, index=ROW, arch=code.arch).run()
    x, residual, one = case.x[ROW:], case.residual[ROW:], case.rows[:, ROW:]
    expected = ops.add_steer_rmsnorm(
        x, residual, case.weight, 1e-6, 0.0, False, case.tables, one, backend="reference"
    )  # fmt: skip
    normed, hidden = (each[0] for each in expected)
    return Execution(trace, tensors["hidden"][ROW], tensors["normed"][ROW], (hidden, normed))


def execute_cuda(steering: str, code: Code) -> Execution:
    """Run the CUDA kernel on the row."""
    return _execute(steering, code, _row_arguments)


def execute_triton(steering: str, code: Code) -> Execution:
    """Run Triton's kernel on the row."""

    def pack(case: cases.Case, addresses: Mapping[str, int]) -> bytes:
        tables = case.tables
        counts = len(tables.bank), len(tables.entries), len(tables.ranges), 0, 0, 0
        return (
            struct.pack(f"<{len(addresses)}Q", *addresses.values())
            + struct.pack("<4q6i", HIDDEN, HIDDEN, case.rows.stride(0), 0, *counts)
            + struct.pack("<ff", 1e-6, 0.0)
            + struct.pack("<QQ", 0, 0)
        )

    return _execute(steering, code, pack)


def _row_arguments(case: cases.Case, addresses: Mapping[str, int]) -> bytes:
    """`RowArguments` of csrc/common/arguments.h."""
    tables = case.tables
    rows = (number for name in ("x", "residual", "hidden") for number in (addresses[name], HIDDEN))
    head = struct.pack("<10q", *rows, addresses["weight"], addresses["normed"], 0, ROWS)  # no probe
    head += struct.pack("<iiff?xxxi", HIDDEN, 0, 1e-6, 0.0, False, 2)  # 2: bf16, of the weight
    counts = len(tables.bank), len(tables.entries), len(tables.ranges), 0, 0
    places, apart = addresses["rows"], case.rows.stride(0) * case.rows.itemsize
    pointers = *(addresses[name] for name in TABLES), places + apart, places + 2 * apart, 0
    return head + struct.pack("<7Q5i4xi4x", *pointers, *counts, 2)
