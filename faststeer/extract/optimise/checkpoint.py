"""Where a training stands, as one file: safetensors with the vectors and the optimizer's moments, and everything else
as JSON in its header, so that a checkpoint is written whole or not at all."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from faststeer import tensor_files
from faststeer.files import FormatError, write_atomically

FORMAT = "faststeer.training/1"
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


def save(path: Path, states: list[VectorState], step: int, description: Mapping[str, Any]) -> None:
    """Write `states` after `step` steps of the training that `description` (JSON-serialisable) describes."""
    tensors = {
        f"{name}.{number}": getattr(state, name).detach().to("cpu", torch.float32, copy=True).contiguous()
        for number, state in enumerate(states)
        for name in TENSORS
    }
    progress = [
        {
            "losses": s.losses,
            "held_out": sorted(s.held_out.items()),
            "best_step": s.best_step,
            "done": s.done,
        }
        for s in states
    ]
    header = {
        "format": FORMAT,
        "step": str(step),
        "progress": json.dumps(progress),
        "description": json.dumps(dict(description), sort_keys=True),
    }
    write_atomically(path, tensor_files.to_bytes(tensors, header))


def load(path: Path, description: Mapping[str, Any], n_vectors: int) -> tuple[list[VectorState], int]:
    """Read what `save` wrote: the states of the training's `n_vectors` vectors and the number of steps taken.

    Raises:
        FileNotFoundError: there is no such file.
        FormatError: the file is damaged or something else, or belongs to another training than `description`'s, with
            what differs.
    """
    fault = f"{path} is no checkpoint of a training"
    with tensor_files.opened(path, FORMAT, fault, "remove it, or give another checkpoint=") as file:
        progress, found = file.json("progress"), file.json("description")
        if not isinstance(progress, list) or len(progress) != n_vectors or not isinstance(found, dict):
            raise ValueError(f"it does not hold the states of {n_vectors} vectors and a description")
        step = _count(file.words["step"])
        states = [_state(file, number, entry) for number, entry in enumerate(progress)]
        shapes = {(tuple(getattr(s, name).shape), getattr(s, name).dtype) for s in states for name in TENSORS}
        if len(shapes) != 1 or next(iter(shapes))[1] != torch.float32:
            raise ValueError("its tensors are not alike")
    wanted = json.loads(json.dumps(dict(description)))
    differing = sorted(name for name in {*wanted, *found} if wanted.get(name) != found.get(name))
    if differing:
        said = ", ".join(f"{name} (there {found.get(name)!r}, here {wanted.get(name)!r})" for name in differing)
        raise FormatError(
            f"{path} is a checkpoint of another training: it differs in {said}. Train with the same, or give another "
            "checkpoint="
        )
    return states, step


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
