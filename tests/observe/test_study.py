"""The study at a tiny scale: its numbers once more by the plain functions; interrupted, killed and gone on with."""

from __future__ import annotations

import contextlib
import json
import random
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from importlib.resources import files

import pytest
import torch
from typer.testing import CliRunner

import faststeer as fs
from faststeer import behaviours, observe
from faststeer.artefacts import ArtefactStore, digest
from faststeer.cli import app
from faststeer.evaluate import complete, is_refusal
from faststeer.observe import study
from faststeer.observe.study import answers
from faststeer.observe.study.answers import StudyAnswers
from faststeer.observe.study.job import Job
from faststeer.observe.study.vectors import Finder

TINY = {
    "methods": ("dim", "ntp"),
    "layer": 3,
    "position": -1,
    "steps": 2,
    "n_patch": 2,
    "n_faithful": 1,
    "n_test": 2,
    "n_utility": 2,
    "quadrature": 2,
    "shares": (0.1, 1.0),
    "sparsities": (0.5,),
    "controls": 1,
    "max_new_tokens": 12,
}
COMMAND = ["observe", "--method", "dim,ntp", "--layer", "3", "--position", "-1", "--steps", "2", "--patched", "2"]
COMMAND += [
    "--tried",
    "1",
    "--prompts",
    "2",
    "--utility",
    "2",
    "--points",
    "2",
    "--shares",
    "0.1,1",
    "--sparsities",
    "0.5",
]
COMMAND += ["--controls", "1", "--max-new-tokens", "12"]


@pytest.fixture(scope="module")
def demo():
    return *fs.demo.load(), fs.demo.behaviour("refusal")


@pytest.fixture(scope="module")
def whole(demo, tmp_path_factory):
    """An uninterrupted study: (folder, result)."""
    folder = tmp_path_factory.mktemp("study")
    return folder, study.run(*demo, folder, study.Settings(**TINY), name="demo")


def parts(folder):
    """Finished parts: {file name: when it was written}."""
    files = (path for path in (folder / "parts").glob("[!.]*-*") if path.suffix != ".checkpoint")
    return {path.name: path.stat().st_mtime_ns for path in files}


def without(whole, folder, gone):
    """A study in `folder` that has all parts of the whole one but those that `gone(number, name)` says."""
    shutil.copytree(whole[0] / "parts", folder / "parts")
    for number, name in enumerate(sorted(parts(folder))):
        if gone(number, name):
            (folder / "parts" / name).unlink()
    return parts(folder)


def vector(folder, name):
    (path,) = (folder / "parts").glob(f"{name}-*.safetensors")
    return fs.SteeringVector.load(path)


# Its numbers ----------------------------------------------------------------------------------------------------------


def test_vectors_are_those_of_the_methods(demo, whole):
    model, tokenizer, behaviour = demo
    folder, result = whole
    dim, ntp = (vector(folder, name) for name in TINY["methods"])
    (layer,) = dim.layers
    assert result["layer"] == layer and result["position"] == -1 and ntp.layers == (layer,)
    own = fs.extract.dim(model, tokenizer, behaviour.train.positive, behaviour.train.negative)
    torch.testing.assert_close(dim[layer], own[layer], rtol=1e-5, atol=1e-5)
    assert float(ntp[layer].norm()) == pytest.approx(float(dim[layer].norm()), rel=1e-6)


def test_layer_and_token_are_chosen_on_validation_prompts(demo, tmp_path):
    settings = study.Settings(n_select=2, max_new_tokens=12)
    dim = Finder(Job(*demo, ArtefactStore(tmp_path, "base"), 32, False, settings, 4)).dim
    scores = dim.provenance["selection"]["scores"]
    assert dim.layers == (scores["layer"],) and dim.provenance["position"] == scores["position"]
    assert scores["induce"]["n"] == scores["suppress"]["n"] == 2 and 0 <= scores["both"] <= 1


def test_utility_is_that_of_single_texts_and_questions(demo, whole):
    """Texts one by one, and each choice by itself, by the model's plain forward pass."""
    model, tokenizer, _ = demo
    folder, result = whole
    dim = vector(folder, "dim")
    rows = {(row["vector"], row["context"], row["side"]): row for row in result["utility"]}
    assert len(rows) == 2 * (2 + 2 * 6) == len(result["utility"])
    data = files("faststeer.evaluate") / "data"
    texts = (data / "neutral.txt").read_text().splitlines()[:2]
    questions = [json.loads(line) for line in (data / "knowledge.jsonl").read_text().splitlines()[:2]]

    def log_probability(context, ids):
        tokens = torch.tensor([context + ids])
        found = model(tokens).logits[0].double().log_softmax(-1)
        return float(found[len(context) - 1 : -1].gather(1, tokens[0, len(context) :, None]).sum())

    contexts = {"steered": fs.steer, "unsteered": lambda *_: contextlib.nullcontext()}
    contexts |= {what: partial(observe.freeze, what=what) for what in ("qk", "ov")}
    contexts |= {what: partial(observe.ablate, what=what) for what in ("svv", "mlp")}
    losses, right = {}, {}
    for context, within in contexts.items():
        for side, sign in (("induce", 1.0), ("suppress", -1.0)):
            with torch.no_grad(), within(model, fs.Plan([fs.Add(dim, sign)])):
                encoded = [
                    [tokenizer.bos_token_id, *tokenizer(text, add_special_tokens=False)["input_ids"]] for text in texts
                ]
                losses[context, side] = [-log_probability(ids[:1], ids[1:]) / (len(ids) - 1) for ids in encoded]
                right[context, side] = []
                for question in questions:
                    asked = [{"role": "user", "content": question["question"]}]
                    ids = tokenizer.apply_chat_template(asked, add_generation_prompt=True, return_dict=True)[
                        "input_ids"
                    ]
                    answers = [tokenizer(c, add_special_tokens=False)["input_ids"] for c in question["choices"]]
                    likely = [log_probability(list(ids), answer) for answer in answers]
                    chosen = question["choices"][likely.index(max(likely))]
                    right[context, side].append(chosen == question["answer"])
    for context, side in losses:
        row = rows["dim", context, side]
        assert row["loss"]["mean"] == pytest.approx(sum(losses[context, side]) / 2, rel=1e-5)
        assert row["right"]["rate"] == sum(right[context, side]) / 2
        change = [a - b for a, b in zip(losses[context, side], losses["steered", side], strict=True)]
        if context == "steered":
            assert row["loss_change"] is None
        else:
            assert row["loss_change"]["mean"] == pytest.approx(sum(change) / 2, rel=1e-3, abs=1e-6)
    assert rows["none", "unsteered", "induce"]["loss"] == rows["dim", "unsteered", "suppress"]["loss"]
    assert rows["random", "steered", "induce"]["loss"] != rows["dim", "steered", "induce"]["loss"]


def test_answers_are_counted(demo, whole):
    model, tokenizer, behaviour = demo
    folder, result = whole
    dim = vector(folder, "dim")
    rows = {(row["vector"], row["context"], row["side"]): row for row in result["answers"]}
    assert len(rows) == 2 * (2 + 2 * 5) == len(result["answers"])
    for side, sign in (("induce", 1), ("suppress", -1)):
        prompts = getattr(behaviour.test, side)[:2]
        plan = fs.Plan([fs.Add(dim, float(sign))])
        said = {"unsteered": complete(model, tokenizer, prompts, max_new_tokens=12)}
        said["steered"] = complete(model, tokenizer, prompts, plan, max_new_tokens=12)
        for what in ("qk", "ov"):
            within = partial(observe.freeze, what=what)
            said[what] = complete(model, tokenizer, prompts, plan, max_new_tokens=12, within=within)
        for what in ("svv", "mlp"):
            within = partial(observe.ablate, what=what)
            said[what] = complete(model, tokenizer, prompts, plan, max_new_tokens=12, within=within)
        shown = {context: [is_refusal(text) == (sign > 0) for text in texts] for context, texts in said.items()}
        for context, verdicts in shown.items():
            row = rows["none" if context == "unsteered" else "dim", context, side]
            assert row["shown"]["rate"] == pytest.approx(sum(verdicts) / 2) and row["shown"]["n"] == 2
            assert row["shown"]["low"] <= row["shown"]["rate"] <= row["shown"]["high"]
            assert row["example"] == said[context][0]
            if context not in ("unsteered", "steered"):
                assert row["change"]["mean"] == pytest.approx((sum(verdicts) - sum(shown["steered"])) / 2)


def test_circuits_are_those_of_all_examples_patched_at_once(demo, whole):
    """Folds are pooled, so that they change nothing but the order of sums."""
    model, tokenizer, behaviour = demo
    folder, result = whole
    dim = vector(folder, "dim")
    sets = {}
    for split, n in (("train", 2), ("test", 1)):
        sets[split] = []
        for side, sign in (("induce", 1), ("suppress", -1)):
            prompts = getattr(getattr(behaviour, split), side)[:n]
            sets[split] += observe.examples(
                model,
                tokenizer,
                prompts,
                fs.Plan([fs.Add(dim, float(sign))]),
                changed=lambda base, steered, sign=sign: (
                    (is_refusal(steered), is_refusal(base)) == (sign > 0, sign < 0)
                ),
                max_new_tokens=12,
            )
    scores = observe.patch(model, sets["train"], steps=2)
    found = result["patching"]["dim"]
    assert (found["n_positions"], found["n_edges"]) == (scores.n_positions, scores.graph.n_edges)
    assert found["steered"] == pytest.approx(scores.steered, rel=1e-5)
    assert found["top"][0]["score"] == pytest.approx(scores.top(1)[0][2], rel=1e-4)
    for row in found["kinds"]:
        of_kind = [r for r in range(scores.graph.n_receivers) if scores.graph.kind(r) == row["kind"]]
        share = float(scores.edges[:, of_kind].abs().sum() / scores.edges.abs().sum())
        assert row["value"] == pytest.approx(share, rel=1e-3) and row["edges"] == scores.graph.counts[row["kind"]]
    curves = {(r["vector"], r["circuit"], r["share"]): r for r in result["faithfulness"]}
    circuit = observe.select(scores, 0.1)
    reached = observe.faithfulness(model, sets["test"], [circuit, circuit.complement()])
    for which, value in zip(("own", "complement"), reached.values.tolist(), strict=True):
        assert curves["dim", which, 0.1]["value"] == pytest.approx(value, abs=1e-4)
    assert curves["dim", "own", 1.0]["value"] == pytest.approx(1, abs=1e-4)
    assert curves["dim", "complement", 1.0]["value"] == pytest.approx(0, abs=1e-4)
    assert {which for v, which, _ in curves if v == "dim"} == {"own", "complement", "random 0", "ntp"}


def test_overlaps_tokens_and_sparsity(demo, whole):
    model, tokenizer, behaviour = demo
    folder, result = whole
    dim, ntp = (vector(folder, name) for name in TINY["methods"])
    (layer,) = dim.layers
    (compared,) = (row for row in result["overlap"] if "intervals" in row)
    assert (compared["a"], compared["b"], compared["share"]) == ("dim", "ntp", 0.1)
    assert compared["cosine"] == pytest.approx(float(torch.cosine_similarity(dim[layer], ntp[layer], dim=0)), abs=1e-6)
    n, shared = sum(compared["edges"]), compared["shared"]
    assert compared["iou"] == pytest.approx(shared / (n - shared)) == compared["intervals"]["iou"]["value"]
    assert all(row["iou"] == 1 for row in result["overlap"] if row["share"] == 1)
    heads = result["tokens"]["dim"]["heads"]
    tops = observe.svv(model, dim).top_tokens(model, tokenizer, 10)
    assert heads and all(tops[head["layer"], head["head"]] == head["raises"] for head in heads)
    effects = [abs(head["effect"]["value"]) for head in heads]
    assert effects == sorted(effects, reverse=True)
    half = next(r for r in result["sparsity"] if (r["vector"], r["side"], r["rule"]) == ("dim", "induce", "magnitude"))
    direction = dim[layer].clone()
    direction[direction.abs().argsort()[:64]] = 0
    plan = fs.Plan([fs.Add(direction, 1.0, layers=layer, at="resid_pre")])
    texts = complete(model, tokenizer, behaviour.test.induce[:2], plan, max_new_tokens=12)
    assert half["rate"] == pytest.approx(sum(map(is_refusal, texts)) / 2)


# Interrupted, and gone on with ----------------------------------------------------------------------------------------


def same_as(whole, folder):
    return (folder / "observe.json").read_bytes() == (whole[0] / "observe.json").read_bytes()


def test_interrupted_it_goes_on_to_the_same_result(whole, tmp_path, monkeypatch):
    """Ctrl-C between parts and within one (what was being made is lost), with every third part still to be made."""
    before, made, part = without(whole, tmp_path, lambda number, _: number % 3 == 0), [], ArtefactStore._part

    def interrupted(self, name, path, read, write):
        if not path.is_file():
            made.append(path.name)
            if len(made) in (5, 9):
                raise KeyboardInterrupt
        return part(self, name, path, read, write)

    monkeypatch.setattr(ArtefactStore, "_part", interrupted)
    runner = CliRunner()
    for _ in range(2):
        stopped = runner.invoke(app, [*COMMAND, "--out", str(tmp_path)])
        assert stopped.exit_code == 130 and "The same command goes on" in " ".join(stopped.output.split())
        assert not (tmp_path / "observe.json").exists()
    done = runner.invoke(app, [*COMMAND, "--out", str(tmp_path)])
    assert done.exit_code == 0 and "QK frozen" in done.stdout, done.output
    assert same_as(whole, tmp_path)
    assert before.items() <= parts(tmp_path).items() and parts(tmp_path).keys() == parts(whole[0]).keys()
    assert len(made) == len(set(made)) + 2  # nothing was made twice but the two that were interrupted


def test_killed_it_goes_on_to_the_same_result(whole, tmp_path):
    there = without(whole, tmp_path, lambda _, name: name.startswith(("answers-ntp", "faithfulness")))
    program = [sys.executable, "-c", "from faststeer.cli import app; app()", *COMMAND, "--out", str(tmp_path)]
    seed = random.SystemRandom().randrange(2**32)
    new = random.Random(seed).randint(1, max(1, (len(parts(whole[0])) - len(there)) // 2))
    print(f"seed {seed}: killed after {new} parts")
    running = subprocess.Popen(program, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while running.poll() is None and len(parts(tmp_path)) < len(there) + new:
        time.sleep(0.01)
    running.send_signal(signal.SIGKILL)
    assert running.wait() == -signal.SIGKILL
    before = parts(tmp_path)
    assert len(there) + new <= len(before) < len(parts(whole[0])) and not (tmp_path / "observe.json").exists()
    done = CliRunner().invoke(app, [*COMMAND, "--out", str(tmp_path), "--json"])
    assert done.exit_code == 0, done.output
    assert before.items() <= parts(tmp_path).items()
    assert same_as(whole, tmp_path) and not [path for path in tmp_path.rglob(".*.part")]
    assert json.loads(done.stdout.strip().splitlines()[-1]) == whole[1]
    page = (tmp_path / "observe.html").read_text(encoding="utf-8")
    assert page.startswith("<!doctype html>") and "default-src 'none'" in page


def test_a_changed_setting_costs_what_depends_on_it(demo, whole):
    folder, result = whole
    before = parts(folder)
    other = study.run(*demo, folder, study.Settings(**TINY | {"n_test": 1}), name="demo")
    new = {name.rsplit("-", 1)[0] for name in parts(folder).keys() - before.keys()}
    assert new and all(name.startswith(("answers-", "sparsity-")) for name in new)
    assert other["patching"] == result["patching"] and other["n_prompts"] == {"induce": 1, "suppress": 1}


def test_damaged_parts_are_made_again(tmp_path):
    kept = ArtefactStore(tmp_path, "base")
    assert kept.json("one", [1], lambda: {"a": (1, 2)}) == {"a": [1, 2]}
    path = kept.path("one", [1], ".json")
    path.write_text('{"a": [1,')
    assert ArtefactStore(tmp_path, "base").json("one", [1], lambda: {"a": 3}) == {"a": 3}
    assert ArtefactStore(tmp_path, "base").json("one", [1], lambda: pytest.fail("it is there")) == {"a": 3}
    assert ArtefactStore(tmp_path, "other").path("one", [1], ".json") != path != kept.path("one", [2], ".json")
    with pytest.raises(TypeError, match="no digest"):
        digest(object())


# What cannot be made --------------------------------------------------------------------------------------------------


def test_a_vector_that_changes_nothing_is_said_so(tmp_path):
    more = ["--out", str(tmp_path), "--method", "dim", "--coefficient", "0.001", "--prompts", "1"]
    done = CliRunner().invoke(app, [*COMMAND, *more])
    assert done.exit_code == 3 and "Left out: dim, induce, train prompts" in done.output
    result = json.loads((tmp_path / "observe.json").read_text())
    assert result["patching"] == {} and result["faithfulness"] == result["overlap"] == result["sparsity"] == []
    assert "nothing to explain" in result["without_examples"]["train"]["dim"]["induce"]
    assert result["tokens"]["dim"]["heads"][0]["effect"] is None  # by length, as nothing was patched
    assert "no examples among the train prompts" in (tmp_path / "observe.html").read_text(encoding="utf-8")


def test_without_pairs_what_the_difference_in_means_makes_it_say_is_taught(demo, tmp_path):
    model, tokenizer, behaviour = demo
    train = behaviour.train
    bare = behaviours.of_prompts("refusal", train.positive[:5], train.negative[:5])
    finder = Finder(Job(model, tokenizer, bare, ArtefactStore(tmp_path, "base"), 32, False, study.Settings(**TINY), 4))
    assert len(finder.pairs) > 3 and {pair["sign"] for pair in finder.pairs} == {1, -1}
    for pair in finder.pairs:
        assert is_refusal(pair["chosen"]) == (pair["sign"] > 0) != is_refusal(pair["rejected"])


def test_attention_that_cannot_be_frozen_is_left_out(demo, tmp_path, monkeypatch):
    def refused(model, plans):
        raise ValueError("no exchangeable attention")

    monkeypatch.setitem(answers.CONTEXTS, "qk", refused)
    job = Job(*demo, ArtefactStore(tmp_path, "base"), 32, False, study.Settings(**TINY | {"n_test": 1}), 4)
    dim = Finder(job).dim
    table = StudyAnswers(job).table({"dim": dim}, fs.extract.random_like(dim, 0))
    assert table["skipped"] == {"qk": "no exchangeable attention"}
    assert [row["context"] for row in table["rows"]][4::2] == ["steered", "ov", "svv", "mlp"]


@pytest.mark.parametrize(
    ("more", "what"),
    [
        ({"methods": ("dim", "magic")}, r"unknown method\(s\) magic"),
        ({"methods": ()}, "none"),
        ({"coefficient": 0.0}, "positive"),
        ({"metric": "accuracy"}, "metric"),
        ({"n_test": 0}, "n_test is 0"),
        ({"folds": 0}, "folds is 0"),
        ({"steps": 0}, "steps is 0"),
        ({"seed": -1}, "seed"),
        ({"position": 0}, "position"),
        ({"shares": (0.0, 0.1)}, "shares"),
        ({"sparsities": (1.0,)}, "sparsities"),
        ({"compared": 0.0}, "compared"),
    ],
)
def test_bad_settings_are_refused(more, what):
    with pytest.raises(ValueError, match=what):
        study.Settings(**TINY | more)


def test_bad_commands(tmp_path):
    runner = CliRunner()
    for words, code, what in (
        (["--method", "magic"], 1, "unknown method"),
        (["--shares", "some"], 2, "--shares"),
        (["--behaviour", "missing.json"], 1, "no behaviour"),
        (["--layer", "9"], 1, "layer"),
    ):
        done = runner.invoke(app, ["observe", "--out", str(tmp_path / "none"), "--position", "-1", *words])
        assert done.exit_code == code and what in done.output, done.output
        assert not (tmp_path / "none" / "observe.json").exists()
