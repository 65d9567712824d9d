"""repeng: `ControlVector.train` with its default method (PCA of differences), `ControlModel` around `generate`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from typing import Any

from job import OnTransformers, Unsupported, main
from repeng import ControlModel, ControlVector, DatasetEntry


class Repeng(OnTransformers):
    def __init__(self, job: dict[str, Any]) -> None:
        super().__init__(job)
        self.versions["repeng"] = version("repeng")
        self.control: ControlModel | None = None

    def vector(self) -> None:
        entries = [
            DatasetEntry(positive=a, negative=b)
            for a, b in zip(self.job["positive"], self.job["negative"], strict=True)
        ]
        ControlVector.train(self.model, self.tokenizer, entries, batch_size=32)

    @contextmanager
    def steered(self, case: str) -> Iterator[None]:
        if case == "plan per row":
            raise Unsupported("one control vector for the whole batch")
        layers = self.layers(case)
        if not layers:
            yield
            return
        control = ControlModel(self.model, layers)
        control.set_control(
            ControlVector(self.model.config.model_type, {n: self.directions[n].numpy() for n in layers}), 1.0
        )
        try:
            yield
        finally:
            control.unwrap()


if __name__ == "__main__":
    main(Repeng)
