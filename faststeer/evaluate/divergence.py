"""How far steering moves a model's next token: the Kullback-Leibler divergence, in fp64.

It measures side effects at the last prompt token, and never over an answer.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from faststeer.hf.batching import Prompt, encode, padding_id
from faststeer.hf.last_tokens import last_tokens
from faststeer.plan import Plan


def kl_divergence(base: Tensor, steered: Tensor) -> Tensor:
    """Return KL(P || Q) = sum_i p_i (log p_i - log q_i) in nats `[batch]`, fp64, between two softmax distributions.

    A token of probability 0 under P adds nothing; one of probability 0 under Q alone makes the result infinite.

    Args:
        base, steered: logits `[batch, vocabulary]` of P and Q, any floating dtype.

    Raises:
        ValueError: shapes that differ or are not `[batch, vocabulary]`.
    """
    if base.ndim != 2 or base.shape != steered.shape:
        raise ValueError(
            f"base logits have shape {list(base.shape)}, steered ones {list(steered.shape)}: "
            "expected the same [batch, vocabulary]"
        )
    log_p, log_q = base.double().log_softmax(-1), steered.double().log_softmax(-1)
    terms = log_p.exp() * (log_p - log_q)
    return terms.masked_fill(log_p == -torch.inf, 0.0).sum(-1)


def kl_on(
    model: Any,
    tokenizer: Any,
    plans: Plan | Sequence[Plan],
    prompts: Sequence[Prompt],
    *,
    system: str | None = None,
    batch_size: int = 32,
    progress: bool = False,
) -> Tensor:
    """Return KL(P_unsteered || P_steered) of the next token after each prompt, in nats, fp64, in the prompts' order.

    Args:
        plans: one plan, or several to be compared, which share batches.
        prompts: texts or chat message lists.
        system: a system prompt put before every prompt.
        batch_size: rows per forward pass.
        progress: show a progress bar on stderr.

    Returns:
        `[prompts]` for one plan, `[plans, prompts]` for several, on the CPU.

    Raises:
        ValueError: no prompts, or one the chat template refuses; a plan that does not fit the model.
    """
    encoded = encode(tokenizer, prompts, system)
    listed = [plans] if isinstance(plans, Plan) else list(plans)
    rows = [(prompt, plan) for plan in (None, *listed) for prompt in range(len(encoded))]
    # Rows without a plan pass first; what they give is what the others are compared with.
    base: dict[int, Tensor] = {}
    result = torch.full((len(rows),), torch.nan, dtype=torch.float64)
    for numbers, logits, _ in last_tokens(
        model, encoded, rows, pad_id=padding_id(tokenizer), batch_size=batch_size, progress=progress
    ):
        if rows[numbers[0]][1] is None:
            base |= {rows[number][0]: row for number, row in zip(numbers, logits, strict=True)}
        else:
            result[numbers] = kl_divergence(torch.stack([base[rows[number][0]] for number in numbers]), logits).cpu()
    result = result.view(-1, len(encoded))[1:]
    return result[0] if isinstance(plans, Plan) else result
