"""What nvcc and ptxas make of csrc/cuda, which needs no GPU: it compiles, nothing is spilled, registers stay within the
budget of csrc/common/launch.h, rows move 16 bytes at a time. No test here says that a kernel runs.

Results are kept in build/cuda-check by a digest of sources and commands, so that a second run compiles nothing. The
normal run compiles every source for sm_90, some 85 s of one core; `full` takes every architecture that is built.
"""

from __future__ import annotations

import fcntl
import functools
import hashlib
import json
import re
import shutil
import subprocess
from dataclasses import asdict, dataclass
from pathlib import Path

import pytest

from faststeer import build

ROOT = Path(__file__).parents[2]
CUDA = ROOT / "csrc" / "cuda"
ARCH = "90"
WIDE = {"fp32": 4, "fp16": 8, "bf16": 8}  # elements in 16 bytes
OPS = ("STEER", "ADD_STEER", "STEER_PAIR", "ADD_STEER_RMSNORM")  # enum RowOp
# csrc/common/launch.h: registers per thread, and for rows of these sizes, when there are many, threads per row and the
# number of rows that must share the 65,536 registers of a multiprocessor for one's loads to hide another's sums.
MAX_REGISTERS = 128
FULL_ROWS = (2048, 4096, 8192)  # sizes with kernels of their own (launch.cu)
IN_FLIGHT = {1024: (32, 16), 2048: (64, 8), 4096: (128, 4), 8192: (256, 2), 16384: (512, 1)}


def _nvcc() -> str | None:
    try:
        return build.find_nvcc()
    except build.BuildError:
        return None


pytestmark = pytest.mark.skipif(_nvcc() is None, reason="no nvcc")


@dataclass
class Kernel:
    """One kernel for one architecture. instructions: how often each kind of memory access stands in its code, and
    `source`, whether in SASS or in PTX."""

    name: str
    arch: str
    registers: int
    stack: int
    spilled: int
    instructions: dict[str, int]
    source: str

    @property
    def row(self) -> tuple[int, int, int, str] | None:
        """(elements per vector, vectors per thread, hidden size or 0, op) of a row kernel."""
        found = re.search(r"row_kernelI.*?Li(\d+)ELi(\d+)ELi(\d+)ELNS_5RowOpE(\d)E", self.name)
        return (int(found[1]), int(found[2]), int(found[3]), OPS[int(found[4])]) if found else None

    def __str__(self) -> str:
        return f"{self.name} for sm_{self.arch}"


@functools.cache
def compiled(name: str, archs: tuple[str, ...]) -> list[Kernel]:
    """Compile one of `build.CUDA_UNITS` as the build does, and say what became of its kernels."""
    file, *flags = build.CUDA_UNITS[name]
    nvcc = build.find_nvcc()
    codes = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in archs]
    command = [nvcc, *build.NVCC_FLAGS, *codes, *build.stable_abi(build.torch_folder()), "-Xptxas", "-v"]
    command += ["-Xcompiler", "-Wall,-Wextra", *flags, "-c", str(CUDA / file)]
    digest = hashlib.sha256(repr((command, subprocess.check_output([nvcc, "--version"]), _disassembler())).encode())
    for path in sorted([*CUDA.iterdir(), *(ROOT / "csrc" / "common").iterdir()]):
        digest.update(path.name.encode() + path.read_bytes())
    folder = ROOT / "build" / "cuda-check" / f"{name}-{digest.hexdigest()[:16]}"
    folder.mkdir(parents=True, exist_ok=True)
    result = folder / "kernels.json"
    with (folder / "lock").open("w") as lock:  # test processes run side by side
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not result.exists():
            kept = folder / "kept"
            kept.mkdir(exist_ok=True)
            command += ["-o", str(folder / "object.o"), "--keep", "--keep-dir", str(kept)]
            done = subprocess.run(command, capture_output=True, text=True)
            assert done.returncode == 0, done.stderr
            kernels = [asdict(kernel) for kernel in _kernels(done.stderr + done.stdout, Path(file).stem, archs, kept)]
            shutil.rmtree(kept)
            result.write_text(json.dumps(kernels))
    return [Kernel(**kernel) for kernel in json.loads(result.read_text())]


def _kernels(log: str, name: str, archs: tuple[str, ...], kept: Path) -> list[Kernel]:
    pattern = (
        r"Compiling entry function '(\S+)' for 'sm_(\w+)'.*?(\d+) bytes stack frame, (\d+) bytes spill stores, "
        r"(\d+) bytes spill loads.*?Used (\d+) registers"
    )
    code = {arch: _code(name, arch, kept) for arch in archs}
    kernels = []
    for found in re.finditer(pattern, log, re.DOTALL):
        entry, arch, stack, stores, loads, registers = found.groups()
        source, listings = code[arch]
        instructions = _count(source, listings[entry])
        kernels.append(Kernel(entry, arch, int(registers), int(stack), int(stores) + int(loads), instructions, source))
    return kernels


def _disassembler() -> str | None:
    """nvdisasm from the CUDA toolkit or from triton, which brings one along."""
    if found := shutil.which("nvdisasm"):
        return found
    places = Path(build.torch_folder()).parent.glob("triton/backends/nvidia/bin/nvdisasm")
    return next(map(str, places), None)


def _code(name: str, arch: str, kept: Path) -> tuple[str, dict[str, str]]:
    """("SASS", or "PTX" where there is no disassembler, and each kernel's code in it)."""
    cubin = next(iter(kept.glob(f"{name}*.sm_{arch}.cubin")), kept / f"{name}.cubin")
    if (tool := _disassembler()) and cubin.exists():
        done = subprocess.run([tool, "-c", str(cubin)], capture_output=True, text=True)
        if done.returncode == 0:
            pieces = re.split(r"^\.text\.(\S+):$", done.stdout, flags=re.MULTILINE)
            return "SASS", dict(zip(pieces[1::2], pieces[2::2], strict=True))
    ptx = next(iter([*kept.glob(f"{name}*compute_{arch}.ptx"), *kept.glob(f"{name}*.ptx")])).read_text()
    pieces = re.split(r"^\.visible \.entry (\w+)\(", ptx, flags=re.MULTILINE)
    return "PTX", dict(zip(pieces[1::2], pieces[2::2], strict=True))


def _count(source: str, code: str) -> dict[str, int]:
    """Loads of rows (which do not enter L1) and of tables, and stores, by 16 bytes; 16-bit accesses; local memory."""
    patterns = {
        "SASS": {
            "row loads": r"\bLDG\.E\.NA\.128\b",
            "table loads": r"\bLDG\.E\.128\.CONSTANT\b",
            "stores": r"\bSTG\.E\.128\b",
            "narrow loads": r"\bLDG\.E(\.\w+)*\.U16\b",
            "narrow stores": r"\bSTG\.E(\.\w+)*\.U16\b",
            "local": r"\b(LDL|STL)\b",
        },
        "PTX": {
            "row loads": r"\bld\.global\.L1::no_allocate\.v4\.",
            "table loads": r"\bld\.global\.nc\.v4\.",
            "stores": r"\bst\.global\.v4\.",
            "narrow loads": r"\bld\.global(\.nc)?\.[ub]16\b",
            "narrow stores": r"\bst\.global\.[ub]16\b",
            "local": r"\b(ld|st)\.local\b",
        },
    }[source]
    return {what: len(re.findall(pattern, code)) for what, pattern in patterns.items()}


def check_kernels(dtype: str, archs: tuple[str, ...]) -> None:
    kernels = compiled(f"launch_{dtype}", archs)
    for arch in archs:
        here = [kernel for kernel in kernels if kernel.arch == arch]
        shapes = {kernel.row for kernel in here if kernel.row}
        wide = WIDE[dtype]
        expected = [(wide, 8 // wide, 0), (wide, 16 // wide, 0), (wide, 32 // wide, 0), (1, 8, 0), (1, 32, 0)]
        expected += [] if dtype == "fp32" else [(wide, 32 // wide, hidden) for hidden in FULL_ROWS]
        assert shapes == {(*shape, op) for shape in expected for op in OPS}, "not what launch.cu dispatches to"
        assert len(here) == len(shapes) + 1, "and latch_"
    for kernel in kernels:
        assert kernel.stack == 0 and kernel.spilled == 0 and kernel.instructions["local"] == 0, kernel
        assert kernel.registers <= MAX_REGISTERS, kernel
        if kernel.row:
            check_accesses(kernel, dtype)


def check_accesses(kernel: Kernel, dtype: str) -> None:
    elements, vectors, _, op = kernel.row
    counted = kernel.instructions
    if elements == 1:
        return
    rows = 1 if op == "STEER" else 2
    assert counted["row loads"] >= rows * vectors, kernel
    assert counted["stores"] >= (2 if op in ("STEER_PAIR", "ADD_STEER_RMSNORM") else 1) * vectors, kernel
    # Three of an entry's fields, one of its scalars, and the vector that it is read for.
    assert counted["table loads"] >= 4 + elements * vectors // 4, kernel
    if dtype != "fp32":
        assert counted["narrow stores"] == 0, kernel
        # A weight of another dtype is read an element at a time; nothing else is.
        assert op == "ADD_STEER_RMSNORM" or counted["narrow loads"] == 0, kernel


@pytest.mark.parametrize("dtype", WIDE)
def test_kernels_for_sm_90(dtype):
    check_kernels(dtype, (ARCH,))


@pytest.mark.parametrize("dtype", WIDE)
@pytest.mark.parametrize("hidden", IN_FLIGHT)
def test_rows_in_flight(hidden, dtype):
    """Registers are allotted by 8 per thread; threads, 2,048 per multiprocessor, are not what is short."""
    threads, least = IN_FLIGHT[hidden]
    columns = hidden // threads
    for kernel in compiled(f"launch_{dtype}", (ARCH,)):
        if kernel.row and kernel.row[0] * kernel.row[1] == columns and kernel.row[0] > 1:
            assert 65536 // (threads * -(-kernel.registers // 8) * 8) >= least, kernel


def test_host_code_compiles():
    """Against the headers of whatever torch is here, with or without CUDA."""
    assert compiled("ops", (ARCH,)) == []


@pytest.mark.full
@pytest.mark.parametrize("dtype", WIDE)
def test_every_architecture(dtype):
    check_kernels(dtype, tuple(build.cuda_archs(build.find_nvcc())))
