"""Descriptions of sweeps: what they expand to, and errors that name the line."""

from __future__ import annotations

import json

import pytest
import torch

import faststeer as fs
import faststeer.demo
from faststeer.evaluate.sweep import Sweep, SweepPrompt, load_sweep, random_plan

GENERATOR = torch.Generator().manual_seed(0)
VECTOR = fs.SteeringVector({layer: torch.randn(8, generator=GENERATOR) for layer in range(3)}, at="resid_pre")


@pytest.fixture
def folder(tmp_path):
    VECTOR.save(tmp_path / "v.safetensors")
    (tmp_path / "plan.json").write_text(fs.Plan([fs.Ablate(torch.ones(8), layers="all")]).to_json())
    (tmp_path / "p.jsonl").write_text('{"id": "a", "prompt": "One?", "tag": "t"}\n{"id": "b", "prompt": "Two?"}\n')
    return tmp_path


def write(folder, text, name="sweep.yaml"):
    path = folder / name
    path.write_text(text)
    return path


WHOLE = """\
model: demo
prompts:
  - What is it?
  - {prompt: 'Why?', id: why, tag: q}
  - {file: p.jsonl}
  - {demo: harmless, limit: 2, tag: d}
vectors:
  mine: v.safetensors
plans:
  wipe: plan.json
layers: [0, [1, 2]]
coefficients: {from: -1, to: 1, steps: 5}
controls: 2
judges: [refusal, {judge: repetition, n: 3}]
text: false
max_new_tokens: 8
seed: 3
"""


def test_a_whole_description(folder):
    sweep = load_sweep(write(folder, WHOLE))
    assert [(p.id, p.tag) for p in sweep.prompts] == [
        ("0", ""), ("why", "q"), ("a", "t"), ("b", ""), ("harmless-0", "d"), ("harmless-1", "d"),
    ]  # fmt: skip
    assert sweep.coefficients == (-1, -0.5, 0, 0.5, 1)
    names = [setting.name for setting in sweep.settings]
    assert len(set(names)) == len(names) == 1 + 3 * 2 * 4 + 3
    assert names[0] == "unsteered" and "mine L1,2 c-0.5" in names and "mine~random1 L0 c1" in names
    assert names[-3:] == ["wipe", "wipe~random0", "wipe~random1"]
    by_name = {setting.name: setting for setting in sweep.settings}
    assert by_name["mine L1,2 c-0.5"].plan == fs.Plan(
        [fs.Add(fs.SteeringVector.load(folder / "v.safetensors"), -0.5, layers=[1, 2])]
    )
    control = by_name["mine~random1 L0 c1"].plan.interventions[0].direction
    assert torch.allclose(control[0].norm(), VECTOR[0].norm())
    assert not torch.allclose(control[0], by_name["mine~random0 L0 c1"].plan.interventions[0].direction[0])


def test_json_is_yaml_also_with_tabs(folder):
    data = {"prompts": ["a?"], "vectors": {"v": "v.safetensors"}, "coefficients": [1e3, 5]}
    sweep = load_sweep(write(folder, json.dumps(data, indent="\t"), "s.json"))
    assert sweep.coefficients == (1000, 5)
    assert load_sweep(
        write(folder, "prompts: ['a?']\nvectors: {v: v.safetensors}\ncoefficients: [1e-3]")
    ).coefficients == (0.001,)


def test_the_defaults_have_controls_and_every_layer(folder):
    sweep = load_sweep(write(folder, "prompts: p.jsonl\nvectors: {v: v.safetensors}"))
    assert [s.name for s in sweep.settings] == [
        "unsteered",
        *(f"v{r} L{i} c1" for r in ("", "~random0") for i in range(3)),
    ]


GOOD = "prompts: [x]\nvectors: {v: v.safetensors}\n"
WRONG = [
    (GOOD + "coeficients: [1]", 3, "did you mean 'coefficients'"),
    (GOOD + "coefficients: [1, x]", 3, "no finite number"),
    (GOOD + "coefficients: [1, 1]", 3, "given twice"),
    (GOOD + "coefficients: {from: 0, to: 1}", 3, "from, to and steps"),
    (GOOD + "layers: [0, 9]", 3, "no direction for layer 9"),
    (GOOD + "layers: [0, -1]", 3, "whole numbers from 0"),
    (GOOD + "max_new_tokens: 0", 3, "from 1"),
    (GOOD + "top_p: 1.5", 3, "to 1"),
    (GOOD + "engine: sglang", 3, "expected one of faststeer, vllm"),
    (GOOD + "controls: some", 3, "no finite number"),
    (GOOD + "intervention: adding", 3, "add, ablate, clamp"),
    (GOOD + "seed: 1\nseed: 2", 4, "given twice"),
    (GOOD + "positions: [3", 3, "no valid YAML"),
    (GOOD + "judges: []", 3, "at least one judge"),
    (GOOD + "at: nowhere", 2, "nowhere"),
    ("prompts: [x]\nvectors:\n  a: v.safetensors\n  b: none.safetensors", 4, "there is no file"),
    ("prompts: [x]\nvectors:\n  a: p.jsonl", 3, "p.jsonl"),
    ("prompts: [x]", 1, "no vector and no plan"),
    ("vectors: {v: v.safetensors}", 1, "no prompts"),
    ("vectors: {v: v.safetensors}\nprompts:\n- x\n- {prompt: y, id: 0}", 4, "prompts 0 and 1 have the same id '0'"),
    ("vectors: {v: v.safetensors}\nprompts:\n- {file: p.jsonl}\n- {file: p.jsonl}", 4, "same id 'a'"),
    ("vectors: {v: v.safetensors}\nprompts:\n- x\n- ' '", 4, "blank"),
    ("vectors: {v: v.safetensors}\nprompts:\n- x\n- {file: p.jsonl,\n   limt: 3}", 5, "did you mean 'limit'"),
    ("vectors: {v: v.safetensors}\nprompts:\n- {demo: nice}", 3, "harmful, harmless"),
    ("- a", 1, "expected an object"),
    ("", 1, "expected an object"),
]


@pytest.mark.parametrize(("text", "line", "said"), WRONG)
def test_what_is_wrong_is_said_with_its_line(folder, text, line, said):
    path = write(folder, text)
    with pytest.raises(ValueError) as error:
        load_sweep(path)
    assert f"{path}, line {line}: " in str(error.value)
    assert said in str(error.value)


def test_other_files_are_refused(folder):
    with pytest.raises(ValueError, match="line 2: no valid JSON"):
        load_sweep(write(folder, '{"prompts":\n oops}', "s.json"))
    with pytest.raises(ValueError, match=r"\.yaml, \.yml or \.json"):
        load_sweep(write(folder, "x", "s.txt"))
    with pytest.raises(FileNotFoundError):
        load_sweep(folder / "none.yaml")
    (folder / "p.jsonl").write_text('{"id": "a", "prompt": "One?"}\n{"id": "a", "prompt": "Two?"}\n')
    with pytest.raises(ValueError, match="line 2: prompts: prompts 0 and 1 have the same id 'a'"):
        load_sweep(write(folder, "vectors: {v: v.safetensors}\nprompts: p.jsonl"))


def test_in_python():
    with pytest.raises(ValueError, match="prompts 0 and 1 have the same id 'a'"):
        Sweep([SweepPrompt("a", "x"), SweepPrompt("a", "y")], vectors={"v": VECTOR})
    with pytest.raises(ValueError, match="expected a SteeringVector"):
        Sweep(["x"], vectors={"v": torch.ones(8)})
    clamp = Sweep(["x"], vectors={"v": VECTOR}, coefficients=[0, 2], intervention="clamp", controls=0)
    assert [s.name for s in clamp.settings][:3] == ["unsteered", "v L0 c0", "v L0 c2"], "clamping to 0 is no baseline"


def test_every_change_that_matters_changes_the_identity():
    def sweep(**changes):
        return Sweep(**{"prompts": ["x", "y"], "vectors": {"v": VECTOR}, "coefficients": [0, 1.0]} | changes)

    other = fs.SteeringVector({layer: VECTOR[layer] * (1 + 1e-6) for layer in VECTOR.layers}, at="resid_pre")
    changed = [
        {"prompts": ["x", "z"]}, {"prompts": ["y", "x"]}, {"vectors": {"v": other}}, {"vectors": {"w": VECTOR}},
        {"coefficients": [0, 1.1]}, {"layers": [0]}, {"positions": "last"}, {"at": "resid_post"}, {"controls": 2},
        {"intervention": "ablate"}, {"system": "s"}, {"max_new_tokens": 63}, {"temperature": 0.5}, {"seed": 1},
        {"top_p": 0.5}, {"top_k": 3}, {"engine": "vllm"},
    ]  # fmt: skip
    found = [sweep(**change).identity("m") for change in ({}, *changed)] + [sweep().identity("other model")]
    assert len(set(found)) == len(found)
    same = [{}, {"judges": ["length"]}, {"text": []}, {"coefficients": [1.0]}]
    assert len({sweep(**change).identity("m") for change in same}) == 1, "these change no answer"


def test_a_random_plan_has_the_lengths_and_nothing_else():
    bare = torch.randn(2, 8, generator=GENERATOR)
    gate = fs.Gate(torch.ones(8))
    plan = fs.Plan([fs.Add(VECTOR, 2.0, layers=1, when=gate), fs.Ablate(bare, layers="all"), fs.Ablate(bare, layers=0)])
    random = random_plan(plan, 4)
    add, ablate, again = random
    assert torch.allclose(add.direction[1].norm(), VECTOR[1].norm()) and not torch.allclose(add.direction[1], VECTOR[1])
    assert torch.allclose(ablate.direction.norm(dim=-1), bare.norm(dim=-1)) and torch.equal(
        ablate.direction, again.direction
    )
    assert add.when is gate and add.coefficient == 2.0 and random == random_plan(plan, 4) != random_plan(plan, 5)
