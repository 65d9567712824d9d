"""Both answers against `generate` one at a time, projections against hidden states, and what is refused."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch

from faststeer import evaluate
from faststeer.intervention import Ablate, Add
from faststeer.plan import Plan
from faststeer.ui import Control, Playground
from faststeer.ui.heat import heat_map
from faststeer.vector import SteeringVector

HARMLESS = "I need to print a passport. Please help."


def last(stream):
    return list(stream)[-1]


def one(playground, prompt, *interventions, **options):
    plan = Plan(interventions) if interventions else None
    return evaluate.complete(playground.model, playground.tokenizer, [prompt], plan, **options)[0]


def test_both_answers_are_those_of_generate(playground):
    refusal, tone = playground.vectors["refusal"], playground.vectors["tone"]
    cases = [
        ({"refusal": Control(1.0, (4,))}, [Add(refusal, 1.0, layers=4)]),
        ({"refusal": Control(1.0, (5, 3), "ablate")}, [Ablate(refusal, 1.0, layers=[3, 5])]),
        (
            {"tone": Control(1.0, (1,)), "refusal": Control(-1.0, (4,))},
            [Add(refusal, -1.0, layers=4), Add(tone, 1.0, layers=1)],
        ),
    ]
    unsteered = one(playground, HARMLESS, max_new_tokens=24)
    for controls, interventions in cases:
        answers = list(playground.stream(HARMLESS, controls, max_new_tokens=24))
        assert answers[-1].unsteered == unsteered
        assert answers[-1].steered == one(playground, HARMLESS, *interventions, max_new_tokens=24)
        assert [a.done for a in answers] == [False] * (len(answers) - 1) + [True]
        for before, after in itertools.pairwise(answers):
            assert after.unsteered.startswith(before.unsteered) and after.steered.startswith(before.steered)


def test_strength_0_and_no_layers_are_no_steering(playground):
    for control in (Control(0.0, (4,)), Control(1.0, ())):
        answers = last(playground.stream(HARMLESS, {"refusal": control}, temperature=1.0, seed=7, max_new_tokens=12))
        assert answers.unsteered == answers.steered
        assert torch.equal(answers.projections[0], answers.projections[1])


def test_sampling_repeats_with_its_seed(playground):
    def answer(seed):
        return last(playground.stream(HARMLESS, {}, temperature=1.5, seed=seed, max_new_tokens=12)).unsteered

    assert answer(1) == answer(1)
    assert len({answer(seed) for seed in (1, 2, 3)}) > 1


def test_projections_are_those_of_the_hidden_states(playground):
    refusal = playground.vectors["refusal"]
    answers = last(playground.stream(HARMLESS, {"refusal": Control(1.0, (4,))}, max_new_tokens=5))
    text = playground.tokenizer.apply_chat_template(
        [{"role": "user", "content": HARMLESS}], add_generation_prompt=True, tokenize=False
    )
    for row, answer in enumerate((answers.unsteered, answers.steered)):
        tokens = answers.tokens[row]
        ids = playground.tokenizer(text + answer, add_special_tokens=False, return_tensors="pt")["input_ids"]
        ids = ids[:, : len(tokens)]
        assert tokens == [playground.tokenizer.decode([token]) for token in ids[0]]
        layers = []

        def keep(module, args, output, layers=layers):
            layers.append(output[0] if output.dim() == 3 else output)

        def push(module, args):
            return (args[0] + refusal[4], *args[1:])

        handles = [layer.register_forward_hook(keep) for layer in playground.model.model.layers]
        if row == 1:
            handles.append(playground.model.model.layers[4].register_forward_pre_hook(push))
        with torch.no_grad():
            playground.model(input_ids=ids)
        for handle in handles:
            handle.remove()
        unit = refusal[4] / refusal[4].norm()
        expected = torch.stack([state @ unit for state in layers])
        if row == 1:
            expected[3] += refusal[4].norm()  # resid_post of layer 3 is where the vector is added
        torch.testing.assert_close(answers.projections[row, :, : len(tokens), 0], expected, rtol=1e-3, atol=1e-2)


def test_an_abandoned_answer_leaves_nothing(playground):
    before = one(playground, HARMLESS, max_new_tokens=8)
    stream = playground.stream(HARMLESS, {"refusal": Control(1.0, (4,))})
    next(stream)
    assert one(playground, HARMLESS, max_new_tokens=8) == before
    next(stream)  # and goes on
    assert one(playground, HARMLESS, max_new_tokens=8) == before


def test_refused(playground):
    model, tokenizer = playground.model, playground.tokenizer
    short = SteeringVector({1: torch.ones(64)}, at="resid_post", model="other")
    with pytest.raises(ValueError, match=r"hidden size 64, the model 128.*other"):
        Playground(model, tokenizer, {"short": short})
    with pytest.raises(ValueError, match=r"layer 9, the model has layers 0\.\.5"):
        Playground(model, tokenizer, {"deep": SteeringVector({9: torch.ones(128)}, at="resid_post")})
    with pytest.raises(ValueError, match="meant to clamp"):
        Playground(model, tokenizer, {"clamped": SteeringVector({1: torch.ones(128)}, at="resid_post", op="clamp")})
    with pytest.raises(ValueError, match="no vectors"):
        Playground(model, tokenizer, {})
    for prompt, controls, match in (
        (" ", {}, "prompt is empty"),
        (HARMLESS, {"joy": Control()}, "no vector 'joy'"),
        (HARMLESS, {"refusal": Control(1.0, (0,))}, "no direction for layer 0"),
        (HARMLESS, {"refusal": Control(float("nan"), (4,))}, "nan"),
        ("a passport " * 600, {}, "model positions for"),
    ):
        with pytest.raises(ValueError, match=match):
            next(playground.stream(prompt, controls))


def test_a_unit_vectors_slider_reaches_as_far_as_a_token_is_long(playground):
    vector = playground.vectors["refusal"]
    unit = SteeringVector({4: vector[4] / vector[4].norm()}, at="resid_pre", scale="unit")
    made = Playground(playground.model, playground.tokenizer, {"unit": unit, "raw": vector})
    assert made.reach("raw") == 2
    # The demo model's residual stream is long; that of no token is a thousand times another's.
    assert 2 < made.reach("unit") < 1e4
    assert made.start["raw"].layers == (3,) and made.start["unit"].layers == (4,)


def test_heat_map(playground):
    answers = last(playground.stream(HARMLESS, {"refusal": Control(1.0, (4,))}, max_new_tokens=12))
    figure = heat_map(answers, 1, "a title")
    assert figure.layout.title.text == "a title" and len(figure.data) == 2
    for row, trace in enumerate(figure.data):
        n = len(answers.tokens[row])
        torch.testing.assert_close(torch.tensor(trace.z), answers.projections[row, :, :n, 1])
        assert len(trace.customdata[0]) == n
    reach = answers.projections[:, :, 1:, 1].nan_to_num().abs().max()
    assert figure.layout.coloraxis.cmax == -figure.layout.coloraxis.cmin == pytest.approx(float(reach))
    beginning = answers.projections.clone()
    beginning[:, :, 0] = 4800.0  # as in many real models
    assert (
        heat_map(dataclasses.replace(answers, projections=beginning), 1, "").layout.coloraxis == figure.layout.coloraxis
    )
    assert max(len(axis.ticktext) for axis in (figure.layout.xaxis, figure.layout.xaxis2)) <= 24
    short = dataclasses.replace(answers, tokens=(answers.tokens[0] * 4, answers.tokens[1]))
    short = dataclasses.replace(short, projections=answers.projections.repeat(1, 1, 4, 1))
    shorter, longer = sorted((heat_map(short, 1, "").layout[axis].tickvals for axis in ("xaxis", "xaxis2")), key=len)
    assert longer[: len(shorter)] == shorter, "the labels of a short answer are as far apart as those of a long one"
    for drawn, tokens in zip(answers.drawn, answers.tokens, strict=True):  # the last one may not have been read
        assert drawn - (len(tokens) - answers.n_prompt) in (0, 1)
    markup = dataclasses.replace(answers, tokens=(["<b>&"] * len(answers.tokens[0]), answers.tokens[1]))
    assert heat_map(markup, 0, "").data[0].customdata[0][0] == "&lt;b&gt;&amp;"


def test_only_the_newest_ask_of_a_page_goes_on(playground):
    page = pytest.importorskip("faststeer.ui.page", reason="gradio is not installed: pip install 'faststeer[ui]'")
    asks = page._Asks(playground)
    values = (HARMLESS, "", 8, 0.0, 0, 1.0, [4], "add", 0.0, [1], "add")
    one, other = asks.new_session(), asks.new_session()
    first, elsewhere = asks.answer(one, 0, *values), asks.answer(other, 0, *values)
    next(first), next(elsewhere)
    assert len(list(asks.answer(one, 0, *values))) > 2
    assert not list(first) and len(list(elsewhere)) > 2
    (said,) = asks.answer(one, 0, "", *values[1:])
    assert said[2] == "Write a prompt and press Enter.", "what is seen first is no error"
