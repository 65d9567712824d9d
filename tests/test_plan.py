"""Plans: what they hold, and that their JSON comes back as the same plan or is refused."""

from __future__ import annotations

import base64
import dataclasses
import json
from pathlib import Path

import hypothesis
import jsonschema
import pytest
import torch
from hypothesis import strategies as st
from oracle import sites_of
from safetensors.torch import save
from strategies import plans, randn

import faststeer as fs
from faststeer.compile import compile_plan
from faststeer.ops.tables import EntryKind
from faststeer.plan import plans_for
from faststeer.plan_schema import plan_schema

ROOT = Path(__file__).parents[1]
V = randn(0, 8)


def vector(seed: int = 0) -> fs.SteeringVector:
    return fs.SteeringVector({0: randn(seed, 8), 1: randn(seed + 1, 8)}, at="mlp_out", model="m")


def text_of(**fields) -> str:
    """A plan of one intervention, as JSON, by default a valid one."""
    direction = {"tensor": base64.b64encode(save({"direction": V})).decode()}
    return json.dumps(
        {
            "format": "faststeer.plan/1",
            "interventions": [{"type": "Add", "direction": direction, "layers": [0]} | fields],
        }
    )


# What is refused, with a part of what the message says.
NO_PLANS = [
    ("", "no valid JSON"),
    (text_of()[:-3], "no valid JSON"),
    ("[" * 100_000, "JSON"),
    ('{"format": ' + "[" * 100_000, "JSON"),
    (
        "[]",
        "no faststeer plan: expected an object with \"format\": 'faststeer.plan/1'; write one",
    ),
    ("null", "no faststeer plan"),
    ('{"interventions": []}', "no faststeer plan"),
    ('{"format": "faststeer.plan/2", "interventions": []}', "no faststeer plan"),
    ('{"format": "faststeer.plan/1"}', '"interventions" .a list.'),
    ('{"format": "faststeer.plan/1", "interventions": {}}', '"interventions" .a list.'),
    ('{"format": "faststeer.plan/1", "interventions": [], "model": 1}', "nothing else"),
    (
        '{"format": "faststeer.plan/1", "interventions": [3]}',
        r"interventions\[0\]: unknown intervention 3.*one of Add, Ablate",
    ),
    (
        text_of(type="Subtract"),
        r"interventions\[0\]: unknown intervention 'Subtract'.*one of Add, Ablate, Project",
    ),
    (text_of(type=None), r"interventions\[0\]: unknown intervention None"),
    (text_of(type=["Add"]), r"interventions\[0\]: unknown intervention"),
    (text_of(type={}), r"interventions\[0\]: unknown intervention"),
]
FIELDS = [
    ({"strenght": 2}, r"Add has no field 'strenght': it has .*coefficient"),
    ({"direction_names": []}, "no field 'direction_names'"),
    ({"coefficient": "big"}, "Add's coefficient must be a finite number"),
    ({"coefficient": float("nan")}, "Add's coefficient must be a finite number"),
    ({"coefficient": None}, "Add's coefficient must be a finite number"),
    ({"coefficient": 10**400}, "Add's coefficient"),
    ({"layers": [0, 0]}, "names a layer twice"),
    ({"layers": list(range(10_001))}, "more than 10,000 layers"),
    ({"at": ["resid_pre"] * 1000}, "names a hook point twice"),
    ({"direction": {"path": 5}}, "the path is a int"),
    ({"direction": {"path": "x" * 300}}, "cannot be read: File name too long"),
    ({"layers": "some"}, "layers='some'"),
    ({"layers": {"0": 1}}, "layers="),
    ({"layers": [[0]]}, "layers="),
    ({"at": ["resid"]}, "unknown hook point 'resid'"),
    ({"at": 3}, ""),
    ({"at": [["resid_pre"]]}, "unknown hook point"),
    ({"at": {"resid_pre": 1, "x": 2}}, "unknown hook point"),
    ({"positions": "nowhere"}, "positions='nowhere'"),
    ({"positions": [0, 3]}, "positions="),
    ({"positions": {}}, "positions="),
    ({"keep_norm": "yes"}, "keep_norm"),
    ({"keep_norm": []}, "keep_norm"),
    ({"probe": True}, "nothing to probe"),
    ({"when": []}, "when: expected an object with the fields of a Gate"),
    ({"when": {}}, "when: Gate needs 'direction'"),
    ({"when": {"direction": {"name": "x"}}}, r"when\.direction: no vector is registered as 'x'"),
    ({"when": {"direction": {}}}, "when.direction: expected a direction as"),
    ({"direction": None}, r"direction: expected a direction as \{\"name\""),
    ({"direction": {}}, "expected a direction as"),
    ({"direction": [1.0, 2.0]}, "expected a direction as"),
    ({"direction": {"name": "x", "layer": 3}}, "with no other field"),
    ({"direction": {"name": "x", "path": "x.safetensors"}}, "with no other field"),
    ({"direction": {"tensor": "!"}}, "cannot be read"),
    ({"direction": {"tensor": 5}}, "cannot be read"),
    ({"direction": {"tensor": None}}, "cannot be read|expected"),
    ({"direction": {"tensor": ""}}, "cannot be read|expected"),
    ({"direction": {"tensor": "é"}}, "cannot be read"),
    ({"direction": {"vector": ""}}, "cannot be read|expected"),
    ({"direction": {"vector": None}}, "cannot be read|expected"),
    ({"direction": {"vector": base64.b64encode(b"pickle").decode()}}, "cannot be read as safetensors"),
    (
        {"direction": {"tensor": base64.b64encode(save({"d": V})).decode()}},
        'expected one tensor named "direction"',
    ),
    ({"direction": {"name": ["x"]}}, "no vector is registered|name"),
    ({"direction": {"name": {}}}, "no vector is registered|name"),
]
GATE_FIELDS = [
    ({"tilt": 1}, "Gate has no field 'tilt'"),
    ({"kind": "l2"}, "unknown gate kind"),
    ({"kind": []}, "unknown gate kind"),
    ({"above": "no"}, "above"),
    ({"latched": "no"}, "latched"),
    ({"latched": True, "layer": "0"}, "layer"),
    ({"latched": True, "layer": 0.5}, "layer"),
    ({"latched": True, "at": "x"}, "unknown hook point"),
    ({"latched": True, "at": []}, "hook point"),
    ({"threshold": "x"}, "threshold"),
    ({"layer": 1}, "latched=True"),
]


class TestPlan:
    def test_is_a_sequence_of_interventions(self):
        one, two = fs.Add(V, layers=0), fs.Ablate(V, layers=1)
        plan = fs.Plan([one, two])
        assert len(plan) == 2 and list(plan) == [one, two]
        assert list(fs.Plan(one)) == [one] and len(fs.Plan()) == 0

    @pytest.mark.parametrize("bad", [None, "Add", V, fs.Gate(V)], ids=["None", "str", "tensor", "gate"])
    def test_takes_only_interventions(self, bad):
        with pytest.raises(
            TypeError, match=r"interventions\[1\] is a \w+: a Plan takes Add, Ablate, Project, Clamp, Rotate, Probe"
        ):
            fs.Plan([fs.Add(V, layers=0), bad])

    def test_no_list(self):
        with pytest.raises(
            TypeError, match=r"interventions is a NoneType: a Plan takes a list of .*, \[\] for nothing"
        ):
            fs.Plan(None)

    @pytest.mark.parametrize(
        "other",
        [
            lambda: fs.Plan([fs.Add(V, 2.0, layers=0)]),
            lambda: fs.Plan([fs.Add(V, layers=1)]),
            lambda: fs.Plan([fs.Add(V + 1e-6, layers=0)]),
            lambda: fs.Plan([fs.Add(V, layers=0, positions="last")]),
            lambda: fs.Plan([fs.Add(V, layers=0, keep_norm=True)]),
            lambda: fs.Plan([fs.Add(V, layers=0, when=fs.Gate(V))]),
            lambda: fs.Plan([fs.Ablate(V, layers=0)]),
            lambda: fs.Plan([fs.Add(V, layers=0)] * 2),
            lambda: fs.Plan(),
            lambda: "plan",
        ],
        ids=[
            "coefficient",
            "layers",
            "direction",
            "positions",
            "keep_norm",
            "gate",
            "kind",
            "twice",
            "empty",
            "no_plan",
        ],
    )
    def test_equal_plans_do_the_same(self, other):
        plan = fs.Plan([fs.Add(V, layers=0)])
        assert plan == fs.Plan([fs.Add(V.clone(), layers=0)]) and hash(plan) == hash(
            fs.Plan([fs.Add(V.clone(), layers=0)])
        )
        assert plan != other()

    @hypothesis.settings(parent=hypothesis.settings(), max_examples=100)
    @hypothesis.given(plan=plans(8, 3), n_layers=st.just(3))
    def test_compiles_to_an_entry_per_intervention_and_site(self, plan, n_layers):
        """In the order of the sites, and within one in the plan's; latched gates first, each decided once."""
        entries = compile_plan(plan, n_layers, 8)
        assert [e.site for e in entries] == sorted(e.site for e in entries)
        acting = [(e.site, e.basis.shape[0]) for e in entries if e.kind != EntryKind.LATCH]
        expected = [
            (
                site,
                2
                if isinstance(i, fs.Rotate)
                else 1
                if not isinstance(d := i.directions()[0], torch.Tensor)
                else len(torch.atleast_2d(d)),
            )
            for i in plan
            for site in sites_of(i, n_layers)
        ]
        assert sorted(acting) == sorted(expected)
        for site in {e.site for e in entries}:
            here = [e for e in entries if e.site == site]
            assert [e.kind == EntryKind.LATCH for e in here] == sorted(
                [e.kind == EntryKind.LATCH for e in here], reverse=True
            )
            names = [e.kind for e in here if e.kind != EntryKind.LATCH]
            assert names == [i.kind for i in plan if site in sites_of(i, n_layers)]
            assert sum(e.basis.shape[0] for e in here if e.probe_column >= 0) == max(
                (e.probe_column + e.basis.shape[0] for e in here if e.probe_column >= 0), default=0
            )
        gates = {id(i.when) for i in plan if i.when is not None and i.when.latched}
        assert len({e.gate_state for e in entries if e.kind == EntryKind.LATCH}) >= len(gates)

    def test_a_gate_that_several_interventions_share_is_decided_once(self):
        gate = fs.Gate(V, latched=True, layer=0, at="resid_pre")
        plan = fs.Plan([fs.Add(V, layers=(0, 1), when=gate), fs.Ablate(V, layers=1, when=gate)])
        entries = compile_plan(plan, 2, 8)
        assert [e.kind for e in entries].count(EntryKind.LATCH) == 1


class TestJson:
    @hypothesis.settings(parent=hypothesis.settings(), max_examples=200)
    @hypothesis.given(plan=plans(8, 2), indent=st.sampled_from([None, 2]), inline=st.booleans())
    def test_comes_back_equal(self, plan, indent, inline):
        text = plan.to_json(inline=inline, indent=indent)
        back = fs.Plan.from_json(text)
        assert back == plan
        assert back.to_json(inline=inline, indent=indent) == text
        assert repr(back) == repr(fs.Plan.from_json(back.to_json())) and len(back) == len(plan)

    def test_every_field_comes_back(self):
        gate = fs.Gate(vector(), 0.5, kind="cosine", above=False, latched=True, layer=-2, at="resid_pre")
        plan = fs.Plan(
            [
                fs.Rotate(
                    V,
                    vector(),
                    12.5,
                    relative=True,
                    layers=(0, -1),
                    at=("resid_mid", "mlp_out"),
                    positions=slice(-3, 2),
                    when=gate,
                    keep_norm=True,
                    probe=True,
                ),
                fs.Clamp(V, low=-1.0, layers="all", positions=2),
                fs.Probe(randn(1, 2, 8), layers=[1]),
            ]
        )
        rotate, clamp, probe = fs.Plan.from_json(plan.to_json())
        assert (rotate.degrees, rotate.relative, rotate.layers, rotate.at) == (
            12.5,
            True,
            (0, -1),
            ("resid_mid", "mlp_out"),
        )
        assert (rotate.positions, rotate.keep_norm, rotate.probe) == ("[-3:2]", True, True)
        when = rotate.when
        assert (when.threshold, when.kind, when.above, when.latched, when.layer, when.at) == (
            0.5,
            "cosine",
            False,
            True,
            -2,
            "resid_pre",
        )
        assert (clamp.low, clamp.high, clamp.layers, clamp.positions) == (-1.0, None, "all", 2)
        assert torch.equal(probe.direction, randn(1, 2, 8)) and probe.probe and probe.layers == (1,)
        assert torch.equal(rotate.a, V) and torch.equal(rotate.b[1], vector()[1]) and rotate.b.at == "mlp_out"

    def test_trained_values_are_written_as_they_are(self):
        c, v = torch.tensor(2.5, requires_grad=True), V.clone().requires_grad_()
        (back,) = fs.Plan.from_json(fs.Plan([fs.Add(v, c, layers=0)]).to_json())
        assert back.coefficient == 2.5 and torch.equal(back.direction, V) and not back.requires_grad

    def test_vectors_by_name(self):
        v = vector()
        plan = fs.Plan([fs.Add(v, 2.0), fs.Ablate(vector(5))])
        text = plan.to_json({"refusal": v})
        assert json.loads(text)["interventions"][0]["direction"] == {"name": "refusal"}
        assert fs.Plan.from_json(text, {"refusal": v}) == plan
        assert next(iter(fs.Plan.from_json(text, {"refusal": v}))).direction is v
        with pytest.raises(
            ValueError, match=r"interventions\[0\].direction: no vector is registered as 'refusal'; known: other"
        ):
            fs.Plan.from_json(text, {"other": v})
        with pytest.raises(ValueError, match="known: none"):
            fs.Plan.from_json(text)

    def test_names_are_not_used_inline(self):
        v = vector()
        assert fs.Plan.from_json(fs.Plan([fs.Add(v)]).to_json({"refusal": v}, inline=True)) == fs.Plan([fs.Add(v)])


class TestPaths:
    def plan(self, folder, name="v.safetensors") -> fs.Plan:
        vector().save(folder / name)
        return fs.Plan([fs.Add(fs.SteeringVector.load(folder / name), 2.0)])

    def test_by_path_with_a_digest(self, tmp_path):
        plan = self.plan(tmp_path)
        written = json.loads(plan.to_json())["interventions"][0]["direction"]
        assert written["path"] == str(tmp_path / "v.safetensors") and len(written["sha256"]) == 64
        assert fs.Plan.from_json(plan.to_json()) == plan

    def test_relative_paths_start_in_the_folder(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        vector().save("v.safetensors")
        plan = fs.Plan([fs.Add(fs.SteeringVector.load("v.safetensors"))])
        text = plan.to_json()
        monkeypatch.chdir("/")
        assert fs.Plan.from_json(text, folder=tmp_path) == plan
        with pytest.raises((ValueError, FileNotFoundError), match=r"v\.safetensors"):
            fs.Plan.from_json(text)

    def test_another_file_under_the_path_is_refused(self, tmp_path):
        text = self.plan(tmp_path).to_json()
        vector(7).save(tmp_path / "v.safetensors")
        with pytest.raises(
            ValueError,
            match=r"interventions\[0\]\.direction: .*v\.safetensors is not the file .*differs.*remove \"sha256\"",
        ):
            fs.Plan.from_json(text)
        data = json.loads(text)
        del data["interventions"][0]["direction"]["sha256"]
        assert fs.Plan.from_json(json.dumps(data)) == fs.Plan([fs.Add(vector(7), 2.0)])

    def test_a_truncated_file_is_refused(self, tmp_path):
        text = self.plan(tmp_path).to_json()
        path = tmp_path / "v.safetensors"
        path.write_bytes(path.read_bytes()[:-5])
        with pytest.raises(ValueError, match=r"truncated|SHA-256"):
            fs.Plan.from_json(text)

    def test_a_vector_whose_file_became_another_is_not_written_as_that_file(self, tmp_path):
        """The plan must never come back with the vector that took the path since."""
        plan = self.plan(tmp_path)
        vector(7).save(tmp_path / "v.safetensors")
        try:
            text = plan.to_json()
        except ValueError as error:
            assert "v.safetensors" in str(error)
        else:
            assert fs.Plan.from_json(text) == plan

    @pytest.mark.parametrize("how", ["in_place", "trained", "replaced"])
    def test_a_vector_that_is_no_longer_what_its_file_holds_is_not_written_as_that_file(self, tmp_path, how):
        v = fs.SteeringVector({2: randn(5, 8).requires_grad_(how == "trained")}, at="resid_pre", provenance={"n": 1})
        v.save(tmp_path / "v.safetensors")
        assert "path" in json.loads(fs.Plan([fs.Add(v)]).to_json())["interventions"][0]["direction"]
        if how == "replaced":
            v = dataclasses.replace(v, at="mlp_out")
        else:
            with torch.no_grad():
                v[2].mul_(3)
        plan = fs.Plan([fs.Add(v, 2.0)])
        plan.save(tmp_path / "plan.json")
        again = fs.Plan.load(tmp_path / "plan.json")
        assert again == plan and again.interventions[0].direction.at == v.at


class TestRefused:
    def test_the_plan_changed_here_is_valid_as_it_stands(self):
        assert fs.Plan.from_json(text_of()) == fs.Plan([fs.Add(V, layers=0)])

    @pytest.mark.parametrize(
        ("text", "message"),
        NO_PLANS,
        ids=[
            "empty",
            "cut",
            "deep",
            "deep_inside",
            "list",
            "null",
            "no_format",
            "format",
            "no_interventions",
            "interventions_object",
            "more",
            "number",
            "kind",
            "kind_null",
            "kind_list",
            "kind_object",
        ],
    )
    def test_no_plan(self, text, message):
        with pytest.raises(ValueError, match=message):
            fs.Plan.from_json(text)

    def test_no_text(self):
        with pytest.raises(TypeError, match=r"JSON is a dict: expected a text; Plan\.load reads a file"):
            fs.Plan.from_json({"format": "faststeer.plan/1"})

    def test_a_file_is_named(self, tmp_path):
        (tmp_path / "prompts.txt").write_text("Hello")
        with pytest.raises(ValueError, match=r"prompts\.txt: the plan is no valid JSON"):
            fs.Plan.load(tmp_path / "prompts.txt")

    @pytest.mark.parametrize(
        ("fields", "message"),
        FIELDS,
        ids=lambda value: json.dumps(value)[:60] if isinstance(value, dict) else "",
    )
    def test_fields(self, fields, message):
        """Always with the place in the plan."""
        with pytest.raises(ValueError, match=rf"interventions\[0\].*{message}"):
            fs.Plan.from_json(text_of(**fields))

    @pytest.mark.parametrize("twice", ['"format": "x", "format"', '"coefficient": 1, "coefficient"'])
    def test_a_field_twice(self, twice):
        """JSON's readers take the last one in silence."""
        name = twice.rpartition('"')[0].rpartition('"')[2]
        text = text_of(coefficient=9.0).replace(f'"{name}"', twice, 1)
        with pytest.raises(fs.FormatError, match=f"'{name}' is given twice in one object"):
            fs.Plan.from_json(text)

    def test_layers_without_end(self):
        """A range is counted, not listed."""
        for layers in (range(10**12), iter(int, 1)):
            with pytest.raises(ValueError, match="more than 10,000 layers"):
                fs.Add(V, layers=layers)

    @pytest.mark.parametrize(
        ("fields", "message"),
        GATE_FIELDS,
        ids=json.dumps,
    )
    def test_fields_of_a_gate(self, fields, message):
        direction = json.loads(text_of())["interventions"][0]["direction"]
        with pytest.raises(ValueError, match=rf"interventions\[0\]\.when: .*{message}"):
            fs.Plan.from_json(text_of(when={"direction": direction, **fields}))

    def test_a_file_that_is_not_there(self):
        with pytest.raises((ValueError, FileNotFoundError), match=r"nowhere\.safetensors"):
            fs.Plan.from_json(text_of(direction={"path": "nowhere.safetensors"}))

    def test_missing_direction(self):
        data = json.loads(text_of())
        del data["interventions"][0]["direction"]
        with pytest.raises(ValueError, match=r"interventions\[0\]: Add needs 'direction'"):
            fs.Plan.from_json(json.dumps(data))

    @hypothesis.settings(parent=hypothesis.settings(), max_examples=150)
    @hypothesis.given(
        edits=st.lists(
            st.tuples(st.floats(0, 1, exclude_max=True), st.sampled_from(list('{}[]":,0-ae\\ntrue.'))), max_size=4
        ),
        cut=st.none() | st.floats(0, 1),
    )
    def test_damaged_text_gives_a_plan_or_a_value_error(self, edits, cut):
        gate = fs.Gate(V, 0.5, latched=True, layer=0, at="resid_pre")
        text = fs.Plan(
            [fs.Add(V, layers=[0, 1], when=gate, keep_norm=True), fs.Clamp(vector(), low=1.0, positions="[-3:2]")]
        ).to_json()
        skeleton = [
            i for i, c in enumerate(text) if i < 60 or i > len(text) - 400 or c in '{}":,'
        ]  # little of it in the base64
        letters = list(text)
        for where, letter in edits:
            letters[skeleton[int(where * len(skeleton))]] = letter
        damaged = "".join(letters[: None if cut is None else int(cut * len(letters))])
        try:
            plan = fs.Plan.from_json(damaged)
        except ValueError as error:
            assert str(error)
        else:
            assert fs.Plan.from_json(plan.to_json()) == plan


class TestSchema:
    """The JSON Schema accepts what the reader accepts, and refuses what the reader refuses without opening a file."""

    def validator(self) -> jsonschema.Draft202012Validator:
        jsonschema.Draft202012Validator.check_schema(plan_schema())
        return jsonschema.Draft202012Validator(plan_schema())

    @hypothesis.given(plan=plans(8, 3))
    def test_what_is_written_is_valid(self, plan):
        self.validator().validate(json.loads(plan.to_json()))

    @pytest.mark.parametrize("path", sorted((ROOT / "examples" / "plans").glob("*.json")), ids=lambda path: path.name)
    def test_the_examples_are_valid(self, path):
        self.validator().validate(json.loads(path.read_text()))

    @pytest.mark.parametrize("text", [text for text, _ in NO_PLANS])
    def test_no_plan(self, text):
        try:
            data = json.loads(text)
        except (ValueError, RecursionError):
            return  # no JSON
        assert not self.validator().is_valid(data)

    def test_fields(self):
        """But NaN, which JSON lacks, and what takes a look at registered names, files or the tensors' content."""
        accepted = [f for f, _ in FIELDS if self.validator().is_valid(json.loads(text_of(**f)))]
        content = [next(iter(f["direction"])) for f in accepted if "direction" in f]
        assert content == ["path", "vector", "tensor"]
        others = [f for f in accepted if "direction" not in f]
        assert others[1:] == [{"when": {"direction": {"name": "x"}}}] and str(others[0]) == "{'coefficient': nan}"

    @pytest.mark.parametrize("fields", [fields for fields, _ in GATE_FIELDS], ids=str)
    def test_fields_of_a_gate(self, fields):
        direction = json.loads(text_of())["interventions"][0]["direction"]
        valid = self.validator().is_valid
        assert valid(json.loads(text_of(when={"direction": direction, "latched": True, "layer": 0})))
        assert not valid(json.loads(text_of(when={"direction": direction, **fields})))

    @pytest.mark.parametrize(
        "fields",
        [{"positions": p} for p in ("all", "last", "[-5:]", "[:-1]", "-5:", 3, -1)]
        + [{"layers": n} for n in (3, -1, "all", None, [0, 5])]
        + [{"at": at} for at in ("mlp_out", ["resid_pre", "mlp_out"], None)]
        + [{"when": None}, {"coefficient": 0}, {"keep_norm": True}, {"probe": False}],
        ids=str,
    )
    def test_both_accept(self, fields):
        self.validator().validate(json.loads(text_of(**fields)))
        fs.Plan.from_json(text_of(**fields))

    @pytest.mark.parametrize(
        "fields",
        [
            {"type": "Clamp"},
            {"type": "Clamp", "low": None, "high": None},
            {"type": "Probe", "positions": "last"},
            {"type": "Probe", "keep_norm": True},
            {"type": "Rotate"},
            {"type": "Ablate", "coefficient": 1.0},
        ],
        ids=str,
    )
    def test_what_a_kind_does_not_take(self, fields):
        assert not self.validator().is_valid(json.loads(text_of(**fields)))
        with pytest.raises(fs.FormatError):
            fs.Plan.from_json(text_of(**fields))

    def test_every_field_is_described(self):
        for name, kind in plan_schema()["$defs"].items():
            for field, schema in kind.get("properties", {}).items():
                assert field == "type" or "description" in schema, (name, field)


class TestPlansFor:
    def test_one_for_all_or_one_for_each(self):
        plan, add = fs.Plan([fs.Add(V, layers=0)]), fs.Add(V, layers=1)
        assert plans_for(3, None) == [None] * 3
        assert plans_for(2, plan) == [plan, plan] and plans_for(None, plan) == [plan]
        assert plans_for(3, [plan, None, plan]) == plans_for(None, iter([plan, None, plan])) == [plan, None, plan]
        assert plans_for(2, add) == plans_for(2, [add, add]) == plans_for(None, [add, add]) == [fs.Plan([add])] * 2
        assert len({id(each) for each in plans_for(3, add)}) == 1

    @pytest.mark.parametrize(
        ("n", "plans", "error", "message"),
        [
            (2, [fs.Plan()], ValueError, "1 plans for 2 prompts"),
            (None, [], ValueError, "list of plans is empty"),
            (0, [], ValueError, "list of plans is empty"),
            (2, "plan", TypeError, "plans is a str: expected a Plan or a list"),
            (2, 3, TypeError, "plans is a int"),
            (None, None, TypeError, "plans is a NoneType"),
            (2, [None, "plan"], TypeError, r"plans\[1\] is a str: expected a Plan, an intervention, or None"),
        ],
    )
    def test_refused(self, n, plans, error, message):
        with pytest.raises(error, match=message):
            plans_for(n, plans)
