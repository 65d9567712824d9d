"""nnsight: a trace around `generate` whose block adds at the layers, an invoke per row for a plan per row."""

from __future__ import annotations

from importlib.metadata import version
from typing import Any

import numpy as np
import torch
from job import OnTransformers, main, row_plans
from nnsight import TransformersModel


class Nnsight(OnTransformers):
    def __init__(self, job: dict[str, Any]) -> None:
        super().__init__(job)
        self.versions["nnsight"] = version("nnsight")
        self.traced = TransformersModel(self.model, tokenizer=self.tokenizer, task="text-generation")

    def vector(self) -> None:
        traced, means = self.traced, []
        for texts in (self.job["positive"], self.job["negative"]):
            rows = []
            for start in range(0, len(texts), 32):
                batch = self.tokenizer(texts[start : start + 32], return_tensors="pt", padding=True)
                states = []
                with torch.no_grad(), traced.trace(dict(batch), use_cache=False):
                    for layer in traced.model.layers:
                        states.append(layer.output[:, -1].save())
                rows.append(torch.stack(states, 1))
            means.append(torch.cat(rows).mean(0))
        assert bool(torch.isfinite(means[0] - means[1]).all())

    def generate(self, case: str, new_tokens: int) -> int:
        traced, directions = self.traced, self.directions
        options = {"max_new_tokens": new_tokens, "min_new_tokens": new_tokens, "do_sample": False}
        if case == "unsteered":
            with torch.no_grad(), traced.generate(dict(self.batch), **options) as tracer:
                ids = tracer.result.save()
        elif case == "plan per row":
            with torch.no_grad(), traced.generate(**options) as tracer:
                for row, (what, layers, strength) in zip(self.job["prompts"], row_plans(self.job), strict=True):
                    with tracer.invoke({"input_ids": torch.tensor([row])}):
                        if layers:
                            for _ in tracer.iter[:new_tokens]:
                                for n in layers:
                                    h = traced.model.layers[n].output
                                    traced.model.layers[n].output = changed(h, what, strength, directions[n])
                with tracer.invoke():
                    ids = tracer.result.save()
        else:
            layers = self.layers(case)
            with torch.no_grad(), traced.generate(dict(self.batch), **options) as tracer:
                for _ in tracer.iter[:new_tokens]:
                    for n in layers:
                        traced.model.layers[n].output = traced.model.layers[n].output + directions[n]
                ids = tracer.result.save()
        return ids[:, self.batch["input_ids"].shape[1] :].numel()

    def logits(self, case: str) -> np.ndarray:
        traced, directions = self.traced, self.directions
        if case == "plan per row":
            with torch.no_grad(), traced.trace() as tracer:
                for row, (what, layers, strength) in zip(self.job["prompts"], row_plans(self.job), strict=True):
                    with tracer.invoke({"input_ids": torch.tensor([row])}):
                        for n in layers:
                            h = traced.model.layers[n].output
                            traced.model.layers[n].output = changed(h, what, strength, directions[n])
                with tracer.invoke():
                    logits = traced.lm_head.output[:, -1].save()
        else:
            layers = self.layers(case)
            with torch.no_grad(), traced.trace(dict(self.batch), use_cache=False):
                for n in layers:
                    traced.model.layers[n].output = traced.model.layers[n].output + directions[n]
                logits = traced.lm_head.output[:, -1].save()
        return logits.float().numpy()


def changed(h: torch.Tensor, what: str, strength: float, v: torch.Tensor) -> torch.Tensor:
    if what == "add":
        return h + strength * v
    q = v / v.norm()
    return h - strength * (h @ q).unsqueeze(-1) * q


if __name__ == "__main__":
    main(Nnsight)
