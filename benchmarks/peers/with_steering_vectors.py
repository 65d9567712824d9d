"""steering-vectors: `train_steering_vector` with its default method (mean of differences), and `apply`."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from importlib.metadata import version
from typing import Any

from job import OnTransformers, Unsupported, main
from steering_vectors import SteeringVector, train_steering_vector


class SteeringVectors(OnTransformers):
    def __init__(self, job: dict[str, Any]) -> None:
        super().__init__(job)
        self.versions["steering-vectors"] = version("steering-vectors")

    def vector(self) -> None:
        pairs = list(zip(self.job["positive"], self.job["negative"], strict=True))
        train_steering_vector(self.model, self.tokenizer, pairs, batch_size=32)

    def steered(self, case: str) -> AbstractContextManager[Any]:
        if case == "plan per row":
            raise Unsupported("one vector for the whole batch")
        layers = self.layers(case)
        if not layers:
            return nullcontext()
        vector = SteeringVector({n: self.directions[n] for n in layers}, "decoder_block")
        return vector.apply(self.model)


if __name__ == "__main__":
    main(SteeringVectors)
