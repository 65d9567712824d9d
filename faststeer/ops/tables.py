"""The layout of the device tables that an op reads: which number stands in which column. Everything that packs or
reads a table takes the names from here (csrc/common/tables.h has them once more; a test compares)."""

from __future__ import annotations

from enum import IntEnum
from typing import NamedTuple

from torch import Tensor


class EntryKind(IntEnum):
    """What an entry does to the row (docs/design.md has the formulas)."""

    ADD = 0
    ABLATE = 1
    PROJECT = 2
    CLAMP = 3
    ROTATE = 4
    ROTATE_RELATIVE = 5
    PROBE = 6
    LATCH = 7  # decides a latched gate; leaves the row alone


VECTORS = {EntryKind.ADD: 1, EntryKind.CLAMP: 1, EntryKind.ROTATE: 2, EntryKind.ROTATE_RELATIVE: 2}
"""How many vectors an entry of a kind has; a kind that is not named has any number."""


class GateMode(IntEnum):
    """How an entry's gate is decided. A negative mode acts where the value is <= the threshold instead of above it."""

    NONE = 0
    DOT = 1
    COSINE = 2
    LATCHED = 3  # read from gate_state, where a LATCH entry wrote it


class Field(IntEnum):
    """Columns of `entries`, int32. From A on they hold the bits of fp32 numbers."""

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
    A = 12  # Add: coefficient; Ablate: strength; Clamp: low; Rotate: cos
    B = 13  # Clamp: high; Rotate: sin
    THRESHOLD = 14


N_FIELDS = 16  # 64 bytes: one line of a cache, four 16-byte loads
N_SCALARS = 2  # A and B: what gradients flow to
N_PLACES = 3  # of `rows`: slot, position, sequence
POSITION_MIN, POSITION_MAX = -(2**31), 2**31 - 1


class Tables(NamedTuple):
    """The tables an op reads at one site, and how deep they go there.

    bank `[n_vectors, hidden]`, entries `[n_entries, 16]` int32 (`Field`), ranges `[n_slots, 2]` int32. `depth` is the
    largest number of entries that any slot has at this site, `width` the largest number of bank rows of any of them:
    host numbers that bound the reference's loops, nothing else.

    scalars: `[n_entries, 2]`, the entries' A and B once more, where gradients are to flow to them. Kernels read
    `entries`; the reference, and with it every gradient, takes these where they are given. So both must be the same
    numbers.
    """

    bank: Tensor
    entries: Tensor
    ranges: Tensor
    depth: int
    width: int
    scalars: Tensor | None = None
