"""A search on the real model: its choice makes the tone gloomier on questions that nothing was chosen on, and is
replayed to the same bits."""

from __future__ import annotations

import faststeer as fs
from faststeer.behaviours import search as searching
from faststeer.evaluate.judging import make


def test_a_small_search_and_its_replay(smollm2, tmp_path):
    behaviour = fs.behaviours.load("tone")
    settings = searching.SearchSettings(
        answers=96, goal="less", prompts=4, finalists=2, train=16, methods=("dim",), ops=("add",), positions=(-1,),
        layers=tuple(range(12, 27)), max_new_tokens=24,
    )  # fmt: skip
    state = searching.search(*smollm2, behaviour, tmp_path, settings, name="smollm2")
    chosen = searching.rows(state)[state["chosen"]]
    assert chosen["kl"] <= settings.max_kl and state["test"]["gain"]["mean"] > 0.1
    differences, plan = searching.replay(*smollm2, tmp_path / "search.json")
    assert differences == {} and plan == fs.Plan.load(tmp_path / "plan.json")
    # What the plan does to other questions of the test split, by the judge itself.
    asked = behaviour.test.induce[-16:]
    texts = fs.evaluate.complete(*smollm2, [*asked, *asked], [None] * 16 + [plan] * 16, max_new_tokens=24)
    scores = [verdict.score for verdict in make("sentiment")([*asked, *asked], texts)]
    assert sum(scores[16:]) < sum(scores[:16])
