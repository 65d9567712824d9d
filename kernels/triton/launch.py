"""How the kernels are launched: block, threads, alignment, device. All by rule: autotuning breaks inside a graph
capture."""

from __future__ import annotations

import contextlib
import functools
import os
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from faststeer.kernels.row import INTERPRETED

# What a thread holds of a row: four 16-byte loads of a 16-bit type, in flight together. The row and what becomes of it
# are then 2 x 32 fp32 registers, beside some 60 for addresses and numbers. With 16 elements those 60 would weigh more,
# and fewer rows would fit on a multiprocessor.
ELEMENTS_PER_THREAD = 32
# Asks for another number, so that a benchmark can compare launch configurations. Read once per shape and process.
ELEMENTS_VARIABLE = "FASTSTEER_TRITON_ELEMENTS"
ELEMENTS = (8, 16, 32, 64)
# The most threads of a block, and registers of a multiprocessor.
MAX_WARPS, ALL_REGISTERS = 32, 65_536
# Rows that fill no more of their block than this have half the threads. The rest of the block costs them nothing, as
# the compiler drops loads that are masked out for every thread: 5,120 columns of 8,192 are five loads of 128 threads,
# and three rows fit on a multiprocessor (30 KB of x); as three loads of 256 threads, some of them empty, two (20 KB).
POORLY_FILLED = 5 / 8
# Registers per thread that a kernel may take for aligned rows of a 16-bit type, and what fits on a multiprocessor
# (65,536 registers) then: 512 threads, four rows of 4,096 columns, 32 KB of x in flight, about what device memory needs
# for its full speed. Left alone the compiler takes up to 170. That many, three rows, are enough where residual and x
# are in flight together and the norm's weight waits in registers as well, or where a thread has five loads of x.
REGISTERS, MORE_REGISTERS = 128, 168
# Up to this block the norm's weight is loaded before the reductions. Wider rows could not keep two on a multiprocessor
# with MORE_REGISTERS: they load it after the interventions.
EARLY_WEIGHT_BLOCK = 4096


@dataclass(frozen=True)
class Launch:
    """How a row kernel is launched. How a row is shared among threads depends on the hidden size and nothing else, so
    that its bits do not depend on the batch around it.

    Attributes:
        block: elements of a row in registers, the next power of two of the hidden size.
        num_warps: of 32 threads each; 16 at 16,384 columns.
        early_weight: whether the norm's weight is loaded before the reductions.
        registers: the most a thread may take; None: as the compiler likes. fp32 rows have twice the bytes in flight per
            thread and need half the threads; unaligned rows need registers for the address of every element.
    """

    block: int
    num_warps: int
    early_weight: bool
    registers: int | None

    @classmethod
    @functools.cache
    def of(cls, hidden: int, itemsize: int, aligned: bool, weight_itemsize: int = 0) -> Launch:
        """`weight_itemsize`: 0 where there is no norm.

        Raises:
            ValueError: FASTSTEER_TRITON_ELEMENTS is none of ELEMENTS, or too few for rows of this size.
        """
        block = 1 << (hidden - 1).bit_length()
        asked = asked_elements()
        num_warps = max(1, block // (32 * (asked or ELEMENTS_PER_THREAD)))
        if num_warps > MAX_WARPS:
            raise ValueError(
                f"{ELEMENTS_VARIABLE} must be at least {block // (32 * MAX_WARPS)} for rows of {hidden} columns; "
                f"got {asked}"
            )
        halved = asked is None and num_warps > 1 and hidden <= POORLY_FILLED * block
        early = weight_itemsize == 2 and block <= EARLY_WEIGHT_BLOCK and not halved
        registers = MORE_REGISTERS if early or halved else REGISTERS
        if asked is not None:
            registers = min(registers, ALL_REGISTERS // (32 * num_warps))
        return cls(
            block,
            num_warps // 2 if halved else num_warps,
            early,
            registers if aligned and itemsize == 2 else None,
        )


def asked_elements() -> int | None:
    """Elements of a row per thread that FASTSTEER_TRITON_ELEMENTS asks for; None where it is not set."""
    text = os.environ.get(ELEMENTS_VARIABLE, "")
    if not text:
        return None
    if text not in map(str, ELEMENTS):
        raise ValueError(
            f"{ELEMENTS_VARIABLE} must be {', '.join(map(str, ELEMENTS[:-1]))} or {ELEMENTS[-1]} (elements of a row "
            f"per thread), or not set; got {text!r}"
        )
    return int(text)


DEVICES = ("CPU", "CUDA") if INTERPRETED else ("CUDA",)
"""Where the kernels run, as `faststeer.ops.schema.implements` wants it."""


def starts(*tensors: Tensor) -> int:
    """All bits of the addresses at which the rows of these matrices start, and of their row strides: divisible by 16
    if each is."""
    bits = 0
    for tensor in tensors:
        bits |= tensor.data_ptr() | tensor.stride(0) * tensor.element_size()
    return bits


@functools.cache
def no_gates(device: torch.device) -> Tensor:
    """Stands for a `gate_state` that is not given; never read."""
    return torch.zeros(1, dtype=torch.bool, device=device)


def on_device_of(x: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Triton launches on the current device: make it x's."""
    if x.is_cuda and x.device.index != torch.cuda.current_device():
        return torch.cuda.device(x.device)
    return contextlib.nullcontext()
