"""What a model gives at the last token of many prompts under many plans, in forward passes that compute nothing twice.

Two parts of a pass are the same for many rows. The tokens that all prompts begin with are run once for each plan, and
every batch continues their keys and values. The layers in front of the first one that a plan changes are run once for
each prompt, and the rows of the plan begin behind them. Both are exact up to rounding. Where the model does not allow
one of them, or little is saved, whole passes are made. It never samples, and a plan that asks where a prompt's tokens
stand is run on whole prompts.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from faststeer.compile import hook_points, resolve_layers
from faststeer.hf.anatomy import find_hook_points
from faststeer.hf.batching import batches, check_evaluating, rounds
from faststeer.hf.cache import cache_in
from faststeer.hf.changes import changing
from faststeer.hf.hooks import read
from faststeer.hf.known import known_of
from faststeer.hf.prefix import Prefix, common_length, common_prefix, keys_and_values, near, rounding_bound
from faststeer.hf.steering import is_steered, steer
from faststeer.plan import Plan, distinct, site
from faststeer.progress import progress_bar

Row = tuple[int, Plan | None]

WHOLE = -1  # instead of the layer at which a pass begins: nothing is shared
LARGEST_PART = 0.95  # of whole passes: where more is left to run, nothing is shared
MOST_BEGINS = 10  # layers beside 0 at which plans begin, so that batches are full and their rows of similar length
STATES_BYTES = 2**31  # of what enters these layers, at most; with more, plans begin at fewer


class LastTokens(NamedTuple):
    """What a batch gives: its rows' numbers; the next token's logits `[batch, vocabulary]`, in the model's dtype and on
    its device; `resid_post` of the layers asked for, `{layer: [batch, hidden]}`, as steering leaves it."""

    rows: list[int]
    logits: Tensor
    activations: dict[int, Tensor]


@torch.no_grad()
def last_tokens(
    model: Any,
    encoded: Sequence[Sequence[int]],
    rows: Sequence[Row],
    *,
    layers: Sequence[int] = (),
    pad_id: int = 0,
    batch_size: int = 32,
    progress: bool = False,
    share: bool = True,
) -> Iterator[LastTokens]:
    """Yield what every row gives at its last token, in batches, until every row was seen once.

    A row is (index into `encoded`, plan), and the rows of a batch may have different plans, which is how many
    candidates share a pass: plans are put on the model `batch_size` at a time, and all their rows pass before the next
    ones are. Rows without a plan pass first, the model untouched.

    Args:
        layers: whose `resid_post` is given as well.
        share: run what rows have in common once; False: whole passes.

    Raises:
        ValueError: a model in training mode, a batch size below 1, a plan that does not fit the model.
    """
    check_evaluating(model)
    common = find_common(model, encoded, rows, layers, pad_id, batch_size) if share else Common(Prefix(model, pad_id))
    begins = [common.begins.get(id(plan), WHOLE) for _, plan in rows]
    plan_of, lengths = [plan for _, plan in rows], [len(encoded[prompt]) for prompt, _ in rows]
    work = [  # where passes begin, plans, batches of rows
        (begin, plans, groups)
        for begin in sorted(set(begins))
        for plans, groups in rounds(plan_of, lengths, batch_size, [n for n, b in enumerate(begins) if b == begin])
        if groups
    ]
    depth = max(len(common.modules), 1)
    weights = [float(len(group) * (depth - max(begin, 0))) for begin, _, groups in work for group in groups]
    with progress_bar("Scoring", len(weights), progress, weights=weights) as advance:
        heads, rests = _run_ahead(common, encoded, rows, batch_size)
        for begin, plans, groups in work:
            with (
                steer(model, plans) if plans else nullcontext() as steering,
                # Entered behind steering, whose results it takes.
                read(model, "resid_post", layers, [-1]) if layers else nullcontext({}) as residuals,
            ):
                prefix = Prefix(model, pad_id)
                if steering is not None and begin != WHOLE and common.prefix.length:
                    steering.assign(plans)
                    prefix = _prefix_under(common, len(plans), begin, heads.get(begin))
                place = {id(plan): number for number, plan in enumerate(plans or [None])}
                for group in groups:
                    prompts, mine = zip(*(rows[number] for number in group), strict=True)
                    if steering is not None:
                        steering.assign(list(mine))
                    own = prefix.rows([place[id(plan)] for plan in mine])
                    arguments = own.arguments([encoded[prompt] for prompt in prompts])
                    width = arguments["input_ids"].shape[1]
                    states = rests[begin][list(prompts), -width:] if begin in rests else None
                    run = _run_from(common, begin, states, arguments)
                    yield LastTokens(group, run.logits[:, -1], {layer: residuals[layer][:, 0] for layer in layers})
                    advance()


@dataclass(frozen=True)
class Common:
    """What the rows of several plans have in common; nothing by default.

    Args:
        prefix: the tokens that all prompts begin with, as the unsteered model reads them.
        modules: the model's layers.
        begins: `{id(plan): layer}`, the first layer that runs for the rows of a plan. Plans that are not in it are run
            on whole prompts.
        part: of the tokens, times layers, of whole passes: what is left to run.
    """

    prefix: Prefix
    modules: Sequence[nn.Module] = ()
    begins: Mapping[int, int] = field(default_factory=dict)
    part: float = 1.0


def find_common(
    model: Any,
    encoded: Sequence[Sequence[int]],
    rows: Sequence[Row],
    layers: Sequence[int],
    pad_id: int,
    batch_size: int,
) -> Common:
    """Return what the rows of `last_tokens` have in common; nothing where the model allows nothing, or little is
    saved."""
    nothing, plans = Common(Prefix(model, pad_id)), distinct(plan for _, plan in rows)
    if not plans or is_steered(model):
        return nothing
    points = find_hook_points(model)
    if points.mixed or points.loops > 1 or points.streams != (1, 1):
        return nothing
    n_layers = points.n_layers
    firsts = {id(plan): first_layer(plan, n_layers) for plan in plans}
    begins = {plan: min([first, *layers]) for plan, first in firsts.items() if first is not None}
    sharing = [(prompt, id(plan)) for prompt, plan in rows if id(plan) in begins]
    prompts = [encoded[prompt] for prompt in sorted({prompt for prompt, _ in sharing})]

    def part(first: Mapping[int, int], length: int) -> float:
        """`Common.part` if plans begin at these layers and `length` tokens are common; with what is run ahead."""
        left = sum((len(encoded[prompt]) - length) * (n_layers - first[plan]) for prompt, plan in sharing)
        left += sum(length * (n_layers - layer) for layer in first.values())
        return (left + sum(map(len, prompts)) * n_layers) / (sum(len(encoded[p]) for p, _ in sharing) * n_layers)

    if not prompts or part(begins, common_length(prompts, 1)) > LARGEST_PART:
        return nothing
    prefix = common_prefix(model, prompts, 1, pad_id)
    size = len(encoded) * max(map(len, prompts)) * points.hidden_size * model.dtype.itemsize
    begins = _fewer(begins, min(MOST_BEGINS, max(len(sharing) // batch_size, 1), STATES_BYTES // size))
    modules = [points.layer(model, layer) for layer in range(n_layers)]
    behind_streams = {begin for begin in begins.values() if begin and points.has("resid_post", begin - 1)}
    allowed = _allowed(replace(nothing, modules=modules), behind_streams, prompts)
    begins = {plan: begin if begin in allowed else 0 for plan, begin in begins.items()}
    left = part(begins, prefix.length)
    return nothing if left > LARGEST_PART else Common(prefix, modules, begins, left)


def first_layer(plan: Plan, n_layers: int) -> int | None:
    """Return the first layer whose module gives something else under a plan; None for a plan that asks where a prompt's
    tokens stand (positions, latched gates). `n_layers` - 1 for a plan that does nothing.

    What enters a layer is steered where it leaves the layer before.
    """
    sites = [site("resid_post", n_layers - 1)]
    for intervention in plan:
        if intervention.positions != "all" or (intervention.when is not None and intervention.when.latched):
            return None
        points = hook_points(intervention)
        sites += [site(at, layer) for layer in resolve_layers(intervention, n_layers) for at in points]
    return max(min(sites) - 1, 0) // 4


def _fewer(begins: Mapping[int, int], most: int) -> dict[int, int]:
    """Let plans begin at no more than `most` different layers, 0 apart: at the next in front of their own."""
    layers = sorted({0, *begins.values()})
    size = math.ceil(len(layers) / (most + 1))
    return {plan: layers[layers.index(begin) // size * size] for plan, begin in begins.items()}


def _run_ahead(
    common: Common, encoded: Sequence[Sequence[int]], rows: Sequence[Row], batch_size: int
) -> tuple[dict[int, Tensor], dict[int, Tensor]]:
    """Run the unsteered model once on the common tokens and on the rest of each prompt. Return what enters each layer
    at which plans begin: `[1, tokens, hidden]`, and `[prompts, tokens, hidden]`, padded on the left."""
    begins, heads, rests = set(common.begins.values()) - {0}, dict[int, Tensor](), dict[int, Tensor]()
    if not begins:
        return heads, rests
    if common.prefix.length:
        heads, _ = _entering(replace(common.prefix, tokens=(), layers=()), begins, [common.prefix.tokens])
    prompts = sorted({prompt for prompt, plan in rows if id(plan) in common.begins})
    width = max(len(encoded[prompt]) for prompt in prompts) - common.prefix.length
    for group in batches([len(encoded[prompt]) for prompt in prompts], batch_size):
        here = [prompts[index] for index in group]
        entering, _ = _entering(common.prefix, begins, [encoded[prompt] for prompt in here])
        for begin, x in entering.items():
            rests.setdefault(begin, x.new_zeros(len(encoded), width, x.shape[-1]))[here, -x.shape[1] :] = x
    return heads, rests


def _entering(prefix: Prefix, begins: Collection[int], rows: Sequence[Sequence[int]]) -> tuple[dict[int, Tensor], Any]:
    """Run the unsteered model on prompts. Return what enters each of the layers `begins`, and the model's output."""
    with read(prefix.model, "resid_post", [begin - 1 for begin in begins]) as residuals:
        output = prefix.model(**prefix.arguments(rows))
    return {begin: residuals[begin - 1] for begin in begins}, output


def _run_from(common: Common, begin: int, states: Tensor | None, arguments: dict[str, Any]) -> Any:
    """Run the model with layers in front of `begin` that give `states` and compute nothing."""
    with changing() as changes:
        for module in common.modules[: max(begin, 0)]:
            changes.replace(module, "forward", lambda *args, **kwargs: states)
        return common.prefix.model(**arguments)


def _prefix_under(common: Common, n: int, begin: int, states: Tensor | None) -> Prefix:
    """Return the common tokens as they are read under the plans of `n` rows, a row each."""
    prefix = common.prefix
    arguments = replace(prefix, tokens=(), layers=()).arguments([prefix.tokens] * n) | {"use_cache": True}
    ahead = None if states is None else states.expand(n, -1, -1)
    cache = cache_in(_run_from(common, begin, ahead, arguments))
    # Nothing reads what the layers in front of `begin` keep but its length.
    return replace(prefix, layers=[*prefix.layers[:begin], *keys_and_values(cache, begin)])


def _allowed(common: Common, begins: Collection[int], prompts: Sequence[Sequence[int]]) -> set[int]:
    """Return the layers among `begins` at which a pass can begin.

    Two short rows are run whole, and then from each of the layers on, in the other order: a layer that looks at
    something else that a layer in front of it left behind would look at the wrong row.
    """
    model = common.prefix.model
    allowed: dict[int, bool] = known_of(model).get("layers at which a pass can begin", dict)
    missing = sorted(set(begins) - allowed.keys(), reverse=True)
    if missing:
        rows = [list(prompts[0][-6:]), list(prompts[-1][-4:])]
        entering, whole = _entering(common.prefix, missing, rows)
        arguments = common.prefix.arguments(rows[::-1])
        bound = rounding_bound(model.dtype, len(common.modules))
        # From the last layer down: what a layer in front left behind is that of the whole pass then, in its order.
        for begin in missing:
            try:
                ours = _run_from(common, begin, entering[begin].flip(0), arguments).logits[:, -1].flip(0)
                allowed[begin] = near(ours, whole.logits[:, -1], bound)
            except TimeoutError:  # a signal handler's, not the model's
                raise
            except Exception:  # what it says depends on the model: a layer misses what one in front of it leaves for it
                allowed[begin] = False
    return {begin for begin in begins if allowed.get(begin)}
