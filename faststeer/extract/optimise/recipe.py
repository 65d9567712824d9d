"""How vectors are trained, whatever the method: a Recipe, checked before anything runs, from which the command line
takes its options, too; and a Course, which leaves nothing open and says what every step draws."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from faststeer.compile import layer_numbers
from faststeer.extract.optimise.objectives import Objective, check_not_negative, is_number
from faststeer.intervention import Add, Positions
from faststeer.vector import HookPoint, check_hook_point

Layers = int | Iterable[int] | Literal["all"]
Schedule = Literal["linear", "cosine", "constant"]
Unit = Literal["residual", "absolute"]
# What a random draw is for; the generator's seed is [seed, purpose, number].
ORDER, FACTOR, SIGN, START = range(4)


@dataclass(frozen=True)
class Recipe:
    """Where, how long and how vectors are trained. What is None is the method's own (`NTP`, `PO`, `RePS`, `BiPO` say
    theirs).

    Args:
        layers: one, several, or "all"; a vector is trained for each.
        at: hook point.
        coefficient: one, or several: a vector is trained for each.
        factors: multiples of the coefficient, of which one is drawn for every pair at every step; (1,) for none.
        steps: optimizer steps; None: those of 10 epochs.
        lr: of AdamW, at its highest, in `unit`s.
        batch_size: pairs per step and vector.
        seed: one, or several: a vector is trained for each. It decides start, order of pairs, factors and signs.
        max_tokens: tokens of a completion, its end included, that are trained on.
        system: a system prompt put before every prompt.
        rendered: the prompts hold the chat template's markup already and are taken as they are.
        positions: tokens at which the vector acts (as in an intervention), the completion's being "generated".
        schedule: the learning rate from its height to 0 ("linear", "cosine") or "constant".
        warmup: steps over which it rises first.
        weight_decay: AdamW's.
        clip: largest norm of a vector's gradient; None: not clipped.
        start: standard deviation of the normal numbers a vector starts from; 0 for zeros.
        unit: of `lr` and `start`: "residual", the root mean square of the residual stream's coordinates where the
            vector's layer ends (median over the training prompts' tokens), so that the same numbers suit models whose
            residual streams differ in size by orders of magnitude; or "absolute", as in the methods' sources.
        rows: at most so many rows in a forward pass.
        every: steps between evaluations on held-out pairs and between checkpoints; None: once per epoch.
        patience: stop a vector after so many evaluations in a row without a lower held-out loss; None: never.

    Raises:
        ValueError: a number, layer or word that no model and no pairs could make right, with what was expected.
    """

    layers: Layers
    at: HookPoint = "resid_post"
    coefficient: float | Sequence[float] = 1.0
    factors: Sequence[float] | None = None
    steps: int | None = None
    lr: float | None = None
    batch_size: int | None = None
    seed: int | Sequence[int] = 0
    max_tokens: int = 64
    system: str | None = None
    rendered: bool = False
    positions: Positions = "all"
    schedule: Schedule | None = None
    warmup: int | None = None
    weight_decay: float = 0.0
    clip: float | None = 1.0
    start: float | None = None
    unit: Unit = "residual"
    rows: int = 64
    every: int | None = None
    patience: int | None = None

    def __post_init__(self) -> None:
        check_hook_point(self.at)
        whole = {name: 1 for name in ("steps", "batch_size", "max_tokens", "rows", "every", "patience")} | {"warmup": 0}
        for name, least in whole.items():
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < least):
                raise ValueError(f"{name} is {value!r}: expected an integer of at least {least}")
        for name in ("weight_decay", "clip", "start"):
            if getattr(self, name) is not None:
                check_not_negative(name, getattr(self, name))
        if self.lr is not None and not (is_number(self.lr) and self.lr > 0):
            raise ValueError(f"lr is {self.lr!r}: expected a positive learning rate")
        for name, known in (("unit", ("residual", "absolute")), ("schedule", ("linear", "cosine", "constant", None))):
            if getattr(self, name) not in known:
                there = " or ".join(repr(word) for word in known if word)
                raise ValueError(f"unknown {name} {getattr(self, name)!r}: expected {there}")
        Add(torch.ones(1), positions=self.positions)  # refuses what are no positions
        for name in ("coefficient", "factors"):
            if getattr(self, name) is not None:
                positive(name, getattr(self, name), distinct=name == "coefficient")
        if (
            not (seeds := listed(self.seed))
            or len(set(seeds)) < len(seeds)
            or not all(type(s) is int and s >= 0 for s in seeds)
        ):
            raise ValueError(
                f"seed is {self.seed!r}: expected an integer that is not negative, or several different ones"
            )

    def filled(self, method: Objective, n_layers: int, n_pairs: int) -> Course:
        """The same with nothing left open: the method's own values where there was None, layers, coefficients, factors
        and seeds as tuples.

        Raises:
            ValueError: a layer that the model does not have, a warm-up of all steps, a start that the method cannot
                start from.
        """
        own = method.defaults
        batch_size = min(self.batch_size or own["batch_size"], n_pairs)  # a batch never has a pair twice
        steps = self.steps or math.ceil(10 * n_pairs / batch_size)
        warmup = self.warmup
        if warmup is None:
            warmup = min(own["warmup"], (self.steps or 10 * n_pairs // batch_size) // 10)
        if warmup >= steps:
            raise ValueError(f"warmup is {warmup}, of {steps} steps: expected fewer than all")
        values: dict[str, Any] = {
            "layers": _layer_numbers(self.layers, n_layers),
            "coefficient": positive("coefficient", self.coefficient),
            "factors": positive("factors", own["factors"] if self.factors is None else self.factors),
            "steps": steps,
            "lr": float(own["lr"] if self.lr is None else self.lr),
            "batch_size": batch_size,
            "seed": tuple(listed(self.seed)),
            "schedule": self.schedule or own["schedule"],
            "warmup": warmup,
            "start": own["start"] if self.start is None else self.start,
        }
        method.check(values["start"])
        return Course(**(vars(self) | values | {"method": method, "n_pairs": n_pairs}))


@dataclass(frozen=True, kw_only=True)
class Course(Recipe):
    """Everything that decides what comes out of a training: the method, its recipe with nothing left open, how many
    pairs there are."""

    method: Objective
    n_pairs: int
    layers: tuple[int, ...]
    coefficient: tuple[float, ...]
    factors: tuple[float, ...]
    steps: int
    lr: float
    batch_size: int
    seed: tuple[int, ...]
    schedule: Schedule
    warmup: int
    start: float

    @property
    def grid(self) -> list[tuple[int, int, float]]:
        """(layer, seed, coefficient) of each vector."""
        return [(layer, seed, c) for layer in self.layers for seed in self.seed for c in self.coefficient]

    @property
    def interval(self) -> int:
        """Steps between evaluations and between checkpoints."""
        return self.every or math.ceil(self.n_pairs / self.batch_size)

    @property
    def middle(self) -> float:
        """The mean factor."""
        return sum(self.factors) / len(self.factors)

    def learning_rate(self, step: int) -> float:
        """Of a step counted from 0, in `Recipe.unit`s; never 0."""
        if step < self.warmup:
            return self.lr * (step + 1) / (self.warmup + 1)
        done = (step - self.warmup) / (self.steps - self.warmup)
        heights = {"linear": 1 - done, "cosine": 0.5 * (1 + math.cos(math.pi * done)), "constant": 1.0}
        return self.lr * heights[self.schedule]

    def batch(self, seed: int, step: int) -> list[int]:
        """The pairs of a step: the next ones in a new random order of all pairs for each epoch."""
        places = range(step * self.batch_size, (step + 1) * self.batch_size)
        orders = {
            epoch: np.random.default_rng([seed, ORDER, epoch]).permutation(self.n_pairs)
            for epoch in {place // self.n_pairs for place in places}
        }
        return [int(orders[place // self.n_pairs][place % self.n_pairs]) for place in places]

    def used(self) -> list[int]:
        """The pairs that any step of any vector draws."""
        if self.steps * self.batch_size >= self.n_pairs:
            return list(range(self.n_pairs))
        return sorted({pair for seed in self.seed for step in range(self.steps) for pair in self.batch(seed, step)})

    def drawn_factors(self, seed: int, step: int) -> list[float]:
        return np.random.default_rng([seed, FACTOR, step]).choice(self.factors, size=self.batch_size).tolist()

    def drawn_sign(self, seed: int, step: int) -> int:
        return int(np.random.default_rng([seed, SIGN, step]).choice((1, -1))) if self.method.draws_sign else 1

    def drawn_start(self, layer: int, seed: int, hidden: int) -> Tensor:
        normal = np.random.default_rng([seed, START, layer]).standard_normal(hidden)
        return torch.from_numpy(self.start * normal).float()

    def describe(self) -> dict[str, Any]:
        """JSON-serialisable, without what differs between the vectors of a grid."""
        names = [field.name for field in fields(Recipe) if field.name not in ("layers", "coefficient", "seed")]
        settings = {name: getattr(self, name) for name in names} | {"factors": list(self.factors)}
        objective = asdict(self.method)  # type: ignore[call-overload]
        return {"method": self.method.name, "objective": objective, "n_pairs": self.n_pairs} | settings


def read_options(texts: Iterable[str]) -> dict[str, Any]:
    """Fields of a Recipe from texts such as "lr=0.02", "schedule=cosine", "seed=[0, 1]" (JSON after the sign, else the
    text itself).

    Raises:
        ValueError: no such field, a field given twice, no sign.
    """
    known, options = [field.name for field in fields(Recipe)], {}
    for text in texts:
        name, sign, value = text.partition("=")
        if not sign or name not in known or name in options:
            fault = "is given twice" if name in options else "is no option of training"
            raise ValueError(f"{text!r} {fault}: expected NAME=VALUE with one of {', '.join(known)}")
        try:
            options[name] = json.loads(value)
        except ValueError:
            options[name] = value
    return options


def positive(name: str, value: Any, distinct: bool = False) -> tuple[float, ...]:
    """The numbers of `value`, which must all be positive, as a tuple."""
    numbers = (value,) if isinstance(value, (int, float)) else tuple(value)
    if not numbers or not all(is_number(n) and n > 0 for n in numbers):
        raise ValueError(f"{name} is {value!r}: expected positive numbers (a Pair's sign says which way)")
    if distinct and len(set(numbers)) < len(numbers):
        raise ValueError(f"{name} is {value!r}: one is named twice")
    return tuple(map(float, numbers))


def listed(value: Any) -> list[Any]:
    """One value or several, as a list."""
    return list(value) if isinstance(value, Iterable) and not isinstance(value, str | Mapping) else [value]


def _layer_numbers(layers: Layers, n_layers: int) -> tuple[int, ...]:
    if layers == "all":
        return tuple(range(n_layers))
    numbers = tuple(layer_numbers(listed(layers), n_layers))
    if len(set(numbers)) < len(numbers):
        raise ValueError(f"layers is {layers!r}: a layer is named twice")
    return numbers
