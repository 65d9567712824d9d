"""Attribution: completeness, the gradient where the path is a point, and the vector as a direction of steepest rise."""

from __future__ import annotations

import models
import pytest
import tiny_chat
import torch

from faststeer import Add, Plan, steer
from faststeer.evaluate import refusal_score
from faststeer.extract import Candidates, candidates
from faststeer.extract.attribution import attribution, logit_difference
from faststeer.hf import read
from faststeer.hf.batching import encode
from faststeer.hf.last_tokens import last_tokens

TOKENIZER = tiny_chat.bpe_tokenizer()
MODEL = tiny_chat.llama(len(TOKENIZER)).double()
POSITIVE, NEGATIVE = tiny_chat.HARMFUL, tiny_chat.HARMLESS[:4]
METRIC = logit_difference([10, 20, 30], [40, 50])
MEANS = candidates(MODEL, TOKENIZER, POSITIVE, NEGATIVE, positions=[-3, -1])


@pytest.mark.parametrize("at", ["resid_pre", "attn_out", "resid_mid", "mlp_out", "resid_post"])
def test_completeness(at):
    """What the coordinates account for is what the metric changes by: at an error that falls with the steps."""
    means = candidates(MODEL, TOKENIZER, POSITIVE, NEGATIVE, positions=[-3, -1], at=at)
    errors = []
    for steps in (2, 6, 18):
        found = attribution(MODEL, TOKENIZER, POSITIVE[:3], METRIC, means, steps=steps)
        errors.append(float(found.completeness_error.abs().max()))
        assert found.change.abs().max() > 0.1
    assert errors[2] < 1e-6
    assert errors[2] < errors[1] < errors[0]


def test_the_change_is_that_of_patching_by_hand():
    found = attribution(MODEL, TOKENIZER, POSITIVE, METRIC, MEANS, layers=[2], batch_size=7)
    by_hand = 0.0
    for ids in encode(TOKENIZER, POSITIVE):
        for sign, patched in ((1, False), (-1, True)):

            def patch(module, args, patched=patched):
                x = args[0].clone()
                if patched:
                    x[0, [-3, -1]] = MEANS.negative_mean[:, 2]
                return (x, *args[1:])

            handle = MODEL.model.layers[2].register_forward_pre_hook(patch)
            with torch.no_grad():
                by_hand += sign * METRIC(MODEL(torch.tensor([ids])).logits[:, -1]).item() / len(POSITIVE)
            handle.remove()
    assert abs(found.change[2].item() - by_hand) < 1e-9
    assert found.change[:2].abs().max() == 0  # layers not asked for


def test_neither_batches_nor_order_matter():
    one = attribution(MODEL, TOKENIZER, POSITIVE, METRIC, MEANS, batch_size=1)
    other = attribution(MODEL, TOKENIZER, POSITIVE[::-1], METRIC, MEANS, batch_size=64)
    for a, b in ((one.gradients.directions, other.gradients.directions), (one.contributions, other.contributions)):
        assert (a - b).abs().max() <= 1e-9 * a.abs().max()


def test_where_the_path_is_a_point_the_vector_is_the_gradient_of_steering():
    """d metric / d epsilon of adding epsilon v at one token is the gradient there times v."""
    ids = encode(TOKENIZER, POSITIVE[:1])
    with read(MODEL, at="resid_pre", tokens=[-3, -1]) as taken, torch.no_grad():
        MODEL(torch.tensor(ids))
    own = torch.stack([taken[layer][0] for layer in range(3)], dim=1)
    here = Candidates(own, own, (-3, -1), "resid_pre", 2, 2)
    found = attribution(MODEL, TOKENIZER, POSITIVE[:1], METRIC, here, steps=1, layers=[1])
    assert found.change[1] == 0
    for place, position in enumerate(here.positions):
        v = torch.randn(own.shape[-1], dtype=torch.float64, generator=torch.Generator().manual_seed(place))
        values = {}
        # The tables hold fp32: a step that it can hold, central so that its error is of second order.
        plans = [Plan([Add(v, c, layers=1, at="resid_pre", positions=position)]) for c in (2**-7, -(2**-7))]
        for rows, logits, _ in last_tokens(MODEL, ids, [(0, plan) for plan in plans]):
            values |= zip(rows, METRIC(logits).tolist(), strict=True)
        slope = (values[0] - values[1]) * 2**6
        exact = (found.gradients.directions[place, 1] @ v).item()
        assert abs(slope - exact) < 1e-2 * abs(exact)


def test_works_by_way_of_gpt2_and_leaves_the_model_as_it_was():
    model = models.build("gpt2").double()
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    draw = torch.randn(2, 1, 2, models.HIDDEN, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    means = Candidates(draw[0], draw[1], (-1,), "resid_pre", 2, 2)

    class Bare:
        chat_template = pad_token_id = eos_token_id = bos_token_id = None

        def __call__(self, texts, **options):
            return {"input_ids": [[5 + ord(c) % 60 for c in text] for text in texts]}

        def decode(self, ids):
            raise NotImplementedError("prompts alone are encoded")

    before = [p.clone() for p in model.parameters()]
    found = attribution(model, Bare(), ["abcd", "efg"], lambda logits: refusal_score(logits, [3, 4]), means, steps=100)
    assert found.completeness_error.abs().max() < 1e-5
    assert all(torch.equal(a, b) and b.grad is None for a, b in zip(before, model.parameters(), strict=True))
    with steer(model, Plan([Add(found.gradients.vector(-1))])):
        pass
    assert not any(layer._forward_hooks or layer._forward_pre_hooks for layer in model.transformer.h)


@pytest.mark.parametrize(
    ("prompts", "metric", "options", "message"),
    [
        ([], METRIC, {}, "prompts is empty"),
        (["Hi"], METRIC, {"steps": 0}, "steps is 0"),
        (["Hi"], lambda logits: logits.mean(), {}, r"the metric gave shape \[\]"),
        (["Hi"], lambda logits: logits.detach()[:, 0], {}, "without a gradient"),
        (["Hi"], lambda logits: logits[:, 0] / 0, {}, "NaN or infinite on the path"),
    ],
)
def test_what_cannot_be_attributed(prompts, metric, options, message):
    with pytest.raises(ValueError, match=message):
        attribution(MODEL, TOKENIZER, prompts, metric, MEANS, **options)


def test_a_baseline_of_another_model_and_metrics_of_nothing():
    with pytest.raises(ValueError, match="extract it from this model"):
        attribution(tiny_chat.llama(len(TOKENIZER), layers=2).double(), TOKENIZER, POSITIVE, METRIC, MEANS)
    with pytest.raises(ValueError, match="share no token"):
        logit_difference([1], [1])
