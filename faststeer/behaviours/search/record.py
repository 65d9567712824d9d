"""What a search has measured, as its file says it: gains and costs, the Pareto front, the rule of the choice."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from faststeer.behaviours.search.settings import SearchSettings
from faststeer.evaluate.pareto import pareto, recommend
from faststeer.files import read_json, read_text, reading, write_atomically
from faststeer.plan import Plan

FORMAT = "faststeer.search/1"
COSTS = ("kl", "perplexity", "repetition", "over_refusal")


def summary(trial: Mapping[str, Any], base: Mapping[str, Any]) -> dict[str, float | None]:
    """The gain of a trial and its costs: means over its prompts, the unsteered model's on the same prompts taken away.
    "perplexity" is the factor on the geometric mean; "over_refusal" is None where refusing is the behaviour."""
    n = len(trial["scores"])

    def mean(values: Sequence[Any]) -> float:
        return math.fsum(values) / len(values)

    both = zip(trial["log_perplexities"], base["log_perplexities"][:n], strict=True)
    pairs = [(a, b) for a, b in both if a is not None and b is not None]
    refused = trial.get("refused")
    return {
        "gain": mean(trial["scores"]) - mean(base["scores"][:n]),
        "kl": trial["kl"],
        "perplexity": math.exp(mean([a - b for a, b in pairs])) if pairs else math.inf,
        "repetition": mean(trial["repetitions"]) - mean(base["repetitions"][:n]),
        "over_refusal": mean(refused) - mean(base["refused"][:n]) if refused else None,
    }


def front_of(sums: Mapping[int, Mapping[str, float | None]]) -> tuple[int, ...]:
    """The Pareto front of settings by number, gain against all costs that were measured."""
    names = (*COSTS, "gain")
    return pareto({n: [value for name in names if (value := s[name]) is not None] for n, s in sums.items()})


def within(sums: Mapping[str, float | None], settings: SearchSettings) -> bool:
    """Whether a setting's costs are within the limits."""
    return all((sums[name] or 0.0) <= getattr(settings, f"max_{name}") for name in COSTS)


def finalists_of(state: Mapping[str, Any], settings: SearchSettings) -> list[int]:
    """The settings of the front within the limits that gain most, by number; ties go to the smaller KL."""
    sums = {n: summary(t, state["unsteered"]) for n, t in enumerate(trials_of(state)) if t["pruned"] is None}
    allowed = [n for n in front_of(sums) if within(sums[n], settings)]
    best = sorted(allowed, key=lambda n: (-(sums[n]["gain"] or 0.0), sums[n]["kl"] or 0.0, n))
    return sorted(best[: settings.finalists])


def chosen_of(state: Mapping[str, Any], settings: SearchSettings) -> int | None:
    """The choice: on the front of the finalists within the limits, by all their prompts, the one of the smallest KL
    that has at least `share` of the largest gain; None where none gains anything within the limits."""
    trials = trials_of(state)
    merged = {int(n): with_confirmed(trials[int(n)], more) for n, more in state["confirmed"].items()}
    sums = {n: summary(trial, state["unsteered"]) for n, trial in merged.items()}
    allowed = {n: s for n, s in sums.items() if within(s, settings)}
    gains = {n: s["gain"] for n, s in allowed.items()}
    return recommend(front_of(allowed), gains, {n: s["kl"] for n, s in allowed.items()}, settings.share, None)


def with_confirmed(trial: Mapping[str, Any], more: Mapping[str, Any]) -> dict[str, Any]:
    return dict(trial) | {name: [*trial[name], *values] for name, values in more.items()}


def trials_of(state: Mapping[str, Any]) -> list[dict[str, Any]]:
    return [trial for each in state["rounds"] for trial in each]


def rows(state: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A line per setting that was tried, in order: the setting's own names, what `summary` says of it (of a finalist on
    all its prompts), "answers", "pruned" (why it was given up, or None), "front" and "chosen" (bool)."""
    trials, confirmed = trials_of(state), state["confirmed"] or {}
    whole = {n: trial for n, trial in enumerate(trials) if trial["pruned"] is None}
    merged = {n: with_confirmed(t, confirmed[str(n)]) if str(n) in confirmed else t for n, t in whole.items()}
    sums = {n: summary(trial, state["unsteered"]) for n, trial in merged.items()}
    front = front_of(sums)
    lines = []
    for n, trial in enumerate(trials):
        known = sums.get(n) or dict.fromkeys(("gain", *COSTS)) | {"kl": trial["kl"]}
        answers = len(merged.get(n, trial).get("scores", ()))
        place = {"number": n, **trial["setting"], **known, "answers": answers, "pruned": trial["pruned"]}
        lines.append(place | {"front": n in front, "finalist": str(n) in confirmed, "chosen": n == state["chosen"]})
    return lines


def setting_text(setting: Mapping[str, Any]) -> str:
    """A setting in words, such as "add dim x 1.2, layer 15, token -1"."""
    place = f"{'found at ' if setting['op'] == 'ablate' else ''}layer {setting['layer']}, token {setting['position']}"
    return f"{setting['op']} {setting['method']} x {setting['strength']:.3g}, {place}"


def answered(state: Mapping[str, Any]) -> int:
    """Answers that the settings tried have taken."""
    return sum(len(trial.get("scores", ())) for trial in trials_of(state))


def spent(state: Mapping[str, Any]) -> int:
    base = 0 if state["unsteered"] is None else len(state["unsteered"]["scores"])
    final = sum(len(more.get("scores", ())) for more in (state["confirmed"] or {}).values())
    return base + final + answered(state)


# The file -------------------------------------------------------------------------------------------------------------


def load(path: str | Path) -> dict[str, Any]:
    """What a search wrote.

    Raises:
        FileNotFoundError: no such file. FormatError: another kind of file, or numbers that were changed.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no search at {path}: no such file")
    with reading(f"{path} holds no search", "remove it and search again"):
        state = read_json(read_text(path))
        if not isinstance(state, dict) or state.get("format") != FORMAT:
            kind = state.get("format") if isinstance(state, dict) else type(state).__name__
            raise ValueError(f"its format is {kind!r}, expected {FORMAT!r}")
        if state.pop("sha256", None) != digest(state):
            raise ValueError("its content is not what was written: a number was changed, or a part is missing")
    return state


def save(path: Path, state: Mapping[str, Any]) -> None:
    write_atomically(path, json.dumps(dict(state) | {"sha256": digest(state)}, ensure_ascii=False, indent=1) + "\n")


def digest(data: Any) -> str:
    return hashlib.sha256(json.dumps(data, sort_keys=True, allow_nan=False).encode()).hexdigest()


def plan_text(plan: Plan) -> str:
    """A plan as the text of plan.json, its vector inside."""
    return plan.to_json(inline=True, indent=2) + "\n"
