"""Where a training stands, as one file: safetensors with the vectors and the optimizer's moments, and everything else
as JSON in its header, so that a checkpoint is written whole or not at all."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_safetensors
from torch import Tensor

from faststeer.files import write_atomically

FORMAT = "faststeer.training/1"
TENSORS = ("values", "best", "first_moment", "second_moment")


@dataclass
class State:
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


def save(path: Path, states: list[State], step: int, description: Mapping[str, Any]) -> None:
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
    write_atomically(path, to_safetensors(tensors, header))


def load(path: Path, description: Mapping[str, Any], n_vectors: int) -> tuple[list[State], int]:
    """Read what `save` wrote: the states of the training's `n_vectors` vectors and the number of steps taken.

    Raises:
        ValueError: the file is truncated or something else, or belongs to another training than `description`'s, with
            what differs.
    """
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            if header.get("format") != FORMAT:
                raise ValueError(f"its format is {header.get('format')!r}, expected {FORMAT!r}")
            progress = json.loads(header["progress"])
            found = json.loads(header["description"])
            step = int(header["step"])
            states = [
                State(
                    **{name: file.get_tensor(f"{name}.{number}") for name in TENSORS},
                    losses=[float(loss) for loss in entry["losses"]],
                    held_out={int(at): float(loss) for at, loss in entry["held_out"]},
                    best_step=int(entry["best_step"]),
                    done=bool(entry["done"]),
                )
                for number, entry in enumerate(progress)
            ]
        if len(states) != n_vectors or not isinstance(found, dict):
            raise ValueError(f"it holds {len(states)} vectors, expected {n_vectors}")
        shapes = {(tuple(getattr(s, name).shape), getattr(s, name).dtype) for s in states for name in TENSORS}
        if len(shapes) != 1 or next(iter(shapes))[1] != torch.float32:
            raise ValueError("its tensors are not alike")
    except (SafetensorError, OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(
            f"{path} is no checkpoint of a training ({error}): remove it, or give another checkpoint="
        ) from error
    wanted = json.loads(json.dumps(dict(description)))
    differing = sorted(name for name in {*wanted, *found} if wanted.get(name) != found.get(name))
    if differing:
        said = ", ".join(f"{name} (there {found.get(name)!r}, here {wanted.get(name)!r})" for name in differing)
        raise ValueError(
            f"{path} is a checkpoint of another training: it differs in {said}. Train with the same, or give another "
            "checkpoint="
        )
    return states, step
