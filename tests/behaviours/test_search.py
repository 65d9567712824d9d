"""The search: a killed one ends with the same bytes, its replay gives the same plan, its front and its choice are those
of an oracle, its budget is kept, and what is wrong is refused in words."""

from __future__ import annotations

import dataclasses
import hashlib
import math
import multiprocessing
import os
import random
import shutil
import signal
import statistics
import time

import pytest
import tiny_chat
import torch
from typer.testing import CliRunner

import faststeer as fs
import faststeer.demo
from faststeer import behaviours
from faststeer.behaviours import search as searching
from faststeer.behaviours.search import SearchSettings, bench, replay, search
from faststeer.behaviours.search import run as running
from faststeer.behaviours.search.settings import Budget
from faststeer.cli import app
from faststeer.evaluate.judging import registry
from faststeer.evaluate.side_effects import text_effects
from faststeer.files import FormatError

pytest.importorskip("optuna")

SMALL = SearchSettings(
    answers=90, prompts=4, finalists=2, max_new_tokens=6, batch=8, methods=("dim", "probe"), positions=(-1, -2),
    max_kl=8.0, max_over_refusal=1.0,
)  # fmt: skip
TOKENIZER = tiny_chat.bpe_tokenizer()
TEXT = ("Water boils.", "Bake a cake, then wait.")


@pytest.fixture(scope="module", autouse=True)
def judged():
    """A judge that random models' answers differ in, and no coherence check: their answers are noise."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(registry, "JUDGES", dict(registry.JUDGES))
        registry.register("vowels", lambda: registry.make(vowels))
        registry.register("any", lambda: registry.make(lambda text: 1))
        patched.setattr(bench, "NEUTRAL_TEXT", TEXT)  # short, so that the tests are
        yield


def vowels(text):
    n = sum(text.count(letter) for letter in "aeiou")
    return (n > 4) - (n < 3)


@pytest.fixture(scope="module")
def model():
    return tiny_chat.llama(len(TOKENIZER), layers=4)


@pytest.fixture(scope="module")
def behaviour(judged):
    def split(n, m):
        return behaviours.BehaviourSplit(
            [f"Bake cake {i}" for i in range(n, m)], [f"Steal boat {i}" for i in range(n, m)]
        )

    return behaviours.Behaviour("vowels", "", "vowels", split(0, 6), split(10, 18), split(30, 36), coherence="any")


@pytest.fixture(scope="module")
def finished(model, behaviour, tmp_path_factory):
    folder = tmp_path_factory.mktemp("search")
    return folder, search(model, TOKENIZER, behaviour, folder, SMALL)


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_something_is_chosen_and_the_budget_is_kept(finished, model, behaviour, tmp_path, monkeypatch):
    _, state = finished
    reasons = {line["pruned"] for line in searching.rows(state)}
    assert state["chosen"] is not None and len(reasons) > 1 and None in reasons
    drawn = []
    answer = bench.Bench.answer

    def counted(self, work):
        drawn.append(sum(len(listed) for listed, _ in work))
        return answer(self, work)

    monkeypatch.setattr(bench.Bench, "answer", counted)
    again = search(model, TOKENIZER, behaviour, tmp_path, SMALL)
    assert again == state and SMALL.answers - 8 - 8 < sum(drawn) <= SMALL.answers


def test_the_numbers_are_those_of_the_answers(finished, model, behaviour):
    """Gains and KL of every setting that was not given up, measured anew one by one."""
    _, state = finished
    space = running.Space(model, TOKENIZER, behaviour, SearchSettings(**settings_of(state)))
    asked = behaviour.validation.induce
    plain = [vowels(text) for text in fs.evaluate.complete(model, TOKENIZER, asked, max_new_tokens=6)]
    for line in (line for line in searching.rows(state) if line["pruned"] is None):
        plan, n = space.plan(line), line["answers"]
        texts = fs.evaluate.complete(model, TOKENIZER, asked[:n], plan, max_new_tokens=6)
        assert line["gain"] == pytest.approx(statistics.mean(map(vowels, texts)) - statistics.mean(plain[:n]))
        (effect,) = text_effects(model, TOKENIZER, [plan], TEXT)
        assert line["kl"] == pytest.approx(effect.to_dict()["kl"], rel=1e-4)


def settings_of(state):
    return {k: tuple(v) if isinstance(v, list) else v for k, v in state["settings"].items()}


def test_the_front_and_the_choice(finished):
    folder, state = finished
    lines = searching.rows(state)
    whole = [line for line in lines if line["pruned"] is None]
    costs = [c for c in searching.COSTS if whole[0][c] is not None]
    assert costs == ["kl", "perplexity", "repetition", "over_refusal"]

    def beats(a, b):
        pairs = [(a[c], b[c]) for c in costs] + [(-a["gain"], -b["gain"])]
        return all(x <= y for x, y in pairs) and any(x < y for x, y in pairs)

    front = [a for a in whole if a["gain"] > 0 and not any(beats(b, a) for b in whole)]
    named = [line for line in whole if line["front"]]
    assert {tuple(a[c] for c in (*costs, "gain")) for a in front} == {
        tuple(a[c] for c in (*costs, "gain")) for a in named
    }
    # The rule, written out: of the finalists within the limits that no other of them beats, the cheapest strong one.
    final = [line for line in whole if line["finalist"]]
    limits = {"kl": SMALL.max_kl, "perplexity": SMALL.max_perplexity, "repetition": SMALL.max_repetition}
    fits = [a for a in final if all(a[c] <= limit for c, limit in limits.items())]
    best = [a for a in fits if a["gain"] > 0 and not any(beats(b, a) for b in fits)]
    strong = [a for a in best if a["gain"] >= 0.9 * max(b["gain"] for b in best)]
    assert lines[state["chosen"]] == min(strong, key=lambda a: a["kl"]) and len(final) == SMALL.finalists
    plan = fs.Plan.load(folder / "plan.json")
    assert len(plan) == 1 and type(plan.interventions[0]).__name__.lower() == lines[state["chosen"]]["op"]
    assert hashlib.sha256((folder / "plan.json").read_bytes()).hexdigest() == state["plan_sha256"]


@pytest.mark.parametrize("goal", ["more", "less"])
def test_plans_of_settings(model, behaviour, goal):
    settings = running._checked(model, TOKENIZER, dataclasses.replace(SMALL, goal=goal))
    space = running.Space(model, TOKENIZER, behaviour, settings)
    sides = behaviour.train.positive, behaviour.train.negative
    means = fs.extract.candidates(model, TOKENIZER, *sides, positions=(-1, -2))
    positive, negative = means.positive_mean[1, 2], means.negative_mean[1, 2]
    sign = 1 if goal == "more" else -1
    setting = {"layer": 2, "position": -2, "method": "dim", "strength": 1.5}
    (added,) = space.plan(setting | {"op": "add"})
    assert float(added.coefficient) == sign * 1.5 and torch.allclose(
        added.direction[2].double(), positive - negative, atol=1e-5
    )
    (clamped,) = space.plan(setting | {"op": "clamp"})
    unit = (positive - negative) / (positive - negative).norm()
    low, high = float(negative @ unit), float(positive @ unit)
    if goal == "more":
        assert clamped.high is None and clamped.low == pytest.approx(low + 1.5 * (high - low), rel=1e-6)
    else:
        assert clamped.low is None and clamped.high == pytest.approx(high - 1.5 * (high - low), rel=1e-6)
    (ablated,) = space.plan(setting | {"op": "ablate"})
    assert float(ablated.strength) == 1.5 and ablated.layers == "all"
    probe = space.plan(setting | {"op": "add", "method": "probe"}).interventions[0].direction[2]
    assert float(probe.norm()) == pytest.approx(float((positive - negative).norm()), rel=1e-5)


# Killed, and gone on with ---------------------------------------------------------------------------------------------


def child(folder, behaviour):
    torch.set_num_threads(1)
    search(tiny_chat.llama(len(TOKENIZER), layers=4), TOKENIZER, behaviour, folder, SMALL)
    os._exit(0)


@pytest.mark.parametrize("number", range(5 if os.environ.get("FASTSTEER_TEST_PROFILE") == "full" else 1))
def test_killed_at_random_moments_it_ends_with_the_same_bytes(finished, behaviour, tmp_path, number):
    seed = random.SystemRandom().randrange(2**32)
    print(f"seed {seed}")
    rng, context = random.Random(seed), multiprocessing.get_context("fork")
    span = 1.0
    for attempt in range(40):
        process = context.Process(target=child, args=(tmp_path, behaviour))
        began = time.monotonic()
        process.start()
        if attempt < 4:
            process.join(rng.uniform(0.2, span + 1.0))
            if process.is_alive():
                os.kill(process.pid, signal.SIGKILL)
                process.join()
                span += 1.0  # later each time
                continue
        process.join()
        assert process.exitcode == 0
        span = time.monotonic() - began
        break
    assert contents(tmp_path) == contents(finished[0]), f"seed {seed}"


@pytest.mark.parametrize("stage", ["a round's first prompts", "a round's other prompts", "finalists", "test"])
def test_an_interrupt_keeps_what_is_done(finished, model, behaviour, tmp_path, monkeypatch, stage):
    rounds = len(finished[1]["rounds"])
    # The unsteered answers; two calls a round; the finalists; the test.
    at = {
        "a round's first prompts": 6,
        "a round's other prompts": 7,
        "finalists": 2 * rounds + 2,
        "test": 2 * rounds + 3,
    }
    answer, calls = bench.Bench.answer, []

    def interrupted(self, work):
        calls.append(len(work))
        if len(calls) == at[stage]:
            raise KeyboardInterrupt
        return answer(self, work)

    with monkeypatch.context() as patched:
        patched.setattr(bench.Bench, "answer", interrupted)
        with pytest.raises(KeyboardInterrupt):
            search(model, TOKENIZER, behaviour, tmp_path, SMALL)
    assert len(searching.load(tmp_path / "search.json")["rounds"]) == (2 if stage.startswith("a round") else rounds)
    search(model, TOKENIZER, behaviour, tmp_path, SMALL)
    assert contents(tmp_path) == contents(finished[0])


# Replayed -------------------------------------------------------------------------------------------------------------


def test_the_replay_gives_the_same_plan(finished, model):
    folder, _ = finished
    differences, plan = replay(model, TOKENIZER, folder / "search.json")
    assert differences == {} and searching.plan_text(plan) == (folder / "plan.json").read_text()


def written(folder, path, **changes):
    """The search with other content, and a digest that fits it."""
    state = searching.load(folder / "search.json") | changes
    running.save(path, state)
    return path


def test_a_replay_says_what_differs(finished, model, tmp_path):
    folder, state = finished
    test = state["test"] | {"kl": state["test"]["kl"] * (1 + 2**-40)}
    differences, _ = replay(model, TOKENIZER, written(folder, tmp_path / "s.json", test=test))
    assert set(differences) == {"kl"}
    others = [n for n in map(int, state["confirmed"]) if n != state["chosen"]]
    differences, _ = replay(model, TOKENIZER, written(folder, tmp_path / "s.json", chosen=others[0]))
    assert differences == {"chosen": (others[0], state["chosen"])}


def test_searches_that_cannot_be_replayed(finished, model, tmp_path):
    folder, state = finished
    text = (folder / "search.json").read_text()
    path = tmp_path / "search.json"
    kl = next(line["kl"] for line in searching.rows(state) if line["kl"])
    for changed, said in (
        (text.replace(repr(kl), repr(kl * 1.5), 1), "a number was changed"),
        (text[: len(text) // 2], "holds no search"),
        ('{"format": "faststeer.plan/1"}', "format is 'faststeer.plan/1'"),
        ("[]", "format is 'list'"),
    ):
        assert changed != text
        path.write_text(changed)
        with pytest.raises(FormatError, match=said):
            replay(model, TOKENIZER, path)
    with pytest.raises(ValueError, match=r"another model.*other weights"):
        replay(tiny_chat.llama(len(TOKENIZER), layers=4, seed=1), TOKENIZER, folder / "search.json")
    with pytest.raises(ValueError, match="not finished"):
        replay(model, TOKENIZER, written(folder, path, finished=False))
    with pytest.raises(ValueError, match="chose no setting"):
        replay(model, TOKENIZER, written(folder, path, chosen=None))
    with pytest.raises(FileNotFoundError, match="no search at"):
        replay(model, TOKENIZER, tmp_path / "none.json")


# Refused --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "wrong, said",
    [
        ({"answers": 0}, "answers is 0"),
        ({"answers": -5}, "answers is -5"),
        ({"prompts": 0}, "prompts is 0"),
        ({"goal": "most"}, "goal is 'most'"),
        ({"methods": ()}, "methods are"),
        ({"methods": ("dim", "magic")}, "unknown 'magic'"),
        ({"ops": ("add", "add")}, "one twice"),
        ({"max_kl": math.nan}, "max_kl is nan"),
        ({"max_perplexity": 0.5}, "max_perplexity is 0.5"),
        ({"share": 1.5}, "share is 1.5"),
        ({"train": 1}, "train is 1"),
    ],
)
def test_wrong_settings(wrong, said):
    with pytest.raises(ValueError, match=said):
        dataclasses.replace(SMALL, **wrong)


def test_what_the_model_does_not_allow(model, behaviour, tmp_path):
    for wrong, said in (({"layers": (2, 9)}, "layer 9 is out of range"), ({"answers": 9}, "9 answers are too few")):
        with pytest.raises(ValueError, match=said):
            search(model, TOKENIZER, behaviour, tmp_path, dataclasses.replace(SMALL, **wrong))
    assert not any(tmp_path.iterdir())


def test_another_search_in_the_folder(finished, model, behaviour, tmp_path):
    shutil.copytree(finished[0], tmp_path / "s")
    before = contents(tmp_path / "s")
    with pytest.raises(FormatError, match=r"another search \(of another settings"):
        search(model, TOKENIZER, behaviour, tmp_path / "s", dataclasses.replace(SMALL, seed=3))
    other = tiny_chat.llama(len(TOKENIZER), layers=4, seed=1)
    with pytest.raises(FormatError, match="of another fingerprint"):
        search(other, TOKENIZER, behaviour, tmp_path / "s", SMALL)
    assert contents(tmp_path / "s") == before


def test_the_smallest_budget_that_is_named_is_enough():
    for n_validation, n_test in ((8, 6), (32, 64), (2, 1)):
        with pytest.raises(ValueError, match="give at least") as error:
            Budget.of(dataclasses.replace(SMALL, answers=1), n_validation, n_test)
        least = int(str(error.value).split("at least ")[1].split(",")[0])
        budget = Budget.of(dataclasses.replace(SMALL, answers=least), n_validation, n_test)
        assert budget.search >= budget.prompts
        with pytest.raises(ValueError, match="too few"):
            Budget.of(dataclasses.replace(SMALL, answers=least - 1), n_validation, n_test)


def test_without_optuna_the_extra_is_named(model, behaviour, tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "optuna", None)
    with pytest.raises(ImportError, match=r"pip install 'faststeer\[search\]'"):
        search(model, TOKENIZER, behaviour, tmp_path, SMALL)


# On the command line, on the toy --------------------------------------------------------------------------------------


def command(*words):
    done = CliRunner().invoke(app, list(map(str, words)))
    return done.exit_code, done.output


OPTIONS = ("--answers", 70, "--prompts", 2, "--finalists", 2, "--train", 8, "--max-batch", 16, "--max-kl", 6,
           "--max-new-tokens", 24, "--op", "add", "--method", "dim", "--position", "-1")  # fmt: skip


def test_the_command_and_its_replay(tmp_path):
    out = tmp_path / "search"
    code, output = command("search", "--behaviour", "refusal", *OPTIONS, "--out", out)
    assert code == 0 and "answers of 24 tokens at most: about" in output and "Chosen: add dim" in output, output
    assert {path.name for path in out.iterdir()} == {"search.json", "plan.json", "search.html"}
    state = searching.load(out / "search.json")
    assert all(line["over_refusal"] is None for line in searching.rows(state)), "refusing is the behaviour"
    page = (out / "search.html").read_text()
    assert searching.setting_text(searching.rows(state)[state["chosen"]]) in page and "data-search" in page
    before = contents(out)
    assert command("search", "--behaviour", "refusal", *OPTIONS, "--out", out)[0] == 0 and contents(out) == before
    code, output = command("replay", out / "search.json", "--out", tmp_path / "plan.json")
    assert code == 0 and "The same, bit for bit" in output, output
    assert (tmp_path / "plan.json").read_bytes() == before["plan.json"]
    shown = command("generate", "--plan", tmp_path / "plan.json", "--prompt", "Bake a cake", "--max-new-tokens", 4)
    assert shown[0] == 0, shown


def test_wrong_words(tmp_path):
    for words, said, expected in (
        (("--behaviour", "nothing"), "no behaviour 'nothing'", 1),
        (("--answers", 0), "answers is 0", 1),
        (("--layers", "2-40"), "the model has layers 0..5", 1),
        (("--position", "3"), "expected negative numbers", 2),
        (("--method", "dim,ntp"), "unknown 'ntp'", 1),
    ):
        code, output = command("search", *words, "--out", tmp_path)
        assert code == expected and said in " ".join(output.split()), output
    code, output = command("replay", tmp_path / "search.json")
    assert code == 1 and "cannot be read" in " ".join(output.split())
