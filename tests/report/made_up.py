"""A store of made-up rows, written as a sweep writes them: every kind of row, and texts that try to be markup."""

from __future__ import annotations

import numpy as np
import torch

import faststeer as fs
from faststeer.evaluate.sweep import Store, Sweep, SweepPrompt
from faststeer.evaluate.sweep.projections import packed, watched

NASTY = "</script><script>window.hit=1</script><img src=x onerror='window.hit=1'> $x_1$ {{ 7*7 }} \u2028 \U0001f600"
RUN = "ab" * 32


def described() -> Sweep:
    generator = torch.Generator().manual_seed(0)
    directions = {layer: torch.randn(8, generator=generator) for layer in range(5)}
    vectors = {name: fs.SteeringVector(directions, at="resid_post", model="m", method="dim") for name in ("up", NASTY)}
    chat = [{"role": "system", "content": NASTY}, {"role": "user", "content": "Greetings, friend"}]
    prompts = [
        SweepPrompt(f"p{i}", f"Tell me about needle{i}" if i else chat, ("plain", NASTY)[i % 2]) for i in range(24)
    ]
    return Sweep(
        prompts,
        vectors=vectors,
        layers=[2, 3, [2, 3]],
        coefficients=[-1, 0, 0.5, 1],
        plans={"whole": fs.Plan([fs.Ablate(directions[1], layers="all", at="resid_pre")])},
        judges=["refusal", "perplexity"],
    )


def strength(setting) -> float:
    """Share of prompts that show the behaviour: grows with the coefficient, of vectors only."""
    if setting["kind"] == "plan":
        return 0.5
    if setting["kind"] != "vector":
        return 0.25
    return {-1.0: 0.0, 0.5: 0.6, 1.0: 0.95 if setting["layers"] == (2, 3) else 0.9}[setting["coefficient"]]


def projected(setting, prompt, direction) -> np.ndarray:
    """`[layers + 1, tokens]` that half precision holds, of setting 2 with a scale; one number is not finite."""
    values = np.arange(30, dtype=np.float32).reshape(6, 5) * (1 + setting) - 7 * prompt + direction
    values[2, 3] = np.nan
    return values * 2.0**15 if setting == 2 else values


def written(path, sweep: Sweep, run: str = RUN) -> None:
    with Store(path) as store:
        store.begin(run, 64, sweep, {"faststeer": NASTY})
        directions, of_setting = watched(sweep.settings, 5)
        store.add(
            run,
            judges=[("j1", "refusal", 1.0, "refusal"), ("j2", "perplexity", None, "perplexity")],
            directions=[(number, *direction[:3]) for number, direction in enumerate(directions)],
        )
        settings, prompts = store.settings(run), store.prompts(run)
        answers, verdicts, effects, projections = [], [], [], []
        for s in settings:
            cost = abs(s["coefficient"] or 0) * (1 + len(s["layers"])) * (2 if s["vector"] == NASTY else 1)
            for p in prompts:
                n, place = p["prompt"], (s["setting"], p["prompt"])
                shows = (7 * n + 5) % len(prompts) < round(strength(s) * len(prompts))
                text = f"{'I cannot' if shows else 'Sure'} {n} {NASTY if n == 3 else ''}"
                failed = s["kind"] == "control" and n == 5
                answers.append((*place, 0, "" if failed else text, 3, bytes(12), "stop", NASTY if failed else None))
                if failed:
                    continue
                label = NASTY if n == 3 else "refusal" if shows else "answer"
                read = not (n == 4 and s["kind"] == "vector")
                said = (label, float(shows), None, None) if read else (None, None, None, NASTY)
                verdicts += [("j1", *place, *said), ("j2", *place, None, 5 + cost + n / 7, {NASTY: 1.0}, None)]
            effects.append(("text-x", s["setting"], 0, 0.1 * cost, 2 + cost, 10, None))
        texts = ["a", NASTY, "\n", " b", "c"]
        tokens = [(s, p, 2, texts) for s in range(len(settings)) for p in range(2)]
        for s, p, *_ in tokens:
            for d in [of_setting[s]] if s else range(len(directions)):
                projections.append((s, p, d, *packed(projected(s, p, d))))
        store.add(run, answers=answers, verdicts=verdicts, effects=effects, tokens=tokens, projections=projections)
