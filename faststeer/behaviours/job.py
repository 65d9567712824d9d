"""What long work on a behaviour has in common: the comparison of methods, the search and the study are such jobs, each
with settings of its own. Finished work is read from the parts that are kept, and never done again."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from rich.console import Console

from faststeer.artefacts import ArtefactStore, fingerprint
from faststeer.behaviours.behaviour import Behaviour
from faststeer.evaluate.generate import seconds_per_answer
from faststeer.extract.sweep import Reader
from faststeer.hf.batching import Prompt
from faststeer.progress import forecast
from faststeer.version import versions


def parts_in(folder: str | os.PathLike[str], format: str, model: Any, tokenizer: Any) -> ArtefactStore:
    """The parts of work in `format` on a model, which depend on its weights, its chat template and all versions."""
    return ArtefactStore(folder, format, fingerprint(model), versions(), getattr(tokenizer, "chat_template", None))


@dataclass
class BehaviourJob:
    """Work on one behaviour of one model.

    Args:
        parts: where finished parts are; None: nothing is kept.
        batch_size, progress: how it runs; no result depends on them beyond rounding.
    """

    model: Any
    tokenizer: Any
    behaviour: Behaviour
    parts: ArtefactStore | None
    batch_size: int
    progress: bool

    @property
    def passing(self) -> dict[str, Any]:
        """The options of every pass over prompts."""
        return {"batch_size": self.batch_size, "progress": self.progress}

    @cached_property
    def reader(self) -> Reader:
        """The behaviour's judge and that of coherence (ValueError: one that draws no line)."""
        return Reader.made(self.behaviour.judge, self.behaviour.coherence, self.model, self.tokenizer)

    def prompts(self, split: str, side: str, n: int | None = None) -> Sequence[Prompt]:
        """At most n prompts to induce or to suppress the behaviour on, of "train", "validation" or "test"."""
        return getattr(getattr(self.behaviour, split), side)[:n]

    def say(self, text: str) -> None:
        """On stderr, with the progress bars."""
        if self.progress:
            Console(stderr=True).print(text, highlight=False)

    def forecast(self, n_answers: int, max_new_tokens: int, less: str, more: str = "") -> None:
        """Say before any work how long so many answers will take, which is most of it, and what takes less."""
        options: dict[str, Any] = {"max_new_tokens": max_new_tokens, "batch_size": self.batch_size}
        prompts = self.prompts("test", "induce")
        seconds = n_answers * seconds_per_answer(self.model, self.tokenizer, prompts, n_answers, **options)
        forecast(f"{n_answers} answers of {max_new_tokens} tokens at most{more}", seconds, less)
