"""What a worker does once its model is loaded."""

from __future__ import annotations

from types import SimpleNamespace

import torch

from faststeer.vllm import worker as of_worker
from faststeer.vllm.settings import Settings


def test_its_kernels_are_compiled_when_the_model_is_loaded(monkeypatch):
    """For rows of the model's size and dtype, behind everything that might refuse the model."""
    config = SimpleNamespace(
        model_config=SimpleNamespace(
            hf_text_config=SimpleNamespace(num_hidden_layers=2, hidden_size=32), dtype=torch.bfloat16
        ),
        scheduler_config=SimpleNamespace(max_num_batched_tokens=16, max_num_seqs=4),
        compilation_config=None,
        parallel_config=SimpleNamespace(tensor_parallel_size=1),
    )
    worker = SimpleNamespace(vllm_config=config, rank=0, device=torch.device("cpu"))
    runner = SimpleNamespace(get_model=lambda: None, prepare_inputs=lambda: None, _dummy_run=lambda: None)
    calls = []
    monkeypatch.setattr(of_worker, "find_layers", lambda model: {0: None, 1: None})
    monkeypatch.setattr(of_worker, "patch_layers", lambda *_: calls.append("patched"))
    monkeypatch.setattr(of_worker, "warmup", lambda *arguments: calls.append(arguments))
    of_worker.Steering(worker, Settings(max_dose=None)).build(runner)
    # The ops that layers call: faststeer.vllm.layers.Operators.
    assert calls == ["patched", (32, torch.bfloat16, torch.device("cpu"), ("steer", "steer_pair_", "latch_"))]
