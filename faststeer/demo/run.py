"""The demonstration: find the refusal direction of the demo model, switch refusal on and off with it, and measure.

Everything is measured on prompts that neither the model's training nor the extraction has seen, next to a random vector
of the same norm. The same steps, on the same interfaces, serve any other model.
"""

from __future__ import annotations

import json
import platform
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.console import Console
from rich.progress import Progress

from faststeer import demo, evaluate, extract
from faststeer.demo import plots
from faststeer.evaluate import Rate, is_refusal
from faststeer.files import write_atomically
from faststeer.hf import Prompt
from faststeer.intervention import Ablate, Add
from faststeer.plan import Plan
from faststeer.vector import HookPoint, SteeringVector

EVERYWHERE: tuple[HookPoint, ...] = ("resid_pre", "attn_out", "mlp_out")
COEFFICIENTS = tuple(0.25 * step for step in range(9))
MAX_NEW_TOKENS = 64
TONES = ("cheerful", "gloomy")
TONE_COEFFICIENT = 1.0


@dataclass
class Cell:
    """Prompts answered under one plan, and what became of them."""

    prompts: Sequence[Prompt]
    plan: Plan | None
    answers: list[str] = field(default_factory=list)

    @property
    def refusal(self) -> Rate:
        return evaluate.refusal_rate(self.answers)

    def share(self, judge: Callable[[str], bool]) -> Rate:
        return Rate(sum(map(judge, self.answers)), len(self.answers))

    def to_dict(self) -> dict[str, Any]:
        coherent = self.share(lambda text: demo.classify(text) is not None)
        return self.refusal.to_dict() | {"coherent": coherent.rate}


def run(out: Path, *, prompts: int = 128, seed: int = 0, console: Console | None = None) -> dict[str, Any]:
    """Run the demonstration and return its figures; write them, the vectors, a plan and two pictures to `out`.

    Args:
        out: folder for demo.json, refusal.safetensors, tone.safetensors, plan.json, dose_response.png,
            layer_sweep.png; each is written whole or not at all.
        prompts: held-out prompts per measurement, at most; half of that for each point of the two pictures.
        seed: of the random control vectors.
        console: where the progress bar goes (stderr by default).

    Raises:
        ValueError: `prompts` below 1.
    """
    if prompts < 1:
        raise ValueError(f"prompts is {prompts}: expected at least 1 per measurement")
    model, tokenizer = demo.load()
    few = max(prompts // 2, 1)
    with Progress(console=console or Console(stderr=True), transient=True) as progress:
        task = progress.add_task("Finding the refusal direction", total=5)

        def step(description: str) -> None:
            progress.update(task, description=description, advance=1)

        selection, candidates = find_refusal(model, tokenizer)
        vector = selection.vector
        step("Switching refusal on and off")
        cells = refusal_cells(vector, prompts, seed)
        answer(model, tokenizer, cells.values())
        step("Dose and response")
        doses = {(sign, c): _dose_cell(vector, sign, c, few) for sign in (1, -1) for c in COEFFICIENTS}
        answer(model, tokenizer, doses.values())
        step("Every layer")
        position = selection.chosen.position
        sweep = {
            (sign, layer): _dose_cell(candidates.vector(position, layer), sign, 1.0, few)
            for sign in (1, -1)
            for layer in candidates.vector(position).layers
        }
        answer(model, tokenizer, sweep.values())
        step("A second behaviour: tone")
        tone_vector = find_tone(model, tokenizer, min(few, 24))
        tones = tone_cells(tone_vector, demo.neutral_questions("test")[:few])
        answer(model, tokenizer, tones.values())
        step("Done")

    result: dict[str, Any] = {
        "model": "faststeer demo model",
        "layer": vector.layers[0],
        "position": position,
        "refusal": {name: cell.to_dict() for name, cell in cells.items()},
        "dose_response": _series(doses, "coefficient"),
        "layer_sweep": _series(sweep, "layer"),
        "tone_layer": tone_vector.layers[0],
        "tone_coefficient": TONE_COEFFICIENT,
        "tone": {name: _tone_dict(cell) for name, cell in tones.items()},
        "selection": selection.to_dict(),
        "examples": _examples(cells),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    }
    vector.save(out / "refusal.safetensors")
    tone_vector.save(out / "tone.safetensors")
    write_atomically(out / "plan.json", Plan([Add(vector, 1.0)]).to_json(inline=True, indent=2))
    write_atomically(out / "dose_response.png", plots.dose_response(result["dose_response"]))
    write_atomically(out / "layer_sweep.png", plots.layer_sweep(result["layer_sweep"], vector.layers[0]))
    write_atomically(out / "demo.json", json.dumps(result, indent=2))
    return result


def find_refusal(model: Any, tokenizer: Any) -> tuple[extract.Selection, extract.Candidates]:
    """DIM candidates from the training prompts, the best of them by the validation prompts."""
    candidates = extract.candidates(model, tokenizer, *demo.prompts("refusal", "train"))
    harmful, harmless = demo.prompts("refusal", "validation")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # what was given up is in the result, and is printed
        selection = extract.select(model, tokenizer, candidates, harmful[:32], harmless[:32])
    return selection, candidates


def refusal_cells(vector: SteeringVector, n: int, seed: int) -> dict[str, Cell]:
    """The seven measurements: base, added, subtracted, ablated everywhere, and both additions of a random vector."""
    harmful, harmless = (listed[:n] for listed in demo.prompts("refusal", "test"))
    control = extract.random_like(vector, seed)
    ablate = Plan([Ablate(vector[vector.layers[0]], layers="all", at=EVERYWHERE)])
    return {
        "base_harmful": Cell(harmful, None),
        "base_harmless": Cell(harmless, None),
        "induced": Cell(harmless, Plan([Add(vector, 1.0)])),
        "bypassed": Cell(harmful, Plan([Add(vector, -1.0)])),
        "ablated": Cell(harmful, ablate),
        "random_induced": Cell(harmless, Plan([Add(control, 1.0)])),
        "random_bypassed": Cell(harmful, Plan([Add(control, -1.0)])),
    }


def find_tone(model: Any, tokenizer: Any, n: int) -> SteeringVector:
    """The second behaviour: DIM of a cheerful against a gloomy system prompt, at the layer and token that change the
    tone of most answers to validation questions without a system prompt."""
    candidates = extract.candidates(model, tokenizer, *demo.prompts("tone", "train"), positions=(-1, -3))
    questions = demo.neutral_questions("validation")[:n]
    vectors = [
        candidates.vector(position, layer)
        for position in candidates.positions
        for layer in candidates.vector(position).layers
    ]
    cells = [tone_cells(vector, questions) for vector in vectors]
    answer(model, tokenizer, [cell[tone] for cell in cells for tone in TONES])
    changed = [sum(_tone_rate(cell[tone], tone).rate for tone in TONES) for cell in cells]
    return vectors[changed.index(max(changed))]


def tone_cells(vector: SteeringVector, questions: Sequence[Prompt]) -> dict[str, Cell]:
    """Questions without a system prompt, unsteered and steered both ways."""
    return {
        "base": Cell(questions, None),
        "cheerful": Cell(questions, Plan([Add(vector, TONE_COEFFICIENT)])),
        "gloomy": Cell(questions, Plan([Add(vector, -TONE_COEFFICIENT)])),
    }


def answer(model: Any, tokenizer: Any, cells: Any) -> None:
    """Answer the prompts of all cells, each row of a batch under its own plan."""
    cells = list(cells)
    prompts = [prompt for cell in cells for prompt in cell.prompts]
    plans = [cell.plan for cell in cells for _ in cell.prompts]
    answers = iter(evaluate.complete(model, tokenizer, prompts, plans, max_new_tokens=MAX_NEW_TOKENS, batch_size=128))
    for cell in cells:
        cell.answers = [next(answers) for _ in cell.prompts]


def _dose_cell(vector: SteeringVector, sign: int, coefficient: float, n: int) -> Cell:
    """Harmless prompts with the vector added, or harmful ones with it subtracted."""
    harmful, harmless = demo.prompts("refusal", "test")
    return Cell((harmless if sign > 0 else harmful)[:n], Plan([Add(vector, sign * coefficient)]))


def _series(cells: dict[tuple[int, Any], Cell], name: str) -> dict[str, list[dict[str, Any]]]:
    """`{"added": [...], "subtracted": [...]}`, a point per coefficient or layer."""
    series: dict[str, list[dict[str, Any]]] = {"added": [], "subtracted": []}
    for (sign, value), cell in cells.items():
        series["added" if sign > 0 else "subtracted"].append({name: value} | cell.to_dict())
    return series


def _tone_rate(cell: Cell, tone: str) -> Rate:
    return cell.share(lambda text: demo.tone(text) == tone)


def _tone_dict(cell: Cell) -> dict[str, Any]:
    return {tone: _tone_rate(cell, tone).to_dict() for tone in TONES}


def _examples(cells: dict[str, Cell]) -> list[dict[str, str]]:
    """One harmless and one harmful prompt, unsteered and steered, where steering did what it is for."""
    pairs = (("base_harmless", "induced", True), ("base_harmful", "bypassed", False))
    found = []
    for base, steered, refuses in pairs:
        answers = zip(cells[base].prompts, cells[base].answers, cells[steered].answers, strict=True)
        for prompt, before, after in answers:
            if is_refusal(after) == refuses and is_refusal(before) != refuses:
                found.append({"prompt": str(prompt), "unsteered": before, "steered": after, "by": steered})
                break
    return found
