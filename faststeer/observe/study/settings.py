"""What a study is asked for. All of it is checked before a model runs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

from faststeer.extract.optimise import METHODS as TRAINED
from faststeer.observe.patching.metrics import MetricName, check_metric
from faststeer.observe.sparsity import SPARSITIES

CONTRAST = ("dim", "pca", "lat", "probe")
METHODS = (*CONTRAST, *TRAINED)
SHARES = (0.01, 0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.5, 1.0)


@dataclass(frozen=True)
class Settings:
    """How a study is made.

    Args:
        methods: how vectors are found, of METHODS. All act before the same layer and have the length of the difference
            in means there, which is "dim"'s.
        layer, position: where the difference in means is taken (token counted from the prompt's end); chosen by the
            behaviour's judge on validation prompts where left out.
        coefficient: of the vectors; its negative suppresses.
        steps: of training (the methods' own 10 epochs).
        n_select, n_patch, n_faithful, n_test: prompts a side at most: validation prompts that choose the layer,
            training prompts that edges are scored on, test prompts that circuits are tried on, test prompts answered.
        n_utility: neutral texts, and questions of common knowledge, that are read under steering, at most.
        metric, quadrature: of `patch`, and the points of its rule.
        shares: sizes of circuits, as shares of the edges.
        compared: the size at which circuits are compared, with intervals.
        sparsities: shares of coordinates that are zero.
        controls: random circuits of each size, and random choices of coordinates.
        folds: into which the prompts that edges are scored on are dealt; intervals of scores come from drawing folds.
        resamples: how often folds are drawn.
        max_new_tokens: longest answer. seed: of training and of every control.

    Raises:
        ValueError: an unknown method or metric, a number out of range.
    """

    methods: Sequence[str] = ("dim", "ntp", "po")
    layer: int | None = None
    position: int | None = None
    coefficient: float = 1.0
    steps: int | None = None
    n_select: int = 16
    n_patch: int = 32
    n_faithful: int = 16
    n_test: int = 100
    n_utility: int = 48
    metric: MetricName = "logit_difference"
    quadrature: int = 10
    shares: Sequence[float] = SHARES
    compared: float = 0.1
    sparsities: Sequence[float] = SPARSITIES
    controls: int = 3
    folds: int = 8
    resamples: int = 200
    max_new_tokens: int = 64
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("methods", "shares", "sparsities"):
            object.__setattr__(self, name, tuple(dict.fromkeys(getattr(self, name))))
        if not self.methods or (unknown := set(self.methods) - set(METHODS)):
            wrong = ", ".join(sorted(unknown)) if self.methods else "(none)"
            raise ValueError(f"unknown method(s) {wrong}: expected some of {', '.join(METHODS)}")
        check_metric(self.metric)
        if not (math.isfinite(self.coefficient) and self.coefficient > 0):
            raise ValueError(f"coefficient is {self.coefficient}: expected a positive number; both signs are studied")
        for name, least in ({f.name: 1 for f in fields(self) if f.type == "int"} | {"steps": 1, "seed": 0}).items():
            if (number := getattr(self, name)) is not None and number < least:
                raise ValueError(f"{name} is {number}: expected at least {least}")
        if self.position is not None and self.position >= 0:
            raise ValueError(
                f"position is {self.position}: expected a token counted from the prompt's end, -1 the last"
            )
        if not self.shares or not all(0 < share <= 1 for share in self.shares):
            raise ValueError(f"shares are {list(self.shares)}: expected shares of the edges, above 0 and up to 1")
        if not self.sparsities or not all(0 <= share < 1 for share in self.sparsities):
            raise ValueError(f"sparsities are {list(self.sparsities)}: expected shares of zeros, from 0 to below 1")
        if not 0 < self.compared <= 1:
            raise ValueError(f"compared is {self.compared}: expected a share of the edges, above 0 and up to 1")

    def to_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        return {name: list(v) if isinstance(v, tuple) else v for name, v in asdict(self).items()}
