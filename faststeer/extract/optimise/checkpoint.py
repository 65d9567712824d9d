"""Where a training stands, as one file: safetensors with the vectors and the optimizer's moments, and everything else
as JSON in its header, so that a checkpoint is written whole or not at all."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from faststeer import tensor_files
from faststeer.files import FormatError

MAX_STEPS = 10**9  # a year of thirty steps a second: a larger number is damaged
TENSORS = ("values", "best", "first_moment", "second_moment")


@dataclass
class VectorState:
    """How far one vector's training has come.

    Args:
        values: `[hidden]` fp32, being trained; best: the values at `best_step`.
        first_moment, second_moment: Adam's, `[hidden]` fp32.
        losses: of each step's batch, before the step.
        held_out: loss on the held-out pairs by the number of steps taken.
        best_step: steps taken when the held-out loss was lowest; without held-out pairs, all.
        done: stopped early.
    """

    values: Tensor
    best: Tensor
    first_moment: Tensor
    second_moment: Tensor
    losses: list[float] = field(default_factory=list)
    held_out: dict[int, float] = field(default_factory=dict)
    best_step: int = 0
    done: bool = False


@dataclass
class Checkpoint(tensor_files.TensorRecord):
    """The states of a training's vectors after `step` steps, and the training's description (JSON-serialisable)."""

    FORMAT: ClassVar[str] = "faststeer.training/1"
    HOLDS: ClassVar[str] = "checkpoint of a training"
    MEND: ClassVar[str] = "remove it, or give another checkpoint="

    states: list[VectorState]
    step: int
    description: Mapping[str, Any]

    @classmethod
    def of(cls, path: Path, description: Mapping[str, Any], n_vectors: int) -> tuple[list[VectorState], int]:
        """Read the states of a training's `n_vectors` vectors and the number of steps taken.

        Raises:
            FileNotFoundError: there is no such file.
            FormatError: the file is damaged or something else, or belongs to another training than `description`'s,
                with what differs.
        """
        checkpoint = cls.load(path)
        here, there = json.loads(json.dumps(dict(description))), checkpoint.description
        differing = sorted(name for name in {*here, *there} if here.get(name) != there.get(name))
        if differing or len(checkpoint.states) != n_vectors:
            said = ", ".join(f"{name} (there {there.get(name)!r}, here {here.get(name)!r})" for name in differing)
            said = said or f"the number of its vectors (there {len(checkpoint.states)}, here {n_vectors})"
            raise FormatError(
                f"{path} is a checkpoint of another training: it differs in {said}. Train with the same, or give "
                "another checkpoint="
            )
        return checkpoint.states, checkpoint.step

    def _content(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        tensors = {
            f"{name}.{number}": getattr(state, name).detach().to("cpu", torch.float32, copy=True)
            for number, state in enumerate(self.states)
            for name in TENSORS
        }
        progress = [
            {"losses": s.losses, "held_out": sorted(s.held_out.items()), "best_step": s.best_step, "done": s.done}
            for s in self.states
        ]
        description = json.dumps(dict(self.description), sort_keys=True)
        return tensors, {"step": self.step, "progress": progress, "description": description}

    @classmethod
    def _read(cls, file: tensor_files.TensorFile) -> Checkpoint:
        progress, description = file.json("progress"), file.json("description")
        if not isinstance(progress, list) or not isinstance(description, dict):
            raise ValueError("it does not hold the states of vectors and a description")
        states = [_state(file, number, entry) for number, entry in enumerate(progress)]
        shapes = {(tuple(getattr(s, name).shape), getattr(s, name).dtype) for s in states for name in TENSORS}
        if len(shapes) != 1 or next(iter(shapes))[1] != torch.float32:
            raise ValueError("its tensors are not alike")
        return cls(states, _count(file.words["step"]), description)


def _state(file: tensor_files.TensorFile, number: int, entry: Mapping[str, Any]) -> VectorState:
    return VectorState(
        **{name: file.tensor(f"{name}.{number}") for name in TENSORS},
        losses=[float(loss) for loss in entry["losses"]],
        held_out={_count(at): float(loss) for at, loss in entry["held_out"]},
        best_step=_count(entry["best_step"]),
        done=entry["done"] is True,
    )


def _count(steps: Any) -> int:
    """A number of steps, which training counts up to."""
    if not 0 <= (number := int(steps)) <= MAX_STEPS:
        raise ValueError(f"it counts {number} steps: expected 0 to {MAX_STEPS:,}")
    return number
