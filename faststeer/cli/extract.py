"""`faststeer extract`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from faststeer.cli.common import BatchSize, Device, Dtype, Json, Model, System, app, load_model, reports_errors


@app.command()
@reports_errors
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
