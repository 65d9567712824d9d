"""What answers project on the directions that steered them: token by token, at every layer.

An answer is read once more behind its prompt, under its setting's plan, beside the setting's own answers alone. So the
numbers depend on the answer and not on which rows shared a batch while it was generated, and a sweep that was killed
and went on has the same ones.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from faststeer.compile import direction_at, resolve_layers
from faststeer.evaluate.sweep.description import Setting
from faststeer.hf import find_hook_points
from faststeer.hf.batching import TokenRow, batches, forward_arguments, model_device, pad_rows
from faststeer.hf.steering import steer
from faststeer.intervention import Probe
from faststeer.plan import Plan
from faststeer.vector import SteeringVector

HALF_MAX = float(np.finfo(np.float16).max)
MAX_SCALE = 2.0**112  # makes the largest half the largest fp32


class Watched(NamedTuple):
    """A direction on which answers are projected.

    Attributes:
        vector: name of the vector, or of the plan.
        control: number of the random one in its place, else None.
        layer: the layer it was made for; None for a bare tensor, which serves every layer.
        direction: `[hidden]`, fp32, on the CPU.
    """

    vector: str
    control: int | None
    layer: int | None
    direction: Tensor


def watched(settings: Sequence[Setting], n_layers: int) -> tuple[list[Watched], dict[int, int]]:
    """Return the distinct directions, and `{setting: number of its direction}`.

    A setting's is the first direction of its plan's first intervention, of the first layer where that acts. The
    unsteered model and a plan without interventions have none.
    """
    numbers: dict[tuple[str, int | None, int | None], int] = {}
    directions: list[Watched] = []
    of_setting: dict[int, int] = {}
    for number, setting in enumerate(settings):
        if not setting.plan:
            continue
        first = setting.plan.interventions[0]
        direction, layer = first.directions()[0], resolve_layers(first, n_layers)[0]
        key = setting.vector, setting.control, layer if isinstance(direction, SteeringVector) else None
        if key not in numbers:
            numbers[key] = len(directions)
            values = torch.atleast_2d(direction_at(direction, layer))[0]
            directions.append(Watched(*key, values.detach().float().cpu()))
        of_setting[number] = numbers[key]
    return directions, of_setting


@torch.no_grad()
def project(
    model: Any,
    plan: Plan | None,
    rows: Sequence[TokenRow],
    directions: Tensor,
    *,
    pad_id: int = 0,
    batch_size: int = 32,
) -> list[Tensor]:
    """Read prompts with their answers under a plan; return h . v / |v| of every row, `[layers + 1, tokens, k]`
    in fp32 on the CPU, for `directions` `[k, hidden]`.

    h is the residual stream that enters each layer, last the one that leaves the last layer; after steering.
    """
    n_layers = find_hook_points(model).n_layers
    probes = [
        Probe(directions, layers="all", at="resid_pre"),
        Probe(directions, layers=n_layers - 1, at="resid_post"),
    ]
    projections: dict[int, Tensor] = {}  # by row
    with steer(model, Plan([*(plan or ()), *probes])) as steering:
        for group in batches([len(row) for row in rows], batch_size):
            batch, ends = pad_rows([rows[i] for i in group], pad_id, model_device(model))
            steering.set_prompt(ends)
            model(**forward_arguments(model, batch))
            values = torch.stack([values.cpu() for values in steering.projections.values()], 1)  # in the sites' order
            steering.clear_projections()
            projections |= {i: each[:, -len(rows[i]) :] for i, each in zip(group, values, strict=True)}
    return [projections[i] for i in range(len(rows))]


def packed(values: Any) -> tuple[float, bytes]:
    """`[layers + 1, tokens]` as (scale, half precision, little-endian, row by row): values = scale x halves.

    The scale is the smallest power of two from 1 that makes them fit: unpacking and packing again loses nothing.
    """
    values = np.asarray(values, dtype=np.float32)
    largest = float(np.abs(values[np.isfinite(values)]).max(initial=0.0))
    scale = 2.0 ** max(0, math.ceil(math.log2(largest / HALF_MAX))) if largest > HALF_MAX else 1.0
    return scale, (values / np.float32(scale)).astype("<f2").tobytes()


def unpacked(scale: float, data: bytes, tokens: int) -> np.ndarray:
    """What `packed` packed, `[layers + 1, tokens]` fp32."""
    if not 1 <= scale <= MAX_SCALE:
        raise ValueError(f"projections are scaled by {scale}: expected 1 to {MAX_SCALE:g}")
    return np.frombuffer(data, "<f2").astype(np.float32).reshape(-1, tokens) * np.float32(scale)
