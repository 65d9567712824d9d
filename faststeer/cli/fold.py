"""`faststeer fold`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from faststeer.cli.common import Device, Dtype, Json, Model, app, check_files, load_model, reports_errors


@app.command()
@reports_errors
def fold(
    plan: Annotated[Path, typer.Option(help="A plan as JSON (Plan.to_json).")],
    out: Annotated[Path, typer.Option(help="The folder to write; it must be new.")],
    model: Model = "demo",
    adapter: Annotated[
        bool, typer.Option("--adapter", help="A LoRA adapter for peft instead of changed weights.")
    ] = False,
    dtype: Dtype = "auto",
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Make a plan permanent: weights, or a LoRA adapter, that do what its hooks did, checked against them.

    Additions anywhere, ablations everywhere (every writer of the residual stream), and any linear change of attn_out
    and mlp_out can be folded; what cannot is refused with the reason.

    Example: faststeer fold --model ./my-model --plan plan.json --out ./my-model-folded
    """
    check_files(plan=plan)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} is there already: name a new folder")
    from faststeer import Plan, folding

    lasting = Plan.load(plan)
    loaded, tokenizer = load_model(model, dtype, device)
    report: dict[str, Any]
    if adapter:
        done = folding.fold_adapter(loaded, lasting)
        done.save(out)
        report = done.report()
    else:
        folded = folding.fold(loaded, lasting, in_place=True)
        folded.save(out, tokenizer)
        report = folded.report()
    report["out"] = str(out)
    if as_json:
        typer.echo(json.dumps(report))
        return
    check = report["check"]
    table = Table("", "", title=f"Folded into {len(report['changed'])} parameters", show_header=False)
    table.add_row("largest difference of two logits from the hooks'", f"{check['difference']:.3g}")
    table.add_row("what rounding explains", f"{check['tolerance']:.3g}")
    table.add_row("greedy tokens that agree", f"{check['equal']} of {check['tokens']}")
    if report.get("untied"):
        table.add_row("the head was tied to the embedding", "has its own weights now")
    for name, value in report.get("config", {}).items():
        table.add_row(f"config.{name}", str(value))
    Console().print(table)
    Console().print(f"Written to {out}")
