"""Wilson's interval against its formula."""

from __future__ import annotations

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import norm

from faststeer.evaluate import Rate


@given(st.data())
def test_wilson_formula(data):
    n = data.draw(st.integers(1, 100_000))
    k = data.draw(st.integers(0, n))
    rate, z = Rate(k, n), norm.ppf(0.975)
    p = k / n
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    # Numbers of size one, a dozen operations each way.
    assert rate.low == pytest.approx(centre - half, rel=0, abs=64 * 2**-52)
    assert rate.high == pytest.approx(centre + half, rel=0, abs=64 * 2**-52)
    assert rate.rate == p


def test_known_interval():
    # 95 of 100, as tabulated.
    assert (round(Rate(95, 100).low, 4), round(Rate(95, 100).high, 4)) == (0.8882, 0.9785)


def test_to_dict_is_json():
    data = json.loads(json.dumps(Rate(3, 4).to_dict()))
    assert set(data) == {"rate", "low", "high", "n"}
    assert data["rate"] == 0.75
    assert data["n"] == 4
    assert str(Rate(3, 4)).startswith("75.0% [")


@pytest.mark.parametrize(
    ("successes", "n", "message"), [(0, 0, "0 trials"), (0, -1, "-1 trials"), (5, 4, "0 to 4"), (-1, 4, "0 to 4")]
)
def test_rates_that_are_none(successes, n, message):
    with pytest.raises(ValueError, match=message):
        Rate(successes, n)
