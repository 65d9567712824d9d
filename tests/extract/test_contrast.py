"""Methods from contrast against scikit-learn, numpy and closed forms, on activations read one prompt at a time."""

from __future__ import annotations

import numpy as np
import pytest
import tiny_chat
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.decomposition import PCA
from sklearn.linear_model import LogisticRegression

import faststeer as fs
from faststeer.extract import linear
from faststeer.extract.activations import Activations
from faststeer.extract.contrast import (
    Contrast,
    Directions,
    ace,
    ace_plan,
    contrast,
    lat,
    of_activations,
    pca,
    probe,
)
from faststeer.extract.dim import candidates
from faststeer.hf.batching import encode

TOKENIZER = tiny_chat.bpe_tokenizer()
MODEL = tiny_chat.llama(len(TOKENIZER)).double()
POSITIVE = [
    f"{verb} {thing}" for verb in ("Steal", "Forge", "Poison") for thing in ("a cake", "it now", "the boat", "x")
]
NEGATIVE = [f"{verb} {thing}" for verb in ("Bake", "Build", "Name") for thing in ("a kite", "me", "the sea, then 12")]
POSITIONS = (-3, -1)


def chat(system, prompt):
    return [{"role": "system", "content": system}, {"role": "user", "content": prompt}]


PAIRED = [[chat(system, prompt) for prompt in NEGATIVE] for system in ("Be glad and sing.", "Be sad.")]


def by_hand(prompts, at_layer, position):
    """`[prompts, hidden]` as transformers captures it, one unpadded prompt at a time."""
    with torch.no_grad():
        states = [
            MODEL(torch.tensor([ids]), output_hidden_states=True).hidden_states[at_layer][0, position]
            for ids in encode(TOKENIZER, prompts)
        ]
    return torch.stack(states).numpy()


def close(ours, oracle, tolerance=1e-8):
    """Equal to a relative error that fp64 leaves room for, with the conditioning of small random models."""
    ours, oracle = np.asarray(ours), np.asarray(oracle)
    assert np.abs(ours - oracle).max() <= tolerance * np.abs(oracle).max()


def same_line(ours, oracle, tolerance=1e-8):
    ours = np.asarray(ours)
    close(ours * np.sign(ours @ oracle), oracle, tolerance)


@pytest.fixture(scope="module")
def unpaired():
    return contrast(MODEL, TOKENIZER, POSITIVE, NEGATIVE, positions=POSITIONS, keep=True, batch_size=5)


@pytest.fixture(scope="module")
def paired():
    return contrast(MODEL, TOKENIZER, *PAIRED, keep=True, batch_size=1, positions=POSITIONS, paired=True)


CELLS = [(place, layer) for place in range(len(POSITIONS)) for layer in (1, 2)]


def test_means_are_those_of_dim(unpaired, paired):
    plain = candidates(MODEL, TOKENIZER, POSITIVE, NEGATIVE, positions=POSITIONS)
    close(unpaired.dim().directions, plain.directions)
    close(paired.dim().directions, candidates(MODEL, TOKENIZER, *PAIRED, positions=POSITIONS).directions)


@pytest.mark.parametrize(("place", "layer"), CELLS)
def test_pca_of_pairs_is_the_centred_pca_about_each_pairs_midpoint(paired, place, layer):
    positive, negative = (by_hand(side, layer, POSITIONS[place]) for side in PAIRED)
    middle = (positive + negative) / 2
    oracle = PCA(n_components=1).fit(np.concatenate([positive - middle, negative - middle]))
    found = paired.pca()
    ours = found.directions[place, layer].numpy()
    same_line(ours, oracle.components_[0])
    assert ours @ (positive.mean(0) - negative.mean(0)) > 0
    close(found.details["explained"][place, layer], oracle.explained_variance_ratio_[0])
    # What a library's PCA of the differences would give has lost their mean.
    centred = PCA(n_components=1).fit(positive - negative).components_[0]
    assert abs(centred @ ours) < 0.9


@pytest.mark.parametrize(("place", "layer"), CELLS)
def test_pca_of_sets_is_that_of_all_pairings(unpaired, place, layer):
    positive, negative = (by_hand(side, layer, POSITIONS[place]) for side in (POSITIVE, NEGATIVE))
    differences = (positive[:, None] - negative[None]).reshape(-1, positive.shape[1])
    same_line(unpaired.pca().directions[place, layer], np.linalg.svd(differences)[2][0])


@pytest.mark.parametrize(("place", "layer"), CELLS)
def test_lat_is_the_pca_of_the_union(unpaired, place, layer):
    both = np.concatenate([by_hand(side, layer, POSITIONS[place]) for side in (POSITIVE, NEGATIVE)])
    oracle = PCA(n_components=1).fit(both)
    found = unpaired.lat()
    same_line(found.directions[place, layer], oracle.components_[0])
    close(found.details["explained"][place, layer], oracle.explained_variance_ratio_[0])


@pytest.mark.parametrize(("place", "layer"), CELLS)
@pytest.mark.parametrize("c", [0.1, 10.0])
def test_probe_is_the_optimum_of_logistic_regression(unpaired, place, layer, c):
    sides = [by_hand(side, layer, POSITIONS[place]) for side in (POSITIVE, NEGATIVE)]
    x, y = np.concatenate(sides), np.repeat([1, 0], [len(side) for side in sides])
    x = x - x.mean(0)
    scale = np.sqrt((x**2).sum(1).mean())
    oracle = LogisticRegression(C=c, solver="newton-cholesky", tol=1e-12, max_iter=1000).fit(x / scale, y)
    found = unpaired.probe(c)
    close(found.directions[place, layer], oracle.coef_[0] / np.linalg.norm(oracle.coef_[0]), 1e-6)
    assert found.details["accuracy"][place, layer] == oracle.score(x / scale, y)


@settings(max_examples=25)
@given(
    st.integers(2, 12), st.integers(2, 12), st.integers(2, 10), st.sampled_from([0.01, 1.0, 100.0]), st.integers(0, 99)
)
def test_logistic_regression_has_no_gradient_left(n, m, hidden, c, seed):
    draw = torch.Generator().manual_seed(seed)
    positive = torch.randn(n, hidden, generator=draw, dtype=torch.float64) + 1
    negative = 3 * torch.randn(m, hidden, generator=draw, dtype=torch.float64)
    weight, _ = linear.logistic(positive, negative, c)
    x = torch.cat([positive, negative])
    y = torch.cat([torch.ones(n), -torch.ones(m)]).double()
    x = x - x.mean(0)
    x = x / x.pow(2).sum(1).mean().sqrt()
    # `weight` is per unit of activation; back to the scaled problem, and the best intercept by bisection.
    both = torch.cat([positive, negative])
    scale = (both - both.mean(0)).pow(2).sum(1).mean().sqrt()
    w = weight * scale
    low, high = -1e4, 1e4
    for _ in range(80):
        b = (low + high) / 2
        slope = -(y * torch.sigmoid(-y * (x @ w + b))).sum()
        low, high = (b, high) if slope < 0 else (low, b)
    gradient = w - c * (x.T @ (y * torch.sigmoid(-y * (x @ w + b))))
    assert gradient.norm() <= 1e-7 * max(1.0, c) * (n + m)


# ACE


@pytest.mark.parametrize("reference", ["negative", "mean"])
def test_ace_sets_the_projection_to_its_reference(unpaired, reference):
    vector = unpaired.ace(reference).vector(-1, 2)
    inputs = [encode(TOKENIZER, [prompt])[0] for prompt in (*POSITIVE[:3], *NEGATIVE[:3])]
    means = [by_hand(side, 2, -1).mean(0) for side in (POSITIVE, NEGATIVE)]
    unit = (means[0] - means[1]) / np.linalg.norm(means[0] - means[1])
    p = unit @ (means[1] if reference == "negative" else (means[0] + means[1]) / 2)
    for coefficient in (0.0, 1.0, -0.5):
        for ids in inputs:
            with torch.no_grad():
                before = MODEL(torch.tensor([ids]), output_hidden_states=True).hidden_states[2][0].numpy()
                with fs.steer(MODEL, ace_plan(vector, coefficient)):
                    after = MODEL(torch.tensor([ids]), output_hidden_states=True).hidden_states[2][0].numpy()
            r = means[0] - means[1]
            wanted = before - np.outer(before @ unit, unit) + p * unit + coefficient * r
            close(after, wanted, 1e-6)  # directions and reference are fp32 in the vector and the tables


def test_ace_at_the_mean_leaves_no_difference_of_class_means(unpaired):
    """The condition under which no linear readout beats a constant (LEACE, theorem 3.1)."""
    found = unpaired.ace("mean")
    sides = [by_hand(side, 1, -1) for side in (POSITIVE, NEGATIVE)]
    r = found.directions[1, 1].numpy()
    unit, p = r / np.linalg.norm(r), float(found.details["reference"][1, 1])
    erased = [x - np.outer(x @ unit, unit) + p * unit for x in sides]
    assert np.abs(erased[0].mean(0) - erased[1].mean(0)).max() < 1e-12
    middle = (sides[0].mean(0) + sides[1].mean(0)) / 2
    close((erased[0].mean(0) + erased[1].mean(0)) / 2, middle, 1e-12)


def test_ace_plan_needs_reference_points(unpaired):
    with pytest.raises(ValueError, match=r"no reference points: ace_plan takes one from Contrast\.ace"):
        ace_plan(unpaired.dim().vector(-1), 0.0)
    with pytest.raises(ValueError, match="no direction with a reference point at layer 7"):
        ace_plan(unpaired.ace().vector(-1), 0.0, layer=7)
    with pytest.raises(ValueError, match="unknown reference 'origin'"):
        unpaired.ace("origin")


# Tables and one-call functions


@pytest.mark.parametrize(("method", "one"), [("pca", pca), ("lat", lat), ("probe", probe), ("ace", ace)])
def test_one_call_is_the_table_at_its_position(unpaired, method, one, tmp_path):
    vector = one(MODEL, TOKENIZER, POSITIVE, NEGATIVE, position=-3)
    table = getattr(unpaired, method)().vector(-3)
    assert vector.layers == table.layers == (1, 2)  # the embedding of a template's token is the same in all prompts
    assert (vector.method, vector.scale, vector.at) == (method, "raw" if method == "ace" else "unit", "resid_pre")
    for layer in vector.layers:
        close(vector[layer], table[layer], 1e-6)
        assert vector.scale == "raw" or abs(vector[layer].norm() - 1) < 1e-6
    assert fs.SteeringVector.from_bytes(vector.to_bytes()).provenance == dict(vector.provenance)
    assert vector.provenance["position"] == -3
    assert (vector.provenance["n_positive"], vector.provenance["n_negative"]) == (12, 9)


def test_a_table_of_a_vector_and_its_scale(unpaired):
    vector = unpaired.pca().vector(-1)
    table = Directions.of_vector(vector, 3)
    assert table.positions == (-1,)
    assert table.exists().tolist() == [[False, True, True]]
    norms = torch.tensor([[2.0, 0.0, 5.0]])
    scaled = table.scaled_like(norms)
    assert scaled.scale == "raw"
    assert scaled.vector(-1).layers == (2,)
    close(scaled.directions[0, 2], 5 * vector[2].double() / vector[2].double().norm(), 1e-12)
    with pytest.raises(ValueError, match="direction for layer 2, the model 2 layers"):
        Directions.of_vector(vector, 2)
    with pytest.raises(ValueError, match="pca found no direction at layer 0"):
        table.vector(-1, 0)
    with pytest.raises(ValueError, match="NaN or infinite"):
        Directions(torch.full((1, 1, 2), torch.nan), (-1,), "resid_pre", "pca", "unit")


def test_activations_saved_and_read_back_give_the_same(paired, tmp_path):
    kept = paired.activations
    assert isinstance(kept, Activations)
    kept.save(tmp_path / "a.safetensors")
    again = of_activations(Activations.load(tmp_path / "a.safetensors"))
    assert isinstance(again, Contrast)
    assert again.paired
    close(again.pca().directions, paired.pca().directions)
    close(again.probe().directions, paired.probe().directions)
    whole = (tmp_path / "a.safetensors").read_bytes()
    for content in (whole[:-9], whole[:20], b""):
        (tmp_path / "b.safetensors").write_bytes(content)
        with pytest.raises(ValueError, match="holds no activations"):
            Activations.load(tmp_path / "b.safetensors")
    with pytest.raises(FileNotFoundError, match="no such file"):
        Activations.load(tmp_path / "c.safetensors")


def test_what_was_not_kept_is_said(unpaired):
    plain = contrast(MODEL, TOKENIZER, POSITIVE, NEGATIVE, positions=[-1])
    for method in ("pca", "lat"):
        with pytest.raises(ValueError, match=f"{method} is made of.*not kept: call contrast"):
            getattr(plain, method)()
    with pytest.raises(ValueError, match="they were not kept: call contrast"):
        plain.probe()
    with pytest.raises(ValueError, match="c is 0"):
        unpaired.probe(0.0)
    with pytest.raises(ValueError, match="12 positive and 9 negative"):
        contrast(MODEL, TOKENIZER, POSITIVE, NEGATIVE, paired=True)
