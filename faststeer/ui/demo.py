"""The playground of the demo model: its refusal and tone directions, found anew in a few seconds."""

from __future__ import annotations

from typing import Any

from faststeer import demo, extract
from faststeer.ui.answers import Control, Playground

# Token and layer chosen on validation prompts, for refusal by `faststeer demo` (benchmarks/results/demo/demo.json).
REFUSAL, TONE = (-1, 4), (-3, 1)


def demo_playground(model: Any, tokenizer: Any) -> Playground:
    """The demo model, as `demo.load` gives it, with the difference in means of refusal and of tone at every layer;
    refusal is on at first."""
    vectors = {
        name: extract.candidates(model, tokenizer, *demo.prompts(name, "train"), positions=(position,)).vector(position)
        for name, (position, _) in (("refusal", REFUSAL), ("tone", TONE))
    }
    start = {"refusal": Control(1.0, (REFUSAL[1],)), "tone": Control(0.0, (TONE[1],))}
    harmful, harmless = demo.prompts("refusal", "test")
    examples = [str(prompt) for prompt in (*harmless[:3], *harmful[:2], *demo.neutral_questions("test")[:1])]
    return Playground(model, tokenizer, vectors, start=start, examples=examples, name="the demo model (a toy)")
