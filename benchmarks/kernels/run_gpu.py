"""Builds, tests, checks and measures the kernels on a machine with a GPU, in one call that ends within its time:

    python benchmarks/kernels/run_gpu.py --out DIR

It needs Python with PyTorch, Triton, pytest and faststeer's dependencies, nvcc and a C++ compiler. It needs no network
and installs nothing: the libraries are built in place, and a folder of links on PYTHONPATH makes the checkout
importable, kernels/triton as faststeer.kernels. The stages:

    build        the libraries, for this GPU alone; meanwhile Triton compiles its kernels
    small case   tests/gpu/sanitized.py by itself
    tests        tests/gpu
    memcheck     the small case under compute-sanitizer, where there is one that knows this GPU,
    racecheck    and again for races
    kernels      benchmarks/kernels/gpu.py
    generation   benchmarks/generation/gpu.py

A stage that fails or runs out of its time does not keep the others from running; the exit code is 0 if all of them
passed. DIR gets ten files at most: summary.txt with the tables that are also printed last, CSV and machine JSON of
both benchmarks, tests.xml, and a log per kind of stage.

Without a GPU, or with --dry-run, everything runs on the CPU at tiny sizes, to try this program; what it writes is named
or labelled a dry run, since it says nothing of any GPU.
"""

from __future__ import annotations

import argparse
import importlib.machinery
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TESTS = ROOT / "tests" / "gpu"
FILES = ("build.log", "sanitizer.log", "tests.log", "tests.xml", "benchmark.log", "summary.txt")
LOG_BYTES = 4 * 2**20  # of each log, its end


@dataclass(frozen=True)
class Machine:
    """What PyTorch says of it."""

    torch: str
    gpu: str | None
    arch: str | None  # compute capability without the dot

    @classmethod
    def look(cls) -> Machine:
        code = (
            "import json, torch; c = torch.cuda; on = c.is_available();"
            "print(json.dumps([torch.__version__, c.get_device_name() if on else None,"
            " '{}{}'.format(*c.get_device_capability()) if on else None]))"
        )
        said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
        return cls(*json.loads(said.stdout.splitlines()[-1]))


@dataclass
class Result:
    """How a stage ended: passed, FAILED, or left out; and in a line, what it found."""

    stage: str
    verdict: str
    seconds: float
    what: str = ""


class Runner:
    """Runs commands within the time that is left, and keeps what they say in logs."""

    def __init__(self, out: Path, environment: Mapping[str, str], label: str, seconds: float) -> None:
        self.out, self.environment, self.label = out, dict(os.environ) | dict(environment), label
        self.end = time.monotonic() + seconds
        self.results: list[Result] = []

    def left(self) -> float:
        return self.end - time.monotonic()

    def command(self, command: list[str], log: str, limit: float, **environment: str) -> tuple[int | None, str]:
        """Its exit code, None where it ran out of time, and what it said, which also goes to the end of the log. It and
        all that it started are stopped after `limit` seconds."""
        start, path = time.monotonic(), self.out / log
        with tempfile.TemporaryFile() as said:
            process = subprocess.Popen(
                command,
                cwd=ROOT,
                env=self.environment | environment,
                stdout=said,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            code: int | None = None
            try:
                code = process.wait(max(limit, 1.0))
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
            said.seek(max(0, said.tell() - LOG_BYTES) if said.seek(0, os.SEEK_END) else 0)
            text = said.read().decode(errors="replace")
        ended = f"exit code {code}" if code is not None else f"stopped after {limit:.0f} s"
        if not path.exists():
            path.write_text(f"{self.label}\n")
        with path.open("a") as file:
            file.write(f"\n$ {' '.join(command)}\n{text}\n({ended}, {time.monotonic() - start:.1f} s)\n")
        return code, text

    def append(self, log: str, to: str) -> None:
        """Move what a command said that ran beside others."""
        with (self.out / to).open("a") as file:
            file.write((self.out / log).read_text())
        (self.out / log).unlink()

    def note(self, stage: str, passed: bool | None, since: float, what: str) -> None:
        """Write down how a stage ended; `passed` None: it was left out."""
        verdict = {True: "passed", False: "FAILED", None: "left out"}[passed]
        self.results.append(Result(stage, verdict, time.monotonic() - since, what))
        print(f"{stage}: {verdict} ({self.results[-1].seconds:.0f} s) {what}", flush=True)


# Stages ---------------------------------------------------------------------------------------------------------------


def link(folder: Path) -> None:
    """A package `faststeer` of links into the checkout, with kernels/triton in it as `kernels`."""
    package = folder / "faststeer"
    package.mkdir(parents=True)
    names = [path.name for path in (ROOT / "faststeer").iterdir() if path.name not in ("__pycache__", "lib")]
    native = f"_native{importlib.machinery.EXTENSION_SUFFIXES[0]}"  # where the build will put it
    for name in {*names, native}:
        (package / name).symlink_to(ROOT / "faststeer" / name)
    (package / "kernels").symlink_to(ROOT / "kernels" / "triton")


def build(runner: Runner, dry: bool, limit: float) -> None:
    since = time.monotonic()
    beside = "compile_triton.log"

    def compile_triton() -> tuple[int | None, str]:
        return runner.command(
            [sys.executable, str(TESTS / "compile_triton.py"), *(["--processes", "1"] if dry else [])], beside, limit
        )

    with ThreadPoolExecutor(1) as pool:
        triton = pool.submit(compile_triton)
        for library in ("cuda", "cpu"):
            command = [sys.executable, str(ROOT / "faststeer" / "build.py"), library]
            begun = time.monotonic()
            code, said = runner.command(command, "build.log", limit - (begun - since))
            runner.note(f"build {library}", code == 0, begun, why(code, said))
        code, said = triton.result()
    runner.append(beside, "build.log")
    runner.note("compile Triton", code == 0, since, why(code, said))


def small_case(runner: Runner, limit: float) -> None:
    since = time.monotonic()
    code, said = runner.command([sys.executable, str(TESTS / "sanitized.py")], "sanitizer.log", limit)
    runner.note("small case", code == 0, since, why(code, said))


def tests(runner: Runner, dry: bool, limit: float) -> None:
    since = time.monotonic()
    suite = "DRY RUN on the CPU: tests gpu" if dry else "tests gpu"
    command = [sys.executable, "-m", "pytest", str(TESTS), f"--confcutdir={TESTS}", "-m", "gpu", "-o", "addopts="]
    command += ["-o", f"junit_suite_name={suite}", f"--junitxml={runner.out / 'tests.xml'}", "-p", "no:cacheprovider"]
    command += ["-q", "-rs", "--tb=short", "--maxfail=40", "--durations=15"]
    if not dry and importlib.util.find_spec("xdist"):
        command += ["-n", "8"]
    code, said = runner.command(command, "tests.log", limit)
    counts = [line for line in said.splitlines() if re.search(r"\d+ (passed|failed|skipped|error)", line)]
    runner.note("tests", code == 0, since, counts[-1].strip("= ") if counts else why(code, said))


def sanitizer() -> str | None:
    homes = [os.environ[name] for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    places = ("compute-sanitizer", *(f"{home}/bin/compute-sanitizer" for home in (*homes, "/usr/local/cuda")))
    return next((found for place in places if (found := shutil.which(place))), None)


def sanitize(runner: Runner, dry: bool, limit: float) -> None:
    """Both tools at the same time."""
    tool, names = sanitizer(), ("memcheck", "racecheck")
    if tool is None or dry:
        for name in names:
            reason = "dry run: the small case ran without it" if dry else "compute-sanitizer is not installed"
            runner.note(name, None, time.monotonic(), reason)
        return
    since = time.monotonic()

    def check(name: str) -> tuple[int | None, str]:
        command = [
            tool,
            "--tool",
            name,
            "--error-exitcode",
            "9",
            "--report-api-errors",
            "no",
            "--launch-timeout",
            "120",
        ]
        command += [sys.executable, str(TESTS / "sanitized.py")]
        return runner.command(command, f"{name}.log", limit, PYTORCH_NO_CUDA_MEMORY_CACHING="1")

    with ThreadPoolExecutor(2) as pool:
        ended = dict(zip(names, pool.map(check, names), strict=True))
    for name, (code, said) in ended.items():
        runner.append(f"{name}.log", "sanitizer.log")
        summary = next((line for line in said.splitlines() if "SUMMARY" in line), "").strip("= ")
        if "not supported" in said and not summary.startswith(("ERROR SUMMARY: 0", "RACECHECK SUMMARY: 0")):
            reason = next(line for line in said.splitlines() if "not supported" in line).strip("= ")
            runner.note(name, None, since, f"compute-sanitizer cannot watch this device: {reason}")
        else:
            runner.note(name, code == 0, since, summary or why(code, said))


def benchmark(runner: Runner, question: str, limit: float, scratch: Path, extra: list[str]) -> str:
    """benchmarks/`question`/gpu.py; returns its table."""
    since, table = time.monotonic(), scratch / f"{question}.txt"
    command = [sys.executable, str(ROOT / "benchmarks" / question / "gpu.py"), "--out", str(runner.out)]
    command += ["--seconds", f"{max(limit - 30, 10):.0f}", "--table", str(table), *extra]
    code, said = runner.command(command, "benchmark.log", limit)
    stopped = next((line for line in said.splitlines() if line.startswith("out of time")), "")
    runner.note(question, code == 0, since, stopped or why(code, said))
    return table.read_text() if table.exists() else f"no table of {question}\n"


def why(code: int | None, said: str) -> str:
    """The last line of what a command said, where it did not simply pass."""
    if code == 0:
        return ""
    return f"out of time; last: {last_line(said)}" if code is None else last_line(said)


def last_line(said: str) -> str:
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    return lines[-1][:200] if lines else "said nothing"


# All of it ------------------------------------------------------------------------------------------------------------


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the results; what is in it is replaced")
    parser.add_argument("--seconds", type=float, default=570, help="time for everything together")
    parser.add_argument("--dry-run", action="store_true", help="use no GPU")
    parser.add_argument("--full", action="store_true", help="the kernels' benchmark's larger grid")
    parser.add_argument("--commit", help="what the results name as the commit, where there is no git")
    arguments = parser.parse_args()
    machine = Machine.look()
    dry = arguments.dry_run or machine.gpu is None
    label = f"{machine.gpu}, torch {machine.torch}"
    environment = {"PYTHONUNBUFFERED": "1", "FASTSTEER_CUDA_ARCHS": machine.arch or "90"}
    if dry:
        label = f"DRY RUN on the CPU: this says nothing of any GPU. torch {machine.torch}"
        environment |= {"FASTSTEER_DRY_RUN": "1", "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    print(label, flush=True)
    out: Path = arguments.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    for path in out.glob("*"):  # of an earlier run
        if path.name in FILES or path.name.startswith(("kernels_gpu.", "generation_gpu.", "dry_run_")):
            path.unlink()
    with tempfile.TemporaryDirectory() as scratch:
        link(Path(scratch) / "links")
        paths = [str(Path(scratch) / "links"), *filter(None, [os.environ.get("PYTHONPATH")])]
        runner = Runner(out, environment | {"PYTHONPATH": os.pathsep.join(paths)}, label, arguments.seconds)

        def limit(most: float, later: float) -> float:
            """Seconds for a stage, of which `later` are left to those that follow. A dry run takes its time."""
            return 1800.0 if dry else max(min(most, runner.left() - later), 20.0)

        build(runner, dry, limit(240, 300))
        small_case(runner, limit(60, 290))
        tests(runner, dry, limit(180, 230))
        sanitize(runner, dry, limit(100, 150))
        commit = ["--commit", arguments.commit] if arguments.commit else []
        full = ["--full"] if arguments.full else []
        tables = benchmark(runner, "kernels", limit(160, 70), Path(scratch), [*commit, *full])
        tables += "\n" + benchmark(runner, "generation", limit(200, 0), Path(scratch), commit)
    lines = [f"{r.stage:16}{r.verdict:10}{r.seconds:6.0f} s  {r.what}" for r in runner.results]
    text = "\n".join([label, "", *lines, "", tables])
    (out / "summary.txt").write_text(text)
    print(f"\n{text}\nwritten to {out}")
    return 0 if all(r.verdict != "FAILED" for r in runner.results) else 1


if __name__ == "__main__":
    sys.exit(main())
