"""faststeer verify: what it says of back ends that compute as they should, and of some that do not."""

from __future__ import annotations

import dataclasses
import json
import time

import pytest
import torch
from typer.testing import CliRunner

from faststeer import ops, verify
from faststeer.cli import app
from faststeer.measure import StepTiming, Timing
from faststeer.ops import EntryKind, reference
from faststeer.ops.tables import Field


def run(*arguments):
    return CliRunner().invoke(app, ["verify", *map(str, arguments)])


@pytest.fixture
def quick(monkeypatch):
    """Nothing is timed, and of the checks one dtype and hidden size are enough."""
    monkeypatch.setattr(verify, "time_kernels", lambda *_: iter(()))
    monkeypatch.setattr(verify, "time_steps", lambda *_: iter(()))
    monkeypatch.setattr(verify, "MIXES", 1)


# A back end that is wrong ---------------------------------------------------------------------------------------------


def off_by(share: float):
    """steer that is wrong by `share` of the tolerance, at one element of one row."""
    steer = ops.steer

    def wrong(x, tables, rows, gate_state=None, probe=None, *, backend=None):
        ours = steer(x, tables, rows, gate_state, probe, backend=backend)
        if x.dtype is not torch.float32:
            return ours
        exact = reference.steer(x.double(), tables, rows, gate_state)
        plain = reference.steer(x, tables, rows, gate_state)
        size = x.double().norm(dim=1) * tables.bank.abs().max()
        allowed = verify.tolerance(exact, plain, x.dtype, size)
        ours[0, 0] = exact[0, 0] + share * allowed[0]
        return ours

    return wrong


def skipping(kind: EntryKind, name: str):
    """An op that leaves out one kind of intervention."""
    op = getattr(ops, name)

    def wrong(*arguments, backend=None):
        listed = list(arguments)
        at = next(i for i, argument in enumerate(listed) if isinstance(argument, ops.Tables))
        entries = listed[at].entries.clone()
        skipped = entries[:, int(Field.KIND)] == int(kind)
        entries[skipped, int(Field.KIND)] = int(EntryKind.PROBE)
        listed[at] = listed[at]._replace(entries=entries)
        return op(*listed, backend=backend)

    return wrong


def disagreements(result) -> dict[str, str]:
    written = json.loads(result.stdout)
    return {name: " ".join(check["disagreements"]) for name, check in written["backends"].items()}


def test_an_error_beyond_the_tolerance_is_told(quick, monkeypatch, tmp_path):
    # The tolerance of `steer` knows x and residual, the one here x alone: so at most half of it is reached.
    for share, code in ((0.2, 0), (4.0, 3)):
        with monkeypatch.context() as patch:
            patch.setattr(ops, "steer", off_by(share))
            result = run("--backend", "reference", "--json", "--out", tmp_path / "verify.json")
        assert result.exit_code == code, result.output
        text = disagreements(result)["reference"]
        assert ("times what is allowed" in text) == ("steer, " in text) == (code == 3)
        check = json.loads(result.stdout)["backends"]["reference"]
        assert (check["passed"], json.loads(result.stdout)["passed"]) == (code == 0, code == 0)
        assert (check["largest_error"] > 1) == (code == 3) and check["cases"] == check["of"] == 12


@pytest.mark.parametrize(
    "kind", [kind for kind in EntryKind if kind not in (EntryKind.PROBE, EntryKind.LATCH)], ids=lambda k: k.name
)
@pytest.mark.parametrize("name", ["steer", "add_steer", "steer_pair_", "add_steer_rmsnorm"])
def test_an_intervention_that_is_left_out_is_told(name, kind, quick, monkeypatch, tmp_path):
    # Two, since a clamp moves the rows of the first by less than bf16 rounds.
    monkeypatch.setattr(verify, "cases", lambda *_, cases=verify.cases: cases(*_)[:2])
    monkeypatch.setattr(ops, name, skipping(kind, name))
    result = run("--backend", "reference", "--json", "--out", tmp_path / "verify.json")
    assert result.exit_code == 3
    text = disagreements(result)["reference"]
    words = {"ROTATE_RELATIVE": "Rotate, relative"}
    assert name in text and words.get(kind.name, kind.name.capitalize()) in text


def test_other_mistakes_are_told(quick, monkeypatch, tmp_path):
    def raises(*_, **__):
        raise RuntimeError("an illegal memory access was encountered")

    def nothing(*_, **__):
        return None

    def all_rows(x, tables, rows, *rest, backend=None, steer=ops.steer):
        return steer(x + 0.001 * (rows[0] < 0).unsqueeze(1).to(x.dtype), tables, rows, *rest, backend=backend)

    def no_number(*arguments, add_steer=ops.add_steer, **named):
        return add_steer(*arguments, **named) * float("nan")

    for name, wrong, message in (
        ("latch_", nothing, "gates are decided otherwise"),
        ("steer", all_rows, "a row without a plan keeps its bits"),
        ("add_steer", no_number, "inf times what is allowed"),
        ("steer", raises, "it raised RuntimeError: an illegal memory access"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(ops, name, wrong)
            result = run("--backend", "reference", "--json", "--out", tmp_path / "verify.json")
        assert result.exit_code == 3, (name, result.output)
        assert message in disagreements(result)["reference"]
        assert "Infinity" not in (tmp_path / "verify.json").read_text()


def test_rows_whose_gate_hangs_on_rounding_say_nothing():
    """Rows on the threshold itself: which way they fall is nobody's mistake."""
    made = verify.Case([["Add, dot gate"]], 14, 64, torch.float32, "cpu", 0)
    gate = made.cpu.tables.bank[made.cpu.tables.entries[0, int(Field.GATE_VECTOR)].long()]
    exact, decided = verify._expected(made, made.cpu.x, torch.zeros(14, 0, dtype=torch.float64))
    assert decided.all() and not torch.equal(exact, made.cpu.x.double())
    x = made.cpu.x - (made.cpu.x @ gate).unsqueeze(1) * gate
    _, decided = verify._expected(made, x, torch.zeros(14, 0, dtype=torch.float64))
    assert torch.equal(decided, made.cpu.rows[0] < 0)


# A captured graph -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reads_tables", [True, False])
def test_the_plan_changes_between_two_replays(reads_tables, monkeypatch):
    """As a graph does it, which writes into its first result; and as one that holds its plan fixed."""

    def capture(step, device):
        result = step()
        return lambda: result.copy_(step() if reads_tables else result), result

    monkeypatch.setattr(verify, "capture", capture)
    check = verify.BackendCheck(True, "")
    verify.check_replays("reference", "cpu", check)
    assert (check.replays, check.n_disagreements) == ((True, 0) if reads_tables else (False, 1))


# The command ----------------------------------------------------------------------------------------------------------


def test_json_is_complete_and_the_table_shows_it(tmp_path, monkeypatch):
    monkeypatch.setattr(verify, "MIXES", 1)
    monkeypatch.setenv("COLUMNS", "160")
    out = tmp_path / "here" / "verify.json"
    result = run("--seconds", 60, "--out", out)
    assert result.exit_code == 0, result.output
    written = json.loads(out.read_text())
    assert [path.name for path in out.parent.iterdir()] == ["verify.json"]
    assert set(written) == {"versions", "machine", "backends", "kernels", "steps", "passed", "seconds"}
    assert set(written["versions"]) == {"faststeer", "python", "torch", "transformers", "triton"}
    assert {"cpu", "cores", "torch", "platform", "threads"} <= set(written["machine"])
    assert set(written["backends"]) == set(ops.states())
    for name, check in written["backends"].items():
        state = ops.states()[name]
        assert (check["works"], check["reason"]) == (state.works, state.reason)
        assert set(check) == {f.name for f in dataclasses.fields(verify.BackendCheck)} | {"passed"}
        assert check["passed"] is (True if state.works else None)
        assert (0 < check["largest_error"] <= 1 and check["where"] and check["cases"]) if state.works else True
        assert name in result.stdout and ("agrees" in result.stdout or not state.works)
    timed = {(record["op"], record["backend"]) for record in written["kernels"] if "us" in record}
    measured = [n for n, s in ops.states().items() if s.works and n not in ("reference", "triton")] or ["reference"]
    assert timed == {(op, name) for op in ("steer", "add_steer_rmsnorm") for name in measured}
    for record in written["kernels"]:
        assert {f.name for f in dataclasses.fields(Timing)} | {"gb_per_s", "percent_of_copy"} <= set(record)
    names = ["generate", "generate, hand-written hook", "generate, fs.steer", "Engine", "Engine, steered"]
    assert [record["what"] for record in written["steps"]] == names
    for record in written["steps"]:
        assert {f.name for f in dataclasses.fields(StepTiming)} <= set(record) and record["step_ms"] > 0
        assert ("against_unsteered" in record) == ("," in record["what"]) and record["what"] in result.stdout


def test_the_time_is_kept_and_what_is_left_out_is_said(tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    checked = []

    def check_ops(case, backend, check):
        checked.append((now[0], backend))
        now[0] += 7.0

    monkeypatch.setattr(verify, "check_ops", check_ops)
    result = run("--seconds", 30, "--out", tmp_path / "verify.json")
    written = json.loads((tmp_path / "verify.json").read_text())
    assert result.exit_code == 0
    # 60 % of the time are for the checks: nothing begins behind, but for the first case of each back end.
    first = {backend: when for when, backend in reversed(checked)}
    assert all(when <= 118 or first[backend] == when for when, backend in checked)
    for check in written["backends"].values():
        assert 0 < check["cases"] < check["of"] if check["works"] else not check["of"]
    now[0] = 1e6
    assert "then out of time" in result.stdout
    kernels, steps = (list(each) for each in (verify.time_kernels(["reference"], 5), verify.time_steps("cpu", 5)))
    assert [record["skipped"] for record in kernels + steps] == ["out of time"] * 7


def test_what_cannot_be_timed_says_why(tmp_path, monkeypatch):
    def fails(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried\nto allocate")

    monkeypatch.setattr(verify.measure, "time_calls", fails)
    monkeypatch.setattr(verify.measure, "time_steps", fails)
    monkeypatch.setattr(verify, "check_ops", lambda *_: None)
    monkeypatch.setenv("COLUMNS", "160")
    result = run("--out", tmp_path / "verify.json")
    written = json.loads((tmp_path / "verify.json").read_text())
    assert {record["failed"] for record in written["kernels"] + written["steps"]} == {"CUDA out of memory. Tried"}
    assert result.exit_code == 0 and "failed: CUDA out of memory" in result.stdout


def test_wrong_input(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    broken = next((name for name, state in ops.states().items() if not state.works), None)
    refused = [(("--backend", "tirton"), "unknown back end 'tirton': expected reference, cpu, triton, cuda")]
    refused.append((("--out", tmp_path), "is a folder: name a file"))
    if broken:
        refused.append((("--backend", broken), f"the back end {broken!r} does not work here: "))
    for arguments, message in refused:
        result = run(*arguments)
        assert result.exit_code == 1 and message in " ".join(result.stderr.split())
    assert run("--seconds", 0).exit_code == 2
    assert list(tmp_path.iterdir()) == []
