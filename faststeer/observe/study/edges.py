"""Which edges carry what vectors do: scored on training prompts, tried on test prompts, compared between vectors.

Scores are kept for folds of the prompts, so that every number made of them has an interval from drawing folds again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from itertools import combinations
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from faststeer.evaluate.statistics import rank_correlation
from faststeer.hf.batching import Prompt, encode
from faststeer.observe.circuits import Circuit, faithfulness, overlap, random_circuit, select
from faststeer.observe.patching import Example, Graph, Scores, examples, patch
from faststeer.observe.patching.graph import Kind
from faststeer.observe.study.job import SIDES, Job
from faststeer.plan import Plan
from faststeer.vector import SteeringVector

N_TOP = 20  # strongest edges that are named
FIELDS = ("prompt", "completion", "kept", "steered_tokens", "base_tokens")  # of an Example, but the plan


@dataclass(frozen=True)
class FoldScores:
    """Scores of one vector's edges by side and fold."""

    pieces: Mapping[tuple[str, int], Scores]

    def pooled(self, times: Sequence[float] | None = None, sides: Sequence[str] = tuple(SIDES)) -> Scores | None:
        """Of all folds of some sides, each fold counting `times`; None where nothing counts."""
        chosen = {at: one for at, one in self.pieces.items() if at[0] in sides and (times is None or times[at[1]])}
        counts = None if times is None else [times[fold] for _, fold in chosen]
        return Scores.pooled(list(chosen.values()), counts) if chosen else None

    @cached_property
    def whole(self) -> Scores:
        """Of all folds and sides."""
        return Scores.pooled(list(self.pieces.values()))


class Edges:
    """Examples, scores, circuits; what is already among the parts is read."""

    def __init__(self, job: Job) -> None:
        self.job, self.settings = job, job.settings
        rng, folds = np.random.default_rng(job.settings.seed), job.settings.folds
        self.draws = rng.multinomial(folds, np.full(folds, 1 / folds), size=job.settings.resamples)

    # Examples and scores ----------------------------------------------------------------------------------------------

    def examples(
        self, name: str, vector: SteeringVector, split: str
    ) -> tuple[dict[str, list[Example]], dict[str, str]]:
        """Where the vector changes what the judge says, by side, and why a side has no example."""
        s, by_side, why = self.settings, {}, {}
        for side in SIDES:
            prompts = self.job.prompts(split, side, s.n_patch if split == "train" else s.n_faithful)
            plan = self.job.plan(vector, side)
            depends = [vector, s.coefficient, side, prompts, s.max_new_tokens, self.job.behaviour.judge]
            make = partial(self._examples, prompts, plan, side)
            part = self.job.parts.json(f"examples-{name}-{split}-{side}", depends, make)
            if "why" in part:
                why[side] = part["why"]
            else:
                by_side[side] = [Example(plan=plan, **row) for row in part["examples"]]
        return by_side, why

    def _examples(self, prompts: Sequence[Prompt], plan: Plan, side: str) -> dict[str, Any]:
        job = self.job
        try:
            rows = examples(
                job.model,
                job.tokenizer,
                prompts,
                plan,
                changed=lambda base, steered: job.shown(side, steered) and not job.shown(side, base),
                max_new_tokens=self.settings.max_new_tokens,
                **job.passing,
            )
        except ValueError as error:
            return {"why": str(error)}
        return {"examples": [dict(zip(FIELDS, _plain(row), strict=True)) for row in rows]}

    def scored(self, name: str, vector: SteeringVector, by_side: Mapping[str, list[Example]]) -> FoldScores:
        """Patch the examples of every side, fold by fold: the prompts are dealt to the folds in turn."""
        s, pieces = self.settings, {}
        for side, rows in by_side.items():
            prompts = self.job.prompts("train", side, s.n_patch)
            fold = {tuple(ids): i % s.folds for i, ids in enumerate(encode(self.job.tokenizer, prompts))}
            for number in range(s.folds):
                if here := [row for row in rows if fold[tuple(row.prompt)] == number]:
                    part = f"scores-{name}-{side}-{number + 1}"
                    depends = [vector, s.coefficient, s.metric, s.quadrature, list(map(_plain, here))]
                    pieces[side, number] = self.job.parts.record(
                        Scores, part, depends, partial(self._patch, part, here)
                    )
        return FoldScores(pieces)

    def _patch(self, part: str, rows: list[Example]) -> Scores:
        s = self.settings
        self.job.say(f"{part} of {s.folds}: {len(rows)} examples")
        return patch(self.job.model, rows, metric=s.metric, steps=s.quadrature, **self.job.patching)

    def again(self, scored: Sequence[FoldScores], measure: Callable[[list[Scores]], Any]) -> list[Any]:
        """A measure of pooled scores, folds drawn with replacement, the same ones for all."""
        drawn = ([one.pooled(times) for one in scored] for times in self.draws.tolist())
        counted = [measure(cast(list[Scores], each)) for each in drawn if all(one is not None for one in each)]
        return counted or [measure([one.whole for one in scored])]  # nothing was drawn: no width is known

    # What the scores say ----------------------------------------------------------------------------------------------

    def kinds(self, scored: FoldScores, circuit: Circuit) -> list[dict[str, Any]]:
        """By what edges enter: how many there are, how many are in a circuit, their share of the sum of abs(score)."""
        whole = scored.whole
        of_kind: dict[Kind, list[int]] = {}
        for receiver in range(whole.graph.n_receivers):
            of_kind.setdefault(whole.graph.kind(receiver), []).append(receiver)

        def share(scores: Scores) -> Tensor:
            strength = scores.edges.abs()
            return torch.stack([strength[:, columns].sum() for columns in of_kind.values()]) / strength.sum()

        again = torch.stack(self.again([scored], lambda pooled: share(pooled[0])))
        rows = []
        for i, (kind, columns) in enumerate(of_kind.items()):
            of_circuit = int(circuit.edges[:, columns].sum())
            place = {"kind": kind, "edges": whole.graph.counts[kind], "in_circuit": of_circuit}
            rows.append(place | interval_of(float(share(whole)[i]), again[:, i].tolist()))
        return rows

    def nodes(self, scored: FoldScores) -> dict[str, dict[str, Any]]:
        """Every sender's score, with its interval."""
        whole = scored.whole
        again = torch.stack(self.again([scored], lambda pooled: pooled[0].nodes))
        names = whole.graph.senders
        return {n: interval_of(float(whole.nodes[i]), again[:, i].tolist()) for i, n in enumerate(names)}

    def overlaps(self, scored: Mapping[str, FoldScores], vectors: Mapping[str, SteeringVector]) -> list[dict[str, Any]]:
        """Every two vectors' circuits at every size, and each with random ones; at the compared size with intervals."""
        s, rows = self.settings, []
        for share in self.shares:
            circuits = {name: select(one.whole, float(share)) for name, one in scored.items()}
            for a, b in combinations(scored, 2):
                both = overlap(circuits[a], circuits[b])
                row = {"a": a, "b": b, "share": share, "edges": list(both.sizes), "shared": both.shared}
                row |= {"fraction": _mean([both.fraction]), "iou": _mean([both.iou])}
                if share == s.compared:
                    row |= self._compared(scored[a], scored[b], vectors[a], vectors[b])
                rows.append(row)
            for a, own in circuits.items():
                overlaps = [overlap(own, self.random(own.graph, share, seed)) for seed in range(s.controls)]
                means = {key: _mean(getattr(o, key) for o in overlaps) for key in ("shared", "fraction", "iou")}
                rows.append({"a": a, "b": "random", "share": share, "edges": [len(own)] * 2} | means)
        return rows

    def _compared(self, a: FoldScores, b: FoldScores, v: SteeringVector, w: SteeringVector) -> Any:
        share, edges = float(self.settings.compared), a.whole.graph.edges

        def alike(pooled: list[Scores]) -> tuple[float, float, float]:
            both = overlap(*(select(scores, share) for scores in pooled))
            ranks = rank_correlation(*(scores.edges[edges].abs().numpy() for scores in pooled))
            return both.fraction, both.iou, float(ranks)

        def make() -> Any:
            again = zip(*self.again([a, b], alike), strict=True)
            measures = zip(("fraction", "iou", "spearman"), alike([a.whole, b.whole]), again, strict=True)
            return {key: interval_of(value, list(values)) for key, value, values in measures}

        pieces = [[list(at), scores] for one in (a, b) for at, scores in sorted(one.pieces.items())]
        intervals = self.job.parts.json("overlap", [share, self.draws.tolist(), pieces], make)
        (layer,) = v.layers
        return {"cosine": float(torch.cosine_similarity(v[layer], w[layer], dim=0)), "intervals": intervals}

    @property
    def shares(self) -> list[float]:
        """Sizes of circuits, the compared one among them."""
        return sorted({*self.settings.shares, self.settings.compared})

    def random(self, graph: Graph, share: float, seed: int) -> Circuit:
        return random_circuit(graph, float(share), self.settings.seed + seed)

    # Faithfulness -----------------------------------------------------------------------------------------------------

    def curves(
        self, name: str, rows: list[Example], scored: Mapping[str, FoldScores], vector: SteeringVector
    ) -> list[dict[str, Any]]:
        """How faithful circuits are to one vector, on its test examples: its own, what is outside them, random ones,
        all at every size, and at the compared size those of the other vectors."""
        s, own = self.settings, scored[name].whole
        circuits = {share: select(own, float(share)) for share in self.shares}
        sets: dict[str, list[tuple[float, Circuit]]] = {"own": list(circuits.items())}
        sets["complement"] = [(share, each.complement()) for share, each in circuits.items()]
        for seed in range(s.controls):
            sets[f"random {seed}"] = [(share, self.random(own.graph, share, seed)) for share in self.shares]
        for other, theirs in scored.items():
            if other != name:
                sets[other] = [(s.compared, select(theirs.whole, float(s.compared)))]
        return [row for which, sized in sets.items() for row in self._tried(name, which, sized, rows, vector)]

    def _tried(
        self, name: str, which: str, sized: list[tuple[float, Circuit]], rows: list[Example], vector: SteeringVector
    ) -> list[dict[str, Any]]:
        s, circuits = self.settings, [circuit for _, circuit in sized]

        def make() -> Any:
            self.job.say(f"{name}: faithfulness of {len(circuits)} circuits ({which}) on {len(rows)} examples")
            reached = faithfulness(self.job.model, rows, circuits, metric=s.metric, **self.job.patching)
            low, high = reached.interval(seed=s.seed, samples=1000).T.tolist()
            return [reached.values.tolist(), low, high]

        examples = [_plain(row) for row in rows]
        depends = [vector, s.coefficient, s.metric, s.seed, examples, [circuit.edges for circuit in circuits]]
        numbers = self.job.parts.json(f"faithfulness-{name}-{which.replace(' ', '-')}", depends, make)
        return [
            {"vector": name, "circuit": which, "share": share, "edges": len(each), "value": v, "low": a, "high": b}
            for (share, each), v, a, b in zip(sized, *numbers, strict=True)
        ]


def summary(scored: FoldScores) -> dict[str, Any]:
    """What was scored, and the strongest edges."""
    whole = scored.whole
    strongest = [{"sender": s, "receiver": r, "score": score} for s, r, score in whole.top(N_TOP)]
    numbers = {key: getattr(whole, key) for key in ("steered", "base", "n_positions", "completeness_error")}
    return numbers | {"graph": asdict(whole.graph), "n_edges": whole.graph.n_edges, "top": strongest}


def interval_of(value: float, drawn: Sequence[float]) -> dict[str, float]:
    """A number with the 95 % percentile interval of what it was when folds were drawn again."""
    low, high = np.quantile(drawn, (0.025, 0.975)).tolist()
    return {"value": value, "low": low, "high": high}


def _plain(row: Example) -> list[Any]:
    return [getattr(row, field) for field in FIELDS]


def _mean(values: Iterable[float]) -> float | None:
    """The mean of those that are defined; None, which JSON has, where none is: an overlap with an empty circuit."""
    defined = [value for value in values if value == value]
    return float(np.mean(defined)) if defined else None
