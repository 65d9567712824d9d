"""Statistics against known answers: coverage of intervals, exact cases, scipy's own tests called directly."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from faststeer.evaluate.statistics import dose_response, mean_interval, paired_bootstrap


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


def test_a_monotone_dose_response():
    rng = np.random.default_rng(3)
    scores = {c: (c + rng.normal(0, 0.3, 20)).tolist() for c in (2.0, 0.0, 1.0, 0.5)}
    found = dose_response(scores)
    assert found.coefficients == (0.0, 0.5, 1.0, 2.0)
    assert found.spearman == pytest.approx(1) and found.violation == 0
    data = np.stack([scores[c] for c in found.coefficients], 1)
    assert found.trend_p == pytest.approx(stats.page_trend_test(data, method="asymptotic").pvalue)
    assert found.trend_p < 1e-4
    falling = dose_response({c: [-s for s in values] for c, values in scores.items()})
    assert falling.spearman == pytest.approx(-1) and falling.violation == 0 and falling.trend_p < 1e-4


def test_a_dip_is_measured():
    found = dose_response({0.0: [0.0, 0.0], 1.0: [1.0, 1.0], 2.0: [0.6, 0.6], 3.0: [1.0, 1.0]})
    assert found.violation == pytest.approx(0.2)  # 1, 0.6 -> 0.8, 0.8


def test_nothing_happens():
    found = dose_response({0.0: [1.0, 1.0], 1.0: [1.0, 1.0], 2.0: [1.0, 1.0]})
    assert (found.spearman, found.trend_p, found.violation) == (None, None, 0)
    assert found.to_dict()["coefficients"] == [0, 1, 2]


def test_wrong_scores_are_refused():
    with pytest.raises(ValueError, match="at least two"):
        dose_response({1.0: [1.0]})
    with pytest.raises(ValueError, match="same prompts"):
        dose_response({0.0: [1.0], 1.0: [1.0, 2.0]})
