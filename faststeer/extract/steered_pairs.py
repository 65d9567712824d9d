"""Preference pairs out of a model's own answers, steered and not: for behaviours without target completions."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

from faststeer.evaluate.generate import complete
from faststeer.evaluate.judging import Judge
from faststeer.extract.pairs import Pair
from faststeer.extract.sweep import Reader
from faststeer.hf.batching import Prompt, prompt_sets
from faststeer.intervention import Add, Layers
from faststeer.plan import Plan
from faststeer.vector import SteeringVector


def steered_pairs(
    model: Any,
    tokenizer: Any,
    vector: SteeringVector,
    induce: Sequence[Prompt],
    suppress: Sequence[Prompt],
    *,
    layers: Layers = None,
    coefficient: float = 1.0,
    judge: Judge | str | Callable[..., Any] = "refusal:substrings",
    coherence: Judge | str | Callable[..., Any] = "no-loop",
    system: str | None = None,
    rendered: bool = False,
    max_new_tokens: int = 80,
    batch_size: int = 32,
    progress: bool = False,
) -> list[Pair]:
    """Return a Pair for every prompt on which a vector that is known already does what it is for: the answer with the
    vector chosen, the one without it rejected.

    A vector from contrast (`dim`) so gives `train` its completions; what they find may do what
    it does with a smaller change, but is taught by it, and cannot know better than it did.

    Args:
        vector: at the layers where it acts; `layers` picks some of them.
        induce: prompts on which coefficient x vector is added (sign +1); suppress: on which it is subtracted (-1).
        judge: a judge, its name, or a function from an answer to 1 (it shows the behaviour), -1 (the opposite) or 0
            (`evaluate.judging.make`). A pair stays if it says the sign of the chosen answer and something else of the
            rejected one.
        coherence: of the chosen answer, which goes where it is not coherent.
        system: a system prompt put before every prompt; give it to the training, too.
        rendered: the prompts hold the chat template's markup already and are taken as they are, by the training, too.
        max_new_tokens: of an answer; more than `Recipe.max_tokens`, so that the end of one that was cut is
            not taught.
        batch_size, progress: as in `faststeer.evaluate.complete`.

    Raises:
        ValueError: no prompts, a vector that does not fit the model, or no pair that stays.
    """
    sets = prompt_sets(rendered, induce=induce, suppress=suppress)
    prompts = [*sets["induce"], *sets["suppress"]]
    signs = [1] * len(sets["induce"]) + [-1] * len(sets["suppress"])
    plans = {sign: Plan([Add(vector, sign * coefficient, layers=layers)]) for sign in (1, -1)}
    reader = Reader.made(judge, coherence, model, tokenizer)
    answers = complete(
        model,
        tokenizer,
        prompts * 2,
        [plans[sign] for sign in signs] + [None] * len(prompts),
        system=system,
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
        progress=progress,
    )
    chosen, rejected = answers[: len(prompts)], answers[len(prompts) :]
    changed, plain_read = reader.read([(prompts, None)] * 2, [chosen, rejected])
    assert changed.coherent is not None
    pairs = [
        Pair(prompt, steered, plain, sign)
        for prompt, sign, steered, plain, after, before, sound in zip(
            prompts, signs, chosen, rejected, changed.verdicts, plain_read.verdicts, changed.coherent, strict=True
        )
        if steered.strip() and plain.strip() and after == sign != before and sound
    ]
    if not pairs:
        raise ValueError(
            f"the vector changes the verdict on none of {len(prompts)} prompts: is it at the right layer, strong "
            "enough, and does it point from the opposite to the behaviour?"
        )
    if 2 * len(pairs) < len(prompts):
        warnings.warn(f"the vector changes the verdict on only {len(pairs)} of {len(prompts)} prompts", stacklevel=2)
    return pairs
