"""What a worker does once its model is loaded."""

from __future__ import annotations

from types import SimpleNamespace

import torch

import faststeer as fs
from faststeer.program import Capacity, Program, SlotPool
from faststeer.vllm import worker as of_worker
from faststeer.vllm.settings import ServerSettings


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
    of_worker.WorkerSteering(worker, ServerSettings(max_dose=None)).build(runner)
    # The ops that layers call: faststeer.vllm.layers.Operators.
    assert calls == ["patched", (32, torch.bfloat16, torch.device("cpu"), ("steer", "steer_pair_", "latch_"))]


def test_the_plan_used_longest_ago_gives_up_its_slot():
    """Step by step, with room for two plans: those of a step stay, and so do others until their slot is needed."""
    steering, program = object.__new__(of_worker.WorkerSteering), Program(2, 8, Capacity(slots=2, vectors=4, entries=4))
    steering.pool, steering._in_use = SlotPool(program.change, program.plans), {}
    plans = {name: fs.Plan([fs.Add(torch.full((8,), i + 1.0), layers=0)]) for i, name in enumerate("abc")}
    for step, held in (("ab", "ab"), ("a", "ab"), ("ac", "ac"), ("", "ac"), ("b", "bc"), ("bc", "bc"), ("a", "ac")):
        steering._load({name: plans[name] for name in step})
        assert sorted(steering.pool.slots) == list(held)
        assert all(program.plans[slot] is plans[name] for name, slot in steering.pool.slots.items())
