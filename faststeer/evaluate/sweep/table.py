"""What a sweep found: a line per setting, with intervals, and against the unsteered model and the random vectors.

Everything is computed from the store's rows; nothing is kept.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from faststeer.evaluate.statistics import Estimate, PlainFields, Rate, mean_interval, paired_bootstrap
from faststeer.evaluate.sweep.store import Store

RESAMPLES = 1_999  # of the bootstraps of one line; a whole table has thousands


@dataclass(frozen=True)
class Score(PlainFields):
    """One judge on one setting.

    Args:
        n, failures: answers judged, and how many verdicts could not be read.
        mean: mean score with its bootstrap interval; None where nothing could be read.
        rate: share that shows the behaviour, with Wilson's interval; None for a measure without a line.
        over_unsteered: mean difference to the unsteered model on the same prompts.
        over_control: to the mean of the random vectors at the same layers and coefficient, on the same prompts.
    """

    n: int
    failures: int
    mean: Estimate | None
    rate: Rate | None
    over_unsteered: Estimate | None
    over_control: Estimate | None


@dataclass(frozen=True)
class Line(PlainFields):
    """One setting: what it is, the judges' scores by name, side effects by name (means over texts or questions)."""

    setting: int
    name: str
    kind: str
    vector: str
    layers: tuple[int, ...]
    coefficient: float | None
    control: int | None
    answers: int
    errors: int
    scores: Mapping[str, Score]
    effects: Mapping[str, float] = field(default_factory=dict)


def table(store: Store, run: str | None = None, *, tag: str | None = None, seed: int = 0) -> list[Line]:
    """Return a line per setting, in the settings' order.

    Args:
        run: which sweep (or how its digest begins); by default the newest.
        tag: count only prompts with this tag.
        seed: of the bootstraps.

    Raises:
        StoreError: no such sweep.
    """
    run = store.run(run)
    counted = {p["prompt"] for p in store.prompts(run) if tag is None or p["tag"] == tag}
    answers: dict[int, list[dict[str, Any]]] = defaultdict(list)
    for answer in store.answers(run):
        if answer["prompt"] in counted:
            answers[answer["setting"]].append(answer)
    settings = store.settings(run)
    by_judge = {
        j["name"]: _scores(store, run, j, settings, counted, seed) for j in with_distinct_names(store.judges(run))
    }
    effects = _effects(store, run)
    return [
        Line(
            **setting,
            answers=len(answers[number]),
            errors=sum(answer["error"] is not None for answer in answers[number]),
            scores={name: scores[number] for name, scores in by_judge.items() if number in scores},
            effects=effects.get(number, {}),
        )
        for setting in settings
        for number in (setting["setting"],)
    ]


def shows_share(lines: Sequence[Line], judge: str) -> bool:
    """Whether tables and reports show the share of answers that show what a judge looks for: where it draws a line, and
    its score is 0 or 1 or the unsteered share is between 10 and 90 %. Otherwise the mean score says more: a share near
    its end cannot move."""
    shown = [(score.rate, score.mean) for line in lines if (score := line.scores.get(judge)) is not None and score.mean]
    if not shown or any(rate is None for rate, _ in shown):
        return False
    binary = all(rate is not None and mean is not None and rate.rate == mean.mean for rate, mean in shown)
    unsteered = next((line.scores[judge].rate for line in lines if line.kind == "unsteered"), None)
    return binary or unsteered is None or 0.1 <= unsteered.rate <= 0.9


def with_distinct_names(judges: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Judges with distinct names: a name that several share gets a piece of the digest."""
    names = [judge["name"] for judge in judges]
    return [
        judge | {"name": judge["name"] if names.count(judge["name"]) == 1 else f"{judge['name']}@{judge['judge'][:6]}"}
        for judge in judges
    ]


def by_setting(store: Store, run: str, judge: str, counted: set[int]) -> dict[int, dict[int, float | None]]:
    """A judge's scores of answers to the prompts `counted`, `{setting: {prompt: score}}`; None: a parse failure."""
    scores: dict[int, dict[int, float | None]] = defaultdict(dict)
    for verdict in store.verdicts(run, judge):
        if verdict["prompt"] in counted:
            scores[verdict["setting"]][verdict["prompt"]] = verdict["score"]
    return scores


def without_failures(scores: Mapping[int, float | None]) -> dict[int, float]:
    """Scores by prompt without the parse failures."""
    return {prompt: score for prompt, score in scores.items() if score is not None}


def _scores(
    store: Store, run: str, judge: Mapping[str, Any], settings: list[dict[str, Any]], counted: set[int], seed: int
) -> dict[int, Score]:
    line, judged = judge["shows"], by_setting(store, run, judge["judge"], counted)
    readable = {setting["setting"]: without_failures(judged.get(setting["setting"], {})) for setting in settings}
    controls: dict[tuple[Any, ...], list[dict[int, float]]] = defaultdict(list)
    for setting in settings:
        if setting["kind"] == "control":
            controls[_place(setting)].append(readable[setting["setting"]])
    results = {}
    for setting in settings:
        number, kind = setting["setting"], setting["kind"]
        values, n = readable[number], len(judged.get(number, {}))
        scores = [values[prompt] for prompt in sorted(values)]
        results[number] = Score(
            n,
            n - len(scores),
            mean_interval(scores, seed=seed, resamples=RESAMPLES) if scores else None,
            Rate(sum(s >= line for s in scores), len(scores)) if scores and line is not None else None,
            difference(values, [readable[0]], seed) if kind != "unsteered" else None,
            difference(values, controls.get(_place(setting), []), seed) if kind in ("vector", "plan") else None,
        )
    return results


def _place(setting: Mapping[str, Any]) -> tuple[Any, ...]:
    return setting["vector"], setting["layers"], setting["coefficient"]


def difference(values: Mapping[int, float], others: list[dict[int, float]], seed: int) -> Estimate | None:
    """Paired by prompt, against the mean of the others."""
    shared = sorted(set(values).intersection(*others)) if others else []
    if not shared:
        return None
    means = [math.fsum(other[prompt] for other in others) / len(others) for prompt in shared]
    return paired_bootstrap([values[prompt] for prompt in shared], means, seed=seed, resamples=RESAMPLES)


def _effects(store: Store, run: str) -> dict[int, dict[str, float]]:
    """`{setting: {"kl": ..., "cross_entropy": ..., "accuracy": ...}}`; per token over all texts."""
    rows: dict[tuple[int, str], list[dict[str, Any]]] = defaultdict(list)
    for row in store.effects(run):
        rows[row["setting"], row["effect"].partition("-")[0]].append(row)
    effects: dict[int, dict[str, float]] = defaultdict(dict)
    for (setting, effect), items in rows.items():
        if effect == "text":
            tokens = sum(item["tokens"] for item in items)
            for name in ("kl", "cross_entropy"):
                effects[setting][name] = math.fsum(item[name] * item["tokens"] for item in items) / tokens
        else:
            effects[setting]["accuracy"] = sum(item["correct"] for item in items) / len(items)
    return effects
