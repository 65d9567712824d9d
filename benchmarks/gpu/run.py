"""What a machine with a GPU is asked in its first minutes, as two commands that waste none of them:

    python benchmarks/gpu/run.py first  --out DIR --prebuilt FOLDER
    python benchmarks/gpu/run.py second --out DIR --prebuilt FOLDER

They need Python with PyTorch, Triton, transformers and pytest; no network, no git, no make, no installed faststeer: a
copy of the checkout is made importable in a temporary folder. FOLDER has the libraries that `make gpu-libraries`
compiled, and wheels (liger-kernel's) where they are to be measured. Without it they are compiled here first, which
takes minutes. The stages, in this order:

    first     device and copy bandwidth; a small case on both back ends; the kernels; other launch configurations; the
              Engine on an 8B model; the same with cuDNN's attention; hooks; the tests.            At most 330 s.
    second    hardware counters; compute-sanitizer; the kernels of others; host time; a 1.5B model. At most 240 s.

Each stage has a time limit, within that of all, a process group and a supervisor of its own, so that a failure, a hang
or the kill of this program ends that stage alone and leaves no process. DIR gets three files: a log, a CSV file and a
JSON file of the machine, named after the command. Both first ones grow line by line as things happen. A table of what
passed, failed and was skipped, and tables of the measurements, come last, on the screen and in the log. The exit code
is 0 if nothing failed.

Without a GPU, or with --dry-run, everything runs on the CPU at tiny sizes, the Triton kernels in Triton's interpreter
and the CUDA kernels in an emulation, to try this program; a back end that is not there is a failure. What it writes is
labelled a dry run, since it says nothing of any GPU.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import re
import signal
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import checkout
import records
from processes import Command, Ended, tool
from summary import tables

HERE, ROOT = Path(__file__).resolve().parent, checkout.ROOT
TESTS = ROOT / "tests"
SKIPPED = 77  # exit code of a stage that says in its last line why it cannot run here
LOG_LINES = 20_000  # of one process; then only its end
LAST_LINES = 200
SECONDS = {"first": 330.0, "second": 240.0}  # for all stages together, on a GPU
BUILD_SECONDS = 240.0  # beside that, where nothing was compiled beforehand
DEVICE_SECONDS = 60.0  # the first import of PyTorch reads gigabytes from a cold disk
DRY_SECONDS = 1800.0  # of each stage
LEAST_SECONDS = 3.0  # with less left nothing begins
# The most telling first: a run that is stopped has these.
TEST_FILES = ("test_graphs.py", "test_models.py", "test_rows.py", "test_contract3.py")
CUDNN_LAST = "TORCH_CUDNN_SDPA_DEPRIORITIZED"


@dataclass(frozen=True)
class Task:
    """One process of a stage and one line of the table."""

    name: str
    command: Sequence[str]
    limit: float
    environment: Mapping[str, str] = field(default_factory=dict)
    summary: Callable[[Sequence[str]], str] | None = None  # of its last lines; default: the last one where it failed


@dataclass(frozen=True)
class Result:
    name: str
    verdict: str  # passed, FAILED, out of time, skipped, stopped
    seconds: float
    what: str


@dataclass(frozen=True)
class Machine:
    torch: str
    gpu: str | None
    arch: str | None  # compute capability without the dot


class Stopped(BaseException):
    """A signal came."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number


class Log:
    """Lines with the seconds since the start, each in the file as soon as it is there."""

    def __init__(self, path: Path) -> None:
        self._file, self._start, self._lock = path.open("w", buffering=1), time.monotonic(), threading.Lock()

    def __call__(self, text: str, show: bool = True) -> None:
        with self._lock:
            self._file.writelines(f"{time.monotonic() - self._start:7.1f} {line}\n" for line in text.split("\n"))
        if show:
            with contextlib.suppress(BrokenPipeError):
                print(text, flush=True)


class Lines:
    """What a process says: into the log, up to a limit, and its last lines for the table."""

    def __init__(self, log: Log, name: str) -> None:
        self._log, self._name, self._count = log, name, 0
        self.last: deque[str] = deque(maxlen=LAST_LINES)

    def __call__(self, line: str) -> None:
        self._count += 1
        self.last.append(line)
        if self._count <= LOG_LINES:
            self._log(f"{self._name}| {line}", show=False)

    def close(self) -> None:
        if (left_out := self._count - LOG_LINES) > 0:
            self._log(f"{self._name}| ({left_out} more lines; the last of them:)", show=False)
            for line in list(self.last)[-min(left_out, LAST_LINES) :]:
                self._log(f"{self._name}| {line}", show=False)


class Runner:
    """Runs stages and remembers how they ended."""

    def __init__(self, log: Log, environment: Mapping[str, str], folder: Path) -> None:
        self.log, self.environment, self.folder = log, environment, folder
        self.end = float("inf")  # of all stages together, by time.monotonic()
        self.results: list[Result] = []

    def run(self, *tasks: Task) -> list[Lines]:
        """The tasks side by side; returns what they said."""
        lines, commands = [Lines(self.log, task.name) for task in tasks], []
        begun = time.monotonic()
        if self.end - begun < LEAST_SECONDS:
            for task in tasks:
                self.note(task.name, "skipped", "no time is left")
            return lines
        try:
            for task, said in zip(tasks, lines, strict=True):
                limit = min(task.limit, self.end - begun)
                self.log(f"{task.name}: begins, at most {limit:.0f} s", show=False)
                self.log(f"{task.name}| $ {' '.join(task.command)}", show=False)
                environment = {**self.environment, **task.environment}
                environment = {name: value for name, value in environment.items() if value != ""}
                commands.append(Command(task.command, limit, said, environment, self.folder))
            for task, command, said in zip(tasks, commands, lines, strict=True):
                ended = command.wait()
                said.close()
                self.note(task.name, *judge(task, ended, list(said.last)), ended.seconds)
        except BaseException as error:
            for command in commands:
                command.stop()
            done = {result.name for result in self.results}
            for task in tasks:
                if task.name not in done:
                    self.note(task.name, "stopped", f"by {error}", time.monotonic() - begun)
            raise
        return lines

    def note(self, name: str, verdict: str, what: str = "", seconds: float = 0.0) -> None:
        self.results.append(Result(name, verdict, seconds, what))
        self.log(f"{name}: {verdict} ({seconds:.0f} s) {what}")

    def table(self) -> str:
        return "\n".join(f"{r.name:24}{r.verdict:12}{r.seconds:6.0f} s  {r.what}" for r in self.results)


def judge(task: Task, ended: Ended, lines: Sequence[str]) -> tuple[str, str]:
    """Verdict, and a line on it."""
    said = (task.summary or last_line)(lines)
    if ended.code is None:
        return "out of time", f"after {ended.seconds:.0f} s; last: {said}"
    if ended.code == SKIPPED:
        return "skipped", last_line(lines)
    if ended.code != 0:
        return "FAILED", said if ended.code < 128 else f"{ended}; last: {said}"
    late = [line for line in lines if line.startswith("out of time")]
    return "passed", late[-1] if late else said if task.summary else ""


def last_line(lines: Sequence[str]) -> str:
    return next((line.strip()[:200] for line in reversed(lines) if line.strip()), "said nothing")


def test_counts(lines: Sequence[str]) -> str:
    """pytest's own count, or as far as it came."""
    for line in reversed(lines):
        if re.search(r"\d+ (passed|failed|skipped|error)", line):
            return line.strip("= ")
    shown = [line for line in lines if "%]" in line]
    return shown[-1].strip()[:200] if shown else last_line(lines)


def sanitizer_summary(lines: Sequence[str]) -> str:
    return next((line.strip("= ") for line in reversed(lines) if "SUMMARY" in line), last_line(lines))


# Stages ---------------------------------------------------------------------------------------------------------------

Stage = Callable[[], Sequence[Task]]  # the tasks that run side by side


@dataclass(frozen=True)
class Plan:
    """What the stages have in common."""

    csv: Path
    machine: Machine
    dry: bool

    @property
    def backends(self) -> tuple[str, str]:
        return ("cpu", "triton") if self.dry else ("cuda", "triton")

    def limit(self, seconds: float) -> float:
        return DRY_SECONDS if self.dry else seconds

    def python(self, name: str, limit: float, *command: Any, **environment: str) -> Task:
        return Task(name, [sys.executable, *map(str, command)], self.limit(limit), environment)

    def benchmark(self, name: str, limit: float, program: str, *arguments: Any, **environment: str) -> Task:
        """benchmarks/`program`: told to begin nothing new a little before its limit."""
        command = [ROOT / "benchmarks" / program, *arguments, "--csv", self.csv, "--stage", name]
        if not self.dry:
            command += ["--seconds", max(limit - 12, 5)]  # behind its imports; a case takes a while
        return self.python(name, limit, *command, **environment)

    def small_case(self, limit: float) -> list[Task]:
        return [
            self.python(f"small case, {backend}", limit, TESTS / "gpu" / "sanitized.py", "--few", "--backend", backend)
            for backend in self.backends
        ]

    def emulation(self) -> list[Task]:
        """The CUDA kernels on the CPU, in a dry run."""
        command = pytest_command(TESTS / "cuda" / "test_host_emulation.py", marks="not full and not gpu", workers=0)
        return [Task("CUDA, emulated", command, self.limit(0), summary=test_counts)] if self.dry else []

    def tests(self, limit: float) -> Task:
        workers = 8 if not self.dry and importlib.util.find_spec("xdist") else 0
        command = pytest_command(*(TESTS / "gpu" / name for name in TEST_FILES), marks="gpu", workers=workers)
        return Task("tests", command, self.limit(limit), {"OMP_NUM_THREADS": "2"}, test_counts)

    def sanitize(self, limit: float) -> list[Task]:
        """Both tools side by side."""
        program = [sys.executable, str(TESTS / "gpu" / "sanitized.py")]
        if self.dry:
            return [Task("sanitizer's case", program, self.limit(limit))]
        if (path := tool("compute-sanitizer")) is None:
            say = f"print('compute-sanitizer is not installed'); raise SystemExit({SKIPPED})"
            return [self.python("sanitizer", 5, "-c", say)]
        options = ["--error-exitcode", "9", "--report-api-errors", "no", "--launch-timeout", "120"]
        environment = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
        return [
            Task(name, [path, "--tool", name, *options, *program], limit, environment, sanitizer_summary)
            for name in ("memcheck", "racecheck")
        ]


def pytest_command(*files: Path, marks: str, workers: int) -> list[str]:
    command = [
        sys.executable,
        "-m",
        "pytest",
        *map(str, files),
        f"--rootdir={ROOT}",
        "-c",
        str(ROOT / "pyproject.toml"),
    ]
    command += [f"--confcutdir={TESTS if files[0].parent.name == 'cuda' else files[0].parent}"]
    command += ["-m", marks, "-o", "addopts=", "-p", "no:cacheprovider", "-v", "--tb=short", "--no-summary"]
    if importlib.util.find_spec("xdist"):
        command += ["-n", str(workers)]
    return command


def first(plan: Plan) -> list[Stage]:
    llama = ("generation/gpu.py", "--model", "llama-8b")
    few = ("--rows", "64", "--steerings", "unsteered", "every layer")
    return [
        lambda: plan.small_case(35),
        lambda: plan.emulation(),
        lambda: [plan.benchmark("kernels", 45, "kernels/gpu.py", "ours")],
        lambda: [plan.benchmark("launch sweep", 30, "kernels/gpu.py", "sweep")],
        lambda: [plan.benchmark("Engine, 8B", 70, *llama, "--who", "engine", "--rows", "64", "1", "256")],
        lambda: [plan.benchmark("Engine, 8B, cuDNN", 20, *llama, "--who", "engine", *few, **{CUDNN_LAST: ""})],
        lambda: [plan.benchmark("hooks, 8B", 20, *llama, "--who", "hooks", "--rows", "64")],
        lambda: [plan.tests(150)],  # or what is left
    ]


def second(plan: Plan) -> list[Stage]:
    qwen = ("generation/gpu.py", "--model", "qwen-1.5b", "--who", "engine", "hooks", "--rows", "64")
    return [
        lambda: [plan.python("counters", 40, HERE / "counters.py", "--csv", plan.csv)],
        lambda: plan.sanitize(75),
        lambda: [plan.benchmark("others", 55, "kernels/gpu.py", "others")],
        lambda: [plan.benchmark("host time", 15, "kernels/gpu.py", "host")],
        lambda: [plan.benchmark("1.5B", 40, *qwen)],
    ]


STAGES = {"first": first, "second": second}


# Before the stages ----------------------------------------------------------------------------------------------------


def look(runner: Runner, csv: Path, dry: bool) -> Machine | None:
    """The first stage: the machine and its copy bandwidth. None: PyTorch cannot be used."""
    command = [sys.executable, str(HERE / "machine.py"), "--csv", str(csv)]
    (lines,) = runner.run(Task("device", command, DRY_SECONDS if dry else DEVICE_SECONDS))
    said = next((line for line in reversed(lines.last) if line.startswith("DEVICE ")), None)
    return None if said is None else Machine(**json.loads(said.removeprefix("DEVICE ")))


def libraries(runner: Runner, package: Path, prebuilt: Path | None, machine: Machine) -> None:
    """Put those that were compiled beforehand in place; compile what is missing."""
    names = ["cpu", "cuda"] if machine.arch is None else ["cuda"]
    limit = 5.0
    if prebuilt is not None:
        try:
            checkout.put_libraries(package, prebuilt, machine.arch, machine.torch)
        except checkout.Unfit as error:
            runner.note("prebuilt libraries", "FAILED", str(error))
            limit = BUILD_SECONDS
    else:
        limit = BUILD_SECONDS
    if machine.arch is None:
        limit = DRY_SECONDS
        if prebuilt is not None:
            names = ["cpu"]
    command = [sys.executable, str(HERE / "prepare.py"), str(package), *names]
    runner.run(Task("libraries", command, limit))


def environment_of(site: Path, wheels: Path, dry: bool, commit: str | None) -> dict[str, str]:
    environment = dict(os.environ) | {
        "PYTHONPATH": checkout.python_path(site, wheels),
        "PYTHONUNBUFFERED": "1",
        "HF_HUB_OFFLINE": "1",
        CUDNN_LAST: "1",  # else eager attention waits for a plan by cuDNN at every length
    }
    if commit:
        environment["FASTSTEER_COMMIT"] = commit
    if dry:
        environment |= {"FASTSTEER_DRY_RUN": "1", "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    return environment


@contextlib.contextmanager
def signals_raise() -> Iterator[None]:
    """SIGTERM, SIGINT and SIGHUP raise Stopped, once: what is cleaned up then is not interrupted."""
    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)

    def stop(number: int, _frame: Any) -> None:
        for each in numbers:
            signal.signal(each, signal.SIG_IGN)
        raise Stopped(number)

    before = {number: signal.signal(number, stop) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def measures_paper(rows: Sequence[Mapping[str, str]]) -> bool:
    """Whether a GPU has measured what benchmarks/kernels/paper.py estimates."""
    kernel = {"run": "gpu", "op": "add_steer_rmsnorm", "rows": "16384", "hidden": "4096"}
    return any("us" in row and kernel.items() <= row.items() for row in rows)


def run_all(options: argparse.Namespace, runner: Runner, csv: Path, scratch: Path) -> None:
    site, wheels, begun = scratch / "site", scratch / "wheels", time.monotonic()
    package = checkout.install(site)
    if options.prebuilt is not None:
        for name in checkout.unpack_wheels(options.prebuilt, wheels):
            runner.log(f"unpacked {name}")
    machine = look(runner, csv, options.dry_run)
    if machine is None:
        runner.note("everything else", "skipped", "PyTorch or faststeer cannot be imported here, see device")
        return
    dry = machine.gpu is None
    if dry:
        runner.environment = environment_of(site, wheels, True, options.commit)
        reason = "asked for" if options.dry_run else "there is no GPU that PyTorch can use"
        runner.log(f"DRY RUN on the CPU ({reason}): this says nothing of any GPU. torch {machine.torch}")
    else:
        runner.environment = {**runner.environment, "FASTSTEER_CUDA_ARCHS": str(machine.arch)}
        runner.log(f"{machine.gpu}, sm_{machine.arch}, torch {machine.torch}")
    compiling = time.monotonic()
    libraries(runner, package, options.prebuilt, machine)
    if not dry:
        runner.end = begun + SECONDS[options.which] + time.monotonic() - compiling
    for stage in STAGES[options.which](Plan(csv, machine, dry)):
        try:
            tasks = stage()
            runner.run(*(task for task in tasks if options.only is None or task.name in options.only))
        except Exception as error:  # this program's own fault must not cost the other stages
            runner.note("run.py", "FAILED", records.reason(error))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("which", choices=STAGES)
    parser.add_argument("--out", type=Path, required=True, help="folder of the results; this command's are replaced")
    parser.add_argument("--prebuilt", type=Path, help="folder with libraries compiled beforehand, and wheels")
    parser.add_argument("--only", nargs="+", metavar="STAGE", help="run these stages alone, named as in the table")
    parser.add_argument("--dry-run", action="store_true", help="use no GPU")
    parser.add_argument("--commit", help="what the results name as the commit, where there is no git")
    options = parser.parse_args()
    if options.prebuilt is not None:
        options.prebuilt = options.prebuilt.resolve()
        if not options.prebuilt.is_dir():
            parser.error(f"--prebuilt {options.prebuilt} is no folder: make gpu-libraries fills one")
    out: Path = options.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    csv = out / f"{options.which}.csv"
    for path in (csv, csv.with_suffix(".machine.json")):
        path.unlink(missing_ok=True)
    log, code = Log(out / f"{options.which}.log"), 0
    with signals_raise(), tempfile.TemporaryDirectory(prefix="faststeer-gpu-") as scratch:
        folders = Path(scratch) / "site", Path(scratch) / "wheels"
        work = Path(scratch) / "work"  # not the checkout, whose faststeer would come before the one in the site
        work.mkdir()
        runner = Runner(log, environment_of(*folders, options.dry_run, options.commit), work)
        try:
            run_all(options, runner, csv, Path(scratch))
        except Stopped as stop:
            code = 128 + stop.number
            log(f"stopped by {stop}: what was measured until then is in {csv}")
        except Exception as error:
            runner.note("run.py", "FAILED", records.reason(error))
    rows = records.read(csv)
    log(f"\n{tables(rows)}\n\n{runner.table()}\n\nwritten to {out}")
    if measures_paper(rows):
        log(f"to fill the column 'measured' of docs/kernels.md: python benchmarks/kernels/paper.py --measured {csv}")
    missing = set(options.only or ()) - {result.name for result in runner.results}
    for name in sorted(missing):
        log(f"there is no stage {name!r} in {options.which}")
    return code or int(bool(missing) or any(r.verdict in ("FAILED", "out of time") for r in runner.results))


if __name__ == "__main__":
    sys.exit(main())
