"""Steering value vectors against their formula written out for each architecture, the split of attention that they
belong to, and the two ablations against hand-written hooks."""

from __future__ import annotations

import functools

import by_hand
import models
import pytest
import torch
from by_hand import Case

import faststeer as fs
from faststeer import observe

FP64 = torch.float64
CASE = Case(models.direction(1), 0.75)
VECTOR = fs.SteeringVector({1: CASE.vector}, at="resid_pre")


@functools.cache
def model(name):
    return by_hand.build(name, FP64)


def slack(name):
    """RMSNorm computes in fp32 in some models of fp64, so another order of sums shows in their rounding."""
    return 1e-12 if name == "gpt2" else 64 * 2**-23


def formula(model, layer: int, head: int, s):
    """svv^h(s), in the modules' own names."""
    block = by_hand.decoder_layers(model)[layer]
    norm = getattr(block, by_hand.norm_names(block)[0])
    if hasattr(block, "attn"):
        size = block.attn.head_dim
        own = slice(2 * models.HIDDEN + head * size, 2 * models.HIDDEN + (head + 1) * size)
        value = ((s - s.mean()) * norm.weight) @ block.attn.c_attn.weight[:, own]
        return value @ block.attn.c_proj.weight[head * size : (head + 1) * size]
    attention = block.self_attn
    size, group = attention.head_dim, head // attention.num_key_value_groups
    value = attention.v_proj.weight[group * size : (group + 1) * size] @ (s * by_hand.weight(norm))
    out = attention.o_proj.weight[:, head * size : (head + 1) * size] @ value
    sandwich = hasattr(block, "pre_feedforward_layernorm")
    return out * by_hand.weight(block.post_attention_layernorm) if sandwich else out


@pytest.mark.parametrize("name", by_hand.FAMILIES)
def test_formula(name):
    m = model(name)
    found = observe.svv(m, VECTOR, coefficient=-2.0)
    assert found.layers == (1, 2)  # behind the hook point
    assert found.vectors.shape == (2, 4, models.HIDDEN)
    s = -2 * CASE.vector.double()
    for layer in found.layers:
        for head in range(4):
            torch.testing.assert_close(found[layer][head], formula(m, layer, head, s), rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(found.norms, found.vectors.norm(dim=-1))


def test_layers_behind_the_vector():
    m = model("llama")
    behind = fs.SteeringVector({1: CASE.vector}, at="mlp_out")
    assert observe.svv(m, behind).layers == (2,)
    assert observe.svv(m, CASE.vector).layers == (0, 1, 2)
    assert observe.svv(m, CASE.vector, layers=[2, 0]).layers == (2, 0)


@pytest.mark.parametrize("name", by_hand.FAMILIES)
def test_attention_splits_into_base_and_steering_value_vectors(name):
    """attn_out = sum_h (base_h + sum_c A^h_tc r(h_c) svv^h(aS)) + bias."""
    m, ids = model(name), models.tokens(1, 8)
    plan = fs.Plan([fs.Add(VECTOR, CASE.coefficient)])
    with fs.steer(m, plan), fs.hf.read(m, "attn_out") as out, fs.hf.read(m, "resid_pre") as stream, torch.no_grad():
        m(input_ids=ids)
    eager = by_hand.eager_copy(m, FP64)
    with by_hand.added(eager, 1, CASE.vector, CASE.coefficient, by_hand.everywhere, 8), torch.no_grad():
        patterns = eager(input_ids=ids, output_attentions=True).attentions
    vectors = observe.svv(m, CASE.vector, coefficient=CASE.coefficient)
    parts = dict(observe.split(m, plan, {"input_ids": ids}))
    assert set(parts) == {0, 1, 2}
    assert not parts[0].steering.any()  # nothing has been added yet
    for layer, part in parts.items():
        total = (part.base + part.steering).sum(2) + part.bias
        torch.testing.assert_close(total, out[layer], rtol=slack(name), atol=slack(name))
        if layer == 0:
            continue
        block = by_hand.decoder_layers(m)[layer]
        norm = getattr(block, by_hand.norm_names(block)[0])
        h = stream[layer] - (stream[layer].mean(-1, keepdim=True) if name == "gpt2" else 0)
        scale = torch.rsqrt(h.pow(2).mean(-1) + getattr(norm, "variance_epsilon", getattr(norm, "eps", None)))
        by_svv = torch.einsum("bhtc,bc,hd->bthd", patterns[layer], scale, vectors[layer])
        if name == "gemma2":  # the output norm's scale is that of attention's whole output
            whole = stream_of_output(m, ids, plan, layer)
            by_svv = by_svv * torch.rsqrt(whole.pow(2).mean(-1) + 1e-6)[..., None, None]
        torch.testing.assert_close(part.steering, by_svv, rtol=slack(name), atol=slack(name))
        assert part.steering.abs().max() > 0.01


def stream_of_output(m, ids, plan, layer):
    """What the output norm of a layer reads."""
    seen = []
    norm = by_hand.decoder_layers(m)[layer].post_attention_layernorm
    handle = norm.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    with fs.steer(m, plan), torch.no_grad():
        m(input_ids=ids)
    handle.remove()
    return seen[0]


@pytest.mark.parametrize("name", sorted(set(models.ARCHITECTURES) - {"falcon"}))
def test_every_architecture_splits(name):
    """Fused projections, several hook points, positions, padding: in fp32."""
    m = models.model(name)
    batch = models.left_padded([models.tokens(1, n, seed=n)[0] for n in (5, 8)])
    plan = fs.Plan(
        [
            fs.Add(models.direction(1), 0.75, layers=0, at="resid_pre"),
            fs.Add(models.direction(2), 0.5, layers=0, at="mlp_out", positions="[-3:]"),
        ]
    )
    with fs.steer(m, plan), fs.hf.read(m, "attn_out") as out, torch.no_grad():
        m(**batch)
    real = batch["attention_mask"].bool()
    for layer, part in observe.split(m, plan, batch):
        total = (part.base + part.steering).sum(2) + part.bias
        torch.testing.assert_close(total[real], out[layer][real], rtol=1e-4, atol=1e-4)
        assert part.steering[real].abs().max() > 0.01


@pytest.mark.parametrize("withheld", [("svv",), ("mlp",), ("svv", "mlp")], ids="+".join)
@pytest.mark.parametrize("name", by_hand.FAMILIES)
def test_ablation_is_what_hooks_by_hand_do(name, withheld):
    m, ids = model(name), models.tokens(1, 9)
    generated = Case(CASE.vector, 0.75, 1, lambda p: p >= 0)
    for case, positions in ((CASE, "all"), (generated, "generated")):
        plan = fs.Plan([fs.Add(VECTOR, case.coefficient, positions=positions)])
        with observe.ablate(m, plan, withheld) as ablated, torch.no_grad():
            ablated.set_prompt(6)
            found = m(input_ids=ids).logits[0]
        exact = by_hand.steered_logits(m, ids[0], case, 6, withheld)
        torch.testing.assert_close(found, exact, rtol=slack(name), atol=slack(name))
        steered = by_hand.steered_logits(m, ids[0], case, 6)
        assert (found - steered).abs().max() > 1e-3


@pytest.mark.parametrize("name", by_hand.FAMILIES)
def test_in_bf16(name):
    m, ids = by_hand.build(name, torch.bfloat16), models.tokens(1, 9)
    exactly, roughly = (by_hand.eager_copy(m, dtype) for dtype in (FP64, torch.bfloat16))
    with observe.ablate(m, fs.Plan([fs.Add(VECTOR, 0.75)]), ["svv", "mlp"]), torch.no_grad():
        found = m(input_ids=ids).logits[0].double()
    exact, rough = (by_hand.steered_logits(each, ids[0], CASE, 9, ("svv", "mlp")) for each in (exactly, roughly))
    assert (found - exact).abs().max() <= 2 * (rough.double() - exact).abs().max()
    vectors, expected = observe.svv(m, VECTOR), observe.svv(exactly, VECTOR)
    assert vectors.vectors.dtype == torch.float32  # the weights are bf16, the arithmetic is not
    torch.testing.assert_close(vectors.vectors.double(), expected.vectors, rtol=1e-4, atol=1e-5)


def test_ablation_while_generating_with_a_plan_per_row():
    m = by_hand.build("llama")
    batch = models.left_padded([models.tokens(1, n, seed=n)[0] for n in (5, 9, 7)])
    cases = [CASE, None, Case(models.direction(2), -0.5, 2)]
    plans = [c and fs.Plan([fs.Add(c.vector, c.coefficient, layers=c.layer, at="resid_pre")]) for c in cases]
    settings = {"max_new_tokens": 6, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    with observe.ablate(m, plans, ["svv", "mlp"]) as ablated:
        out = m.generate(**batch, **settings)
        ablated.assign(plans[::-1])
        turned = m.generate(**{k: v.flip(0) for k, v in batch.items()}, **settings)
    assert torch.equal(turned.sequences.flip(0), out.sequences)
    exactly = by_hand.eager_copy(m, FP64)
    for row, (case, n) in enumerate(zip(cases, (5, 9, 7), strict=True)):
        ids = out.sequences[row, 9 - n :]
        exact = by_hand.steered_logits(exactly, ids, case, n, ("svv", "mlp"))[n - 1 : -1]
        assert torch.equal(ids[n:], exact.argmax(-1))
        torch.testing.assert_close(
            torch.stack([x[row] for x in out.logits]).double(), exact, rtol=1e-4, atol=64 * 2**-23 * 20
        )


def test_withholding_nothing_and_coefficient_zero_change_nothing():
    m, ids = by_hand.build("llama"), models.tokens(1, 7)
    before = m(input_ids=ids).logits
    with observe.ablate(m, fs.Plan([fs.Add(VECTOR, 0.0)]), ["svv", "mlp"]), torch.no_grad():
        torch.testing.assert_close(m(input_ids=ids).logits, before, rtol=1e-5, atol=1e-5)
    assert torch.equal(m(input_ids=ids).logits, before)


def test_top_tokens_are_read_through_the_final_norm():
    m = model("llama")

    class Words:
        def decode(self, ids):
            return f"<{ids[0]}>"

    found = observe.svv(m, VECTOR)
    tops, bottoms = (found.top_tokens(m, Words(), 3, largest=side) for side in (True, False))
    assert list(tops) == sorted(tops, key=lambda key: -float(found[key[0]][key[1]].norm()))
    for (layer, head), words in tops.items():
        logits = m.lm_head.weight @ (found[layer][head] * m.model.norm.weight)
        order = logits.argsort(descending=True)
        assert words == [f"<{i}>" for i in order[:3].tolist()]
        assert bottoms[layer, head] == [f"<{i}>" for i in order.flip(0)[:3].tolist()]


def test_bad_input_is_refused():
    m = model("llama")
    with pytest.raises(ValueError, match="SteeringVector of that layer alone"):
        observe.svv(m, fs.SteeringVector({0: CASE.vector, 1: CASE.vector}))
    with pytest.raises(ValueError, match="hidden size 5, the model 32"):
        observe.svv(m, torch.ones(5))
    with pytest.raises(ValueError, match=r"the model has layers 0\.\.2"):
        observe.svv(m, CASE.vector, layers=[3])
    with pytest.raises(ValueError, match="behind the last layer: no layer reads it"):
        observe.svv(m, fs.SteeringVector({2: CASE.vector}, at="resid_post"))
    with pytest.raises(ValueError, match="'svv', 'mlp' or both"):
        observe.ablate(m, fs.Plan([fs.Add(VECTOR)]), "ov")
    for plan in (
        fs.Ablate(VECTOR),
        fs.Add(VECTOR, keep_norm=True),
        fs.Add(VECTOR, when=fs.Gate(CASE.vector)),
    ):
        with pytest.raises(ValueError, match="Add alone"):
            observe.ablate(m, fs.Plan([plan]), "svv")
    with observe.ablate(m, fs.Plan([fs.Add(VECTOR)]), "svv") as ablated:
        expected = m(input_ids=models.tokens(1, 4)).logits
        with pytest.raises(ValueError, match="Add alone"):
            ablated.assign(fs.Plan([fs.Ablate(VECTOR)]))
        assert torch.equal(m(input_ids=models.tokens(1, 4)).logits, expected)
    with pytest.raises(KeyError, match="no steering value vectors for layer 0"):
        observe.svv(m, VECTOR)[0]


class NormedValues(torch.nn.Module):
    """Values that are no linear function of what attention reads."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return torch.nn.functional.normalize(self.inner(x), dim=-1)


def test_what_cannot_be_read_is_refused():
    m = by_hand.build("llama")
    attention = m.model.layers[1].self_attn
    attention.v_proj = NormedValues(attention.v_proj)
    with pytest.raises(ValueError, match=r"NormedValues, whose weight is no plain matrix.*layer 1.*cannot be read"):
        observe.svv(m, VECTOR)
    with pytest.raises(ValueError, match="Falcon"):
        observe.ablate(models.model("falcon"), fs.Plan([fs.Add(VECTOR)]), "svv")
