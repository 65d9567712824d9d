"""Sweeps run in the tests: by a process that may be killed, what is in a store afterwards, and what hooks on the model
see instead."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sqlite3
import sys
import time

import torch

import faststeer as fs
import faststeer.evaluate.sweep as sweeps
from faststeer.extract.contrast import contrast
from faststeer.hf.batching import encode

run_module = sys.modules["faststeer.evaluate.sweep.run"]  # its package has a function of that name
TABLES = (
    "settings", "prompts", "answers", "judges", "verdicts", "effects", "vectors", "directions", "tokens", "projections",
)  # fmt: skip


def of_thousands(demo):
    """A sweep of the size it is made for: 7 choices of layers x 9 coefficients x 3 methods x 64 prompts."""
    positive, negative = fs.demo.prompts("refusal", "train")
    means = contrast(*demo, positive, negative, at="resid_post", positions=[-1], keep=True)
    dim, unit = means.dim().vector(-1), means.pca().vector(-1)
    pca = fs.SteeringVector({n: unit[n] * dim[n].norm() for n in dim.layers}, at="resid_post", method="pca")
    return sweeps.Sweep(
        fs.demo.prompts("refusal", "test")[1][:64],
        vectors={"dim": dim, "pca": pca, "random": fs.extract.random_like(dim, 0)},
        layers=[*dim.layers, dim.layers],
        coefficients=[0.25 * i for i in range(9)],
        controls=0,  # the random vector is one of the three methods
        judges=["refusal", "demo", "perplexity"],
        text=("Water boils at a lower temperature in the mountains.",),
    )


def contents(path):
    """Every row of the tables that hold results, in order."""
    with sqlite3.connect(path) as db:
        return {name: sorted(map(repr, db.execute(f"SELECT * FROM {name}"))) for name in TABLES}


def work(sweep, demo, path, max_batch=8):
    with sweeps.Store(path) as store:
        return sweeps.run(sweep, *demo, store, max_batch=max_batch, progress=False)


def rows_in(path):
    counted = ("answers", "verdicts", "effects", "projections")
    try:
        with sqlite3.connect(f"file:{path}?mode=ro", uri=True, timeout=10) as db:
            return sum(db.execute(f"SELECT count(*) FROM {name}").fetchone()[0] for name in counted)
    except sqlite3.OperationalError:
        return 0


def killed(sweep, demo, path, moments, total, max_batch=8):
    """Run the sweep in a process that is killed with SIGKILL as soon as so many rows are on disk, for each of the
    moments, and see that no row is lost."""
    fork, seen = multiprocessing.get_context("fork"), 0
    for moment in sorted(moments):
        process = fork.Process(target=work, args=(sweep, demo, path, max_batch))
        process.start()
        while process.is_alive() and rows_in(path) < moment:
            time.sleep(0.002)
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        assert process.exitcode == -signal.SIGKILL, f"{moments}: it had finished before it could be killed"
        now = rows_in(path)
        assert moment <= now < total and now >= seen, f"{moments}: rows were lost"
        seen = now


def watched_by_hooks(demo, prompt, v, at, add, max_new_tokens):
    """What hooks on the model see: `[layers + 1, tokens]` of prompt and answer on `v`, while `add` is added to what
    enters the layers of `at`; and the answer."""
    model, tokenizer = demo
    ids = torch.tensor(encode(tokenizer, [prompt]))
    steered = [
        model.model.layers[n].register_forward_pre_hook(lambda _m, args, d=d: (args[0] + d, *args[1:]))
        for n, d in zip(at, add, strict=True)
    ]
    seen = []
    watching = [
        layer.register_forward_pre_hook(lambda _m, args: seen.append(args[0][0])) for layer in model.model.layers
    ]
    watching.append(model.model.layers[-1].register_forward_hook(lambda _m, _a, out: seen.append(out[0])))
    try:
        with torch.no_grad():
            end = tokenizer.eos_token_id
            whole = model.generate(
                ids, max_new_tokens=max_new_tokens, do_sample=False, pad_token_id=tokenizer.pad_token_id
            )[0]
            answer = whole[ids.shape[1] :].tolist()
            answer = answer[: answer.index(end)] if end in answer else answer
            seen.clear()
            model(torch.cat([ids, torch.tensor([answer], dtype=torch.long)], 1), use_cache=False)
    finally:
        for handle in (*steered, *watching):
            handle.remove()
    return torch.stack([h @ (v / v.norm()) for h in seen]), tokenizer.decode(answer, skip_special_tokens=True)
