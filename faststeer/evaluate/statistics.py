"""Shares and means with their 95 % intervals, and whether a difference is one: paired bootstrap.

The statistics are scipy's; what is decided here is what is compared with what.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any

import numpy as np

from faststeer.extras import needed_for

RESAMPLES = 9_999


class PlainFields:
    """A dataclass that JSON can hold: its fields, and what in them says `to_dict` by that."""

    def to_dict(self) -> dict[str, Any]:
        """Return the fields, ready for JSON."""
        return {field.name: _plain(getattr(self, field.name)) for field in fields(self)}  # type: ignore[arg-type]


def _plain(value: Any) -> Any:
    if hasattr(value, "to_dict"):
        return value.to_dict()
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, tuple | list) else value


@dataclass(frozen=True)
class Rate:
    """`successes` of `n` trials: `rate` and its 95 % interval from `low` to `high` (Wilson's score interval, all in
    0..1).

    Raises:
        ValueError: n below 1, or successes outside 0..n.
    """

    successes: int
    n: int

    def __post_init__(self) -> None:
        if self.n < 1:
            raise ValueError(f"a rate over {self.n} trials is not defined: give at least one")
        if not 0 <= self.successes <= self.n:
            raise ValueError(f"{self.successes} successes in {self.n} trials: expected 0 to {self.n}")

    @property
    def rate(self) -> float:
        """The share of successes, 0 to 1."""
        return self.successes / self.n

    @cached_property
    def _interval(self) -> tuple[float, float]:
        test = _scipy().stats.binomtest(self.successes, self.n)
        interval = test.proportion_ci(confidence_level=0.95, method="wilson")
        return float(interval.low), float(interval.high)

    @property
    def low(self) -> float:
        """The lower end of Wilson's interval, 0 to 1."""
        return self._interval[0]

    @property
    def high(self) -> float:
        """The upper end of Wilson's interval, 0 to 1."""
        return self._interval[1]

    def to_dict(self) -> dict[str, float | int]:
        """Return `rate`, `low`, `high` and `n`, ready for JSON."""
        return {"rate": self.rate, "low": self.low, "high": self.high, "n": self.n}

    def __str__(self) -> str:
        return f"{self.rate:.1%} [{self.low:.1%}, {self.high:.1%}], n = {self.n}"


@dataclass(frozen=True)
class Estimate(PlainFields):
    """A mean, its 95 % interval and how many values it is over; `low` and `high` are None for fewer than two."""

    mean: float
    low: float | None
    high: float | None
    n: int

    def __str__(self) -> str:
        interval = "" if self.low is None else f" [{self.low:.3g}, {self.high:.3g}]"
        return f"{self.mean:.3g}{interval}, n = {self.n}"


def _values(values: Sequence[float], what: str) -> np.ndarray:
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 1 or not array.size or not np.isfinite(array).all():
        raise ValueError(f"{what}: expected a list of finite numbers that is not empty")
    return array


def mean_interval(values: Sequence[float], *, seed: int = 0, resamples: int = RESAMPLES) -> Estimate:
    """Return the mean with its bootstrap percentile interval (scipy.stats.bootstrap); equal numbers give a width of 0.

    Raises:
        ValueError: no values, or one that is not finite.
    """
    array = _values(values, "values")
    mean = math.fsum(array) / array.size
    if array.size < 2:
        return Estimate(mean, None, None, array.size)
    if (array == array[0]).all():
        return Estimate(mean, mean, mean, array.size)
    stats, rng = _scipy().stats, np.random.default_rng(seed)
    result = stats.bootstrap((array,), np.mean, n_resamples=resamples, method="percentile", rng=rng)
    interval = result.confidence_interval
    return Estimate(mean, float(interval.low), float(interval.high), array.size)


def paired_bootstrap(
    steered: Sequence[float], other: Sequence[float], *, seed: int = 0, resamples: int = RESAMPLES
) -> Estimate:
    """Return mean(steered - other) with its 95 % bootstrap interval; prompts are drawn, both values of one together.

    Raises:
        ValueError: lists of different lengths, no values, one that is not finite.
    """
    first, second = _values(steered, "steered"), _values(other, "other")
    if first.size != second.size:
        raise ValueError(f"{first.size} values and {second.size}: a paired comparison takes the same prompts for both")
    return mean_interval((first - second).tolist(), seed=seed, resamples=resamples)


def rank_correlation(a: Sequence[float] | np.ndarray, b: Sequence[float] | np.ndarray) -> float:
    """Spearman's rho of two lists of equal length, in [-1, 1]; NaN where one is constant."""
    return float(_scipy().stats.spearmanr(a, b).statistic)


def _scipy() -> Any:
    with needed_for("statistics", "evaluate"):
        import scipy.stats
    return scipy
