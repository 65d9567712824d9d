"""What a report shows, taken from a store: settings, and every measure of each with its interval.

A measure is one number per setting: a judge's mean score or share on some of the prompts, or a side effect.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from faststeer.evaluate.sweep import Line, Store, StoreError, shows_share, table

Price = Literal["increase", "drop", "change"]
Goal = Literal["more", "less"]

# What of a measure is a price where it is not the behaviour: its growth, its fall, or any change at all.
PRICES: dict[str, Price] = {
    "kl": "increase",
    "cross_entropy": "increase",
    "accuracy": "drop",
    "perplexity": "increase",
    "repetition": "increase",
}
EFFECTS = {
    "kl": "KL on neutral text (nats per token)",
    "cross_entropy": "Cross-entropy on neutral text (nats per token)",
    "accuracy": "Multiple-choice accuracy",
}


@dataclass(frozen=True)
class Point:
    """A measure's value at one setting.

    Attributes:
        value, low, high: with its 95 % interval, where there is one.
        n: answers (None for side effects).
        over: mean difference of the score, low and high, to the random vectors, or without those to the unsteered
            model.
    """

    value: float
    low: float | None = None
    high: float | None = None
    n: int | None = None
    over: tuple[float, float | None, float | None] | None = None

    def beats(self, goal: Goal) -> bool:
        """Whether the interval of `over` lies wholly on the side of the goal."""
        if self.over is None or self.over[1] is None or self.over[2] is None:
            return False
        return self.over[1] > 0 if goal == "more" else self.over[2] < 0


@dataclass(frozen=True)
class Measure:
    """One number per setting.

    Attributes:
        key: unique in a report, such as "refusal/share/harmless".
        label: for people.
        name: the judge's name, or that of the side effect.
        tag: of the prompts it is over; None for all of them, and for side effects.
        share: whether it is a share, 0 to 1, of answers that show something.
        judged: whether it comes from a judge, not from side effects.
        price: what of it is a price.
        points: by the setting's number; None where nothing was measured.
    """

    key: str
    label: str
    name: str
    tag: str | None
    share: bool
    judged: bool
    price: Price
    points: tuple[Point | None, ...]

    @property
    def title(self) -> str:
        """The label with the prompts it is over."""
        return self.label if self.tag is None else f"{self.label}, {self.tag} prompts"


@dataclass(frozen=True)
class Findings:
    """Everything of a run that is shown, except the answers.

    Attributes:
        run: its digest.
        facts: as `Store.runs` gives them.
        lines: a `Line` per setting over all prompts; their order is the settings'.
        measures: every measure.
        judges: the names of the store's judges, in its order.
        versus: "random vectors", or "unsteered model" where the sweep has no controls.
        common_tag: the tag that every prompt has, if there is one; what is measured on it is measured on all prompts.
    """

    run: str
    facts: dict[str, Any]
    lines: list[Line]
    measures: tuple[Measure, ...]
    judges: tuple[str, ...]
    versus: str
    common_tag: str | None

    @property
    def behaviours(self) -> tuple[Measure, ...]:
        """What judges measured, in the order in which the description names them; of a judge with both, the share or
        the mean score first, as tables show it (`shows_share`)."""
        order = [str(j["judge"] if isinstance(j, dict) else j) for j in self.facts["description"].get("judges", ())]

        draws = {m.name for m in self.measures if m.judged and m.share}

        def place(measure: Measure) -> tuple[bool, bool, int, bool]:
            said = (i for i, text in enumerate(order) if text == measure.name or text.startswith(f"{measure.name}:"))
            other = measure.share is not shows_share(self.lines, measure.name)
            return measure.name in PRICES, measure.name not in draws, next(said, len(order)), other

        return tuple(sorted((m for m in self.measures if m.judged), key=place))

    def reason(self, measure: Measure) -> str:
        """Why the mean score is shown before the share, for people; "" where it is not."""
        shares = (m for m in self.measures if m.share and (m.name, m.tag) == (measure.name, measure.tag))
        base = next((m.points[0] for m in shares), None)
        if measure.share or not measure.judged or base is None:
            return ""
        return (
            f"The mean score of {measure.name} is shown first, as {base.value:.0%} of the unsteered answers show it "
            "already: a share so near its end can hardly move."
            if base.value > 0.5
            else f"The mean score of {measure.name} is shown first, as only {base.value:.0%} of the unsteered answers "
            "show it: the score moves before the share does."
        )

    def prices(self, behaviour: Measure) -> tuple[Measure, ...]:
        """Measures that can be set against a behaviour, side effects first."""
        others = [m for m in self.measures if (m.name, m.tag) != (behaviour.name, behaviour.tag)]
        return tuple(sorted(others, key=lambda m: (m.judged, list(PRICES).index(m.name) if m.name in PRICES else 99)))

    def measure(self, name: str | None, tag: str | None) -> Measure:
        """The behaviour of a judge on prompts with a tag; by default of the first judge that draws a line, on all
        prompts.

        Raises:
            ValueError: no such judge, or no such tag.
        """
        fitting = [m for m in self.behaviours if name is None or m.name == name]
        if not fitting:
            raise ValueError(f"there is no judge {name!r} with a verdict: this sweep has {', '.join(self.judges)}")
        tagged = [m for m in fitting if m.tag == (None if tag == self.common_tag else tag)]
        if not tagged:
            tags = sorted({t for t in (self.common_tag, *(m.tag for m in self.measures)) if t is not None})
            raise ValueError(f"no prompt of this sweep has the tag {tag!r}: there are {', '.join(tags) or 'no tags'}")
        return tagged[0]

    def price(self, behaviour: Measure, name: str | None) -> Measure | None:
        """The price of that name beside a behaviour, on the same prompts where it is judged; by default the first; None
        where nothing else was measured.

        Raises:
            ValueError: no such measure.
        """
        prices = self.prices(behaviour)
        if name is None:
            return prices[0] if prices else None
        fitting = sorted((m for m in prices if m.name == name), key=lambda m: m.tag != behaviour.tag)
        if not fitting:
            raise ValueError(f"nothing called {name!r} was measured: there is {', '.join({m.name: 0 for m in prices})}")
        return fitting[0]


def findings(store: Store, run: str | None = None, *, seed: int = 0) -> Findings:
    """Read a run (by default the newest) and compute its measures on all prompts and on those of each tag.

    Raises:
        StoreError: no such run, or one without a verdict yet.
    """
    run = store.run(run)
    tags = sorted({p["tag"] for p in store.prompts(run)})
    common_tag = tags[0] or None if len(tags) == 1 else None
    chosen: list[str | None] = [None, *(tag for tag in tags if tag and tag != common_tag)]
    tables = {tag: table(store, run, tag=tag, seed=seed) for tag in chosen}
    lines = tables[None]
    measures = [m for tag, tagged in tables.items() for m in _judged(tagged, tag)]
    if not measures:
        raise StoreError(f"{store.path}: the sweep {run[:12]} has no verdict yet: run it first, or go on with it")
    facts = next(facts for facts in store.runs() if facts["run"] == run)
    versus = "random vectors" if any(line.kind == "control" for line in lines) else "unsteered model"
    return Findings(run, facts, lines, (*measures, *_effects(lines)), tuple(lines[0].scores), versus, common_tag)


def _judged(lines: list[Line], tag: str | None) -> list[Measure]:
    measures = []
    for judge in lines[0].scores:
        scores = [line.scores[judge] for line in lines]
        binary = all(s.rate is not None and s.mean is not None and s.rate.rate == s.mean.mean for s in scores if s.mean)
        for share in (True, False):
            if (share and all(s.rate is None for s in scores)) or (not share and binary):
                continue
            points = tuple(
                _point(score, share, line.kind in ("vector", "plan")) for score, line in zip(scores, lines, strict=True)
            )
            if any(points):
                what, kind = ("share", "share") if share else ("mean score", "mean")
                key, price = f"{judge}/{kind}/{'' if tag is None else tag}", PRICES.get(judge, "change")
                measures.append(Measure(key, f"{judge}: {what}", judge, tag, share, True, price, points))
    return measures


def _point(score: Any, share: bool, compared: bool) -> Point | None:
    # A random vector is what the others are compared with.
    over = (score.over_control or score.over_unsteered) if compared else None
    difference = (over.mean, over.low, over.high) if over else None
    estimate = score.rate if share else score.mean
    if estimate is None:
        return None
    return Point(estimate.rate if share else estimate.mean, estimate.low, estimate.high, estimate.n, difference)


def _effects(lines: list[Line]) -> list[Measure]:
    names = [name for name in EFFECTS if any(name in line.effects for line in lines)]
    return [
        Measure(
            f"{name}/effect/",
            EFFECTS[name],
            name,
            None,
            name == "accuracy",
            False,
            PRICES[name],
            tuple(Point(line.effects[name]) if name in line.effects else None for line in lines),
        )
        for name in names
    ]
