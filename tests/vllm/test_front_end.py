"""Plans on their way into an `LLM`: refused where faststeer is off, defaults, names and values where it is on."""

from typing import Any

import pytest
import torch

import faststeer as fs
import faststeer.vllm
from faststeer.vllm.frontend import front_end

STRONG = fs.SteeringVector({3: 400.0 * torch.nn.functional.normalize(torch.ones(128), dim=0)})


def answer(llm: Any, payload: Any, prompts: int = 1) -> list[tuple[int, ...]]:
    from vllm import SamplingParams

    extra = payload if payload is None or isinstance(payload, dict) else {"faststeer": payload}
    parameters = SamplingParams(max_tokens=12, temperature=0, extra_args=extra)
    asked = [{"prompt_token_ids": list(range(20, 60))}] * prompts
    answers = llm.generate(asked, parameters, use_tqdm=False)
    assert parameters.extra_args is extra  # the caller's stay the caller's
    return [tuple(a.outputs[0].token_ids) for a in answers]


def test_off_is_vllm_as_it_was_but_for_plans(start: Any) -> None:
    llm = start(None)
    plain = answer(llm, None)
    with pytest.raises(ValueError, match="this server does not steer: start it with FASTSTEER_VLLM=1"):
        answer(llm, fs.Plan([fs.Add(STRONG)]))
    with pytest.raises(ValueError, match="does not steer"):
        answer(llm, faststeer.vllm.plan("calm"))
    assert answer(llm, faststeer.vllm.plan(None)) == answer(llm, {"other": 1}) == plain
    with pytest.raises(RuntimeError, match="faststeer is off in this engine"):
        front_end(llm)
    worker = llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker
    assert not hasattr(worker, "faststeer")
    assert all("forward" not in vars(module) for module in worker.model_runner.get_model().modules())


def test_on(start: Any, tmp_path: Any) -> None:
    from vllm.sampling_params import BeamSearchParams

    STRONG.save(tmp_path / "strong.safetensors")
    (tmp_path / "usual.json").write_text('{"add": "strong"}')
    # Room for fewer tokens in a step than norms are measured on.
    llm = start({"folder": str(tmp_path), "default_plan": "usual"}, max_num_batched_tokens=32)
    unsteered, steered = answer(llm, faststeer.vllm.plan(None)), answer(llm, fs.Plan([fs.Add(STRONG)]))
    assert unsteered != steered
    assert answer(llm, None) == answer(llm, "usual") == answer(llm, '{"add": "strong"}') == steered
    with pytest.raises(ValueError, match="do without beam search, or start without default_plan"):
        llm.beam_search([{"prompt_token_ids": [20, 21]}], BeamSearchParams(beam_width=2, max_tokens=2))
    front_end(llm).register_vector("mine", fs.SteeringVector({3: -STRONG[3]}))
    front_end(llm).register_plan("back", '{"add": "mine", "coefficient": -1.0}')
    assert answer(llm, "back") == answer(llm, {"faststeer": {"add": "mine", "coefficient": -1}}) == steered
    front_end(llm).registry.remove_vector("mine")
    assert answer(llm, "back", prompts=3) == 3 * steered
    for bad in ("gone", '{"add": "mine"}', fs.Plan([fs.Add(torch.ones(7), layers=0)]), 7, {"plan": "", "digest": ""}):
        with pytest.raises(ValueError, match=r"registered|hidden size|expected|no plan"):
            answer(llm, {"faststeer": bad})
        assert answer(llm, "none") == unsteered
    # The norms that the worker measured are those of the model on random tokens.
    about, model = front_end(llm).about(), fs.demo.load()[0]
    ids = torch.randint(model.config.vocab_size, (1, 64), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        states = model(ids, output_hidden_states=True).hidden_states[:-1]  # the last ones are normed
    assert sorted(about["norms"]) == list(range(7)) and about["max_dose"] == 64
    for number, h in enumerate(states):
        assert about["norms"][number] == pytest.approx(float(h[0].norm(dim=-1).median()), rel=1e-4)
    for coefficient in (64.0, -1e38):
        with pytest.raises(ValueError, match=r"dose at resid_pre of layer 4 is .* at most 64: use a smaller"):
            answer(llm, fs.Plan([fs.Add(STRONG, coefficient)]))
        assert answer(llm, "none") == unsteered
