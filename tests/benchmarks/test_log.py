"""Measurements are appended as they are made, survive a kill, and go on in the next run."""

from __future__ import annotations

import json

import pytest
import results

from faststeer import build, ops


def log(path, settings=("a",), **options):
    return results.Log(path, {"settings": settings}, **options)


def test_a_run_goes_on_where_it_was_stopped(tmp_path):
    path, calls = tmp_path / "x" / "log.jsonl", []

    def case(name, fails_at=None):
        def run():
            calls.append(name)
            if len(calls) == fails_at:
                raise KeyboardInterrupt
            return {"tokens": 3}

        return run

    with pytest.raises(KeyboardInterrupt):
        results.measure_in_turn(log(path), {name: case(name, 5) for name in "abc"}, 2, batch=1)
    assert calls == ["a", "b", "c", "c", "b"]  # backwards the second time; the last was under way
    again = log(path)
    calls.clear()
    results.measure_in_turn(again, {name: case(name) for name in "abc"}, 2, batch=1)
    assert calls == ["b", "a"]
    assert {(row["case"], row["repeat"]) for row in log(path).rows} == {(c, r) for c in "abc" for r in range(2)}
    assert all(row["tokens"] == 3 and row["batch"] == 1 and row["seconds"] >= 0 for row in log(path).rows)


def test_turns_alternate(tmp_path):
    order = []
    cases = {name: (lambda name=name: order.append(name)) for name in "abc"}
    results.measure_in_turn(log(tmp_path / "log"), cases, 3)
    assert "".join(order) == "abc" + "cba" + "abc"


def test_a_line_cut_off_by_a_kill_is_dropped(tmp_path):
    path = tmp_path / "log"
    first = log(path)
    first.add({"case": "a", "repeat": 0})
    first.add({"case": "a", "repeat": 1})
    whole = path.read_text()
    for end in range(len(whole) - 1, len(whole) - 20, -1):
        path.write_text(whole[:end])
        assert log(path).rows == [{"case": "a", "repeat": 0}]
    assert json.loads(path.read_text().splitlines()[-1]) == {"case": "a", "repeat": 0}


def test_other_settings_and_fresh_begin_anew(tmp_path):
    path = tmp_path / "log"
    log(path).add({"case": "a"})
    assert log(path).has(case="a") and not log(path).has(case="b")
    assert log(path, ("b",)).rows == []
    log(path).add({"case": "a"})
    assert log(path, fresh=True).rows == []


def test_what_is_forgotten_is_gone(tmp_path):
    first = log(tmp_path / "log")
    for peer in "ab":
        for round_ in range(2):
            first.add({"peer": peer, "round": round_})
    first.forget(peer="a", round=1)
    assert log(tmp_path / "log").rows == first.rows == [
        {"peer": "a", "round": 0}, {"peer": "b", "round": 0}, {"peer": "b", "round": 1},
    ]  # fmt: skip


def test_a_case_may_say_its_own_seconds(tmp_path):
    first = log(tmp_path / "log")
    results.measure_in_turn(first, {"a": lambda: {"seconds": 7.0}}, 1)
    assert first.rows[0]["seconds"] == 7.0


class TestTheBackEnd:
    """A result says which back end ran, and the reference is not measured in place of the C++."""

    def test_is_in_the_results_and_another_begins_a_log_anew(self, tmp_path, monkeypatch):
        log(tmp_path / "log").add({"case": "a"})
        results.write("x", [{"case": "a"}], tmp_path)
        assert json.loads((tmp_path / "x.machine.json").read_text())["back_end"] == "cpu"
        monkeypatch.setenv("FASTSTEER_BACKEND", "reference")
        monkeypatch.setattr(ops, "backend_for", lambda device: "reference")
        assert log(tmp_path / "log").rows == [] and results.machine()["back_end"] == "reference"

    @pytest.mark.parametrize("missing", ["cpu", "native"])
    def test_the_reference_is_refused_with_what_to_do(self, tmp_path, monkeypatch, missing):
        monkeypatch.delenv("FASTSTEER_BACKEND", raising=False)
        monkeypatch.setattr(build, "digest", lambda name: "other")
        if missing == "cpu":
            monkeypatch.setattr(ops, "backend_for", lambda device: "reference")
            monkeypatch.setattr(ops, "states", lambda: {"cpu": ops.BackendState(False, build.obstacle("cpu"))})
        for measure in (lambda: log(tmp_path / "log"), lambda: results.write("x", [], tmp_path)):
            with pytest.raises(SystemExit, match=r"sources than these: python -m faststeer\.build cpu; FASTSTEER_BACK"):
                measure()
        assert list(tmp_path.iterdir()) == []
