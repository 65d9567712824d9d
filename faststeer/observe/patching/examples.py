"""What patching explains: prompts with a completion, and the positions where steering changes the next token."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from faststeer.evaluate.generate import completions as all_completions
from faststeer.generator import SamplingParams
from faststeer.hf.batching import Prompt, TokenRow, check_evaluating, encode
from faststeer.hf.hook_points import HookPoints
from faststeer.observe.additions import additions
from faststeer.observe.difference import difference, kept_positions
from faststeer.plan import Plan, site_name

ANALYSIS = "patching explains added vectors"
Side = Literal["steered", "base"]


@dataclass(frozen=True)
class Example(TokenRow):
    """One completion, read by the steered and by the unsteered model alike.

    Attributes:
        prompt, completion: token ids.
        plan: the steering, added vectors at one place in the residual stream.
        kept: indices into prompt + completion after which the two models' favourites differ.
        steered_tokens, base_tokens: their favourites there.
    """

    plan: Plan
    kept: list[int]
    steered_tokens: list[int]
    base_tokens: list[int]


def examples(
    model: nn.Module,
    tokenizer: Any,
    prompts: Sequence[Prompt],
    plan: Plan,
    *,
    completions: Sequence[Side] = ("steered", "base"),
    changed: Callable[[str, str], bool] | None = None,
    max_new_tokens: int = 64,
    system: str | None = None,
    batch_size: int = 16,
    progress: bool = False,
) -> list[Example]:
    """Complete prompts greedily, steered and unsteered, and find the positions where the two models, reading the same
    completion, would go on differently.

    The paper's four data sets are two calls: harmful prompts with the plan that makes the model comply, harmless ones
    with the plan that makes it refuse, each with both completions; the lists are added. Examples without a position
    are left out. Source: arXiv 2604.08524.

    Args:
        prompts: texts or chat message lists.
        plan: `Add` alone, at `resid_pre` or `resid_post` of one layer.
        completions: whose: the steered model's, the unsteered one's, or both (two examples per prompt).
        changed: `changed(base, steered)`: whether the answers (texts) show that steering worked on a prompt; others are
            left out. With a judge: `lambda base, steered: is_refusal(steered) and not is_refusal(base)`.
        max_new_tokens: where a completion ends if no end-of-sequence token comes first; that token belongs to it.
        batch_size: prompts per pass, each of which has two rows.

    Raises:
        ValueError: a plan that does anything else, nothing changed on any prompt, no position anywhere where the two
            models differ.
    """
    sides = tuple(dict.fromkeys(completions))
    if not sides or set(sides) - {"steered", "base"}:
        raise ValueError(f"completions are {list(completions)!r}: expected 'steered', 'base' or both")
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens is {max_new_tokens}: expected at least 1")
    check_evaluating(model)
    encoded = encode(tokenizer, prompts, system)
    n = len(encoded)
    both = [None] * n + [plan] * n
    how: dict[str, Any] = {"batch_size": 2 * batch_size, "progress": progress}
    answered = all_completions(model, tokenizer, [*encoded, *encoded], both, SamplingParams(max_new_tokens), **how)
    # With the token that ended an answer.
    ids = [each.token_ids + ([] if each.stop_token is None else [each.stop_token]) for each in answered]
    answers = list(zip(ids[:n], ids[n:], strict=True))
    texts = [[tokenizer.decode(one, skip_special_tokens=True) for one in answer] for answer in answers]
    chosen = [index for index in range(n) if changed is None or changed(*texts[index])]
    if not chosen:
        raise ValueError(
            f"steering changed none of {len(encoded)} answers as changed= asks, so there is nothing to explain: use a "
            "larger coefficient or another layer, prompts whose answer it changes, or another judge"
        )
    pairs = [(index, side) for side in sides for index in chosen]
    completed = [answers[index][side == "steered"] for index, side in pairs]
    how = {"system": system, "batch_size": batch_size, "progress": progress}
    return with_positions(model, tokenizer, [prompts[index] for index, _ in pairs], completed, plan, **how)


def with_positions(
    model: nn.Module,
    tokenizer: Any,
    prompts: Sequence[Prompt],
    completions: Sequence[str | Sequence[int]],
    plan: Plan,
    **options: Any,
) -> list[Example]:
    """As `examples`, of completions that are given: texts or token ids; options are `system`, `batch_size`, `progress`.

    Raises:
        ValueError: as `examples`; another number of completions than prompts, a completion without tokens.
    """
    # Only the next tokens are of interest: one layer will do.
    differences = difference(model, tokenizer, prompts, plan, completions=completions, layers=[-1], **options)
    for index, row in enumerate(differences):
        if len(row.token_ids) == row.n_prompt:
            raise ValueError(f"completions[{index}] has no tokens: expected at least one")
    rows = []
    for row, kept in zip(differences, kept_positions(differences), strict=True):
        if kept:
            n = row.n_prompt
            tokens = row.steered_token[kept].tolist(), row.base_token[kept].tolist()
            rows.append(Example(row.token_ids[:n], row.token_ids[n:], plan, kept, *tokens))
    return rows


# What plans add -------------------------------------------------------------------------------------------------------


def steered_layer(group: Sequence[Example], points: HookPoints) -> int:
    """The layer that reads the steered stream first, the same for all examples.

    Raises:
        ValueError: no examples; a plan that does not add vectors at one place in the residual stream before a layer;
            examples steered at different places.
    """
    if not group:
        raise ValueError("no examples: make them with examples(model, tokenizer, prompts, plan)")
    for number, example in enumerate(group):
        if not example.kept:
            raise ValueError(f"examples[{number}] has no position where steered and base differ: leave it out")
    plans = {id(example.plan): example.plan for example in group}.values()
    sites = {site for each in additions(dict(enumerate(plans)), points, ANALYSIS) for site in each.by_site}
    names = [site_name(number, points.n_layers) for number in sorted(sites)]
    if len(names) != 1 or names[0][0] != "resid_pre":
        where = ", ".join(f"{at} of layer {layer}" for at, layer in names) or "no place"
        raise ValueError(
            f"patching explains vectors added to the residual stream before one layer, but these are added at {where}: "
            "use Add with at='resid_pre' (or 'resid_post' of the layer before) and one layer"
        )
    return names[0][1]


def added(group: Sequence[Example], batch: dict[str, Tensor], points: HookPoints, dtype: torch.dtype) -> Tensor:
    """S `[batch, tokens, hidden]`: what steering adds to each token, nothing to padding."""
    mask = batch["attention_mask"].bool()
    total = torch.zeros(*mask.shape, points.hidden_size, dtype=dtype, device=mask.device)
    for each in additions({row: example.plan for row, example in enumerate(group)}, points, ANALYSIS):
        end = mask.shape[1] - len(group[each.slot].completion)
        here = mask[each.slot].clone()
        here[: max(end + each.low, 0)] = here[max(end + each.high, 0) :] = False
        total[each.slot] += here.unsqueeze(-1) * each.before(max(each.by_site)).to(total)
    return total
