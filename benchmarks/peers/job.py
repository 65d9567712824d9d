"""What every peer's script does in its own environment: reads a job, measures what it is asked for on stdin, prints one
JSON line per measurement.

A script imports this file and its peer, nothing of faststeer, and calls `main` with a class that has the methods of
`Peer`. The job file has: `folder` (the model, safetensors), `gguf` and `gguf_q4` (the model as GGUF in fp32 and as the
wheel has it), `directions` (.npy, `[layers, hidden]` fp32, what is added to the output of each layer), `layer` and
`layers` (those that "one layer" and "every layer" steer), `prompts` (token ids), `positive` and `negative` (rendered
texts), `new_tokens`, `threads`, `variant`.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np

CASES = ("unsteered", "one layer", "every layer", "plan per row")
LINE = "MEASURED "


class Unsupported(Exception):
    """The peer cannot do this; the message says why."""


class Peer:
    """What a script measures. Steering adds `directions[l]` to the output of layer l, at every token."""

    versions: dict[str, str] = {}

    def __init__(self, job: dict[str, Any]) -> None:
        raise NotImplementedError

    def vector(self) -> None:
        """Make a vector for every layer from the contrastive prompts, by the peer's own default method."""
        raise NotImplementedError

    def generate(self, case: str, new_tokens: int) -> int:
        """Generate greedily for all prompts, exactly `new_tokens` each, and return how many that were."""
        raise NotImplementedError

    def logits(self, case: str) -> np.ndarray:
        """Return `[prompts, vocabulary]` fp32: the logits behind every prompt under the steering of `case`."""
        raise NotImplementedError


def row_plans(job: dict[str, Any]) -> list[tuple[str, list[int], float]]:
    """Return the plan of each row in "plan per row": what is done, at which layers, with which coefficient.

    In turn: nothing; the addition at one layer; at every layer; the ablation of each layer's direction.
    """
    one, every = [job["layer"]], job["layers"]
    kinds = [("add", []), ("add", one), ("add", every), ("ablate", every)]
    return [(*kinds[row % 4], 1.0 if row % 4 == 3 else 1 + row / 1000) for row in range(len(job["prompts"]))]


def row_coefficients(job: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """Return `row_plans` as coefficients `[layers, rows]` fp32 of the additions and of the ablations."""
    plans = row_plans(job)
    count = max(job["layers"]) + 1
    tables = {what: np.zeros((count, len(plans)), np.float32) for what in ("add", "ablate")}
    for row, (what, layers, strength) in enumerate(plans):
        tables[what][layers, row] = strength
    return tables["add"], tables["ablate"]


def main(peer: type[Peer]) -> None:
    """Report what the peer can do and say "ready"; then measure what each line of stdin asks for, until there is no
    more."""
    job = json.loads(Path(sys.argv[1]).read_text())
    start = time.perf_counter()
    subject = peer(job)
    show({"measure": "load", "seconds": time.perf_counter() - start, "versions": subject.versions})
    for case in CASES[1:]:
        attempt("logits", case, lambda case=case: save_logits(subject, case, job))
    possible = [["generate", c] for c in CASES if attempt("warm-up", c, lambda c=c: subject.generate(c, 2))]
    possible += [["vector", ""]] if attempt("warm-up vector", "", subject.vector) else []
    show({"measure": "ready", "can": possible})
    for line in sys.stdin:
        measure, case = json.loads(line)
        if measure == "vector":
            seconds, _ = timed(subject.vector)
            show({"seconds": seconds})
            continue
        seconds, tokens = timed(lambda case=case: subject.generate(case, job["new_tokens"]))
        expected = len(job["prompts"]) * job["new_tokens"]
        if tokens != expected:
            raise RuntimeError(f"{case}: {tokens} tokens were generated, expected {expected}")
        show({"seconds": seconds, "tokens": tokens})


def save_logits(subject: Peer, case: str, job: dict[str, Any]) -> None:
    path = Path(job["out"]) / f"{case.replace(' ', '_')}.npy"
    np.save(path, np.asarray(subject.logits(case), np.float32))
    show({"measure": "logits", "case": case, "file": str(path)})


def attempt(measure: str, case: str, work: Callable[[], Any]) -> bool:
    """Run what a peer may be unable to do, and report why it is."""
    try:
        work()
    except Unsupported as reason:
        show({"measure": measure, "case": case, "unsupported": str(reason)})
        return False
    except Exception as error:  # one thing that fails does not hide the others
        show({"measure": measure, "case": case, "failed": f"{type(error).__name__}: {error}"[:300]})
        return False
    return True


def timed(work: Callable[[], Any]) -> tuple[float, Any]:
    start = time.perf_counter()
    result = work()
    return time.perf_counter() - start, result


def show(measurement: dict[str, Any]) -> None:
    print(LINE + json.dumps(measurement), flush=True)


class OnTransformers(Peer):
    """The part that peers on a model of transformers share. Subclasses say what steering is: `steered`."""

    def __init__(self, job: dict[str, Any]) -> None:
        import torch
        import transformers

        self.torch, self.job = torch, job
        torch.set_num_threads(job["threads"])
        self.versions = {"torch": torch.__version__, "transformers": transformers.__version__}
        folder = Path(job["folder"])
        config = transformers.AutoConfig.from_pretrained(folder)
        if transformers.__version__.startswith("4."):  # it looks for the base elsewhere, and would take its default
            config.rope_theta = json.loads((folder / "config.json").read_text())["rope_parameters"]["rope_theta"]
        load = transformers.AutoModelForCausalLM.from_pretrained
        self.model = load(folder, config=config, dtype=torch.float32).eval()
        self.model.generation_config.eos_token_id = []  # every answer has its full length
        # By its file: transformers 4 does not know the class that transformers 5 saves it as.
        special = {name: job[name] for name in ("pad_token", "eos_token", "bos_token")}
        file = str(folder / "tokenizer.json")
        self.tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_file=file, name_or_path=str(folder), **special)
        self.tokenizer.padding_side = "left"
        self.directions = torch.from_numpy(np.load(job["directions"]))
        width = max(map(len, job["prompts"]))
        fill = self.tokenizer.pad_token_id
        self.batch = {
            "input_ids": torch.tensor([[fill] * (width - len(row)) + row for row in job["prompts"]]),
            "attention_mask": torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in job["prompts"]]),
        }

    def steered(self, case: str) -> AbstractContextManager[Any]:
        raise NotImplementedError

    def layers(self, case: str) -> list[int]:
        """The layers at which "one layer" and "every layer" add their direction."""
        return {"unsteered": [], "one layer": [self.job["layer"]], "every layer": self.job["layers"]}[case]

    def generate(self, case: str, new_tokens: int) -> int:
        with self.torch.no_grad(), self.steered(case):
            ids = self.model.generate(
                **self.batch, max_new_tokens=new_tokens, min_new_tokens=new_tokens, do_sample=False
            )
        return ids[:, self.batch["input_ids"].shape[1] :].numel()

    def logits(self, case: str) -> np.ndarray:
        mask = self.batch["attention_mask"]
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        with self.torch.no_grad(), self.steered(case):
            out = self.model(**self.batch, position_ids=positions, use_cache=False, logits_to_keep=1)
        return out.logits[:, -1].float().numpy()
