"""Contrastive activation addition: the mean difference, over pairs of completions, at the token where they part."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from faststeer.extract.contrast import Directions
from faststeer.extract.dim import read_means
from faststeer.extract.pairs import Pair, check_pairs
from faststeer.extract.reading import SIDES
from faststeer.hf.batching import check_evaluating, encode
from faststeer.hf.encoding import encode_texts
from faststeer.vector import HookPoint, SteeringVector, check_hook_point


def caa_table(
    model: Any,
    tokenizer: Any,
    pairs: Sequence[Pair],
    *,
    at: HookPoint = "resid_post",
    system: str | None = None,
    rendered: bool = False,
    batch_size: int = 32,
    progress: bool = False,
) -> Directions:
    """Return `caa` as a table of one position, for selection."""
    check_hook_point(at)
    check_evaluating(model)
    rows = answer_rows(tokenizer, pairs, system, rendered=rendered)
    how: dict[str, Any] = {"batch_size": batch_size, "progress": progress}
    means, _ = read_means(model, tokenizer, rows, at=at, positions=(-1,), paired=True, **how)
    directions = means.directions * means.exists().unsqueeze(-1)
    provenance = {"n_pairs": means.n_positive, "token": "the first at which the completions of a pair differ"}
    return Directions(directions, (None,), at, "caa", "raw", means.model, provenance=provenance)


def caa(model: Any, tokenizer: Any, pairs: Sequence[Pair], **options: Any) -> SteeringVector:
    """Return the mean over pairs of h(prompt + positive completion) - h(prompt + negative completion) at the answer
    token, a direction for every layer, not normalised.

    The answer token is the first at which the two completions differ: the letter of "(A)" and "(B)", however the
    tokenizer cuts them; what both share before it is read by the model, what follows is not. Sums are fp64.
    Source: arXiv 2312.06681.

    Args:
        pairs: at least two, each with a rejected completion.
        options: `at`, the hook point (a block's output, "resid_post", is the source's); `system`, `rendered`,
            `batch_size`, `progress` as in `faststeer.extract.candidates`; both sides of a pair pass in one batch.

    Raises:
        ValueError: fewer than two pairs, one without a rejected completion or whose completions have the same first
            tokens up to the end of one of them; as `candidates`.
    """
    return caa_table(model, tokenizer, pairs, **options).vector(None)


def answer_rows(
    tokenizer: Any, pairs: Sequence[Pair], system: str | None = None, *, rendered: bool = False
) -> dict[str, list[list[int]]]:
    """Return the token ids of every prompt with each completion up to its answer token."""
    pairs = check_pairs(pairs, rejected=True)
    if len(pairs) < 2:
        raise ValueError("pairs has 1 pair: a contrast needs at least two, or the direction is that of one prompt")
    prompts = encode(tokenizer, [pair.prompt for pair in pairs], system, rendered=rendered, what="prompts of pairs")
    rows: dict[str, list[list[int]]] = {side: [] for side in SIDES}
    for number, (pair, prompt) in enumerate(zip(pairs, prompts, strict=True)):
        both = encode_texts(tokenizer, [str(pair.positive), str(pair.negative)], begin=False)
        place = next((i for i, (a, b) in enumerate(zip(*both, strict=False)) if a != b), None)
        if place is None:
            raise ValueError(
                f"pairs[{number}]: one completion begins the other ({pair.positive!r}, {pair.negative!r}): "
                "there is no token at which they differ"
            )
        for side, ids in zip(SIDES, both, strict=True):
            rows[side].append([*prompt, *ids[: place + 1]])
    return rows
