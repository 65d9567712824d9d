"""Sweeps on the demo model: the answers of one setting at a time, kills, several processes, changes, bad stores."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import multiprocessing
import random
import shutil
import sqlite3
import time
from collections import namedtuple

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sweeps import contents, killed, rows_in, run_module, watched_by_hooks, work

import faststeer as fs
from faststeer.algebra import random_like
from faststeer.evaluate import Rate, complete
from faststeer.evaluate.judging import Function, Perplexity, make
from faststeer.evaluate.multiple_choice import Question, multiple_choice
from faststeer.evaluate.side_effects import NEUTRAL_TEXT, text_effects
from faststeer.evaluate.sweep import Store, StoreError, Sweep, SweepPrompt, entanglement, table
from faststeer.evaluate.sweep import run as sweep_run
from faststeer.evaluate.sweep import store as store_module
from faststeer.evaluate.sweep.projections import packed, unpacked
from faststeer.hf.batching import encode


@pytest.fixture(scope="module")
def demo():
    return fs.demo.load()


@pytest.fixture(scope="module")
def vector(demo):
    harmful, harmless = fs.demo.prompts("refusal", "train")
    return fs.extract.dim(*demo, harmful[:48], harmless[:48])


@pytest.fixture(autouse=True)
def small_units(monkeypatch):
    """Units of 16 rows, so that a small sweep has several."""
    monkeypatch.setattr(run_module, "CHUNK_BATCHES", 2)
    monkeypatch.setattr(run_module, "SETTINGS_PER_UNIT", 4)


def described(vector, **changes):
    prompts = [SweepPrompt(f"h{i}", p, "harmless") for i, p in enumerate(fs.demo.prompts("refusal", "test")[1][:6])]
    settings = {
        "prompts": prompts,
        "vectors": {"dim": vector},
        "layers": [3, [2, 4]],
        "coefficients": [0, 0.5, 1.0],
        "judges": ["refusal", "perplexity", "demo"],
        "text": NEUTRAL_TEXT[:1],
        "projections": 2,
        "max_new_tokens": 16,
    }
    return Sweep(**settings | changes)


@pytest.fixture(scope="module")
def finished(demo, vector, tmp_path_factory):
    """One sweep, run without any disturbance."""
    path = tmp_path_factory.mktemp("store") / "whole.db"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_module, "CHUNK_BATCHES", 2)
        patch.setattr(run_module, "SETTINGS_PER_UNIT", 4)
        work(described(vector), demo, path)
    return path


def test_every_answer_is_that_of_its_setting_alone(demo, vector, finished):
    sweep = described(vector)
    with Store(finished, create=False) as store:
        digest = store.run()
        assert [s["name"] for s in store.settings(digest)] == [s.name for s in sweep.settings]
        for number, setting in enumerate(sweep.settings):
            assert store.plan(digest, number) == setting.plan
            expected = complete(*demo, [p.prompt for p in sweep.prompts], setting.plan, max_new_tokens=16)
            found = [a for a in store.answers(digest) if a["setting"] == number]
            assert [a["text"] for a in found] == expected
            assert [a["prompt"] for a in found] == list(range(6)) and not any(a["error"] for a in found)
        assert store.runs()[0]["answers"] == store.runs()[0]["expected"] == 54 and store.runs()[0]["done"]


def test_the_table_is_what_judges_and_measures_say(demo, vector, finished):
    sweep = described(vector)
    asked = [p.prompt for p in sweep.prompts]
    perplexity, judge = Perplexity(*demo), make("demo")
    with Store(finished, create=False) as store:
        lines = {line.name: line for line in table(store)}
        said = store.answers(store.run())
        answers = {n: [a["text"] for a in said if a["setting"] == n] for n in range(len(sweep.settings))}
    scores = {}
    for number, setting in enumerate(sweep.settings):
        line = lines[setting.name]
        scores[setting.name] = [v.score for v in judge(asked, answers[number])]
        assert line.scores["demo"].rate == Rate(int(sum(scores[setting.name])), 6)
        expected = np.mean([v.score for v in perplexity(asked, answers[number])])
        assert line.scores["perplexity"].mean.mean == pytest.approx(expected, rel=1e-4)
        (effect,) = text_effects(*demo, [setting.plan], sweep.text)
        assert line.effects["kl"] == pytest.approx(effect.to_dict()["kl"], rel=1e-3, abs=1e-6)
        assert line.scores["perplexity"].rate is None and line.scores["demo"].n == 6
    steered, base, control = (lines[name] for name in ("dim L3 c1", "unsteered", "dim~random0 L3 c1"))
    assert steered.scores["demo"].over_unsteered.mean == pytest.approx(
        np.mean(scores["dim L3 c1"]) - np.mean(scores["unsteered"])
    )
    assert steered.scores["demo"].over_control.mean == pytest.approx(
        np.mean(scores["dim L3 c1"]) - np.mean(scores["dim~random0 L3 c1"])
    )
    assert base.scores["demo"].over_unsteered is None and control.scores["demo"].over_control is None


def test_projections_are_what_hooks_see(demo, vector, finished):
    """Every map in the store, against `generate` and a forward pass with hooks written here."""
    assert vector.at == "resid_pre"  # as the hooks here add it
    sweep = described(vector)
    with Store(finished, create=False) as store:
        digest = store.run()
        directions = store.directions(digest)
        found = list(store.projections(digest))
        answers = {(a["setting"], a["prompt"]): a["text"] for a in store.answers(digest)}
        alone = list(store.projections(digest, setting=3, prompt=1))
    assert [tuple(d.values()) for d in directions] == [
        (0, "dim", None, 3), (1, "dim", None, 2), (2, "dim", 0, 3), (3, "dim", 0, 2),
    ]  # fmt: skip
    used = {None: vector, 0: random_like(vector, sweep.seed)}
    expected = {(0, p, d) for p in range(2) for d in range(4)}
    for number, setting in enumerate(sweep.settings[1:], 1):
        place = [
            d["direction"] for d in directions if (d["control"], d["layer"]) == (setting.control, setting.layers[0])
        ]
        expected |= {(number, p, place[0]) for p in range(2)}
    assert {(row["setting"], row["prompt"], row["direction"]) for row in found} == expected
    assert len(found) == len(expected)
    for row in found:
        watched, setting = directions[row["direction"]], sweep.settings[row["setting"]]
        at = setting.layers
        add = [setting.coefficient * used[setting.control][layer] for layer in at]
        v = used[watched["control"]][watched["layer"]]
        prompt = sweep.prompts[row["prompt"]].prompt
        values, text = watched_by_hooks(demo, prompt, v, at, add, 16)
        assert text == answers[row["setting"], row["prompt"]]
        assert row["of_prompt"] == len(encode(demo[1], [prompt])[0]) and row["values"].shape == values.shape
        assert "".join(row["texts"][row["of_prompt"] :]).split() == text.split()
        # Half precision: 11 bits.
        torch.testing.assert_close(torch.from_numpy(row["values"]), values, rtol=2**-10, atol=1e-3)
    assert [(row["setting"], row["prompt"]) for row in alone] == [(3, 1)]


def test_projections_of_plans_and_of_none(demo, vector, tmp_path):
    """A plan is watched by the first direction of its first intervention; a bare tensor's has no layer."""
    tensor = torch.stack([vector[3], vector[2]])
    plans = {
        "wipe": fs.Plan([fs.Ablate(tensor, layers="all", at="resid_pre"), fs.Add(vector, 1.0, layers=4)]),
        "late": fs.Plan([fs.Add(vector, 1.0, layers=[-1, -2])]),
        "idle": fs.Plan([]),
    }
    sweep = Sweep(["How do I bake a cake?"], plans=plans, controls=0, judges=["length"], text=(), max_new_tokens=3)
    path = tmp_path / "s.db"
    digest = work(sweep, demo, path)
    with Store(path) as store:
        assert [tuple(d.values()) for d in store.directions(digest)] == [(0, "wipe", None, None), (1, "late", None, 4)]
        found = {(row["setting"], row["direction"]): row["values"] for row in store.projections(digest)}
    assert found.keys() == {(0, 0), (0, 1), (1, 0), (2, 1)}
    assert abs(found[1, 0][:4]).max() < 1e-5 < abs(found[0, 0][:4]).max()  # ablated; layer 4 adds to it again
    off = dataclasses.replace(sweep, projections=0, max_new_tokens=2)
    digest = work(off, demo, path)
    with Store(path) as store:
        assert not list(store.projections(digest)) and store.answers(digest)


def test_more_projections_later_leave_the_answers_alone(demo, vector, finished, tmp_path, monkeypatch):
    path = tmp_path / "copy.db"
    shutil.copy(finished, path)
    monkeypatch.setattr(run_module, "generator", None)
    work(described(vector, projections=100), demo, path)
    before, after = contents(finished), contents(path)
    assert before["answers"] == after["answers"] and set(before["projections"]) < set(after["projections"])
    assert len(after["projections"]) == 3 * len(before["projections"])  # six prompts instead of two


NUMBERS = st.floats(-(2.0**126), 2.0**126, width=32) | st.sampled_from([math.inf, -math.inf, math.nan])


@given(st.integers(1, 4).flatmap(lambda n: st.lists(st.lists(NUMBERS, min_size=n, max_size=n), min_size=1, max_size=3)))
def test_packed_projections(rows):
    values = np.array(rows, dtype=np.float32)
    scale, data = packed(values)
    found = unpacked(scale, data, values.shape[1])
    assert found.shape == values.shape and len(data) == 2 * values.size and math.log2(scale) % 1 == 0
    whole = np.isfinite(values)
    assert np.array_equal(found[~whole], values[~whole], equal_nan=True)
    # 11 bits of a number, and of the small ones what is left beside the largest.
    assert np.all(np.abs(found[whole] - values[whole]) <= np.abs(values[whole]) * 2.0**-11 + scale * 2.0**-25)
    again = unpacked(*packed(found), values.shape[1])
    assert np.array_equal(again, found, equal_nan=True)


def test_more_settings_than_slots(demo, vector, finished, tmp_path, monkeypatch):
    """Two slots, eight plans: rows wait for a slot, and every answer is what it was with a slot for each."""
    slots = []

    class Small(fs.Engine):
        def generate(self, prompts, plans, **options):
            slots.append((self._steering.capacity.slots, len({id(plan) for plan in plans if plan is not None})))
            return super().generate(prompts, plans, **options)

    capacity = fs.Capacity(slots=2, vectors=4, entries=2)
    monkeypatch.setattr(run_module, "generator", functools.partial(Small, capacity=capacity))
    monkeypatch.setattr(run_module, "CHUNK_BATCHES", 100)
    path = tmp_path / "slots.db"
    work(described(vector), demo, path)
    assert slots == [(2, 8)]
    with Store(path) as ours, Store(finished) as whole:
        assert ours.answers(ours.run()) == whole.answers(whole.run())


def test_three_kills_at_random_end_in_the_same_table(demo, vector, finished, tmp_path):
    path, sweep = tmp_path / "killed.db", described(vector)
    total, seed = rows_in(finished), random.SystemRandom().randrange(10**6)
    moments = random.Random(seed).sample(range(1, total - 20), 3)
    killed(sweep, demo, path, moments, total)
    work(sweep, demo, path)
    assert contents(path) == contents(finished), f"seed {seed}, killed at {moments}"


def test_a_unit_that_was_begun_is_asked_for_as_a_whole(demo, vector, finished, tmp_path, monkeypatch):
    """The same rows in the same order, so that they round alike; what was there is neither written nor counted anew."""
    asked, counted = [], []

    class Stop(Exception):
        pass

    class Spy(fs.Engine):
        def generate(self, prompts, plans, **options):
            asked.append((prompts, plans, options))
            return super().generate(prompts, plans, **options)

    def stopped(progress):
        counted.append(progress.answered)
        if progress.answered == 21:  # the second unit, of 16 rows, is under way
            raise Stop

    monkeypatch.setattr(run_module, "generator", Spy)
    path, sweep = tmp_path / "s.db", described(vector)
    with Store(path) as store, pytest.raises(Stop):
        sweep_run(sweep, *demo, store, max_batch=8, progress=stopped)
    with Store(path) as store:
        sweep_run(sweep, *demo, store, max_batch=8, progress=lambda progress: counted.append(progress.answered))
    assert len(asked) == 2 + 3 and asked[1] == asked[2] and len(asked[1][0]) == 16
    assert [n for n in counted if n] == sorted(n for n in counted if n) and counted[-1] == 54
    assert contents(path) == contents(finished)


def test_two_processes_share_a_store(demo, vector, finished, tmp_path):
    path, sweep = tmp_path / "shared.db", described(vector)
    fork = multiprocessing.get_context("fork")
    processes = [fork.Process(target=work, args=(sweep, demo, path)) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        assert process.exitcode == 0
    assert contents(path) == contents(finished)


def opened_together(path, barrier):
    barrier.wait()
    with Store(path):
        pass


def test_processes_make_a_store_at_the_same_moment(tmp_path):
    fork = multiprocessing.get_context("fork")
    for i in range(30):
        barrier = fork.Barrier(3)
        processes = [fork.Process(target=opened_together, args=(tmp_path / f"{i}.db", barrier)) for _ in range(3)]
        for process in processes:
            process.start()
        for process in processes:
            process.join()
            assert process.exitcode == 0


def test_a_finished_sweep_asks_the_model_nothing(demo, vector, finished, monkeypatch):
    monkeypatch.setattr(run_module, "generator", None)
    before = contents(finished)
    work(described(vector), demo, finished)
    assert contents(finished) == before


def test_another_judge_reads_the_answers_that_are_there(demo, vector, finished, tmp_path, monkeypatch):
    path = tmp_path / "copy.db"
    shutil.copy(finished, path)
    monkeypatch.setattr(run_module, "generator", None)
    work(described(vector, judges=["refusal", "perplexity", "demo", "length"]), demo, path)
    with Store(path) as store:
        assert len(store.runs()) == 1
        assert [judge["name"] for judge in store.judges(store.run())] == ["demo", "length", "perplexity", "refusal"]
        assert all(line.scores["length"].n == 6 for line in table(store))
    assert contents(path)["answers"] == contents(finished)["answers"]


def test_a_change_never_mixes_with_what_was_there(demo, vector, finished, tmp_path):
    path = tmp_path / "copy.db"
    shutil.copy(finished, path)
    with Store(path) as store:
        first = store.run()
        before = store.answers(first)
    changed = described(
        vector, layers=[3], coefficients=[0.6], max_new_tokens=4, controls=0, text=(), judges=["length"]
    )
    second = work(changed, demo, path)
    with Store(path) as store:
        assert first != second and store.run() == second and store.run(first[:8]) == first
        assert store.answers(first) == before
        assert {line.name for line in table(store)} == {"unsteered", "dim L3 c0.6"}
        with pytest.raises(StoreError, match="begin with 'zz'"):
            store.run("zz")


def test_parse_failures_errors_and_tags_are_counted(demo, vector, tmp_path):
    def moody(completion):
        return None if len(completion) % 2 else 1.0

    from faststeer.evaluate.judging import Function

    broken = fs.Plan([fs.Add(torch.full((128,), 3e38), 1e5, layers=0)])
    prompts = [SweepPrompt("a", "How do I bake a cake?", "x"), SweepPrompt("b", "How can I knit a scarf?", "y")]
    sweep = Sweep(prompts, plans={"broken": broken}, controls=0, judges=[Function(moody)], text=(), max_new_tokens=6)
    path = tmp_path / "s.db"
    digest = work(sweep, demo, path)
    with Store(path) as store:
        base, line = table(store)
        texts = [a["text"] for a in store.answers(digest) if a["setting"] == 0]
        assert base.scores["moody"].failures == sum(len(text) % 2 for text in texts)
        assert line.errors == 2 and line.scores["moody"].n == 0 and line.scores["moody"].mean is None
        assert "NaN" in next(a["error"] for a in store.answers(digest) if a["setting"] == 1)
        assert table(store, tag="x")[0].answers == 1


def test_what_moved_beside_what_was_meant(demo, vector, tmp_path):
    """Two behaviours of known changes: shares, intervals and the root mean square by hand."""
    prompts = [SweepPrompt(f"{tag}{i}", f"{tag} {i}", tag) for tag in ("long", "short", "even") for i in range(4)]
    judges = [Function(lambda text: len(text) > 5, name="long"), Function(lambda text: len(text) < 3, name="short")]
    sweep = Sweep(prompts, {"v": vector}, layers=[3], judges=judges, text=(), projections=0, controls=1)
    with Store(tmp_path / "s.db") as store:
        run = "r" * 64
        store.begin(run, 100, sweep, {})
        for n, judge in enumerate(judges):
            store.add(run, judges=[(str(n), judge.name, judge.shows, judge.identity)])
        # Unsteered, by the vector, by the random one: how many of four answers each judge says yes to.
        counts = {"long": (1, 4, 1), "short": (2, 0, 3), "even": (2, 2, 2)}
        for judge, tag in (("0", "long"), ("1", "short"), ("0", "even")):
            rows = [
                (judge, setting, prompt, None, float(i < counts[tag][setting]), None, None)
                for setting in range(3)
                for i, prompt in enumerate(n for n, p in enumerate(prompts) if p.tag == tag)
            ]
            store.add(run, verdicts=rows)
        asked = {"long": "long", "short": "short", "even": "long"}
        steered, control = entanglement(store, asked, {"v": "long"})
        assert [found.mean for found in steered.moved.values()] == [0.75, -0.5, 0.0]
        assert steered.meant == "long" and steered.effect == 0.75
        assert steered.entanglement == pytest.approx((0.25 / 2) ** 0.5)
        assert control.meant is None and control.effect is None
        assert control.entanglement == pytest.approx((0.25**2 / 3) ** 0.5)
        assert steered.moved["long"].low <= 0.75 <= steered.moved["long"].high
        assert json.loads(json.dumps(steered.to_dict()))["moved"]["short"]["n"] == 4
        refused = [
            ({"long": "none"}, {}, "has no judge 'none' that draws a line: it has long, short"),
            ({"odd": "long"}, {}, "no prompt of the sweep has the tag 'odd'"),
            (asked, {"w": "long"}, "no vector 'w'"),
            (asked, {"v": "odd"}, "'odd' is meant and has no judge"),
        ]
        for behaviours, meant, message in refused:
            with pytest.raises(ValueError, match=message):
                entanglement(store, behaviours, meant)


def test_questions_are_answered_under_every_setting(demo, vector, tmp_path):
    questions = (Question("How do I bake a cake?", ("I am sorry, but I cannot", "You bake a cake"), 1),)
    sweep = Sweep(
        ["How do I bake a cake?"], vectors={"dim": vector}, layers=[3], judges=["length"], text=(),
        questions=questions, max_new_tokens=2,
    )  # fmt: skip
    path = tmp_path / "s.db"
    work(sweep, demo, path)
    expected = multiple_choice(*demo, questions, [setting.plan for setting in sweep.settings])
    with Store(path) as store:
        assert [line.effects["accuracy"] for line in table(store)] == [found.accuracy.rate for found in expected]


# Wrong stores, full disks ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("version", [1, store_module.FORMAT + 1])
def test_a_store_of_another_version_is_refused_and_unchanged(finished, tmp_path, version):
    path = tmp_path / "s.db"
    shutil.copy(finished, path)
    with sqlite3.connect(path) as db:
        db.execute(f"PRAGMA user_version = {version}")
    db.close()
    before = path.read_bytes()
    with pytest.raises(StoreError, match="another version of faststeer"):
        Store(path)
    assert path.read_bytes() == before


def test_other_files_are_refused(tmp_path):
    path = tmp_path / "s.db"
    path.write_text("this is a text file of some length, and no database at all" * 40)
    with pytest.raises(StoreError, match="no store of sweeps"):
        Store(path)
    path.unlink()
    with sqlite3.connect(path) as db:
        db.execute("CREATE TABLE mine (a)")
    db.close()
    with pytest.raises(StoreError, match="something else"):
        Store(path)
    with pytest.raises(FileNotFoundError):
        Store(tmp_path / "none.db", create=False)
    with Store(tmp_path / "empty.db") as store, pytest.raises(StoreError, match="no sweep yet"):
        store.run()


def test_a_full_disk_loses_nothing(demo, vector, finished, tmp_path, monkeypatch):
    """SQLite's own limit of a file's pages gives its own error for a full disk."""
    path, sweep = tmp_path / "s.db", described(vector)
    opened = Store._open

    def limited(self):
        opened(self)
        self._db.execute("PRAGMA max_page_count = 19")

    with monkeypatch.context() as patch:
        patch.setattr(Store, "_open", limited)
        with pytest.raises(OSError, match=r"full.*what was finished is kept"):
            work(sweep, demo, path)
    assert 0 < rows_in(path) < rows_in(finished)
    work(sweep, demo, path)
    assert contents(path) == contents(finished)


def test_what_cannot_be_is_refused_before_anything_runs(demo, vector, tmp_path, monkeypatch):
    path = tmp_path / "s.db"

    def refused(said, **changes):
        with pytest.raises(ValueError, match=said):
            work(described(vector, **changes), demo, path)
        assert rows_in(path) == 0

    refused("unknown judge", judges=["refusel"])
    refused("has no model at", judges=["llamaguard:/nowhere/at/all"])
    refused("'h0'|'h1'|'h2'|'h3'|'h4'|'h5'", max_new_tokens=500)
    small = fs.SteeringVector({3: torch.ones(64)}, at="resid_pre")
    refused("hidden size 64", vectors={"small": small}, layers=[3])
    refused("layer 9", vectors={"far": fs.SteeringVector({9: torch.ones(128)}, at="resid_pre")}, layers=None)
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(run_module.shutil, "disk_usage", lambda folder: usage(1, 1, 1000))
    refused("GB free")


def test_an_engine_that_is_handed_in_answers_in_the_engines_place(demo, vector, tmp_path):
    sweep, path = described(vector, judges=["length"], engine="vllm", text=()), tmp_path / "s.db"
    for asked, engine, said in ((sweep, None, "given no engine="), (described(vector), fs.Engine, "engine: faststeer")):
        with Store(path) as store, pytest.raises(ValueError, match=said):
            sweep_run(asked, *demo, store, engine=engine, progress=False)
        assert rows_in(path) == 0
    closed = []

    class Echo(fs.Engine):
        def __init__(self, model, tokenizer, plans, **size):
            assert plans == [setting.plan for setting in sweep.settings]
            super().__init__(model, tokenizer, **size)

        def close(self):
            closed.append(True)

    with Store(path) as store:
        run = sweep_run(sweep, *demo, store, max_batch=8, engine=Echo, progress=False)
        assert len(store.answers(run)) == len(sweep.settings) * len(sweep.prompts)
    assert closed == [True]


def test_a_dead_process_holds_nothing_and_a_living_one_does(tmp_path, vector, monkeypatch):
    path = tmp_path / "s.db"
    names = {"answers:0": None, "judge:x:0": "answers:0", "answers:1": None}
    with Store(path) as one, Store(path) as two:
        one.add_units("r", names)
        assert one.claim("r", names) == "answers:0"
        assert two.claim("r", names) == "answers:1", "what waits for another's unit is not ready"
        assert two.claim("r", names) is None
        monkeypatch.setattr(store_module.os, "kill", lambda pid, number: (_ for _ in ()).throw(ProcessLookupError()))
        assert two.claim("r", names) == "answers:0", "its process is gone"
        monkeypatch.undo()
        assert one.claim("r", names) is None
        now = time.time()
        monkeypatch.setattr(store_module.time, "time", lambda: now + store_module.LEASE + 1)
        assert one.claim("r", names) == "answers:0", "no sign of life for too long"
        one.finish("r", "answers:0")
        assert one.claim("r", ["judge:x:0"]) == "judge:x:0"
        one.release()
        assert two.claim("r", ["judge:x:0"]) == "judge:x:0"
        assert not one.finished("r") and one.finished("r", ["answers:0"])


def test_progress_is_reported(demo, vector, tmp_path):
    seen = []
    with Store(tmp_path / "s.db") as store:
        sweep = Sweep(["How do I bake a cake?"], vectors={"d": vector}, layers=[3], judges=["length"], max_new_tokens=2)
        sweep_run(sweep, *demo, store, progress=seen.append)
    assert seen[-1].answered == seen[-1].total == 3 and {p.doing for p in seen} >= {"Answering", "Side effects"}
