"""Runs a command so that nothing of it outlives its time limit, its runner, or a kill of either.

Between the runner and the command stands a supervisor: this file, started as a program. It holds one end of a pipe to
the runner, so that it notices the runner's end however that came, SIGKILL included. It is what the command's orphans
become children of, so that it also ends those that left the process group (compilers' workers, engines of servers).
Nothing but the standard library is imported: a supervisor starts in no time and needs no memory.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import select
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

OUT_OF_TIME = 124  # the supervisor's exit code then
PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36  # linux/prctl.h
POLL = 0.05  # seconds between two looks at the command


@dataclass(frozen=True)
class Ended:
    """How a command ended: its exit code, 128 + n for signal n, or None where it ran out of time."""

    code: int | None
    seconds: float

    def __str__(self) -> str:
        if self.code is None:
            return f"stopped after {self.seconds:.0f} s"
        if self.code > 128:
            try:
                name = signal.Signals(self.code - 128).name
            except ValueError:
                return f"exit code {self.code}"
            return f"ended by {name}" + (" (out of memory?)" if name == "SIGKILL" else "")
        return f"exit code {self.code}"


class Command:
    """A command under a supervisor, in a session of its own.

    Args:
        limit: seconds after which it and all that it started is killed.
        on_line: called in another thread with every line that it writes to stdout or stderr.
    """

    def __init__(
        self,
        command: Sequence[str],
        limit: float,
        on_line: Callable[[str], None],
        environment: Mapping[str, str] | None = None,
        folder: Path | None = None,
    ) -> None:
        self._started = time.monotonic()
        self._process = subprocess.Popen(
            [sys.executable, "-S", str(Path(__file__).resolve()), str(limit), *command],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=environment,
            cwd=folder,
            start_new_session=True,
        )
        self._reader = threading.Thread(target=self._read, args=(on_line,), daemon=True)
        self._reader.start()

    def _read(self, on_line: Callable[[str], None]) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            on_line(line.decode(errors="replace").rstrip("\n"))

    def wait(self) -> Ended:
        try:
            code = self._process.wait()
        except BaseException:
            self.stop()
            raise
        self._reader.join(5)
        return Ended(None if code == OUT_OF_TIME else code, time.monotonic() - self._started)

    def stop(self) -> None:
        """Kill the command and all that it started; returns when they are gone."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
        self._reader.join(5)


def tool(name: str) -> str | None:
    """A program of the CUDA toolkit: on PATH, or where the toolkit is."""
    homes = [os.environ[variable] for variable in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(variable)]
    places = (name, *(f"{home}/bin/{name}" for home in (*homes, "/usr/local/cuda")))
    return next((path for place in places if (path := shutil.which(place))), None)


# The supervisor -------------------------------------------------------------------------------------------------------


def supervise(limit: float, command: Sequence[str]) -> int:
    end = time.monotonic() + limit
    prctl = ctypes.CDLL(None, use_errno=True).prctl
    prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    stopped = []
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, lambda n, _: stopped.append(n))
    if _closed(0):
        return 128 + signal.SIGTERM
    try:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            preexec_fn=lambda: prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0),  # should the supervisor be killed
        )
    except OSError as error:
        print(f"cannot be started: {error}", flush=True)
        return 127
    code: int | None = None
    while code is None:
        if stopped or _closed(POLL):
            code = 128 + signal.SIGTERM
        elif time.monotonic() > end:
            code = OUT_OF_TIME
        elif (status := process.poll()) is not None:
            code = status if status >= 0 else 128 - status
    _kill_descendants()
    return code


def _closed(seconds: float) -> bool:
    """Whether the runner's end of the pipe is closed; waits for it so long."""
    return bool(select.select([0], [], [], seconds)[0])


def _kill_descendants() -> None:
    """All of them, orphans included, until none is left: while some are killed others may start."""
    for _ in range(200):
        children = _descendants(os.getpid())
        for pid in children:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        try:
            while os.waitpid(-1, os.WNOHANG) != (0, 0):
                pass
        except ChildProcessError:  # none is left
            return
        time.sleep(0.01)


def _descendants(root: int) -> list[int]:
    children: dict[int, list[int]] = {}
    for name in os.listdir("/proc"):
        if name.isdigit():
            try:
                with open(f"/proc/{name}/stat") as file:
                    fields = file.read().rpartition(")")[2].split()
            except OSError:  # it has ended
                continue
            children.setdefault(int(fields[1]), []).append(int(name))
    pids, queue = [], [root]
    while queue:
        pids += (more := children.get(queue.pop(), []))
        queue += more
    return pids


if __name__ == "__main__":
    sys.exit(supervise(float(sys.argv[1]), sys.argv[2:]))
