"""Builds the emulator (host_emulation/) and calls the CUDA launchers through it on CPU tensors.

The very sources in csrc/cuda are compiled by g++ against a small stand-in for CUDA's headers, and
host_emulation/emulator.cpp runs a block's threads as fibers. So the kernels' logic is exercised without a GPU:
partition of the columns, reductions, barriers, entry loop, conversions, launch configurations. Not the device's own
behaviour: speed, memory order, what ptxas makes of it.
"""

from __future__ import annotations

import ctypes
import fcntl
import functools
import hashlib
import shutil
import subprocess
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor

from faststeer import build
from faststeer.ops.tables import Tables

ROOT = Path(__file__).parents[2]
HERE = Path(__file__).parent / "host_emulation"
# Without contraction, so that a sum is what CUDA's __fadd_rn and __fmul_rn make of it. A misaligned 16-byte access is a
# fault on the device, so it is one here.
FLAGS = ["-std=c++17", "-O1", "-fPIC", "-ffp-contract=off", "-w", f"-I{HERE / 'shim'}"]
FLAGS += ["-fsanitize=alignment,bounds", "-fno-sanitize-recover=all"]
DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
STEER, ADD_STEER, STEER_PAIR, ADD_STEER_RMSNORM, LATCH = range(5)
Config = tuple[int, int, int, int]  # threads per row, rows per block, elements per vector, vectors per thread

_pointer, _int64, _int32, _float = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32, ctypes.c_float


class CTables(ctypes.Structure):
    _names = ("bank", "entries", "ranges", "slots", "positions", "sequences", "gate_state")
    _sizes = ("n_vectors", "n_entries", "n_slots", "n_gates", "n_sequences")
    _fields_ = [(name, _pointer) for name in _names] + [(name, _int32) for name in _sizes]


class CRows(ctypes.Structure):
    _fields_ = [("data", _pointer), ("stride", _int64)]


class CRow(ctypes.Structure):
    _fields_ = [
        *((name, CRows) for name in ("x", "residual", "hidden")),
        *((name, _pointer) for name in ("weight", "normed", "probe")),
        ("rows", _int64),
        *((name, _int32) for name in ("hidden_size", "probe_columns")),
        *((name, _float) for name in ("eps", "weight_offset")),
        ("fp32_weight", ctypes.c_bool),
        ("weight_dtype", _int32),
        ("tables", CTables),
        ("dtype", _int32),
    ]


def sources() -> list[Path]:
    return sorted(p for folder in (ROOT / "csrc" / "cuda", ROOT / "csrc" / "common", HERE) for p in folder.rglob("*.*"))


@functools.cache
def library() -> ctypes.CDLL:
    """The emulator, built once for these sources."""
    digest = hashlib.sha256(repr(FLAGS).encode())
    for path in sources():
        digest.update(path.name.encode() + path.read_bytes())
    folder = ROOT / "build" / "cuda-emulation" / digest.hexdigest()[:16]
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / "emulator.so"
    with (folder / "lock").open("w") as lock:  # test processes run side by side
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not target.exists():
            _build(target)
    loaded = ctypes.CDLL(str(target))
    loaded.emulator_error.restype = ctypes.c_char_p
    loaded.emulate_size.restype = _int64
    assert loaded.emulate_size() == ctypes.sizeof(CRow), "arguments.h has changed"
    return loaded


def compiler() -> str | None:
    """g++ if it knows _Float16, which the stand-in for CUDA's fp16 needs."""
    found = shutil.which("g++")
    if found is None:
        return None
    probe = [found, "-x", "c++", "-fsyntax-only", "-"]
    known = subprocess.run(probe, input="_Float16 x = 1;", text=True, capture_output=True).returncode == 0
    return found if known else None


def _build(target: Path) -> None:
    cuda = ROOT / "csrc" / "cuda"
    units = {name: (cuda / file, *flags) for name, (file, *flags) in build.CUDA_UNITS.items() if name != "ops"}
    units |= {name: (HERE / f"{name}.cpp",) for name in ("emulator", "launchers")}

    def compiled(name: str) -> Path:
        output = target.parent / f"{name}.o"
        path, *flags = units[name]
        _run([compiler(), *FLAGS, *flags, "-x", "c++", "-c", str(path), "-o", str(output)])
        return output

    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(compiled, units))
    fresh = target.with_suffix(".new")
    _run([compiler(), *FLAGS, "-shared", "-o", str(fresh), *map(str, objects)])
    fresh.replace(target)


def _run(command: Sequence[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def choose(rows: int, hidden: int, itemsize: int, aligned: bool, sm_count: int, asked: int = 0) -> Config:
    config = (_int32 * 4)()
    library().emulate_choose_launch(_int64(rows), _int64(hidden), itemsize, aligned, sm_count, asked, config)
    return tuple(config)


def columns_of(text: str | None) -> int:
    """What FASTSTEER_CUDA_COLUMNS means: 0 for nothing, -1 for a value that is refused."""
    return library().emulate_columns_of(None if text is None else text.encode())


def _check(status: int) -> None:
    assert status == 0, f"cudaError {status}: {library().emulator_error().decode()}"


def _tables(tables: Tables, rows: Tensor, gate_state: Tensor | None) -> CTables:
    found = CTables()
    for name, tensor in zip(CTables._names, (*tables[:3], *rows, gate_state), strict=True):
        assert tensor is None or tensor.is_contiguous()
        setattr(found, name, None if tensor is None else tensor.data_ptr())
    found.n_vectors, found.n_entries, found.n_slots = len(tables.bank), len(tables.entries), len(tables.ranges)
    found.n_gates, found.n_sequences = (0, 0) if gate_state is None else gate_state.shape
    return found


def _stride(x: Tensor) -> int:
    return x.stride(0) if x.shape[0] > 1 else x.shape[1]


def on_16_bytes(*tensors: Tensor) -> bool:
    """As ops.cu decides, for rows and tables alike."""
    return all(t.data_ptr() % 16 == 0 and (t.dim() < 2 or _stride(t) * t.element_size() % 16 == 0) for t in tensors)


class Emulated:
    """The operators of docs/kernels.md, run by the emulator.

    sm_count: what the launch heuristic takes the device to have: 132 makes few rows few, 1 makes them many.
    asked: columns per thread in place of the heuristic's.
    """

    def __init__(
        self, tables: Tables, rows: Tensor, gate_state: Tensor | None, sm_count: int = 132, asked: int = 0
    ) -> None:
        self.tables, self.rows, self.gate_state = tables, rows, gate_state
        self.sm_count, self.asked = sm_count, asked

    def _row(
        self,
        op: int,
        x: Tensor,
        hidden: Tensor,
        probe: Tensor | None,
        residual: Tensor | None = None,
        weight: Tensor | None = None,
        normed: Tensor | None = None,
        norm: tuple[float, float, bool] = (0.0, 0.0, False),
    ) -> None:
        a = CRow(tables=_tables(self.tables, self.rows, self.gate_state))
        for name, tensor in (("x", x), ("residual", residual), ("hidden", hidden)):
            setattr(a, name, CRows() if tensor is None else CRows(tensor.data_ptr(), _stride(tensor)))
        for name, tensor in (("weight", weight), ("normed", normed)):
            setattr(a, name, None if tensor is None else tensor.data_ptr())
        a.rows, a.hidden_size = x.shape
        a.dtype = DTYPES[x.dtype]
        if probe is not None:
            a.probe, a.probe_columns = probe.data_ptr(), probe.shape[1]
        if weight is not None:
            a.weight_dtype = DTYPES[weight.dtype]
        a.eps, a.weight_offset, a.fp32_weight = norm
        wide = [x, hidden, self.tables.bank]
        wide += [t for t in (residual, normed) if t is not None]
        wide += [weight] if weight is not None and weight.dtype == x.dtype else []
        config = choose(*x.shape, x.element_size(), on_16_bytes(*wide), self.sm_count, self.asked)
        _check(library().emulate_row(op, (_int32 * 4)(*config), ctypes.byref(a)))

    def _outputs(self, x: Tensor, columns: int) -> tuple[Tensor, Tensor]:
        """Poisoned, so that what is not written shows."""
        hidden = torch.full(x.shape, float("nan"), dtype=x.dtype)
        return hidden, torch.full((x.shape[0], columns), float("nan"))

    def steer(self, x: Tensor, columns: int) -> tuple[Tensor, Tensor]:
        hidden, probe = self._outputs(x, columns)
        self._row(STEER, x, hidden, probe)
        return hidden, probe

    def add_steer(self, x: Tensor, residual: Tensor, columns: int) -> tuple[Tensor, Tensor]:
        hidden, probe = self._outputs(x, columns)
        self._row(ADD_STEER, x, hidden, probe, residual)
        return hidden, probe

    def steer_pair_(self, x: Tensor, residual: Tensor, probe: Tensor | None) -> None:
        self._row(STEER_PAIR, x, residual, probe, residual)

    def add_steer_rmsnorm(
        self, x: Tensor, residual: Tensor, weight: Tensor, norm: tuple[float, float, bool], columns: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        hidden, probe = self._outputs(x, columns)
        normed = torch.full_like(hidden, float("nan"))
        self._row(ADD_STEER_RMSNORM, x, hidden, probe, residual, weight, normed, norm=norm)
        return normed, hidden, probe

    def latch_(self, x: Tensor, residual: Tensor | None, gate_state: Tensor) -> None:
        Emulated(self.tables, self.rows, gate_state, self.sm_count)._row(LATCH, x, x, None, residual)


def seed(number: int) -> None:
    """Which order the emulator draws for the warps."""
    library().emulator_seed(ctypes.c_uint32(number))
