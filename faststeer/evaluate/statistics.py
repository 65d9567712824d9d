"""Whether a difference is one: paired bootstrap, dose and response with its monotonicity.

The statistics are scipy's; what is decided here is what is compared with what.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from faststeer.extras import needed_for

RESAMPLES = 9_999


@dataclass(frozen=True)
class Estimate:
    """A mean, its 95 % interval and how many values it is over; `low` and `high` are None for fewer than two."""

    mean: float
    low: float | None
    high: float | None
    n: int

    def to_dict(self) -> dict[str, float | int | None]:
        """Return the fields, ready for JSON."""
        return {"mean": self.mean, "low": self.low, "high": self.high, "n": self.n}

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
    found = (
        _scipy()
        .stats.bootstrap((array,), np.mean, n_resamples=resamples, method="percentile", rng=np.random.default_rng(seed))
        .confidence_interval
    )
    return Estimate(mean, float(found.low), float(found.high), array.size)


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


@dataclass(frozen=True)
class DoseResponse:
    """How scores follow the coefficient.

    Args:
        coefficients: ascending.
        means: mean score at each, with bootstrap intervals.
        spearman: Spearman's rank correlation of coefficient and mean score, -1 to 1; None where all means are equal.
        trend_p: p of Page's trend test that scores grow with the coefficient (fall, where `spearman` is negative), over
            prompts; None for fewer than three coefficients or two prompts, or where all scores are equal.
        violation: the largest distance of a mean from the best monotone fit in that direction (isotonic regression), in
            units of the score; 0: monotone.
    """

    coefficients: tuple[float, ...]
    means: tuple[Estimate, ...]
    spearman: float | None
    trend_p: float | None
    violation: float

    def to_dict(self) -> dict[str, object]:
        """Return the fields, ready for JSON."""
        return {
            "coefficients": list(self.coefficients),
            "means": [mean.to_dict() for mean in self.means],
            "spearman": self.spearman,
            "trend_p": self.trend_p,
            "violation": self.violation,
        }


def dose_response(scores: Mapping[float, Sequence[float]], *, seed: int = 0) -> DoseResponse:
    """Describe how scores of the same prompts depend on the coefficient.

    Args:
        scores: coefficient -> a score per prompt, the prompts in the same order everywhere.

    Raises:
        ValueError: fewer than two coefficients, other numbers of scores, a number that is not finite.
    """
    doses = sorted(scores)
    if len(doses) < 2 or not all(math.isfinite(dose) for dose in doses):
        raise ValueError(f"coefficients {doses}: expected at least two finite ones")
    table = [_values(scores[dose], f"the scores at {dose:g}") for dose in doses]
    if len({column.size for column in table}) > 1:
        raise ValueError("there are other numbers of scores at different coefficients: give those of the same prompts")
    means = np.array([math.fsum(column) / column.size for column in table])
    rho = None if (means == means[0]).all() else rank_correlation(doses, means.tolist())
    rising = rho is None or rho >= 0
    fit = _scipy().optimize.isotonic_regression(means, increasing=rising).x
    data = np.stack(table, axis=1) * (1.0 if rising else -1.0)  # [prompts, coefficients]
    testable = data.shape[0] >= 2 and data.shape[1] >= 3 and not (data == data[:, :1]).all()
    return DoseResponse(
        tuple(doses),
        tuple(mean_interval(column.tolist(), seed=seed) for column in table),
        rho,
        float(_scipy().stats.page_trend_test(data, method="asymptotic").pvalue) if testable else None,
        float(np.abs(means - fit).max()),
    )


def rank_correlation(a: Sequence[float] | np.ndarray, b: Sequence[float] | np.ndarray) -> float:
    """Spearman's rho of two lists of equal length, in [-1, 1]; NaN where one is constant."""
    return float(_scipy().stats.spearmanr(a, b).statistic)


def _scipy() -> Any:
    with needed_for("statistics", "evaluate"):
        import scipy.optimize
        import scipy.stats
    return scipy
