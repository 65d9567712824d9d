"""Activations of every prompt, kept: what a probe is fitted to, and what can be looked at again without the model.

A file is safetensors; nothing but the two tensors and the words that say where they were taken is in it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, cast

from torch import Tensor

from faststeer.extract.reading import check_positions, check_sides
from faststeer.tensor_files import TensorRecord
from faststeer.vector import HookPoint, check_hook_point


@dataclass(frozen=True, eq=False)
class Activations(TensorRecord):
    """Activations of two sets of prompts.

    Args:
        positive, negative: `[prompts, positions, layers, hidden]`, the model's dtype, finite, in the prompts' order.
        positions: token positions counted from the prompt's end.
        at: hook point.
        paired: whether positive[i] and negative[i] belong together.
        model: name of the model they come from.

    Raises:
        ValueError: shapes or dtypes that do not agree, NaN or infinity, pairs of different number.
    """

    FORMAT: ClassVar[str] = "faststeer.activations/1"
    HOLDS: ClassVar[str] = "activations"
    MEND: ClassVar[str] = "is it truncated, or another kind of file? Read them again"

    positive: Tensor
    negative: Tensor
    positions: tuple[int, ...]
    at: HookPoint
    paired: bool = False
    model: str | None = None

    def __post_init__(self) -> None:
        check_hook_point(self.at)
        object.__setattr__(self, "positions", check_positions(self.positions))
        sides = self.positive, self.negative
        check_sides("activations", "prompts, positions, layers, hidden", *sides, self.positions)
        if self.paired and len(self.positive) != len(self.negative):
            n = f"{len(self.positive)} positive and {len(self.negative)} negative"
            raise ValueError(f"pairs have two sides, but there are {n}")

    def cell(self, side: str, position: int, layer: int) -> Tensor:
        """One side's activations at a position (its index) and layer: `[prompts, hidden]` fp64."""
        return cast(Tensor, getattr(self, side))[:, position, layer].double()
