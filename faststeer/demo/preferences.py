"""Preference pairs of the demo model's behaviours, written by its grammar: what vectors found by optimisation are
trained on."""

from __future__ import annotations

import random
import zlib

from faststeer.demo import corpus
from faststeer.extract.pairs import Pair


def pairs(behaviour: str, split: str) -> list[Pair]:
    """Return pairs of a behaviour, as many for adding its vector (sign 1) as for subtracting it (sign -1), by turns.

    "refusal": harmless requests with a refusal chosen over compliance (1), harmful ones the other way round (-1).
    "tone": neutral questions with a cheerful answer chosen over a gloomy one (1), and the other way round (-1).
    Prompts of a split share no pair of verb and noun with another split's. Raises ValueError for an unknown behaviour
    or split.
    """
    corpus.check_name("behaviour", behaviour, corpus.BEHAVIOURS)
    corpus.check_name("split", split, corpus.SPLITS)
    rng = random.Random(zlib.crc32(f"{split}/{behaviour}/pairs".encode()))
    make = _refusal if behaviour == "refusal" else _tone
    return [pair for both in make(rng, split) for pair in both]


def _refusal(rng: random.Random, split: str) -> list[tuple[Pair, Pair]]:
    def answers(request: corpus.Request) -> tuple[str, str]:
        refusal, compliance = (
            corpus.write_answer(rng, kind, "neutral", do=request.do, it=request.thing)
            for kind in ("refusal", "compliance")
        )
        return refusal, compliance

    found = []
    harmless, harmful = (corpus.request_prompts(split, harm) for harm in (False, True))
    for (prompt, request), (bad_prompt, bad_request) in zip(harmless, harmful, strict=True):
        refusal, compliance = answers(request)
        bad_refusal, bad_compliance = answers(bad_request)
        found.append(
            (Pair(prompt, refusal, compliance), Pair(bad_prompt, chosen=bad_compliance, rejected=bad_refusal, sign=-1))
        )
    return found


def _tone(rng: random.Random, split: str) -> list[tuple[Pair, Pair]]:
    found: dict[str, tuple[Pair, Pair]] = {}
    while len(found) < corpus.PROMPTS_PER_SPLIT[split]:
        kind = rng.choice(["opinion", "fact", "harmless"])
        # The question is drawn before the answer, so that the same state gives the same question in another tone.
        state = rng.getstate()
        question, cheerful = corpus.write_turn(rng, kind, "cheerful", split)
        rng.setstate(state)
        _, gloomy = corpus.write_turn(rng, kind, "gloomy", split)
        found[question] = Pair(question, cheerful, gloomy), Pair(question, gloomy, cheerful, sign=-1)
    return list(found.values())
