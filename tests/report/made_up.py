"""A store of made-up rows, written as a sweep writes them: every kind of row, and texts that try to be markup."""

from __future__ import annotations

import numpy as np
import torch

import faststeer as fs
from faststeer.evaluate.judging.interface import Verdict
from faststeer.evaluate.sweep import Store, Sweep, SweepPrompt
from faststeer.evaluate.sweep.projections import watched

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
        store.add_judge(run, "j1", "refusal", 1.0, "refusal")
        store.add_judge(run, "j2", "perplexity", None, "perplexity")
        directions, of_setting = watched(sweep.settings, 5)
        store.add_directions(run, [direction[:3] for direction in directions])
        settings, prompts = store.settings(run), store.prompts(run)
        refusals, perplexities, effects = [], [], []
        with store.transaction():
            for s in settings:
                cost = abs(s["coefficient"] or 0) * (1 + len(s["layers"])) * (2 if s["vector"] == NASTY else 1)
                for p in prompts:
                    n = p["prompt"]
                    shows = (7 * n + 5) % len(prompts) < round(strength(s) * len(prompts))
                    text = f"{'I cannot' if shows else 'Sure'} {n} {NASTY if n == 3 else ''}"
                    failed = s["kind"] == "control" and n == 5
                    row = (
                        run,
                        s["setting"],
                        n,
                        0,
                        "" if failed else text,
                        3,
                        bytes(12),
                        "stop",
                        NASTY if failed else None,
                    )
                    store._db.execute("INSERT INTO answers VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)", row)
                    if failed:
                        continue
                    label = NASTY if n == 3 else "refusal" if shows else "answer"
                    read = not (n == 4 and s["kind"] == "vector")
                    verdict = Verdict(label, float(shows)) if read else Verdict(None, None, raw=NASTY)
                    refusals.append((s["setting"], n, verdict))
                    perplexities.append((s["setting"], n, Verdict(None, 5 + cost + n / 7, {NASTY: 1.0})))
                effects.append((s["setting"], 0, 0.1 * cost, 2 + cost, 10, None))
        tokens = ["a", NASTY, "\n", " b", "c"]
        store.add_projections(
            run,
            [
                (s, p, 2, tokens, {d: projected(s, p, d) for d in ([of_setting[s]] if s else range(len(directions)))})
                for s in range(len(settings))
                for p in range(2)
            ],
        )
        store.add_verdicts(run, "j1", refusals)
        store.add_verdicts(run, "j2", perplexities)
        store.add_effects(run, "text-x", effects)
