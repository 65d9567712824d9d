"""What every step of a study needs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from faststeer.artefacts import ArtefactStore
from faststeer.behaviours.job import BehaviourJob
from faststeer.evaluate.judging import signs
from faststeer.extract.sweep import Reader
from faststeer.intervention import Add
from faststeer.observe.study.settings import Settings
from faststeer.plan import Plan
from faststeer.vector import SteeringVector

# Each side of a study: the sign of the coefficient, and what the judge says of an answer that it is to bring about.
SIDES: Mapping[str, int] = {"induce": 1, "suppress": -1}


@dataclass
class Job(BehaviourJob):
    """A comparison of what drives vectors: what is asked, and how many examples are patched together, which no result
    depends on beyond rounding."""

    parts: ArtefactStore
    settings: Settings
    patch_batch: int

    @property
    def patching(self) -> dict[str, Any]:
        return {"batch_size": self.patch_batch, "progress": self.progress}

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
        for judge in (self.reader.judge, self.reader.coherence):
            if getattr(judge, "reads_prompts", True):
                raise ValueError(
                    f"a study shows its judges answers without their prompts, which {judge and judge.name!r} reads: "
                    "take a behaviour with a judge of words, or a classifier of the answer alone"
                )
        return self.reader
