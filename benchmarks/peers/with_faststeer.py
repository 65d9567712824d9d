"""faststeer: difference in means, `fs.steer` around `generate`, or the Engine (variant "engine")."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

from job import OnTransformers, main, row_plans

import faststeer as fs


class Faststeer(OnTransformers):
    def __init__(self, job: dict[str, Any]) -> None:
        super().__init__(job)
        self.versions["faststeer"] = fs.__version__
        vector = fs.SteeringVector(dict(enumerate(self.directions)), at="resid_post")
        one, every = (fs.Plan([fs.Add(vector, 1.0, layers=which)]) for which in (job["layer"], job["layers"]))
        own = [
            fs.Plan(
                [fs.Add(vector, strength, layers=layers)]
                if what == "add"
                else [fs.Ablate(vector, layers=layers, at="resid_post")]
            )
            if layers
            else None
            for what, layers, strength in row_plans(job)
        ]
        self.plans = {"unsteered": None, "one layer": one, "every layer": every, "plan per row": own}
        self.engine = None
        if job["variant"] == "engine":
            length = max(map(len, job["prompts"])) + job["new_tokens"]
            self.engine = fs.Engine(self.model, self.tokenizer, max_batch=len(job["prompts"]), max_length=length)

    def vector(self) -> None:
        # The texts are rendered; without a template they pass as they are.
        template, self.tokenizer.chat_template = self.tokenizer.chat_template, None
        try:
            sides = self.job["positive"], self.job["negative"]
            fs.extract.dim(self.model, self.tokenizer, *sides, at="resid_post", position=-1)
        finally:
            self.tokenizer.chat_template = template

    def steered(self, case: str) -> AbstractContextManager[Any]:
        plan = self.plans[case]
        return nullcontext() if plan is None else fs.steer(self.model, plan)

    def generate(self, case: str, new_tokens: int) -> int:
        if self.engine is None:
            return super().generate(case, new_tokens)
        answers = self.engine.generate(self.job["prompts"], self.plans[case], max_new_tokens=new_tokens)
        return sum(len(answer.token_ids) for answer in answers)


if __name__ == "__main__":
    main(Faststeer)
