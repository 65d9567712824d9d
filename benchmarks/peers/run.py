"""faststeer beside other steering libraries on SmolLM2, each in an environment of its own, on a CPU.

    make bench-peers          or  python benchmarks/peers/run.py [--quick] [--peers repeng ...] [--repeats 5]

Same weights, same prompts, same directions, same number of threads, fp32. A peer is a small script (`with_*.py`) in a
process of its own. All processes are there from the beginning and take turns measurement by measurement, hand-written
hooks among them: a machine that is slow for a minute is slow for all. Measured: seconds from 24 pairs of contrastive
prompts to a vector for every layer, by each peer's default method; tokens per second of greedy generation of `--rows`
prompts x `--new` tokens, prompts read included, unsteered, with a vector added at one layer, at every layer (of 1 to
29: llama.cpp cannot steer layer 0), and with another plan in each row; and the largest difference of logits from the
hand-written hook's. A ratio to hooks is one of the same case and repeat.

About 20 minutes on two idle cores, and once as long for the environments (llama.cpp is compiled for the machine).
`--quick` is a try-out of the same path with few tokens. With `--peers` or `--quick` the results go to out/bench-peers,
else to benchmarks/results: peers.csv, peers.machine.json and peers.png, always of one run. Every measurement is
appended to `out/bench-peers/measurements.jsonl` as it is made; a run that was stopped goes on where it was, `--fresh`
begins anew. A peer that cannot be installed or fails is a row that says why.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))
import results
import smollm2

from peers import environments, table
from peers.job import LINE

HERE = Path(__file__).parent


@dataclass(frozen=True)
class Entry:
    name: str
    script: str
    environment: str | None = None  # None: this one
    variant: str = ""


PEERS = (
    Entry(table.BASELINE, "with_hooks.py"),
    Entry("faststeer, fs.steer", "with_faststeer.py"),
    Entry("faststeer, Engine", "with_faststeer.py", variant="engine"),
    Entry("repeng", "with_repeng.py", "repeng"),
    Entry("steering-vectors", "with_steering_vectors.py", "steering-vectors"),
    Entry("nnsight", "with_nnsight.py", "nnsight"),
    Entry("TransformerLens", "with_transformer_lens.py", "transformer-lens"),
    Entry("llama.cpp, fp32", "with_llama_cpp.py", "llama-cpp", "f32"),
    Entry("llama.cpp, Q4_1", "with_llama_cpp.py", "llama-cpp", "q4"),
)


def write_job(options: argparse.Namespace, out: Path) -> dict[str, Any]:
    """Return the job that all peers have in common; what it needs is written to `out`."""
    import faststeer as fs
    from faststeer.hf.batching import encode, render
    from faststeer.hf.loading import smollm2_file

    model, tokenizer = smollm2.load()
    sides = smollm2.contrast(options.pairs)
    vector = fs.extract.dim(model, tokenizer, *sides, at="resid_post", position=-1)
    directions = np.stack([vector[layer].numpy() for layer in range(model.config.num_hidden_layers)])
    np.save(out / "directions.npy", 0.1 * directions)  # small: at full length at every layer, nothing is left
    gguf = out / "smollm2-f32.gguf"
    if not gguf.is_file():
        write_f32(smollm2_file(), gguf)
    positive, negative = (render(tokenizer, list(side)) for side in sides)
    return {
        "folder": model.config._name_or_path,
        "gguf": str(gguf),
        "gguf_q4": str(smollm2_file()),
        "directions": str(out / "directions.npy"),
        "layer": smollm2.LAYER,
        "layers": list(range(1, len(directions))),
        "prompts": encode(tokenizer, smollm2.prompts(options.rows)),
        "pad_token": tokenizer.pad_token,
        "eos_token": tokenizer.eos_token,
        "bos_token": tokenizer.bos_token,
        "positive": positive,
        "negative": negative,
        "new_tokens": options.new,
        "threads": options.threads,
    }


def write_f32(source: Path, target: Path) -> None:
    """Write a GGUF file's model with all tensors in fp32, everything else as it is."""
    import gguf

    reader = gguf.GGUFReader(source)
    architecture = reader.fields["general.architecture"].contents()
    part = target.with_suffix(".part")
    writer = gguf.GGUFWriter(part, architecture)
    for name, field in reader.fields.items():
        if name.startswith("GGUF.") or name in ("general.architecture", "general.file_type"):
            continue
        kind = field.types[0]
        inner = field.types[-1] if kind == gguf.GGUFValueType.ARRAY else None
        writer.add_key_value(name, field.contents(), kind, sub_type=inner)
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    for tensor in reader.tensors:
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        writer.add_tensor(tensor.name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    part.replace(target)


class PeerFailed(Exception):
    """A peer's process ended, or took too long; the message says which."""


class PeerProcess:
    """A peer's process, which measures what it is asked for. What it says on stderr goes to a file.

    Args:
        minutes: a start or a measurement that takes longer ends the process.
    """

    def __init__(self, entry: Entry, python: Path, job: dict[str, Any], out: Path, minutes: float) -> None:
        folder = out / entry.name.replace(" ", "_").replace(",", "")
        folder.mkdir(exist_ok=True)
        path, self._errors, self._minutes = folder / "job.json", folder / "stderr.txt", minutes
        path.write_text(json.dumps(job | {"out": str(folder), "variant": entry.variant}))
        environment = os.environ | {
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": str(job["threads"]),
            "MKL_NUM_THREADS": str(job["threads"]),
            "TOKENIZERS_PARALLELISM": "false",
        }
        with self._errors.open("w") as errors:
            self._process = subprocess.Popen(
                [str(python), str(HERE / entry.script), str(path)],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True, env=environment,
            )  # fmt: skip
        self.can: list[list[str]] = []

    def begin(self) -> Iterator[dict[str, Any]]:
        """What it reports until it is ready; then `can` is there: the measurements that it can make."""
        with self._limit():
            while (row := self._next())["measure"] != "ready":
                yield row
        self.can = row["can"]

    def measure(self, measure: str, case: str) -> dict[str, Any]:
        """Its seconds and, of a generation, its tokens."""
        assert self._process.stdin
        with self._limit():
            with suppress(OSError):  # it has ended: the next line of it says so
                print(json.dumps([measure, case]), file=self._process.stdin, flush=True)
            return self._next()

    def end(self) -> None:
        self._process.kill()
        self._process.communicate()

    @contextmanager
    def _limit(self) -> Iterator[None]:
        self._late = False
        timer = threading.Timer(self._minutes * 60, self._stop)
        timer.start()
        try:
            yield
        finally:
            timer.cancel()

    def _stop(self) -> None:
        self._late = True
        self._process.kill()

    def _next(self) -> dict[str, Any]:
        assert self._process.stdout
        for line in self._process.stdout:
            if line.startswith(LINE):  # other libraries print, too
                return json.loads(line.removeprefix(LINE))
        status = self._process.wait()
        if self._late:
            raise PeerFailed(f"took longer than {self._minutes:g} minutes")
        lines = self._errors.read_text(errors="replace").strip().splitlines()
        raise PeerFailed(lines[-1][:200] if lines else f"exit code {status}")


def start(entry: Entry, job: dict[str, Any], log: results.Log, out: Path, minutes: float) -> PeerProcess | None:
    """A peer's process when it is ready, its reports in the log; None where the log says why there is none."""
    log.forget(peer=entry.name, repeat=None)
    try:
        python = environments.make(entry.environment) if entry.environment else Path(sys.executable)
    except environments.NotInstalled as error:
        log.add({"peer": entry.name, "repeat": None, "measure": "end", "failed": f"not installed: {error}"})
        return None
    process = PeerProcess(entry, python, job, out, minutes)
    try:
        for row in process.begin():
            log.add({"peer": entry.name, "repeat": None, **row})
    except PeerFailed as error:
        log.add({"peer": entry.name, "repeat": None, "measure": "end", "failed": str(error)})
        return None
    return process


def measure_all(processes: dict[str, PeerProcess], repeats: int, log: results.Log) -> None:
    """Every measurement of every peer, once a repeat, in turn; every second repeat in the opposite order. A peer that
    fails is asked nothing more."""
    started = time.monotonic()
    for repeat in range(repeats):
        for measure, case in (("vector", ""), *(("generate", case) for case in table.CASES)):
            for peer in [*processes][:: -1 if repeat % 2 else 1]:
                key = {"peer": peer, "measure": measure, "case": case, "repeat": repeat}
                if [measure, case] not in processes[peer].can or log.has(**key):
                    continue
                try:
                    log.add(key | processes[peer].measure(measure, case))
                except PeerFailed as error:
                    log.add({"peer": peer, "repeat": None, "measure": "end", "failed": str(error)})
                    del processes[peer]
        print(f"[{time.monotonic() - started:5.0f} s] {repeat + 1}/{repeats}", file=sys.stderr, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [entry.name for entry in PEERS]
    parser.add_argument("--peers", nargs="+", choices=names, default=names, help="only these and the hooks")
    parser.add_argument("--repeats", type=int, default=5, help="of each measurement")
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--new", type=int, default=24, help="tokens of each answer")
    parser.add_argument("--pairs", type=int, default=24, help="pairs of contrastive prompts")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--minutes", type=float, default=5, help="a process that is silent for longer is ended")
    parser.add_argument("--quick", action="store_true", help="try it: 4 rows, 4 tokens, 4 pairs, one repeat")
    parser.add_argument("--fresh", action="store_true", help="measure everything anew")
    parser.add_argument("--out", type=Path, default=HERE.parents[1] / "out" / "bench-peers")
    options = parser.parse_args()
    if options.quick:
        options.repeats, options.rows, options.new, options.pairs = 1, 4, 4, 4
        options.out = options.out / "quick"
    begun, out = time.monotonic(), options.out.resolve()
    if options.fresh:
        shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True, exist_ok=True)
    job = write_job(options, out)
    log = results.Log(out / "measurements.jsonl", job)
    processes: dict[str, PeerProcess] = {}
    try:
        for entry in PEERS:
            if entry.name in (*options.peers, table.BASELINE):
                print(f"[{time.monotonic() - begun:5.0f} s] {entry.name} starts", file=sys.stderr, flush=True)
                if process := start(entry, job, log, out, options.minutes):
                    processes[entry.name] = process
        measure_all(processes, options.repeats, log)
    finally:
        for process in processes.values():
            process.end()
    rows = table.rows_of(log.rows)
    folder = out if options.quick or set(options.peers) < set(names) else results.FOLDER
    versions = {row["peer"]: row["versions"] for row in log.rows if "versions" in row}
    more = {"versions": versions, "threads": job["threads"], "rows": options.rows, "new_tokens": options.new}
    path = results.write("peers", rows, folder, more)
    table.draw(rows, folder / "peers.png")
    print(table.markdown(rows))
    print(f"{path}, {time.monotonic() - begun:.0f} s")


if __name__ == "__main__":
    main()
