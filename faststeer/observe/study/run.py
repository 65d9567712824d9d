"""The study from one end to the other: vectors, answers, circuits, tokens, sparsity; one JSON object comes out.

Every step is a part in a folder (`parts`), so that a study that was interrupted goes on where it stopped, and a setting
that is changed costs what depends on it. Nothing is chosen on what is reported: layers on validation prompts, edges on
training prompts, and test prompts are answered.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from faststeer.algebra import random_like
from faststeer.behaviours import Behaviour
from faststeer.behaviours.job import parts_in
from faststeer.files import write_atomically
from faststeer.hf.batching import check_evaluating, model_name
from faststeer.observe.circuits import select
from faststeer.observe.lens import LogitLens
from faststeer.observe.sparsity import sparsity_curves
from faststeer.observe.study.answers import StudyAnswers
from faststeer.observe.study.edges import Edges, FoldScores, summary
from faststeer.observe.study.job import SIDES, Job
from faststeer.observe.study.settings import Settings
from faststeer.observe.study.utility import Utility
from faststeer.observe.study.vectors import Finder
from faststeer.observe.svv import svv
from faststeer.vector import SteeringVector
from faststeer.version import versions

FORMAT = "faststeer.study/1"
N_HEADS, N_TOKENS = 10, 10  # heads that are read, and tokens of each


def run(
    model: Any,
    tokenizer: Any,
    behaviour: Behaviour,
    folder: str | os.PathLike[str],
    settings: Settings | None = None,
    *,
    name: str | None = None,
    batch_size: int = 32,
    patch_batch: int = 4,
    progress: bool = False,
) -> dict[str, Any]:
    """Make the whole study of arXiv 2604.08524 for one model and behaviour.

    1. Vectors by several methods, before one layer and of one length.
    2. Answers under each of them, whole and with attention patterns frozen, values frozen, value vectors ablated, MLPs'
       direct reading ablated, next to the unsteered model and a random vector of the same length.
    3. Edges scored by activation patching on training prompts whose verdict the vector changes (added and subtracted,
       steered and unsteered completions); circuits tried on test prompts, next to random ones, to what is outside
       them, and to the other vectors' circuits; how alike they are.
    4. The tokens that the steering value vectors of the strongest heads raise, and those of the vector itself.
    5. The behaviour against the share of the vector's coordinates that are zero.
    6. Next-token loss on neutral text and questions answered rightly, in the same contexts as the answers.

    What could not be made (a vector that changes no verdict, attention that cannot be frozen) is named in the result
    with the reason, and left out.

    Args:
        folder: parts go to `folder/parts`, the result to `folder/observe.json`; both are written atomically.
        name: what the result calls the model (its own name).
        batch_size: prompts that are answered together. patch_batch: examples that are patched together; halved where
            they do not fit into memory. No result depends on them beyond rounding.
        progress: progress bars on stderr.

    Raises:
        ValueError: a model in training mode, a behaviour without difference in means; what extraction refuses.
    """
    settings = settings or Settings()
    check_evaluating(model)
    parts = parts_in(Path(folder) / "parts", FORMAT, model, tokenizer)
    job = Job(model, tokenizer, behaviour, parts, batch_size, progress, settings, patch_batch)
    vectors, skipped = Finder(job).find()
    dim = Finder(job).dim
    job.say(f"vectors before layer {dim.layers[0]}: {', '.join(vectors)}")
    result: dict[str, Any] = {
        "format": FORMAT,
        "model": name or model_name(model),
        "behaviour": behaviour.name,
        "judge": behaviour.judge,
        "versions": versions(),
        "settings": settings.to_dict(),
        "layer": dim.layers[0],
        "position": dim.provenance["position"],
        "norm": float(dim[dim.layers[0]].double().norm()),
        "n_prompts": {side: len(job.prompts("test", side, settings.n_test)) for side in SIDES},
        "methods": list(vectors),
        "skipped": {"methods": skipped},
    }
    answers = StudyAnswers(job).table(vectors, random_like(dim, settings.seed))
    result |= {"answers": answers["rows"]}
    result["utility"] = Utility(job).table(vectors, random_like(dim, settings.seed), answers["skipped"])
    result["skipped"]["contexts"] = answers["skipped"]
    scored, circuits = _circuits(job, vectors)
    result |= circuits
    result["tokens"] = {name: _tokens(job, vectors[name], scored.get(name)) for name in vectors}
    result["sparsity"] = [row for name, one in scored.items() for row in _sparsity(job, name, vectors[name], one)]
    write_atomically(Path(folder) / "observe.json", json.dumps(result, indent=1, allow_nan=False) + "\n")
    return result


def _circuits(job: Job, vectors: Mapping[str, SteeringVector]) -> tuple[dict[str, FoldScores], dict[str, Any]]:
    """Scores by vector, and everything about edges that is reported."""
    edges, share = Edges(job), float(job.settings.compared)
    scored: dict[str, FoldScores] = {}
    unscored: dict[str, dict[str, str]] = {}
    for name, vector in vectors.items():
        by_side, why = edges.examples(name, vector, "train")
        if why:
            unscored[name] = why
        if by_side:
            scored[name] = edges.scored(name, vector, by_side)
    curves, untried = [], {}
    for name in scored:
        by_side, why = edges.examples(name, vectors[name], "test")
        if why:
            untried[name] = why
        if rows := [row for side in by_side.values() for row in side]:
            curves += edges.curves(name, rows, scored, vectors[name])
    patching = {
        name: summary(one) | {"kinds": edges.kinds(one, select(one.whole, share))} for name, one in scored.items()
    }
    tables = {"patching": patching, "faithfulness": curves, "overlap": edges.overlaps(scored, vectors)}
    return scored, tables | {"without_examples": {"train": unscored, "test": untried}}


def _tokens(job: Job, vector: SteeringVector, scored: FoldScores | None) -> dict[str, Any]:
    """What the vector itself and, of the heads whose node scores (else value vectors) are largest, the steering value
    vectors raise and lower by the logit lens."""
    (layer,) = vector.layers
    lens = LogitLens(job.model)

    def read(direction: Tensor) -> dict[str, list[str]]:
        return {
            side: lens.top_tokens(direction, job.tokenizer, N_TOKENS, direction=True, largest=side == "raises")
            for side in ("raises", "lowers")
        }

    own = read(vector[layer])
    try:
        of_heads = svv(job.model, vector)
    except ValueError as error:  # an architecture whose values cannot be read
        return {"vector": own, "heads": [], "why": str(error)}
    nodes = {} if scored is None else Edges(job).nodes(scored)
    heads = [
        (n, head, direction, nodes.get(f"L{n}.H{head}"))
        for n in of_heads.layers
        for head, direction in enumerate(of_heads[n])
    ]
    strongest = sorted(heads, key=lambda h: abs(h[3]["value"]) if h[3] else float(h[2].norm()), reverse=True)
    rows = [
        {"layer": n, "head": head, "norm": float(direction.norm()), "effect": effect, **read(direction)}
        for n, head, direction, effect in strongest[:N_HEADS]
    ]
    return {"vector": own, "heads": rows}


def _sparsity(job: Job, name: str, vector: SteeringVector, scored: FoldScores) -> list[dict[str, Any]]:
    """Curves of both sides, each by the effects of coordinates on that side."""
    s, rows = job.settings, []
    for side, sign in SIDES.items():
        scores = scored.pooled(sides=[side])
        if scores is None:
            continue
        prompts = job.prompts("test", side, s.n_test)
        depends = [vector, scores.dimensions, prompts, s.coefficient, s.sparsities, s.controls, s.seed]
        depends += [s.max_new_tokens, job.behaviour.judge]

        def make(side: str = side, sign: int = sign, effect: Tensor = scores.dimensions) -> Any:
            job.say(f"{name}, {side}: sparsity")
            points = sparsity_curves(
                job.model,
                job.tokenizer,
                job.prompts("test", side, s.n_test),
                vector,
                effect,
                lambda text: job.shown(side, text),
                coefficient=sign * s.coefficient,
                sparsities=s.sparsities,
                seeds=[s.seed + i for i in range(s.controls)],
                max_new_tokens=s.max_new_tokens,
                **job.passing,
            )
            return [point.to_dict() for point in points]

        made = job.parts.json(f"sparsity-{name}-{side}", depends, make)
        rows += [{"vector": name, "side": side, **row} for row in made]
    return rows
