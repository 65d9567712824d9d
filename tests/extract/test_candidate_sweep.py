"""Sweeps: mixed rows against one candidate at a time, choices against brute force, COSMIC against hooks by hand."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import tiny_chat
import torch

from faststeer import SteeringVector, steer
from faststeer.evaluate import complete, kl_on, score_on
from faststeer.extract import Candidates, candidates, select
from faststeer.extract.contrast import Directions, contrast
from faststeer.extract.cosmic import select_cosmic
from faststeer.extract.sweep import cells, select_by_judge
from faststeer.hf.batching import encode, forward_arguments, pad

TOKENIZER = tiny_chat.bpe_tokenizer()
MODEL, EXACT = tiny_chat.llama(len(TOKENIZER)), tiny_chat.llama(len(TOKENIZER)).double()
HARMFUL, HARMLESS = tiny_chat.HARMFUL, tiny_chat.HARMLESS[:4]
IDS = list(range(100, 220))
FOUND = candidates(MODEL, TOKENIZER, HARMFUL, HARMLESS, positions=[-3, -1])
COEFFICIENTS = (0.5, 1.0, 2.0)
EVERYTHING = {"token_ids": IDS, "induce_above": -100.0, "kl_below": 100.0, "depth_below": 1.0}


def quiet(call, *args, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return call(*args, **options)


# Mixed rows = one at a time


def one_at_a_time(model, cell):
    """induce, bypass, ablate, kl of one candidate: its own plan, alone on the model."""
    return (
        score_on(model, TOKENIZER, cell.add, HARMLESS, token_ids=IDS).mean().item(),
        score_on(model, TOKENIZER, cell.subtract, HARMFUL, token_ids=IDS).mean().item(),
        score_on(model, TOKENIZER, cell.ablate, HARMFUL, token_ids=IDS).mean().item(),
        kl_on(model, TOKENIZER, cell.ablate, HARMLESS).mean().item(),
    )


def test_the_sweep_over_coefficients_is_what_one_at_a_time_gives():
    found = quiet(select, MODEL, TOKENIZER, FOUND, HARMFUL, HARMLESS, coefficients=(0.5, 2.0), **EVERYTHING)
    tried = cells(FOUND, (0.5, 2.0))
    table = [row for row in found.table if row.violated != ("no direction",)]
    assert [(row.layer, row.position, row.coefficient) for row in table] == [cell[:3] for cell in tried]
    assert len(table) == 8 and len(found.table) == 12
    ours = [(row.induce, row.bypass, row.ablate, row.kl) for row in table]
    plain = [one_at_a_time(MODEL, cell) for cell in tried]
    tiny_chat.assert_no_worse(ours, plain, [one_at_a_time(EXACT, cell) for cell in tried])
    best = min(range(len(plain)), key=lambda n: plain[n][1] - plain[n][0])
    assert (found.chosen.layer, found.chosen.position, found.chosen.coefficient) == tried[best][:3]
    # The vector is what was found, whatever coefficient is best.
    index = FOUND.positions.index(found.chosen.position)
    assert torch.equal(found.vector[found.chosen.layer], FOUND.directions[index, found.chosen.layer].float())


@pytest.mark.parametrize("model", [MODEL, tiny_chat.gpt2(len(TOKENIZER))], ids=["fused", "hooks"])
def test_a_row_among_other_candidates_is_bitwise_the_row_among_its_own(model):
    """The same shapes, the same kernels: a batch of all candidates, and one in which every row has this candidate."""
    found = candidates(model, TOKENIZER, HARMFUL, HARMLESS, positions=[-3, -1])
    tried = cells(found, COEFFICIENTS)
    plans = [plan for cell in tried for plan in (cell.add, cell.subtract, cell.ablate)]
    prompt = encode(TOKENIZER, HARMFUL)[1]
    batch = forward_arguments(model, pad([prompt] * len(plans), 2))
    with torch.no_grad():
        with steer(model, plans):
            mixed = model(**batch).logits[:, -1]
        for number, plan in enumerate(plans):
            with steer(model, [plan] * len(plans)):
                assert torch.equal(model(**batch).logits[number, -1], mixed[number])
    assert len({tuple(row.tolist()) for row in mixed}) > len(tried)


def length_judge(text):
    """A judge with three verdicts that small random models reach."""
    n = len(text) % 3
    return 1 if n == 0 else -1 if n == 1 else 0


def test_a_judges_choice_is_that_of_answers_generated_one_at_a_time():
    sound = lambda text: len(text) % 5 != 0  # noqa: E731
    options = {"coherent": sound, "coefficients": (0.5, 2.0), "max_new_tokens": 6}
    induce, suppress = HARMLESS[:3], HARMFUL[:2]
    found = select_by_judge(MODEL, TOKENIZER, FOUND, length_judge, induce, suppress, **options)
    tried, expected = cells(FOUND, (0.5, 2.0)), []
    for cell, row in zip(tried, found.table, strict=True):
        induced = [complete(MODEL, TOKENIZER, [p], cell.add, max_new_tokens=6)[0] for p in induce]
        suppressed = [complete(MODEL, TOKENIZER, [p], cell.subtract, max_new_tokens=6)[0] for p in suppress]
        assert row.induce.rate == np.mean([length_judge(t) == 1 for t in induced])
        assert row.suppress.rate == np.mean([length_judge(t) == -1 for t in suppressed])
        assert row.coherent.rate == np.mean([sound(t) for t in induced + suppressed])
        strict = (
            np.mean([length_judge(t) == 1 and sound(t) for t in induced]),
            np.mean([length_judge(t) == -1 and sound(t) for t in suppressed]),
        )
        assert row.both == min(strict)
        order = (-min(strict), -row.induce.rate - row.suppress.rate, cell.layer, cell.position, cell.coefficient)
        expected.append((order, cell[:3]))
    chosen = found.chosen
    assert (chosen.layer, chosen.position, chosen.coefficient) == min(expected)[1]
    assert found.vector.layers == (chosen.layer,)
    again = SteeringVector.from_bytes(found.vector.to_bytes())
    assert again.provenance["selection"]["scores"] == chosen.to_dict()


def test_a_table_of_any_method_can_be_chosen_from():
    tables = contrast(MODEL, TOKENIZER, HARMFUL, HARMLESS, positions=[-1], keep=True)
    norms = tables.dim().directions.norm(dim=-1)
    for table in (tables.pca().scaled_like(norms), tables.ace(), Directions.of_vector(FOUND.vector(-1), 3)):
        found = quiet(select, MODEL, TOKENIZER, table, HARMFUL, HARMLESS, **EVERYTHING)
        assert found.vector.method == table.method
        layer = found.chosen.layer
        assert found.chosen.induce == pytest.approx(
            score_on(MODEL, TOKENIZER, next(c.add for c in cells(table) if c.layer == layer), HARMLESS, token_ids=IDS)
            .mean()
            .item(),
            abs=1e-4,
        )


def test_ace_cells_set_the_projection_either_way():
    table = contrast(EXACT, TOKENIZER, HARMFUL, HARMLESS, positions=[-1]).ace()
    cell = next(cell for cell in cells(table, [1.0]) if cell.layer == 2)
    r, p = table.directions[0, 2], table.details["reference"][0, 2]
    unit = r / r.norm()
    ids = torch.tensor([encode(TOKENIZER, HARMFUL)[0]])
    for plan, wanted in ((cell.add, p + r.norm()), (cell.subtract, p)):
        with torch.no_grad(), steer(EXACT, plan):
            after = EXACT(ids, output_hidden_states=True).hidden_states[2][0]
        assert (after @ unit - wanted).abs().max() < 1e-4 * wanted.abs()


# COSMIC


def cosmic_by_hand(model, cell, sides, layers):
    def means(prompts, plan=None):
        total = 0.0
        for ids in encode(TOKENIZER, prompts):
            hooks = []
            if plan is cell.ablate or plan is cell.add:
                direction = FOUND.directions[FOUND.positions.index(cell.position), cell.layer].float()
                direction = direction.to(next(model.parameters()).dtype)
                unit = direction / direction.norm()
                wipe = lambda h, unit=unit: h - (h @ unit)[..., None] * unit  # noqa: E731
                add = lambda h, d=direction: h + cell.coefficient * d  # noqa: E731
                for number, block in enumerate(model.model.layers):
                    if plan is cell.add and number == cell.layer:
                        hooks.append(block.register_forward_pre_hook(lambda m, a, f=add: (f(a[0]), *a[1:])))
                    if plan is cell.ablate:
                        hooks.append(block.register_forward_pre_hook(lambda m, a, f=wipe: (f(a[0]), *a[1:])))
                        hooks.append(block.self_attn.register_forward_hook(lambda m, a, o, f=wipe: (f(o[0]), *o[1:])))
                        hooks.append(block.mlp.register_forward_hook(lambda m, a, o, f=wipe: f(o)))
            states = []
            # What leaves a layer, as the next one sees it: steering at resid_pre of the next is at the same place.
            for layer in layers:
                if layer + 1 < len(model.model.layers):
                    block = model.model.layers[layer + 1]
                    hooks.append(block.register_forward_pre_hook(lambda m, a, s=states: s.append(a[0][0, -1])))
                else:
                    block = model.model.layers[layer]
                    hooks.append(block.register_forward_hook(lambda m, a, o, s=states: s.append(o[0, -1])))
            with torch.no_grad():
                model(torch.tensor([ids]))
            for handle in hooks:
                handle.remove()
            total = total + torch.cat(states).double()
        return (total / len(prompts)).numpy()

    def cosine(a, b):
        return a @ b / np.linalg.norm(a) / np.linalg.norm(b)

    positive, negative = sides
    return cosine(means(positive, cell.ablate), means(negative)), cosine(means(negative, cell.add), means(positive))


def test_cosmic_is_what_hooks_by_hand_give():
    options = {"coefficients": (1.0, 2.0), "kl_below": 100.0, "depth_below": 1.0, "share": 0.5, "batch_size": 7}
    found = select_cosmic(MODEL, TOKENIZER, FOUND, HARMFUL, HARMLESS, **options)
    # The layers at which the unsteered sides differ most in direction.
    ends = [candidates(MODEL, TOKENIZER, HARMFUL, HARMLESS, positions=[-1], at="resid_post")]
    cosines = torch.cosine_similarity(ends[0].positive_mean[0], ends[0].negative_mean[0], dim=-1)
    assert found.layers == tuple(sorted(cosines.argsort()[:2].tolist()))
    tried = cells(FOUND, (1.0, 2.0))
    ours = [(row.suppress, row.induce) for row in found.table]
    plain, exact = ([cosmic_by_hand(m, c, (HARMFUL, HARMLESS), found.layers) for c in tried] for m in (MODEL, EXACT))
    tiny_chat.assert_no_worse(ours, plain, exact)
    scores = [sum(row) for row in ours]
    assert found.chosen.score == max(scores)
    assert [row.kl for row in found.table] == pytest.approx(
        [kl_on(MODEL, TOKENIZER, cell.ablate, HARMLESS).mean().item() for cell in tried], abs=1e-5
    )
    assert found.vector.provenance["selection"]["rule"] == "cosmic"


def test_cosmic_says_what_it_gives_up():
    with pytest.warns(UserWarning, match="given up: kl"):
        found = select_cosmic(MODEL, TOKENIZER, FOUND, HARMFUL, HARMLESS, kl_below=0.0, depth_below=1.0)
    assert found.relaxed == ("kl",)
    with pytest.raises(ValueError, match="share is 0"):
        select_cosmic(MODEL, TOKENIZER, FOUND, HARMFUL, HARMLESS, share=0)


# Bad input


def test_a_model_without_refusal_tokens_is_said_and_how_else_to_select():
    with pytest.raises(
        ValueError, match=r"selection by refusal scores cannot work here.*select_cosmic.*--select judge"
    ):
        both = [HARMFUL, HARMLESS]
        # A random model prefers neither: one of the two orders must be refused.
        for first, second in (both, both[::-1]):
            quiet(select, MODEL, TOKENIZER, FOUND, first, second)


@pytest.mark.parametrize("coefficients", [[], [0.0], [-1.0], [1.0, 1.0], [float("nan")], [float("inf")]])
def test_coefficients_that_are_none(coefficients):
    with pytest.raises(ValueError, match="expected distinct positive numbers"):
        cells(FOUND, coefficients)


def test_wrong_calls():
    with pytest.raises(ValueError, match="the model has 2 layers, the candidates 3"):
        small = tiny_chat.llama(len(TOKENIZER), layers=2)
        select_by_judge(small, TOKENIZER, FOUND, length_judge, HARMLESS, HARMFUL)
    with pytest.raises(ValueError, match="induce is empty"):
        select_by_judge(MODEL, TOKENIZER, FOUND, length_judge, [], HARMFUL)
    with pytest.raises(ValueError, match="the judge said 7 of"):
        select_by_judge(MODEL, TOKENIZER, FOUND, lambda text: 7, HARMLESS, HARMFUL, max_new_tokens=1)
    same = Candidates(FOUND.positive_mean, FOUND.positive_mean, (-3, -1), "resid_pre", 2, 2)
    with pytest.raises(ValueError, match="no candidate has a direction"):
        select_cosmic(MODEL, TOKENIZER, same, HARMFUL, HARMLESS)
