"""`faststeer extract`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from faststeer.cli.common import (
    DEMO_STEPS,
    BatchSize,
    Device,
    Dtype,
    Field,
    Json,
    Model,
    Negative,
    Positive,
    System,
    app,
    behaviour_of,
    load_model,
    numbers,
    reports_errors,
    two_sides,
)

if TYPE_CHECKING:
    from faststeer.behaviours import Behaviour


@app.command()
@reports_errors
def extract(
    out: Annotated[
        Path | None, typer.Option(help="The vector's file (.safetensors); with --method, a folder for all of them.")
    ] = None,
    model: Model = "demo",
    behaviour: Annotated[
        str | None,
        typer.Option(help="refusal, sentiment, tone, or a behaviour's file or folder."),
    ] = None,
    method: Annotated[
        str | None,
        typer.Option(
            help="Compare methods: 'all', or some of dim,pca,lat,probe,ace,caa,attribution,unembedding,ntp,"
            "po,reps,bipo."
        ),
    ] = None,
    positive: Positive = None,
    negative: Negative = None,
    field: Field = None,
    at: Annotated[
        str, typer.Option(help="Hook point: resid_pre, attn_out, resid_mid, mlp_out or resid_post.")
    ] = "resid_pre",
    position: Annotated[int, typer.Option(max=-1, help="Token, counted from the prompt's end: -1 is the last.")] = -1,
    layer: Annotated[int | None, typer.Option(min=0, help="Keep one layer's direction (default: all layers).")] = None,
    select: Annotated[
        bool, typer.Option("--select", help="Choose layer and token by refusal score on held-out prompts.")
    ] = False,
    coefficients: Annotated[str, typer.Option(help="With --method: coefficients to try, such as 0.5,1,2.")] = "1",
    steps: Annotated[
        int | None, typer.Option(min=1, help="With --method: training steps (10 epochs; 24 on the demo model).")
    ] = None,
    prompts: Annotated[
        int | None, typer.Option(min=1, help="With --method: test prompts a side, at most (all).")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="With --method: longest answer.")] = 64,
    seed: Annotated[int, typer.Option(min=0, help="With --method: of training and of the random control.")] = 0,
    system: System = None,
    batch_size: BatchSize = 32,
    dtype: Dtype = "auto",
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Find a direction: by difference in means between two sets of prompts, or by several methods side by side.

    With --select a fifth of each set is held out, and the direction that best induces and bypasses refusal on it is
    kept. With --method the behaviour's vector is found by each method, its layer, token and coefficient are chosen on
    validation prompts, and what it does is measured on test prompts, next to a random vector. The demo model brings its
    own prompts.

    Example: faststeer extract --model ./my-model --positive harmful.txt --negative harmless.txt --select --out
    refusal.safetensors

    Example: faststeer extract --behaviour refusal --method all
    """
    if method is not None:
        if select or layer is not None or system is not None or position != -1:
            raise typer.BadParameter("--method chooses layer and token, and takes no --select, --system or --position")
        chosen = behaviour_of(model, behaviour, positive, negative, field)
        _compare(
            chosen, model, method, out, as_json, dtype, device,
            at=at, coefficients=numbers(coefficients, "--coefficients"), n_test=prompts, seed=seed,
            max_new_tokens=max_new_tokens, batch_size=batch_size, progress=True,
            steps=DEMO_STEPS if steps is None and model == "demo" else steps,
        )  # fmt: skip
        return
    if out is None:
        raise typer.BadParameter("--out is needed: the vector's file (or --method, to compare methods)")
    _one(out, model, behaviour, positive, negative, field, at, position, layer, select, system, batch_size, dtype,
         device, as_json)  # fmt: skip


def _one(
    out: Path,
    model: str,
    behaviour: str | None,
    positive: Path | None,
    negative: Path | None,
    field: str | None,
    at: str,
    position: int,
    layer: int | None,
    select: bool,
    system: str | None,
    batch_size: int,
    dtype: str,
    device: str,
    as_json: bool,
) -> None:
    """The difference in means, written to a file."""
    from faststeer import extract as extraction

    if select and layer is not None:
        raise typer.BadParameter("--select chooses the layer: leave --layer out")
    sets = _contrast(model, behaviour, positive, negative, field, select)
    loaded, tokenizer = load_model(model, dtype, device)
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
    model: str, behaviour: str | None, positive: Path | None, negative: Path | None, field: str | None, select: bool
) -> list[list[Any]]:
    """Positive and negative prompts, and with `select` the held-out ones of both."""
    if behaviour is None and (positive is not None or negative is not None):
        sets = [list(listed) for listed in two_sides(positive, negative, field)]
        if not select:
            return sets
        held_out = [listed[::5] for listed in sets]
        return [[p for i, p in enumerate(listed) if i % 5] for listed in sets] + held_out
    chosen = behaviour_of(model, behaviour, positive, negative, field)
    return [list(side) for split in (chosen.train, chosen.validation) for side in (split.positive, split.negative)]


def _compare(
    behaviour: Behaviour,
    model: str,
    method: str,
    out: Path | None,
    as_json: bool,
    dtype: str,
    device: str,
    **options: Any,
) -> None:
    """The comparison of methods, printed, and its vectors and figures written to a folder if one is named."""
    from faststeer.behaviours.compare import METHODS, compare
    from faststeer.files import write_atomically

    methods = list(METHODS) if method == "all" else [part.strip() for part in method.split(",")]
    loaded, tokenizer = load_model(model, dtype, device)
    found = compare(loaded, tokenizer, behaviour, methods, **options)
    report = found.to_dict() | {"model": model}
    if out is not None:
        for result in found.results:
            if result.vector is not None:
                result.vector.save(out / f"{result.method}.safetensors")
        write_atomically(out / "comparison.json", json.dumps(report, indent=2) + "\n")
    if as_json:
        typer.echo(json.dumps(report))
        return
    Console().print(_comparison_table(report))
    for name, why in found.skipped.items():
        Console().print(f"{name} left out: {why}", highlight=False)
    if out is not None:
        Console().print(f"Written to {out}: comparison.json and a vector of each method")


def _comparison_table(report: dict[str, Any]) -> Table:
    columns = ("method", "layer", "token", "coeff.", "induce", "bypass", "KL", "coherent", "cos DIM")
    table = Table(
        *columns,
        box=SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        pad_edge=False,
        collapse_padding=True,
        title=f"{report['behaviour']}: chosen on validation prompts, measured on test prompts",
    )
    for row in report["results"]:
        rates = [f"{row[name]['rate']:.1%}" for name in ("induce", "bypass", "coherent")]
        numbers = [
            "-" if row[name] is None else f"{row[name]:{form}}" for name, form in (("kl", ".3f"), ("cosine", "+.2f"))
        ]
        places = ["-" if row[name] is None else str(row[name]) for name in ("layer", "position")]
        coefficient = "-" if row["coefficient"] is None else f"{row['coefficient']:g}"
        table.add_row(row["method"], *places, coefficient, rates[0], rates[1], numbers[0], rates[2], numbers[1])
    n = report["n_prompts"]
    table.caption = (
        f"{n['test_induce']} prompts to induce on, {n['test_suppress']} to suppress on; every vector has the length of "
        f"the difference in means ({report['settings']['at']}); cos DIM: cosine with it"
    )
    return table


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
