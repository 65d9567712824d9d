"""Activations of every prompt, kept: what a probe is fitted to, and what can be looked at again without the model.

A file is safetensors; nothing but the two tensors and the words that say where they were taken is in it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
from torch import Tensor

from faststeer.extract.reading import check_positions
from faststeer.tensor_files import TensorFile, TensorRecord
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
        shapes = self.positive.shape, self.negative.shape
        wrong = any(len(shape) != 4 or shape[1] != len(self.positions) for shape in shapes)
        if wrong or shapes[0][1:] != shapes[1][1:] or not self.positive.numel() or not self.negative.numel():
            raise ValueError(
                f"activations of shapes {list(shapes[0])} and {list(shapes[1])} for {len(self.positions)} position(s): "
                "expected [prompts, positions, layers, hidden] twice"
            )
        if self.positive.dtype != self.negative.dtype or not self.positive.is_floating_point():
            raise ValueError(
                f"activations of dtypes {self.positive.dtype} and {self.negative.dtype}: expected one float"
            )
        if self.paired and shapes[0][0] != shapes[1][0]:
            raise ValueError(f"pairs have two sides, but there are {shapes[0][0]} positive and {shapes[1][0]} negative")
        if not bool(torch.isfinite(self.positive).all() and torch.isfinite(self.negative).all()):
            raise ValueError("the activations hold NaN or infinite values: read them again")

    def cell(self, side: str, position: int, layer: int) -> Tensor:
        """One side's activations at a position (its index) and layer: `[prompts, hidden]` fp64."""
        return cast(Tensor, getattr(self, side))[:, position, layer].double()

    def _content(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        words = {name: getattr(self, name) for name in ("at", "positions", "paired", "model")}
        return {"positive": self.positive, "negative": self.negative}, words

    @classmethod
    def _read(cls, file: TensorFile) -> Activations:
        return cls(
            **file.exactly("positive", "negative"),
            positions=tuple(file.json("positions")),
            at=cast(HookPoint, file.words["at"]),
            paired=file.json("paired") is True,
            model=file.words.get("model"),
        )
