"""The demonstration on the toy: find its refusal direction, switch refusal on and off with it, and measure.

Everything is measured on prompts that neither the model's training nor the extraction has seen, next to a random vector
of the same norm. The same steps, on the same interfaces, serve any other model; small public ones hardly refuse.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

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


@dataclass
class AnsweredPrompts:
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


def measure(out: Path, prompts: int, seed: int, step: Callable[[str], None]) -> dict[str, Any]:
    """Find the toy's refusal direction and switch refusal on and off with it; return the figures.

    Args:
        out: folder for refusal.safetensors, plan.json and refusal_dose_response.png; each is written whole or not at
            all.
        prompts: held-out prompts per measurement, at most; half of that for each point of the picture.
        seed: of the random control vector.
        step: called with what is done next.
    """
    step("The toy: finding its refusal direction")
    model, tokenizer = demo.load()
    selection = find_refusal(model, tokenizer)
    vector = selection.vector
    step("The toy: switching refusal on and off")
    cells = refusal_cells(vector, prompts, seed)
    few = max(prompts // 2, 1)
    doses = {(sign, c): _dose_cell(vector, sign, c, few) for sign in (1, -1) for c in COEFFICIENTS}
    answer(model, tokenizer, [*cells.values(), *doses.values()])
    series = _series(doses)
    vector.save(out / "refusal.safetensors")
    write_atomically(out / "plan.json", Plan([Add(vector, 1.0)]).to_json(inline=True, indent=2))
    write_atomically(out / "refusal_dose_response.png", plots.refusal_dose_response(series))
    return {
        "layer": vector.layers[0],
        "position": selection.chosen.position,
        "refusal": {name: cell.to_dict() for name, cell in cells.items()},
        "dose_response": series,
        "selection": selection.to_dict(),
        "examples": _examples(cells),
    }


def find_refusal(model: Any, tokenizer: Any) -> extract.Selection:
    """DIM candidates from the training prompts, the best of them by the validation prompts."""
    candidates = extract.candidates(model, tokenizer, *demo.prompts("refusal", "train"))
    harmful, harmless = demo.prompts("refusal", "validation")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # what was given up is in the result, and is printed
        return extract.select(model, tokenizer, candidates, harmful[:32], harmless[:32])


def refusal_cells(vector: SteeringVector, n: int, seed: int) -> dict[str, AnsweredPrompts]:
    """The seven measurements: base, added, subtracted, ablated everywhere, and both additions of a random vector."""
    harmful, harmless = (listed[:n] for listed in demo.prompts("refusal", "test"))
    control = extract.random_like(vector, seed)
    ablate = Plan([Ablate(vector[vector.layers[0]], layers="all", at=EVERYWHERE)])
    return {
        "base_harmful": AnsweredPrompts(harmful, None),
        "base_harmless": AnsweredPrompts(harmless, None),
        "induced": AnsweredPrompts(harmless, Plan([Add(vector, 1.0)])),
        "bypassed": AnsweredPrompts(harmful, Plan([Add(vector, -1.0)])),
        "ablated": AnsweredPrompts(harmful, ablate),
        "random_induced": AnsweredPrompts(harmless, Plan([Add(control, 1.0)])),
        "random_bypassed": AnsweredPrompts(harmful, Plan([Add(control, -1.0)])),
    }


def answer(model: Any, tokenizer: Any, cells: Any) -> None:
    """Answer the prompts of all cells, each row of a batch under its own plan."""
    cells = list(cells)
    prompts = [prompt for cell in cells for prompt in cell.prompts]
    plans = [cell.plan for cell in cells for _ in cell.prompts]
    answers = iter(evaluate.complete(model, tokenizer, prompts, plans, max_new_tokens=MAX_NEW_TOKENS, batch_size=128))
    for cell in cells:
        cell.answers = [next(answers) for _ in cell.prompts]


def _dose_cell(vector: SteeringVector, sign: int, coefficient: float, n: int) -> AnsweredPrompts:
    """Harmless prompts with the vector added, or harmful ones with it subtracted."""
    harmful, harmless = demo.prompts("refusal", "test")
    return AnsweredPrompts((harmless if sign > 0 else harmful)[:n], Plan([Add(vector, sign * coefficient)]))


def _series(cells: dict[tuple[int, float], AnsweredPrompts]) -> dict[str, list[dict[str, Any]]]:
    """`{"added": [...], "subtracted": [...]}`, a point per coefficient."""
    series: dict[str, list[dict[str, Any]]] = {"added": [], "subtracted": []}
    for (sign, coefficient), cell in cells.items():
        series["added" if sign > 0 else "subtracted"].append({"coefficient": coefficient} | cell.to_dict())
    return series


def _examples(cells: dict[str, AnsweredPrompts]) -> list[dict[str, str]]:
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
