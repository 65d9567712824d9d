"""A sweep answered by vLLM holds the answers that the Engine gives, and their projections, which the model that judges
reads off either."""

from typing import Any

import numpy as np
import torch

import faststeer as fs
from faststeer.evaluate.sweep import Store, Sweep, run
from faststeer.vllm.runner import VllmEngine


def test_the_same_answers_as_the_engine(tmp_path: Any) -> None:
    model, tokenizer = fs.demo.load()
    vector = fs.SteeringVector({n: torch.randn(128, generator=torch.Generator().manual_seed(n)) for n in (2, 3)})
    gated = fs.Plan([fs.Ablate(vector, at="resid_mid", when=fs.Gate(vector))])
    found: dict[str, Any] = {}
    projected: dict[str, Any] = {}
    for engine, made in (("faststeer", None), ("vllm", VllmEngine)):
        sweep = Sweep(
            fs.demo.prompts("refusal", "test")[0][:3], {"v": vector}, coefficients=(0.5, 2.0), plans={"gated": gated},
            judges=["refusal"], text=(), max_new_tokens=12, engine=engine,
        )  # fmt: skip
        with Store(tmp_path / f"{engine}.db") as store:
            identity = run(sweep, model, tokenizer, store, max_batch=8, engine=made, progress=False)
            found[engine] = store.answers(identity)
            projected[engine] = list(store.projections(identity))
    assert len(found["vllm"]) == 3 * len(sweep.settings)
    assert found["vllm"] == found["faststeer"]
    assert len(projected["vllm"]) == len(projected["faststeer"]) > 3 * len(sweep.settings)
    for ours, theirs in zip(projected["vllm"], projected["faststeer"], strict=True):
        assert np.array_equal(ours.pop("values"), theirs.pop("values")) and ours == theirs
