"""How likely texts are under a model, steered or not: log-probabilities of given continuations, in fp64.

Perplexity, cross-entropy, KL over a text and multiple choice all come from here; nothing here generates.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from faststeer.hf.batching import TokenRow, check_evaluating, forward_arguments, model_device, pad_rows, rounds
from faststeer.hf.encoding import encode_texts
from faststeer.hf.steering import steer
from faststeer.plan import Plan
from faststeer.progress import progress_bar

Within = Callable[[Any, Sequence[Plan | None]], AbstractContextManager[Any]]


class ContinuationScore(NamedTuple):
    """Log-probabilities of a continuation's tokens `[tokens]`, fp64, and whether each token is the likeliest."""

    log_probabilities: Tensor
    greedy: bool

    @property
    def total(self) -> float:
        """Log-probability of the whole continuation, in nats."""
        return float(self.log_probabilities.sum())


@dataclass(frozen=True)
class ContinuationRow(TokenRow):
    """A prompt and what follows it (token ids, neither empty), and the plan under which it is read."""

    plan: Plan | None = None


@torch.no_grad()
def continuation_logits(
    model: Any,
    rows: Sequence[ContinuationRow],
    *,
    pad_id: int = 0,
    batch_size: int = 32,
    progress: bool = False,
    within: Within = steer,
) -> Iterator[tuple[int, Tensor]]:
    """Yield (row number, logits `[tokens, vocabulary]` that predict the row's continuation) until every row was seen.

    The rows of a batch may have different plans; rows without a plan pass first, the model untouched. Positions are
    counted from the end of a row's prompt, exactly as they are while a model generates. `within` is the context that
    puts a batch's plans on the model; others than `steer` are in `faststeer.observe`.

    Raises:
        ValueError: an empty prompt or continuation, more tokens than the model has positions for, a model in training
            mode, a plan that does not fit the model.
    """
    check_evaluating(model)
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    for number, row in enumerate(rows):
        if not len(row.prompt) or not len(row.completion):
            raise ValueError(f"row {number} has an empty context or continuation: expected at least one token of each")
        if positions is not None and len(row) > positions:
            raise ValueError(
                f"row {number} has {len(row.prompt)} + {len(row.completion)} tokens, the model has positions for "
                f"{positions}: shorten it"
            )
    work = rounds([row.plan for row in rows], [len(row) for row in rows], batch_size)
    with progress_bar("Reading", sum(len(groups) for _, groups in work), progress) as advance:
        for plans, groups in work:
            with within(model, plans) if plans else nullcontext() as steering:
                for group in groups:
                    here = [rows[number] for number in group]
                    batch, ends = pad_rows(here, pad_id, model_device(model))
                    if steering is not None:
                        steering.assign([row.plan for row in here])
                        steering.set_prompt(ends)
                    arguments = forward_arguments(model, batch)
                    if "logits_to_keep" in arguments:
                        arguments["logits_to_keep"] = 1 + max(len(row.completion) for row in here)
                    logits = model(**arguments).logits
                    for number, row, own in zip(group, here, logits, strict=True):
                        yield number, own[-len(row.completion) - 1 : -1]
                    advance()


def score_rows(model: Any, rows: Sequence[ContinuationRow], **options: Any) -> list[ContinuationScore]:
    """Return the log-probabilities of every row's continuation, in the rows' order (options: `continuation_logits`)."""
    scored: dict[int, ContinuationScore] = {}
    for number, logits in continuation_logits(model, rows, **options):
        tokens = torch.tensor(rows[number].completion, device=logits.device)
        scored[number] = ContinuationScore(
            token_log_probabilities(logits, tokens).cpu(), bool((logits.argmax(-1) == tokens).all())
        )
    return [scored[number] for number in range(len(rows))]


def token_log_probabilities(logits: Tensor, tokens: Tensor) -> Tensor:
    """log P(token) `[tokens]`, fp64, under logits `[tokens, vocabulary]`."""
    return logits.double().log_softmax(-1).gather(-1, tokens.unsqueeze(-1)).squeeze(-1)


def answer_ids(tokenizer: Any, text: str) -> list[int]:
    """Token ids of what is said after a prompt, without special tokens."""
    return encode_texts(tokenizer, [text], begin=False)[0]
