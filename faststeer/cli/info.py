"""`faststeer info`."""

from __future__ import annotations

import json
import platform
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from faststeer.cli.common import Device, Dtype, Json, app, load_model, reports_errors


@app.command()
@reports_errors
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

    import faststeer
    import faststeer.build
    from faststeer.version import versions

    facts: dict[str, Any] = {
        **versions(),
        "python": platform.python_version(),
        "devices": ["cpu", *(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count()))],
        "backends": {
            name: f"{'works' if state.works else 'does not work'}: {state.reason}"
            for name, state in faststeer.ops.states().items()
        },
        "in_use": {device: _in_use(device) for device in ("cpu", *["cuda"] * torch.cuda.is_available())},
    }
    if (native := faststeer.build.native()) is not None:
        try:
            facts["cpp"] = {name: value for name, value in native.build_info().items() if name != "flags"}
        except RuntimeError as error:  # FASTSTEER_CPU_ISA names what there is not
            facts["cpp"] = str(error)
    if model is not None:
        loaded, _ = load_model(model, dtype, device)
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


def _in_use(device: str) -> str:
    """The back end that runs there, or why the one of FASTSTEER_BACKEND does not."""
    from faststeer.ops import backend_for

    try:
        return backend_for(device)
    except (ValueError, RuntimeError) as error:
        return str(error)


def _lines(value: Any) -> list[str]:
    if isinstance(value, dict):
        return [
            f"{name}: {', '.join(_lines(inner)) if isinstance(inner, dict) else inner}" for name, inner in value.items()
        ]
    return [str(inner) for inner in value] if isinstance(value, list) else [str(value)]
