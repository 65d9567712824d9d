"""What a model gives at the last token of many prompts under many plans, in forward passes that compute nothing twice.

Two parts of a pass are the same for many rows. The tokens that all prompts begin with are run once for each plan, and
every batch continues their keys and values. The layers in front of the first one that a plan changes are run once for
each prompt, and the rows of the plan begin behind them. Both are exact up to rounding. Where the model does not allow
one of them, or little is saved, whole passes are made. It never samples, and a plan that asks where a prompt's tokens
stand is run on whole prompts.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from faststeer.compile import hook_points, resolve_layers
from faststeer.hf.anatomy import find_hook_points
from faststeer.hf.batching import (
    batches,
    check_evaluating,
    forward_arguments,
    model_device,
    pad,
    progress_bar,
    rounds,
)
from faststeer.hf.cache import cache_in
from faststeer.hf.changes import Changes, changing
from faststeer.hf.hook_points import HookPoints, first_output
from faststeer.hf.hooks import read
from faststeer.hf.known import known_of
from faststeer.hf.prefix import Prefix, common_length, common_prefix, rounding_bound
from faststeer.hf.steering import Steering, is_steered, steer
from faststeer.plan import Plan, site

Row = tuple[int, Plan | None]

# Whole passes are made where sharing leaves more than this part of them to run.
LARGEST_PART = 0.95
# Plans whose first layers are at most this part of all layers apart begin together: a few layers more are run, and the
# rows of a batch are of similar length.
WINDOW = 1 / 10
# What is kept of the layers in front of the plans takes at most this much memory. With more, fewer layers are kept, and
# rows begin at the next one in front.
STATES_BYTES = 2**31


class LastTokens(NamedTuple):
    """What a batch gives.

    Args:
        rows: the numbers of its rows.
        logits: `[batch, vocabulary]` of the next token, in the model's dtype and on its device.
        activations: `{layer: [batch, hidden]}`, `resid_post` of the layers asked for, as steering leaves it.
    """

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
    common = find_common(model, encoded, rows, layers, pad_id, batch_size) if share else None
    entering: Entering | None = None
    work: list[tuple[int | None, list[Plan], list[list[int]]]] = []  # first layer, plans, batches of rows
    lengths = [len(encoded[prompt]) for prompt, _ in rows]
    for begin, plans, numbers in _rounds(rows, batch_size, common):
        groups = batches([lengths[number] for number in numbers], batch_size)
        work.append((begin, plans, [[numbers[index] for index in group] for group in groups]))
    n_layers = 1 if common is None else common.points.n_layers
    weights = [float(len(group) * (n_layers - (begin or 0))) for begin, _, groups in work for group in groups]
    with progress_bar("Scoring", len(weights), progress, weights=weights) as advance:
        for begin, plans, groups in work:
            if common is not None and begin is not None and entering is None:
                entering = _run_ahead(model, common, encoded, rows, pad_id, batch_size)
            with (
                steer(model, plans) if plans else nullcontext() as steering,
                # Entered behind steering, whose results it takes.
                read(model, "resid_post", layers, [-1]) if layers else nullcontext({}) as taken,
            ):
                rest = None
                if common is not None and begin is not None and entering is not None and steering is not None:
                    rest = _Rest(model, common, entering, begin, plans, steering, pad_id)
                for group in groups:
                    prompts, mine = [rows[number][0] for number in group], [rows[number][1] for number in group]
                    if steering is not None:
                        steering.assign(mine)
                    ids = [encoded[prompt] for prompt in prompts]
                    run = model(**Prefix().arguments(model, ids, pad_id)) if rest is None else rest(prompts, ids, mine)
                    yield LastTokens(group, run.logits[:, -1], {layer: taken[layer][:, 0] for layer in layers})
                    advance()


@dataclass(frozen=True)
class Common:
    """What the rows of several plans have in common.

    Args:
        points: of the model.
        tuples: of each layer, whether it gives a tuple of one tensor.
        prefix: the tokens that all prompts begin with, as the unsteered model reads them.
        begins: `{id(plan): layer}`, the first layer that runs for the rows of a plan. Plans that are not in it are run
            on whole prompts.
        part: of the tokens, times layers, of whole passes: what is left to run.
    """

    points: HookPoints
    tuples: Sequence[bool | None]
    prefix: Prefix
    begins: Mapping[int, int]
    part: float


class Entering(NamedTuple):
    """What enters the layers at which passes begin, without a plan.

    Args:
        prefix: `{layer: [1, tokens, hidden]}`, of the common tokens.
        rest: `{layer: [prompts, tokens, hidden]}`, of the rest of each prompt, padded on the left.
    """

    prefix: dict[int, Tensor]
    rest: dict[int, Tensor]


class _Rest:
    """Runs what is not common to the rows of some plans: behind the prefix, from the layer `begin` on."""

    def __init__(
        self,
        model: Any,
        common: Common,
        entering: Entering,
        begin: int,
        plans: Sequence[Plan],
        steering: Steering,
        pad_id: int,
    ) -> None:
        self._model, self._common, self._begin, self._pad_id = model, common, begin, pad_id
        self._entering = entering.rest.get(begin)
        self._number = {id(plan): number for number, plan in enumerate(plans)}
        self._layers: list[tuple[Tensor, Tensor]] = []  # keys and values of the prefix, a row for each plan
        if common.prefix.length:
            steering.assign(list(plans))
            batch = pad([common.prefix.tokens] * len(plans), pad_id, model_device(model))
            with changing() as changes:
                if begin:
                    states = entering.prefix[begin].expand(len(plans), -1, -1)
                    _begin_at(changes, model, common.points, common.tuples, begin, states)
                cache = cache_in(model(**(forward_arguments(model, batch) | {"use_cache": True})))
            # Nothing reads what the layers in front of `begin` keep but its length.
            self._layers = [
                plain if number < begin else (cache.layers[number].keys, cache.layers[number].values)
                for number, plain in enumerate(common.prefix.layers)
            ]

    def __call__(self, prompts: Sequence[int], ids: Sequence[Sequence[int]], plans: Sequence[Plan | None]) -> Any:
        """Return the model's output for the prompts of these numbers, which are the whole prompts `ids`."""
        common = self._common
        numbers = torch.tensor([self._number[id(plan)] for plan in plans])
        own = [
            (keys, values) if number < self._begin else (keys[numbers.to(keys.device)], values[numbers.to(keys.device)])
            for number, (keys, values) in enumerate(self._layers)
        ]
        arguments = Prefix(common.prefix.tokens, own).arguments(self._model, ids, self._pad_id)
        with changing() as changes:
            if self._entering is not None:
                width = max(map(len, ids)) - common.prefix.length
                states = self._entering[torch.tensor(prompts, device=self._entering.device), -width:]
                _begin_at(changes, self._model, common.points, common.tuples, self._begin, states)
            return self._model(**arguments)


def _begin_at(
    changes: Changes, model: Any, points: HookPoints, tuples: Sequence[bool | None], begin: int, states: Tensor
) -> None:
    """Let every layer in front of `begin` give `states` and compute nothing, until the changes are undone."""
    for number in range(begin):
        output = (states,) if tuples[number] else states
        changes.replace(points.layer(model, number), "forward", lambda *args, _output=output, **kwargs: _output)


def _rounds(
    rows: Sequence[Row], plans_at_once: int, common: Common | None
) -> Iterator[tuple[int | None, list[Plan], list[int]]]:
    """Yield (the first layer that runs, plans, the numbers of their rows); None: whole prompts."""
    by_begin: dict[int | None, list[int]] = {}
    for number, (_, plan) in enumerate(rows):
        by_begin.setdefault(None if common is None else common.begins.get(id(plan)), []).append(number)
    for begin, numbers in sorted(by_begin.items(), key=lambda item: -1 if item[0] is None else item[0]):
        for plans, some in rounds([rows[number] for number in numbers], plans_at_once):
            yield begin, plans, [numbers[index] for index in some]


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


def find_common(
    model: Any,
    encoded: Sequence[Sequence[int]],
    rows: Sequence[Row],
    layers: Sequence[int],
    pad_id: int,
    batch_size: int,
) -> Common | None:
    """Return what the rows of `last_tokens` have in common; None where the model allows nothing, or little is saved."""
    plans = {id(plan): plan for _, plan in rows if plan is not None}
    if not plans or is_steered(model):
        return None
    points = find_hook_points(model)
    if points.mixed or points.loops > 1 or points.streams != (1, 1):
        return None
    firsts = {key: first for key, plan in plans.items() if (first := first_layer(plan, points.n_layers)) is not None}
    begins = {key: min(first, *layers) if layers else first for key, first in firsts.items()}
    begins = _together(begins, [id(plan) for _, plan in rows], int(WINDOW * points.n_layers), batch_size)
    used = sorted({prompt for prompt, plan in rows if id(plan) in begins})
    prompts = [encoded[prompt] for prompt in used]
    if not prompts or _cost(encoded, rows, begins, points.n_layers, common_length(prompts, 1)) > LARGEST_PART:
        return None
    prefix = _prefix_of(model, points, prompts, pad_id)
    width = max(map(len, prompts)) - prefix.length
    begins = _fewer(begins, STATES_BYTES // (len(encoded) * width * points.hidden_size * model.dtype.itemsize))
    allowed, tuples = _allowed(model, points, set(begins.values()), prompts, pad_id)
    begins = {key: begin if begin in allowed else 0 for key, begin in begins.items()}
    part = _cost(encoded, rows, begins, points.n_layers, prefix.length)
    return None if part > LARGEST_PART else Common(points, tuples, prefix, begins, part)


def _run_ahead(
    model: Any, common: Common, encoded: Sequence[Sequence[int]], rows: Sequence[Row], pad_id: int, batch_size: int
) -> Entering:
    """Run the unsteered model once on the common tokens and on the rest of each prompt."""
    begins = set(common.begins.values()) - {0}
    ahead, rest = dict[int, Tensor](), dict[int, Tensor]()
    if not begins:
        return Entering(ahead, rest)
    if common.prefix.length:
        ahead, _ = _entering(model, common.points, begins, Prefix(), [common.prefix.tokens], pad_id)
    prompts = sorted({prompt for prompt, plan in rows if id(plan) in common.begins})
    width = max(len(encoded[prompt]) for prompt in prompts) - common.prefix.length
    for group in batches([len(encoded[prompt]) for prompt in prompts], batch_size):
        here = [prompts[index] for index in group]
        entering, _ = _entering(model, common.points, begins, common.prefix, [encoded[p] for p in here], pad_id)
        for begin, x in entering.items():
            table = rest.setdefault(begin, x.new_zeros(len(encoded), width, x.shape[-1]))
            table[here, width - x.shape[1] :] = x
    return Entering(ahead, rest)


def _cost(
    encoded: Sequence[Sequence[int]], rows: Sequence[Row], begins: Mapping[int, int], n_layers: int, length: int
) -> float:
    """Return the part of the tokens, times layers, of whole passes that is left to run where `length` tokens are
    common, what is run ahead included."""
    mine = [(len(encoded[prompt]), begins[id(plan)]) for prompt, plan in rows if id(plan) in begins]
    ahead = sum(len(encoded[prompt]) for prompt in {prompt for prompt, plan in rows if id(plan) in begins})
    left = sum((tokens - length) * (n_layers - begin) for tokens, begin in mine)
    left += sum(length * (n_layers - begin) for begin in begins.values())
    return (left + ahead * n_layers) / (sum(tokens for tokens, _ in mine) * n_layers)


def _together(begins: Mapping[int, int], plan_of_row: Sequence[int], window: int, batch_size: int) -> dict[int, int]:
    """Let plans that begin near each other begin at the first of them: at most `window` layers apart, or further where
    their rows fill no batch. What begins at layer 0 stays alone."""
    n_rows = Counter(begins[plan] for plan in plan_of_row if plan in begins)
    merged, first, filled = {0: 0}, 0, 0
    for begin in sorted(n_rows):
        if not first or (begin > first + window and filled >= batch_size):
            first, filled = begin, 0
        filled += n_rows[begin]
        merged[begin] = first
    return {plan: merged[begin] for plan, begin in begins.items()}


def _fewer(begins: Mapping[int, int], most: int) -> dict[int, int]:
    """Let plans begin at no more than `most` different layers, 0 apart: at the next in front of their own."""
    layers = sorted(set(begins.values()) - {0})
    while len(layers) > most:
        layers = layers[::2] if len(layers) > 1 else []
    return {key: max((layer for layer in layers if layer <= begin), default=0) for key, begin in begins.items()}


def _prefix_of(model: Any, points: HookPoints, prompts: Sequence[Sequence[int]], pad_id: int) -> Prefix:
    readable = [layer for layer in range(points.n_layers) if points.has("resid_post", layer)]
    with read(model, "resid_post", readable, [-1]) as taken:

        def run(arguments: dict[str, Any]) -> list[Tensor]:
            model(**arguments)
            return [taken[layer] for layer in readable]

        prefix = common_prefix(model, prompts, 1, pad_id, run)
    return prefix if len(prefix.layers) == points.n_layers else Prefix()


def _entering(
    model: Any, points: HookPoints, begins: Collection[int], prefix: Prefix, rows: Any, pad_id: int
) -> tuple[dict[int, Tensor], Any]:
    """Run the unsteered model on rows behind a prefix. Return what enters each of the layers `begins`, 0 where rows are
    padded, and the model's output."""
    taken: dict[int, Tensor] = {}
    arguments = prefix.arguments(model, rows, pad_id)
    with changing() as changes:
        for begin in begins:

            def take(_module: Any, _args: Any, output: Any, begin: int = begin) -> None:
                taken[begin] = first_output(output).clone()

            changes.hook(points.layer(model, begin - 1).register_forward_hook, take)
        output = model(**arguments)
    for x in taken.values():
        real = torch.zeros(x.shape[:2], dtype=torch.bool, device=x.device)
        for row, ids in enumerate(rows):
            real[row, x.shape[1] - (len(ids) - prefix.length) :] = True
        x.masked_fill_(~real.unsqueeze(-1), 0)
    return taken, output


def _allowed(
    model: Any, points: HookPoints, begins: Collection[int], prompts: Sequence[Sequence[int]], pad_id: int
) -> tuple[set[int], Sequence[bool | None]]:
    """Return the layers among `begins` at which a pass can begin, and of each layer whether it gives a tuple.

    Two short rows are run whole, and then from each of the layers on, in the other order: a layer that looks at
    something else that a layer in front of it left behind would look at the wrong row.
    """
    known = known_of(model)
    tuples: list[bool | None] = known.get("layers that give tuples", lambda: [None] * points.n_layers)
    allowed: dict[int, bool] = known.get("layers at which a pass can begin", dict)
    missing = sorted(set(begins) - allowed.keys() - {0}, reverse=True)
    if missing:
        rows = [list(prompts[0][-6:]), list(prompts[-1][-4:])]

        def note(number: int, output: Any) -> None:
            whole = isinstance(output, Tensor)
            tuples[number] = None if not whole and len(output) > 1 else not whole

        with changing() as changes:
            for number in range(points.n_layers):
                changes.hook(
                    points.layer(model, number).register_forward_hook, lambda _m, _a, out, n=number: note(n, out)
                )
            entering, whole = _entering(model, points, missing, Prefix(), rows, pad_id)
        arguments = Prefix().arguments(model, rows[::-1], pad_id)
        # From the last layer down: what a layer in front left behind is that of the whole pass then, in its order.
        for begin in missing:
            ours = _began(model, points, tuples, begin, entering[begin].flip(0), arguments)
            allowed[begin] = ours is not None and _same(
                ours.flip(0), whole.logits[:, -1], rounding_bound(model.dtype, points.n_layers)
            )
    return {begin for begin in begins if allowed.get(begin)}, tuples


def _began(
    model: Any, points: HookPoints, tuples: Sequence[bool | None], begin: int, states: Tensor, arguments: Any
) -> Tensor | None:
    """Return the logits of a pass that begins at a layer; None where the model cannot."""
    if None in tuples[:begin]:
        return None
    with changing() as changes:
        _begin_at(changes, model, points, tuples, begin, states)
        try:
            return model(**arguments).logits[:, -1]
        except TimeoutError:  # a signal handler's, not the model's
            raise
        except Exception:  # what it says depends on the model: a layer misses what one in front of it leaves for it
            return None


def _same(ours: Tensor, reference: Tensor, bound: float) -> bool:
    ours, reference = ours.double(), reference.double()
    return bool(((ours - reference).norm(dim=-1) <= bound * reference.norm(dim=-1)).all())
