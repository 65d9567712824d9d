"""Interventions and gates: what they accept, and what they refuse with what was wrong, what was expected and how to
mend it."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from oracle import in_positions
from strategies import positions, randn

import faststeer as fs
from faststeer.compile import compile_plan, orthonormal, resolve_layers
from faststeer.intervention import position_range

V = randn(0, 8)
NAN, INF = float("nan"), float("inf")


def vector(*layers: int, at="resid_post") -> fs.SteeringVector:
    return fs.SteeringVector({layer: randn(layer, 8) for layer in layers}, at=at)


def compiled(intervention: fs.Intervention, n_layers: int = 4, hidden: int = 8) -> list:
    return compile_plan(fs.Plan([intervention]), n_layers, hidden)


class TestAccepted:
    @pytest.mark.parametrize(
        ("layers", "resolved"),
        [
            (2, [2]),
            (-1, [3]),
            ([3, 0], [0, 3]),
            (range(1, 3), [1, 2]),
            ("all", [0, 1, 2, 3]),
            (np.int64(2), [2]),
            ((np.int32(-4), 2), [0, 2]),
            (np.array([2, 0]), [0, 2]),
            (torch.tensor([2, 0]), [0, 2]),
            (torch.tensor(2), [2]),
            ({1, 3}, [1, 3]),
            ((i for i in (2, 1)), [1, 2]),
        ],
        ids=[
            "int",
            "from_the_end",
            "list",
            "range",
            "all",
            "numpy",
            "numpy_tuple",
            "numpy_array",
            "tensor",
            "tensor_0d",
            "set",
            "generator",
        ],
    )
    def test_layers(self, layers, resolved):
        assert resolve_layers(fs.Add(V, layers=layers), 4) == resolved

    def test_a_vector_brings_its_layers_and_hook_point(self):
        assert [entry.site for entry in compiled(fs.Add(vector(1, 3, at="mlp_out")))] == [4 + 3, 12 + 3]

    def test_of_two_vectors_the_layers_both_have(self):
        assert resolve_layers(fs.Rotate(vector(0, 1, 2), vector(1, 2, 3), 30.0), 4) == [1, 2]

    def test_a_vector_steers_each_layer_with_its_own_direction(self):
        entries = compiled(fs.Add(vector(0, 2)))
        assert [torch.equal(e.basis[0], randn(layer, 8)) for e, layer in zip(entries, (0, 2), strict=True)] == [
            True,
            True,
        ]

    def test_a_bare_tensor_steers_what_a_forward_hook_sees(self):
        assert [entry.site for entry in compiled(fs.Add(V, layers=1))] == [8], "resid_post"

    def test_several_hook_points(self):
        where = [entry.site for entry in compiled(fs.Ablate(V, layers="all", at=("resid_pre", "attn_out", "mlp_out")))]
        assert where == [4 * layer + point for layer in range(4) for point in (0, 1, 3)]

    def test_resid_post_of_a_layer_is_resid_pre_of_the_next(self):
        here, there = fs.Add(V, layers=1, at="resid_post"), fs.Add(V, layers=2, at="resid_pre")
        assert compiled(here)[0].site == compiled(there)[0].site
        assert len(compiled(fs.Add(V, layers=(1, 2), at=("resid_pre", "resid_post")))) == 3, (
            "a site named twice is one site"
        )

    def test_numbers_of_any_kind(self):
        for one in (1, 1.0, np.float32(1), np.int8(1), torch.tensor(1.0), torch.tensor([[1]])):
            assert fs.Add(V, one, layers=0).coefficient == 1.0

    def test_arrays_and_lists_as_directions(self):
        for direction in (np.ones(8), [1] * 8, torch.ones(8, dtype=torch.int32)):
            assert fs.Ablate(direction, layers=0).direction.is_floating_point()

    def test_positions_and_gates_of_numpys_numbers_are_written_as_json(self):
        gate = fs.Gate(V, np.float32(0.5), latched=True, layer=np.int64(0))
        plan = fs.Plan([fs.Add(V, layers=2, positions=slice(np.int64(-3), None), when=gate)])
        same = fs.Plan([fs.Add(V, layers=2, positions="[-3:]", when=fs.Gate(V, 0.5, latched=True, layer=0))])
        assert fs.Plan.from_json(plan.to_json()) == plan == same
        assert fs.Add(V, layers=2, positions=np.int8(-1)).position_range == (-1, 0)

    def test_trained_numbers_keep_their_graph(self):
        c = torch.tensor([2.0], requires_grad=True)
        assert fs.Add(V, c, layers=0).coefficient.requires_grad
        assert fs.Add(V, c, layers=0).requires_grad and not fs.Add(V, 2.0, layers=0).requires_grad
        assert fs.Ablate(V.clone().requires_grad_(), layers=0).requires_grad

    def test_frozen(self):
        with pytest.raises(AttributeError):
            fs.Add(V, layers=0).coefficient = 2.0  # type: ignore[misc]
        with pytest.raises(AttributeError):
            fs.Gate(V).threshold = 2.0  # type: ignore[misc]


class TestPositions:
    @pytest.mark.parametrize(
        ("given_as", "inside", "outside"),
        [
            ("all", [-99, -1, 0, 99], []),
            ("prompt", [-99, -1], [0, 1]),
            ("generated", [0, 99], [-1, -99]),
            ("last", [-1], [-2, 0]),
            (slice(-3, None), [-3, -2, -1], [-4, 0]),
            ("[-3:]", [-3, -1], [-4, 0]),
            ("-3:", [-3, -1], [-4, 0]),
            (slice(0, 2), [0, 1], [-1, 2]),
            ("[2:]", [2, 99], [1, -1]),
            (slice(None, -2), [-99, -3], [-2, 0]),
            (slice(None, 2), [-99, -1, 0, 1], [2]),
            ("[:]", [-99, -1], [0]),
            (slice(-2, 3), [-2, -1, 0, 2], [-3, 3]),
            (-1, [-1], [0, -2]),
            (3, [3], [2, 4]),
        ],
        ids=str,
    )
    def test_meaning(self, given_as, inside, outside):
        low, high = fs.Add(V, layers=0, positions=given_as).position_range
        assert all(low <= r < high for r in inside)
        assert not any(low <= r < high for r in outside)

    @given(positions=positions)
    def test_range_is_what_the_words_say(self, positions):
        kept = fs.Add(V, layers=0, positions=positions).positions
        low, high = position_range(kept)
        assert all(in_positions(kept, r) == (low <= r < high) for r in range(-12, 12))

    @pytest.mark.parametrize(
        "bad",
        [
            "first",
            "",
            "[]",
            "5",
            "[a:b]",
            "[1:2:3]",
            slice(0, 4, 2),
            slice(0.5, 2),
            slice("a", None),
            True,
            1.5,
            None,
            [0, 1],
            (0,),
            "[1.5:]",
        ],
        ids=repr,
    )
    def test_refused(self, bad):
        with pytest.raises(
            ValueError, match=r"positions=.*expected 'all', 'prompt', 'generated', 'last', an int, or a slice"
        ):
            fs.Add(V, layers=0, positions=bad)

    @pytest.mark.parametrize("empty", [slice(3, 3), slice(2, -1), "[5:2]", slice(-1, -4)], ids=str)
    def test_refused_where_no_token_is_meant(self, empty):
        with pytest.raises(
            ValueError, match=r"selects no token: .* -1 is the last prompt token and 0 the first generated one"
        ):
            fs.Add(V, layers=0, positions=empty)

    @pytest.mark.parametrize("huge", [2**40, -(2**40), slice(2**31, None), f"[-{2**40}:]"], ids=str)
    def test_refused_where_it_does_not_fit(self, huge):
        with pytest.raises(ValueError, match="positions="):
            fs.Add(V, layers=0, positions=huge)


EVERY_KIND = {
    "Add": lambda d, **more: fs.Add(d, **more),
    "Ablate": lambda d, **more: fs.Ablate(d, **more),
    "Project": lambda d, **more: fs.Project(d, **more),
    "Clamp": lambda d, **more: fs.Clamp(d, low=0.0, **more),
    "Rotate": lambda d, **more: fs.Rotate(d, randn(9, 8), 30.0, **more),
    "Rotate_b": lambda d, **more: fs.Rotate(randn(9, 8), d, 30.0, **more),
    "Probe": lambda d, **more: fs.Probe(d, **more),
    "dot_gate": lambda d, **more: fs.Add(V, when=fs.Gate(d), **more),
    "cosine_gate": lambda d, **more: fs.Add(V, when=fs.Gate(d, kind="cosine"), **more),
    "latched_gate": lambda d, **more: fs.Add(V, when=fs.Gate(d, latched=True), **more),
}


@pytest.mark.parametrize("make", EVERY_KIND.values(), ids=EVERY_KIND)
class TestDirectionsRefused:
    """Every direction of every kind, before anything is compiled or at the latest then."""

    def check(self, make, direction, message, hidden=8):
        with pytest.raises((ValueError, TypeError), match=message):
            compiled(make(direction, layers=0), hidden=hidden)

    @pytest.mark.parametrize("bad", [NAN, INF, -INF], ids=str)
    def test_not_finite(self, make, bad):
        self.check(make, torch.where(torch.arange(8) == 3, bad, V), "1 NaN or infinite value.*must be finite")

    def test_zero(self, make):
        self.check(make, torch.zeros(8), "is zero")

    def test_wrong_hidden_size(self, make):
        self.check(make, randn(0, 7), "hidden size 7, the model has 8: was it found in another model")

    def test_wrong_hidden_size_of_a_vector(self, make):
        self.check(make, fs.SteeringVector({0: randn(0, 7)}), "hidden size 7, the model has 8")

    def test_wrong_shape(self, make):
        self.check(make, randn(0, 2, 2, 8), r"shape \[2, 2, 8\]: expected")

    def test_a_vector_without_that_layer(self, make):
        self.check(make, fs.SteeringVector({1: V, 2: V}), r"no direction for layer 0")


class TestRefused:
    @pytest.mark.parametrize(
        "bad", [None, "refusal.safetensors", {0: V}, object()], ids=["None", "str", "dict", "object"]
    )
    @pytest.mark.parametrize(
        ("make", "name"),
        [
            (lambda d: fs.Add(d, layers=0), "Add's direction"),
            (lambda d: fs.Rotate(V, d, 30.0, layers=0), "Rotate's b"),
            (lambda d: fs.Gate(d), "the gate's direction"),
            (lambda d: fs.SteeringVector({3: d}), "the direction of layer 3"),
        ],
        ids=["direction", "b", "gate", "vector"],
    )
    def test_no_direction_at_all(self, make, name, bad):
        """The message names what was given wrongly and what it takes."""
        with pytest.raises((ValueError, TypeError), match=rf"{name}.*(expected|tensor|SteeringVector)"):
            make(bad)

    @pytest.mark.parametrize(
        "kind", [fs.Add, lambda d, **more: fs.Clamp(d, low=0, **more), lambda d, **more: fs.Rotate(d, V, **more)]
    )
    def test_a_subspace_where_one_direction_is_meant(self, kind):
        with pytest.raises(ValueError, match=r"shape \[2, 8\]: expected a direction of shape \[hidden\]"):
            kind(randn(0, 2, 8), layers=0)

    @pytest.mark.parametrize(
        "rows",
        [
            torch.stack([V, 2 * V]),
            torch.stack([V, V + 1e-8 * randn(1, 8)]),
            torch.stack([V, randn(1, 8), V - 3 * randn(1, 8)]),
            randn(0, 9, 8),
            torch.stack([V, torch.zeros(8)]),
        ],
        ids=["parallel", "nearly_parallel", "third_in_the_plane", "more_than_hidden", "one_zero"],
    )
    def test_dependent_directions(self, rows):
        with pytest.raises(ValueError, match=r"linearly dependent|cannot be independent|is zero"):
            compiled(fs.Ablate(rows, layers=0))

    def test_a_plane_of_parallel_directions(self):
        with pytest.raises(ValueError, match=r"Rotate's plane \(a, b\).*parallel"):
            compiled(fs.Rotate(V, -2 * V, 30.0, layers=0))

    @pytest.mark.parametrize(
        ("layers", "message"),
        [
            (4, r"layer 4 is out of range: the model has layers 0\.\.3 \(or -4\.\.-1\)"),
            (-5, r"layer -5 is out of range: the model has layers 0\.\.3"),
            ([0, 7], "layer 7 is out of range"),
        ],
        ids=str,
    )
    def test_layers_out_of_range(self, layers, message):
        with pytest.raises(ValueError, match=message):
            compiled(fs.Add(V, layers=layers))

    @pytest.mark.parametrize(
        ("layers", "message"),
        [
            ([], "layers is empty"),
            ([1, 1], "names a layer twice: put the intervention in the plan twice"),
            ("some", "layers='some': expected an int, several, a range or 'all'"),
            (1.5, "layers=1.5: expected an int"),
            (True, "no layer number"),
            ([0, "1"], "'1' is no layer number"),
            ([0, None], "None is no layer number"),
            (np.array([0.0, 1.0]), "0.0.* is no layer number"),
            (torch.tensor(1.5), "expected an int, several"),
            (torch.zeros(2, 2, dtype=torch.int64), "expected an int, several"),
            ({1: 2.0}, "layers={1: 2.0}: expected an int, several"),
        ],
        ids=str,
    )
    def test_layers(self, layers, message):
        with pytest.raises(ValueError, match=message):
            fs.Add(V, layers=layers)

    def test_one_layer_under_two_numbers(self):
        """Twice in a list is refused; so is -1 beside the last layer's number, which means the same."""
        with pytest.raises(ValueError, match="twice"):
            compiled(fs.Add(V, layers=(3, -1)))

    def test_a_tensor_without_layers(self):
        with pytest.raises(
            ValueError, match="Add with a bare tensor needs layers=: an int, several, a range, or 'all'"
        ):
            compiled(fs.Add(V))

    def test_a_layer_that_the_vector_does_not_have(self):
        with pytest.raises(
            ValueError,
            match=r"no direction for layer 2; it has 0, 1\. .*say so by passing the tensor: Add\(v\[1\], layers=",
        ):
            compiled(fs.Add(vector(0, 1), layers=(1, 2)))

    def test_vectors_without_a_common_layer(self):
        """Acting nowhere is a mistake, as with layers=[]."""
        with pytest.raises(ValueError, match="layer"):
            compiled(fs.Rotate(vector(0, 1), vector(2, 3), 30.0))

    def test_vectors_of_different_hook_points(self):
        with pytest.raises(ValueError, match=r"different hook points .*say at="):
            compiled(fs.Rotate(vector(0), fs.SteeringVector({0: randn(9, 8)}, at="mlp_out"), 30.0))

    @pytest.mark.parametrize("at", ["resid", "RESID_PRE", ("resid_pre", "mlp"), 3], ids=str)
    def test_hook_points(self, at):
        with pytest.raises((ValueError, TypeError), match="hook point"):
            fs.Add(V, layers=0, at=at)

    def test_no_hook_point(self):
        with pytest.raises(ValueError, match=r"at=\(\) names no hook point: leave it out"):
            fs.Add(V, layers=0, at=())

    @pytest.mark.parametrize(
        "bad", [NAN, INF, "1", None, True, [1.0], 1j, torch.tensor([1.0, 2.0]), torch.tensor(NAN)], ids=str
    )
    @pytest.mark.parametrize(
        ("make", "name"),
        [
            (lambda n: fs.Add(V, n, layers=0), "Add's coefficient"),
            (lambda n: fs.Ablate(V, n, layers=0), "Ablate's strength"),
            (lambda n: fs.Rotate(V, randn(1, 8), n, layers=0), "Rotate's degrees"),
            (lambda n: fs.Clamp(V, low=0.0, high=n if n is not None else "None", layers=0), "Clamp's high"),
            (lambda n: fs.Gate(V, n), "the gate's threshold"),
        ],
        ids=["coefficient", "strength", "degrees", "high", "threshold"],
    )
    def test_numbers(self, make, name, bad):
        with pytest.raises(ValueError, match=f"{name} must be (a|one) finite number, got"):
            make(bad)

    @pytest.mark.parametrize(
        "make",
        [
            lambda: fs.Add(V, 1e39, layers=0),
            lambda: fs.Ablate(V, -1e39, layers=0),
            lambda: fs.Clamp(V, low=1e39, layers=0),
            lambda: fs.Gate(V, 1e39),
            lambda: fs.Add(1e39 * V.double(), layers=0),
        ],
        ids=["coefficient", "strength", "low", "threshold", "direction"],
    )
    def test_numbers_that_are_infinite_in_fp32(self, make):
        """The tables hold fp32: what overflows there would steer with infinity in silence."""
        with pytest.raises(ValueError, match=r"fp32|float32|single precision|finite|too large|range"):
            make()

    @pytest.mark.parametrize("field", ["keep_norm", "probe"])
    @pytest.mark.parametrize("bad", ["no", 2], ids=str)
    def test_switches(self, field, bad):
        with pytest.raises((ValueError, TypeError), match=field):
            fs.Ablate(V, layers=0, **{field: bad})

    def test_relative_is_a_switch(self):
        with pytest.raises((ValueError, TypeError), match="relative"):
            fs.Rotate(V, randn(1, 8), 30.0, relative="no", layers=0)

    def test_clamp_without_bounds(self):
        with pytest.raises(ValueError, match="without low and high does nothing: give at least one bound"):
            fs.Clamp(V, layers=0)

    def test_clamp_with_crossed_bounds(self):
        with pytest.raises(ValueError, match=r"low 2\.0 is above its high 1\.0"):
            fs.Clamp(V, low=2.0, high=1.0, layers=0)

    def test_probing_an_add(self):
        with pytest.raises(ValueError, match=r"nothing to probe: put Probe\(direction\) before it"):
            fs.Add(V, layers=0, probe=True)

    @pytest.mark.parametrize(
        "more",
        [{"positions": "last"}, {"keep_norm": True}, {"when": fs.Gate(V)}],
        ids=["positions", "keep_norm", "when"],
    )
    def test_a_probe_with_conditions(self, more):
        with pytest.raises(ValueError, match="a Probe looks at every token and changes none"):
            fs.Probe(V, layers=0, **more)

    def test_when_takes_a_gate(self):
        with pytest.raises(TypeError, match="when= takes a Gate, got Tensor"):
            fs.Add(V, layers=0, when=V)


class TestGate:
    @pytest.mark.parametrize(
        ("make", "message"),
        [
            (lambda: fs.Gate(V, kind="cos"), "unknown gate kind 'cos': expected 'dot' or 'cosine'"),
            (lambda: fs.Gate(V, layer=1), r"drop layer= and at=, or set latched=True"),
            (lambda: fs.Gate(V, at="mlp_out"), r"drop layer= and at=, or set latched=True"),
            (lambda: fs.Gate(V, at="mlp", latched=True), "unknown hook point 'mlp'"),
            (lambda: fs.Gate(randn(0, 2, 8)), r"the gate's direction has shape \[2, 8\]"),
            (lambda: fs.Gate(V, layer=1.5, latched=True), "layer"),
            (lambda: fs.Gate(V, layer="1", latched=True), "layer"),
            (lambda: fs.Gate(V, layer=True, latched=True), "layer"),
            (lambda: fs.Gate(V, above="no"), "above"),
            (lambda: fs.Gate(V, latched="no"), "latched"),
        ],
        ids=[
            "kind",
            "layer_unlatched",
            "at_unlatched",
            "hook_point",
            "subspace",
            "layer_float",
            "layer_str",
            "layer_bool",
            "above",
            "latched",
        ],
    )
    def test_refused(self, make, message):
        with pytest.raises((ValueError, TypeError), match=message):
            make()

    @pytest.mark.parametrize("layer", [4, -5])
    def test_layer_out_of_range(self, layer):
        with pytest.raises(ValueError, match=rf"gate's layer {layer} is out of range: the model has layers 0\.\.3"):
            compiled(fs.Add(V, layers=3, when=fs.Gate(V, latched=True, layer=layer)))

    def test_may_not_look_later_than_the_intervention_acts(self):
        gate = fs.Gate(V, latched=True, layer=2, at="attn_out")
        with pytest.raises(
            ValueError,
            match=r"at attn_out of layer 2, after the intervention first acts \(resid_pre of layer 2\).*or earlier",
        ):
            compiled(fs.Add(V, layers=(2, 3), at="resid_pre", when=gate))
        assert compiled(fs.Add(V, layers=3, at="resid_pre", when=gate))

    def test_a_vector_without_the_gate_s_layer(self):
        with pytest.raises(ValueError, match="gate's vector has no direction for layer 1; pass one layer's tensor"):
            compiled(fs.Add(V, layers=1, when=fs.Gate(vector(0))))


class TestOrthonormal:
    def test_is_gram_schmidt(self):
        rows = randn(3, 4, 8)
        q = orthonormal(rows, "it")
        torch.testing.assert_close(q @ q.T, torch.eye(4))
        for k in range(4):  # each q_k lies in the span of the first k + 1 rows, on the side of row k
            torch.testing.assert_close(rows[k], (rows[k] @ q[: k + 1].T) @ q[: k + 1])
            assert rows[k] @ q[k] > 0

    def test_scale_does_not_matter(self):
        rows = randn(3, 2, 8)
        torch.testing.assert_close(orthonormal(rows * torch.tensor([[1e-20], [1e15]]), "it"), orthonormal(rows, "it"))

    def test_differentiable(self):
        rows = randn(3, 3, 5, dtype=torch.float64).requires_grad_()
        assert torch.autograd.gradcheck(lambda r: orthonormal(r, "it"), rows)


def test_rotation_by_whole_turns_is_exact():
    assert fs.Rotate(V, randn(1, 8), 720.0, layers=0).scalars == (1.0, 0.0)
    assert fs.Rotate(V, randn(1, 8), 45.0, layers=0).scalars == pytest.approx((math.sqrt(0.5), math.sqrt(0.5)))
