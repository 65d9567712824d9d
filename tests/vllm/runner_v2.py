"""An engine with vLLM's second model runner, in a process and an `ENVIRONMENT` of its own: python runner_v2.py OUT.json

vLLM takes that runner where Triton has a back end for the device. A CPU has none: here Triton interprets its kernels,
and is given a back end that says it is there.
"""

import importlib
import json
import sys
from pathlib import Path
from typing import Any

import torch
from requests_mixed import SPECIAL, by_engine, mixed, token_ids, tokens

import faststeer as fs

ENVIRONMENT = {"TRITON_INTERPRET": "1", "VLLM_USE_V2_MODEL_RUNNER": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}


def direction(seed: int) -> torch.Tensor:
    return 80 * torch.nn.functional.normalize(torch.randn(128, generator=torch.Generator().manual_seed(seed)), dim=0)


def waiting(prompts: list[list[int]]) -> list[tuple[list[int], fs.Plan | None]]:
    """More plans than slots, and more requests than their keys and values have room."""
    plans = [fs.Plan([fs.Add(direction(i), layers=i % 6, positions=("all", "generated")[i % 2])]) for i in range(8)]
    return [(prompts[i % 8], plans[i % 8] if i % 4 else None) for i in range(12)]


def probing(prompts: list[list[int]]) -> tuple[list[int], fs.Plan]:
    watched = torch.stack([direction(7), direction(8)])
    return prompts[6], fs.Plan([fs.Add(direction(9), layers=1), fs.Probe(watched, layers=[0, 2, 5])])


def overflowing(engine: Any, prompts: list[list[int]]) -> dict[str, Any]:
    """What unsteered requests answer before and after others that overflow, and with what those end."""
    found: dict[str, Any] = {"answers": [], "ends": []}
    for round_ in range(4):
        answers = by_engine(engine, [(prompt[round_ % 2 :], None) for prompt in prompts[:4]], 6, logprobs=2)
        steps = [[sorted((t, seen.logprob) for t, seen in s.items()) for s in a.outputs[0].logprobs] for a in answers]
        found["answers"].append(steps)
        for at in ("resid_pre", "resid_post"):
            plan = fs.Plan([fs.Add(direction(1), 1e38, layers=2, at=at, positions=("all", "[3:]")[round_ % 2])])
            found["ends"] += [a.outputs[0].stop_reason for a in by_engine(engine, [(prompts[4], plan)] * 2, 8)]
    return found


def interpret() -> None:
    """To be called before vLLM is imported."""
    import triton.backends
    from triton.backends.driver import DriverBase

    class Interpreted(DriverBase):
        @classmethod
        def is_active(cls) -> bool:
            return False

    sys.path.append(str(Path(__file__).parents[1] / "kernels"))
    importlib.import_module("triton_interpreter").mend()
    triton.backends.backends["cpu"] = triton.backends.Backend(compiler=None, driver=Interpreted)


def main() -> None:
    from vllm import LLM
    from vllm.v1.core.sched.scheduler import Scheduler
    from vllm.v1.worker.gpu.model_runner import GPUModelRunner

    from faststeer.vllm.worker import projections

    preempted, preempt = [], Scheduler._preempt_request

    def counted(self: Any, request: Any, *args: Any, **kwargs: Any) -> Any:
        preempted.append(request.request_id)
        return preempt(self, request, *args, **kwargs)

    Scheduler._preempt_request = counted
    prompts, found = token_ids(fs.demo.load()[1]), {}
    for settings, more in ((SPECIAL | {"max_dose": None}, {}), ({"max_plans": 3}, {"num_gpu_blocks_override": 14})):
        engine = LLM(
            str(fs.demo.FOLDER), dtype="float32", max_model_len=256, block_size=32, max_num_batched_tokens=64,
            max_num_seqs=32, enforce_eager=True, additional_config={"faststeer": settings}, **more,
        )  # fmt: skip
        runner = engine.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker.model_runner
        assert isinstance(runner, GPUModelRunner)
        if more:
            found["waiting"] = tokens(by_engine(engine, waiting(prompts), 50))
            found["preempted"] = len(preempted)
        else:
            for name in ("mixed", "cached"):
                answers = by_engine(engine, mixed(prompts, 16))
                found[name] = tokens(answers)
                found[f"{name} tokens"] = sum(answer.num_cached_tokens for answer in answers)
            (answer,) = by_engine(engine, [probing(prompts)])
            found["overflowing"] = overflowing(engine, prompts)
            found |= {"probed": tokens([answer])[0], "seen": projections(engine, answer.request_id)}
        engine.llm_engine.engine_core.shutdown()
        del engine, runner
    Path(sys.argv[1]).write_text(json.dumps(found))


if __name__ == "__main__":
    interpret()
    main()
