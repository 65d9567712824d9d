"""benchmarks/gpu/run.py: a stage that fails, hangs or is killed ends alone, and a run that is stopped leaves what it
measured and no process. Stages of a line each stand for the real ones; one real run is among the tests, too."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import records
import run
from benchmark_programs import BENCHMARKS, ROOT, load, processes_with, wait_for
from processes import Ended

from faststeer import build


def python(name: str, code: str, limit: float = 60.0, **more) -> run.Task:
    return run.Task(name, [sys.executable, "-S", "-c", code], limit, **more)


@pytest.fixture
def runner(tmp_path, marker) -> run.Runner:
    return run.Runner(run.Log(tmp_path / "run.log"), os.environ | {"MARKER": marker}, tmp_path)


def verdicts(runner: run.Runner) -> dict[str, str]:
    return {result.name: result.verdict for result in runner.results}


@pytest.mark.parametrize(
    ("by", "rows", "prints"), [("gpu", "16384", True), ("dry run", "16384", False), ("gpu", "5", False)]
)
def test_what_a_gpu_has_measured_is_for_the_table_on_paper(by, rows, prints):
    row = {"run": by, "op": "add_steer_rmsnorm", "rows": rows, "hidden": "4096", "us": "131.4"}
    assert run.measures_paper([{"op": "copy"}, row]) is prints
    assert not run.measures_paper([{**row, "op": "steer"}])


class TestStages:
    def test_each_ends_alone(self, runner, tmp_path):
        runner.run(python("good", "print('fine')"))
        runner.run(python("bad", "print('why it failed'); raise SystemExit(3)"))
        runner.run(python("hangs", "import time; print('so far', flush=True); time.sleep(600)", limit=1.5))
        runner.run(python("absent", f"print('there is no tool'); raise SystemExit({run.SKIPPED})"))
        runner.run(python("killed", "import os; os.kill(os.getpid(), 9)"))
        runner.run(python("raises", "raise ValueError('a word')"))
        runner.run(python("last", "print('out of time at 64 rows')"))
        assert verdicts(runner) == {
            "good": "passed", "bad": "FAILED", "hangs": "out of time", "absent": "skipped", "killed": "FAILED",
            "raises": "FAILED", "last": "passed",
        }  # fmt: skip
        what = {result.name: result.what for result in runner.results}
        assert what["bad"] == "why it failed" and "so far" in what["hangs"] and what["absent"] == "there is no tool"
        assert "SIGKILL" in what["killed"] and what["raises"] == "ValueError: a word"
        assert what["last"] == "out of time at 64 rows"
        log = (tmp_path / "run.log").read_text()
        assert "good| fine" in log and "raises| ValueError: a word" in log and log.count(": begins") == 7
        assert all(name in runner.table() for name in what)

    def test_side_by_side(self, runner, tmp_path):
        """Each waits for the other's file."""
        code = (
            "from pathlib import Path; import time\nPath('{}').touch()\nwhile not Path('{}').exists(): time.sleep(0.01)"
        )
        runner.run(python("a", code.format("a", "b")), python("b", code.format("b", "a")))
        assert verdicts(runner) == {"a": "passed", "b": "passed"}

    def test_the_time_of_all_is_kept(self, runner):
        runner.end = time.monotonic() + run.LEAST_SECONDS + 1
        runner.run(python("cut", "import time; time.sleep(600)", limit=500))
        runner.run(python("late", "print('never')"))
        assert verdicts(runner) == {"cut": "out of time", "late": "skipped"}

    def test_a_log_has_limits(self, runner, tmp_path, monkeypatch):
        monkeypatch.setattr(run, "LOG_LINES", 50)
        runner.run(python("talks", "for i in range(1000): print('line', i)"))
        lines = [line for line in (tmp_path / "run.log").read_text().splitlines() if "talks| line" in line]
        assert len(lines) == 50 + run.LAST_LINES and lines[49].endswith("line 49") and lines[-1].endswith("line 999")

    def test_lines_are_in_the_log_while_the_stage_runs(self, runner, tmp_path):
        log = tmp_path / "run.log"
        code = f"""
import time; print('begun', flush=True)
while "s| begun" not in open({str(log)!r}).read(): time.sleep(0.01)
"""
        runner.run(python("s", code))
        assert verdicts(runner) == {"s": "passed"}


def test_what_pytest_says_is_summed_up():
    lines = ["a.py::test_a PASSED [ 10%]", "=== 3 failed, 5 passed, 1 skipped in 2.0s ==="]
    assert run.test_counts(lines) == "3 failed, 5 passed, 1 skipped in 2.0s"
    assert run.test_counts(lines[:1]) == "a.py::test_a PASSED [ 10%]"
    task = run.Task("tests", [], 1, summary=run.test_counts)
    assert run.judge(task, Ended(None, 9.0), lines[:1])[0] == "out of time"
    assert run.judge(task, Ended(0, 9.0), ["=== 5 passed in 1s ==="]) == ("passed", "5 passed in 1s")


@pytest.mark.parametrize("which", run.STAGES)
def test_stages_on_a_gpu_are_within_their_time(which, tmp_path):
    """And all that they start is there, in the order that a first quarter of an hour needs."""
    plan = run.Plan(tmp_path / "a.csv", run.Machine("2.11.0", "a GPU", "90"), dry=False)
    stages = [stage() for stage in run.STAGES[which](plan)]
    names = [task.name for tasks in stages for task in tasks]
    assert len(names) == len(set(names))
    for task in (task for tasks in stages for task in tasks):
        files = [word for word in task.command if word.startswith(str(ROOT))]
        assert all(Path(word.partition("=")[2] or word).exists() for word in files if not word.endswith(".venv"))
        assert task.limit <= 150
    assert sum(max((task.limit for task in tasks), default=0) for tasks in stages[:-1]) < run.SECONDS[which]
    if which == "first":
        assert names[:2] == ["small case, cuda", "small case, triton"] and names[-1] == "tests"
        environments = {task.name: task.environment for tasks in stages for task in tasks}
        assert environments["Engine, 8B, cuDNN"] == {run.CUDNN_LAST: ""}


DRIVER = """
import sys; sys.path.insert(0, {gpu!r})
import run
def stages(plan):
    code = '''{code}'''
    return [lambda: [run.Task("writes", [sys.executable, "-S", "-c", code], 600)], lambda: [run.Task("after", ["true"],
    9)]]
run.STAGES = {{"first": stages}}
run.look = lambda *_: run.Machine("2.11.0", None, None)
run.libraries = lambda *_: None
sys.argv = ["run.py", "first", "--out", {out!r}]
sys.exit(run.main())
"""
WRITES = """
import subprocess, sys, time; sys.path.insert(0, {benchmarks!r})
from pathlib import Path; from records import GpuTable
table = GpuTable(Path({csv!r}), "dry run", "writes")
subprocess.Popen([sys.executable, "-S", "-c", "import time; time.sleep(600)"], start_new_session=True)
for n in range(600):
    table(dict(what="kernel", us=n)); print("row", n, flush=True); time.sleep(0.05)
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT], ids=lambda n: n.name)
def test_a_run_that_is_killed_leaves_its_results_and_no_process(tmp_path, marker, number):
    out = tmp_path / "out"
    csv = out / "first.csv"
    code = WRITES.format(benchmarks=str(BENCHMARKS), csv=str(csv))
    driver = DRIVER.format(gpu=str(BENCHMARKS / "gpu"), code=code, out=str(out))
    process = subprocess.Popen(
        [sys.executable, "-c", driver], env=os.environ | {"MARKER": marker}, stdout=subprocess.PIPE, text=True
    )
    wait_for(lambda: len(records.read(csv)) >= 3)
    process.send_signal(number)
    said, _ = process.communicate(timeout=60)
    wait_for(lambda: not processes_with(marker), 20)
    rows = records.read(csv)
    assert [row["us"] for row in rows] == [str(n) for n in range(len(rows))]
    log = (out / "first.log").read_text()
    assert "writes| row 0" in log
    if number == signal.SIGKILL:
        return
    assert process.returncode == 128 + number
    for text in (said, log):
        assert f"stopped by {number.name}" in text and "writes                  stopped" in text
    assert "after" not in said  # what stands behind is not begun


def test_a_fault_of_the_runner_costs_one_stage(tmp_path, monkeypatch, capsys):
    def stages(plan):
        return [lambda: 1 / 0, lambda: [python("after", "print('ran')")]]

    monkeypatch.setattr(run, "STAGES", {"first": stages})
    monkeypatch.setattr(run, "look", lambda *_: run.Machine("2.11.0", None, None))
    monkeypatch.setattr(run, "libraries", lambda *_: None)
    monkeypatch.setattr(sys, "argv", ["run.py", "first", "--out", str(tmp_path / "out")])
    assert run.main() == 1
    said = capsys.readouterr().out
    assert "ZeroDivisionError" in said and "after: passed" in said


def test_without_pytorch_it_is_said(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(run, "HERE", tmp_path)
    (tmp_path / "machine.py").write_text("import no_such_pytorch")
    monkeypatch.setattr(sys, "argv", ["run.py", "first", "--out", str(tmp_path / "out")])
    assert run.main() == 1
    said = capsys.readouterr().out
    assert "device: FAILED" in said and "No module named 'no_such_pytorch'" in said
    assert "everything else: skipped" in said


@pytest.mark.parametrize(
    ("arch", "version", "text"),
    [("80", "2.11.0", "compiled for sm_90, this GPU is sm_80"), ("90", "2.9.1", "need PyTorch 2.11 or later")],
)
def test_libraries_that_do_not_fit_are_said_and_the_rest_goes_on(tmp_path, runner, monkeypatch, arch, version, text):
    prebuilt = tmp_path / "prebuilt"
    prebuilt.mkdir()
    (prebuilt / "libraries.json").write_text(json.dumps({"archs": ["90"], "torch_target": [2, 11]}))
    (tmp_path / "package").mkdir()
    monkeypatch.setattr(run, "HERE", tmp_path)
    (tmp_path / "prepare.py").write_text(
        "print('cannot be compiled here: cuda: there is no nvcc'); raise SystemExit(1)"
    )
    run.libraries(runner, tmp_path / "package", prebuilt, run.Machine(version, "a GPU", arch))
    assert verdicts(runner) == {"prebuilt libraries": "FAILED", "libraries": "FAILED"}
    assert text in runner.table() and "there is no nvcc" in runner.table()


def test_a_folder_that_is_not_there(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["run.py", "first", "--out", str(tmp_path), "--prebuilt", str(tmp_path / "none")])
    with pytest.raises(SystemExit):
        run.main()
    assert "make gpu-libraries" in capsys.readouterr().err


@pytest.fixture(scope="module")
def plain_copy(tmp_path_factory) -> Path:
    """The tree as an archive has it: no .git, no environment, nothing installed."""
    copy = tmp_path_factory.mktemp("copy") / "tree"
    ignore = shutil.ignore_patterns(
        ".git", ".venv*", "build", "out", "__pycache__", ".*_cache", ".hypothesis", "results"
    )
    shutil.copytree(ROOT, copy, ignore=lambda folder, names: {n for n in ignore(folder, names) if n != "build.py"})
    return copy


def test_pytest_takes_the_package_of_the_site(tmp_path, plain_copy, runner):
    """Not the checkout's folder, which has no kernels, nor an installation of another checkout."""
    import checkout

    site = tmp_path / "site"
    checkout.install(site)
    tests = plain_copy / "tests" / "gpu" / "test_where.py"
    tests.write_text(
        "import faststeer, importlib.util, pytest\npytestmark = pytest.mark.gpu\n"
        "def test_where():\n"
        f"    assert faststeer.__file__.startswith({str(site)!r})\n"
        f"    assert importlib.util.find_spec('faststeer.kernels').origin.startswith({str(site)!r})\n"
    )
    runner.environment = runner.environment | {"PYTHONPATH": str(site), "FASTSTEER_DRY_RUN": "1"}
    try:
        runner.run(run.Task("tests", run.pytest_command(tests, marks="gpu", workers=0), 120, {}, run.test_counts))
    finally:
        tests.unlink()
    assert runner.results[-1].verdict == "passed" and runner.results[-1].what.startswith("1 passed")


@pytest.mark.skipif(build.obstacle("cpu") is not None, reason="the CPU's library is not built")
def test_a_run_on_a_plain_copy(tmp_path, plain_copy, marker):
    """Without git, make or an installation: one real stage, to the end."""
    empty = tmp_path / "empty"
    empty.mkdir()
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"PATH": str(empty), "MARKER": marker, "CXX": "/usr/bin/g++"}
    command = [
        sys.executable,
        str(plain_copy / "benchmarks" / "gpu" / "run.py"),
        "second",
        "--out",
        str(tmp_path / "out"),
    ]
    command += ["--only", "host time", "--commit", "abc1234"]
    folder = tmp_path / "prebuilt"
    (folder / "lib").mkdir(parents=True)
    for path in (build.library_path("cpu"), build.record_path("cpu")):
        shutil.copy2(path, folder / "lib" / path.name)
    (folder / "libraries.json").write_text(json.dumps({"archs": ["90"], "torch_target": [2, 11]}))
    command += ["--prebuilt", str(folder)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    files = sorted(path.relative_to(tmp_path / "out").as_posix() for path in (tmp_path / "out").rglob("*"))
    assert files == ["second.csv", "second.log", "second.machine.json"]
    assert json.loads((tmp_path / "out" / "second.machine.json").read_text())["commit"] == "abc1234"
    rows = records.read(tmp_path / "out" / "second.csv")
    assert {row["run"] for row in rows} == {"dry run"}
    assert {row["who"] for row in rows if row["what"] == "host cost"} == {"torch", "cpu", "triton"}
    assert "DRY RUN" in done.stdout and "host time" in done.stdout.splitlines()[-3]


class TestAMissingBackEndIsAFailure:
    """In a dry run as on a GPU: Triton does not run on the CPU unless its interpreter is on."""

    @pytest.fixture
    def environment(self) -> dict[str, str]:
        return {n: v for n, v in os.environ.items() if n != "TRITON_INTERPRET"} | {"FASTSTEER_DRY_RUN": "1"}

    def test_in_the_small_case(self, environment):
        command = [sys.executable, str(ROOT / "tests/gpu/sanitized.py"), "--few", "--backend", "triton"]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 1 and done.stdout.startswith("triton does not work here: there is no GPU")

    def test_in_the_tests(self, environment, tmp_path):
        command = run.pytest_command(ROOT / "tests/gpu/test_rows.py", marks="gpu", workers=0)
        command += ["-k", "test_no_rows"]
        done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.returncode == 1 and " error" in done.stdout.splitlines()[-1]
        assert "FAILURE" in done.stdout and "the back end triton does not work here" in done.stdout

    def test_in_the_benchmark(self, tmp_path, monkeypatch):
        kernels = load("kernels/gpu.py")
        states = {name: kernels.ops.states()["reference"] for name in ("cpu", "reference")}
        states["triton"] = type(states["cpu"])(False, "broken")
        monkeypatch.setattr(kernels.ops, "states", lambda: states)
        table = records.GpuTable(tmp_path / "a.csv", "dry run", "kernels")
        assert kernels.working(table) == ["cpu"] and table.failures == 1
        assert records.read(table._append.path)[0]["failed"] == "does not work here: broken"
