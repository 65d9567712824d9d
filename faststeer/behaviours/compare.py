"""Methods compared on one behaviour: every vector found on the training prompts, its layer, token and coefficient
chosen on the validation prompts, what it does measured on the test prompts, next to a random vector.

Nothing is chosen on what is reported. A method that cannot run on a behaviour or model is named with the reason, and
left out.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from faststeer.algebra import random_like
from faststeer.behaviours.behaviour import Behaviour
from faststeer.behaviours.job import BehaviourJob, parts_in
from faststeer.compile import layer_numbers
from faststeer.evaluate.divergence import kl_on
from faststeer.evaluate.refusal import refusal_tokens
from faststeer.evaluate.statistics import PlainFields, Rate
from faststeer.extract import Recipe, optimise
from faststeer.extract.attribution import attribution, logit_difference
from faststeer.extract.caa import answer_rows, caa_table
from faststeer.extract.contrast import Contrast, Directions, contrast
from faststeer.extract.sweep import (
    CandidateTable,
    Cell,
    JudgeSelection,
    answer,
    cells,
    check_coefficients,
    judged,
    select_by_judge,
)
from faststeer.extract.unembedding import unembedding
from faststeer.hf import find_hook_points
from faststeer.hf.batching import Prompt, model_name
from faststeer.hf.prompts import post_instruction_positions
from faststeer.vector import HookPoint, SteeringVector

FORMAT = "faststeer.comparison/1"
CONTRAST = ("dim", "pca", "lat", "probe", "ace")
FROM_PAIRS = ("caa", "attribution", "unembedding")
TRAINED = tuple(optimise.METHODS)
METHODS = (*CONTRAST, *FROM_PAIRS, *TRAINED)
OWN = ("layers", "at", "coefficient")  # of a recipe, what a comparison decides itself
ATTRIBUTED_PROMPTS = 32  # whose gradients are averaged; each costs ten forward and backward passes a layer


@dataclass(frozen=True, eq=False)
class Result(PlainFields):
    """What one method's vector does to the test prompts at the layer, token and coefficient chosen for it.

    Args:
        method: its name, "random" for the control, "none" for the unsteered model.
        vector: at its layer; None for "none".
        layer, position, coefficient: what was chosen; position None for a method that looks at no prompt token.
        induce: share of answers that show the behaviour, vector added, on the prompts to induce it on.
        bypass: share of answers that show its opposite, vector subtracted, on the prompts to suppress it on. (For ACE:
            the projection set to that of the positive, the negative mean.)
        coherent: share of all these answers that are coherent.
        kl: mean KL in nats of the next token on the negative prompts, from unsteered to the direction ablated at
            `resid_pre`, `attn_out` and `mlp_out` of every layer.
        cosine: with the difference in means at the same layer and token (without a token: that of "dim").
        norm: length of what is added, coefficient included.
        seconds: to find the vector, without choosing and measuring; the pass that methods from contrast share counts
            for "dim".
    """

    method: str
    vector: SteeringVector | None
    layer: int | None
    position: int | None
    coefficient: float | None
    induce: Rate
    bypass: Rate
    coherent: Rate
    kl: float | None
    cosine: float | None
    norm: float | None
    seconds: float | None

    def to_dict(self) -> dict[str, Any]:
        """Return everything but the vector's values, ready for JSON."""
        return {name: value for name, value in super().to_dict().items() if name != "vector"}


@dataclass(frozen=True, eq=False)
class Comparison(PlainFields):
    """The methods' results in the order asked for, then the controls; `skipped` says which method could not run, and
    why; `settings` and the counts say what was measured."""

    behaviour: str
    results: tuple[Result, ...]
    skipped: dict[str, str]
    settings: dict[str, Any]
    n_prompts: dict[str, int]
    model: str | None = None

    def __getitem__(self, method: str) -> Result:
        for result in self.results:
            if result.method == method:
                return result
        raise KeyError(f"no result of {method!r}: {self.skipped.get(method, 'it was not asked for')}")


@dataclass
class _Job(BehaviourJob):
    """What every step of a comparison needs."""

    at: HookPoint
    positions: Sequence[int] | None
    layers: Sequence[int] | None
    steps: int | None
    train_layers: int
    seed: int
    max_new_tokens: int
    coefficients: tuple[float, ...]
    n_select: int
    n_test: int | None
    training: Mapping[str, Any]

    @property
    def answering(self) -> dict[str, Any]:
        return self.passing | {"max_new_tokens": self.max_new_tokens, "parts": self.parts}

    def sides(self, split: str, n: int | None) -> tuple[Sequence[Prompt], Sequence[Prompt]]:
        """The first n prompts to induce the behaviour on, and those to suppress it on."""
        return self.prompts(split, "induce", n), self.prompts(split, "suppress", n)


def compare(
    model: Any,
    tokenizer: Any,
    behaviour: Behaviour,
    methods: Sequence[str] = METHODS,
    *,
    at: HookPoint = "resid_pre",
    positions: Sequence[int] | None = None,
    layers: Sequence[int] | None = None,
    coefficients: Sequence[float] = (1.0,),
    steps: int | None = None,
    train_layers: int = 3,
    n_select: int = 16,
    n_test: int | None = None,
    max_new_tokens: int = 64,
    seed: int = 0,
    training: Mapping[str, Any] = MappingProxyType({}),
    batch_size: int = 64,
    progress: bool = False,
    folder: str | os.PathLike[str] | None = None,
) -> Comparison:
    """Find a behaviour's vector by each method, choose where and how strongly it acts, and measure all of them alike.

    1. One pass over the training prompts serves "dim", "pca", "lat", "probe" and "ace"; "caa", "unembedding",
       "attribution" and the trained methods use the training pairs.
    2. Every vector but ACE's gets the length of the difference in means at its layer and token (without a token: at
       that chosen for "dim"), as in arXiv 2604.08524; what is compared is directions.
    3. `select_by_judge` on validation prompts chooses layer, token and coefficient. Trained methods are trained at the
       `train_layers` layers at which "dim" does most on the validation prompts, unless `layers` says otherwise.
    4. On the test prompts: completions under the vector added and subtracted, read by the behaviour's judge, and the
       KL. The random control has dim's layer, token, coefficient and length; "none" is the unsteered model.

    Args:
        methods: of METHODS; "dim" is always found, as the others are measured by it.
        at: hook point of all methods.
        positions: prompt tokens, counted from the end, at which methods from contrast look (those after the
            instruction).
        layers: which are tried (all).
        coefficients: which are tried.
        steps: of training; by default the methods' own 10 epochs.
        n_select, n_test: validation and test prompts a side (16, all).
        max_new_tokens: longest answer.
        seed: of training and of the control.
        training: other fields of `Recipe` for the trained methods, such as {"lr": 0.02}.
        batch_size, progress: as in `faststeer.extract.candidates`.
        folder: where answers, trained vectors and the state of trainings are kept as they come: the same call goes on
            with them after a kill, and gives the same bytes. None: nothing is kept.

    Raises:
        ValueError: an unknown method, an empty list, numbers out of range; what the methods refuse in the behaviour's
            prompts.
    """
    method_names = list(dict.fromkeys(methods))
    if not method_names or (unknown := [name for name in method_names if name not in METHODS]):
        raise ValueError(
            f"unknown method(s) {', '.join(unknown) if method_names else '(none)'}: expected {', '.join(METHODS)}"
        )
    if n_select < 1 or train_layers < 1 or (n_test is not None and n_test < 1):
        raise ValueError("n_select, n_test and train_layers are counts: expected at least 1")
    if decided := [name for name in OWN if name in training]:
        raise ValueError(
            f"training has {', '.join(decided)}, which a comparison decides: it takes layers=, at= and coefficients="
        )
    Recipe(0, **training)  # what is wrong is said before any work
    n_layers = find_hook_points(model).n_layers
    if layers is not None:
        layers = sorted(set(layer_numbers(layers, n_layers)))
    job = _Job(
        model, tokenizer, behaviour, None if folder is None else parts_in(folder, FORMAT, model, tokenizer), batch_size,
        progress, at, positions, layers, steps, train_layers, seed, max_new_tokens, check_coefficients(coefficients),
        n_select, n_test, training,
    )  # fmt: skip
    if progress:
        _forecast(job, method_names, n_layers)
    contrasts, seconds = _timed(lambda: _contrast(job))
    chosen: dict[str, JudgeSelection] = {"dim": _select(job, "dim", contrasts.dim())}
    times, skipped = {"dim": seconds}, {}
    norms = contrasts.dim().directions.norm(dim=-1) * contrasts.dim().exists()
    for method in method_names:
        if method == "dim":
            continue
        job.say(f"[bold]{method}[/]")
        try:
            table, times[method] = _find(job, method, contrasts, chosen["dim"])
            chosen[method] = _select(job, method, _scaled(method, table, norms, contrasts, chosen["dim"]))
        except (ValueError, optimise.TrainingDiverged) as error:
            skipped[method] = str(error)
            times.pop(method, None)
    order = [method for method in method_names if method in chosen]
    job.say("[bold]measuring on the test prompts[/]")
    results = _measure(job, {m: chosen[m] for m in order}, chosen["dim"], contrasts, times)
    names = ("at", "steps", "train_layers", "max_new_tokens", "seed")
    settings = {name: getattr(job, name) for name in names} | {
        "coefficients": list(job.coefficients),
        "layers": None if layers is None else list(layers),
        "positions": list(contrasts.candidates.positions),
        "training": dict(training),
        "judge": behaviour.judge,
        "coherence": behaviour.coherence,
    }
    counts = {
        "train": len(behaviour.train.positive) + len(behaviour.train.negative),
        "train_pairs": len(behaviour.train.pairs),
        **{f"select_{side}": len(job.prompts("validation", side, n_select)) for side in ("induce", "suppress")},
        **{f"test_{side}": len(job.prompts("test", side, n_test)) for side in ("induce", "suppress")},
    }
    return Comparison(behaviour.name, results, skipped, settings, counts, model_name(model))


def _forecast(job: _Job, methods: Sequence[str], n_layers: int) -> None:
    n_positions = len(post_instruction_positions(job.tokenizer) if job.positions is None else job.positions)
    n_tried = n_layers if job.layers is None else len(job.layers)
    candidates = dict.fromkeys((*CONTRAST, "attribution"), n_tried * n_positions)
    candidates |= dict.fromkeys(("caa", "unembedding"), n_tried)
    candidates |= dict.fromkeys(TRAINED, job.train_layers if job.layers is None else n_tried)
    n_validation, n_test = (
        sum(map(len, job.sides(*of))) for of in (("validation", job.n_select), ("test", job.n_test))
    )
    n_chosen_by = sum(candidates[method] * len(job.coefficients) + 1 for method in {*methods, "dim"})
    # The random and the unsteered control are measured, too.
    n_answers = n_chosen_by * n_validation + (len(methods) + 2) * n_test
    training = "" if set(methods).isdisjoint(TRAINED) else ", training not counted"
    less = "Fewer layers, positions, prompts (--held-out, --prompts) or tokens (--max-new-tokens) take less"
    job.forecast(n_answers, job.max_new_tokens, less, training)


def _timed(call: Callable[[], Any]) -> tuple[Any, float]:
    start = time.perf_counter()
    return call(), time.perf_counter() - start


def _contrast(job: _Job) -> Contrast:
    job.say("[bold]one pass for all methods from contrast[/]")
    train = job.behaviour.train
    return contrast(
        job.model,
        job.tokenizer,
        train.positive,
        train.negative,
        at=job.at,
        positions=job.positions,
        paired=job.behaviour.paired,
        keep=True,
        **job.passing,
    )


def _find(job: _Job, method: str, contrasts: Contrast, dim: JudgeSelection) -> tuple[CandidateTable, float]:
    """The table of a method's directions, and the seconds that it took to find it."""
    if method not in TRAINED:
        return _timed(lambda: _table(job, method, contrasts, dim))
    vector, seconds = _trained(job, method, dim)
    return Directions.of_vector(vector, contrasts.candidates.n_layers), seconds


def _table(job: _Job, method: str, contrasts: Contrast, dim: JudgeSelection) -> CandidateTable:
    """Directions of a method that trains nothing."""
    if method in CONTRAST:
        return getattr(contrasts, method)()
    pairs = job.behaviour.train.pairs
    if method == "caa":
        _need_pairs(job)
        return caa_table(job.model, job.tokenizer, pairs, at=job.at, **job.passing)
    tokens, against = answer_tokens(job.tokenizer, job.behaviour)
    if method == "unembedding":
        vector = unembedding(job.model, job.tokenizer, tokens, against or None, at=job.at)
        return Directions.of_vector(vector, contrasts.candidates.n_layers)
    rest = against or [i for i in range(job.model.get_output_embeddings().weight.shape[0]) if i not in set(tokens)]
    prompts = job.behaviour.train.positive[:ATTRIBUTED_PROMPTS]
    metric = logit_difference(tokens, rest)
    means = contrasts.candidates
    return attribution(job.model, job.tokenizer, prompts, metric, means, layers=job.layers, **job.passing).gradients


def _trained(job: _Job, method: str, dim: JudgeSelection) -> tuple[SteeringVector, float]:
    """The vector of a method that trains, and the seconds that it took. Where parts are kept, the vector is one of
    them, and a training that was stopped goes on; the seconds are those of the run that ended it."""
    _need_pairs(job)
    pairs, parts = job.behaviour.train.pairs, job.parts
    layers = list(job.layers) if job.layers is not None else _best_layers(dim, job.train_layers)
    recipe = Recipe(**{"steps": job.steps, "seed": job.seed, **job.training, "layers": layers, "at": job.at})
    # What is measured is the vector subtracted.
    how = optimise.RePS(suppression="subtract") if method == "reps" else optimise.METHODS[method]()
    depends = [[asdict(pair) for pair in pairs], asdict(recipe)]
    checkpoint = None if parts is None else parts.path(f"{method}-training", depends, ".checkpoint")

    def train() -> SteeringVector:
        return optimise.train(
            job.model, job.tokenizer, pairs, how, recipe, checkpoint=checkpoint, progress=job.progress
        ).vector

    if parts is None:
        return _timed(train)

    def find() -> SteeringVector:
        return parts.record(SteeringVector, method, depends, train)

    seconds = parts.json(f"{method}-time", depends, lambda: {"seconds": _timed(find)[1]})["seconds"]
    return find(), seconds


def _need_pairs(job: _Job) -> None:
    if not job.behaviour.train.pairs:
        raise ValueError(f"behaviour {job.behaviour.name!r} has no training pairs (prompts with completions)")


def _best_layers(dim: JudgeSelection, count: int) -> list[int]:
    """The layers at which the difference in means does most."""
    best: dict[int, tuple[float, float]] = {}
    for row in dim.table:
        best[row.layer] = max(best.get(row.layer, (-1.0, -1.0)), (row.both, row.induce.rate + row.suppress.rate))
    return sorted(sorted(best, key=lambda layer: (*best[layer], -layer), reverse=True)[:count])


def answer_tokens(tokenizer: Any, behaviour: Behaviour) -> tuple[list[int], list[int]]:
    """Return the tokens with which answers that show a behaviour part from answers that do not, and those of the
    latter: from the training pairs, else, for refusal, the refusal tokens and none.

    Raises:
        ValueError: no pairs and another judge than "refusal", or pairs that do not differ in such tokens.
    """
    pairs = [pair for pair in behaviour.train.pairs if pair.rejected is not None]
    if len(pairs) < 2:
        if behaviour.judge.partition(":")[0] == "refusal":
            return list(refusal_tokens(tokenizer)), []
        raise ValueError(f"behaviour {behaviour.name!r} has no training pairs (prompts with completions)")
    rows = answer_rows(tokenizer, pairs)
    tokens = {side: {ids[-1] for ids in listed} for side, listed in rows.items()}
    shared = tokens["positive"] & tokens["negative"]
    own = sorted(tokens["positive"] - shared), sorted(tokens["negative"] - shared)
    if not all(own):
        raise ValueError(f"the completions of behaviour {behaviour.name!r} part with the same tokens on both sides")
    return own


def _scaled(
    method: str, table: CandidateTable, norms: Tensor, contrasts: Contrast, dim: JudgeSelection
) -> CandidateTable:
    """The directions with the lengths of the difference in means; ACE's are its."""
    if method == "ace" or not isinstance(table, Directions):
        return table
    if table.positions == contrasts.candidates.positions:
        return table.scaled_like(norms)
    place = contrasts.candidates.positions.index(dim.cell.position)
    return table.scaled_like(norms[place : place + 1])


def _select(job: _Job, method: str, table: CandidateTable) -> JudgeSelection:
    job.say(f"{method}: choosing among its candidates")
    return select_by_judge(
        job.model,
        job.tokenizer,
        table,
        job.behaviour.judge,
        *job.sides("validation", job.n_select),
        coherent=job.behaviour.coherence,
        coefficients=job.coefficients,
        layers=job.layers,
        **job.answering,
    )


def _control(job: _Job, dim: JudgeSelection) -> Cell:
    control = random_like(dim.vector, job.seed)
    table = Directions.of_vector(control, find_hook_points(job.model).n_layers)
    return next(iter(cells(table, [dim.cell.coefficient])))._replace(position=dim.cell.position)


def _measure(
    job: _Job,
    chosen: dict[str, JudgeSelection],
    dim: JudgeSelection,
    contrasts: Contrast,
    times: dict[str, float],
) -> tuple[Result, ...]:
    sides = job.sides("test", job.n_test)
    tried = {name: choice.cell for name, choice in chosen.items()} | {"random": _control(job, dim)}
    plans = {name: (cell.add, cell.subtract) for name, cell in tried.items()} | {"none": (None, None)}
    work = [(prompts, plan) for both in plans.values() for prompts, plan in zip(sides, both, strict=True)]
    said = job.reader.read(work, answer(job.model, job.tokenizer, work, **job.answering))
    read_on = job.behaviour.test.negative[: job.n_test]
    kls = kl_on(job.model, job.tokenizer, [c.ablate for c in tried.values()], read_on, **job.passing)
    kl = dict(zip(tried, kls.mean(1).tolist(), strict=True))
    results = []
    for number, name in enumerate(plans):
        cell = tried.get(name)
        read = judged(cell or tried["random"], said[2 * number], said[2 * number + 1])
        assert read.coherent is not None
        vector = None
        if name in chosen:
            vector = chosen[name].vector
        elif name == "random":
            vector = replace(random_like(dim.vector, job.seed), provenance={"seed": job.seed, "like": "dim"})
        results.append(
            Result(
                name,
                vector,
                cell and cell.layer,
                cell and cell.position,
                cell and cell.coefficient,
                read.induce,
                read.suppress,
                read.coherent,
                kl.get(name),
                None if vector is None or cell is None else _cosine(vector, cell, contrasts, dim),
                None if vector is None or cell is None else float(vector[cell.layer].norm()) * cell.coefficient,
                times.get(name),
            )
        )
    return tuple(results)


def _cosine(vector: SteeringVector, cell: Cell, contrasts: Contrast, dim: JudgeSelection) -> float | None:
    position = dim.cell.position if cell.position is None else cell.position
    place = contrasts.candidates.positions.index(position)
    if not contrasts.candidates.exists()[place, cell.layer]:
        return None
    own = vector[cell.layer].detach().double().cpu()
    return float(torch.cosine_similarity(own, contrasts.candidates.directions[place, cell.layer], dim=0))
