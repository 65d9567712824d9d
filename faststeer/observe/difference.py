"""Steered against unsteered, token by token: how far the residual stream moves at every layer, and what becomes of the
next token.

Both runs read the same tokens, in the two halves of one batch, and every activation is reduced where it arises: what is
kept is a few numbers per layer and token.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from faststeer.compile import layer_numbers
from faststeer.evaluate.divergence import kl_divergence
from faststeer.hf.anatomy import find_hook_points
from faststeer.hf.batching import (
    Prompt,
    TokenRow,
    check_evaluating,
    forward_arguments,
    model_device,
    pad_rows,
    padding_id,
)
from faststeer.hf.hooks import read
from faststeer.hf.norms import wide
from faststeer.hf.steering import steer
from faststeer.observe.memory import rows_in_batches
from faststeer.observe.tokens import rows
from faststeer.plan import Plan, Plans, plans_for
from faststeer.vector import HookPoint, check_direction, check_hook_point

CHUNK = 16  # tokens whose logits are compared at once in fp64


@dataclass(frozen=True, eq=False)
class Difference:
    """What steering changes in one row of tokens; fp32 on the CPU, `kl` fp64. h: activation, d: unit direction.

    Attributes:
        token_ids: `[tokens]`, prompt and completion. n_prompt: how many are the prompt.
        at, layers: where activations were compared.
        norm: `[layers, tokens]` |h_steered - h_base|.
        base_norm: `[layers, tokens]` |h_base|.
        cosine: `[layers, tokens]` cos(h_base, h_steered).
        base_projection, steered_projection: `[layers, tokens, directions]` h . d.
        kl: `[tokens]` KL(P_base || P_steered) of the next token after each, in nats.
        base_token, steered_token: `[tokens]` each side's favourite next token.
        base_token_rank: `[tokens]` rank of the base's favourite among the steered logits (0: the first).
        steered_token_rank: `[tokens]` rank of the steered favourite among the base's logits.
    """

    token_ids: list[int]
    n_prompt: int
    at: HookPoint
    layers: tuple[int, ...]
    norm: Tensor
    base_norm: Tensor
    cosine: Tensor
    base_projection: Tensor
    steered_projection: Tensor
    kl: Tensor
    base_token: Tensor
    steered_token: Tensor
    base_token_rank: Tensor
    steered_token_rank: Tensor

    @property
    def flips(self) -> Tensor:
        """`[tokens]` bool: where both sides have another favourite next token."""
        return self.base_token != self.steered_token

    @property
    def relative_norm(self) -> Tensor:
        """|h_steered - h_base| / |h_base|."""
        return self.norm / self.base_norm


@torch.no_grad()
def difference(
    model: nn.Module,
    tokenizer: Any,
    prompts: Sequence[Prompt],
    plans: Plans,
    *,
    completions: Sequence[str | Sequence[int]] | None = None,
    at: HookPoint = "resid_post",
    layers: Iterable[int] | None = None,
    directions: Tensor | Mapping[int, Tensor] | None = None,
    system: str | None = None,
    batch_size: int = 16,
    progress: bool = False,
) -> list[Difference]:
    """Compare steered and unsteered run over the same tokens, in the order of the prompts.

    Args:
        prompts: texts or chat message lists. completions: texts or token ids that follow them.
        plans: one for all prompts, or one (or None) per prompt.
        at, layers: where activations are compared (every layer).
        directions: `[hidden]` or `[k, hidden]` to project on, or `{layer: such}` with the same k for all, as in a
            SteeringVector's `directions`; normalised here.
        system: a system prompt put before every prompt.
        batch_size: prompts per forward pass, each of which has two rows; halved, with a warning, where they do not fit.
        progress: show a progress bar on stderr.

    Raises:
        ValueError: as `steer`; directions of another hidden size or without one of the layers; another number of plans
            or completions than prompts.
    """
    check_evaluating(model)
    check_hook_point(at)
    points = find_hook_points(model)
    numbers = tuple(layer_numbers(layers, points.n_layers))
    token_rows = rows(tokenizer, prompts, completions, system)
    row_plans = plans_for(len(token_rows), plans)
    units = _units(directions, numbers, points.hidden_size)

    def run(group: list[int]) -> list[Difference]:
        here = [token_rows[index] for index in group]
        return _compare(model, padding_id(tokenizer), here, [row_plans[index] for index in group], at, numbers, units)

    return rows_in_batches(list(map(len, token_rows)), batch_size, run, "Comparing", progress)


def kept_positions(rows: Sequence[Difference]) -> list[list[int]]:
    """Of each row, the tokens (columns of `token_ids`) after which steered and unsteered run go on differently, among
    those that a token of the completion follows; the last prompt token alone where there is no completion.

    Raises:
        ValueError: there is none in any row.
    """
    kept, tokens = [], 0
    for row in rows:
        own = range(row.n_prompt - 1, max(len(row.token_ids) - 1, row.n_prompt))
        kept.append([t for t in own if row.flips[t]])
        tokens += len(own)
    if not any(kept):
        raise ValueError(
            f"steered and unsteered run have the same favourite next token at all {tokens} positions of {len(rows)} "
            "completion(s), so there is nothing to explain: use a larger coefficient, a layer where the vector acts, "
            "prompts whose answer it changes, or longer completions"
        )
    return kept


def _units(
    directions: Tensor | Mapping[int, Tensor] | None, layers: Sequence[int], hidden_size: int
) -> dict[int, Tensor]:
    """Unit directions `[k, hidden]` for every layer."""
    if directions is None:
        return {layer: torch.zeros(0, hidden_size) for layer in layers}
    by_layer = directions if isinstance(directions, Mapping) else dict.fromkeys(layers, directions)
    if missing := [layer for layer in layers if layer not in by_layer]:
        raise ValueError(f"directions lack the layers {missing}: give one for each compared layer, or layers=")
    made = {}
    for layer in layers:
        d = torch.atleast_2d(check_direction(by_layer[layer], f"the direction of layer {layer}", subspace=True))
        if d.shape[1] != hidden_size:
            raise ValueError(f"the direction of layer {layer} has hidden size {d.shape[1]}, the model {hidden_size}")
        made[layer] = torch.nn.functional.normalize(d.detach().double(), dim=1).float()
    if len(sizes := {len(d) for d in made.values()}) > 1:
        raise ValueError(f"layers have different numbers of directions {sorted(sizes)}: give each the same")
    return made


def _compare(
    model: Any,
    pad_id: int,
    here: list[TokenRow],
    plans: list[Plan | None],
    at: HookPoint,
    layers: Sequence[int],
    units: Mapping[int, Tensor],
) -> list[Difference]:
    batch, ends = pad_rows([*here, *here], pad_id, model_device(model))
    with steer(model, [*([None] * len(here)), *plans]) as steering:
        steering.set_prompt(ends)
        with read(model, at, layers, reduce=_reducer(units)) as statistics:
            arguments = {**forward_arguments(model, batch)}
            arguments.pop("logits_to_keep", None)
            logits = model(**arguments).logits
    numbers = torch.stack([statistics[layer].cpu() for layer in layers])  # [layers, rows, tokens, 3 + 2 k]
    width, made = logits.shape[1], []
    for i, row in enumerate(here):
        own = slice(width - len(row), width)
        norm, base_norm, cosine, *_ = (stats := numbers[:, i, own]).unbind(-1)
        base, steered = stats[..., 3:].chunk(2, dim=-1)
        streams = norm, base_norm, cosine, base, steered
        next_token = _next_token(logits[i, own], logits[len(here) + i, own])
        made.append(Difference(row.ids, len(row.prompt), at, tuple(layers), *streams, *next_token))
    return made


def _reducer(units: Mapping[int, Tensor]) -> Callable[[int, Tensor], Tensor]:
    """From both halves of a batch, `[2 rows, tokens, hidden]`, to `[rows, tokens, 3 + 2 k]`: norm of the difference, of
    the base, their cosine, projections of the base and of the steered."""

    def reduce(layer: int, x: Tensor) -> Tensor:
        base, steered = wide(x).chunk(2)
        unit = units[layer].to(base)
        numbers = [(steered - base).norm(dim=-1), base.norm(dim=-1), torch.cosine_similarity(base, steered, dim=-1)]
        return torch.cat([torch.stack(numbers, dim=-1), base @ unit.T, steered @ unit.T], dim=-1).float()

    return reduce


def _next_token(base: Tensor, steered: Tensor) -> list[Tensor]:
    """KL, favourites and ranks from logits `[tokens, vocabulary]`."""
    pieces = []
    for b, s in zip(base.split(CHUNK), steered.split(CHUNK), strict=True):
        best, new = b.argmax(-1), s.argmax(-1)
        numbers = kl_divergence(b, s), best, new, _rank(s, best), _rank(b, new)
        pieces.append([number.cpu() for number in numbers])
    return [torch.cat(column) for column in zip(*pieces, strict=True)]


def _rank(logits: Tensor, token: Tensor) -> Tensor:
    """How many tokens come before each, `[tokens]`: larger logits, or equal ones at a smaller id, as argmax chooses."""
    own = logits.gather(-1, token.unsqueeze(-1))
    before = torch.arange(logits.shape[-1], device=logits.device) < token.unsqueeze(-1)
    return ((logits > own) | ((logits == own) & before)).sum(-1)
