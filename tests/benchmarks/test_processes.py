"""Nothing that a command starts outlives its time limit, its own end, or its runner."""

import os
import signal
import subprocess
import sys

import pytest
from benchmark_programs import BENCHMARKS, processes_with, wait_for
from processes import Command, Ended, tool

# A child in the group, one in a session of its own whose parent is gone, and the command itself.
CHILDREN = """
import subprocess, sys, time
sleep = [sys.executable, "-S", "-c", "import time; time.sleep(600)"]
subprocess.Popen(sleep)
orphan = f"import subprocess; subprocess.Popen({sleep!r}, start_new_session=True)"
subprocess.run([sys.executable, "-S", "-c", orphan], check=True)
print("started", flush=True)
"""
STAYS = CHILDREN + "time.sleep(600)"


def python(code: str) -> list[str]:
    return [sys.executable, "-S", "-c", code]


def run(code: str, marker: str, limit: float = 60.0) -> tuple[Ended, list[str]]:
    lines: list[str] = []
    ended = Command(python(code), limit, lines.append, os.environ | {"MARKER": marker}).wait()
    return ended, lines


def test_exit_code_and_lines(marker):
    ended, lines = run("import sys; print('out'); print('error', file=sys.stderr); sys.exit(3)", marker)
    assert ended.code == 3 and sorted(lines) == ["error", "out"] and str(ended) == "exit code 3"


def test_a_line_comes_when_it_is_written(marker):
    lines: list[str] = []
    command = Command(python("import time; print('now', flush=True); time.sleep(600)"), 600, lines.append,
                      os.environ | {"MARKER": marker})  # fmt: skip
    wait_for(lambda: lines == ["now"])
    command.stop()


def test_killed_by_a_signal_is_said(marker):
    ended, _ = run("import os; os.kill(os.getpid(), 9)", marker)
    assert ended.code == 137 and "SIGKILL" in str(ended) and "memory" in str(ended)


def test_a_program_that_is_not_there():
    lines: list[str] = []
    ended = Command(["/no/such/program"], 10, lines.append).wait()
    assert ended.code == 127 and "cannot be started" in lines[0]


def test_out_of_time(marker):
    ended, lines = run(STAYS, marker, limit=3.0)
    assert ended.code is None and lines == ["started"] and str(ended).startswith("stopped after")


def test_what_a_command_leaves_behind_ends_with_it(marker):
    ended, _ = run(CHILDREN, marker)
    assert ended.code == 0


def test_stop(marker):
    lines: list[str] = []
    command = Command(python(STAYS), 600, lines.append, os.environ | {"MARKER": marker})
    wait_for(lambda: lines)
    assert len(processes_with(marker)) == 4  # the supervisor, the command, two children
    command.stop()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT], ids=lambda n: n.name)
def test_the_runner_is_killed(marker, number):
    runner = f"""
import signal, sys; sys.path.insert(0, {str(BENCHMARKS)!r})
from processes import Command
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs have it ignored
Command({python(STAYS)!r}, 600, lambda line: print(line, flush=True)).wait()
"""
    process = subprocess.Popen(
        python(runner), stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=os.environ | {"MARKER": marker}
    )
    assert process.stdout.readline() == b"started\n"
    process.send_signal(number)
    process.wait()
    process.stdout.close()
    wait_for(lambda: not processes_with(marker), 20)


def test_the_supervisor_is_killed(marker):
    """It has the command killed by the kernel; what the command left in other sessions is out of reach then."""
    code = "import time; print('started', flush=True); time.sleep(600)"
    lines: list[str] = []
    command = Command(python(code), 600, lines.append, os.environ | {"MARKER": marker})
    wait_for(lambda: lines)
    os.kill(command._process.pid, signal.SIGKILL)
    assert command.wait().code != 0
    wait_for(lambda: not processes_with(marker), 20)


def test_tools_are_looked_for_in_the_toolkit(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", "")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    assert tool("ncu-of-a-test") is None
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "ncu-of-a-test").write_text("#!/bin/sh\n")
    (tmp_path / "bin" / "ncu-of-a-test").chmod(0o755)
    assert tool("ncu-of-a-test") == str(tmp_path / "bin" / "ncu-of-a-test")
