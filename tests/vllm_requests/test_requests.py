"""What a request may say, how it is read, and that nothing but ValueError comes of what strangers send."""

from __future__ import annotations

import base64
import json
import string
import tracemalloc

import hypothesis
import pytest
import torch
from hypothesis import strategies as st
from safetensors.torch import save
from strategies import plans, randn

import faststeer as fs
from faststeer.compile import compile_plan
from faststeer.ops.tables import EntryKind
from faststeer.sparse import SparseVector
from faststeer.vector import LAYER_CONVENTION
from faststeer.vllm import plan as client_plan
from faststeer.vllm.registry import Registry
from faststeer.vllm.requests import PAYLOAD_KEY, Limits, parse, received

HIDDEN, LAYERS = 8, 3
LIMITS = Limits(LAYERS, HIDDEN)
V = fs.SteeringVector({layer: randn(layer, HIDDEN) for layer in range(LAYERS)}, model="m")
TENSOR = {"tensor": base64.b64encode(save({"direction": randn(7, HIDDEN)})).decode()}


@pytest.fixture
def registry(tmp_path):
    V.save(tmp_path / "in_folder.safetensors")
    made = Registry(tmp_path)
    made.register_vector("v", V)
    made.register_plan("calm", fs.Plan([fs.Add(V, 2.0)]))
    return made


def text_of(*interventions: dict) -> str:
    return json.dumps({"format": "faststeer.plan/1", "interventions": interventions})


class TestForms:
    """However a plan is written, it is the same plan."""

    @pytest.mark.parametrize(
        "payload",
        [
            fs.Plan([fs.Add(V, 2.0)]),
            "calm",
            "  calm\n",
            fs.Plan([fs.Add(V, 2.0)]).to_json(inline=True),
            fs.Plan([fs.Add(V, 2.0)]).to_json({"v": V}),
            json.loads(fs.Plan([fs.Add(V, 2.0)]).to_json({"v": V})),
            '{"add": "v", "coefficient": 2}',
            {"add": ["v"], "coefficient": 2, "layers": [0, 1, 2]},
            '[{"add": "in_folder", "coefficient": 2.0}]',
            text_of({"type": "Add", "direction": {"path": "in_folder.safetensors"}, "coefficient": 2.0}),
        ],
        ids=["Plan", "name", "spaces", "inline", "by name", "dict", "short", "short dict", "list", "path"],
    )
    def test_are_one_plan(self, registry, payload):
        found, expected = parse(payload, registry, LIMITS), parse(fs.Plan([fs.Add(V, 2.0)]), registry, LIMITS)
        assert found.digest == expected.digest
        assert received({PAYLOAD_KEY: found.wire()}).digest == found.digest
        assert parse(fs.Plan.from_json(found.wire()["plan"]), registry, LIMITS).digest == expected.digest

    def test_whether_it_probes(self, registry):
        for plan, probes in ((fs.Plan([fs.Add(V)]), False), (fs.Plan([fs.Probe(V)]), True)):
            assert received({PAYLOAD_KEY: parse(plan, registry, LIMITS).wire(3)}).probes == probes
            assert parse(fs.Plan([*plan, fs.Ablate(V, probe=True)]), registry, LIMITS).probes

    def test_short_form_of_two_vectors(self, registry):
        other = fs.SteeringVector({0: randn(9, HIDDEN)})
        registry.register_vector("w", other)
        found = parse('{"rotate": ["v", "w"], "degrees": 30, "layers": [0]}', registry, LIMITS)
        assert found.digest == parse(fs.Plan([fs.Rotate(V, other, 30, layers=[0])]), registry, LIMITS).digest

    def test_a_gate_by_name(self, registry):
        text = text_of({"type": "Add", "direction": {"name": "v"}, "when": {"direction": {"name": "in_folder"}}})
        expected = fs.Plan([fs.Add(V, when=fs.Gate(V))])
        assert parse(text, registry, LIMITS).digest == parse(expected, registry, LIMITS).digest

    @pytest.mark.parametrize("payload", ["none", fs.Plan(), "[]", text_of()], ids=str)
    def test_nothing_to_do_is_none(self, registry, payload):
        assert parse(payload, registry, LIMITS) is None

    @hypothesis.given(plans(HIDDEN, LAYERS))
    def test_the_wire_says_what_the_plan_says(self, plan):
        try:
            compile_plan(plan, LAYERS, HIDDEN)
        except ValueError:
            hypothesis.reject()
        found = parse(plan.to_json(inline=True), Registry(), LIMITS)
        again = found and parse(found.wire()["plan"], Registry(), LIMITS)
        assert again is None or (again.digest, again.ranges, again.probes) == (found.digest, found.ranges, found.probes)


class TestDigest:
    @pytest.mark.parametrize(
        "other",
        [
            fs.Plan([fs.Add(V, 2.5)]),
            fs.Plan([fs.Add(V, 2.0, layers=[0])]),
            fs.Plan([fs.Add(V, 2.0, at="mlp_out")]),
            fs.Plan([fs.Add(V, 2.0, positions="generated")]),
            fs.Plan([fs.Add(V, 2.0, keep_norm=True)]),
            fs.Plan([fs.Add(V, 2.0, when=fs.Gate(V))]),
            fs.Plan([fs.Add(V, 2.0, when=fs.Gate(V, 0.5))]),
            fs.Plan([fs.Add(V, 2.0, when=fs.Gate(V, latched=True))]),
            fs.Plan([fs.Ablate(V, 2.0)]),
            fs.Plan([fs.Add(V, 2.0), fs.Add(V, 2.0)]),
            fs.Plan([fs.Add(V, 2.0), fs.Probe(V)]),
            fs.Plan([fs.Add(fs.SteeringVector({i: V[i] + 1e-6 for i in range(LAYERS)}), 2.0)]),
        ],
        ids=repr,
    )
    def test_differs_where_the_plan_does(self, registry, other):
        assert parse(other, registry, LIMITS).digest != parse("calm", registry, LIMITS).digest

    def test_is_of_what_it_does_not_of_how_it_is_said(self, registry):
        named = fs.SteeringVector(dict(V.directions), model="other", provenance={"a": 1})
        one = fs.Plan([fs.Add(named[0], 2.0, layers=0), fs.Add(named, 2.0, layers=[-1, 1])])
        assert parse(one, registry, LIMITS).digest == parse("calm", registry, LIMITS).digest

    def test_ranges_are_those_of_what_changes_rows(self, registry):
        plan = fs.Plan(
            [fs.Probe(V), fs.Add(V, positions="generated"), fs.Add(V, positions="[-5:]"), fs.Add(V, layers=0)]
        )
        low, high = fs.Add(V).position_range
        assert parse(plan, registry, LIMITS).ranges == ((low, high), (-5, 0), (0, high))
        assert parse(fs.Plan([fs.Probe(V)]), registry, LIMITS).ranges == ()
        latched = fs.Plan([fs.Add(V, when=fs.Gate(V, latched=True))])
        assert parse(latched, registry, LIMITS).ranges == ((-1, high),)

    @hypothesis.given(plans(HIDDEN, LAYERS), plans(HIDDEN, LAYERS))
    def test_equal_means_equal_entries(self, one, other):
        """Two plans have one digest exactly where their tables would hold the same."""
        try:
            a, b = compile_plan(one, LAYERS, HIDDEN), compile_plan(other, LAYERS, HIDDEN)
        except ValueError:
            hypothesis.reject()
        limits = Limits(LAYERS, HIDDEN, max_interventions=100)
        digests = [getattr(parse(plan, Registry(), limits), "digest", None) for plan in (one, other)]
        assert (digests[0] == digests[1]) == (list(map(_facts, a)) == list(map(_facts, b)))


def _facts(entry) -> tuple:
    def single(values):
        return None if values is None else values.float().tolist()

    scalars = torch.tensor([*map(float, entry.scalars), entry.gate_threshold], dtype=torch.float32).tolist()
    same = (entry.site, EntryKind(entry.kind), entry.position_range, entry.gate_mode, entry.gate_state, entry.keep_norm)
    return (*same, entry.probe_column, scalars, single(entry.basis), single(entry.gate_vector))


class TestRefused:
    @pytest.mark.parametrize(
        ("payload", "says"),
        [
            (3, "a plan is a int: expected the name of a registered plan"),
            (b"calm", "a plan is a bytes"),
            (True, "a plan is a bool"),
            ("unknown", "no plan is registered as 'unknown'; known: calm"),
            ("{", "no valid JSON"),
            ("[" * 100_000, "no valid JSON"),
            ('{"add": ' + "9" * 5000 + "}", "no valid JSON"),
            ({"add": {"v"}}, "no valid JSON"),
            ("{}", "this JSON is no plan"),
            ('{"interventions": []}', "no faststeer plan"),
            ('{"add": "w"}', r"interventions\[0\].direction: no vector is registered as 'w'; known: in_folder, v"),
            ('{"add": 3}', r"\[0\].add: expected 1 name\(s\) of vectors"),
            ('{"add": ["v", "v"]}', r"\[0\].add: expected 1 name"),
            ('{"rotate": "v"}', r"\[0\].rotate: expected 2 name"),
            ('{"add": "v", "ablate": "v"}', r"\[0\]: expected one of add, ablate"),
            ('{"add": "v", "scale": 3}', "Add has no field 'scale'"),
            ('{"add": "v", "layers": [3]}', r"layer 3 is out of range: the model has layers 0\.\.2"),
            ('{"add": "v", "coefficient": NaN}', "finite"),
            ('{"add": "v", "coefficient": 1e400}', "finite"),
            ('{"add": "v", "at": "resid"}', "unknown hook point"),
            ('{"add": "v", "positions": "[3:1]"}', "selects no token"),
            (text_of({"type": "Add", "direction": {"name": "v", "path": "x"}}), 'expected ."name"'),
            (text_of({"type": "Add", "direction": {"vector": "!"}}), "no base64"),
            (
                text_of({"type": "Add", "direction": {"vector": "AAAA"}}),
                r"interventions\[0\].direction: what is inline",
            ),
            (text_of({"type": "Add", "direction": {"tensor": "AAAA"}, "layers": [0]}), "cannot be read"),
            (text_of({"type": "Add", "direction": {"path": "none.safetensors"}}), "cannot be read: No such file"),
            (text_of({"type": "Add", "direction": TENSOR}), "needs layers="),
            (
                text_of({"type": "Add", "direction": TENSOR, "layers": [0]}).replace("Add", "Open"),
                "unknown intervention",
            ),
            ({"plan": "", "digest": "", "ranges": []}, "no plan"),
        ],
        ids=lambda value: str(value)[:30],
    )
    def test_says_what_is_wrong(self, registry, payload, says):
        with pytest.raises(ValueError, match=says):
            parse(payload, registry, LIMITS)

    def test_a_vector_of_another_model(self, registry):
        registry.register_vector("wide", fs.SteeringVector({0: randn(0, HIDDEN + 1)}))
        with pytest.raises(ValueError, match="hidden size 9, the model has 8"):
            parse('{"add": "wide"}', registry, LIMITS)

    def test_more_than_the_limits(self, registry):
        small = Limits(LAYERS, HIDDEN, max_plan_bytes=300, max_interventions=2, max_directions=2)
        with pytest.raises(ValueError, match="at most 300"):
            parse(fs.Plan([fs.Add(V)]).to_json(inline=True), registry, small)
        for many in ('[{"add":"v"},{"add":"v"},{"add":"v"}]', fs.Plan([fs.Add(V)] * 3)):
            with pytest.raises(ValueError, match="3 interventions: this server takes at most 2"):
                parse(many, registry, small)
        with pytest.raises(ValueError, match=r"interventions\[1\] has 3 directions: this server takes at most 2"):
            parse(fs.Plan([fs.Add(V), fs.Ablate(randn(0, 3, HIDDEN), layers=0)]), registry, small)

    def test_what_the_tables_have_no_room_for(self, registry):
        def check(entries):
            raise ValueError(f"{len(entries)} entries are too many")

        with pytest.raises(ValueError, match="3 entries are too many"):
            parse("calm", registry, Limits(LAYERS, HIDDEN, check=check))

    def test_pickles_and_other_files(self, registry, tmp_path):
        torch.save({"direction": randn(0, HIDDEN)}, tmp_path / "pickle.safetensors")
        with pytest.raises(ValueError, match="no safetensors file, and a server reads nothing else"):
            parse('{"add": "pickle"}', registry, LIMITS)
        inline = base64.b64encode((tmp_path / "pickle.safetensors").read_bytes()).decode()
        with pytest.raises(ValueError, match="no safetensors file"):
            parse(text_of({"type": "Add", "direction": {"vector": inline}}), registry, LIMITS)

    def test_an_unchecked_payload_in_the_engine(self):
        for payload in ("calm", {"plan": "{}"}, {"plan": 1, "digest": "", "ranges": []}, 7):
            with pytest.raises(ValueError, match="reached the engine unchecked"):
                received({PAYLOAD_KEY: payload})
        assert received(None) is None and received({}) is None


# Whatever strangers send ----------------------------------------------------------------------------------------------

_words = st.sampled_from(
    ["v", "calm", "in_folder", "none", "all", "../x", "/etc/passwd", "", "\0", "[-5:]", "generated"]
)
_numbers = st.integers(-(10**30), 10**30) | st.floats() | st.sampled_from([0, 1, -1, 2**31, 2**63, 10**400])
_leaves = st.none() | st.booleans() | _numbers | _words | st.text(string.printable, max_size=8)
_fields = st.sampled_from(
    [
        *("type", "direction", "a", "b", "layers", "at", "positions", "when", "keep_norm", "probe", "coefficient"),
        *("strength", "low", "high", "degrees", "relative", "name", "path", "vector", "tensor", "sha256", "threshold"),
        *("kind", "latched", "layer", "add", "ablate", "format", "interventions", "plan", "digest", "ranges", "_"),
    ]
)
_data = st.recursive(
    _leaves, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(_fields, inner, max_size=5), max_leaves=12
)
_good_direction = st.sampled_from([{"name": "v"}, {"name": "in_folder"}, TENSOR, {"path": "in_folder.safetensors"}])
_values = {
    "direction": _good_direction | _data,
    "when": st.fixed_dictionaries({"direction": _good_direction | _data}, optional={"threshold": _numbers}) | _data,
    "layers": st.lists(st.integers(-5, 5), max_size=4) | st.just("all") | _data,
}
_names = ("at", "positions", "keep_norm", "probe", "coefficient", "strength", "low", "high", "degrees", "relative")
_intervention = st.fixed_dictionaries(
    {"type": st.sampled_from(["Add", "Ablate", "Project", "Clamp", "Rotate", "Probe", "Gate", "Plan"])},
    optional=_values | {name: _data for name in _names} | {"a": _good_direction, "b": _good_direction | _data},
)
_near_plans = st.fixed_dictionaries(
    {"format": st.just("faststeer.plan/1"), "interventions": st.lists(_intervention | _data, max_size=4)}
)
_short = st.dictionaries(
    st.sampled_from(
        ["add", "ablate", "project", "clamp", "rotate", "probe", "layers", "coefficient", "low", "positions"]
    ),
    _leaves | st.lists(_leaves, max_size=3),
    max_size=4,
)


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    folder = tmp_path_factory.mktemp("server")
    V.save(folder / "in_folder.safetensors")
    made = Registry(folder)
    made.register_vector("v", V)
    made.register_plan("calm", fs.Plan([fs.Add(V)]))
    return made


class TestHostile:
    @hypothesis.given(
        payload=st.one_of(_data, _near_plans, _short, st.lists(_short, max_size=3)), as_text=st.booleans()
    )
    @hypothesis.settings(max_examples=5 * hypothesis.settings().max_examples)
    def test_only_value_error_comes_out(self, shared, payload, as_text):
        try:
            parse(json.dumps(payload) if as_text else payload, shared, LIMITS)
        except ValueError as error:
            assert str(error)

    @hypothesis.given(st.text() | st.binary())
    def test_nor_of_any_text(self, shared, payload):
        try:
            parse(payload, shared, LIMITS)
        except ValueError as error:
            assert str(error)

    @hypothesis.given(st.data())
    def test_nor_of_a_damaged_vector(self, shared, data):
        content = bytearray(V.to_bytes())
        for _ in range(data.draw(st.integers(1, 4))):
            content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
        del content[data.draw(st.integers(1, len(content))) :]
        for key in ("vector", "tensor"):
            text = text_of({"type": "Add", "direction": {key: base64.b64encode(content).decode()}, "layers": [0]})
            try:
                parse(text, shared, LIMITS)
            except ValueError as error:
                assert str(error)

    @pytest.mark.parametrize(
        "payload",
        ["[" + "[]," * 10**7 + "[]]", '{"add": "' + "v" * 10**7 + '"}', '{"a": ' * 10**6 + "1" + "}" * 10**6],
        ids=["lists", "name", "nested"],
    )
    def test_large_payloads_are_not_parsed(self, shared, payload):
        tracemalloc.start()
        try:
            with pytest.raises(ValueError, match="at most"):
                parse(payload, shared, LIMITS)
            assert tracemalloc.get_traced_memory()[1] < 2**20
        finally:
            tracemalloc.stop()


class TestClient:
    def test_sends_values_and_names_never_paths(self, registry, tmp_path):
        saved = fs.SteeringVector({0: randn(3, HIDDEN)})
        saved.save(tmp_path / "mine.safetensors")
        plan = fs.Plan([fs.Add(V, layers=0, when=fs.Gate(saved)), fs.Ablate(saved)])
        text = client_plan(plan, names={"v": V})[PAYLOAD_KEY]
        assert '"name": "v"' in text and "path" not in text
        assert parse(text, registry, LIMITS).digest == parse(plan, registry, LIMITS).digest
        assert "path" not in client_plan(plan)[PAYLOAD_KEY]

    def test_other_things(self):
        assert client_plan("calm") == {PAYLOAD_KEY: "calm"} and client_plan(None) == {PAYLOAD_KEY: "none"}
        assert client_plan(fs.Add(V)) == client_plan(fs.Plan([fs.Add(V)]))
        with pytest.raises(TypeError, match="expected a Plan, an intervention, a plan's name or None, got int"):
            client_plan(3)


class TestNumbers:
    """What a small request may make a server allocate."""

    @pytest.mark.parametrize("layer", [10_000, 10**8, 10**11])
    def test_layers(self, layer, registry):
        tensors = {f"layers.{n}": randn(n, HIDDEN) for n in (0, 1, 2)} | {f"layers.{layer}": randn(3, HIDDEN)}
        words = {"format": "faststeer.vector/1", "at": "resid_post", "layer_convention": LAYER_CONVENTION}
        vector = base64.b64encode(save(tensors, words)).decode()
        with pytest.raises(ValueError, match=rf"layer {layer}: expected a number below 10,000"):
            parse(text_of({"type": "Add", "direction": {"vector": vector}, "layers": [1]}), registry, LIMITS)

    def test_sparse_vectors(self, registry):
        """Each of a few bytes that stand for 128 MiB."""
        sparse = SparseVector({0: torch.tensor([1], dtype=torch.int32)}, {0: torch.ones(1)}, 2**24)
        vector = base64.b64encode(sparse.to_bytes()).decode()
        tracemalloc.start()
        with pytest.raises(ValueError, match="stands for 16,777,216 values, more than the 24"):
            parse(text_of({"type": "Add", "direction": {"vector": vector}}), registry, LIMITS)
        assert tracemalloc.get_traced_memory()[1] < 2**24
        tracemalloc.stop()

    def test_a_field_twice(self, registry):
        with pytest.raises(ValueError, match="'coefficient' is given twice"):
            parse('{"add": "v", "coefficient": 1, "coefficient": 100}', registry, LIMITS)
