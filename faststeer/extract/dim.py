"""Difference in means: the direction from the mean activation of one set of prompts to that of another, at every layer.

Means are summed in fp64 while batches pass, so memory does not grow with the number of prompts, and the result depends
neither on the order of the prompts nor on how they were batched. Nothing is normalised or centred: the length of a
direction is the distance between the means.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from faststeer.extract.activations import Activations
from faststeer.extract.reading import (
    SIDES,
    Rows,
    check_contrast,
    check_lengths,
    check_positions,
    check_sides,
    read_batches,
)
from faststeer.hf.batching import Prompt, check_evaluating, encode, model_name, prompt_sets
from faststeer.hf.prompts import post_instruction_positions
from faststeer.tensor_files import TensorRecord
from faststeer.vector import HookPoint, SteeringVector, check_hook_point

METHOD = "dim"


@dataclass(frozen=True, eq=False)
class Candidates(TensorRecord):
    """Mean activations of two sets of prompts at several positions and all layers: a direction for each of these.

    Args:
        positive_mean, negative_mean: `[positions, layers, hidden]` fp64, finite.
        positions: token positions counted from the prompt's end, -1 being the last prompt token.
        at: hook point of the activations.
        n_positive, n_negative: how many prompts each mean is over.
        model: name of the model they come from.

    Raises:
        ValueError: shapes that do not agree, values that are not finite, positions that are not distinct and negative,
            counts below 1.
    """

    FORMAT: ClassVar[str] = "faststeer.candidates/1"
    HOLDS: ClassVar[str] = "candidates"
    MEND: ClassVar[str] = "is it truncated, or another kind of file? Extract it again"

    positive_mean: Tensor
    negative_mean: Tensor
    positions: tuple[int, ...]
    at: HookPoint
    n_positive: int
    n_negative: int
    model: str | None = None

    def __post_init__(self) -> None:
        check_hook_point(self.at)
        object.__setattr__(self, "positions", check_positions(self.positions))
        means = self.positive_mean, self.negative_mean
        check_sides("means", "positions, layers, hidden", *means, self.positions, torch.float64)
        if self.n_positive < 1 or self.n_negative < 1:
            raise ValueError(
                f"means over {self.n_positive} positive and {self.n_negative} negative prompts: "
                "expected at least one of each"
            )

    @property
    def directions(self) -> Tensor:
        """positive mean - negative mean, `[positions, layers, hidden]` fp64."""
        return self.positive_mean - self.negative_mean

    @property
    def n_layers(self) -> int:
        """How many layers the table of directions has."""
        return self.positive_mean.shape[1]

    def relative_norm(self, position: int, layer: int) -> float:
        """|positive mean - negative mean| over the mean of |positive mean| and |negative mean|, at one candidate."""
        index, _ = check_cell(self.positions, self.n_layers, position, layer)
        lengths = self.positive_mean[index, layer].norm() + self.negative_mean[index, layer].norm()
        return float(self.directions[index, layer].norm() / (lengths / 2))

    def exists(self) -> Tensor:
        """Return `[positions, layers]` bool: whether the means differ by more than the rounding of their own sums.

        They do not where every prompt has the same activation, as in the embedding of a token of the chat template.
        The mean of n equal fp64 numbers is off by at most n eps of its size.
        """
        rounding = (self.n_positive + self.n_negative) * torch.finfo(torch.float64).eps
        size = torch.maximum(self.positive_mean.norm(dim=-1), self.negative_mean.norm(dim=-1))
        return self.directions.norm(dim=-1) > rounding * size

    def vector(self, position: int | None, layer: int | None = None) -> SteeringVector:
        """Return the directions found at `position`: that of `layer`, or of every layer that has one. Scale raw, fp32.

        Raises:
            ValueError: a position or layer there is not, no direction at that layer, or at none.
        """
        index, layers = check_cell(self.positions, self.n_layers, position, layer)
        exists = self.exists()[index]
        directions = {number: self.directions[index, number].float() for number in layers if exists[number]}
        if not directions:
            where = "any layer" if layer is None else f"layer {layer}"
            raise ValueError(
                f"both sets have the same mean at {where}, position {position}: "
                "are the prompts the same, or is that token the same in all and its layer the embedding?"
            )
        counts = {"n_positive": self.n_positive, "n_negative": self.n_negative}
        provenance: dict[str, Any] = {"position": position, **counts}
        if missing := [number for number in layers if not exists[number]]:
            provenance["layers_without_direction"] = missing
        return SteeringVector(
            directions, at=self.at, model=self.model, method=METHOD, scale="raw", provenance=provenance
        )


def check_cell(
    positions: Sequence[int | None], n_layers: int, position: int | None, layer: int | None
) -> tuple[int, list[int]]:
    """Return the index of a position in a table and the layers meant by `layer` (None: all), or raise ValueError."""
    if position not in positions:
        raise ValueError(f"no candidates at position {position}: there are {', '.join(map(str, positions))}")
    if layer is not None and not 0 <= layer < n_layers:
        raise ValueError(f"no candidates for layer {layer}: the model has layers 0..{n_layers - 1}")
    return list(positions).index(position), list(range(n_layers)) if layer is None else [layer]


def candidates(
    model: Any,
    tokenizer: Any,
    positive: Sequence[Prompt],
    negative: Sequence[Prompt],
    *,
    at: HookPoint = "resid_pre",
    positions: Sequence[int] | None = None,
    system: str | None = None,
    rendered: bool = False,
    batch_size: int = 32,
    progress: bool = False,
) -> Candidates:
    """Return the mean activations of both sets at every layer and each of `positions`, from one pass over the prompts.

    Args:
        positive, negative: texts or chat message lists; the directions point from the negative to the positive.
        at: hook point (docs/design.md).
        positions: token positions counted from the prompt's end; by default those after the instruction
            (`post_instruction_positions`).
        system: a system prompt put before every prompt.
        rendered: the prompts hold the chat template's markup already and are taken as they are.
        batch_size: prompts per forward pass; prompts of similar length go together.
        progress: show a progress bar on stderr.

    Raises:
        ValueError: before any forward pass: sets that cannot be contrasted (empty, fewer than two prompts, the same
            prompt on both sides, chats of different formats), something that is no prompt, an unknown hook point,
            positions that are not negative or that the shortest prompt does not have, a model in training mode. During
            it: an activation that is NaN or infinite, with its layer and prompt.
    """
    sets = {"positive": positive, "negative": negative}
    how: dict[str, Any] = {"system": system, "rendered": rendered, "batch_size": batch_size, "progress": progress}
    return read_sets(model, tokenizer, sets, at=at, positions=positions, **how)[0]


def read_sets(
    model: Any,
    tokenizer: Any,
    sets: Mapping[str, Sequence[Prompt]],
    *,
    at: HookPoint = "resid_pre",
    positions: Sequence[int] | None = None,
    paired: bool = False,
    system: str | None = None,
    rendered: bool = False,
    **how: Any,
) -> tuple[Candidates, Activations | None]:
    """Check and encode both sets, and read them (`read_means`, whose other arguments are `how`)."""
    check_hook_point(at)
    check_evaluating(model)
    positions = check_positions(post_instruction_positions(tokenizer) if positions is None else positions)
    checked = check_contrast(**prompt_sets(rendered, **sets), paired=paired)
    rows = {side: encode(tokenizer, prompts, system, what=side) for side, prompts in checked.items()}
    check_lengths(rows, positions)
    return read_means(model, tokenizer, rows, at=at, positions=positions, paired=paired, **how)


def read_means(
    model: Any,
    tokenizer: Any,
    rows: Rows,
    *,
    at: HookPoint,
    positions: tuple[int, ...],
    paired: bool = False,
    keep: bool = False,
    batch_size: int = 32,
    progress: bool = False,
) -> tuple[Candidates, Activations | None]:
    """Return the means over both sides' rows of token ids, and with `keep` every row's activations."""
    totals: dict[str, Tensor] = {}
    activations: dict[str, Tensor] = {}
    for side, numbers, values in read_batches(
        model, tokenizer, rows, at=at, positions=positions, batch_size=batch_size, progress=progress, paired=paired
    ):
        if side not in totals:
            totals[side] = torch.zeros(values.shape[1:], dtype=torch.float64, device="cpu")
            activations[side] = values.new_empty(len(rows[side]) if keep else 0, *values.shape[1:])
        totals[side] += values.double().sum(0)
        if keep:
            activations[side][numbers] = values
    positive, negative = (totals[side] / len(rows[side]) for side in SIDES)
    name = model_name(model)
    means = Candidates(positive, negative, positions, at, len(rows["positive"]), len(rows["negative"]), name)
    if not keep:
        return means, None
    return means, Activations(activations["positive"], activations["negative"], positions, at, paired, name)


def dim(
    model: Any,
    tokenizer: Any,
    positive: Sequence[Prompt],
    negative: Sequence[Prompt],
    *,
    position: int = -1,
    **options: Any,
) -> SteeringVector:
    """Return mean(positive activations) - mean(negative activations) at one token position, a direction for every
    layer, not normalised.

    A layer at which both means are equal has no direction and is left out (`provenance["layers_without_direction"]`):
    `resid_pre` of layer 0 is the embedding, which is the same for all prompts where the position holds a token of the
    chat template.
    Source: arXiv 2406.11717, arXiv 2604.08524.

    Args:
        position: token position counted from the prompt's end, -1 being the last prompt token; the rest as in
            `candidates`.

    Raises:
        ValueError: as `candidates`; or the means are equal at every layer.
    """
    return candidates(model, tokenizer, positive, negative, positions=[position], **options).vector(position)
