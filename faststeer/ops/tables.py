"""The layout of the device tables that an op reads: which number stands in which column. Everything that packs or
reads a table takes the names from here."""

from __future__ import annotations

from enum import IntEnum
from typing import NamedTuple

from torch import Tensor


class Kind(IntEnum):
    """What an entry does to the row (docs/design.md has the formulas)."""

    ADD = 0
    ABLATE = 1
    PROJECT = 2
    CLAMP = 3
    ROTATE = 4
    ROTATE_RELATIVE = 5
    PROBE = 6
    LATCH = 7  # decides a latched gate; leaves the row alone


class GateMode(IntEnum):
    """How an entry's gate is decided. A negative mode acts where the value is <= the threshold instead of above it."""

    NONE = 0
    DOT = 1
    COSINE = 2
    LATCHED = 3  # read from gate_state, where a LATCH entry wrote it


class Field(IntEnum):
    """Columns of `fields`, int32."""

    KIND = 0
    VECTOR = 1  # first bank row
    COUNT = 2  # bank rows used
    POSITION_LOW = 3  # acts where low <= position < high
    POSITION_HIGH = 4
    GATE_MODE = 5
    GATE_VECTOR = 6
    GATE_STATE = 7
    KEEP_NORM = 8
    PROBE = 9  # first probe column, or -1


class Scalar(IntEnum):
    """Columns of `scalars`, fp32."""

    A = 0  # Add: coefficient; Ablate: strength; Clamp: low; Rotate: cos
    B = 1  # Clamp: high; Rotate: sin
    THRESHOLD = 2


N_FIELDS = 12  # 48 bytes: three 16-byte loads
N_SCALARS = 4
POSITION_MIN, POSITION_MAX = -(2**31), 2**31 - 1


class Tables(NamedTuple):
    """The tables an op reads at one site, and how deep they go there.

    bank `[n_vectors, hidden]`, fields `[n_entries, 12]` int32, scalars `[n_entries, 4]`, ranges `[n_slots, 2]` int32.
    `depth` is the largest number of entries that any slot has at this site, `width` the largest number of bank rows of
    any of them: host numbers that bound the reference's loops, nothing else.
    """

    bank: Tensor
    fields: Tensor
    scalars: Tensor
    ranges: Tensor
    depth: int
    width: int


class Rows(NamedTuple):
    """What an op knows of each row: `[rows]` int32 slot (-1: untouched), position counted from the prompt's end, and
    sequence (row of `gate_state`'s columns)."""

    slot: Tensor
    position: Tensor
    sequence: Tensor
