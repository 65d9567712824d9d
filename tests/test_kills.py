"""Killed with SIGKILL at any moment, and run again: the same bytes as an undisturbed run, and nothing beside them. The
child dies at one of its own file operations, where something could be torn, or after some time."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import re
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_chat import bpe_tokenizer, llama
from training import bipo, ntp, po, reps
from typer.testing import CliRunner

import faststeer as fs
from faststeer.cli import app
from faststeer.demo import run as demo_run
from faststeer.evaluate.sweep import Store, Sweep, run, table
from faststeer.extract import Pair
from faststeer.files import write_atomically
from faststeer.observe import capture, study

FULL = os.environ.get("FASTSTEER_TEST_PROFILE") == "full"
KILLS = 20 if FULL else 2
WRITES = ("open", "os.rename", "os.chmod", "os.remove", "os.mkdir", "os.rmdir", "os.listdir", "shutil.rmtree")
TOKENIZER = bpe_tokenizer()
MODEL = llama(len(TOKENIZER)).requires_grad_(False)
VECTOR = fs.SteeringVector({n: torch.ones(MODEL.config.hidden_size) for n in (1, 2)}, at="resid_post")
PAIRS = [Pair(f"Bake {n} cakes", "I cannot help with that.", "Sure, first mix flour.", 1) for n in range(3)]
PAIRS += [Pair(f"Steal {n} boats", "Sure, wait.", "As an AI I can't do it.", -1) for n in range(3)]
UNSEEN = [Pair("Name three colours", "I'm sorry.", "Sure, here they are.")]


def command(*arguments: object) -> Callable[[Path], None]:
    def run(out: Path) -> None:
        done = CliRunner().invoke(app, [str(out) if each is ... else str(each) for each in arguments])
        assert done.exit_code == 0, done.output

    return run


def trained(method: Any) -> Callable[[Path], None]:
    def run(out: Path) -> None:
        how: dict[str, Any] = {"layers": [0, 2], "seed": [0, 1], "steps": 9, "batch_size": 2, "lr": 0.2}
        settings = dict(every=1, patience=9, start=0.3)
        training = method(MODEL, TOKENIZER, PAIRS, **how, settings=settings, held_out=UNSEEN, checkpoint=out / "state")
        for number, each in enumerate(training.runs):
            each.vector.save(out / f"{number}.safetensors")

    return run


def captured(out: Path) -> None:
    capture(MODEL, TOKENIZER, [pair.prompt for pair in PAIRS], at="resid_pre", folder=out / "capture", batch_size=1)


def swept(out: Path) -> None:
    """A sweep, and its table as a file: the store itself is one of SQLite's, whose bytes are not promised."""
    sweep = Sweep(["Bake a cake", "Steal a boat"], {"v": VECTOR}, layers=[1, 2], coefficients=[1, 4], max_new_tokens=6)
    out.mkdir(parents=True, exist_ok=True)
    with Store(out / "rows.db") as store:
        run(sweep, MODEL, TOKENIZER, store, max_batch=1, progress=False)
        write_atomically(out / "table.json", json.dumps([line.to_dict() for line in table(store)]))


def observed(out: Path) -> None:
    study.run(*fs.demo.load(), fs.demo.behaviour("refusal"), out, study.Settings(**TINY), name="demo")


TINY: dict[str, Any] = {"layer": 3, "position": -1, "methods": ("dim", "ntp"), "steps": 2, "n_patch": 2, "controls": 1}
TINY |= {"n_faithful": 1, "n_test": 2, "n_utility": 2, "quadrature": 2, "shares": (0.1,), "sparsities": (0.5,)}
TINY |= {"max_new_tokens": 12}
SMALL = ("--prompts", 1, "--max-new-tokens", 2, "--steps", 2, "--held-out", 1, "--layers", "2,3", "--position", -1)
WORK: dict[str, Callable[[Path], None]] = {
    "extract": command("extract", "--model", "demo", "--behaviour", "tone", "--out", ...),
    **{name: trained(method) for name, method in (("ntp", ntp), ("po", po), ("reps", reps), ("bipo", bipo))},
    "capture": captured,
    "sweep": swept,
    "observe": observed,
    "train": command("extract", "--behaviour", "tone", "--method", "ntp,dim", *SMALL, "--out", ...),
    "demo": lambda out: demo_run.run(out, prompts=1) and None,
}
SLOW = [pytest.param(name, marks=pytest.mark.full) for name in [*WORK][-3:]]


def contents(folder: Path) -> dict[str, bytes]:
    """Every file but a sweep's store, and but for the time that something took."""
    there = [path for path in folder.rglob("*") if path.is_file() and not path.name.startswith("rows.db")]
    files = {str(path.relative_to(folder)): path.read_bytes() for path in there}
    return {name: re.sub(rb'"seconds": [0-9.e-]+', b"", data) for name, data in files.items()}


class Operations:
    """Counts the operations on files below a folder, and kills the process in front of one of them."""

    def __init__(self, folder: Path, at: int = -1) -> None:
        self.folder, self.at, self.count = str(folder), at, 0
        sys.addaudithook(self)

    def __call__(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event in WRITES and any(str(each).startswith(self.folder) for each in arguments):
            if self.count == self.at:
                os.kill(os.getpid(), signal.SIGKILL)
            self.count += 1


def child(name: str, folder: Path, at: int, counted: Any) -> None:
    torch.set_num_threads(1)
    operations = Operations(folder, at)
    WORK[name](folder / "out")
    counted.value = operations.count
    os._exit(0)


def started(name: str, folder: Path, at: int = -1) -> tuple[Any, Any]:
    context = multiprocessing.get_context("fork")
    counted = context.Value("i", -1)
    process = context.Process(target=child, args=(name, folder, at, counted))
    process.start()
    return process, counted


@pytest.mark.parametrize("name", [*WORK][:-3] + SLOW)
def test_killed_and_run_again(name, tmp_path):
    fs.demo.load()
    whole, began = tmp_path / "whole", time.monotonic()
    process, counted = started(name, whole)
    process.join()
    assert process.exitcode == 0
    span, expected, n = time.monotonic() - began, contents(whole), counted.value
    assert expected and n > 2 and not any(".part" in each or "/." in each for each in expected)
    seed = random.SystemRandom().randrange(2**32)
    rng = random.Random(seed)
    print(f"seed {seed}, {n} operations on files in {span:.1f} s")
    for i in range(KILLS):
        folder = tmp_path / str(i)
        for kill in range(2):  # the second run is killed, too
            at = rng.randrange(n)
            process, _ = started(name, folder, -1 if i % 2 else at)
            if i % 2:
                time.sleep(rng.uniform(0, span))
                process.kill()
            process.join(600)
            if not i % 2 and not kill:
                assert process.exitcode == -signal.SIGKILL, f"seed {seed}"
            for path, data in contents(folder).items():
                # Whole under its name: as an undisturbed run has it, but for a checkpoint of fewer steps.
                if not path.endswith((".part", ".checkpoint")) and path != "out/state":
                    assert data == expected[path], f"seed {seed}: {path} is torn"
        process, _ = started(name, folder)
        process.join(600)
        assert process.exitcode == 0 and contents(folder) == expected, f"seed {seed}, kill {i}"
