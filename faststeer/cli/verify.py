"""`faststeer verify`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from faststeer.cli.common import Json, app, errors, reports_errors

DISAGREES = 3


@app.command()
@reports_errors
def verify(
    backend: Annotated[
        str | None, typer.Option(help="Check this back end alone: reference, cpu, triton, cuda.")
    ] = None,
    seconds: Annotated[float, typer.Option(min=1, help="Begin nothing new after so long.")] = 100.0,
    out: Annotated[Path, typer.Option(help="File for everything that was checked and measured.")] = Path("verify.json"),
    as_json: Json = False,
) -> None:
    """Check the back ends on this machine and measure what steering costs here, in less than two minutes.

    Every back end that works runs random programs of all interventions through all ops, in fp32, bf16 and fp16, and is
    compared with the reference in fp64. Timed are the op against a copy of as many bytes, and decode steps of the demo
    model unsteered and steered. On a GPU, the plan is also changed between two replays of a captured CUDA graph.

    Example: faststeer verify --out verify.json

    Exit codes: 0 every back end that works agrees; 1 wrong input, or a back end asked for that does not work here; 2
    wrong usage; 3 a back end disagrees with the reference.
    """
    from faststeer import verify as verifying

    if out.is_dir():
        raise ValueError(f"--out {out} is a folder: name a file")
    with errors.status("Verifying ...") as status:
        result = verifying.verify(backend, seconds, lambda what: status.update(f"{what.capitalize()} ..."))
    if as_json:
        typer.echo(json.dumps(result, allow_nan=False))
    else:
        _print(result)
    from faststeer.files import write_atomically

    write_atomically(out, json.dumps(result, indent=1, allow_nan=False) + "\n")
    errors.print(f"Written to {out}", highlight=False, soft_wrap=True)
    if not result["passed"]:
        raise typer.Exit(DISAGREES)


def _print(result: dict[str, Any]) -> None:
    console = Console()
    versions, machine = result["versions"], result["machine"]
    console.print(", ".join(f"{name} {version}" for name, version in versions.items() if version), highlight=False)
    console.print(machine.get("gpu") or f"{machine['cpu']}, {machine['cores']} cores", highlight=False)
    checks = Table(
        "back end", "", "largest error, of what is allowed", "programs", title="Against the reference in fp64"
    )
    for name, verdict in result["backends"].items():
        checks.add_row(name, *_verdict_cells(verdict))
    console.print(checks)
    for name, verdict in result["backends"].items():
        for text in verdict["disagreements"]:
            console.print(f"[bold red]{name}[/]: {escape(text)}", highlight=False)
        if (more := verdict["n_disagreements"] - len(verdict["disagreements"])) > 0:
            console.print(f"[bold red]{name}[/]: {more} more", highlight=False)
    kernels = Table("op", "back end", "rows", "us", "of copy bandwidth", title="One ablation per row")
    for record in result["kernels"]:
        shape = f"{record['rows']} x {record['hidden']}, {record['dtype']}"
        times = (f"{record['us']:.1f}", f"{record['percent_of_copy']:.0f}%") if "us" in record else ("", _why(record))
        kernels.add_row(record["op"], f"{record['backend']} ({record['device']})", shape, *times)
    console.print(kernels)
    steps = Table("", "ms", "least to most", "against unsteered", title="A decode step of the demo model")
    for record in result["steps"]:
        if "step_ms" not in record:
            steps.add_row(record["what"], "", "", _why(record))
            continue
        ratio = f"{record['against_unsteered']:.2f}" if "against_unsteered" in record else ""
        spread = f"{record['step_ms_low']:.3f} to {record['step_ms_high']:.3f}"
        steps.add_row(record["what"], f"{record['step_ms']:.3f}", spread, ratio)
    console.print(steps)
    console.print("The demo model is a toy: every call shows in its steps, which take a few milliseconds or less.")


def _verdict_cells(verdict: dict[str, Any]) -> tuple[str, str, str]:
    if not verdict["works"]:
        return escape(f"does not work here: {verdict['reason']}"), "", ""
    programs = f"{verdict['cases']} of {verdict['of']}"
    if verdict["cases"] < verdict["of"] and verdict["passed"] is not False:
        programs += ", then out of time"
    error = "not a number" if verdict["largest_error"] is None else f"{verdict['largest_error']:.2f}"
    outcome = {True: "agrees", False: "[bold red]disagrees[/]", None: "not checked"}[verdict["passed"]]
    if verdict["replays"]:
        outcome += "; plans change between replays of a graph"
    return outcome, error, programs


def _why(record: dict[str, Any]) -> str:
    return escape(record.get("skipped") or f"failed: {record['failed']}")
