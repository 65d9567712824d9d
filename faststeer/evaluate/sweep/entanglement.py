"""Several behaviours judged in one sweep: what moved beside what was meant."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from faststeer.evaluate.statistics import Estimate, PlainFields
from faststeer.evaluate.sweep.store import Store
from faststeer.evaluate.sweep.table import by_setting, difference, with_distinct_names, without_failures


@dataclass(frozen=True)
class Moved(PlainFields):
    """One row of the matrix: what a setting does to every behaviour.

    Args:
        name, kind, vector, coefficient: the setting's.
        meant: the behaviour that its vector (or plan) is for; None for one that is for none.
        moved: by behaviour, the share of its prompts whose answers show it, less that of the unsteered model, -1 to 1,
            paired by prompt, with a bootstrap interval; None where nothing could be read.
    """

    name: str
    kind: str
    vector: str
    coefficient: float | None
    meant: str | None
    moved: Mapping[str, Estimate | None]

    @property
    def effect(self) -> float | None:
        """How far the behaviour that was meant moved."""
        moved = None if self.meant is None else self.moved[self.meant]
        return None if moved is None else moved.mean

    @property
    def entanglement(self) -> float | None:
        """sqrt(mean of moved^2) over the behaviours that were not meant, 0 to 1; None where there is none."""
        others = [moved.mean for name, moved in self.moved.items() if name != self.meant and moved is not None]
        return math.sqrt(math.fsum(m * m for m in others) / len(others)) if others else None

    def to_dict(self) -> dict[str, Any]:
        """Return the fields, `effect` and `entanglement`, ready for JSON."""
        return super().to_dict() | {"effect": self.effect, "entanglement": self.entanglement}


def entanglement(
    store: Store, judges: Mapping[str, str], meant: Mapping[str, str], run: str | None = None, *, seed: int = 0
) -> list[Moved]:
    """Return a row for every steered setting of a sweep, over several behaviours.

    A vector that is to move one behaviour moves others as well, which arXiv 2509.13450 (SteeringControl) calls
    entanglement; here it is the root mean square of the changes of what was not meant. Random vectors of the same
    lengths, which are for no behaviour, say how much of it any push does.

    Args:
        judges: by behaviour, the judge that says which answers show it. A behaviour's prompts are those of the sweep
            whose tag is its name.
        meant: by the name of a vector or plan, the behaviour that it is for.
        run: which sweep (or how its digest begins); by default the newest.
        seed: of the bootstraps.

    Raises:
        StoreError: no such sweep.
        ValueError: a judge that the sweep does not have or that draws no line; a behaviour without prompts, or one
            that is meant and not judged; a vector that the sweep does not have.
    """
    run = store.run(run)
    known = {judge["name"]: judge for judge in with_distinct_names(store.judges(run))}
    settings, prompts = store.settings(run), store.prompts(run)
    vectors = {setting["vector"] for setting in settings if setting["kind"] != "unsteered"}
    if unknown := set(meant) - vectors:
        raise ValueError(f"the sweep has no vector {sorted(unknown)[0]!r}: it has {', '.join(sorted(vectors))}")
    if unknown := set(meant.values()) - set(judges):
        raise ValueError(f"{sorted(unknown)[0]!r} is meant and has no judge: judged are {', '.join(judges)}")
    shown: dict[str, dict[int, dict[int, float]]] = {}
    for behaviour, name in judges.items():
        if name not in known or known[name]["shows"] is None:
            there = ", ".join(n for n, judge in known.items() if judge["shows"] is not None)
            raise ValueError(f"the sweep has no judge {name!r} that draws a line: it has {there or 'none'}")
        tagged = {prompt["prompt"] for prompt in prompts if prompt["tag"] == behaviour}
        if not tagged:
            raise ValueError(f"no prompt of the sweep has the tag {behaviour!r}")
        line = known[name]["shows"]
        shown[behaviour] = {
            number: {prompt: float(score >= line) for prompt, score in without_failures(scores).items()}
            for number, scores in by_setting(store, run, known[name]["judge"], tagged).items()
        }
    return [
        Moved(
            setting["name"],
            setting["kind"],
            setting["vector"],
            setting["coefficient"],
            meant.get(setting["vector"]) if setting["kind"] != "control" else None,
            {
                behaviour: difference(by_number.get(setting["setting"], {}), [by_number.get(0, {})], seed)
                for behaviour, by_number in shown.items()
            },
        )
        for setting in settings
        if setting["kind"] != "unsteered"
    ]
