"""Algebra of vectors against its definitions, written out here in numpy fp64; the sparse form against the dense one."""

from __future__ import annotations

import math

import hypothesis
import numpy as np
import pytest
import torch
from damage import unchecked
from hypothesis import strategies as st
from models import build, tokens
from strategies import randn, seeds

import faststeer as fs
from faststeer import algebra
from faststeer.algebra import combine, cosines, interpolate, normalise, orthogonalise, random_like, sparsify
from faststeer.sparse import SparseVector
from faststeer.vector import words_of

HIDDEN, LAYERS = 16, (1, 3)
few = hypothesis.settings(parent=hypothesis.settings(), max_examples=25)
EPS = 2.0**-23  # vectors are kept in fp32


def vector(seed: int = 0, **changes) -> fs.SteeringVector:
    words = {"at": "resid_pre", "model": "m", "method": "dim"} | changes
    return fs.SteeringVector({n: randn(seed + n, HIDDEN) for n in LAYERS}, **words)


def numbers(v: fs.SteeringVector, layer: int) -> np.ndarray:
    return v[layer].double().numpy()


class TestLengthsAndSums:
    @few
    @hypothesis.given(seed=seeds, norm=st.floats(1e-3, 1e3))
    def test_normalise(self, seed, norm):
        v, n = vector(seed), normalise(vector(seed), norm)
        for layer in LAYERS:
            expected = norm * numbers(v, layer) / np.linalg.norm(numbers(v, layer))
            np.testing.assert_allclose(numbers(n, layer), expected, rtol=EPS)
        assert n.scale == ("unit" if norm == 1 else "raw") and normalise(v).scale == "unit"
        assert (n.at, n.model, n.method, n.layers) == ("resid_pre", "m", "dim", LAYERS)
        assert n.provenance["algebra"] == [{"normalise": norm}]

    @few
    @hypothesis.given(seed=seeds, k=st.integers(1, 4), several=st.booleans())
    def test_orthogonalise(self, seed, k, several):
        v, span = vector(seed), [vector(seed + 100 * (i + 1)) for i in range(k)]
        tensor = randn(seed + 7, k, HIDDEN)
        result = orthogonalise(v, span if several else tensor)
        for layer in LAYERS:
            rows = np.stack([numbers(s, layer) for s in span]) if several else tensor.double().numpy()
            x = numbers(v, layer)
            expected = x - np.linalg.pinv(rows) @ (rows @ x)
            np.testing.assert_allclose(numbers(result, layer), expected, atol=4 * EPS * np.linalg.norm(x))

    @few
    @hypothesis.given(seed=seeds, c=st.lists(st.floats(-5, 5), min_size=1, max_size=4))
    def test_combine(self, seed, c):
        hypothesis.assume(any(abs(x) > 0.01 for x in c))
        vectors = [vector(seed + 10 * i) for i in range(len(c))]
        result = combine(vectors, c)
        for layer in LAYERS:
            terms = np.stack([x * numbers(v, layer) for x, v in zip(c, vectors, strict=True)])
            np.testing.assert_allclose(numbers(result, layer), terms.sum(0), atol=EPS * np.abs(terms).sum(0).max())

    @few
    @hypothesis.given(seed=seeds, t=st.floats(0, 1))
    def test_interpolate(self, seed, t):
        a, b = vector(seed), vector(seed + 50)
        line, arc = interpolate(a, b, t), interpolate(a, b, t, "arc")
        for layer in LAYERS:
            x, y, z = numbers(a, layer), numbers(b, layer), numbers(arc, layer)
            size = np.linalg.norm(x) + np.linalg.norm(y)
            np.testing.assert_allclose(numbers(line, layer), (1 - t) * x + t * y, atol=EPS * size)
            length = (1 - t) * np.linalg.norm(x) + t * np.linalg.norm(y)
            assert np.linalg.norm(z) == pytest.approx(length, rel=4 * EPS)
            # The angle from a grows with t, and z lies in the plane of both.
            whole = math.acos(x @ y / np.linalg.norm(x) / np.linalg.norm(y))
            cosine = x @ z / np.linalg.norm(x) / np.linalg.norm(z)
            assert cosine == pytest.approx(math.cos(t * whole), abs=8 * EPS)
            plane = np.linalg.qr(np.stack([x, y]).T)[0]
            assert np.linalg.norm(z - plane @ (plane.T @ z)) <= 8 * EPS * size

    def test_the_ends_and_parallel_directions(self):
        a, b = vector(0), vector(50)
        for path in ("line", "arc"):
            for t, end in ((0.0, a), (1.0, b)):
                torch.testing.assert_close(interpolate(a, b, t, path)[1], end[1])
        torch.testing.assert_close(interpolate(a, combine([a], [2]), 0.5, "arc")[1], 1.5 * a[1])
        with pytest.raises(ValueError, match="opposite"):
            interpolate(a, combine([a], [-1]), 0.5, "arc")

    @pytest.mark.parametrize(
        ("make", "message"),
        [
            (lambda: normalise(vector(), 0), "norm=0.0: expected a positive"),
            (lambda: normalise(vector(), "1"), "norm is '1': expected a finite number"),
            (lambda: random_like(vector(), 1.5), "seed=1.5: expected a whole number"),
            (lambda: interpolate(vector(), vector(1), math.nan, "arc"), "t is nan: expected a finite number"),
            (lambda: orthogonalise(vector(), torch.tensor(1.0)), r"`against` has shape \[\]"),
            (lambda: orthogonalise(vector(), torch.full((HIDDEN,), math.nan)), "`against` has .* NaN"),
            (lambda: cosines([vector()]), "in a list: expected {name: vector}"),
            (lambda: cosines({"a": randn(0, HIDDEN)}), "a Tensor among the vectors"),
            (lambda: cosines({"a": vector()}).at(99), "layer 99 is not compared: all vectors have the layers"),
            (lambda: combine([vector()], []), "1 vectors and 0 coefficients"),
            (lambda: combine([vector(), vector()], [1, -1]), "is zero"),
            (lambda: combine([vector()], [math.nan]), "finite"),
            (lambda: combine([vector(), vector(at="mlp_out")], [1, 1]), "different hook points: mlp_out, resid_pre"),
            (lambda: combine([vector(), vector(model="n")], [1, 1]), "different models: m, n"),
            (
                lambda: combine([vector(), fs.SteeringVector({1: randn(1, HIDDEN)}, at="resid_pre")], [1, 1]),
                "different layers",
            ),
            (lambda: orthogonalise(vector(), vector()), "nothing is left"),
            (lambda: orthogonalise(vector(), randn(0, 3)), "hidden size 3"),
            (lambda: orthogonalise(vector(), []), "against nothing"),
            (lambda: orthogonalise(vector(), torch.ones(2, HIDDEN)), "linearly dependent"),
            (lambda: interpolate(vector(), vector(1), 0.5, "curve"), "unknown path"),
            (lambda: cosines({}), "no vectors"),
            (
                lambda: cosines({"a": vector(), "b": fs.SteeringVector({2: randn(1, HIDDEN)}, at="resid_pre")}),
                "no layer in common",
            ),
        ],
        ids=(  # noqa: SIM905
            "norm text seed t scalar nan_span list tensor layer count zero nan hook model layers itself size none "
            "dependent path empty common"
        ).split(),
    )
    def test_refused(self, make, message):
        with pytest.raises((TypeError, ValueError), match=message):
            make()

    @pytest.mark.parametrize("number", [np.float32(2), np.int64(2), torch.tensor(2.0)], ids=lambda n: type(n).__name__)
    def test_numbers_of_other_libraries_can_be_saved(self, number):
        a, b = vector(0), vector(50)
        for made, same in (
            (normalise(a, number), normalise(a, 2)),
            (combine(iter([a, b]), [number, 1]), combine([a, b], [2, 1])),
            (interpolate(a, b, number), interpolate(a, b, 2)),
        ):
            assert made.to_bytes() == same.to_bytes()
        assert random_like(a, np.int64(3)).to_bytes() == random_like(a, 3).to_bytes()


def test_cosines():
    named = {"a": vector(0), "b": vector(9), "c": combine([vector(0)], [-2])}
    table = cosines(named)
    assert (table.names, table.layers) == (("a", "b", "c"), LAYERS)
    for i, layer in enumerate(LAYERS):
        rows = np.stack([numbers(v, layer) for v in named.values()])
        rows /= np.linalg.norm(rows, axis=1, keepdims=True)
        np.testing.assert_allclose(table.values[i].numpy(), rows @ rows.T, atol=EPS)
    assert table.at(3)["a"]["c"] == pytest.approx(-1, abs=EPS) and table.to_dict()[1]["b"]["b"] == pytest.approx(1)


class TestSparsify:
    def expected(self, by: str, s: np.ndarray, e: np.ndarray) -> np.ndarray:
        """A coordinate's score, from the paper's formula and its code's."""
        return {
            "magnitude": np.abs(s),
            "effect": np.abs(e),
            "paper": e / s,
            "code": (np.abs(e) / np.linalg.norm(e)) / (np.abs(s) / np.linalg.norm(s)),
        }[by]

    @pytest.mark.parametrize("by", ["magnitude", "effect", "paper", "code"])
    @few
    @hypothesis.given(seed=seeds, keep=st.floats(0.01, 1), rescale=st.booleans())
    def test_keeps_the_best_coordinates(self, by, seed, keep, rescale):
        v = vector(seed)
        effect = None if by == "magnitude" else {n: randn(seed + 31 * n, HIDDEN) for n in LAYERS}
        sparse = sparsify(v, by, keep=keep, effect=effect, rescale=rescale)
        for layer in LAYERS:
            s = numbers(v, layer)
            score = self.expected(by, s, s if effect is None else effect[layer].double().numpy())
            kept = np.argsort(-score)[: math.ceil(keep * HIDDEN)]
            dense = np.zeros(HIDDEN)
            dense[kept] = s[kept]
            if rescale:
                dense *= np.linalg.norm(s) / np.linalg.norm(dense)
            np.testing.assert_allclose(numbers(sparse.dense(), layer), dense, rtol=2 * EPS)
            assert sparse.density[layer] == math.ceil(keep * HIDDEN) / HIDDEN

    @pytest.mark.parametrize("by", ["magnitude", "effect", "paper", "code"])
    def test_threshold(self, by):
        v = vector(3)
        effect = None if by == "magnitude" else {n: randn(31 * n, HIDDEN) for n in LAYERS}
        sparse = sparsify(v, by, threshold=0.5, effect=effect)
        for layer in LAYERS:
            s = numbers(v, layer)
            score = self.expected(by, s, s if effect is None else effect[layer].double().numpy())
            assert sparse.indices[layer].tolist() == np.flatnonzero(score >= 0.5).tolist()

    def test_the_two_rules_differ_by_sign(self):
        """The paper's ratio keeps its sign; its code takes magnitudes."""
        v = fs.SteeringVector({0: [1.0, 1.0, 1.0, 1.0]})
        effect = torch.tensor([3.0, -4.0, 1.0, 0.5])
        assert sparsify(v, "paper", keep=0.25, effect=effect).indices[0].tolist() == [0]
        assert sparsify(v, "code", keep=0.25, effect=effect).indices[0].tolist() == [1]

    def test_random_is_a_control_of_the_same_size(self):
        v = vector()
        a, b, c = (sparsify(v, "random", keep=0.25, seed=seed) for seed in (0, 0, 1))
        assert all(torch.equal(a.indices[n], b.indices[n]) for n in LAYERS)
        assert any(not torch.equal(a.indices[n], c.indices[n]) for n in LAYERS)
        assert all(len(a.indices[n]) == 4 for n in LAYERS)

    def test_zeros_are_never_kept(self):
        v = fs.SteeringVector({0: [0.0, 2.0, 0.0, 1.0]})
        assert sparsify(v, keep=1.0).indices[0].tolist() == [1, 3]
        effect = torch.tensor([9.0, 1.0, 9.0, 1.0])
        assert sparsify(v, "code", keep=1.0, effect=effect).indices[0].tolist() == [1, 3]

    @pytest.mark.parametrize(
        ("how", "message"),
        [
            ({}, "one of them"),
            ({"keep": 0.5, "threshold": 1}, "one of them"),
            ({"keep": 0}, "keep=0"),
            ({"keep": 1.5}, "keep=1.5"),
            ({"by": "best", "keep": 0.5}, "unknown rule by='best'"),
            ({"by": "paper", "keep": 0.5}, "needs effect="),
            ({"keep": 0.5, "effect": torch.ones(HIDDEN)}, "uses no effect"),
            ({"by": "random", "threshold": 1}, r"random has keep="),
            ({"threshold": 1e9}, "no coordinate scores"),
            ({"by": "code", "keep": 0.5, "effect": torch.ones(HIDDEN)}, "one effect for 2 layers"),
            ({"by": "code", "keep": 0.5, "effect": {1: torch.ones(HIDDEN)}}, "nothing of layer 3"),
            ({"by": "code", "keep": 0.5, "effect": {n: torch.ones(3) for n in LAYERS}}, "3 coordinates"),
        ],
        ids=str,
    )
    def test_refused(self, how, message):
        with pytest.raises(ValueError, match=message):
            sparsify(vector(), **how)


class TestSparseVector:
    @few
    @hypothesis.given(
        seed=seeds,
        rows=st.integers(1, 5),
        dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
        per_row=st.booleans(),
    )
    def test_add_equals_the_dense_sum(self, seed, rows, dtype, per_row):
        """In fp32, rounded once; untouched columns and rows with coefficient 0 keep their bits."""
        sparse = sparsify(vector(seed), keep=0.3)
        x = randn(seed + 1, 2, rows, HIDDEN).to(dtype)
        coefficient = randn(seed + 2, 2 * rows) if per_row else torch.tensor(1.75)
        if per_row:
            coefficient[0] = 0
        dense = sparse.dense()[3]
        c = coefficient.reshape(2, rows, 1) if per_row else coefficient
        expected = (x.float() + c * dense).to(dtype)
        result = sparse.add_(x.clone(), coefficient if per_row else 1.75, layer=3)
        untouched = (dense == 0).expand_as(x)
        assert torch.equal(result[untouched], x[untouched])
        ulp = torch.finfo(dtype).eps * expected.float().abs().clamp_min(torch.finfo(dtype).tiny)
        # The product may be fused with the sum: a rounding of c v in fp32, and one to the dtype.
        slack = 2.0**-23 * (c * dense).abs().expand_as(x) + ulp
        assert ((result.float() - expected.float()).abs() <= slack).all()
        if per_row:
            assert torch.equal(result[0, 0], x[0, 0])

    def test_a_hook_steers_as_add_does(self):
        model = build("llama")
        sparse = sparsify(fs.SteeringVector({1: randn(5, 32)}), keep=0.2)
        with torch.no_grad():
            with fs.steer(model, fs.Add(sparse.dense(), 2.0), path="hooks"):
                expected = model(tokens(2, 6)).logits
            handle = model.model.layers[1].register_forward_hook(sparse.hook(2.0))
            steered = model(tokens(2, 6)).logits
            handle.remove()
            plain = model(tokens(2, 6)).logits
        torch.testing.assert_close(steered, expected)
        assert not torch.allclose(plain, expected, atol=1e-2)

    def test_files(self, tmp_path):
        sparse = sparsify(vector(op="add", provenance={"a": 1}), keep=0.3)
        path = sparse.save(tmp_path / "s.safetensors")
        back = SparseVector.load(path)
        assert back.layers == sparse.layers and back.hidden_size == HIDDEN
        for n in LAYERS:
            assert torch.equal(back.indices[n], sparse.indices[n]) and torch.equal(back.values[n], sparse.values[n])
        assert words_of(back) == words_of(sparse)
        dense = fs.SteeringVector.load(path)
        assert all(torch.equal(dense[n], sparse.dense()[n]) for n in LAYERS) and dense.at == "resid_pre"
        # A plan may name the sparse file.
        assert fs.Plan.from_json(fs.Plan([fs.Add(dense)]).to_json()) == fs.Plan([fs.Add(dense)])
        with pytest.raises(FileNotFoundError):
            SparseVector.load(tmp_path / "none")
        huge = unchecked(sparse.to_bytes(), hidden_size="9999999999999")
        with pytest.raises(fs.FormatError, match="its hidden size is 9999999999999"):
            SparseVector.from_bytes(huge)
        with pytest.raises(fs.FormatError, match=r"its format is 'faststeer\.vector/1'"):
            SparseVector.from_bytes(vector().to_bytes())
        with pytest.raises(fs.FormatError, match=r"its layer convention is .decoder layers counted from 1"):
            SparseVector.from_bytes(unchecked(sparse.to_bytes(), layer_convention="decoder layers counted from 1"))

    @pytest.mark.parametrize(
        ("indices", "values", "message"),
        [
            ([0, 0], [1.0, 2.0], "must ascend"),
            ([3, 1], [1.0, 2.0], "must ascend"),
            ([0, 16], [1.0, 2.0], "within 0..15"),
            ([-1, 2], [1.0, 2.0], "within 0..15"),
            ([0], [1.0, 2.0], "as many as values"),
            ([0, 1], [1.0, math.inf], "NaN or infinite"),
            ([0], [0.0], "all zero"),
        ],
        ids=["twice", "unsorted", "high", "negative", "lengths", "infinite", "zero"],
    )
    def test_refused(self, indices, values, message):
        with pytest.raises(ValueError, match=message):
            SparseVector({0: torch.tensor(indices, dtype=torch.int32)}, {0: torch.tensor(values)}, HIDDEN)

    def test_arguments_that_do_not_fit(self):
        sparse = sparsify(vector(), keep=0.3)
        with pytest.raises(ValueError, match="the vector has layers 1, 3; say which"):
            sparse.add_(torch.zeros(2, HIDDEN))
        with pytest.raises(ValueError, match="x has hidden size 4"):
            sparse.add_(torch.zeros(2, 4), layer=1)
        with pytest.raises((ValueError, RuntimeError), match="gradient"):
            sparse.add_(torch.zeros(2, HIDDEN, requires_grad=True), layer=1)
        assert algebra.RULES == ("magnitude", "effect", "paper", "code", "random")
