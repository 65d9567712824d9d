"""`faststeer convert`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from faststeer.cli.common import Json, app, check_files, reports_errors


@app.command()
@reports_errors
def convert(
    source: Annotated[
        str, typer.Argument(help="A vector's file of any format, or hub:user/name, with @revision and /file if needed.")
    ],
    target: Annotated[
        str | None,
        typer.Argument(help="Where to write it, or hub:user/name to upload; without it the vector is described."),
    ] = None,
    to: Annotated[str | None, typer.Option(help="faststeer or gguf (default: gguf where the target ends so).")] = None,
    format: Annotated[
        str | None, typer.Option(help="Whose file it is: gguf, steering-vectors, caa, refusal_direction, faststeer.")
    ] = None,
    at: Annotated[str | None, typer.Option(help="Hook point, where the file does not say it.")] = None,
    layer: Annotated[int | None, typer.Option(min=0, help="The layer of one direction, or the one to keep.")] = None,
    position: Annotated[int | None, typer.Option(max=-1, help="For refusal_direction's mean_diffs.")] = None,
    op: Annotated[str | None, typer.Option(help="What it is meant for: add, ablate, project, clamp, rotate.")] = None,
    model: Annotated[str | None, typer.Option(help="The model it was found in.")] = None,
    model_hint: Annotated[str | None, typer.Option(help="For gguf: the architecture's name.")] = None,
    private: Annotated[
        bool, typer.Option("--private", help="A repository that is made on the hub is private.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Read a steering vector of this or another project, and write it for this one or llama.cpp.

    What a file is, is told by its content. What it does not say (hook point, layer, op) is asked for, never guessed. A
    GGUF file cannot hold the first layers; they are left out, and named.

    Example: faststeer convert control_vector.gguf refusal.safetensors
    """
    if not source.startswith("hub:"):
        check_files(source=Path(source))
    from faststeer import formats
    from faststeer.formats import control_vectors, hub

    said = {"format": format, "at": at, "layer": layer, "position": position, "op": op, "model": model}
    there = source.startswith("hub:")
    vector = formats.pull(**hub.parse(source), **said) if there else formats.load(source, **said)  # type: ignore[arg-type]
    left_out: list[int] = []
    if to == "gguf" or (to is None and target is not None and target.lower().endswith(".gguf")):
        vector, left_out = control_vectors.without_first_layers(vector)
    report: dict[str, Any] = {
        "left_out": left_out,
        "layers": list(vector.layers),
        "hidden_size": vector.hidden_size,
        "norms": {layer: float(vector[layer].norm()) for layer in vector.layers},
        **{name: getattr(vector, name) for name in ("at", "op", "scale", "method", "model")},
        "provenance": dict(vector.provenance),
    }
    if target is not None and target.startswith("hub:"):
        place: dict[str, Any] = hub.parse(target)
        report["written"] = formats.push(vector, **place, format=to, model_hint=model_hint, private=private)  # type: ignore[arg-type]
    elif target is not None:
        report["written"] = str(formats.save(vector, Path(target), to, model_hint))  # type: ignore[arg-type]
    if as_json:
        typer.echo(json.dumps(report))
        return
    Console().print(f"{vector!r}")
    table = Table("layer", "norm")
    for number, norm in report["norms"].items():
        table.add_row(str(number), f"{norm:.4g}")
    Console().print(table)
    if left_out:
        Console().print(f"Left out: layers {', '.join(map(str, left_out))} at {vector.at}, which GGUF cannot hold")
    if target is not None:
        Console().print(f"Written to {report['written']}")
