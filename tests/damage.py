"""Valid files made wrong, as hypothesis strategies: bytes changed, and JSON with other values in its places."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from typing import Any

from hypothesis import strategies as st

STRANGE = (
    None,
    True,
    0,
    -1,
    1,
    2.5,
    2**70,
    float("nan"),
    "",
    " ",
    "x",
    "x" * 300,
    "layers.0",
    [],
    {},
    [[]],
    [None],
    {"": 0},
)


@st.composite
def damaged(draw: st.DrawFn, whole: bytes, others: tuple[bytes, ...] = ()) -> bytes:
    """`whole` with bytes changed, taken out, put in, repeated, cut off, or with a part of another file."""
    data = bytearray(whole)
    kinds = ("flip", "set", "number", "cut", "drop", "insert", "repeat", *(("splice",) if others else ()))
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, max(0, len(data) - 1)))
        kind = draw(st.sampled_from(kinds))
        span = draw(st.integers(1, 24))
        if kind == "flip" and data:
            data[at] ^= 1 << draw(st.integers(0, 7))
        elif kind == "set" and data:
            data[at] = draw(st.sampled_from((0, 1, 0x7F, 0x80, 0xFF)))
        elif kind == "number":
            size = draw(st.sampled_from((4, 8)))
            value = draw(st.sampled_from((0, 1, -1, 2**31 - 1, 2**31, 2**62, 2**63 - 1))) % 2 ** (8 * size)
            data[at : at + size] = value.to_bytes(size, draw(st.sampled_from(("little", "big"))))
        elif kind == "cut":
            del data[at:]
        elif kind == "drop":
            del data[at : at + span]
        elif kind == "insert":
            data[at:at] = draw(st.binary(min_size=1, max_size=24))
        elif kind == "repeat":
            data[at:at] = data[at : at + span]
        elif kind == "splice":
            other = draw(st.sampled_from(others))
            start = draw(st.integers(0, len(other) - 1))
            data[at : at + span] = other[start : start + span]
    return bytes(data)


@st.composite
def misshapen(draw: st.DrawFn, whole: Any) -> str:
    """JSON like `whole` with one to three of its values exchanged, taken out or given twice; or nested without end."""
    data = [copy.deepcopy(whole)]
    for _ in range(draw(st.integers(1, 3))):
        holder, key = draw(st.sampled_from(list(_places(data))))
        kind = draw(st.sampled_from(("exchange", "exchange", "take out", "twice")))
        if kind == "exchange" or holder is data:
            holder[key] = copy.deepcopy(draw(st.sampled_from(STRANGE)))
        elif kind == "take out":
            del holder[key]
        elif isinstance(holder, list):
            holder.insert(key, copy.deepcopy(holder[key]))
        else:
            holder[draw(st.sampled_from(sorted(holder)))] = copy.deepcopy(holder[key])
    text = json.dumps(data[0])
    return draw(st.sampled_from((text, text, text, text, "[" * 100_000 + text)))


def _places(holder: Any) -> Iterator[tuple[Any, Any]]:
    """Every value in nested lists and objects, by what holds it and where."""
    for key, value in holder.items() if isinstance(holder, dict) else enumerate(holder):
        yield holder, key
        if isinstance(value, (dict, list)):
            yield from _places(value)
