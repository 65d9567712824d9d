"""Which of several settings is worth its price: the Pareto front, and the cheapest strong setting on it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence


def pareto(measured: Mapping[int, Sequence[float]]) -> tuple[int, ...]:
    """Return the keys of `{key: (cost, ..., gain)}` that gain something and that no other beats: none has every cost as
    low and the gain as high. By rising first cost, then falling gain; of equal ones the first."""
    front: list[int] = []
    # In this order nobody beats who comes before.
    for key, (cost, *more, gain) in sorted(measured.items(), key=lambda e: (e[1][0], -e[1][-1], *e[1][1:-1], e[0])):
        own = (cost, *more, -gain)
        others = ((*measured[key][:-1], -measured[key][-1]) for key in front)
        if gain > 0 and not any(all(o <= x for o, x in zip(other, own, strict=True)) for other in others):
            front.append(key)
    return tuple(front)


def recommend(
    front: Sequence[int],
    gains: Mapping[int, float | None] | Sequence[float | None],
    costs: Mapping[int, float | None] | Sequence[float | None],
    share: float,
    limit: float | None,
) -> int | None:
    """The first of the front with at least `share` of the largest gain within the limit; None for an empty front."""
    within = [(n, gains[n] or 0.0) for n in front if limit is None or (costs[n] or 0.0) <= limit]
    enough = share * max((gain for _, gain in within), default=0.0)
    return next((n for n, gain in within if gain >= enough), None)
