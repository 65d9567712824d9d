"""Executes the machine code of one block of threads (SASS of sm_90 or sm_100, as nvdisasm prints it) on the CPU: how
many instructions a warp issues on the path that it takes, which loads wait for which, and what the kernel computes.
Needs no GPU, and says nothing of time.

Threads of a block are columns of NumPy arrays. The threads with the smallest program counter go first, which brings
those that took different branches together again. An instruction that this file does not know is an error.
"""

from __future__ import annotations

import re
import struct
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

# Where in constant bank 0 a kernel's parameters and the block's dimensions are, by compute capability.
BANKS = {"90": (0x210, 0x0), "100": (0x380, 0x360)}
WARP = 32
ONE_BUFFER = 1 << 32  # addresses of one buffer
BITS = {"B": 1, "U8": 1, "S8": 1, "U16": 2, "S16": 2, "64": 8, "128": 16}
IGNORED = {
    *("BSSY", "BSYNC", "BREAK", "WARPSYNC", "NOP", "CCTL", "MEMBAR", "ERRBAR", "ACQBULK", "PREEXIT", "DEPBAR"),
    *("ENDCOLLECTIVE", "BMOV", "YIELD", "UCGABAR_ARV", "UCGABAR_WAIT", "LDGDEPBAR"),
}


@dataclass
class Instruction:
    name: str
    modifiers: list[str]
    guard: str | None
    operands: list[str]
    text: str


@dataclass
class Load:
    """A load from global memory: when the first warp issued it, of which buffer, by how many bytes, and how many loads
    wait for each other up to and with it."""

    number: int
    buffer: str
    size: int
    depth: int


@dataclass
class Trace:
    """What the first warp did.

    Attributes:
        issued: instructions.
        by_name: how many of each kind.
        loads, stores: of global memory, in order.
        waits: per buffer, the number of the first instruction that used what was loaded from it.
    """

    issued: int = 0
    by_name: dict[str, int] = field(default_factory=dict)
    loads: list[Load] = field(default_factory=list)
    stores: list[Load] = field(default_factory=list)
    waits: dict[str, int] = field(default_factory=dict)

    def of(self, buffer: str) -> list[Load]:
        return [load for load in self.loads if load.buffer == buffer]


def parse(sass: str) -> tuple[list[Instruction], dict[str, int]]:
    """The instructions of one kernel, and which of them each label and address stands before."""
    code: list[Instruction] = []
    labels: dict[str, int] = {}
    for line in sass.splitlines():
        if found := re.match(r"\s*(\.L_x?_?\w+|\$?[\w$]+):\s*$", line):
            labels[found[1]] = len(code)
        found = re.match(r"\s+/\*([0-9a-f]{4,})\*/\s+(?:@(!?U?P[\dT]+)\s+)?([A-Z][\w.]*)\s*(.*?)\s*;", line)
        if found:
            labels[f"{int(found[1], 16):#x}"] = len(code)
            name, *modifiers = found[3].split(".")
            operands = [part.strip() for part in re.split(r",(?![^\[]*\])", found[4]) if part.strip()]
            code.append(Instruction(name, modifiers, found[2], operands, line.strip()))
    assert code, "no instructions"
    return code, labels


def disassemble(tool: str, cubin: Path, kernel: str) -> str:
    """The SASS of the only kernel in a cubin whose name matches."""
    text = subprocess.run([tool, "-c", str(cubin)], check=True, capture_output=True, text=True).stdout
    pieces = re.split(r"^\.text\.(\S+):$", text, flags=re.MULTILINE)
    (sass,) = [code for name, code in zip(pieces[1::2], pieces[2::2], strict=True) if re.search(kernel, name)]
    return sass


def float_of(bits: np.ndarray) -> np.ndarray:
    return bits.view(np.float32)


def from_bf16(bits: np.ndarray) -> np.ndarray:
    return float_of((bits & 0xFFFF) << np.uint32(16))


def to_bf16(value: np.ndarray) -> np.ndarray:
    """Rounded to nearest, ties to even; from fp64 through an odd fp32, so that it is rounded once."""
    single = value.astype(np.float32)
    bits = single.view(np.uint32)
    if value.dtype == np.float64:
        wrong = single.astype(np.float64) != value
        bits = np.where(wrong & (np.abs(single) > np.abs(value)), bits - 1, bits) | wrong.astype(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & 1)) >> np.uint32(16)
    return np.where(np.isnan(value), np.uint32(0x7FFF), rounded).astype(np.uint32)


def to_half(value: np.ndarray) -> np.ndarray:
    return value.astype(np.float16).view(np.uint16).astype(np.uint32)


def from_half(bits: np.ndarray) -> np.ndarray:
    return (bits & 0xFFFF).astype(np.uint16).view(np.float16).astype(np.float32)


COMPARE: dict[str, Callable[[Any, Any], Any]] = {
    "LT": np.less, "GE": np.greater_equal, "GT": np.greater, "LE": np.less_equal, "EQ": np.equal,
    "NE": np.not_equal,
}  # fmt: skip
COMBINE = {"AND": np.logical_and, "OR": np.logical_or, "XOR": np.logical_xor}


class Block:
    """One block of threads.

    Args:
        sass: the kernel's code.
        buffers: global memory by name; a parameter that is a name becomes that buffer's address. Written in place.
        parameters: bytes, with `address` for a buffer.
        threads: of the block in x; one in y and z.
        shared: bytes of shared memory.
        index: of the block. arch: what the code is for, one of BANKS.
    """

    def __init__(
        self, sass: str, buffers: dict[str, np.ndarray], parameters: bytes, threads: int, shared: int = 1 << 16,
        index: int = 0, arch: str = "90",
    ) -> None:  # fmt: skip
        self.code, self.labels = parse(sass)
        self.names = list(buffers)
        self.buffers = [buffer.reshape(-1).view(np.uint8) for buffer in buffers.values()]
        first, dimensions = BANKS[arch]
        self.bank = bytearray(first + len(parameters) + 64)
        struct.pack_into("<III", self.bank, dimensions, threads, 1, 1)
        self.bank[first : first + len(parameters)] = parameters
        self.n, self.index = threads, index
        self.shared = np.zeros(shared, np.uint8)
        self.r = np.zeros((256, threads), np.uint32)
        self.p = np.zeros((8, threads), bool)
        self.p[7] = True
        self.ur, self.up = np.zeros((64, threads), np.uint32), self.p.copy()
        self.depths = {"R": np.zeros(256, int), "U": np.zeros(64, int), "P": np.zeros(8, int), "UP": np.zeros(8, int)}
        self.loaded: dict[int, str] = {}  # registers that hold what came from a buffer
        self.pc = np.zeros(threads, int)
        self.branch_depth = 0
        self.trace = Trace()

    # Operands ---------------------------------------------------------------------------------------------------------

    def predicate(self, text: str) -> np.ndarray:
        found = re.fullmatch(r"(!?)(U?)P([\dT]+)", text)
        assert found, text
        number = 7 if found[3] == "T" else int(found[3])
        bank, depths = (self.up, "UP") if found[2] else (self.p, "P")
        self.depth = max(self.depth, self.depths[depths][number])
        return ~bank[number] if found[1] else bank[number]

    def register(self, text: str, offset: int = 0) -> np.ndarray:
        if text in ("RZ", "URZ"):
            return np.zeros(self.n, np.uint32)
        uniform, number = text.startswith("U"), int(re.sub(r"\D", "", text)) + offset
        self.depth = max(self.depth, self.depths["U" if uniform else "R"][number])
        if not uniform and self.active[0] and number in self.loaded:
            self.trace.waits.setdefault(self.loaded[number], self.trace.issued)
        return (self.ur if uniform else self.r)[number]

    def word(self, text: str, real: bool = False, offset: int = 0) -> np.ndarray:
        """The bits of an operand (`offset`: of the words behind it), its sign not looked at."""
        text = re.sub(r"\.(reuse|64|H0_H0|H1_H1|F32|NO_NODEP|U32|X4|X8|X16)", "", text)
        if re.fullmatch(r"U?R(\d+|Z)", text):
            return self.register(text, offset)
        if found := re.fullmatch(r"c\[0x0\]\[(?:(U?R\w+)\+?)?(-?0x[0-9a-f]+|URZ|RZ)?\]", text):
            place = np.zeros(self.n, np.int64)
            if found[1]:
                place = place + self.register(found[1])
            if found[2] and found[2] not in ("RZ", "URZ"):
                place = place + int(found[2], 16)
            at = place + 4 * offset
            return np.array([struct.unpack_from("<I", self.bank, i)[0] for i in at], np.uint32)
        if real and not text.startswith(("0x", "-0x")):
            special = {"+INF": np.inf, "INF": np.inf, "-INF": -np.inf, "+QNAN": np.nan, "QNAN": np.nan, "-QNAN": np.nan}
            return np.full(self.n, np.float32(special.get(text) if text in special else float(text))).view(np.uint32)
        value = int(text, 0)
        if offset:
            value = -1 if value < 0 else 0
        return np.full(self.n, value & 0xFFFFFFFF, np.uint32)

    def integer(self, text: str, offset: int = 0) -> np.ndarray:
        if text.startswith("~"):
            return ~self.word(text[1:], offset=offset)
        if text.startswith("-") and not text.startswith("-0x"):
            return (-self.word(text[1:], offset=offset).astype(np.int64)).astype(np.uint32)
        if text.startswith("|"):
            return np.abs(self.word(text.strip("|")).view(np.int32)).view(np.uint32)
        return self.word(text, offset=offset)

    def long(self, text: str) -> np.ndarray:
        low, high = self.word(text).astype(np.uint64), self.word(text, offset=1).astype(np.uint64)
        return low | high << np.uint64(32)

    def real(self, text: str) -> np.ndarray:
        if re.fullmatch(r"-?(\d.*|0x.*|INF|QNAN)|\+.*", text):
            return float_of(self.word(text, True))
        negative, text = text.startswith("-"), text.removeprefix("-")
        absolute, text = text.startswith("|"), text.strip("|")
        half = re.search(r"\.H([01])_H\1", text)
        value = float_of(self.word(text, True))
        if half:
            value = from_half(self.word(text) >> np.uint32(16 if half[1] == "1" else 0))
        value = np.abs(value) if absolute else value
        return -value if negative else value

    def write(self, text: str, value: np.ndarray, offset: int = 0) -> None:
        if text in ("RZ", "URZ"):
            return
        uniform, number = text.startswith("U"), int(re.sub(r"\D", "", text)) + offset
        (self.ur if uniform else self.r)[number][self.active] = value.astype(np.uint32, copy=False)[self.active]
        if self.active[0]:
            self.depths["U" if uniform else "R"][number] = self.depth
            if not uniform:
                self.loaded.pop(number, None)

    def write_long(self, text: str, value: np.ndarray) -> None:
        self.write(text, (value & np.uint64(0xFFFFFFFF)).astype(np.uint32))
        self.write(text, (value >> np.uint64(32)).astype(np.uint32), 1)

    def write_real(self, text: str, value: np.ndarray) -> None:
        self.write(text, value.astype(np.float32).view(np.uint32))

    def write_predicate(self, text: str, value: np.ndarray) -> None:
        number = text.removeprefix("U").removeprefix("P")
        if number == "T":
            return
        bank, depths = (self.up, "UP") if text.startswith("U") else (self.p, "P")
        bank[int(number)][self.active] = value[self.active]
        if self.active[0]:
            self.depths[depths][int(number)] = self.depth

    # Running ----------------------------------------------------------------------------------------------------------

    def run(self, most: int = 200_000) -> Trace:
        waiting = np.zeros(self.n, bool)  # at a barrier
        with np.errstate(all="ignore"):
            for _ in range(most):
                running = (self.pc >= 0) & ~waiting
                if not running.any():
                    if not waiting.any():
                        return self.trace
                    waiting[:] = False
                    continue
                here = int(self.pc[running].min())
                waiting |= self._step(self.code[here], running & (self.pc == here), here)
        raise AssertionError("the kernel does not end")

    def _step(self, instruction: Instruction, active: np.ndarray, here: int) -> np.ndarray:
        """Execute one instruction; returns the threads that now wait at a barrier."""
        nobody = np.zeros(self.n, bool)
        self.depth = 0
        self.active = active
        self.pc[active] = here + 1
        if active[:WARP].any():
            self.trace.issued += 1
            name = instruction.name
            self.trace.by_name[name] = self.trace.by_name.get(name, 0) + 1
        if instruction.guard:
            self.active = active & self.predicate(instruction.guard)
        name, mods, operands = instruction.name, instruction.modifiers, instruction.operands
        if name == "BAR":
            return self.active.copy()
        if name in IGNORED:
            return nobody
        if name in ("BRA", "EXIT", "CALL", "RET", "BRX"):
            self._jump(name, mods, operands)
        elif self.active.any() or name == "SHFL":
            handler = getattr(self, f"_{name.lower()}", None) or getattr(self, f"_{name[1:].lower()}", None)
            assert handler is not None, f"not known: {instruction.text}"
            try:
                handler(mods, list(operands))
            except Exception as error:
                raise AssertionError(f"{instruction.text}: {error!r}") from error
        return nobody

    def _jump(self, name: str, mods: list[str], operands: list[str]) -> None:
        if "DIV" in mods:
            return  # only where a warp has come apart
        taken = self.active
        for operand in operands:
            if re.fullmatch(r"!?U?P[\dT]+", operand):
                taken = taken & self.predicate(operand)
        if self.active[0]:
            self.branch_depth = max(self.branch_depth, self.depth)
        if name == "EXIT":
            self.pc[taken] = -1
        elif name == "RET":
            for thread in np.flatnonzero(taken):
                self.pc[thread] = self.labels[f"{int(self.word(operands[0])[thread]):#x}"]
        else:
            found = re.search(r"`\((.*?)\)", operands[-1])
            assert found, operands
            target = found[1]
            self.pc[taken] = self.labels[target]

    # Moves and integers -----------------------------------------------------------------------------------------------

    def _mov(self, mods: list[str], o: list[str]) -> None:
        self.write(o[0], self.integer(o[1]))

    def _s2r(self, mods: list[str], o: list[str]) -> None:
        thread = np.arange(self.n, dtype=np.uint32)
        zero = np.zeros(self.n, np.uint32)
        values = {"SR_TID.X": thread, "SR_LANEID": thread % WARP, "SR_CTAID.X": zero + self.index}
        self.write(o[0], values.get(o[1], zero))

    _s2ur = _s2r

    def _cs2r(self, mods: list[str], o: list[str]) -> None:
        assert o[1] == "SRZ"
        for i in range(1 if "32" in mods else 2):
            self.write(o[0], np.zeros(self.n, np.uint32), i)

    def _r2ur(self, mods: list[str], o: list[str]) -> None:
        self.write(o[0], self.word(o[-1]))

    def _ldc(self, mods: list[str], o: list[str]) -> None:
        value = [self.word(o[1], offset=i) for i in range(4 if "128" in mods else 2 if "64" in mods else 1)]
        if "U8" in mods or "S8" in mods:
            base = re.sub(r"0x([0-9a-f]+)\]$", lambda m: f"{int(m[1], 16) & ~3:#x}]", o[1])
            shift = int(re.search(r"0x([0-9a-f]+)\]$", o[1])[1], 16) % 4 * 8  # type: ignore[index]
            value = [self.word(base) >> np.uint32(shift) & np.uint32(0xFF)]
        for i, part in enumerate(value):
            self.write(o[0], part, i)

    _ldcu = _ldc

    def _imad(self, mods: list[str], o: list[str]) -> None:
        d, *rest = o
        carries = [rest.pop(0)] if re.fullmatch(r"U?P[\dT]", rest[0]) else []
        a, b = self.integer(rest[0]), self.integer(rest[1])
        if "WIDE" in mods or "HI" in mods:
            if "U32" in mods:
                product = [int(x) * int(y) for x, y in zip(a, b, strict=True)]
            else:
                product = [int(x) * int(y) for x, y in zip(a.view(np.int32), b.view(np.int32), strict=True)]
            c = self.long(rest[2])
            extra = self.predicate(rest[3]) if "X" in mods else np.zeros(self.n, bool)
            full = [p % 2**64 + int(s) + int(e) for p, s, e in zip(product, c, extra, strict=True)]
            total = np.array([t % 2**64 for t in full], np.uint64)
            for carry in carries:
                self.write_predicate(carry, np.array([t >= 2**64 for t in full]))
            if "HI" in mods:
                self.write(d, (total >> np.uint64(32)).astype(np.uint32))
            else:
                self.write_long(d, total)
            return
        total = a.astype(np.uint64) * b + self.integer(rest[2])
        if "X" in mods:
            total = total + self.predicate(rest[3])
        self.write(d, (total & np.uint64(0xFFFFFFFF)).astype(np.uint32))

    def _iadd3(self, mods: list[str], o: list[str]) -> None:
        d, *rest = o
        carries = []
        while re.fullmatch(r"U?P[\dT]", rest[0]):
            carries.append(rest.pop(0))
        total = np.zeros(self.n, np.uint64)
        for text in rest[:3]:
            # A carry out of -x is one of ~x + 1.
            if text.startswith("-") and not text.startswith("-0x"):
                total += (~self.word(text[1:])).astype(np.uint64) + np.uint64(1)
            else:
                total += self.integer(text)
        if "X" in mods:
            for text in rest[3:]:
                total += self.predicate(text)
        self.write(d, (total & np.uint64(0xFFFFFFFF)).astype(np.uint32))
        for i, carry in enumerate(carries):
            self.write_predicate(carry, total >> np.uint64(32) > np.uint64(i))

    def _viadd(self, mods: list[str], o: list[str]) -> None:
        self.write(o[0], self.integer(o[1]) + self.integer(o[2]))

    def _p2r(self, mods: list[str], o: list[str]) -> None:
        """Predicates as bits of a register, those of the mask."""
        assert o[1] == "PR", o
        bits = sum((self.p[i].astype(np.uint32) << np.uint32(i) for i in range(7)), np.zeros(self.n, np.uint32))
        mask = np.uint32(int(o[3], 0))
        self.depth = max(self.depth, *self.depths["P"][:7])
        self.write(o[0], self.word(o[2]) & ~mask | bits & mask)

    def _sgxt(self, mods: list[str], o: list[str]) -> None:
        width = int(o[2], 0)
        value = self.integer(o[1]) << np.uint32(32 - width)
        self.write(
            o[0],
            value >> np.uint32(32 - width) if "U32" in mods else (value.view(np.int32) >> (32 - width)).view(np.uint32),
        )

    def _iabs(self, mods: list[str], o: list[str]) -> None:
        self.write(o[0], np.abs(self.integer(o[1]).view(np.int32)).view(np.uint32))

    def _least(self, a: np.ndarray, b: np.ndarray, mods: list[str], least: np.ndarray) -> np.ndarray:
        if "U32" not in mods:
            a, b = a.view(np.int32), b.view(np.int32)
        return np.where(least, np.minimum(a, b), np.maximum(a, b)).astype(a.dtype).view(np.uint32)

    def _vimnmx(self, mods: list[str], o: list[str]) -> None:
        a, b, least = o[-3:]  # sm_100 has two predicates more in front, which no code here uses
        self.write(o[0], self._least(self.integer(a), self.integer(b), mods, self.predicate(least)))

    _imnmx = _vimnmx

    def _viaddmnmx(self, mods: list[str], o: list[str]) -> None:
        total = self.integer(o[1]) + self.integer(o[2])
        self.write(o[0], self._least(total, self.integer(o[3]), mods, self.predicate(o[4])))

    def _lea(self, mods: list[str], o: list[str]) -> None:
        d, *rest = o
        carry = rest.pop(0) if re.fullmatch(r"U?P[\dT]", rest[0]) else None
        a, b = self.integer(rest[0]), self.integer(rest[1])
        carried = self.predicate(rest[-1]) if "X" in mods else np.zeros(self.n, bool)
        if "HI" in mods:
            shift = int(rest[2 if "SX32" in mods else 3], 0)
            high = (a.view(np.int32) >> 31).view(np.uint32) if "SX32" in mods else self.integer(rest[2])
            wide = a.astype(np.uint64) | high.astype(np.uint64) << np.uint64(32)
            shifted = (wide << np.uint64(shift) >> np.uint64(32)) if shift else wide >> np.uint64(32)
        else:
            shifted = a.astype(np.uint64) << np.uint64(int(rest[2], 0))
        total = (shifted & np.uint64(0xFFFFFFFF)) + b + carried
        self.write(d, (total & np.uint64(0xFFFFFFFF)).astype(np.uint32))
        if carry:
            self.write_predicate(carry, total >> np.uint64(32) > 0)

    def _shf(self, mods: list[str], o: list[str]) -> None:
        low, high = self.integer(o[1]).astype(np.uint64), self.integer(o[3]).astype(np.uint64)
        shift = self.integer(o[2]).astype(np.uint64) & np.uint64(63)
        pair = low | high << np.uint64(32)
        if mods[0] == "L":
            result = pair << shift
        elif "S32" in mods or "S64" in mods:
            result = (pair.view(np.int64) >> shift.view(np.int64)).view(np.uint64)
        else:
            result = pair >> shift
        part = result >> np.uint64(32) if "HI" in mods else result & np.uint64(0xFFFFFFFF)
        self.write(o[0], part.astype(np.uint32))

    def _lop3(self, mods: list[str], o: list[str]) -> None:
        out = o.pop(0) if re.fullmatch(r"U?P[\dT]", o[0]) else None
        d, a, b, c, table, extra = o
        bits = [self.integer(x) for x in (a, b, c)]
        result = np.zeros(self.n, np.uint32)
        for i in range(8):
            if int(table, 0) >> i & 1:
                term = np.full(self.n, 0xFFFFFFFF, np.uint32)
                for j in range(3):
                    term &= bits[j] if i >> (2 - j) & 1 else ~bits[j]
                result |= term
        self.write(d, result)
        if out:
            self.write_predicate(out, (result != 0) | self.predicate(extra))

    def _plop3(self, mods: list[str], o: list[str]) -> None:
        first, second, a, b, c, table, other = o
        given = [self.predicate(x) for x in (a, b, c)]
        number = given[0] * 4 + given[1] * 2 + given[2]
        for out, lut in ((first, table), (second, other)):
            self.write_predicate(out, (int(lut, 0) >> number & 1).astype(bool))

    def _sel(self, mods: list[str], o: list[str]) -> None:
        self.write(o[0], np.where(self.predicate(o[3]), self.integer(o[1]), self.integer(o[2])))

    def _prmt(self, mods: list[str], o: list[str]) -> None:
        a, chosen, b = self.integer(o[1]), self.integer(o[2]), self.integer(o[3])
        pair = a.astype(np.uint64) | b.astype(np.uint64) << np.uint64(32)
        result = np.zeros(self.n, np.uint64)
        for i in range(4):
            nibble = chosen.astype(np.uint64) >> np.uint64(4 * i) & np.uint64(15)
            byte = pair >> (nibble & np.uint64(7)) * np.uint64(8) & np.uint64(0xFF)
            byte = np.where(nibble & np.uint64(8), np.where(byte & np.uint64(0x80), 255, 0), byte).astype(np.uint64)
            result |= byte << np.uint64(8 * i)
        self.write(o[0], result.astype(np.uint32))

    def _isetp(self, mods: list[str], o: list[str]) -> None:
        a, b = self.integer(o[2]), self.integer(o[3])
        if "U32" not in mods:
            a, b = a.view(np.int32), b.view(np.int32)
        kind = mods[0]
        result = COMPARE[kind](a, b)
        if "EX" in mods:
            lower = self.predicate(o[5])
            strict = {"GE": np.greater, "LE": np.less}.get(kind, COMPARE[kind])(a, b)
            result = (result & lower) if kind == "EQ" else strict | ((a == b) & lower)
        self._set(o, result, mods)

    def _set(self, o: list[str], result: np.ndarray, mods: list[str]) -> None:
        combine = COMBINE[next(m for m in mods if m in COMBINE)]
        third = self.predicate(o[4])
        self.write_predicate(o[0], combine(result, third))
        self.write_predicate(o[1], combine(~result, third))

    # Reals ------------------------------------------------------------------------------------------------------------

    def _fsetp(self, mods: list[str], o: list[str]) -> None:
        a, b = self.real(o[2]), self.real(o[3])
        kind = mods[0]
        if kind in ("NUM", "NAN"):
            result = np.isnan(a) | np.isnan(b)
            self._set(o, result if kind == "NAN" else ~result, mods)
            return
        unordered = len(kind) == 3
        nan = np.isnan(a) | np.isnan(b)
        result = COMPARE[kind[:2]](a, b)
        self._set(o, result | nan if unordered else result & ~nan, mods)

    def _fadd(self, mods: list[str], o: list[str]) -> None:
        self.write_real(o[0], self.real(o[1]) + self.real(o[2]))

    def _fmul(self, mods: list[str], o: list[str]) -> None:
        self.write_real(o[0], self.real(o[1]) * self.real(o[2]))

    def _ffma(self, mods: list[str], o: list[str]) -> None:
        a, b, c = (self.real(x).astype(np.float64) for x in o[1:4])
        self.write_real(o[0], a * b + c)

    def _fadd2(self, mods: list[str], o: list[str]) -> None:
        self._two(o, np.add)

    def _fmul2(self, mods: list[str], o: list[str]) -> None:
        self._two(o, np.multiply)

    def _two(self, o: list[str], compute: Callable[[Any, Any], Any]) -> None:
        """Of sm_100: two numbers in neighbouring registers, or one."""
        names = [text.partition(".")[0] for text in o]
        count = 2 if ".F32x2" in o[1] else 1
        results = [compute(*(float_of(self.register(name, i)) for name in names[1:])) for i in range(count)]
        for i, result in enumerate(results):
            self.write(names[0], result.astype(np.float32).view(np.uint32), i)

    def _fsel(self, mods: list[str], o: list[str]) -> None:
        self.write_real(o[0], np.where(self.predicate(o[3]), self.real(o[1]), self.real(o[2])))

    def _fmnmx(self, mods: list[str], o: list[str]) -> None:
        a, b = self.real(o[1]), self.real(o[2])
        self.write_real(o[0], np.where(self.predicate(o[3]), np.fmin(a, b), np.fmax(a, b)))

    def _mufu(self, mods: list[str], o: list[str]) -> None:
        a = self.real(o[1]).astype(np.float64)
        self.write_real(o[0], {"RSQ": lambda: a**-0.5, "RCP": lambda: 1 / a, "SQRT": lambda: a**0.5}[mods[0]]())

    def _fchk(self, mods: list[str], o: list[str]) -> None:
        self.write_predicate(o[0], np.zeros(self.n, bool))

    def _i2fp(self, mods: list[str], o: list[str]) -> None:
        a = self.integer(o[1])
        self.write_real(o[0], (a.view(np.int32) if "S32" in mods else a).astype(np.float32))

    _i2f = _i2fp

    # Pairs of 16-bit numbers ------------------------------------------------------------------------------------------

    def _f2fp(self, mods: list[str], o: list[str]) -> None:
        to = to_bf16 if "BF16" in mods else to_half
        high, low = to(self.real(o[1])), to(self.real(o[2]))
        self.write(o[0], high << np.uint32(16) | low)

    def _pair(self, texts: Sequence[str], mods: list[str]) -> tuple[np.ndarray, np.ndarray]:
        """(low, high) of an operand that is a register, or two numbers, the high one first."""
        if len(texts) == 2:
            values = [np.full(self.n, float(t)) for t in texts]
            return values[1], values[0]
        negative, text = texts[0].startswith("-"), texts[0].removeprefix("-")
        bits = self.word(text)
        of = from_bf16 if "BF16_V2" in mods or "BF16" in mods else from_half
        low, high = of(bits), of(bits >> np.uint32(16))
        if ".H0_H0" in text:
            high = low
        if ".H1_H1" in text:
            low = high
        sign = -1.0 if negative else 1.0
        return low.astype(np.float64) * sign, high.astype(np.float64) * sign

    def _pairs(self, operands: Sequence[str], mods: list[str]) -> list[tuple[np.ndarray, np.ndarray]]:
        pairs, numbers = [], []
        for text in operands:
            if re.match(r"-?U?R|-?c\[", text):
                pairs.append(self._pair([text], mods))
            else:
                numbers.append(text)
                if len(numbers) == 2:
                    pairs.append(self._pair(numbers, mods))
                    numbers = []
        return pairs

    def _write_pair(self, d: str, low: np.ndarray, high: np.ndarray, mods: list[str]) -> None:
        to = to_bf16 if "BF16_V2" in mods or "BF16" in mods else to_half
        self.write(d, to(high) << np.uint32(16) | to(low))

    def _hadd2(self, mods: list[str], o: list[str]) -> None:
        if "F32" in mods:  # a conversion
            self.write_real(o[0], self.real(o[2]))
            return
        a, b = self._pairs(o[1:], mods)
        self._write_pair(o[0], a[0] + b[0], a[1] + b[1], mods)

    def _hmul2(self, mods: list[str], o: list[str]) -> None:
        a, b = self._pairs(o[1:], mods)
        self._write_pair(o[0], a[0] * b[0], a[1] * b[1], mods)

    def _hfma2(self, mods: list[str], o: list[str]) -> None:
        a, b, c = self._pairs(o[1:], mods)
        self._write_pair(o[0], a[0] * b[0] + c[0], a[1] * b[1] + c[1], mods)

    # Memory and other threads -----------------------------------------------------------------------------------------

    def _shfl(self, mods: list[str], o: list[str]) -> None:
        value, by = self.word(o[2]), self.integer(o[3]).astype(int)
        lane, base = np.arange(self.n) % WARP, np.arange(self.n) // WARP * WARP
        source = {"BFLY": lane ^ by, "IDX": by, "DOWN": lane + by, "UP": lane - by}[mods[0]]
        inside = (source >= 0) & (source < WARP)
        self.write(o[1], np.where(inside, value[base + np.where(inside, source, lane)], value))
        self.write_predicate(o[0], inside)

    def _address(self, text: str) -> np.ndarray:
        found = re.fullmatch(r"(?:desc\[UR\d+\])?\[(.*)\]", text)
        assert found, text
        address = np.zeros(self.n, np.int64)
        for part in found[1].split("+"):
            if part.endswith(".64"):
                address = address + self.long(part).view(np.int64)
            elif re.match(r"U?R", part):
                scale = re.search(r"\.X(\d+)", part)
                address = address + self.word(part).astype(np.int64) * (int(scale[1]) if scale else 1)
            else:
                address = address + int(part, 0)
        return address

    def _bytes(self, address: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
        """(the buffer that the active threads' addresses are in, their places in it)."""
        which = np.unique(address[self.active] // ONE_BUFFER)
        assert len(which) == 1 and 1 <= which[0] <= len(self.buffers), f"addresses in no buffer: {which}"
        places = address[self.active] % ONE_BUFFER
        memory = self.buffers[int(which[0]) - 1]
        assert (places % size == 0).all(), "not aligned"
        assert places.max() + size <= len(memory), f"beyond the end of {self.names[int(which[0]) - 1]}"
        return memory, places

    def _load_from(self, memory: np.ndarray, places: np.ndarray, size: int, mods: list[str], target: str) -> None:
        for i in range(max(1, size // 4)):
            value = np.zeros(self.n, np.uint32)
            wide = min(size, 4)
            raw = memory[places[:, None] + 4 * i + np.arange(wide)]
            number = np.zeros(len(places), np.uint32)
            for j in range(wide):
                number |= raw[:, j].astype(np.uint32) << np.uint32(8 * j)
            if "S8" in mods or "S16" in mods:
                number = number.astype(np.int8 if "S8" in mods else np.int16).astype(np.int32).view(np.uint32)
            value[self.active] = number
            self.write(target, value, i)

    def _ldg(self, mods: list[str], o: list[str]) -> None:
        size = next((BITS[m] for m in mods if m in BITS), 4)
        address = self._address(o[-1])
        memory, places = self._bytes(address, size)
        self.depth = 1 + max(self.depth, self.branch_depth)
        self._load_from(memory, places, size, mods, o[0])
        if self.active[0]:
            name = self.names[int(address[0] // ONE_BUFFER) - 1]
            self.trace.loads.append(Load(self.trace.issued, name, size, self.depth))
            number = int(re.sub(r"\D", "", o[0]))
            for i in range(max(1, size // 4)):
                self.loaded[number + i] = name

    def _store_to(self, memory: np.ndarray, places: np.ndarray, size: int, source: str) -> None:
        for i in range(max(1, size // 4)):
            number = self.word(source, offset=i)[self.active]
            for j in range(min(size, 4)):
                memory[places + 4 * i + j] = (number >> np.uint32(8 * j)).astype(np.uint8)

    def _stg(self, mods: list[str], o: list[str]) -> None:
        size = next((BITS[m] for m in mods if m in BITS), 4)
        address = self._address(o[0])
        memory, places = self._bytes(address, size)
        self._store_to(memory, places, size, o[1])
        if self.active[0]:
            name = self.names[int(address[0] // ONE_BUFFER) - 1]
            self.trace.stores.append(Load(self.trace.issued, name, size, 0))

    def _lds(self, mods: list[str], o: list[str]) -> None:
        size = next((BITS[m] for m in mods if m in BITS), 4)
        self._load_from(self.shared, self._address(o[-1])[self.active], size, mods, o[0])

    def _sts(self, mods: list[str], o: list[str]) -> None:
        size = next((BITS[m] for m in mods if m in BITS), 4)
        self._store_to(self.shared, self._address(o[0])[self.active], size, o[1])


def address(buffers: dict[str, np.ndarray], name: str) -> int:
    """The address of a buffer, as parameters have it."""
    return (list(buffers).index(name) + 1) * ONE_BUFFER
