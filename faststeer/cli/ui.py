"""`faststeer ui`."""

from __future__ import annotations

import json
import webbrowser
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from faststeer.cli.common import Device, Dtype, Model, System, app, errors, load_model, reports_errors

if TYPE_CHECKING:
    from faststeer import SteeringVector
    from faststeer.ui import Playground


@app.command()
@reports_errors
def ui(
    model: Model = "demo",
    vector: Annotated[
        list[str] | None,
        typer.Option(help="A vector's file, or NAME=FILE; may be given several times. The demo model finds its own."),
    ] = None,
    system: System = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, max=512, help="Longest answer at first.")] = 64,
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 lets other machines in.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen on; 0: any that is free.")] = 7860,
    open_browser: Annotated[bool, typer.Option("--open", help="Open the page in the browser.")] = False,
    dtype: Dtype = "auto",
    device: Device = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object when the page is there.")] = False,
) -> None:
    """A page to try vectors on: a slider each, the unsteered and the steered answer beside each other, and what every
    layer and token has along a vector. Runs until Ctrl-C, and asks the network for nothing.

    Example: faststeer ui, which takes the demo model, or

    \b
        faststeer ui --model ./my-model --vector refusal.safetensors --vector calm=pca.safetensors --port 8000

    Exit codes: 0 stopped by Ctrl-C; 1 wrong input, a port that is taken, or a package that is missing; 2 wrong usage.
    """
    from faststeer.ui import server as serving

    with serving.bind(host, port) as bound:
        playground = _playground(model, vector or [], dtype, device)
        served = serving.server(playground, max_new_tokens=max_new_tokens, system=system)
        address = serving.url(bound)
        if as_json:
            typer.echo(json.dumps({"url": address, "model": model, "vectors": list(playground.vectors)}))
        else:
            Console().print(f"The playground is at {address} (Ctrl-C to stop)", highlight=False)
        if open_browser:
            webbrowser.open(address)
        try:
            served.run(sockets=[bound])
        except KeyboardInterrupt:
            errors.print("Stopped.")


def _playground(model: str, vectors: Sequence[str], dtype: str, device: str) -> Playground:
    from faststeer.ui import Playground, demo_playground

    if model == "demo" and not vectors:
        with errors.status("Finding the demo model's refusal and tone directions ..."):
            return demo_playground(*load_model(model, dtype, device))
    if not vectors:
        raise ValueError(
            f"no vectors for {model!r}: give their files with --vector. One is made by: faststeer extract "
            f"--model {model} --behaviour tone --out tone.safetensors"
        )
    by_name = _load(vectors)
    loaded, tokenizer = load_model(model, dtype, device)
    return Playground(loaded, tokenizer, by_name, name=model)


def _load(vectors: Sequence[str]) -> dict[str, SteeringVector]:
    """Vectors by name: NAME=FILE, or a file, whose name without ending it is."""
    from faststeer import SteeringVector

    by_name: dict[str, SteeringVector] = {}
    for text in vectors:
        name, equals, file = text.partition("=")
        if not equals or Path(text).exists():
            name, file = Path(text).stem, text
        if name in by_name:
            raise ValueError(f"two vectors are called {name!r}: name one of them, --vector OTHER={file}")
        by_name[name] = SteeringVector.load(file)
    return by_name
