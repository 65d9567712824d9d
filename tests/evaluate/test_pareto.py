"""The front is what no other setting beats, counted pair by pair; the recommendation follows its rule."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from faststeer.evaluate.pareto import pareto, recommend


@given(
    st.integers(1, 4).flatmap(
        lambda n: st.dictionaries(
            st.integers(0, 30), st.tuples(*[st.integers(-3, 5)] * n, st.integers(-3, 5)), max_size=12
        )
    )
)
def test_the_front(measured):
    front = pareto(measured)
    points = [measured[n] for n in front]

    def beats(a, b):
        return all(x <= y for x, y in zip(a[:-1], b[:-1], strict=True)) and a[-1] >= b[-1] and a != b

    undominated = {p for p in measured.values() if p[-1] > 0 and not any(beats(q, p) for q in measured.values())}
    assert len(points) == len(set(points)) and set(points) == undominated
    assert points == sorted(points, key=lambda p: (p[0], -p[-1], *p[1:-1]))
    assert all(n == min(k for k, p in measured.items() if p == measured[n]) for n in front)


def test_nothing_is_recommended_where_nothing_is_within_the_limit():
    assert recommend((1,), (0.0, 2.0), (0.0, 3.0), 0.9, 2.9) is None and recommend((), (), (), 0.9, None) is None
    gains, costs = {3: 1.0, 5: 1.9, 8: 2.0}, {3: 0.1, 5: 0.2, 8: 0.3}
    assert recommend((3, 5, 8), gains, costs, 0.9, None) == 5
    assert recommend((3, 5, 8), gains, costs, 1.0, None) == 8
    assert recommend((3, 5, 8), gains, costs, 0.9, 0.15) == 3
