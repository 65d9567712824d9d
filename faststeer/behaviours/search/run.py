"""The search for the setting that brings about a behaviour at the least price: layer, token, method, op and strength.

Vectors of every method are found once, for all layers and tokens. Optuna's TPE proposes settings, a round of them at a
time; a round is rows of the same batches. Settings that cost too much, gain nothing on the first prompts or are beaten
there are given up early. The best are measured on more prompts, one is chosen by a rule, and what it does is measured
on prompts that nothing was chosen on. Everything that was measured is in one file, from which a killed search goes on
and `replay` repeats the choice. It never trains a vector.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from faststeer.artefacts import fingerprint
from faststeer.behaviours.behaviour import Behaviour, behaviour_from
from faststeer.behaviours.search.bench import Bench
from faststeer.behaviours.search.record import (
    COSTS,
    FORMAT,
    answered,
    chosen_of,
    finalists_of,
    load,
    plan_text,
    save,
    spent,
    summary,
    trials_of,
)
from faststeer.behaviours.search.settings import Budget, SearchSettings
from faststeer.behaviours.search.space import Space
from faststeer.compile import layer_numbers
from faststeer.extras import needed_for
from faststeer.files import FormatError, write_atomically
from faststeer.hf import find_hook_points
from faststeer.hf.batching import check_evaluating, model_name
from faststeer.hf.prompts import post_instruction_positions
from faststeer.plan import Plan
from faststeer.progress import progress_bar
from faststeer.version import versions

STARTUP = 16  # settings that are drawn at random before TPE has something to go by
WORST = -2.0  # the gain that Optuna is told of a setting that was given up before it answered: scores are in -1..1


def search(
    model: Any,
    tokenizer: Any,
    behaviour: Behaviour,
    folder: str | Path,
    settings: SearchSettings | None = None,
    *,
    name: str | None = None,
    progress: bool = False,
) -> dict[str, Any]:
    """Search the setting that brings about a behaviour (or takes it away) at the least price, and return what
    `folder/search.json` says.

    1. Each round, Optuna's TPE (several objectives: the gain, and every cost) proposes as many settings as have their
       first prompts in one batch. The first are those of a plain sweep over layers.
    2. A setting is given up if its KL on neutral text is above the limit (before it answers anything), if it gains
       nothing on the first half of its prompts, or if an earlier one of no more KL does at least as much there.
    3. The `finalists` of the Pareto front within the limits that gain most are measured on more validation prompts.
    4. Chosen is, of the front of these within the limits, the one of the smallest KL with at least `share` of the
       largest gain. `folder/plan.json` is its plan.
    5. The chosen setting is measured beside the unsteered model on test prompts.

    The file is written after every round, atomically: the same call goes on after a kill, and ends with the same bytes.

    Args:
        behaviour: whose training prompts give the vectors, whose judge reads the answers.
        name: what the model is called.
        progress: forecast and progress bar on stderr.

    Raises:
        ImportError: Optuna is not installed.
        ValueError: settings that the model or the behaviour does not allow, too few answers.
        FormatError: the folder holds another search, or a file that is damaged.
    """
    settings = settings or SearchSettings()
    _optuna()
    check_evaluating(model)
    settings = _checked(model, tokenizer, settings)
    path, head = Path(folder) / "search.json", _head(model, behaviour, settings, name)
    state = _started(path, head)
    if state["finished"]:
        return state
    bench = _bench(model, tokenizer, behaviour, settings)
    if progress:
        n_answers = settings.answers - spent(state)
        train = behaviour.train
        n_train = sum(len(side[: settings.train]) for side in (train.positive, train.negative))
        bench.say(
            f"First the vectors of every layer are found, from {n_train} training prompts; then answers are generated"
        )
        bench.forecast(n_answers, settings.max_new_tokens, "Fewer --answers take less")
    space = Space(model, tokenizer, behaviour, settings)
    with progress_bar("Searching", settings.answers - spent(state), progress) as bench.advance:
        _work(state, path, bench, space)
    return state


def _work(state: dict[str, Any], path: Path, bench: Bench, space: Space) -> None:
    settings, budget = bench.settings, bench.budget
    if state["unsteered"] is None:
        state["unsteered"] = bench.unsteered()
        save(path, state)
    while state["confirmed"] is None:
        left = budget.search - answered(state)
        size = min(max(settings.batch // budget.first, 1), left // budget.prompts)
        if size < 1 or len(trials_of(state)) >= settings.answers:  # settings without answers cost time as well
            break
        proposed = _proposals(state, space, settings, size)
        plans = [space.plan(setting) for setting in proposed]
        done = [trial for trial in trials_of(state) if trial["pruned"] is None]
        state["rounds"].append(bench.round(proposed, plans, state["unsteered"], done))
        save(path, state)
    trials = trials_of(state)
    if state["confirmed"] is None:
        prompts = bench.validation[budget.prompts : budget.prompts + budget.confirm]
        numbers = finalists_of(state, settings)
        answers = bench.answer([(prompts, space.plan(trials[n]["setting"])) for n in numbers])
        measured = [bench.measure(prompts, each) for each in answers]
        state["confirmed"] = {str(n): each for n, each in zip(numbers, measured, strict=True)}
        save(path, state)
    chosen = state["chosen"] = chosen_of(state, settings)
    if chosen is not None:
        plan = space.plan(trials[chosen]["setting"])
        assert plan is not None
        text = plan_text(plan)
        state["test"] = bench.tested(plan)
        state["plan_sha256"] = hashlib.sha256(text.encode()).hexdigest()
        write_atomically(path.with_name("plan.json"), text)
    state["finished"] = True
    save(path, state)


def _optuna() -> Any:
    with needed_for("the search", "search"):
        import optuna
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna


def _checked(model: Any, tokenizer: Any, settings: SearchSettings) -> SearchSettings:
    """The settings with layers and tokens written out.

    Raises:
        ValueError: layers that the model does not have, positions that are no tokens of the prompt.
    """
    n_layers = find_hook_points(model).n_layers
    layers = sorted(set(layer_numbers(settings.layers, n_layers)))
    positions = settings.positions or tuple(post_instruction_positions(tokenizer))
    return SearchSettings(**asdict(settings) | {"layers": tuple(layers), "positions": tuple(positions)})


def _bench(model: Any, tokenizer: Any, behaviour: Behaviour, settings: SearchSettings) -> Bench:
    side = "induce" if settings.goal == "more" else "suppress"
    sizes = len(getattr(behaviour.validation, side)), len(getattr(behaviour.test, side))
    budget = Budget.of(settings, *sizes)
    return Bench(model, tokenizer, behaviour, None, settings.batch, False, settings, budget)


def _proposals(state: Mapping[str, Any], space: Space, settings: SearchSettings, size: int) -> list[dict[str, Any]]:
    """The next round's settings. The sampler begins anew each round, from what was measured and a seed of the round's
    own, so that a search that goes on asks for what it would have asked for."""
    optuna = _optuna()
    costs = [name for name in COSTS if name != "over_refusal" or "refused" in state["unsteered"]]
    number = len(state["rounds"])
    sampler = optuna.samplers.TPESampler(
        seed=10_007 * settings.seed + number, n_startup_trials=STARTUP, constant_liar=True
    )
    study = optuna.create_study(directions=["maximize", *["minimize"] * len(costs)], sampler=sampler)
    for trial in trials_of(state):
        params = space.parameters(trial["setting"])
        distributions = space.distributions(trial["setting"]["op"])
        values = _told(trial, state["unsteered"], costs, settings)
        study.add_trial(optuna.trial.create_trial(params=params, distributions=distributions, values=values))
    asked = len(trials_of(state))
    for setting in space.plain()[asked : asked + size]:
        place = {"place": space.layers.index(setting["layer"])}
        study.enqueue_trial({k: v for k, v in setting.items() if k != "layer"} | place)
    return [space.suggest(study.ask()) for _ in range(size)]


def _told(
    trial: Mapping[str, Any], base: Mapping[str, Any], costs: Sequence[str], settings: SearchSettings
) -> list[float]:
    """What Optuna learns of a trial: its gain and costs. One that was given up costs twice the limits by every measure,
    so that it is on no front: a setting that does next to nothing would be cheaper than all others."""
    worst = {
        "kl": 2 * settings.max_kl,
        "perplexity": 2 * settings.max_perplexity,
        "repetition": 1.0,
        "over_refusal": 1.0,
    }
    if trial["pruned"] is not None:
        scores = trial.get("scores")
        n = len(scores or ())
        gain = (math.fsum(scores) - math.fsum(base["scores"][:n])) / n if scores else WORST
        return [gain, *(worst[name] for name in costs)]
    sums = summary(trial, base)
    return [sums["gain"] or 0.0, *(min(sums[name] or 0.0, worst[name]) for name in costs)]


def _head(model: Any, behaviour: Behaviour, settings: SearchSettings, name: str | None) -> dict[str, Any]:
    """What says which search it is."""
    return {
        "format": FORMAT,
        "model": name or model_name(model),
        "fingerprint": fingerprint(model),
        "behaviour": json.loads(behaviour.to_json()),
        "settings": json.loads(json.dumps(asdict(settings))),
        "versions": versions() | {"optuna": _optuna().__version__},
    }


def _started(path: Path, head: dict[str, Any]) -> dict[str, Any]:
    """What is there of this search, or its beginning.

    Raises:
        FormatError: another search, or a damaged file.
    """
    if not path.exists():
        later = dict.fromkeys(("unsteered", "confirmed", "chosen", "test", "plan_sha256"))
        return head | later | {"rounds": [], "finished": False}
    state = load(path)
    if other := [name for name in head if state.get(name) != head[name]]:
        raise FormatError(
            f"{path} is another search (of another {', '.join(other)}): give another --out, or remove that file"
        )
    return state


def replay(model: Any, tokenizer: Any, path: str | Path, *, progress: bool = False) -> tuple[dict[str, Any], Plan]:
    """Repeat a search's choice: find the vectors anew, choose among the recorded settings by the rule, make the plan
    and measure it on the test prompts, and compare. Return `{name: (recorded, repeated)}` of what differs, which is
    empty on the machine and with the versions of the search, and the plan.

    Raises:
        FileNotFoundError, FormatError: as `load`.
        ValueError: a search that is not finished or chose nothing, or that is of another model.
    """
    state = load(path)
    if not state["finished"]:
        raise ValueError(f"{path} is not finished: the command that began it goes on with it")
    if state["chosen"] is None:
        raise ValueError(f"{path} chose no setting: none gains anything within the limits")
    if state["fingerprint"] != fingerprint(model):
        raise ValueError(
            f"{path} is a search on another model ({state['model'] or 'not named'}; other weights or another "
            "configuration): give the one it was made on"
        )
    behaviour = behaviour_from(state["behaviour"], f"{path}, behaviour", Path(path).parent)
    given: dict[str, Any] = {key: tuple(v) if isinstance(v, list) else v for key, v in state["settings"].items()}
    settings = SearchSettings(**given)
    check_evaluating(model)
    bench = _bench(model, tokenizer, behaviour, settings)
    chosen = chosen_of(state, settings)
    space = Space(model, tokenizer, behaviour, settings)
    plan = None if chosen is None else space.plan(trials_of(state)[chosen]["setting"])
    if plan is None:
        raise FormatError(f"{path}: the rule chooses nothing of its settings now, and chose {state['chosen']}")
    with progress_bar("Replaying", 2 * len(bench.test), progress) as bench.advance:
        test = bench.tested(plan)
    pairs = {
        "chosen": (state["chosen"], chosen),
        "plan": (state["plan_sha256"], hashlib.sha256(plan_text(plan).encode()).hexdigest()),
        **{name: (state["test"][name], test[name]) for name in test},
    }
    return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}, plan
