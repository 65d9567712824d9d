"""Differences in means against loops over single, unpadded prompts in fp64."""

from __future__ import annotations

import os
import sys

import numpy as np
import pytest
import tiny_chat
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from faststeer import SteeringVector
from faststeer.extract import Candidates, candidates, dim, random_like
from faststeer.hf.batching import encode
from faststeer.hf.prompts import post_instruction_positions

POSITIVE, NEGATIVE = tiny_chat.HARMFUL, tiny_chat.HARMLESS[:4]
TOKENIZER = tiny_chat.bpe_tokenizer()
MODEL = tiny_chat.llama(len(TOKENIZER))


def mean_by_hand(model, prompts, positions):
    """`[positions, layers, hidden]` as transformers captures it: one unpadded prompt at a time, fp64 sums in numpy."""
    total = 0.0
    for ids in encode(TOKENIZER, prompts):
        with torch.no_grad():
            states = model(torch.tensor([ids]), output_hidden_states=True).hidden_states[:-1]
        total = total + np.stack([np.stack([state[0, p].double().numpy() for state in states]) for p in positions])
    return total / len(prompts)


def direction_by_hand(model, positive, negative, positions):
    return mean_by_hand(model, positive, positions) - mean_by_hand(model, negative, positions)


@pytest.mark.parametrize("make", [tiny_chat.llama, tiny_chat.gpt2])
@pytest.mark.parametrize("batch_size", [1, 2, 3, 32])
def test_candidates_are_differences_in_means(make, batch_size):
    model, exact = make(len(TOKENIZER)), make(len(TOKENIZER)).double()
    positions = [-5, -1, -3]
    found = candidates(model, TOKENIZER, POSITIVE, NEGATIVE, positions=positions, batch_size=batch_size)
    assert found.positions == (-5, -1, -3)
    assert (found.n_positive, found.n_negative, found.at) == (5, 4, "resid_pre")
    oracle = direction_by_hand(exact, POSITIVE, NEGATIVE, positions)
    tiny_chat.assert_no_worse(found.directions, direction_by_hand(model, POSITIVE, NEGATIVE, positions), oracle)
    tiny_chat.assert_no_worse(
        found.positive_mean, mean_by_hand(model, POSITIVE, positions), mean_by_hand(exact, POSITIVE, positions)
    )


def test_default_positions_are_those_after_the_instruction():
    assert candidates(MODEL, TOKENIZER, POSITIVE, NEGATIVE).positions == (-7, -6, -5, -4, -3, -2, -1)


@settings(max_examples=10)
@given(st.permutations(range(5)), st.integers(1, 6))
def test_neither_order_nor_batch_size_matters(order, batch_size):
    exact = tiny_chat.llama(len(TOKENIZER)).double()
    shuffled = [POSITIVE[i] for i in order]
    found = candidates(exact, TOKENIZER, shuffled, NEGATIVE, positions=[-1], batch_size=batch_size)
    once = candidates(exact, TOKENIZER, POSITIVE, NEGATIVE, positions=[-1])
    # fp64 rounds 2^29 times finer than fp32: what padding changes must shrink with it.
    by_hand = direction_by_hand(MODEL, POSITIVE, NEGATIVE, [-1])
    error = np.abs(by_hand - direction_by_hand(exact, POSITIVE, NEGATIVE, [-1])).max()
    assert (found.directions - once.directions).abs().max() <= 4 * error * 2.0**-29


def test_dim_is_the_candidate_of_its_position():
    vector = dim(MODEL, TOKENIZER, POSITIVE, NEGATIVE, position=-2)
    found = candidates(MODEL, TOKENIZER, POSITIVE, NEGATIVE, positions=[-2])
    assert isinstance(vector, SteeringVector)
    assert (vector.at, vector.method, vector.scale) == ("resid_pre", "dim", "raw")
    for layer in vector.layers:
        assert torch.equal(vector[layer], found.directions[0, layer].float())
    assert vector.provenance["position"] == -2
    assert (vector.provenance["n_positive"], vector.provenance["n_negative"]) == (5, 4)


def test_a_layer_without_direction_is_left_out_and_named():
    # resid_pre of layer 0 at a token of the template is the same embedding in every prompt.
    for model in (MODEL, tiny_chat.llama(len(TOKENIZER)).double(), tiny_chat.llama(len(TOKENIZER)).bfloat16()):
        vector = dim(model, TOKENIZER, POSITIVE, NEGATIVE)
        assert vector.layers == (1, 2)
        assert vector.provenance["layers_without_direction"] == [0]
    # With absolute positions, prompts of different lengths have different embeddings there.
    assert dim(tiny_chat.gpt2(len(TOKENIZER)), TOKENIZER, POSITIVE, NEGATIVE).layers == (0, 1)


@pytest.mark.parametrize(("at", "shift"), [("resid_pre", 0), ("resid_post", 1)])
def test_hook_points_of_the_residual_stream(at, shift):
    vector = dim(MODEL, TOKENIZER, POSITIVE, NEGATIVE, at=at)
    assert vector.at == at
    oracle = direction_by_hand(tiny_chat.llama(len(TOKENIZER)).double(), POSITIVE, NEGATIVE, [-1])
    plain = direction_by_hand(MODEL, POSITIVE, NEGATIVE, [-1])
    layers = [layer for layer in vector.layers if 0 < layer + shift < 3]
    assert layers
    ours = torch.stack([vector[layer] for layer in layers])
    states = [layer + shift for layer in layers]
    tiny_chat.assert_no_worse(ours, plain[0, states], oracle[0, states])


def test_attention_output_is_what_attention_adds():
    def by_hand(model):
        means = []
        for prompts in (POSITIVE, NEGATIVE):
            seen = []
            attention = model.model.layers[1].self_attn
            handle = attention.register_forward_hook(lambda m, a, out, seen=seen: seen.append(out[0][0, -1].double()))
            mean_by_hand(model, prompts, [-1])
            handle.remove()
            means.append(torch.stack(seen).mean(0))
        return means[0] - means[1]

    vector = dim(MODEL, TOKENIZER, POSITIVE, NEGATIVE, at="attn_out")
    assert vector.at == "attn_out"
    tiny_chat.assert_no_worse(vector[1], by_hand(MODEL), by_hand(tiny_chat.llama(len(TOKENIZER)).double()))


def chats(prompts, system="Be kind."):
    return [[{"role": "system", "content": system}, {"role": "user", "content": prompt}] for prompt in prompts]


def test_chat_prompts_and_system_prompt():
    one = candidates(MODEL, TOKENIZER, chats(POSITIVE), chats(NEGATIVE, "Be rude."), positions=[-1])
    both = candidates(MODEL, TOKENIZER, POSITIVE, NEGATIVE, positions=[-1], system="Be kind.")
    assert torch.equal(one.positive_mean, both.positive_mean)
    assert not torch.equal(one.negative_mean, both.negative_mean)


# Bad input


class NoForward:
    """A model that must not be run."""

    training = False
    config = None

    def forward(self, *args, **kwargs):
        raise AssertionError("a forward pass was made")

    __call__ = forward


@pytest.mark.parametrize(
    ("positive", "negative", "options", "message"),
    [
        ([], NEGATIVE, {}, "positive is empty"),
        (POSITIVE, [], {}, "negative is empty"),
        ("text", NEGATIVE, {}, "positive is one str"),
        (POSITIVE, ["ok", 3], {}, r"negative\[1\] is of type int"),
        (POSITIVE, NEGATIVE, {"at": "resid"}, "unknown hook point 'resid'"),
        (POSITIVE, NEGATIVE, {"positions": [0]}, "distinct negative integers"),
        (POSITIVE, NEGATIVE, {"positions": [-1, -1]}, "distinct negative integers"),
        (POSITIVE, NEGATIVE, {"positions": []}, "distinct negative integers"),
        (POSITIVE, NEGATIVE, {"positions": [-1000]}, r"positive\[0\] has \d+ token\(s\) and so none at position -1000"),
        (POSITIVE, NEGATIVE, {"batch_size": 0}, "batch_size is 0"),
        (POSITIVE[:1], NEGATIVE, {}, "positive has 1 prompt: a contrast needs at least two a side"),
        (POSITIVE, NEGATIVE[:1], {}, "negative has 1 prompt"),
        (POSITIVE, NEGATIVE[:1] * 3, {}, "negative has the same prompt 3 times: a contrast needs at least two"),
        (POSITIVE, POSITIVE, {}, r"5 prompt\(s\) are on both sides, the first being positive\[0\] = negative\[0\]"),
        (POSITIVE, [*NEGATIVE, POSITIVE[3]], {}, r"positive\[3\] = negative\[4\]"),
        (chats(POSITIVE), NEGATIVE, {}, r"positive\[0\] is a chat of system, user, and no negative is one"),
        (POSITIVE, [*NEGATIVE, *chats(["Hi"])], {}, r"negative\[4\] is a chat of system, user"),
        (
            POSITIVE,
            ["ok", "<|im_start|>user\nHi<|im_end|>"],
            {},
            r"negative\[1\] holds '<\|im_.*', which the model's chat format is made of",
        ),
    ],
)
def test_bad_input_is_refused_before_any_forward_pass(positive, negative, options, message):
    with pytest.raises(ValueError, match=message):
        candidates(NoForward(), TOKENIZER, positive, negative, **options)


def test_sets_that_the_model_cannot_tell_apart_have_no_direction(monkeypatch):
    same = list(range(3, 3 + len(post_instruction_positions(TOKENIZER))))  # every prompt's tokens
    module = sys.modules["faststeer.extract.dim"]
    monkeypatch.setattr(module, "encode", lambda tokenizer, prompts, *args, **options: [same] * len(prompts))
    with pytest.raises(ValueError, match="same mean at any layer"):
        dim(MODEL, TOKENIZER, POSITIVE, NEGATIVE, batch_size=1)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_an_activation_that_is_not_finite_is_named(value):
    model = tiny_chat.llama(len(TOKENIZER))
    only = encode(TOKENIZER, ["Steal a bicycle"])[0]
    rare = next(t for t in only if not any(t in ids for ids in encode(TOKENIZER, POSITIVE[1:])))

    def spoil(module, args, output):
        return torch.where((args[0] == rare)[..., None], value, output)

    model.model.embed_tokens.register_forward_hook(spoil)
    where = only.index(rare) - len(only)
    with pytest.raises(ValueError, match=r"positive\[3\] has a NaN or infinite activation at resid_pre of layer 0"):
        dim(model, TOKENIZER, [*POSITIVE[1:4], "Steal a bicycle", POSITIVE[4]], NEGATIVE, position=where, batch_size=2)


# What is kept


def some_candidates(**changes):
    draw = torch.randn(2, 2, 3, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    fields = {"positive_mean": draw[0], "negative_mean": draw[1], "positions": (-2, -1), "at": "resid_pre"}
    return Candidates(**fields | {"n_positive": 3, "n_negative": 4, "model": "tiny"} | changes)


def test_saved_and_loaded(tmp_path):
    before = some_candidates()
    assert before.save(tmp_path / "deep" / "a.safetensors") == tmp_path / "deep" / "a.safetensors"
    after = Candidates.load(tmp_path / "deep" / "a.safetensors")
    assert torch.equal(after.positive_mean, before.positive_mean)
    assert torch.equal(after.negative_mean, before.negative_mean)
    for name in ("positions", "at", "n_positive", "n_negative", "model"):
        assert getattr(after, name) == getattr(before, name)
    some_candidates(model=None).save(tmp_path / "b.safetensors")
    assert Candidates.load(tmp_path / "b.safetensors").model is None


def test_a_failed_save_leaves_the_old_file(tmp_path, monkeypatch):
    path = some_candidates().save(tmp_path / "a.safetensors")
    before = path.read_bytes()

    def fail(*args):
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        some_candidates(n_positive=9).save(path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_files_that_hold_no_candidates(tmp_path):
    path = some_candidates().save(tmp_path / "a.safetensors")
    whole = path.read_bytes()
    for content in (whole[: len(whole) // 2], whole[:4], b"", b"\xff" * 100):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="holds no candidates"):
            Candidates.load(path)
    SteeringVector({0: torch.ones(4)}).save(path)
    with pytest.raises(ValueError, match=r"expected 'faststeer\.candidates/1'"):
        Candidates.load(path)
    metadata = {"format": "faststeer.candidates/1", "positions": "[-1]", "at": "resid_pre", "n_positive": "1"}
    mean = torch.zeros(1, 2, 3, dtype=torch.float64)
    save_file({"positive_mean": mean, "negative_mean": mean.clone()}, path, metadata)
    with pytest.raises(ValueError, match="n_negative"):
        Candidates.load(path)
    save_file({"positive_mean": mean}, path, metadata | {"n_negative": "1"})
    with pytest.raises(ValueError, match="expected positive_mean, negative_mean"):
        Candidates.load(path)
    with pytest.raises(FileNotFoundError, match="no such file"):
        Candidates.load(tmp_path / "none.safetensors")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"positions": (-1,)}, r"for 1 position\(s\)"),
        ({"positive_mean": torch.zeros(2, 3, 8)}, "expected torch.float64"),
        ({"negative_mean": torch.zeros(2, 3, 7, dtype=torch.float64)}, "expected .positions, layers, hidden. twice"),
        ({"positive_mean": torch.full((2, 3, 8), torch.nan, dtype=torch.float64)}, "NaN or infinite"),
        ({"at": "here"}, "unknown hook point"),
        ({"n_negative": 0}, "at least one of each"),
        ({"positions": (-1, 1)}, "negative integers"),
    ],
)
def test_candidates_that_are_none(changes, message):
    with pytest.raises(ValueError, match=message):
        some_candidates(**changes)


def test_a_direction_is_more_than_the_rounding_of_its_means():
    """The mean of n equal numbers is off by at most n eps of them; a difference of that size points nowhere."""
    equal = torch.full((1, 1, 8), 0.1, dtype=torch.float64)
    summed = sum(equal for _ in range(10)) / 10, sum(equal for _ in range(3)) / 3
    assert not torch.equal(*summed), "these sums round to the same"
    counts = {"positions": (-1,), "n_positive": 10, "n_negative": 3}
    assert not some_candidates(positive_mean=summed[0], negative_mean=summed[1], **counts).exists().any()
    with pytest.raises(ValueError, match="same mean at any layer"):
        some_candidates(positive_mean=summed[0], negative_mean=summed[1], **counts).vector(-1)
    assert some_candidates(positive_mean=summed[0], negative_mean=equal * (1 + 2**-40), **counts).exists().all()


def test_one_vector_of_many():
    found = some_candidates()
    one = found.vector(-1, 2)
    assert one.layers == (2,)
    assert torch.equal(one[2], (found.positive_mean - found.negative_mean)[1, 2].float())
    assert (one.model, one.provenance["position"]) == ("tiny", -1)
    with pytest.raises(ValueError, match="no candidates at position -3: there are -2, -1"):
        found.vector(-3)
    with pytest.raises(ValueError, match=r"layers 0\.\.2"):
        found.vector(-1, 3)


# The control


@given(st.integers(0, 2**32), st.integers(2, 64))
def test_random_control_has_the_norm_and_nothing_else(seed, hidden):
    vector = SteeringVector({3: torch.linspace(1, 2, hidden), 5: torch.full((hidden,), 1e-3)}, at="attn_out", model="m")
    control = random_like(vector, seed)
    assert (control.layers, control.at, control.model, control.method) == ((3, 5), "attn_out", "m", "random")
    for layer in vector.layers:
        # The entries are rounded to fp32, each by at most 2^-24 of itself; the oracle is numpy's norm in fp64.
        length = np.linalg.norm(vector[layer].double().numpy())
        assert abs(np.linalg.norm(control[layer].double().numpy()) - length) <= 2**-23 * length
    again = random_like(SteeringVector({5: vector[5]}, at="attn_out"), seed)
    assert torch.equal(again[5], control[5])
    assert not torch.equal(random_like(vector, seed + 1)[5], control[5])


def test_random_controls_point_everywhere():
    """Cosines of independent directions on the sphere have mean 0 and variance 1 / hidden."""
    hidden, count = 64, 400
    vector = SteeringVector({0: torch.ones(hidden), 1: torch.ones(hidden)})
    controls = [random_like(vector, seed) for seed in range(count)]
    unit = torch.ones(hidden) / 8
    for cosines in (
        torch.stack([c[0] @ unit / 8 for c in controls]).double(),
        torch.stack([c[0] @ c[1] / 64 for c in controls]).double(),
    ):
        # Five standard errors of the mean, and of the variance of nearly normal numbers.
        assert abs(cosines.mean()) <= 5 * (1 / hidden / count) ** 0.5
        assert abs(cosines.var() * hidden - 1) <= 5 * (2 / count) ** 0.5
