"""One pass over two sets of prompts: every layer's activation at chosen tokens, batch by batch, for any number of
methods at once. And the checks of two sets that are to be contrasted.

Nothing is kept here: what a method does not add up while the batches pass is gone.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from faststeer import hf
from faststeer.hf.batching import Prompt, batches, check_prompts, padding_id
from faststeer.hf.prefix import Prefix, common_prefix
from faststeer.progress import progress_bar
from faststeer.vector import HookPoint

SIDES = ("positive", "negative")
Rows = Mapping[str, Sequence[Sequence[int]]]  # side -> token ids of its prompts


class Batch(NamedTuple):
    """What one forward pass gave of one side: prompt numbers and activations `[prompts, positions, layers, hidden]`, on
    the CPU, in the model's dtype."""

    side: str
    numbers: list[int]
    activations: Tensor


def check_positions(positions: Sequence[int]) -> tuple[int, ...]:
    """Return the positions as a tuple if they are distinct negative integers, else raise ValueError."""
    positions = tuple(positions)
    if not positions or len(set(positions)) < len(positions) or not all(type(p) is int and p < 0 for p in positions):
        raise ValueError(
            f"positions are {list(positions)}: expected distinct negative integers, -1 being the last prompt token"
        )
    return positions


def check_sides(
    what: str, axes: str, positive: Tensor, negative: Tensor, positions: Sequence[int], dtype: torch.dtype | None = None
) -> None:
    """Raise ValueError unless both sides are finite tensors `[axes]` of one float dtype (by default any) that agree
    from the axis of `positions` on."""
    shapes, n = (positive.shape, negative.shape), axes.count(",") + 1
    first = axes.split(", ").index("positions")
    wrong = any(len(shape) != n or shape[first] != len(positions) or not shape.numel() for shape in shapes)
    if wrong or shapes[0][first:] != shapes[1][first:]:
        raise ValueError(
            f"{what} of shapes {list(shapes[0])} and {list(shapes[1])} for {len(positions)} position(s): "
            f"expected [{axes}] twice"
        )
    if not positive.is_floating_point() or {positive.dtype, negative.dtype} != {dtype or positive.dtype}:
        expected = dtype or "one float"
        raise ValueError(f"{what} of dtypes {positive.dtype} and {negative.dtype}: expected {expected}")
    if not bool(torch.isfinite(positive).all() and torch.isfinite(negative).all()):
        raise ValueError(f"the {what} hold NaN or infinite values: extract them again")


def check_contrast(
    positive: Sequence[Prompt], negative: Sequence[Prompt], *, paired: bool = False
) -> dict[str, list[Prompt]]:
    """Return both sets if a direction between them can mean what they differ in.

    Raises:
        ValueError: an empty set, something that is no prompt, fewer than two different prompts a side, a
            prompt on both sides, sides whose chats have different formats (a system prompt on one side only, say: the
            direction would be that of the format), pairs whose sides differ in number.
    """
    sets = {side: check_prompts(prompts, side) for side, prompts in zip(SIDES, (positive, negative), strict=True)}
    for side, prompts in sets.items():
        if len({repr(prompt) for prompt in prompts}) < 2:
            has = "1 prompt" if len(prompts) == 1 else f"the same prompt {len(prompts)} times"
            raise ValueError(
                f"{side} has {has}: a contrast needs at least two a side, or the direction is that of one prompt"
            )
    if paired and len(sets["positive"]) != len(sets["negative"]):
        raise ValueError(
            f"pairs have two sides, but there are {len(sets['positive'])} positive and {len(sets['negative'])} "
            "negative prompts"
        )
    _check_overlap(sets)
    _check_formats(sets)
    return sets


def _check_overlap(sets: Mapping[str, list[Prompt]]) -> None:
    places = {repr(prompt): number for number, prompt in enumerate(sets["negative"])}
    shared = [(n, places[repr(prompt)]) for n, prompt in enumerate(sets["positive"]) if repr(prompt) in places]
    if shared:
        first, second = shared[0]
        raise ValueError(
            f"{len(shared)} prompt(s) are on both sides, the first being positive[{first}] = negative[{second}] "
            f"{sets['positive'][first]!r}: leave them out, or were the same prompts given twice?"
        )


def prompt_format(prompt: Prompt) -> tuple[str, ...]:
    """The roles of a prompt's messages; a text is one user message."""
    return ("user",) if isinstance(prompt, str) else tuple(message["role"] for message in prompt)


def _check_formats(sets: Mapping[str, list[Prompt]]) -> None:
    formats = {side: {prompt_format(prompt) for prompt in prompts} for side, prompts in sets.items()}
    for side, other in (SIDES, SIDES[::-1]):
        if only := formats[side] - formats[other]:
            n, chat = next((n, prompt) for n, prompt in enumerate(sets[side]) if prompt_format(prompt) in only)
            raise ValueError(
                f"{side}[{n}] is a chat of {', '.join(prompt_format(chat))}, and no {other} is one: "
                "the direction would be that of the chat format; give both sides the same roles"
            )


def check_lengths(rows: Rows, positions: Sequence[int]) -> None:
    """Raise ValueError naming the first prompt that has no token at one of the positions."""
    for side, encoded in rows.items():
        for index, ids in enumerate(encoded):
            if len(ids) < -min(positions):
                raise ValueError(
                    f"{side}[{index}] has {len(ids)} token(s) and so none at position {min(positions)}: "
                    "leave the prompt or the position out"
                )


@torch.no_grad()
def read_batches(
    model: Any,
    tokenizer: Any,
    rows: Rows,
    *,
    at: HookPoint,
    positions: Sequence[int],
    batch_size: int,
    progress: bool,
    paired: bool = False,
    share_prefix: bool = True,
) -> Iterator[Batch]:
    """Yield the activations of every prompt once. With `paired`, both sides of a pair pass together, and a batch of the
    positive side is followed by that of the negative side with the same numbers.

    Tokens that the prompts of a side begin with (of both sides, with `paired`) are run once and not again for each
    prompt, where the model allows it and both sides gain (`faststeer.hf.prefix`): the same activations up to rounding.

    Raises:
        ValueError: an activation that is NaN or infinite, with its layer and prompt.
    """
    work = _groups(rows, batch_size, paired)
    pad_id = padding_id(tokenizer)
    whole = Prefix(model, pad_id)
    with (
        hf.read(model, at=at, tokens=list(positions)) as by_layer,
        progress_bar("Reading prompts", len(work), progress) as advance,
    ):
        prefixes: dict[tuple[str, ...], Prefix] = {}
        for sides in dict.fromkeys(tuple(side for side, _ in group) for group in work):
            together = [ids for side in sides for ids in rows[side]]
            own = -min(positions)
            prefixes[sides] = common_prefix(model, together, own, pad_id) if share_prefix else whole
        if not all(prefix.length for prefix in prefixes.values()):  # sides that are read alike round alike
            prefixes = dict.fromkeys(prefixes, whole)
        for group in work:
            ids = [rows[side][number] for side, numbers in group for number in numbers]
            sides = tuple(side for side, _ in group)
            # [rows, positions, layers, hidden]
            model(**prefixes[sides].arguments(ids))
            activations = torch.stack([by_layer[layer].cpu() for layer in range(len(by_layer))], dim=2)
            start = 0
            for side, numbers in group:
                part = activations[start : start + len(numbers)]
                start += len(numbers)
                _check_finite(part, numbers, side, at)
                yield Batch(side, numbers, part)
            advance()


def _groups(rows: Rows, batch_size: int, paired: bool) -> list[list[tuple[str, list[int]]]]:
    """Batches, as sides with the numbers of their prompts. Without pairs one side comes after the other, so that
    neither's batches depend on the other's prompts."""
    if not paired:
        return [[(side, group)] for side, ids in rows.items() for group in batches(list(map(len, ids)), batch_size)]
    lengths = [max(map(len, pair)) for pair in zip(*rows.values(), strict=True)]
    # Half a batch of pairs is a batch of prompts; a batch size of 1 still needs both sides.
    groups = batches(lengths, max(batch_size // 2, 1) if batch_size > 0 else batch_size)
    return [[(side, group) for side in rows] for group in groups]


def _check_finite(activations: Tensor, numbers: list[int], side: str, at: HookPoint) -> None:
    finite = torch.isfinite(activations)
    if bool(finite.all()):
        return
    bad = ~finite.all(-1).all(1)  # [prompts, layers]
    # The lowest layer, where it began.
    layer = int(bad.any(0).nonzero()[0])
    prompt = numbers[int(bad[:, layer].nonzero()[0])]
    raise ValueError(
        f"{side}[{prompt}] has a NaN or infinite activation at {at} of layer {layer}: "
        "load the model in bfloat16 or float32, or leave the prompt out"
    )
