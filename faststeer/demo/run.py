"""The demonstration: the tone of a real model, then the refusal of the toy; figures, vectors and pictures."""

from __future__ import annotations

import importlib.util
import json
import platform
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress

from faststeer import demo
from faststeer.demo import real, toy
from faststeer.files import write_atomically
from faststeer.hf.loading import smollm2_file
from faststeer.version import versions

STEPS = 8


def run(
    out: Path,
    *,
    prompts: int = 128,
    questions: int = 64,
    seed: int = 0,
    toy_alone: bool = False,
    console: Console | None = None,
) -> dict[str, Any]:
    """Run the demonstration and return its figures; write them, the vectors, a plan and the pictures to `out`.

    Args:
        out: folder for demo.json and what `real.measure` and `toy.measure` write; each file is written whole or not
            at all.
        prompts: held-out prompts of the toy per measurement, at most.
        questions: held-out questions of the real model per coefficient, at most.
        seed: of the random control vectors.
        toy_alone: leave the real model out, as is done where it is not installed; the result's `tone` is empty then,
            and `tone_missing` says why.
        console: where the progress bar goes (stderr by default).

    Raises:
        ValueError: `prompts` or `questions` below 1.
    """
    for name, count in (("prompts", prompts), ("questions", questions)):
        if count < 1:
            raise ValueError(f"{name} is {count}: expected at least 1 per measurement")
    missing = "left out as asked" if toy_alone else what_is_missing()
    with Progress(console=console or Console(stderr=True), transient=True) as progress:
        task = progress.add_task("", total=STEPS)

        def step(description: str) -> None:
            progress.update(task, description=description, advance=1)

        if missing is None:
            step("Loading SmolLM2-135M-Instruct (the first time, it is dequantised)")
            model, tokenizer = demo.load("smollm2")
            tones = real.measure(model, tokenizer, out, seed, step, questions=questions)
            del model
        else:
            tones = {"tone": [], "tone_missing": missing}
        threads = torch.get_num_threads()
        # The toy's matrices are so small that a second thread waits longer than it works.
        torch.set_num_threads(1)
        try:
            refusals = toy.measure(out, prompts, seed, step)
        finally:
            torch.set_num_threads(threads)
        step("Done")
    result = {
        **tones,
        "model": "faststeer demo model",
        **refusals,
        "versions": {"python": platform.python_version(), **versions()},
    }
    write_atomically(out / "demo.json", json.dumps(result, indent=2))
    return result


def what_is_missing() -> str | None:
    """What the real model's part needs and is not installed, with the command that installs it; None: nothing."""
    try:
        smollm2_file()
    except FileNotFoundError as error:
        return str(error)
    modules = {"gguf": "gguf", "accelerate": "accelerate", "vaderSentiment": "vaderSentiment"}
    absent = [name for name, module in modules.items() if importlib.util.find_spec(module) is None]
    if absent:
        return f"{', '.join(absent)} not installed: pip install 'faststeer[demo]'"
    return None
