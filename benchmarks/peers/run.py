"""faststeer beside other steering libraries on SmolLM2, each in an environment of its own, on a CPU.

    make bench-peers          or  python benchmarks/peers/run.py [--quick] [--peers repeng ...] [--rounds 2]

Same weights, same prompts, same directions, same number of threads, fp32. A peer is a small script (`with_*.py`) in a
process of its own; the processes take turns, `--rounds` times, hand-written hooks among them. Within a process the
cases take turns. Measured: seconds from 24 pairs of contrastive prompts to a vector for every layer, by each peer's
default method; tokens per second of greedy generation of `--rows` prompts x `--new` tokens, prompts read included,
unsteered, with a vector added at one layer, at every layer (of 1 to 29: llama.cpp cannot steer layer 0), and with
another plan in each row; and the largest difference of logits from the hand-written hook's. Ratios to hooks are those
of medians of the same round.

About 20 minutes on two idle cores, environments included. llama.cpp is among them where its Python package has a wheel.
`--quick` is a try-out of the same path with few tokens; `--peers` measures some anew, hooks beside them, and keeps the
rest of what is in the results. Every measurement is appended to
`out/bench-peers/measurements.jsonl` as it is made; a run that was stopped goes on where it was, `--fresh` begins anew.
At the end: benchmarks/results/peers.csv, peers.machine.json and peers.png (`--quick`: in out/bench-peers). A peer that
cannot be installed or fails is a row that says why.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
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
        "repeats": options.repeats,
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


def run_peer(
    entry: Entry, python: Path, job: dict[str, Any], round_: int, log: results.Log, out: Path, minutes: float
) -> None:
    """Run one peer's process and log what it prints; what it says on stderr goes to a file."""
    folder = out / entry.name.replace(" ", "_").replace(",", "")
    folder.mkdir(exist_ok=True)
    path = folder / "job.json"
    path.write_text(json.dumps(job | {"out": str(folder), "variant": entry.variant}))
    environment = os.environ | {
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": str(job["threads"]),
        "MKL_NUM_THREADS": str(job["threads"]),
        "TOKENIZERS_PARALLELISM": "false",
    }
    failed = ""
    with (folder / "stderr.txt").open("w") as errors:
        process = subprocess.Popen(
            ["timeout", "--kill-after=5", f"{minutes * 60:.0f}", str(python), str(HERE / entry.script), str(path)],
            stdout=subprocess.PIPE, stderr=errors, text=True, env=environment,
        )  # fmt: skip
        assert process.stdout
        for line in process.stdout:
            if line.startswith(LINE):  # other libraries print, too
                log.add({"peer": entry.name, "round": round_, **json.loads(line.removeprefix(LINE))})
        status = process.wait()
    if status in (124, 137):
        failed = f"took longer than {minutes:.0f} minutes"
    elif status:
        lines = (folder / "stderr.txt").read_text(errors="replace").strip().splitlines()
        failed = lines[-1][:200] if lines else f"exit code {status}"
    log.add({"peer": entry.name, "round": round_, "measure": "end", **({"failed": failed} if failed else {})})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [entry.name for entry in PEERS]
    parser.add_argument("--peers", nargs="+", choices=names, default=names)
    parser.add_argument("--rounds", type=int, default=2, help="processes of each peer")
    parser.add_argument("--repeats", type=int, default=2, help="of each case in a process")
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--new", type=int, default=24, help="tokens of each answer")
    parser.add_argument("--pairs", type=int, default=24, help="pairs of contrastive prompts")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--minutes", type=float, default=5, help="a process that takes longer is ended")
    parser.add_argument("--quick", action="store_true", help="try it: 4 rows, 4 tokens, 4 pairs, one round")
    parser.add_argument("--fresh", action="store_true", help="measure everything anew")
    parser.add_argument("--out", type=Path, default=HERE.parents[1] / "out" / "bench-peers")
    options = parser.parse_args()
    if options.quick:
        options.rounds, options.repeats, options.rows, options.new, options.pairs = 1, 1, 4, 4, 4
        options.out = options.out / "quick"
    start, out = time.monotonic(), options.out.resolve()
    if options.fresh:
        shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True, exist_ok=True)
    entries = [entry for entry in PEERS if entry.name in options.peers or entry.name == table.BASELINE]
    pythons: dict[str, Path | str] = {}  # or why there is none
    for entry in entries:
        name = entry.environment or ""
        if name not in pythons:
            try:
                pythons[name] = environments.make(name) if name else Path(sys.executable)
            except environments.NotInstalled as error:
                pythons[name] = str(error)
    job = write_job(options, out)
    log = results.Log(out / "measurements.jsonl", job)
    work = [(round_, entry) for round_ in range(options.rounds) for entry in entries]
    for number, (round_, entry) in enumerate(work):
        at = {"peer": entry.name, "round": round_}
        if log.has(**at, measure="end"):
            continue
        log.forget(**at)  # what a process that did not end measured
        print(f"[{time.monotonic() - start:5.0f} s] {number + 1}/{len(work)} {entry.name}", file=sys.stderr, flush=True)
        python = pythons[entry.environment or ""]
        if isinstance(python, str):
            log.add({**at, "measure": "end", "failed": f"not installed: {python}"})
        else:
            run_peer(entry, python, job, round_, log, out, options.minutes)
    rows: Sequence[table.Row] = table.rows_of(log.rows)
    folder = out if options.quick else results.FOLDER
    versions = {line["peer"]: line["versions"] for line in log.rows if "versions" in line}
    commits = dict.fromkeys(options.peers, results.machine()["commit"])
    if set(options.peers) < set(names) and (folder / "peers.csv").is_file():
        before = json.loads((folder / "peers.machine.json").read_text(encoding="utf-8"))
        rows = table.renewed(results.read(folder / "peers.csv"), rows, options.peers)
        versions = before["versions"] | versions
        commits = before.get("commits", dict.fromkeys(names, before["commit"])) | commits
    more = {"versions": versions, "commits": commits, "threads": job["threads"]}
    more |= {"rows": options.rows, "new_tokens": options.new}
    path = results.write("peers", rows, folder, more)
    table.draw(rows, folder / "peers.png")
    print(table.markdown(rows))
    print(f"{path}, {time.monotonic() - start:.0f} s")


if __name__ == "__main__":
    main()
