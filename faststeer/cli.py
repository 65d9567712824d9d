"""The command line: `faststeer demo`, `extract`, `generate`, `info`. Results go to stdout, progress and errors to
stderr; exit code 0 is success, 1 a problem with the input, 2 wrong usage."""

from __future__ import annotations

import functools
import json
import platform
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer
from rich.console import Console
from rich.table import Table

app = typer.Typer(
    help="Activation steering for language models at full speed.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
errors = Console(stderr=True)

Command = TypeVar("Command", bound=Callable[..., None])

Model = Annotated[str, typer.Option(help="'demo', a folder saved by transformers, or a name on the Hugging Face hub.")]
Dtype = Annotated[str, typer.Option(help="auto (as saved), float32, bfloat16 or float16.")]
Device = Annotated[str, typer.Option(help="auto (a GPU where there is one), cpu, cuda, cuda:1, ...")]
System = Annotated[str | None, typer.Option(help="A system prompt before every prompt.")]
BatchSize = Annotated[int, typer.Option(min=1, help="Prompts in one forward pass.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of tables.")]


def _reports_errors(command: Command) -> Command:
    """What is wrong with the input is said in one paragraph, without a traceback."""

    @functools.wraps(command)
    def run(*args: Any, **kwargs: Any) -> None:
        try:
            command(*args, **kwargs)
        except (ValueError, TypeError, OSError) as error:
            errors.print(f"[bold red]Error:[/] {error}", highlight=False, soft_wrap=True)
            raise typer.Exit(1) from error

    return run  # type: ignore[return-value]


@app.command()
@_reports_errors
def demo(
    out: Annotated[Path, typer.Option(help="Folder for the figures, pictures and vectors.")] = Path("out/demo"),
    prompts: Annotated[int, typer.Option(min=1, help="Held-out prompts per measurement, at most 128.")] = 128,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the random control.")] = 0,
    as_json: Json = False,
) -> None:
    """Find the refusal direction of the small model that comes with faststeer, and switch refusal on and off with it.

    Example: faststeer demo --out out/demo
    """
    import torch

    from faststeer.demo.run import run

    # Its matrices are so small that a second thread waits longer than it works, most of all on a busy machine.
    torch.set_num_threads(1)
    result = run(out, prompts=prompts, seed=seed)
    if as_json:
        typer.echo(json.dumps(result))
        return
    console = Console()
    console.print(_refusal_table(result))
    if relaxed := result["selection"]["relaxed"]:
        console.print(
            f"No candidate direction satisfied every constraint of the selection; given up: {', '.join(relaxed)}"
        )
    console.print(_tone_table(result))
    for example in result["examples"]:
        console.print(
            f"\n[bold]{example['prompt']}[/]\n  unsteered: {example['unsteered']}\n  steered:   {example['steered']}"
        )
    console.print(f"\nWritten to {out}: demo.json, dose_response.png, layer_sweep.png, refusal.safetensors, plan.json")
    console.print("The demo model is a toy for demonstration and tests: its figures say nothing about real models.")


def _refusal_table(result: dict[str, Any]) -> Table:
    rows = {
        "base_harmful": ("harmful", "unsteered"),
        "base_harmless": ("harmless", "unsteered"),
        "induced": ("harmless", "direction added (+1)"),
        "bypassed": ("harmful", "direction subtracted (-1)"),
        "ablated": ("harmful", "direction ablated everywhere"),
        "random_induced": ("harmless", "random vector of the same norm added"),
        "random_bypassed": ("harmful", "random vector of the same norm subtracted"),
    }
    table = Table("prompts", "steering", "refuses", "95 % interval", "coherent", "n")
    table.title = f"Refusal, direction of layer {result['layer']} at token {result['position']}, held-out prompts"
    for name, (prompts, steering) in rows.items():
        cell = result["refusal"][name]
        interval = f"{cell['low']:.0%} .. {cell['high']:.0%}"
        table.add_row(prompts, steering, f"{cell['rate']:.1%}", interval, f"{cell['coherent']:.1%}", str(cell["n"]))
    return table


def _tone_table(result: dict[str, Any]) -> Table:
    c = result["tone_coefficient"]
    rows = {"base": "unsteered", "cheerful": f"tone vector added (+{c})", "gloomy": f"tone vector subtracted (-{c})"}
    table = Table(
        "steering", "cheerful answers", "gloomy answers", "n", title="Tone, questions without a system prompt"
    )
    for name, steering in rows.items():
        cell = result["tone"][name]
        table.add_row(
            steering, *(f"{cell[tone]['rate']:.1%}" for tone in ("cheerful", "gloomy")), str(cell["cheerful"]["n"])
        )
    return table


@app.command()
@_reports_errors
def extract(
    out: Annotated[Path, typer.Option(help="The vector's file (.safetensors).")],
    model: Model = "demo",
    positive: Annotated[
        Path | None, typer.Option(help="Prompts that show the behaviour: .txt, .json, .jsonl or .csv.")
    ] = None,
    negative: Annotated[Path | None, typer.Option(help="Prompts that do not.")] = None,
    field: Annotated[str | None, typer.Option(help="The column or field that holds the prompt.")] = None,
    at: Annotated[
        str, typer.Option(help="Hook point: resid_pre, attn_out, resid_mid, mlp_out or resid_post.")
    ] = "resid_pre",
    position: Annotated[int, typer.Option(max=-1, help="Token, counted from the prompt's end: -1 is the last.")] = -1,
    layer: Annotated[int | None, typer.Option(min=0, help="Keep one layer's direction (default: all layers).")] = None,
    select: Annotated[
        bool, typer.Option("--select", help="Choose layer and token by refusal score on held-out prompts.")
    ] = False,
    system: System = None,
    batch_size: BatchSize = 32,
    dtype: Dtype = "auto",
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Find a direction by difference in means between two sets of prompts.

    With --select a fifth of each set is held out, and the direction that best induces and bypasses refusal on it is
    kept. The demo model brings its own prompts.

    Example: faststeer extract --model ./my-model --positive harmful.txt --negative harmless.txt --select --out
    refusal.safetensors
    """
    from faststeer import extract as extraction

    if select and layer is not None:
        raise typer.BadParameter("--select chooses the layer: leave --layer out")
    sets = _contrast(model, positive, negative, field, select)
    loaded, tokenizer = _load(model, dtype, device)
    settings: dict[str, Any] = {"at": at, "system": system, "batch_size": batch_size, "progress": True}
    report: dict[str, Any] = {"out": str(out), "n_positive": len(sets[0]), "n_negative": len(sets[1])}
    if select:
        candidates = extraction.candidates(loaded, tokenizer, sets[0], sets[1], **settings)
        selection = extraction.select(loaded, tokenizer, candidates, sets[2], sets[3], system=system, progress=True)
        vector = selection.vector
        report["selection"] = selection.to_dict()
    else:
        candidates = extraction.candidates(loaded, tokenizer, sets[0], sets[1], positions=[position], **settings)
        vector = candidates.vector(position, layer)
    vector.save(out)
    report |= {
        "at": vector.at,
        "layers": list(vector.layers),
        "norms": {n: float(vector[n].norm()) for n in vector.layers},
    }
    if as_json:
        typer.echo(json.dumps(report))
        return
    Console().print(_selection_table(report["selection"]) if select else _norm_table(report))
    Console().print(f"Written to {out}: {vector!r}")


def _contrast(
    model: str, positive: Path | None, negative: Path | None, field: str | None, select: bool
) -> list[list[Any]]:
    """Positive and negative prompts, and with `select` the held-out ones of both."""
    if (positive is None) != (negative is None):
        raise typer.BadParameter("give both --positive and --negative")
    if positive is None or negative is None:
        if model != "demo":
            raise typer.BadParameter("--positive and --negative are needed: only the demo model brings its own prompts")
        from faststeer.demo import prompts

        return [listed for split in ("train", "validation") for listed in prompts("refusal", split)]
    from faststeer.extract import load_prompts

    sets = [load_prompts(path, field=field) for path in (positive, negative)]
    if not select:
        return sets
    held_out = [listed[::5] for listed in sets]
    return [[p for i, p in enumerate(listed) if i % 5] for listed in sets] + held_out


def _selection_table(selection: dict[str, Any]) -> Table:
    table = Table(
        "layer", "token", "induce", "bypass", "ablate", "KL", "", title="Candidates, best ten by induce - bypass"
    )
    usable = [row for row in selection["table"] if row["induce"] is not None and row["bypass"] is not None]
    chosen = selection["chosen"]
    for row in sorted(usable, key=lambda row: row["bypass"] - row["induce"])[:10]:
        remark = "chosen" if row == chosen else ", ".join(f"not {name}" for name in row["violated"])
        numbers = [f"{row[name]:+.2f}" for name in ("induce", "bypass", "ablate")]
        table.add_row(str(row["layer"]), str(row["position"]), *numbers, f"{row['kl']:.3f}", remark)
    if selection["relaxed"]:
        table.caption = f"No candidate satisfies every constraint; given up: {', '.join(selection['relaxed'])}"
    return table


def _norm_table(report: dict[str, Any]) -> Table:
    table = Table("layer", "norm", title=f"Difference in means at {report['at']}")
    for layer, norm in report["norms"].items():
        table.add_row(str(layer), f"{norm:.3f}")
    return table


@app.command()
@_reports_errors
def generate(
    model: Model = "demo",
    plan: Annotated[Path | None, typer.Option(help="A plan as JSON (Plan.to_json).")] = None,
    vector: Annotated[Path | None, typer.Option(help="A vector's file, added with --coefficient at --layer.")] = None,
    coefficient: Annotated[float, typer.Option(help="For --vector.")] = 1.0,
    layer: Annotated[int | None, typer.Option(help="For --vector (default: every layer it has).")] = None,
    prompts: Annotated[Path | None, typer.Option(help="Prompts: .txt (one a line), .json, .jsonl or .csv.")] = None,
    prompt: Annotated[list[str] | None, typer.Option(help="A prompt; may be given several times.")] = None,
    field: Annotated[str | None, typer.Option(help="The column or field that holds the prompt.")] = None,
    compare: Annotated[bool, typer.Option("--compare", help="Also answer unsteered.")] = False,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer.")] = 128,
    system: System = None,
    batch_size: BatchSize = 32,
    dtype: Dtype = "auto",
    device: Device = "auto",
    out: Annotated[Path | None, typer.Option(help="Also write the answers as JSON lines.")] = None,
    as_json: Json = False,
) -> None:
    """Answer prompts under a plan.

    Example: faststeer generate --model ./my-model --plan plan.json --prompts prompts.txt --compare
    """
    from faststeer import evaluate
    from faststeer.extract import load_prompts

    if (prompts is None) == (not prompt):
        raise typer.BadParameter("give prompts by --prompts FILE or by --prompt TEXT")
    asked: list[Any] = load_prompts(prompts, field=field) if prompts else list(prompt or [])
    chosen = _plan(plan, vector, coefficient, layer)
    loaded, tokenizer = _load(model, dtype, device)

    def complete(under: Any) -> list[str]:
        return evaluate.complete(
            loaded,
            tokenizer,
            asked,
            under,
            system=system,
            max_new_tokens=max_new_tokens,
            batch_size=batch_size,
            progress=True,
        )

    answers = [{"prompt": text, "completion": answer} for text, answer in zip(asked, complete(chosen), strict=True)]
    if compare:
        for answer, unsteered in zip(answers, complete(None), strict=True):
            answer["unsteered"] = unsteered
    if out is not None:
        from faststeer.files import write_atomically

        write_atomically(out, "".join(json.dumps(answer, ensure_ascii=False) + "\n" for answer in answers))
    if as_json:
        typer.echo(json.dumps({"model": model, "completions": answers}, ensure_ascii=False))
        return
    table = Table("prompt", *(["unsteered"] if compare else []), "steered" if chosen else "answer", show_lines=True)
    for answer in answers:
        table.add_row(*(str(answer[name]) for name in ("prompt", *(["unsteered"] if compare else []), "completion")))
    Console().print(table)


def _plan(plan: Path | None, vector: Path | None, coefficient: float, layer: int | None) -> Any:
    from faststeer import Add, Plan, SteeringVector

    if plan is not None and vector is not None:
        raise typer.BadParameter("give --plan or --vector, not both")
    if plan is not None:
        if not plan.is_file():
            raise FileNotFoundError(f"no plan at {plan}: no such file")
        return Plan.from_json(plan.read_text(encoding="utf-8"), folder=plan.parent)
    if vector is not None:
        return Plan([Add(SteeringVector.load(vector), coefficient, layers=layer)])
    return None


@app.command()
@_reports_errors
def info(
    model: Annotated[str | None, typer.Option(help="Also say how this model would be steered.")] = None,
    dtype: Dtype = "auto",
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Say what works here: versions, devices, back ends, and with --model where a model keeps its hook points.

    Example: faststeer info --model ./my-model
    """
    import torch
    import transformers

    import faststeer

    facts: dict[str, Any] = {
        "faststeer": faststeer.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "devices": ["cpu", *(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count()))],
        "backends": {
            name: f"{'works' if state.works else 'does not work'}: {state.reason}"
            for name, state in faststeer.ops.states().items()
        },
    }
    if model is not None:
        loaded, _ = _load(model, dtype, device)
        points, steering = faststeer.hf.find_hook_points(loaded), faststeer.steer(loaded, [None])
        facts["model"] = {
            "name": model,
            "class": type(loaded).__name__,
            "layers": points.n_layers,
            "hidden_size": points.hidden_size,
            "path": f"hooks: {steering.why}" if steering.why else steering.path,
            "hook_points": {
                "layers": points.layers,
                "attn_out": points.attn_out,
                "resid_mid": points.resid_mid,
                "mlp_out": points.mlp_out,
            },
        }
    if as_json:
        typer.echo(json.dumps(facts))
        return
    table = Table("", "", show_header=False)
    for name, value in facts.items():
        table.add_row(name, "\n".join(_lines(value)))
    Console().print(table)


def _lines(value: Any) -> list[str]:
    if isinstance(value, dict):
        return [
            f"{name}: {', '.join(_lines(inner)) if isinstance(inner, dict) else inner}" for name, inner in value.items()
        ]
    return [str(inner) for inner in value] if isinstance(value, list) else [str(value)]


def _load(name: str, dtype: str, device: str) -> tuple[Any, Any]:
    """Model (evaluating) and tokenizer: the demo model, a local folder, or a name on the hub.

    Raises:
        ValueError: an unknown dtype, or nothing there that transformers can load.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    dtypes = ("auto", "float32", "bfloat16", "float16")
    if dtype not in dtypes:
        raise ValueError(f"unknown --dtype {dtype!r}: expected one of {', '.join(dtypes)}")
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "demo":
        from faststeer import demo as demonstration

        toy, its_tokenizer = demonstration.load(torch.float32 if dtype == "auto" else getattr(torch, dtype))
        return toy.to(device), its_tokenizer  # type: ignore[arg-type]
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
        model: Any = AutoModelForCausalLM.from_pretrained(name, dtype=dtype)
    except (OSError, ValueError, KeyError) as error:
        where = "this folder" if Path(name).is_dir() else "no such folder, and the hub"
        raise ValueError(f"no model could be loaded from {name!r} ({where}): {error}") from error
    return model.to(device).eval(), tokenizer
