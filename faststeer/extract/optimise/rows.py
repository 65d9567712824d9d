"""Terms of a loss as rows of a batch: each completion under its own vector's plan, all in the same forward pass."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from faststeer.extract.optimise.objectives import Objective, SideScores, Term
from faststeer.hf.batching import (
    Prompt,
    TokenRow,
    batches,
    encode,
    forward_arguments,
    model_device,
    pad,
    pad_rows,
    padding_id,
)
from faststeer.hf.hooks import read
from faststeer.hf.steering import Steering
from faststeer.intervention import Add, Clamp, Positions
from faststeer.plan import Plan
from faststeer.vector import HookPoint


class Work(NamedTuple):
    """A term of the loss of vector number `vector`, counted `weight` times."""

    vector: int
    term: Term
    weight: float


@dataclass
class Plans:
    """The plans of vectors `[hidden]`, one per vector and coefficient, made once each so that they keep their slots."""

    vectors: Sequence[Tensor]
    layers: Sequence[int]
    at: HookPoint
    positions: Positions
    made: dict[tuple[int, float | None], Plan] = field(default_factory=dict)

    def of(self, vector: int, coefficient: float | None) -> Plan:
        key = vector, coefficient
        if key not in self.made:
            where: dict[str, Any] = {"layers": self.layers[vector], "at": self.at, "positions": self.positions}
            values = self.vectors[vector]
            acts = Clamp(values, high=0.0, **where) if coefficient is None else Add(values, coefficient, **where)
            self.made[key] = Plan([acts])
        return self.made[key]


def log_probabilities(
    model: Any, texts: Sequence[TokenRow], pad_id: int, steering: Steering, plans: Sequence[Plan]
) -> Tensor:
    """Return log p(completion | prompt) `[rows]`, each row steered by its plan: the sum over the completion's tokens,
    whose logits alone are computed, in fp32 (fp64 for an fp64 model)."""
    # The last token predicts nothing that is asked for.
    batch, ends = pad_rows([TokenRow(text.prompt, text.completion[:-1]) for text in texts], pad_id, model_device(model))
    longest = max(len(text.completion) for text in texts)
    arguments = forward_arguments(model, batch)
    if "logits_to_keep" in arguments:
        arguments["logits_to_keep"] = longest
    steering.assign(list(plans))
    steering.set_prompt(ends)
    logits = model(**arguments).logits[:, -longest:]
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    nothing = -100
    labels = torch.tensor([[nothing] * (longest - len(t.completion)) + list(t.completion) for t in texts])
    losses = F.cross_entropy(
        logits.transpose(1, 2), labels.to(logits.device), ignore_index=nothing, reduction="none"
    )  # [rows, longest]
    return -losses.sum(1)


def losses(
    model: Any,
    steering: Steering,
    objective: Objective,
    plans: Plans,
    work: Sequence[Work],
    *,
    pad_id: int,
    rows: int,
    backward: bool = False,
) -> Tensor:
    """Return the loss of each vector `[vectors]`, fp64: the weighted sum of its terms.

    Terms of all vectors share forward passes of at most `rows` rows (a term's completions stay together); with
    `backward`, the gradients of the sum of all losses are added to the vectors', which is each vector's own, since no
    loss depends on another vector.
    """
    total = torch.zeros(len(plans.vectors), dtype=torch.float64)
    per_term = 1 if work[0].term.loser is None else 2
    longest = [max(len(side.text) for side in item.term[:2] if side is not None) for item in work]
    with torch.set_grad_enabled(backward):
        for group in batches(longest, max(1, rows // per_term)):
            chunk = [work[index] for index in group]
            values = objective.losses(*_scores(model, steering, plans, chunk, pad_id))
            weighted = values * torch.tensor([w.weight for w in chunk]).to(values)
            if backward:
                weighted.sum().backward()
            total.index_add_(0, torch.tensor([w.vector for w in chunk]), weighted.detach().cpu().double())
    return total


def _scores(
    model: Any, steering: Steering, plans: Plans, work: Sequence[Work], pad_id: int
) -> tuple[SideScores, SideScores]:
    """Of the winners and of the losers, in one forward pass."""
    winners, losers = [w.term.winner for w in work], [w.term.loser for w in work if w.term.loser is not None]
    row_plans = [plans.of(w.vector, w.term.coefficient) for w in work]
    row_plans += row_plans[: len(losers)]  # all terms of an objective have a loser, or none has
    log_p = log_probabilities(model, [side.text for side in (*winners, *losers)], pad_id, steering, row_plans)
    return SideScores.of(winners, log_p[: len(work)]), SideScores.of(losers, log_p[len(work) :])


@torch.no_grad()
def residual_sizes(
    model: Any, tokenizer: Any, prompts: Sequence[Prompt], layers: Sequence[int], rows: int, **how: Any
) -> dict[int, float]:
    """Return for each layer |h| / sqrt(hidden), h the residual stream that leaves it: the median over all tokens of the
    prompts, which the few tokens of enormous norm that many models have do not move. `how`: of `encode`."""
    encoded = encode(tokenizer, prompts, **how)
    norms: dict[int, list[Tensor]] = {layer: [] for layer in layers}
    with read(model, at="resid_post", layers=layers) as activations:
        for group in batches([len(ids) for ids in encoded], rows):
            batch = pad([encoded[index] for index in group], padding_id(tokenizer), model_device(model))
            model(**forward_arguments(model, batch))
            for layer in layers:
                h = activations[layer]
                real = batch["attention_mask"].to(h.device).bool()
                norms[layer].append(h[real].double().pow(2).mean(-1).sqrt().cpu())
    return {layer: float(torch.cat(batches_of_layer).median()) for layer, batches_of_layer in norms.items()}
