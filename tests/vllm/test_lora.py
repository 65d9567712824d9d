"""LoRA adapters beside plans, in one batch: tokens are those of Hugging Face's model into whose weights the adapter was
added, under the same plan."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from requests_mixed import by_hugging_face, plans, token_ids, tokens
from safetensors.torch import save_file

import faststeer as fs

RANK, ALPHA = 4, 8
ADAPTED = ("q_proj", "v_proj", "o_proj", "up_proj", "down_proj")


def make_adapter(model: Any, folder: Path, seed: int) -> Any:
    """A folder as peft writes it, and the model with the adapter's product added to its weights: W + alpha / r B A."""
    generator, folded, saved = torch.Generator().manual_seed(seed), copy.deepcopy(model), {}
    for name, module in folded.named_modules():
        if name.rpartition(".")[2] in ADAPTED:
            outputs, inputs = module.weight.shape
            a = 0.1 * torch.randn(RANK, inputs, generator=generator)
            b = 0.1 * torch.randn(outputs, RANK, generator=generator)
            saved[f"base_model.model.{name}.lora_A.weight"], saved[f"base_model.model.{name}.lora_B.weight"] = a, b
            module.weight.data += ALPHA / RANK * b @ a
    folder.mkdir()
    save_file(saved, folder / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": RANK, "lora_alpha": ALPHA, "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps(settings | {"target_modules": list(ADAPTED)}))
    return folded


@pytest.mark.parametrize("eager", [True, False], ids=["eager", "compiled"])
def test_adapters_and_plans_in_one_batch(start: Any, tmp_path: Path, eager: bool) -> None:
    from vllm import SamplingParams
    from vllm.lora.request import LoRARequest

    model, tokenizer = fs.demo.load()
    models = [model, *(make_adapter(model, tmp_path / str(seed), seed) for seed in (1, 2))]
    adapters = [None, *(LoRARequest(f"adapter {i}", i, str(tmp_path / str(i))) for i in (1, 2))]
    prompts, steered = token_ids(tokenizer), [*plans(5), None]
    asked = [(which, prompts[(which + i) % 8], plan) for i, plan in enumerate(steered) for which in range(3)]
    wanted = [by_hugging_face(models[which], [(prompt, plan)])[0] for which, prompt, plan in asked]
    assert len({tuple(one) for one in wanted}) == len(wanted)  # neither adapters nor plans come to nothing
    # A third place, which stays empty: on a CPU, vLLM 0.32 computes requests without an adapter with the last one.
    engine = start({"hook_points": "all"}, enforce_eager=eager, enable_lora=True, max_lora_rank=8, max_loras=3)
    parameters = [
        SamplingParams(temperature=0, max_tokens=20, ignore_eos=True, extra_args=plan and {"faststeer": plan})
        for _, _, plan in asked
    ]
    given = [{"prompt_token_ids": prompt} for _, prompt, _ in asked]
    for cached in (False, True):
        answers = engine.generate(given, parameters, lora_request=[adapters[i] for i, _, _ in asked], use_tqdm=False)
        assert tokens(answers) == wanted
        assert (sum(answer.num_cached_tokens for answer in answers) >= 32 * len(asked)) == cached
