"""The tiny chat model that comes with the package, its contrastive prompts, and a parser for its answers.

It is a toy for demonstrations and tests: 1.4 million parameters, a few hundred words, and no knowledge. It refuses
requests that its grammar calls harmful, it has two tones of voice, and anything outside that grammar gets nonsense.
Nothing measured on it says anything about the safety or quality of real models.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from .corpus import classify, neutral_questions, prompts, tone

if TYPE_CHECKING:
    import torch
    from transformers import LlamaForCausalLM

FOLDER = Path(__file__).parent / "model"

__all__ = ["FOLDER", "classify", "load", "neutral_questions", "prompts", "tone"]


def load(dtype: torch.dtype | None = None) -> tuple[LlamaForCausalLM, Any]:
    """Return (model, tokenizer) of the demo model in eval mode on the CPU; `dtype` defaults to torch.float32.

    The weights ship in bfloat16. The tokenizer pads on the left, and its chat template writes the only begin-of-text
    token, so encode a rendered prompt with `add_special_tokens=False`.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if not (FOLDER / "model.safetensors").is_file():
        raise FileNotFoundError(f"no demo model in {FOLDER}; train one with: python -m faststeer.demo.train")
    model = AutoModelForCausalLM.from_pretrained(FOLDER, dtype=dtype or torch.float32)
    return model.eval(), AutoTokenizer.from_pretrained(FOLDER)
