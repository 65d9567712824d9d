"""A sweep of the size it is made for: 7 choices of layers x 9 coefficients x 3 methods x 64 prompts."""

from __future__ import annotations

import random

import pytest
from sweeps import contents, killed, rows_in, work

import faststeer as fs
from faststeer.evaluate.sweep import Store, Sweep
from faststeer.extract.contrast import contrast

BATCH = 256


@pytest.mark.full
def test_three_kills_at_random_end_in_the_same_table_of_thousands(tmp_path):
    """Two kills while it answers, one while it judges and measures."""
    demo = fs.demo.load()
    positive, negative = fs.demo.prompts("refusal", "train")
    means = contrast(*demo, positive, negative, at="resid_post", positions=[-1], covariance=True)
    dim, unit = means.dim().vector(-1), means.pca().vector(-1)
    pca = fs.SteeringVector({n: unit[n] * dim[n].norm() for n in dim.layers}, at="resid_post", method="pca")
    sweep = Sweep(
        fs.demo.prompts("refusal", "test")[1][:64],
        vectors={"dim": dim, "pca": pca, "random": fs.extract.random_like(dim, 0)},
        layers=[*dim.layers, dim.layers],
        coefficients=[0.25 * i for i in range(9)],
        controls=0,  # the random vector is one of the three methods
        judges=["refusal", "demo", "perplexity"],
        text=("Water boils at a lower temperature in the mountains.",),
    )
    whole, path = tmp_path / "whole.db", tmp_path / "killed.db"
    work(sweep, demo, whole, BATCH)
    with Store(whole) as store:
        (facts,) = store.runs()
    assert facts["done"] and facts["answers"] == (1 + 7 * 8 * 3) * 64  # coefficient 0 is answered once
    total, seed = rows_in(whole), random.SystemRandom().randrange(10**6)
    draw = random.Random(seed)
    moments = [*draw.sample(range(1, facts["answers"]), 2), draw.randrange(facts["answers"], total - 500)]
    killed(sweep, demo, path, moments, total, BATCH)
    work(sweep, demo, path, BATCH)
    assert contents(path) == contents(whole), f"seed {seed}, killed at {moments}"
