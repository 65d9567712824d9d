"""What every step of a study needs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from rich.console import Console

from faststeer.artefacts import ArtefactStore
from faststeer.behaviours import Behaviour
from faststeer.evaluate.judging import signs
from faststeer.extract.sweep import Reader
from faststeer.hf.batching import Prompt
from faststeer.intervention import Add
from faststeer.observe.study.settings import Settings
from faststeer.plan import Plan
from faststeer.vector import SteeringVector

# Each side of a study: the sign of the coefficient, and what the judge says of an answer that it is to bring about.
SIDES: Mapping[str, int] = {"induce": 1, "suppress": -1}


@dataclass(frozen=True)
class Job:
    """A model, a behaviour, what is asked, where finished parts are, and how it runs (which no result depends on)."""

    model: Any
    tokenizer: Any
    behaviour: Behaviour
    settings: Settings
    parts: ArtefactStore
    batch_size: int
    patch_batch: int
    progress: bool

    @property
    def passing(self) -> dict[str, Any]:
        return {"batch_size": self.batch_size, "progress": self.progress}

    @property
    def patching(self) -> dict[str, Any]:
        return {"batch_size": self.patch_batch, "progress": self.progress}

    def say(self, text: str) -> None:
        """On stderr, with the progress bars."""
        if self.progress:
            Console(stderr=True).print(text, highlight=False)

    def plan(self, vector: SteeringVector, side: str) -> Plan:
        """The vector added where the behaviour is to be induced, subtracted where it is to be suppressed."""
        return Plan([Add(vector, SIDES[side] * self.settings.coefficient)])

    def shown(self, side: str, text: str) -> bool:
        """Whether an answer shows the behaviour (its opposite, on the side that suppresses it)."""
        return signs(self._reader.judge, [""], [text]) == [SIDES[side]]

    def coherent(self, text: str) -> bool:
        assert self._reader.coherence is not None
        return signs(self._reader.coherence, [""], [text]) == [1]

    @cached_property
    def _reader(self) -> Reader:
        """The behaviour's judges, which are shown answers alone here."""
        reader = Reader.made(self.behaviour.judge, self.behaviour.coherence, self.model, self.tokenizer)
        for judge in (reader.judge, reader.coherence):
            if getattr(judge, "reads_prompts", True):
                raise ValueError(
                    f"a study shows its judges answers without their prompts, which {judge and judge.name!r} reads: "
                    "take a behaviour with a judge of words, or a classifier of the answer alone"
                )
        return reader

    def prompts(self, split: str, side: str, n: int) -> Sequence[Prompt]:
        """At most n prompts to induce or to suppress the behaviour on, of "train", "validation" or "test"."""
        return getattr(getattr(self.behaviour, split), side)[:n]
