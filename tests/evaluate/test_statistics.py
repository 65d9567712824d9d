"""Statistics against known answers: coverage of intervals, exact cases, scipy's own tests called directly."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from faststeer.evaluate.statistics import mean_interval, paired_bootstrap


def test_a_mean_and_its_interval_are_near_the_normal_ones():
    values = np.random.default_rng(0).normal(2.0, 3.0, 400)
    found = mean_interval(values.tolist())
    half = 1.96 * values.std(ddof=1) / 20
    assert found.mean == pytest.approx(values.mean())
    # Bootstrap ends have a Monte-Carlo error of a few per cent of the width at 9,999 resamples.
    assert found.low == pytest.approx(values.mean() - half, abs=0.1 * half)
    assert found.high == pytest.approx(values.mean() + half, abs=0.1 * half)
    assert found == mean_interval(values.tolist()), "the same seed gives the same interval"
    assert found != mean_interval(values.tolist(), seed=1)


def test_edges():
    assert mean_interval([2.5]).low is None
    same = mean_interval([1.0] * 5)
    assert (same.mean, same.low, same.high) == (1, 1, 1)
    for wrong in ([], [float("nan")], [[1.0]]):
        with pytest.raises(ValueError, match="finite numbers"):
            mean_interval(wrong)


def test_pairs_are_drawn_together():
    base = np.random.default_rng(1).normal(0, 10, 50)
    found = paired_bootstrap((base + 1).tolist(), base.tolist())
    assert found.mean == pytest.approx(1)
    assert found.high - found.low < 1e-9, "the difference is the same for every prompt, however far these are apart"
    with pytest.raises(ValueError, match="same prompts"):
        paired_bootstrap([1.0], [1.0, 2.0])


def test_intervals_cover_the_truth():
    rng, covered = np.random.default_rng(2), 0
    for _ in range(100):
        first = rng.normal(0, 1, 60)
        found = paired_bootstrap((first + rng.normal(0.5, 1, 60)).tolist(), first.tolist(), resamples=999)
        covered += found.low <= 0.5 <= found.high
    assert stats.binomtest(covered, 100, 0.94).pvalue > 1e-3
