"""Completions of many prompts, each under its own plan, in mixed batches.

Greedy and through `model.generate`: the plain way to get answers to judge, never the fast one.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from transformers import StoppingCriteriaList

from faststeer.hf import steer
from faststeer.hf.batching import (
    Prompt,
    batches,
    check_evaluating,
    encode,
    model_device,
    pad,
    padding_id,
    progress_bar,
    timed_batch,
)
from faststeer.plan import Plan, Plans, plans_for

TIMED_TOKENS = 5  # of an answer, for a forecast
TIMED_ANSWERS = 4  # times as many as there would be rows that are timed to the end


@torch.no_grad()
def complete(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Prompt],
    plans: Plans | None = None,
    *,
    system: str | None = None,
    rendered: bool = False,
    max_new_tokens: int = 64,
    batch_size: int = 32,
    progress: bool = False,
    within: Callable[[Any, list[Plan | None]], AbstractContextManager[Any]] = steer,
) -> list[str]:
    """Return the greedy completion of each prompt, without special tokens, in the order of the prompts.

    Args:
        prompts: texts or chat message lists.
        plans: one plan for all prompts, or one per prompt (None: unsteered), or None.
        system: a system prompt put before every prompt.
        rendered: the prompts hold the chat template's markup already and are taken as they are.
        max_new_tokens: where a completion ends if no end-of-sequence token comes first.
        batch_size: prompts that are generated together; those of similar length are.
        progress: show a progress bar on stderr.
        within: the context that puts a batch's plans on the model; others than `steer` are in `faststeer.observe`.

    The end-of-sequence tokens are those of the model's own generation config (else the tokenizer's), and so are
    penalties it may ask for.

    Raises:
        ValueError: no prompts, another number of plans than prompts, `max_new_tokens` or `batch_size` below 1, a model
            in training mode.
    """
    encoded = encode(tokenizer, prompts, system, rendered=rendered)
    per_prompt = plans_for(len(encoded), plans)
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens is {max_new_tokens}: expected at least 1")
    check_evaluating(model)
    settings = generation_settings(model, tokenizer, max_new_tokens)
    ends = settings.get("eos_token_id", [])
    groups = batches([len(ids) for ids in encoded], batch_size)
    texts = [""] * len(encoded)
    with progress_bar("Generating", len(groups), progress) as advance:
        for group in groups:
            batch = pad([encoded[index] for index in group], padding_id(tokenizer), model_device(model))
            # generate counts positions itself, from the mask.
            del batch["position_ids"]
            chosen = [per_prompt[index] for index in group]
            with within(model, chosen) if any(plan is not None for plan in chosen) else nullcontext():
                output = model.generate(**batch, **settings)
            for index, row in zip(group, output[:, batch["input_ids"].shape[1] :].tolist(), strict=True):
                stop = next((place for place, token in enumerate(row) if token in ends), len(row))
                texts[index] = tokenizer.decode(row[:stop], skip_special_tokens=True)
            advance()
    return texts


@torch.no_grad()
def seconds_per_answer(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Prompt],
    n_answers: int,
    *,
    system: str | None = None,
    max_new_tokens: int = 64,
    batch_size: int = 32,
) -> float:
    """Time the first tokens of one batch of unsteered answers, for a forecast: seconds per answer of the longest
    length.

    Args:
        n_answers: that are to be forecast. No more than a small part of them are timed.
        The rest as in `complete`.
    """
    # Of each answer only the first tokens are timed, so that more rows may be: rows of a small batch take longer.
    n_rows = TIMED_ANSWERS * n_answers
    batch = timed_batch(model, encode(tokenizer, prompts, system), padding_id(tokenizer), batch_size, n_rows)
    del batch["position_ids"]
    n_tokens = min(max_new_tokens, TIMED_TOKENS)
    settings = generation_settings(model, tokenizer, n_tokens) | {"min_new_tokens": n_tokens}
    times = [time.monotonic()]

    def note(_: torch.Tensor, __: torch.Tensor) -> bool:
        times.append(time.monotonic())
        return False

    model.generate(**batch, **settings, stopping_criteria=StoppingCriteriaList([note]))
    steps = len(times) - 2  # behind the first token, which comes with the reading of the prompt
    per_step = (times[-1] - times[1]) / steps if steps else 0.0
    return (times[1] - times[0] + per_step * (max_new_tokens - 1)) / len(batch["input_ids"])


def generation_settings(model: Any, tokenizer: Any, max_new_tokens: int) -> dict[str, Any]:
    """The arguments of `model.generate` for greedy completions of at most so many tokens."""
    settings: dict[str, Any] = {
        "max_new_tokens": max_new_tokens,
        "do_sample": False,
        "num_beams": 1,
        "pad_token_id": padding_id(tokenizer),
    }
    if ends := _end_tokens(model, tokenizer):
        settings["eos_token_id"] = ends
    return settings


def _end_tokens(model: Any, tokenizer: Any) -> list[int]:
    for ends in (model.generation_config.eos_token_id, tokenizer.eos_token_id):
        if ends is not None:
            return list(ends) if isinstance(ends, list) else [ends]
    return []
