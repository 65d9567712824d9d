"""Everything in faststeer that reads a file or a request, each with a valid example: what the tests of damaged files
and of large numbers walk through."""

from __future__ import annotations

import base64
import io
import json
import tempfile
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save
from strategies import randn

import faststeer as fs
from faststeer import behaviours
from faststeer.algebra import sparsify
from faststeer.artefacts import ArtefactStore
from faststeer.behaviours.behaviour import prompts_of_file
from faststeer.cli.evaluate import _read_answers
from faststeer.compile import compile_plan
from faststeer.evaluate.judging import read_format
from faststeer.evaluate.multiple_choice import load_questions
from faststeer.evaluate.sweep import Store, Sweep, load_sweep
from faststeer.evaluate.sweep.projections import packed
from faststeer.extract import Activations, Candidates, load_contrast, load_prompts, sae_feature
from faststeer.extract.optimise import checkpoint
from faststeer.files import FormatError
from faststeer.formats import control_vectors
from faststeer.formats import load as load_vector
from faststeer.observe.capture import Capture, Captured, _write
from faststeer.observe.patching import Scores
from faststeer.observe.patching.graph import Graph
from faststeer.sparse import SparseVector
from faststeer.vllm.registry import Registry
from faststeer.vllm.requests import Limits, parse, received
from faststeer.vllm.settings import ServerSettings

HIDDEN = 8
V = fs.SteeringVector(
    {1: randn(1, HIDDEN), 2: randn(2, HIDDEN)}, model="m", method="dim", provenance={"a": [1]}, op="add"
)
PLAN = fs.Plan(
    [
        fs.Add(V, 2.0, layers=[1], positions="[-5:]"),
        fs.Ablate(randn(3, 2, HIDDEN), layers="all", at=("resid_pre", "attn_out")),
        fs.Clamp(V[1], low=0.5, layers=1, when=fs.Gate(V[2], 0.1, latched=True, layer=0, at="resid_pre")),
        fs.Rotate(V[1], V[2], 30.0, layers=[-1], keep_norm=True),
    ]
)
CHATS = ["a", {"prompt": "b"}, {"messages": [{"role": "user", "content": "c"}]}]
SAE = {"hook_name": "blocks.2.hook_resid_post", "d_in": 4, "d_sae": 3, "metadata": {"model_name": "m"}}
AXBENCH = [
    {"input": "q", "output": "o", "output_concept": "sea", "category": "positive", "concept_id": 1},
    {"input": "q", "output": "n", "output_concept": "sea", "category": "negative", "concept_id": 1},
]
BEHAVIOUR = {
    "format": "faststeer.behaviour/2",
    "name": "n",
    "judge": "refusal",
    "about": {"source": "s"},
    "train": {"positive": ["a", "b"], "negative": ["c", "d"], "pairs": [{"prompt": "p", "chosen": "x", "sign": -1}]},
    "validation": {"positive": ["e"], "negative": "prompts.json"},
    "test": {"positive": ["g"], "negative": ["h"], "induce": ["i"]},
}
SWEEP = {
    "prompts": [{"prompt": "a", "id": "x", "tag": "t"}, "b", {"file": "prompts.json", "limit": 2}],
    "vectors": {"v": "v.safetensors"},
    "plans": {"p": "plan.json"},
    "layers": [1, [1, 2]],
    "coefficients": {"from": 0, "to": 1, "steps": 3},
    "controls": 1,
    "max_new_tokens": 8,
    "seed": 3,
    "top_k": 5,
    "projections": 2,
    "temperature": 0.5,
    "text": ["w"],
    "questions": "questions.jsonl",
}
ALPACA = [{"instruction": "i", "input": "j", "output": "o"}, {"instruction": "k", "output": "p"}]
WIRE = {"plan": "p", "digest": "d", "ranges": [[0, 1]], "room": 0, "probes": False}
QUESTION = {"question": "q", "choices": ["a", "b"], "answer": 1}
SHORT = {"add": "v", "coefficient": 2, "layers": [1, 2], "positions": "[-3:]"}


@dataclass(frozen=True)
class Reader:
    """A reader, its files in a folder, and which of them are made wrong (by default all)."""

    read: Callable[[Path], object]
    files: Mapping[str, bytes]
    wrong: tuple[str, ...] = ()
    refusals: tuple[type[Exception], ...] = (FormatError, FileNotFoundError)


def _saved(content: object, zipped: bool = True) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer, _use_new_zipfile_serialization=zipped)
    return buffer.getvalue()


def _numpy(save: Callable[..., None], *arrays: Any, **named: Any) -> bytes:
    buffer = io.BytesIO()
    save(buffer, *arrays, **named)
    return buffer.getvalue()


def _json(data: object) -> bytes:
    return json.dumps(data).encode()


def _vector(name: str, **said: Any) -> Callable[[Path], object]:
    def read(folder: Path) -> object:
        vector = load_vector(folder / name, **said)
        assert all(torch.isfinite(vector[n].float()).all() and vector[n].any() for n in vector.layers)
        return vector.to_bytes(), repr(vector), vector.layers

    return read


def _sparse(folder: Path) -> object:
    return SparseVector.load(folder / "v.safetensors").to_bytes(), load_vector(folder / "v.safetensors").to_bytes()


def _plan(folder: Path) -> object:
    try:
        text = (folder / "plan.json").read_text(encoding="utf-8")
    except UnicodeDecodeError:
        return None
    plan = fs.Plan.from_json(text, {"named": V}, folder)
    try:
        return compile_plan(plan, 4, HIDDEN)
    except ValueError:  # of another model
        return plan.to_json(inline=True)


def _plan_files() -> dict[str, bytes]:
    data = json.loads(PLAN.to_json(inline=True))
    data["interventions"] += [
        {"type": "Add", "direction": {"path": "v.safetensors"}},
        {"type": "Probe", "direction": {"name": "named"}},
    ]
    return {"plan.json": _json(data), "v.safetensors": V.to_bytes()}


def _direction_of_file(folder: Path) -> object:
    return load_vector(folder / "direction.pt", at="resid_pre", layer=3).to_bytes()


def _inline(folder: Path) -> object:
    """A plan whose inline vectors are files of their own here, so that they are made wrong like files."""
    vector, tensor = ((folder / name).read_bytes() for name in ("vector.safetensors", "tensor.safetensors"))
    items = [
        {"type": "Add", "direction": {"vector": base64.b64encode(vector).decode()}},
        {"type": "Ablate", "direction": {"tensor": base64.b64encode(tensor).decode()}, "layers": [1]},
    ]
    text = json.dumps({"format": "faststeer.plan/1", "interventions": items})
    with suppress(ValueError):
        parse(text, Registry(), Limits(4, HIDDEN))
    return fs.Plan.from_json(text)


def _capture_files() -> dict[str, bytes]:
    with tempfile.TemporaryDirectory() as folder:
        for first in (0, 2):
            batch = {
                n: Captured([1, 2, 3, 4], 3, torch.arange(-3, 1), lambda at, layer, n=n: randn(n + layer, 4, HIDDEN))
                for n in (first, first + 1)
            }
            _write(ArtefactStore(folder, "f"), 4, batch, ("resid_pre",), [0, 1])
        return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


def _capture(folder: Path) -> object:
    capture = Capture.load(folder)
    return [(one.kept_ids, one["resid_pre", 0], one["resid_pre", 1]) for one in capture]


def _checkpoint_file() -> bytes:
    states = [
        checkpoint.VectorState(*(randn(n + i, HIDDEN) for i in range(4)), losses=[1.0, 0.5], held_out={0: 1.0, 2: 0.5})
        for n in (0, 4)
    ]
    with tempfile.TemporaryDirectory() as folder:
        checkpoint.Checkpoint(states, 2, {"recipe": {"lr": 0.1}}).save(path := Path(folder) / "c")
        return path.read_bytes()


def _scores_file() -> bytes:
    graph = Graph(1, 3, 4, 2)
    edges = randn(1, graph.n_senders, graph.n_receivers, dtype=torch.float64)
    scores = Scores(graph, edges, edges.sum(1), randn(2, HIDDEN, dtype=torch.float64), 1.0, 0.5, 7, "directed_kl", 4)
    with tempfile.TemporaryDirectory() as folder:
        scores.save(path := Path(folder) / "s")
        return path.read_bytes()


def _scores(folder: Path) -> object:
    scores = Scores.load(folder / "scores.safetensors")
    return scores.top(5), scores.completeness_error, Scores.pooled([scores, scores]).n_positions


def _store_file() -> bytes:
    plans = {"p": fs.Plan([fs.Add(V[1], layers=1)])}
    sweep = Sweep(["a", "b"], vectors={"v": V}, layers=[1], coefficients=[0.5], plans=plans)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "s.sqlite"
        with Store(path) as store:
            store.begin("r", 2, sweep, {"torch": "2"})
            store.add_units("r", {"answers:0": None, "judge:j:0": "answers:0"})
            store.claim("r", ["answers:0"])
            store.add(
                "r",
                answers=[(setting, 0, 0, "text", 3, bytes(12), "eos", None) for setting in range(3)],
                judges=[("j", "refusal", 1.0, "{}")],
                verdicts=[("j", 0, 0, "yes", 1.0, {"a": 1.0}, "raw")],
                effects=[("e", 0, 0, 0.1, 1.0, 5, None)],
                directions=[(0, "v", None, 1)],
                tokens=[(0, 0, 2, ["a", "b", "c", "d"])],
                projections=[(0, 0, 0, *packed(torch.ones(3, 4).numpy()))],
            )
        return path.read_bytes()


def _store(folder: Path) -> object:
    with Store(folder / "s.sqlite", create=False) as store:
        everything: list[Any] = [store.runs(), store.finished("r"), store.run()]
        for run in ("r", store.run()):
            for setting in store.settings(run):
                everything.append(store.plan(run, setting["setting"]))
            everything += [store.prompts(run), store.answers(run), store.judges(run)]
            everything += [store.verdicts(run, "j"), store.effects(run), store.directions(run)]
            everything += [list(store.projections(run)), store.unjudged(run, "k", 0), store.unprojected(run, 0, 9)]
            everything += [store.answered(run, 0), store.claim(run, ["answers:0", "judge:j:0"])]
        return everything


def _sweep_files(name: str) -> dict[str, bytes]:
    return {
        name: _json(SWEEP),
        "v.safetensors": V.to_bytes(),
        "plan.json": fs.Plan([fs.Add(V[1], layers=1)]).to_json(inline=True).encode(),
        "prompts.json": _json(["c", "d"]),
        "questions.jsonl": _json(QUESTION),
    }


def _sweep(name: str) -> Callable[[Path], object]:
    def read(folder: Path) -> object:
        sweep = load_sweep(folder / name)
        return len(sweep.settings), sweep.to_dict(), sweep.identity("m")

    return read


def _registry(folder: Path) -> Registry:
    made = Registry(folder)
    made.register_vector("v", V)
    made.register_plan("calm", fs.Plan([fs.Add(V, 2.0)]))
    return made


def _request(folder: Path) -> object:
    try:
        text = (folder / "request.json").read_text(encoding="utf-8")
    except UnicodeDecodeError:
        return None
    plan = parse(text, _registry(folder), Limits(4, HIDDEN))
    return plan and received({"faststeer": plan.wire()})


def _request_object(folder: Path) -> object:
    """As an HTTP server hands it over: what is in the JSON, not its text."""
    try:
        payload = json.loads((folder / "request.json").read_bytes())
    except (ValueError, RecursionError):
        return None
    return parse(payload, _registry(folder), Limits(4, HIDDEN))


def _by_name(folder: Path) -> object:
    both = [parse({"add": "named"}, _registry(folder), Limits(4, HIDDEN))]
    return [*both, parse("plan", _registry(folder), Limits(4, HIDDEN))]


def _wire(folder: Path) -> object:
    try:
        payload = json.loads((folder / "wire.json").read_bytes())
    except (ValueError, RecursionError):
        return None
    return received(payload) if isinstance(payload, dict) else None


def _settings(folder: Path) -> object:
    try:
        given = json.loads((folder / "settings.json").read_bytes())
    except (ValueError, RecursionError):
        return None
    return ServerSettings.read(given)


def _readers() -> dict[str, Reader]:
    activations = {"layer_activations": dict(V.directions), "layer_type": "decoder_block"}
    mean_diffs = torch.stack([torch.stack([V[1], V[2]]), torch.stack([V[2], V[1]])])
    request = (ValueError,)
    rows = torch.stack([V[1], V[2]])
    with tempfile.TemporaryDirectory() as folder:
        Activations(
            randn(1, 3, 2, 2, 4), randn(2, 4, 2, 2, 4), positions=(-2, -1), at="resid_pre", paired=False, model="m"
        ).save(Path(folder) / "a")
        means = [randn(n, 2, 3, 4, dtype=torch.float64) for n in (1, 2)]
        Candidates(*means, positions=(-2, -1), at="resid_pre", n_positive=3, n_negative=4).save(Path(folder) / "c")
        files = {name: (Path(folder) / name).read_bytes() for name in ("a", "c")}
    return {
        "vector": Reader(_vector("v.safetensors"), {"v.safetensors": V.to_bytes()}),
        "vector of a layer": Reader(
            _vector("v.safetensors", layer=1, at="resid_post"), {"v.safetensors": V.to_bytes()}
        ),
        "sparse vector": Reader(_sparse, {"v.safetensors": sparsify(V, keep=0.5).to_bytes()}),
        "gguf": Reader(_vector("v.gguf", op="add"), {"v.gguf": control_vectors.to_bytes(V)}),
        "steering-vectors": Reader(_vector("v.pt"), {"v.pt": _saved(activations)}),
        "steering-vectors, old": Reader(_vector("v.pt"), {"v.pt": _saved(activations, zipped=False)}),
        "caa": Reader(_vector("vec_layer_3_m.pt"), {"vec_layer_3_m.pt": _saved(V[1])}),
        "rows": Reader(_vector("v.pt", at="resid_post"), {"v.pt": _saved(rows.half())}),
        "mean_diffs": Reader(
            _vector("v.pt", format="refusal_direction", position=-1), {"v.pt": _saved(mean_diffs)}
        ),
        "npz": Reader(
            _vector("v.npz", at="resid_post"), {"v.npz": _numpy(np.savez, **{"1": V[1].numpy(), "2": V[2].numpy()})}
        ),
        "npy": Reader(_vector("v.npy", at="resid_pre"), {"v.npy": _numpy(np.save, rows.numpy())}),
        "vector.json": Reader(_vector("v.json", at="attn_out", layer=1), {"v.json": _json(rows.tolist())}),
        "svec": Reader(
            _vector("v.svec", at="resid_post"),
            {"v.svec": _json({"model_type": "m", "directions": {str(n): V[n].tolist() for n in (1, 2)}})},
        ),
        "refusal_direction": Reader(
            _direction_of_file,
            {"direction.pt": _saved(V[1]), "direction_metadata.json": _json({"pos": -1, "layer": 3})},
        ),
        "plan": Reader(_plan, _plan_files()),
        "plan with vectors inside": Reader(
            _inline,
            {
                "vector.safetensors": V.to_bytes(),
                "tensor.safetensors": base64.b64decode(
                    json.loads(fs.Plan([fs.Add(V[1], layers=1)]).to_json())["interventions"][0]["direction"]["tensor"]
                ),
            },
        ),
        "activations": Reader(lambda f: Activations.load(f / "a.safetensors"), {"a.safetensors": files["a"]}),
        "candidates": Reader(lambda f: Candidates.load(f / "c.safetensors"), {"c.safetensors": files["c"]}),
        "sae": Reader(
            lambda f: sae_feature(f, 1).to_bytes(),
            {"cfg.json": _json(SAE), "sae_weights.safetensors": save({"W_dec": randn(3, 3, 4)})},
        ),
        "checkpoint": Reader(
            lambda f: checkpoint.Checkpoint.of(f / "c.safetensors", {"recipe": {"lr": 0.1}}, 2),
            {"c.safetensors": _checkpoint_file()},
        ),
        "capture": Reader(_capture, _capture_files()),
        "scores": Reader(_scores, {"scores.safetensors": _scores_file()}),
        "store": Reader(_store, {"s.sqlite": _store_file()}),
        "sweep.yaml": Reader(_sweep("s.yaml"), _sweep_files("s.yaml"), ("s.yaml",)),
        "sweep.json": Reader(_sweep("s.json"), _sweep_files("s.json")),
        "prompts.json": Reader(lambda f: load_prompts(f / "p.json"), {"p.json": _json(CHATS)}),
        "prompts.jsonl": Reader(
            lambda f: (load_prompts(f / "p.jsonl"), prompts_of_file(f / "p.jsonl")),
            {"p.jsonl": b"\n".join(map(_json, CHATS))},
        ),
        "prompts.csv": Reader(
            lambda f: (prompts_of_file(f / "p.csv"), behaviours.read_records(f / "p.csv")),
            {"p.csv": b'goal,target\n"Write, ""now""\nand here",Sure\nSteal,"Sure, here"\n'},
        ),
        "prompts.txt": Reader(lambda f: load_prompts(f / "p.txt"), {"p.txt": b"a\n\nb\r\nc\n"}),
        "contrast": Reader(
            lambda f: load_contrast(f / "c.json"), {"c.json": _json({"harmful": ["a"], "harmless": CHATS[2:]})}
        ),
        "behaviour": Reader(
            lambda f: behaviours.load(f / "b.json").to_json(),
            {"b.json": _json(BEHAVIOUR), "prompts.json": _json(["y", "z"])},
        ),
        "axbench": Reader(lambda f: behaviours.read_records(f / "a.json"), {"a.json": _json(AXBENCH)}),
        "alpaca": Reader(
            lambda f: prompts_of_file(f / "a.jsonl"),
            {"a.jsonl": b"\n".join(map(_json, ALPACA))},
        ),
        "questions": Reader(
            lambda f: load_questions(f / "q.jsonl"), {"q.jsonl": _json(QUESTION) + b"\n" + _json(QUESTION)}
        ),
        "judge's template": Reader(
            lambda f: read_format("strongreject", f / "t.json"), {"t.json": _json(["{prompt} {completion}"])}
        ),
        "answers": Reader(
            lambda f: _read_answers(f / "a.jsonl"), {"a.jsonl": _json({"prompt": "p", "completion": "c"})}
        ),
        "request": Reader(
            _request, {"request.json": _json([SHORT, {"ablate": "named"}]), "named.safetensors": V.to_bytes()},
            ("request.json",), request,
        ),
        "request, long form": Reader(
            _request, {"request.json": PLAN.to_json(inline=True).encode()}, refusals=request
        ),
        "request, as an object": Reader(
            _request_object, {"request.json": PLAN.to_json(inline=True).encode()}, refusals=request
        ),
        "server's folder": Reader(
            _by_name,
            {"named.safetensors": V.to_bytes(), "plan.json": fs.Plan([fs.Add(V)]).to_json(inline=True).encode()},
            refusals=request,
        ),
        "wire": Reader(
            _wire,
            {"wire.json": _json({"faststeer": WIRE})},
            refusals=request,
        ),
        "server's settings": Reader(
            _settings, {"settings.json": _json({"max_plans": 8, "max_interventions": 3, "hook_points": ["resid_pre"]})},
            refusals=request,
        ),
    }  # fmt: skip


READERS = _readers()
