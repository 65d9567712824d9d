"""`faststeer search` on SmolLM2's tone: how long 600 answers take, whether the choice beats the plain sweep over layers
that it begins with, and whether the replay repeats it. Run alone on the machine, about ten minutes on two cores:

    python benchmarks/search/smollm2_tone.py [--goal less] [--answers 600]

Gains are those of validation prompts, the chosen setting's and the plain ones' on the same prompts: the first of them.
The plain setting is the one that gains most among those of no more KL than the chosen one. Written to
benchmarks/results/search_smollm2.csv, with the search's own files in benchmarks/results/search/.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

import faststeer as fs
from faststeer.behaviours.search import SearchSettings, replay, search
from faststeer.behaviours.search.record import summary, trials_of

sys.path.insert(0, str(Path(__file__).parents[1]))
import results
import smollm2


def gains(state: dict[str, Any]) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """Each setting that was measured to the end, and what it comes to on the prompts that all of these have."""
    return [
        (trial["setting"], summary(trial, state["unsteered"])) for trial in trials_of(state) if trial["pruned"] is None
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--goal", choices=["more", "less"], default="less")
    parser.add_argument("--answers", type=int, default=600)
    parser.add_argument("--out", type=Path, default=results.FOLDER / "search")
    arguments = parser.parse_args()
    results.refuse_reference()
    model, tokenizer = smollm2.load()
    behaviour, settings = fs.behaviours.load("tone"), SearchSettings(answers=arguments.answers, goal=arguments.goal)
    finished = (arguments.out / "search.json").is_file()  # then nothing is timed
    start = time.perf_counter()
    state = search(model, tokenizer, behaviour, arguments.out, settings, name=smollm2.MODEL, progress=True)
    seconds = "" if finished else round(time.perf_counter() - start, 1)
    start = time.perf_counter()
    differences, _ = replay(model, tokenizer, arguments.out / "search.json")
    replayed = time.perf_counter() - start
    chosen = trials_of(state)[state["chosen"]]
    own = summary(chosen, state["unsteered"])
    plain = [
        (setting, sums)
        for setting, sums in gains(state)
        if (setting["method"], setting["op"], setting["strength"]) == ("dim", "add", 1.0)
    ]
    cheaper = [each for each in plain if each[1]["kl"] <= own["kl"]]
    best, price = max(cheaper or plain, key=lambda each: each[1]["gain"])
    rows = [
        {"setting": name, **setting, "prompts": len(chosen["scores"]), "gain": round(sums["gain"], 4)}
        | {"kl": round(sums["kl"], 4), "seconds": seconds, "replay_seconds": round(replayed, 1)}
        | {"same_plan": not differences, "answers": arguments.answers}
        for name, setting, sums in (("chosen", chosen["setting"], own), ("best plain layer", best, price))
    ]
    for row in rows:
        print(row, flush=True)
    print("written to", results.write("search_smollm2", rows))


if __name__ == "__main__":
    main()
