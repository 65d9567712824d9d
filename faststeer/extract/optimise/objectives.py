"""What each method asks of a steering vector: which completions are compared under which intervention, and the loss.

Formulas only. log p(y) is the sum of the log probabilities of a completion's tokens, |y| their number (at most
`max_tokens`); p_v is the model under the vector's intervention, p_0 the unsteered one; sigma the logistic function.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from faststeer.extract.pairs import Text

Suppression = Literal["null", "subtract"]


class Side(NamedTuple):
    """A completion, and its log probability under the unsteered model (NaN where no objective needs it)."""

    text: Text
    reference: float


class Example(NamedTuple):
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


class Scores(NamedTuple):
    """Of terms `[terms]`: log p_v, |y| and log p_0 of winners and losers (empty without losers)."""

    winner: Tensor
    winner_length: Tensor
    winner_reference: Tensor
    loser: Tensor
    loser_length: Tensor
    loser_reference: Tensor


class Objective(Protocol):
    """A method's name, what its pairs need, and whether each step adds or subtracts the vector by chance."""

    @property
    def name(self) -> str: ...
    @property
    def needs_rejected(self) -> bool: ...
    @property
    def needs_reference(self) -> bool: ...
    @property
    def draws_sign(self) -> bool: ...

    def terms(self, example: Example, coefficient: float, sign: int) -> list[Term]:
        """The terms of a pair, their losses to be summed; `coefficient` > 0, `sign` drawn (1 if none is)."""
        ...

    def losses(self, scores: Scores) -> Tensor:
        """`[terms]`."""
        ...


@dataclass(frozen=True)
class NextToken:
    """-log p_v(chosen) / |chosen|, or without the division; v times sign x coefficient is added.

    Source: arXiv 2604.08524, whose formula is the sum over tokens and whose code takes the mean.
    """

    length_normalised: bool = True
    name: ClassVar[str] = "ntp"
    needs_rejected: ClassVar[bool] = False
    needs_reference: ClassVar[bool] = False
    draws_sign: ClassVar[bool] = False

    def terms(self, example: Example, coefficient: float, sign: int) -> list[Term]:
        return [Term(example.chosen, None, example.sign * coefficient)]

    def losses(self, scores: Scores) -> Tensor:
        return -scores.winner / (scores.winner_length if self.length_normalised else 1)


@dataclass(frozen=True)
class Preference:
    """-log sigma(D), D = b log p_v(w) / |w| - log p_v(l) / |l|, b = max((log p_0(l) - log p_0(w)) phi, 1).

    One direction ("po"): w, l = chosen, rejected; v times sign x coefficient is added. Source: arXiv 2604.08524.

    Two directions ("reps"), summed: v times coefficient is added and w, l = positive, negative; v is suppressed and
    w, l = negative, positive. Suppressed: "null", h - relu(h . q) q, or "subtract", v times coefficient subtracted.
    Source: arXiv 2505.20809, with phi = 1; its code has both suppressions.
    """

    phi: float
    suppression: Suppression | None = None  # None: one direction
    needs_rejected: ClassVar[bool] = True
    needs_reference: ClassVar[bool] = True
    draws_sign: ClassVar[bool] = False

    @property
    def name(self) -> str:
        return "po" if self.suppression is None else "reps"

    def terms(self, example: Example, coefficient: float, sign: int) -> list[Term]:
        if self.suppression is None:
            return [Term(example.chosen, example.other, example.sign * coefficient)]
        return [
            Term(example.positive, example.negative, coefficient),
            Term(example.negative, example.positive, None if self.suppression == "null" else -coefficient),
        ]

    def losses(self, scores: Scores) -> Tensor:
        b = ((scores.loser_reference - scores.winner_reference) * self.phi).clamp(min=1)
        margin = b * scores.winner / scores.winner_length - scores.loser / scores.loser_length
        return -F.logsigmoid(margin)


@dataclass(frozen=True)
class Bidirectional:
    """-log sigma(d beta (log p_v(positive) / p_0(positive) - log p_v(negative) / p_0(negative))), d = +1 or -1 with
    equal chance at every step, v times d x coefficient being added.

    Source: arXiv 2406.00045 (BiPO). Log probabilities are sums, not means, as there.
    """

    beta: float = 0.1
    name: ClassVar[str] = "bipo"
    needs_rejected: ClassVar[bool] = True
    needs_reference: ClassVar[bool] = True
    draws_sign: ClassVar[bool] = True

    def terms(self, example: Example, coefficient: float, sign: int) -> list[Term]:
        # d (f(positive) - f(negative)) is f(winner) - f(loser), the two changing places with d.
        sides = (example.positive, example.negative) if sign > 0 else (example.negative, example.positive)
        return [Term(*sides, sign * coefficient)]

    def losses(self, scores: Scores) -> Tensor:
        gain = (scores.winner - scores.winner_reference) - (scores.loser - scores.loser_reference)
        return -F.logsigmoid(self.beta * gain)


def scores_of(terms: list[Term], winner: Tensor, loser: Tensor) -> Scores:
    """`winner` and `loser`: log p_v `[terms]`, `loser` empty where the terms have none."""

    def lengths(sides: list[Side]) -> Tensor:
        return torch.tensor([len(side.text.completion) for side in sides]).to(winner)

    def references(sides: list[Side]) -> Tensor:
        return torch.tensor([side.reference for side in sides], dtype=torch.float64).to(winner)

    winners = [term.winner for term in terms]
    losers = [term.loser for term in terms if term.loser is not None]
    return Scores(winner, lengths(winners), references(winners), loser, lengths(losers), references(losers))
