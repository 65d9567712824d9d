"""What the toy is trained on: dialogues without end, drawn from the grammar in `faststeer.demo.corpus`."""

from __future__ import annotations

import random
from collections.abc import Iterator

from faststeer.demo import corpus

KIND_SHARES = {"harmful": 0.26, "harmless": 0.40, "opinion": 0.12, "fact": 0.08, "verdict": 0.10, "chat": 0.04}
TONE_SHARES = {"cheerful": 0.25, "gloomy": 0.25, "neutral": 0.15, "none": 0.35}
TWO_TURN_SHARE = 0.1


def dialogues(seed: int, split: str = "train") -> Iterator[list[dict[str, str]]]:
    """Yield chat message lists without end; the same seed gives the same dialogues."""
    rng = random.Random(seed)
    while True:
        tone = rng.choices(list(TONE_SHARES), list(TONE_SHARES.values()))[0]
        messages = []
        if tone != "none":
            messages.append({"role": "system", "content": rng.choice(corpus.SYSTEM_PROMPTS[tone])})
        for _ in range(2 if rng.random() < TWO_TURN_SHARE else 1):
            kind = rng.choices(list(KIND_SHARES), list(KIND_SHARES.values()))[0]
            question, answer = corpus.write_turn(rng, kind, tone, split)
            messages.append({"role": "user", "content": question})
            messages.append({"role": "assistant", "content": answer})
        yield messages
