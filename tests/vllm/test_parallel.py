"""Two tensor-parallel ranks, or two pipeline stages, in processes of their own, and the engine in another: plans reach
all of them, and what probes saw comes back from all."""

from typing import Any

import pytest
import torch
from requests_mixed import by_engine, by_hugging_face, token_ids, tokens

import faststeer as fs


@pytest.mark.parametrize(
    "split",
    [
        {"tensor_parallel_size": 2},
        # Eager, vLLM 0.32's first runner has no pipeline on a CPU: it makes the stages' tensors when it compiles.
        {"pipeline_parallel_size": 2, "enforce_eager": False},
    ],
    ids=["tensor", "pipeline"],
)
def test_two_ranks_give_what_hugging_face_gives(start: Any, monkeypatch: pytest.MonkeyPatch, split: Any) -> None:
    from faststeer.vllm.frontend import front_end
    from faststeer.vllm.worker import projections

    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")
    model, tokenizer = fs.demo.load()
    prompts, generator = token_ids(tokenizer), torch.Generator().manual_seed(5)
    directions = 80 * torch.nn.functional.normalize(torch.randn(8, 128, generator=generator), dim=1)
    plans: list[fs.Plan | None] = [fs.Plan([fs.Add(d, layers=i % 6)]) for i, d in enumerate(directions)]
    plans[2] = fs.Plan([fs.Ablate(directions[:3], layers="all", at=("resid_pre", "attn_out", "mlp_out"))])
    plans[3], plans[4] = None, fs.Plan([fs.Probe(directions[4], layers=[1, 2, 4])])
    requests = list(zip(prompts, plans, strict=True))
    engine = start({"hook_points": "all", "max_dose": 1e38}, distributed_executor_backend="mp", **split)
    answers = by_engine(engine, requests)
    assert tokens(answers) == by_hugging_face(model, requests)
    told = engine.collective_rpc("faststeer_projections_of", args=(answers[4].request_id,))
    assert [len(choices) for choices in told] == ([1, 0] if "tensor_parallel_size" in split else [1, 1])
    seen = projections(engine, answers[4].request_id)
    assert seen is not None and set(seen) == {"resid_pre.2", "resid_pre.3", "resid_pre.5"}
    assert all(of_site["tokens"][-1] == len(prompts[4]) + 18 for of_site in seen.values())
    ids = torch.randint(model.config.vocab_size, (1, 64), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        states = model(ids, output_hidden_states=True).hidden_states[:-1]  # the last ones are normed
    norms = front_end(engine).norms
    assert norms is not None and sorted(norms) == list(range(7))
    assert [norms[i] for i in range(6)] == pytest.approx([float(h[0].norm(dim=-1).median()) for h in states], rel=1e-4)
    # In the first layer, and in the last, which the other stage has.
    for layer in (0, 5):
        plan = fs.Plan([fs.Add(directions[0], 1e38, layers=layer, at="resid_post")])
        *others, ended = by_engine(engine, [*requests[:4], (prompts[7], plan)])
        assert tokens(others) == tokens(answers[:4])
        assert ended.outputs[0].finish_reason == "error" and "overflowed" in ended.outputs[0].stop_reason
    assert tokens(by_engine(engine, requests[:4])) == tokens(answers[:4])
