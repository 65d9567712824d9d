"""Shares with their uncertainty: k of n with Wilson's 95 % interval.

The statistics are scipy's; nothing is estimated here.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from faststeer.extras import needed_for


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
        with needed_for("an interval", "evaluate"):
            from scipy.stats import binomtest  # half a second that most programs need not wait

        interval = binomtest(self.successes, self.n).proportion_ci(confidence_level=0.95, method="wilson")
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
