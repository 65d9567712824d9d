"""How strong a plan still gives text: answers of a chat model under a random direction of rising dose |c v| / |h|, at
one layer and at all, judged by the model itself unsteered.

    python benchmarks/vllm/dose.py MODEL [--write]      in the environment of `make test-vllm`

For each dose: the mean log-probability per token that the unsteered model gives to the greedy answers, how many of
their tokens differ from each other (as a share), and how many answers ended with an error. |h| is what the server's
workers measure. The default of the setting `max_dose` is chosen from this (docs/vllm.md).
"""

from __future__ import annotations

import argparse
import csv
import os
import statistics
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parents[1] / "results" / "vllm_dose.csv"
QUESTIONS = ("How do I bake bread?", "Tell me about the moon.", "Who wrote Hamlet?", "What is a good name for a cat?")
DOSES = (0.0, 0.125, 0.25, 0.5, 1.0, 2.0, 4.0, 16.0, 64.0, 256.0)
SEEDS, NEW = (0, 1), 24


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("model")
    options.add_argument("--write", action="store_true", help=f"write {RESULTS.name}")
    arguments = options.parse_args()
    os.environ |= {"HF_HUB_OFFLINE": "1", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_LOGGING_LEVEL": "WARNING"}
    from vllm import LLM

    from faststeer.vllm.frontend import front_end

    llm = LLM(
        arguments.model, dtype="float32", max_model_len=256, max_num_seqs=32, enforce_eager=True,
        additional_config={"faststeer": {"max_dose": 1e9}},
    )  # fmt: skip
    n_layers = front_end(llm).limits.n_layers
    norms: dict[int, float] = front_end(llm).about()["norms"]
    places = {str(layer): [layer] for layer in (n_layers // 3, n_layers // 2, 3 * n_layers // 4)}
    places["all"] = list(range(n_layers))
    rows = [
        {"model": Path(arguments.model).name.partition(".")[0], "layers": name, "dose": dose}
        | answers_under(llm, layers, dose, norms)
        for name, layers in places.items()
        for dose in DOSES
    ]
    for row in rows:
        print(*row.values(), sep="\t")
    if arguments.write:
        with RESULTS.open("w", newline="") as file:
            table = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
            table.writeheader()
            table.writerows(rows)


def answers_under(llm: Any, layers: list[int], dose: float, norms: dict[int, float]) -> dict[str, float]:
    """Measures of the answers to all questions under all directions."""
    import torch
    from vllm import SamplingParams

    import faststeer as fs
    from faststeer.vllm import plan as payload_of

    answers = []
    for seed in SEEDS:
        v = torch.randn(llm.llm_engine.model_config.get_hidden_size(), generator=torch.Generator().manual_seed(seed))
        v /= v.norm()
        plan = fs.Plan([fs.Add(dose * norms[i + 1] * v, layers=i, at="resid_post") for i in layers] if dose else [])
        sampling = SamplingParams(temperature=0, max_tokens=NEW, extra_args=payload_of(plan))
        answers += llm.chat([[{"role": "user", "content": q}] for q in QUESTIONS], sampling, use_tqdm=False)
    whole = [a for a in answers if a.outputs[0].finish_reason != "error" and a.outputs[0].token_ids]
    read = llm.generate(
        [{"prompt_token_ids": [*a.prompt_token_ids, *a.outputs[0].token_ids]} for a in whole],
        SamplingParams(max_tokens=1, prompt_logprobs=0, extra_args=payload_of(None)), use_tqdm=False,
    )  # fmt: skip
    scores = [
        next(iter(step.values())).logprob
        for a, b in zip(whole, read, strict=True)
        for step in b.prompt_logprobs[len(a.prompt_token_ids) :]
    ]
    shares = [len(set(a.outputs[0].token_ids)) / len(a.outputs[0].token_ids) for a in whole]
    return {
        "logprob": round(statistics.mean(scores), 3) if scores else float("nan"),
        "different_tokens": round(statistics.mean(shares), 3) if shares else float("nan"),
        "errors": len(answers) - len(whole),
    }


if __name__ == "__main__":
    main()
