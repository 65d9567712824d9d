"""Which setting to use: the Pareto front of a behaviour against a price, and the cheapest strong setting on it."""

from __future__ import annotations

from dataclasses import dataclass

from faststeer.evaluate.pareto import pareto, recommend
from faststeer.report.findings import Findings, Goal, Measure

SHARE = 0.9  # of the largest effect that is good enough to be recommended


@dataclass(frozen=True)
class SettingChoice:
    """A behaviour against a price.

    Attributes:
        gains, costs: by the setting's number; how far behaviour and price are from the unsteered model, the gain in the
            goal's direction; None where one of them was not measured. Without a price all costs are 0.
        eligible: settings that differ from the random vectors (or, without those, from the unsteered model) in the
            goal's direction by more than their 95 % interval.
        front: those of them that no other of them, nor the unsteered model, beats in both; by rising cost.
        recommended: on the front; None where nothing is eligible, or within the limit.
    """

    gains: tuple[float | None, ...]
    costs: tuple[float | None, ...]
    eligible: tuple[int, ...]
    front: tuple[int, ...]
    recommended: int | None


def choose(
    findings: Findings,
    behaviour: Measure,
    price: Measure | None,
    goal: Goal = "more",
    *,
    share: float = SHARE,
    limit: float | None = None,
) -> SettingChoice:
    """Return the front, and on it the cheapest setting that has at least `share` of the largest gain there is.

    Args:
        goal: "more" or "less" of the behaviour.
        limit: count only settings of at most this cost.

    Raises:
        ValueError: another goal, or a share outside 0..1.
    """
    if goal not in ("more", "less"):
        raise ValueError(f"goal is {goal!r}: expected 'more' or 'less'")
    if not 0 <= share <= 1:
        raise ValueError(f"share is {share:g}: expected a number from 0 to 1")
    gains = _changes(behaviour, "increase" if goal == "more" else "drop")
    costs = tuple(0.0 for _ in gains) if price is None else _changes(price, price.price)
    measured = {n: (c, g) for n, (c, g) in enumerate(zip(costs, gains, strict=True)) if c is not None and g is not None}
    eligible = tuple(
        line.setting
        for line, point in zip(findings.lines, behaviour.points, strict=True)
        if line.kind in ("vector", "plan") and line.setting in measured and point is not None and point.beats(goal)
    )
    front = pareto({n: measured[n] for n in eligible})
    return SettingChoice(gains, costs, eligible, front, recommend(front, gains, costs, share, limit))


def _changes(measure: Measure, what: str) -> tuple[float | None, ...]:
    base = measure.points[0]
    if base is None:
        return tuple(None for _ in measure.points)
    changes = [None if point is None else point.value - base.value for point in measure.points]
    sign = {"increase": lambda x: x, "drop": lambda x: -x, "change": abs}[what]
    return tuple(None if change is None else sign(change) for change in changes)
