"""Decode steps of vLLM on a GPU, on random models of real shape: unsteered, one layer steered, every layer, a vector
per plan and layer, and forward hooks with eager, which is what one has without faststeer.

    python benchmarks/vllm/gpu.py --out DIR [--carry .carry] [--seconds 540] [--forms]

It needs no network. Where vLLM is not installed, `--carry` names a folder that holds it for this machine's Python and
PyTorch: `vllm.tar.xz` (the package) and `whl/` (the wheels that it needs); both are unpacked beside the PyTorch that
is there, into a folder of their own, and nothing that is installed is touched. Each engine runs in a process of its
own, since memory and patches are per process; the one without faststeer comes first and last, and the ratio is to the
mean of both. `--forms` adds an engine whose op is one with the next norm (forms.py). Every request generates 128
tokens, greedily, with prefix caching off.

Without a GPU this is a dry run: tiny models on the CPU. It measures nothing, and everything that it writes says so.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import checkout
from processes import Command
from records import Appended, read

ROWS, PROMPT, NEW, REPEATS = 256, 128, 128, 3
# What the published configurations say.
_QWEN = {
    "model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], "hidden_size": 1536, "intermediate_size": 8960,
    "num_hidden_layers": 28, "num_attention_heads": 12, "num_key_value_heads": 2, "vocab_size": 151936,
    "max_position_embeddings": 32768, "tie_word_embeddings": True, "rms_norm_eps": 1e-6, "rope_theta": 1e6,
}  # fmt: skip
_LLAMA = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 4096, "intermediate_size": 14336,
    "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256,
    "max_position_embeddings": 131072, "tie_word_embeddings": False, "rms_norm_eps": 1e-5, "rope_theta": 5e5,
}  # fmt: skip
MODELS = {"Qwen2.5-1.5B": _QWEN, "Llama-3.1-8B": _LLAMA}
_TINY = {"hidden_size": 128, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
_TINY |= {"num_key_value_heads": 2, "vocab_size": 101, "max_position_embeddings": 256}
STEERED = ("unsteered", "one layer", "every layer", "a vector per plan and layer")
COLUMNS = (
    "run", "model", "engine", "case", "rows", "new", "prefill_ms", "step_ms", "step_ms_low", "step_ms_high", "repeats",
    "tokens_per_second", "start", "back_end", "error",
)  # fmt: skip
# (engine, the cases it runs), in the order in which engines start.
ENGINES = (("off", ("vLLM",)), ("on", STEERED), ("hooks, eager", ("every layer",)), ("off", ("vLLM",)))
FUSED = ("fused", STEERED)


# One engine -----------------------------------------------------------------------------------------------------------


def serve(kind: str, model: str, options: argparse.Namespace) -> None:
    """The process of one engine: prints a line of JSON per repeat of each of its cases."""
    import torch
    from vllm import LLM, SamplingParams

    cuda = torch.cuda.is_available()
    rows, prompt, new = (ROWS, PROMPT, NEW) if cuda else (4, 8, 4)
    config = json.loads((Path(model) / "config.json").read_text())
    start = time.perf_counter()
    more: dict[str, Any] = {"gpu_memory_utilization": 0.85} if cuda else {"block_size": 32}
    if options.attention and cuda:
        more["attention_backend"] = options.attention
    if kind == "fused":
        import forms

        forms.fuse()
    llm = LLM(
        model=model, skip_tokenizer_init=True, load_format="dummy", dtype="bfloat16" if cuda else "float32",
        max_model_len=prompt + new + 1, max_num_seqs=rows, enable_prefix_caching=False,
        enforce_eager=kind == "hooks, eager" or not cuda, **more,
    )  # fmt: skip
    loaded = time.perf_counter() - start
    if kind == "hooks, eager":
        llm.apply_model(add_hooks)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1, config["vocab_size"], (rows, prompt), generator=generator).tolist()
    prompts = [{"prompt_token_ids": one} for one in ids]
    from dataclasses import asdict

    from faststeer import measure, ops

    back_end = ops.backend_for("cuda" if cuda else "cpu") if kind in ("on", "fused") else ""
    for case in dict((*ENGINES, FUSED))[kind]:
        extras = payloads(kind, case, config, rows)

        def draw(n: int, extras: Any = extras) -> None:
            parameters = [
                SamplingParams(temperature=0, max_tokens=n, ignore_eos=True, detokenize=False, extra_args=extra)
                for extra in extras
            ]
            answers = llm.generate(prompts, parameters, use_tqdm=False)
            if (count := sum(len(answer.outputs[0].token_ids) for answer in answers)) != rows * n:
                raise RuntimeError(f"{count} tokens instead of {rows * n}")

        timing = measure.time_steps(draw, new, "cpu", repeats=REPEATS if cuda else 1)  # vLLM waits for its device
        row = {"engine": kind, "case": case, "rows": rows, "new": new, "start": round(loaded, 1)} | asdict(timing)
        row["back_end"] = back_end
        row["tokens_per_second"] = round(rows / max(timing.step_ms, 1e-4) * 1e3, 1)
        print("ROW", json.dumps(row), flush=True)


def payloads(kind: str, case: str, config: dict[str, Any], rows: int) -> list[Any]:
    if kind not in ("on", "fused") or case == "unsteered":
        return [None] * rows
    import torch

    import faststeer as fs
    from faststeer.vllm import plan

    vector = torch.randn(config["hidden_size"], generator=torch.Generator().manual_seed(0))
    vector /= vector.norm()
    if case == "one layer":
        return [plan(fs.Add(vector, 0.01, layers=config["num_hidden_layers"] // 2))] * rows
    if case == "every layer":
        return [plan(fs.Add(vector, 0.01, layers="all"))] * rows
    generator = torch.Generator().manual_seed(1)

    def own() -> Any:
        vectors = torch.randn(config["num_hidden_layers"], config["hidden_size"], generator=generator)
        return plan(fs.Add(fs.SteeringVector(dict(enumerate(torch.nn.functional.normalize(vectors, dim=1)))), 0.01))

    return [own() for _ in range(rows)]


def add_hooks(model: Any) -> None:
    """What a person writes: a forward hook on every layer, on the half of the residual stream that it returns."""
    import torch

    layers = model.model.layers
    parameter = next(model.parameters())
    vector = torch.ones(model.config.hidden_size, device=parameter.device, dtype=parameter.dtype)
    vector = 0.01 * vector / vector.norm()
    for layer in layers:
        layer.register_forward_hook(lambda _m, _a, out: (out[0] + vector, *out[1:]))


# All of them ----------------------------------------------------------------------------------------------------------


def unpack(carry: Path, site: Path) -> None:
    """vLLM and what it needs, from wheels in a folder, into a folder of their own. Two packages that only structured
    output needs are empty modules."""
    command = [sys.executable, "-m", "pip", "install", "-q", "--no-index", "--no-deps", "--no-compile", "--target"]
    subprocess.run([*command, str(site), *map(str, sorted((carry / "whl").glob("*.whl")))], check=True)
    with tarfile.open(carry / "vllm.tar.xz") as packed:
        packed.extractall(site, filter="data")
    empty = (
        "def __getattr__(name):\n    if name.startswith('__'):\n        raise AttributeError(name)\n"
        "    return type(name, (), {})\n"
    )
    for name in ("xgrammar", "llguidance"):
        (site / f"{name}.py").write_text(empty)


def install(site: Path) -> None:
    """The checkout as a package, with the entry point by which vLLM finds it."""
    checkout.install(site)
    about = site / "faststeer-0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: faststeer\nVersion: 0\n")
    (about / "entry_points.txt").write_text("[vllm.general_plugins]\nfaststeer = faststeer.vllm.plugin:register\n")


def run_engine(
    kind: str, model: Path, options: argparse.Namespace, path: str, limit: float, append: Appended, base: dict[str, Any]
) -> str:
    """Measure with one engine, each case written as it comes; returns what went wrong. The engine and the processes
    that it starts end with their time, or with this program."""
    environment = dict(os.environ) | {
        "PYTHONPATH": path,
        "PYTHONUNBUFFERED": "1",
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_LOGGING_LEVEL": "WARNING",
        "VLLM_ALLOW_INSECURE_SERIALIZATION": "1",  # apply_model takes a function
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "FASTSTEER_VLLM": "1" if kind in ("on", "fused") else "0",
    }
    if kind in ("hooks, eager", "fused"):  # in one process, since its engine cannot be sent these files' functions
        environment["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    command = [sys.executable, __file__, "--serve", kind, "--model", str(model), "--attention", options.attention]
    log = options.out / "vllm_gpu.log"
    with log.open("a", buffering=1) as file:
        file.write(f"\n$ {kind} {model.name}\n")

        def on_line(line: str) -> None:
            file.write(line + "\n")
            if line.startswith("ROW "):
                append(base | json.loads(line.removeprefix("ROW ")))

        ended = Command(command, max(limit, 1), on_line, environment).wait()
        file.write(f"({ended})\n")
    return "" if ended.code == 0 else f"{ended}, see {log.name}"


def measure_all(options: argparse.Namespace, path: str, cuda: bool, append: Appended) -> None:
    end, run = time.monotonic() + options.seconds, "gpu" if cuda else "dry run"
    with tempfile.TemporaryDirectory() as folder:
        for number, (name, config) in enumerate(MODELS.items()):
            model = Path(folder) / name
            model.mkdir()
            settings = config if cuda else config | _TINY
            (model / "config.json").write_text(json.dumps(settings | {"torch_dtype": "bfloat16"}))
            share = (end - time.monotonic()) / (len(MODELS) - number)
            until = time.monotonic() + share
            kinds = [kind for kind, _ in (ENGINES if cuda else ENGINES[:-1])]
            for kind in [*kinds[:2], *(["fused"] if options.forms else []), *kinds[2:]]:
                base = {"run": run, "model": name}
                if until - time.monotonic() < 1:
                    error = "not started: out of time"
                else:
                    error = run_engine(kind, model, options, path, until - time.monotonic(), append, base)
                if error:
                    append(base | {"engine": kind, "error": error})
                print(f"{name}, {kind}: {error or 'done'}", flush=True)


def table(rows: Iterable[dict[str, str]]) -> str:
    """`of off`: tokens per second against the mean of the engines without faststeer."""
    rows, lines = list(rows), [f"{'vLLM':60} {'step, ms':>10} {'tokens/s':>10} {'of off':>8}"]
    for row in rows:
        what = f"{row['model']}, {row['engine']}, {row.get('case', '')}"
        if "error" in row:
            lines.append(f"{what:60} {row['error']}")
            continue
        plain = [
            float(r["tokens_per_second"])
            for r in rows
            if (r["model"], r["engine"]) == (row["model"], "off") and "error" not in r
        ]
        ratio = f"{float(row['tokens_per_second']) * len(plain) / sum(plain):.4f}" if plain else ""
        lines.append(f"{what:60} {row['step_ms']:>10} {row['tokens_per_second']:>10} {ratio:>8}")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("out/gpu-vllm"))
    parser.add_argument("--carry", type=Path, help="folder with vllm.tar.xz and whl/, where vLLM is not installed")
    parser.add_argument("--seconds", type=float, default=540.0, help="begin nothing new after so long")
    parser.add_argument("--attention", default="FLASH_ATTN", help="vLLM's attention backend")
    parser.add_argument("--forms", action="store_true", help="also the op that is one with the next norm")
    parser.add_argument("--commit", help="what to write down as the commit, where there is no git")
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    parser.add_argument("--model", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        serve(options.serve, options.model, options)
        return 0
    import torch

    cuda = torch.cuda.is_available()
    options.out.mkdir(parents=True, exist_ok=True)
    csv = options.out / ("vllm_gpu.csv" if cuda else "dry_run_vllm.csv")
    csv.unlink(missing_ok=True)
    append = Appended(csv, COLUMNS)
    with tempfile.TemporaryDirectory() as temporary:
        site = Path(temporary)
        if options.carry is not None:
            unpack(options.carry, site)
        install(site)
        sys.path.insert(0, str(site))
        import results

        if options.commit:
            os.environ[results.COMMIT] = options.commit
        results.write_machine(csv.with_suffix(".machine.json"), {"run": "gpu" if cuda else "dry run"})
        measure_all(options, checkout.python_path(site), cuda, append)
    rows = read(csv)
    print(f"{table(rows)}\nwritten to {csv}")
    return 1 if any("error" in row for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
