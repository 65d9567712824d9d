"""`faststeer plan`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from faststeer.cli.common import (
    VectorLayer,
    app,
    check_files,
    errors,
    reports_errors,
    vector_layers,
)

if TYPE_CHECKING:
    from faststeer import Intervention, Plan, SteeringVector
    from faststeer.intervention import Gate

EVERYWHERE = ("resid_pre", "attn_out", "mlp_out")  # what reads or writes the residual stream in a layer


@app.command()
@reports_errors
def plan(
    start: Annotated[
        Path | None, typer.Argument(help="A plan to explain, or to put one more intervention into.")
    ] = None,
    add: Annotated[Path | None, typer.Option(help="Add this vector, times --coefficient.")] = None,
    ablate: Annotated[Path | None, typer.Option(help="Remove this direction, times --strength.")] = None,
    project: Annotated[Path | None, typer.Option(help="Leave only what lies along this direction.")] = None,
    clamp: Annotated[
        Path | None, typer.Option(help="Keep the projection on this direction in --low to --high.")
    ] = None,
    rotate: Annotated[Path | None, typer.Option(help="Turn the row in the plane of this vector and --towards.")] = None,
    probe: Annotated[Path | None, typer.Option(help="Change nothing; record the projection on this direction.")] = None,
    coefficient: Annotated[float, typer.Option(help="For --add.")] = 1.0,
    strength: Annotated[float, typer.Option(help="For --ablate: 1 removes, 2 reflects.")] = 1.0,
    low: Annotated[float | None, typer.Option(help="For --clamp.")] = None,
    high: Annotated[float | None, typer.Option(help="For --clamp.")] = None,
    towards: Annotated[Path | None, typer.Option(help="For --rotate: the second vector of the plane.")] = None,
    degrees: Annotated[float, typer.Option(help="For --rotate: the angle from the first vector.")] = 0.0,
    layer: VectorLayer = None,
    everywhere: Annotated[
        bool,
        typer.Option(
            "--everywhere",
            help="The direction of the one --layer acts in every layer, at resid_pre, attn_out and mlp_out.",
        ),
    ] = False,
    at: Annotated[str | None, typer.Option(help="Hook points, with commas between (default: the vector's).")] = None,
    positions: Annotated[
        str, typer.Option(help="Tokens: all, prompt, generated, last, or a slice from the prompt's end: '[-5:]'.")
    ] = "all",
    keep_norm: Annotated[bool, typer.Option("--keep-norm", help="Scale each row back to its norm.")] = False,
    out: Annotated[Path | None, typer.Option(help="Write the plan there.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the plan as JSON instead of the explanation.")] = False,
    schema: Annotated[bool, typer.Option("--schema", help="Print the JSON Schema of plans, and nothing else.")] = False,
) -> None:
    """Make a plan, or explain one: what acts, at which layers and tokens, in which order.

    A plan is what generate, evaluate, fold and the server take. Vectors are named by paths relative to the plan.

    \b
    Example: faststeer plan --add tone.safetensors --layer 18 --coefficient 1.5 --out plan.json
    Example: faststeer plan plan.json --ablate refusal.safetensors --layer 12 --everywhere --out both.json
    Example: faststeer plan both.json
    Example: faststeer plan --schema > plan.schema.json
    """
    if schema:
        from faststeer.plan_schema import plan_schema

        typer.echo(json.dumps(plan_schema(), indent=2))
        return
    files = {"add": add, "ablate": ablate, "project": project, "clamp": clamp, "rotate": rotate, "probe": probe}
    named = {kind: path for kind, path in files.items() if path is not None}
    if len(named) > 1:
        raise typer.BadParameter(f"{' and '.join(f'--{kind}' for kind in named)}: one intervention in one call")
    if start is None and not named:
        raise typer.BadParameter("name a plan to explain, or an intervention, such as --add vector.safetensors")
    if (rotate is None) != (towards is None):
        raise typer.BadParameter("--rotate and --towards name the two vectors of the plane: give both")
    check_files(plan=start, towards=towards, **named)
    from faststeer import Plan

    whole = Plan() if start is None else Plan.load(start)
    if named:
        kind, path = named.popitem()
        numbers: dict[str, dict[str, Any]] = {
            "add": {"coefficient": coefficient},
            "ablate": {"strength": strength},
            "clamp": {"low": low, "high": high},
            "rotate": {"degrees": degrees},
        }
        where: dict[str, Any] = {"at": None if at is None else tuple(point.strip() for point in at.split(","))}
        if kind != "probe":
            where |= {"positions": positions, "keep_norm": keep_norm}
        whole = Plan(
            [*whole, _intervention(kind, path, towards, layer, everywhere, {**numbers.get(kind, {}), **where})]
        )
    if out is not None:
        whole.save(out)
    if as_json:
        typer.echo(whole.to_json())
    else:
        Console().print(_table(whole))
    if out is not None:
        errors.print(f"Written to {out}", highlight=False)


def _intervention(
    kind: str, path: Path, towards: Path | None, layer: str | None, everywhere: bool, fields: dict[str, Any]
) -> Intervention:
    import faststeer as fs

    vector = fs.SteeringVector.load(path)
    if kind == "rotate":
        assert towards is not None
        layers = vector_layers(path, vector, layer)
        return fs.Rotate(vector, fs.SteeringVector.load(towards), layers=layers, **fields)
    make = {"add": fs.Add, "ablate": fs.Ablate, "project": fs.Project, "clamp": fs.Clamp, "probe": fs.Probe}[kind]
    layers = vector_layers(path, vector, layer)
    if not everywhere:
        return make(vector, layers=layers, **fields)
    if len(layers) > 1:
        raise typer.BadParameter("--everywhere takes the direction of one layer: name it with --layer")
    fields["at"] = fields["at"] or EVERYWHERE
    return make(vector[layers[0]], layers="all", **fields)


def _table(plan: Plan) -> Table:
    table = Table("", "what", "layers", "hook points", "tokens", "when", title="Interventions, in order")
    for number, intervention in enumerate(plan, 1):
        table.add_row(str(number), *explained(intervention))
    if not len(plan):
        table.caption = "an empty plan leaves the model as it is"
    return table


def explained(intervention: Intervention) -> list[str]:
    """What an intervention does, at which layers and hook points, for which tokens and under which condition."""
    from faststeer.compile import hook_points

    names = [_direction_name(direction) for direction in intervention.directions()]
    what = _formula(intervention, names)
    if intervention.keep_norm:
        what += ", norm kept"
    layers = intervention.layers
    numbers = ", ".join(map(str, layers)) if isinstance(layers, tuple) else layers or "those of the vector"
    when = "always" if intervention.when is None else _condition(intervention.when)
    return [what, str(numbers), ", ".join(hook_points(intervention)), str(intervention.positions), when]


def _formula(intervention: Intervention, names: list[str]) -> str:
    import faststeer as fs

    if isinstance(intervention, fs.Add):
        return f"add {_number(intervention.coefficient)} x {names[0]}"
    if isinstance(intervention, fs.Ablate):
        return f"remove {_number(intervention.strength)} x the part along {names[0]}"
    if isinstance(intervention, fs.Project):
        return f"leave only the part along {names[0]}"
    if isinstance(intervention, fs.Clamp):
        bounds = ("any" if bound is None else _number(bound) for bound in (intervention.low, intervention.high))
        return f"keep the projection on {names[0]} between {' and '.join(bounds)}"
    if isinstance(intervention, fs.Rotate):
        way = "by" if intervention.relative else "to"
        return f"turn {way} {_number(intervention.degrees)} degrees in the plane of {names[0]} and {names[1]}"
    return f"record the projection on {names[0]}"


def _number(value: Any) -> str:
    return f"{float(value):g}"


def _direction_name(direction: SteeringVector | Any) -> str:
    import faststeer as fs

    if not isinstance(direction, fs.SteeringVector):
        rank = 1 if direction.dim() == 1 else direction.shape[0]
        return f"a direction of {direction.shape[-1]}" if rank == 1 else f"{rank} directions of {direction.shape[-1]}"
    name = direction.path.name if direction.path is not None else (direction.method or "a vector")
    lengths = [float(direction[layer].norm()) for layer in direction.layers]
    length = f"{min(lengths):.3g}" if len(lengths) == 1 else f"{min(lengths):.3g} to {max(lengths):.3g}"
    return f"{name} (length {length})"


def _condition(gate: Gate) -> str:
    value = "the cosine" if gate.kind == "cosine" else "the dot product"
    side = "above" if gate.above else "at most"
    once = ", decided at the prompt's end" if gate.latched else ""
    return f"{value} with {_direction_name(gate.direction)} is {side} {_number(gate.threshold)}{once}"
