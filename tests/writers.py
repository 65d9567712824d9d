"""Everything in faststeer that writes a file, run where writing fails: `python writers.py CONDITION,... FOLDER` prints
one JSON object with what each writer said and whether anything in the folder changed. For the conditions full and
readonly the folder is a small disk of its own."""

from __future__ import annotations

import itertools
import json
import resource
import shutil
import sqlite3
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))

from models import build
from readers import V, _scores_file
from strategies import randn

import faststeer as fs
from faststeer.algebra import sparsify
from faststeer.artefacts import ArtefactStore
from faststeer.evaluate.sweep import Store, Sweep
from faststeer.extract import Activations, Candidates
from faststeer.extract.optimise import checkpoint
from faststeer.files import write_atomically
from faststeer.folding import fold, fold_adapter
from faststeer.formats import save
from faststeer.observe.capture import Captured, _write
from faststeer.observe.circuits import Circuit
from faststeer.observe.patching import Scores

SCRATCH = tempfile.gettempdir()
number = itertools.count()  # so that no two calls write the same


def _vector() -> fs.SteeringVector:
    return fs.SteeringVector({1: randn(next(number), 8), 2: randn(2, 8)})


def _capture(folder: Path) -> None:
    tensor = randn(next(number), 1, 8)
    batch = {0: Captured([1, 2], 2, torch.tensor([-1]), lambda at, layer: tensor)}
    _write(ArtefactStore(folder, "f"), 1, batch, ("resid_pre",), [0])


def _checkpoint(folder: Path) -> None:
    states = [checkpoint.VectorState(*randn(next(number), 4, 8))]
    checkpoint.Checkpoint(states, 1, {}).save(folder / "checkpoint.safetensors")


def _activations(folder: Path) -> None:
    sides = randn(next(number), 2, 3, 1, 2, 4)
    Activations(*sides, positions=(-1,), at="resid_pre", paired=False).save(folder / "activations.safetensors")


def _candidates(folder: Path) -> None:
    means = randn(next(number), 2, 1, 2, 4, dtype=torch.float64)
    Candidates(*means, positions=(-1,), at="resid_pre", n_positive=1, n_negative=1).save(folder / "c.safetensors")


def _store(folder: Path) -> None:
    """Answers enough for new pages, in a run of their own."""
    run = f"r{next(number)}"
    with Store(folder / "s.sqlite") as store:
        store.begin(run, 2, Sweep(["a"], vectors={"v": V}, layers=[1], projections=0), {})
        for setting in range(50):
            store.add(run, answers=[(setting, 0, 0, "text " * 500, 1, bytes(4), "eos", None)])


def _new_store(folder: Path) -> None:
    with Store(folder / f"new{next(number)}.sqlite") as store:
        store.begin("r", 2, Sweep(["a"], vectors={"v": V}, layers=[1], projections=0), {})


def _writers() -> dict[str, Callable[[Path], object]]:
    model = build("llama")
    hidden = model.config.hidden_size
    plan = fs.Plan([fs.Ablate(randn(0, hidden), layers="all", at=("resid_pre", "attn_out", "mlp_out"))])
    folded = fold(model, plan)
    adapter = fold_adapter(build("llama"), plan)
    with tempfile.TemporaryDirectory() as folder:
        (path := Path(folder) / "s").write_bytes(_scores_file())
        scores = Scores.load(path)
    circuit = Circuit(scores.graph, scores.graph.edges)
    return {
        "vector": lambda folder: _vector().save(folder / "v.safetensors"),
        "sparse vector": lambda folder: sparsify(_vector(), keep=0.5).save(folder / "sparse.safetensors"),
        "gguf": lambda folder: save(_vector(), folder / "v.gguf"),
        "plan": lambda folder: write_atomically(folder / "plan.json", fs.Plan([fs.Add(_vector())]).to_json()),
        "in a new folder": lambda folder: _vector().save(folder / f"new{next(number)}" / "v.safetensors"),
        "capture": _capture,
        "checkpoint": _checkpoint,
        "activations": _activations,
        "candidates": _candidates,
        "scores": lambda folder: scores.save(folder / "scores.safetensors"),
        "part of a study": lambda folder: ArtefactStore(folder, next(number)).json("part", 0, lambda: [1] * 500),
        "figure": lambda folder: circuit.plot(folder / "circuit.png"),
        "store": _store,
        "new store": _new_store,
        "folded model": lambda folder: folded.save(folder / f"folded{next(number)}"),
        "adapter": lambda folder: adapter.save(folder / f"adapter{next(number)}"),
    }


@contextmanager
def limited(which: int, most: int) -> Iterator[None]:
    soft, hard = resource.getrlimit(which)
    resource.setrlimit(which, (most, hard))
    try:
        yield
    finally:
        resource.setrlimit(which, (soft, hard))


@contextmanager
def condition(name: str) -> Iterator[None]:
    """Where writing fails, for as long as the block lasts."""
    if name == "limit":
        with limited(resource.RLIMIT_FSIZE, 64):
            yield
    elif name == "files":
        with limited(resource.RLIMIT_NOFILE, 3):  # stdin, stdout and stderr have the numbers below
            yield
    else:  # the folder itself is so
        yield


def there(folder: Path, rows: bool = True) -> dict[str, object]:
    """Every file with its content; of a store (with `rows`) its finished rows, as the log beside it may change."""
    files: dict[str, object] = {}
    for path in sorted(folder.rglob("*")):
        if rows and path.suffix == ".sqlite" and path.stat().st_size:
            with tempfile.TemporaryDirectory(dir=SCRATCH) as scratch:  # where there is room for what it opens beside it
                for part in path.parent.glob(f"{path.name}*"):
                    shutil.copy(part, scratch)
                db = sqlite3.connect(Path(scratch) / path.name)
                assert db.execute("PRAGMA integrity_check").fetchone()[0] == "ok"
                tables = db.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]
                files[path.name] = tables and db.execute("SELECT count(*) FROM runs").fetchone()[0]
                db.close()
        elif (
            not (rows and path.suffix == ".sqlite")
            and not path.name.endswith(("-wal", "-shm", "-journal"))
            and path.is_file()
        ):
            files[str(path.relative_to(folder))] = path.read_bytes().hex()
    return files


def fill(folder: Path) -> None:
    with open(folder / "filler", "wb", buffering=0) as file:
        for size in (4096, 1):
            with suppress(OSError):
                while file.write(bytes(size)):
                    pass


def main(conditions: list[str], folder: Path) -> None:
    writers = _writers()
    tempfile.tempdir = str(folder)
    for write in writers.values():
        write(folder)
    said: dict[str, dict[str, object]] = {}
    for name in conditions:
        if name == "full":
            fill(folder)
        if name == "readonly":
            (folder / "filler").unlink(missing_ok=True)
            subprocess.run(["mount", "-o", "remount,ro", folder], check=True)
        for writer, write in writers.items():
            before = there(folder, name != "readonly")
            error: BaseException | None = None
            with condition(name):
                try:
                    write(folder)
                except Exception as caught:
                    error = caught
            kind = "" if error is None else "OSError" if isinstance(error, OSError) else type(error).__name__
            same = there(folder, name != "readonly") == before
            said[f"{writer}, {name}"] = {"kind": kind, "text": str(error), "same": same}
    print(json.dumps(said))


if __name__ == "__main__":
    main(sys.argv[1].split(","), Path(sys.argv[2]))
