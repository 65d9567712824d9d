"""Sweeps: every candidate (layer x position x coefficient) as plans, ready to be rows of the same batch, and the choice
among them by any judge of the answers.

What a candidate does in a mixed batch is what it does alone (contract 2 of docs/design.md); only the number of forward
passes differs.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from itertools import combinations
from typing import Any, ClassVar, NamedTuple, Protocol, TypeVar

from faststeer import hf
from faststeer.artefacts import ArtefactStore
from faststeer.compile import layer_numbers
from faststeer.evaluate.generate import complete
from faststeer.evaluate.judging import Judge, check_line, make, signs
from faststeer.evaluate.statistics import Rate
from faststeer.extract.contrast import Directions, ace_plan
from faststeer.extract.dim import Candidates
from faststeer.hf.batching import Prompt, prompt_sets
from faststeer.intervention import Ablate, Add
from faststeer.plan import Plan
from faststeer.progress import progress_bar
from faststeer.vector import HookPoint, SteeringVector

CandidateTable = Candidates | Directions
Work = Sequence[tuple[Sequence[Prompt], Plan | None]]  # lists of prompts, each to be answered under its own plan
KEPT_BATCHES = 2  # of answers that are kept together: they fill batches, and few are lost when work is stopped
EVERYWHERE: tuple[HookPoint, ...] = ("resid_pre", "attn_out", "mlp_out")


class Cell(NamedTuple):
    """One candidate and what it does: `add` to induce the behaviour, `subtract` to suppress it, `ablate` from
    `resid_pre`, `attn_out` and `mlp_out` of every layer (the same for every coefficient)."""

    layer: int
    position: int | None
    coefficient: float
    add: Plan
    subtract: Plan
    ablate: Plan


def check_coefficients(coefficients: Sequence[float]) -> tuple[float, ...]:
    """Return the coefficients as a tuple if they are distinct, positive and finite, else raise ValueError."""
    numbers = tuple(float(c) for c in coefficients)
    if not numbers or len(set(numbers)) < len(numbers) or not all(math.isfinite(c) and c > 0 for c in numbers):
        raise ValueError(
            f"coefficients are {list(numbers)}: expected distinct positive numbers; both signs are measured"
        )
    return numbers


def cells(
    candidates: CandidateTable, coefficients: Sequence[float] = (1.0,), layers: Sequence[int] | None = None
) -> list[Cell]:
    """Return every candidate that has a direction: positions in their order, layers ascending, coefficients innermost.

    A direction of ACE is not added but sets the projection: to the reference plus `coefficient` lengths to induce, plus
    `1 - coefficient` to suppress.

    Raises:
        ValueError: coefficients that are not positive, or no direction anywhere.
    """
    coefficients = check_coefficients(coefficients)
    tried = set(range(candidates.n_layers) if layers is None else layers)
    listed: list[Cell] = []
    exists, directions = candidates.exists(), candidates.directions.float()
    for index, layer in exists.nonzero().tolist():
        if layer not in tried:
            continue
        position, direction = candidates.positions[index], directions[index, layer]
        ablate = Plan([Ablate(direction, layers="all", at=EVERYWHERE)])
        for c in coefficients:
            if isinstance(candidates, Directions) and candidates.method == "ace":
                vector = candidates.vector(position, layer)
                add, subtract = ace_plan(vector, c), ace_plan(vector, 1.0 - c)
            else:
                add, subtract = (
                    Plan([Add(direction, sign * c, layers=layer, at=candidates.at)]) for sign in (1.0, -1.0)
                )
            listed.append(Cell(layer, position, c, add, subtract, ablate))
    if not listed:
        raise ValueError(
            "no candidate has a direction: both sets have the same mean everywhere; were the same prompts given twice?"
        )
    return listed


def check_layers(model: Any, candidates: CandidateTable, layers: Iterable[int] | None) -> list[int]:
    """Return the layers whose candidates are tried, ascending; None means all of them.

    Raises:
        ValueError: candidates of a model with another number of layers, no layer, or one that the model does not have.
    """
    n_layers = hf.find_hook_points(model).n_layers
    if n_layers != candidates.n_layers:
        raise ValueError(f"the model has {n_layers} layers, the candidates {candidates.n_layers}: extract them from it")
    return sorted(set(layer_numbers(layers, n_layers)))


# What every rule of selection says and does ---------------------------------------------------------------------------


class JsonFields:
    """A dataclass that becomes JSON: its fields but those named in OMITTED, then the properties named in DERIVED."""

    OMITTED: ClassVar[tuple[str, ...]] = ("vector", "cell")
    DERIVED: ClassVar[tuple[str, ...]] = ()

    def to_dict(self) -> dict[str, Any]:
        """Return everything but the vector's values, ready for JSON: a number that is not finite is None."""
        names = [field.name for field in fields(self) if field.name not in self.OMITTED]  # type: ignore[arg-type]
        return {name: _plain(getattr(self, name)) for name in (*names, *self.DERIVED)}


def _plain(value: Any) -> Any:
    if hasattr(value, "to_dict"):
        return value.to_dict()
    if isinstance(value, Mapping):
        return {key: _plain(each) for key, each in value.items()}
    if isinstance(value, tuple):
        return [_plain(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


class Measured(Protocol):
    """A candidate's row in the table of a rule with constraints."""

    @property
    def violated(self) -> tuple[str, ...]: ...


M = TypeVar("M", bound=Measured)


def fewest_first(constraints: Sequence[str]) -> list[tuple[str, ...]]:
    """Return every choice of constraints to give up: as few as possible, of equally many the earlier ones."""
    return [some for count in range(len(constraints) + 1) for some in combinations(constraints, count)]


def violations(scores: Iterable[float], limits: Mapping[str, bool]) -> tuple[str, ...]:
    """The constraints that a candidate does not satisfy; "not finite" alone where one of its scores is not."""
    if not all(map(math.isfinite, scores)):
        return ("not finite",)
    return tuple(name for name, holds in limits.items() if not holds)


def choose(
    table: Sequence[M], relaxations: Iterable[tuple[str, ...]], order: Callable[[M], tuple[float, ...]]
) -> tuple[M, tuple[str, ...]]:
    """Return the first row by `order` that violates nothing but the first of `relaxations` that leaves one, and that.

    Raises:
        ValueError: no row is left by any.
    """
    for relaxed in relaxations:
        if allowed := [row for row in table if set(row.violated) <= set(relaxed)]:
            return min(allowed, key=order), relaxed
    raise ValueError(
        "no candidate has finite scores: does the model overflow when steered? Load it in bfloat16 or float32"
    )


def chosen_vector(candidates: CandidateTable, row: Any, **how: Any) -> SteeringVector:
    """Return a row's direction at its one layer, with how it was chosen and its scores in the provenance."""
    vector = candidates.vector(row.position, row.layer)
    return replace(vector, provenance={**vector.provenance, "selection": {**how, "scores": row.to_dict()}})


# By any judge of the answers ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Judged(JsonFields):
    """What a judge says of one candidate.

    Args:
        layer, position, coefficient: the candidate.
        induce: share of the inducing prompts whose steered answers show the behaviour.
        suppress: share of the suppressing prompts whose steered answers show its opposite.
        coherent: share of all these answers that are coherent; None if nothing was asked that says so.
        both: the smaller share when only coherent answers count; what is maximised.
    """

    layer: int
    position: int | None
    coefficient: float
    induce: Rate
    suppress: Rate
    coherent: Rate | None
    both: float


@dataclass(frozen=True, eq=False)
class JudgeSelection(JsonFields):
    """What `select_by_judge` chose.

    Args:
        vector: the chosen direction at its one layer, not multiplied by the chosen coefficient.
        chosen, cell: its row of the table, and its plans.
        table: one row per candidate.
        unsteered: the shares "induce" and "suppress" of the unsteered model.
        rule: "judge".
    """

    vector: SteeringVector
    chosen: Judged
    cell: Cell
    table: tuple[Judged, ...]
    unsteered: dict[str, Rate]
    rule: str = "judge"


def select_by_judge(
    model: Any,
    tokenizer: Any,
    candidates: CandidateTable,
    judge: Judge | str | Callable[..., Any],
    induce: Sequence[Prompt],
    suppress: Sequence[Prompt],
    *,
    coherent: Judge | str | Callable[..., Any] | None = None,
    coefficients: Sequence[float] = (1.0,),
    layers: Iterable[int] | None = None,
    max_new_tokens: int = 64,
    system: str | None = None,
    rendered: bool = False,
    batch_size: int = 64,
    progress: bool = False,
    parts: ArtefactStore | None = None,
) -> JudgeSelection:
    """Steer with every candidate, let a judge read the answers, and choose the candidate that does most both ways.

    Chosen is the largest min(share of +1 among the answers to `induce`, share of -1 among those to `suppress`), where
    an answer that is not coherent counts for neither; then the largest sum of the two, then the earlier layer, position
    and the smaller coefficient.

    Args:
        candidates: from `extract.candidates`, a `Contrast` method, or any vector as `Directions.of_vector`.
        judge: a judge, its name, or a function from an answer to 1, -1 or 0 (`evaluate.judging.make`).
        induce: validation prompts that do not show the behaviour by themselves.
        suppress: validation prompts that do (or the same, for a behaviour with two poles).
        coherent: the judge of whether an answer is one.
        coefficients, layers: which are tried (1; all).
        max_new_tokens, system, rendered, batch_size, progress: as in `faststeer.evaluate.complete`; a batch mixes
            candidates.
        parts: where answers are kept as they come, as of `answer`.

    Raises:
        ValueError: no prompts, coefficients that are not positive, candidates of another model or without direction, a
            judge that says something else.
    """
    sets = list(prompt_sets(rendered, induce=induce, suppress=suppress).values())
    tried = cells(candidates, coefficients, check_layers(model, candidates, layers))
    settings: dict[str, Any] = {"max_new_tokens": max_new_tokens, "system": system, "batch_size": batch_size}
    settings["parts"] = parts
    reader = Reader.made(judge, coherent, model, tokenizer)
    unsteered: Work = [(prompts, None) for prompts in sets]
    plain = reader.read(unsteered, answer(model, tokenizer, unsteered, **settings))
    work = [(prompts, plan) for cell in tried for prompts, plan in zip(sets, (cell.add, cell.subtract), strict=True)]
    read = reader.read(work, answer(model, tokenizer, work, progress=progress, **settings))
    table = tuple(
        judged(cell, induced, suppressed)
        for cell, induced, suppressed in zip(tried, read[::2], read[1::2], strict=True)
    )

    def order(number: int) -> tuple[float, ...]:
        row = table[number]
        both_ways = row.induce.rate + row.suppress.rate
        return row.both, both_ways, -row.layer, -(row.position or 0), -row.coefficient

    best = max(range(len(table)), key=order)
    vector = chosen_vector(candidates, table[best], rule="judge")
    before = {
        name: Rate(said.verdicts.count(sign), len(said.verdicts))
        for name, sign, said in (("induce", 1, plain[0]), ("suppress", -1, plain[1]))
    }
    return JudgeSelection(vector, table[best], tried[best], table, before)


def answer(
    model: Any,
    tokenizer: Any,
    work: Work,
    *,
    parts: ArtefactStore | None = None,
    progress: bool = False,
    **settings: Any,
) -> list[list[str]]:
    """Answer several lists of prompts, each under its own plan, in mixed batches (`faststeer.evaluate.complete`).

    With `parts`, the answers are kept there, those to the lists that fill KEPT_BATCHES batches together as one part.
    """
    if parts is None:
        return _answer(model, tokenizer, work, progress=progress, **settings)
    groups: list[list[tuple[Sequence[Prompt], Plan | None]]] = [[]]
    for each in work:
        if sum(len(listed) for listed, _ in groups[-1]) >= KEPT_BATCHES * settings["batch_size"]:
            groups.append([])
        groups[-1].append(each)
    answers: list[list[str]] = []
    with progress_bar("Generating", len(groups), progress) as advance:
        for group in groups:
            depends = [[list(listed), plan and plan.to_json(inline=True)] for listed, plan in group]
            make = functools.partial(_answer, model, tokenizer, group, **settings)
            answers += parts.json("answers", [depends, settings], make)
            advance()
    return answers


def _answer(model: Any, tokenizer: Any, work: Work, **settings: Any) -> list[list[str]]:
    prompts = [prompt for listed, _ in work for prompt in listed]
    plans = [plan for listed, plan in work for _ in listed]
    texts = iter(complete(model, tokenizer, prompts, plans, **settings))
    return [[next(texts) for _ in listed] for listed, _ in work]


class Read(NamedTuple):
    """What is read of several answers: the judge's signs, and whether each is coherent (None: nothing says so)."""

    verdicts: list[int]
    coherent: list[bool] | None


@dataclass(frozen=True)
class Reader:
    """A behaviour's judge, and that of coherence."""

    judge: Judge
    coherence: Judge | None

    @classmethod
    def made(cls, judge: Any, coherence: Any, model: Any, tokenizer: Any) -> Reader:
        """Of judges, their names or functions. Raises ValueError for one that draws no line."""
        made = (
            None if j is None else check_line(make(j, model=model, tokenizer=tokenizer)) for j in (judge, coherence)
        )
        return cls(*made)  # type: ignore[arg-type]

    def read(self, work: Work, answers: Sequence[Sequence[str]]) -> list[Read]:
        """Read the answers to several lists of prompts, each given under its own plan, all at once."""
        prompts = [prompt for listed, _ in work for prompt in listed]
        plans = [plan for listed, plan in work for _ in listed]
        texts = [text for listed in answers for text in listed]
        verdicts = iter(signs(self.judge, prompts, texts, plans))
        sound = None if self.coherence is None else iter(signs(self.coherence, prompts, texts, plans))
        return [
            Read([next(verdicts) for _ in listed], None if sound is None else [next(sound) == 1 for _ in listed])
            for listed in answers
        ]


def judged(cell: Cell, induced: Read, suppressed: Read) -> Judged:
    """Count what is said of a candidate's answers."""
    shown = [[said == sign for said in read.verdicts] for sign, read in ((1, induced), (-1, suppressed))]
    sound = [read.coherent or [True] * len(read.verdicts) for read in (induced, suppressed)]
    strict = [
        sum(map(all, zip(said, whole, strict=True))) / len(said) for said, whole in zip(shown, sound, strict=True)
    ]
    rates = [Rate(sum(said), len(said)) for said in shown]
    whole = None if induced.coherent is None else Rate(sum(map(sum, sound)), sum(map(len, sound)))
    return Judged(cell.layer, cell.position, cell.coefficient, rates[0], rates[1], whole, min(strict))
