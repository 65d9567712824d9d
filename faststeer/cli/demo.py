"""`faststeer demo`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from faststeer.cli.common import Json, app, reports_errors


@app.command()
@reports_errors
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
