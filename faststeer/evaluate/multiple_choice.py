"""Multiple choice by likelihood: which answer does the model, steered or not, find likeliest?

Questions come from a local JSONL; nothing is downloaded, and nothing is generated.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from faststeer.evaluate.likelihood import ContinuationRow, Within, answer_ids, score_rows
from faststeer.evaluate.statistics import Rate
from faststeer.files import UNREADABLE, FormatError, json_lines
from faststeer.hf.batching import encode, padding_id
from faststeer.hf.encoding import encode_texts
from faststeer.hf.steering import steer
from faststeer.plan import Plan


@dataclass(frozen=True)
class Question:
    """A question, the texts it may be answered with, and which one is right (counted from 0)."""

    question: str
    choices: tuple[str, ...]
    answer: int

    def __post_init__(self) -> None:
        if not isinstance(self.question, str) or not self.question.strip():
            raise ValueError(f"the question is {self.question!r}: expected a text that is not blank")
        if len(self.choices) < 2 or not all(isinstance(c, str) and c.strip() for c in self.choices):
            raise ValueError(f"the choices are {list(self.choices)!r}: expected at least two texts that are not blank")
        if len(set(self.choices)) < len(self.choices):
            raise ValueError(f"the choices are {list(self.choices)!r}: one is given twice")
        if type(self.answer) is not int or not 0 <= self.answer < len(self.choices):
            raise ValueError(f"the answer is {self.answer!r}: expected a number from 0 to {len(self.choices) - 1}")


@dataclass(frozen=True)
class LikeliestChoice:
    """What the model finds likeliest.

    Args:
        chosen: by the sum of log-probabilities (lm-eval's `acc`).
        chosen_per_character: by that sum divided by the choice's characters (lm-eval's `acc_norm`).
        log_probabilities: that sum of each choice, in nats.
    """

    chosen: int
    chosen_per_character: int
    log_probabilities: tuple[float, ...]


@dataclass(frozen=True)
class Accuracy:
    """Share of questions answered rightly, by likelihood and by likelihood per character, and every answer."""

    accuracy: Rate
    accuracy_per_character: Rate
    choices: tuple[LikeliestChoice, ...]


def load_questions(path: str | os.PathLike[str]) -> list[Question]:
    """Read a JSONL: per line `{"question": text, "choices": [texts], "answer": number from 0, or the text itself}`.

    Raises:
        FileNotFoundError: no such file.
        FormatError: no UTF-8, no JSON, a missing field, an answer that is none of the choices; with file and line.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no questions at {path}: no such file")
    questions = [_question(data, where) for where, data in json_lines(path)]
    if not questions:
        raise FormatError(f"{path} holds no questions: expected one JSON object per line")
    return questions


def _question(data: Any, where: str) -> Question:
    whole = isinstance(data, dict) and {"question", "choices", "answer"} <= set(data)
    if not whole or not isinstance(data["choices"], list):
        raise FormatError(f'{where}: expected an object with "question", "choices" (a list) and "answer"')
    answer = data["answer"]
    if isinstance(answer, str):
        if answer not in data["choices"]:
            raise FormatError(f"{where}: the answer {answer!r} is none of the choices")
        answer = data["choices"].index(answer)
    try:
        return Question(data["question"], tuple(data["choices"]), answer)
    except UNREADABLE as error:
        raise FormatError(f"{where}: {error}") from error


def multiple_choice(
    model: Any,
    tokenizer: Any,
    questions: Sequence[Question],
    plans: Plan | Sequence[Plan | None] | None = None,
    *,
    chat: bool = True,
    separator: str = "",
    system: str | None = None,
    batch_size: int = 32,
    progress: bool = False,
    within: Within = steer,
) -> Accuracy | list[Accuracy]:
    """Answer every question by the likelihood of its choices, under one plan (or None) or under several.

    Args:
        chat: put the question to the model as a user's message, the choices being answers; False: as plain text.
        separator: put between question and choice (" " for plain text).
        batch_size: choices read together; those of several plans share batches.
        within: the context that puts plans on the model; others than `steer` are in `faststeer.observe`.

    Returns:
        an Accuracy for one plan or None, a list of them for several.

    Raises:
        ValueError: no questions, a choice without tokens, a question too long for the model, a plan that does not fit.
    """
    if not questions:
        raise ValueError("questions is empty: expected at least one")
    listed = [plans] if plans is None or isinstance(plans, Plan) else list(plans)
    texts = [question.question for question in questions]
    if chat:
        contexts = encode(tokenizer, texts, system, what="questions")
        pairs = [
            (context, answer_ids(tokenizer, separator + choice))
            for context, question in zip(contexts, questions, strict=True)
            for choice in question.choices
        ]
    else:
        pairs = [plain_pair(tokenizer, q.question, separator + c) for q in questions for c in q.choices]
    rows = [ContinuationRow(context, choice, plan) for plan in listed for context, choice in pairs]
    options: dict[str, Any] = {"batch_size": batch_size, "progress": progress, "within": within}
    scored = iter(score_rows(model, rows, pad_id=padding_id(tokenizer), **options))
    results = [_accuracy(questions, [[next(scored).total for _ in q.choices] for q in questions]) for _ in listed]
    return results[0] if plans is None or isinstance(plans, Plan) else results


def plain_pair(tokenizer: Any, context: str, continuation: str) -> tuple[list[int], list[int]]:
    """Token ids of a plain text's two parts: the whole is tokenized at once, so that a word that begins at the seam has
    the tokens it has in running text; white space at the seam belongs to the continuation."""
    bare = context.rstrip()
    continuation = context[len(bare) :] + continuation
    whole, before = encode_texts(tokenizer, [bare + continuation, bare])
    return whole[: len(before)], whole[len(before) :]


def _accuracy(questions: Sequence[Question], totals: Sequence[Sequence[float]]) -> Accuracy:
    choices = []
    for question, sums in zip(questions, totals, strict=True):
        per_character = [total / len(text) for total, text in zip(sums, question.choices, strict=True)]
        best, best_per_character = (max(range(len(v)), key=v.__getitem__) for v in (sums, per_character))
        choices.append(LikeliestChoice(best, best_per_character, tuple(sums)))
    n = len(questions)
    right = [sum(getattr(c, name) == q.answer for c, q in zip(choices, questions, strict=True)) for name in
             ("chosen", "chosen_per_character")]  # fmt: skip
    return Accuracy(Rate(right[0], n), Rate(right[1], n), tuple(choices))
