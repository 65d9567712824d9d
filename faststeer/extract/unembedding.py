"""Directions read off the unembedding: what makes chosen tokens likely, with the final norm between taken into account.

Only the direct path from the residual stream to the logits is meant; what later layers make of the direction is not.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch

from faststeer.compile import layer_numbers
from faststeer.hf import find_hook_points
from faststeer.hf.batching import model_name
from faststeer.hf.encoding import encode_texts
from faststeer.hf.norms import final_norm, unembedding_of
from faststeer.vector import HookPoint, SteeringVector, check_hook_point

Tokens = Sequence[int | str]


def unembedding(
    model: Any,
    tokenizer: Any,
    tokens: Tokens,
    against: Tokens | None = None,
    *,
    layers: Iterable[int] | None = None,
    at: HookPoint = "resid_pre",
) -> SteeringVector:
    """Return the unit direction along which the logits of `tokens` rise against those of `against`, the same for every
    layer.

    With u = mean unembedding row of `tokens` - mean row of `against`, the logit difference at the end of the model is u
    . norm(h). A final RMSNorm gives norm(h) = gain * h / rms(h), so that the direction is gain * u: the row of the
    unembedding is meant for the normed stream, and a unit of the stream counts as much as the gain lets it. A LayerNorm
    takes the mean of h away, so that gain * u loses its own mean as well. Both are read off the norm's values (Gemma's
    gain of 1 + weight included), not off its class. What is left out: 1 / rms(h), a positive factor, and the part of
    the gradient along h itself, with which the norm answers to a longer h; neither is a direction of its own.

    Args:
        tokens, against: token ids, or texts that are one token each. Without `against`: the mean row of the whole
            vocabulary, since what all logits gain alike changes no probability.
        layers, at: where the direction is meant to act (all layers).

    Raises:
        ValueError: no tokens, a text of several tokens, an id outside the vocabulary, the same token on both sides, a
            model without output embedding or with something else than a norm before it.
    """
    check_hook_point(at)
    rows: Any = unembedding_of(model).weight
    rows = rows.detach()
    raised = _ids(tokenizer, tokens, rows.shape[0], "tokens")
    other = [] if against is None else _ids(tokenizer, against, rows.shape[0], "against")
    if shared := set(raised) & set(other):
        raise ValueError(f"token(s) {sorted(shared)} are both in tokens and in against: leave them out of one")
    # A vocabulary's mean row in fp64 without a second copy of the whole matrix.
    mean = rows[other].double().mean(0) if other else rows.sum(0, dtype=torch.float64) / rows.shape[0]
    u = (rows[raised].double().mean(0) - mean).cpu()
    # The transpose of C diag(w), which takes a direction of the stream through the norm, is diag(w) u without its mean.
    norm = final_norm(model)
    direction = u if norm is None else norm.transposed(model, u)
    if not bool(direction.norm() > 0):
        raise ValueError("tokens and against have the same unembedding: there is no direction between them")
    n_layers = find_hook_points(model).n_layers
    unit = (direction / direction.norm()).float()
    provenance = {"tokens": raised, "against": other or "the mean of the vocabulary", "position": None}
    directions = {layer: unit.clone() for layer in layer_numbers(layers, n_layers)}
    return SteeringVector(
        directions, at=at, model=model_name(model), method="unembedding", scale="unit", provenance=provenance
    )


def _ids(tokenizer: Any, tokens: Tokens, vocabulary: int, what: str) -> list[int]:
    if isinstance(tokens, str) or not tokens:
        raise ValueError(f"{what} is {tokens!r}: expected a list of token ids or of texts of one token each")
    ids: list[int] = []
    for token in tokens:
        if isinstance(token, str):
            own = encode_texts(tokenizer, [token], begin=False)[0]
            if len(own) != 1:
                pieces = ", ".join(repr(tokenizer.decode([i])) for i in own)
                raise ValueError(
                    f"{what}: {token!r} is {len(own)} tokens ({pieces}): give one token, or its id; many tokenizers "
                    f"have one for {' ' + token!r}"
                )
            ids += own
        elif isinstance(token, bool) or not isinstance(token, int) or not 0 <= token < vocabulary:
            raise ValueError(f"{what}: {token!r} is no token of a vocabulary of {vocabulary}")
        else:
            ids.append(token)
    return sorted(set(ids))
