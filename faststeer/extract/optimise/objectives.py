"""The methods, as what each asks of a steering vector: which completions are compared under which intervention, the
loss, and where its settings differ from its source's.

Formulas only. log p(y) is the sum of the log probabilities of a completion's tokens, |y| their number (at most
`max_tokens`); p_v is the model under the vector's intervention, p_0 the unsteered one; sigma the logistic function.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from faststeer.hf.batching import TokenRow

Suppression = Literal["null", "subtract"]


class Side(NamedTuple):
    """A completion, and its log probability under the unsteered model (NaN where no objective needs it)."""

    text: TokenRow
    reference: float


class TokenizedPair(NamedTuple):
    """A Pair in tokens."""

    chosen: Side
    rejected: Side | None
    sign: int

    @property
    def positive(self) -> Side:
        return self.chosen if self.sign > 0 else self.other

    @property
    def negative(self) -> Side:
        return self.other if self.sign > 0 else self.chosen

    @property
    def other(self) -> Side:
        assert self.rejected is not None
        return self.rejected


class Term(NamedTuple):
    """One summand of a loss: the completions under an intervention. `coefficient` None: the vector's direction is
    taken out where the residual stream points along it, h - relu(h . q) q with q = v / |v|."""

    winner: Side
    loser: Side | None
    coefficient: float | None


class SideScores(NamedTuple):
    """Of all winners or all losers of some terms, `[terms]` (empty for terms without losers): log p_v, |y|, log p_0."""

    log_p: Tensor
    length: Tensor
    reference: Tensor

    @classmethod
    def of(cls, sides: Sequence[Side], log_p: Tensor) -> SideScores:
        """`log_p`: log p_v of each side's completion."""
        lengths = torch.tensor([len(side.text.completion) for side in sides])
        references = torch.tensor([side.reference for side in sides], dtype=torch.float64)
        return cls(log_p, lengths.to(log_p), references.to(log_p))


class Objective:
    """A method: a subclass gives `name`, `terms` and `losses`, and whatever else differs from what stands here.

    Attributes:
        name: of the method.
        needs_rejected, needs_reference: whether pairs need a rejected completion, and log p_0.
        draws_sign: whether each step adds or subtracts the vector by chance.
        defaults: what the method takes for everything that a Recipe leaves open.
    """

    name: ClassVar[str]
    needs_rejected: ClassVar[bool] = True
    needs_reference: ClassVar[bool] = True
    draws_sign: ClassVar[bool] = False
    defaults: ClassVar[Mapping[str, Any]] = {
        "factors": (2.0, 4.0, 6.0, 8.0, 10.0, 12.0, 14.0, 16.0, 18.0, 20.0),
        "lr": 0.01,
        "batch_size": 12,
        "schedule": "linear",
        "warmup": 0,
        "start": 0.01,
    }

    def check(self, start: float) -> None:
        """Raise ValueError where a vector cannot be trained from numbers of this standard deviation."""

    def terms(self, example: TokenizedPair, coefficient: float, sign: int) -> list[Term]:
        """The terms of a pair, their losses to be summed; `coefficient` > 0, `sign` drawn (1 if none is)."""
        raise NotImplementedError

    def losses(self, winner: SideScores, loser: SideScores) -> Tensor:
        """`[terms]`."""
        raise NotImplementedError


@dataclass(frozen=True)
class NTP(Objective):
    """Next-token prediction: -(1/|y|) sum_i log p_v(y_i | prompt, y_<i), y the chosen completion, while sign x
    coefficient x factor x v is added at every token of prompt and completion.

    Source: arXiv 2604.08524 (10 epochs of AdamW without weight decay, linear decay, gradient norm clipped at 1, first
    64 tokens, factors 2, 4, ..., 20, start 0.01 N(0, I), lr 0.01 or 0.04, batches of 6 or 12). Its formula sums over
    tokens, its code takes the mean, as is done here; `length_normalised=False` sums. Its learning rate falls once per
    epoch, here at every step. Its learning rate and start are absolute, here in units of the residual stream's size
    (`Recipe.unit`), so that one default suits all models. It rescales the vector to the norm of the difference in means
    at the end; here it comes scaled to the middle of the strengths it was trained at (`Run.vector`).

    Its own recipe: factors 2, 4, ..., 20; lr 0.01; batches of 12; linear decay without warm-up; start 0.01.
    """

    length_normalised: bool = True
    name: ClassVar[str] = "ntp"
    needs_rejected: ClassVar[bool] = False
    needs_reference: ClassVar[bool] = False

    def terms(self, example: TokenizedPair, coefficient: float, sign: int) -> list[Term]:
        """One term: the chosen completion, under the vector times the sign of the pair and the coefficient."""
        return [Term(example.chosen, None, example.sign * coefficient)]

    def losses(self, winner: SideScores, loser: SideScores) -> Tensor:
        """-log p_v(w), divided by the length of w unless `length_normalised` is False; one number per example."""
        return -winner.log_p / (winner.length if self.length_normalised else 1)


@dataclass(frozen=True)
class PO(Objective):
    """Preference optimisation, RePS in one direction: -log sigma(D), D = (b/|w|) log p_v(w) - (1/|l|) log p_v(l), w and
    l the chosen and the rejected completion, both under sign x coefficient x factor x v; b = max((log p_0(l) -
    log p_0(w)) phi, 1). Means over tokens, but b takes sums, as in the source.

    Source: arXiv 2604.08524, phi 0.02 or 1e-5 (b = 1 for nearly all pairs); settings and what differs as in `NTP`.

    A preference is also won by making both completions unlikely, the rejected one more so: the loss goes on falling as
    the vector grows, past the size at which answers break, and the held-out loss does not show it. Scale the vector to
    the length of the difference in means, as the source does (`faststeer.algebra.normalise`), or take fewer steps. The
    same holds of `RePS` and `BiPO`.

    Args:
        phi: how much an unlikely chosen completion is weighted up.

    Its own recipe is that of `NTP`. Every pair needs a rejected completion.
    """

    phi: float = 0.02
    name: ClassVar[str] = "po"

    def __post_init__(self) -> None:
        check_not_negative("phi", self.phi)

    def terms(self, example: TokenizedPair, coefficient: float, sign: int) -> list[Term]:
        """One term: the chosen completion against the other, under the vector times the sign and the coefficient."""
        return [Term(example.chosen, example.other, example.sign * coefficient)]

    def losses(self, winner: SideScores, loser: SideScores) -> Tensor:
        """-log s(b log p_v(w) / |w| - log p_v(l) / |l|) with b from the unsteered model; one number per example."""
        b = ((loser.reference - winner.reference) * self.phi).clamp(min=1)
        return -F.logsigmoid(b * winner.log_p / winner.length - loser.log_p / loser.length)


@dataclass(frozen=True)
class RePS(PO):
    """Reference-free preference steering in both directions: -log sigma(D+) - log sigma(D-). D+ as in `PO` with the
    positive completion winning, while coefficient x factor x v is added; D- with the negative one winning, while v is
    suppressed. Every pair takes part in both directions whatever its sign.

    Source: arXiv 2505.20809 and its code (factors 2, 4, ..., 20, batches of 6 pairs, phi 1, AdamW without weight decay,
    lr 0.04 for 2B models, linear decay). What differs: the code divides by the length of prompt and completion, here,
    as in the paper, by that of the completion; the code draws a factor each for winner and loser, here, as in the
    paper's formula, both are under the same; the code's bias beside the factor and its dropout are left out; learning
    rate and start as in `NTP`.

    Args:
        phi: as in `PO`.
        suppression: "null" (the paper's): h becomes h - relu(h . q) q, q = v / |v|; or "subtract": coefficient x factor
            x v is subtracted. Only the second trains for being subtracted.

    Its own recipe: that of `NTP` with lr 0.04 and batches of 6. Every pair needs a rejected completion.
    """

    phi: float = 1.0
    suppression: Suppression = "null"
    name: ClassVar[str] = "reps"
    defaults: ClassVar[Mapping[str, Any]] = {**Objective.defaults, "lr": 0.04, "batch_size": 6}

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.suppression not in ("null", "subtract"):
            raise ValueError(f"unknown suppression {self.suppression!r}: expected 'null' or 'subtract'")

    def check(self, start: float) -> None:
        """Raise ValueError where training would start at a zero vector, which has no direction to take out."""
        if self.suppression == "null" and start == 0:
            raise ValueError("start is 0.0: a zero vector has no direction to take out; start elsewhere, or 'subtract'")

    def terms(self, example: TokenizedPair, coefficient: float, sign: int) -> list[Term]:
        """Two terms: the positive completion under the vector, the negative one with the vector suppressed."""
        return [
            Term(example.positive, example.negative, coefficient),
            Term(example.negative, example.positive, None if self.suppression == "null" else -coefficient),
        ]


@dataclass(frozen=True)
class BiPO(Objective):
    """Bi-directional preference optimisation: -log sigma(d beta (log p_v(positive)/p_0(positive) -
    log p_v(negative)/p_0(negative))), d = +1 or -1 drawn once per step, while d x coefficient x factor x v is added;
    log p the sum over tokens. Every pair takes part whatever its sign.

    Source: arXiv 2406.00045 and its code: beta 0.1, batches of 4, AdamW with lr 5e-4 (weight decay 0.05 is declared
    there and never passed on), cosine decay after 100 steps of warm-up, start at zero, 20 to 100 epochs. What differs:
    the learning rate is in other units and another (`Recipe.unit`); 10 epochs unless `steps` says otherwise;
    completions are cut at `Recipe.max_tokens`.

    Args:
        beta: temperature of the preference.

    Its own recipe: no factors; lr 0.01; batches of 4; cosine decay after a warm-up of 100 steps (a tenth of all, where
    that is less); a start at zero. Every pair needs a rejected completion.
    """

    beta: float = 0.1
    name: ClassVar[str] = "bipo"
    draws_sign: ClassVar[bool] = True
    defaults: ClassVar[Mapping[str, Any]] = {
        "factors": (1.0,),
        "lr": 0.01,
        "batch_size": 4,
        "schedule": "cosine",
        "warmup": 100,
        "start": 0.0,
    }

    def __post_init__(self) -> None:
        check_not_negative("beta", self.beta)

    def terms(self, example: TokenizedPair, coefficient: float, sign: int) -> list[Term]:
        """One term: the positive completion wins where `sign` is +1, the negative one where it is -1."""
        # d (f(positive) - f(negative)) is f(winner) - f(loser), the two changing places with d.
        sides = (example.positive, example.negative) if sign > 0 else (example.negative, example.positive)
        return [Term(*sides, sign * coefficient)]

    def losses(self, winner: SideScores, loser: SideScores) -> Tensor:
        """-log s(beta (log p_v/p_0 (w) - log p_v/p_0 (l))); one number per example."""
        return -F.logsigmoid(self.beta * ((winner.log_p - winner.reference) - (loser.log_p - loser.reference)))


def is_number(value: Any) -> bool:
    """Whether a setting is a finite number."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def check_not_negative(name: str, value: Any) -> None:
    """Raise ValueError unless a setting is a finite number of at least 0."""
    if not is_number(value) or value < 0:
        raise ValueError(f"{name} is {value!r}: expected a finite number that is not negative")


# Each method under the name by which the command line, behaviours and studies know it.
METHODS: dict[str, type[NTP] | type[PO] | type[BiPO]] = {m.name: m for m in (NTP, PO, RePS, BiPO)}
