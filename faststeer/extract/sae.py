"""Rows of a sparse autoencoder's decoder as steering vectors, from a folder as SAELens saves it.

The autoencoder itself is never run; one row is read, not the whole decoder.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any, Literal

from safetensors import safe_open

from faststeer.file_kinds import expect, kind_of
from faststeer.files import FormatError, json_file, reading
from faststeer.vector import HookPoint, SteeringVector, whole_number

CONFIG, WEIGHTS = "cfg.json", "sae_weights.safetensors"
HOOK_NAME = re.compile(r"blocks\.(\d{1,6})\.hook_(resid_pre|resid_mid|resid_post|attn_out|mlp_out)")
UNSCALED = (None, "none")
BY_HAND = "Expected is hook_name blocks.<layer>.hook_<hook point>, d_in, d_sae and W_dec [d_sae, d_in] in safetensors"


def sae_feature(path: str | os.PathLike[str], feature: int) -> SteeringVector:
    """Return row `feature` of the decoder `W_dec [d_sae, d_in]` as a direction at the layer and hook point that the
    autoencoder was trained on.

    Its length is that of the row ("raw") where the autoencoder reads activations as they are; where it normalises them
    first (`normalize_activations`), the row is in units of its own, and only its direction is kept ("unit").

    Args:
        path: a folder with cfg.json and sae_weights.safetensors (or one other .safetensors file), as SAELens saves it;
            cfg.json with its entries side by side (before version 6) or under "metadata", and `hook_point` for
            `hook_name` (before version 3). For a transcoder the place it writes to is taken.
        feature: row number from 0.

    Raises:
        FileNotFoundError: one of the files is not there.
        FormatError: a file that cannot be read, a hook point that is none of the residual stream's (such as hook_z, or
            a single head), no W_dec, a row there is not, sizes that do not agree, a row that is zero.
    """
    folder = Path(path)
    config = _config(folder)
    at, layer = _place(config, folder)
    weights = _weights(folder)
    with (
        reading(f"{weights} cannot be used", "download the autoencoder again, or name another feature"),
        _open(weights) as file,
    ):
        if "W_dec" not in file.keys():  # noqa: SIM118 (a safetensors file is no dict)
            raise ValueError(f"it holds {', '.join(sorted(file.keys()))}, and no W_dec")
        rows = file.get_slice("W_dec")
        shape = rows.get_shape()
        width = config.get("d_out") or config.get("d_in", shape[-1])  # a transcoder writes as many as it likes
        expected = [config.get("d_sae", shape[0]), width]
        if len(shape) != 2 or shape != expected:
            raise ValueError(f"W_dec has shape {shape}, cfg.json says {expected} (d_sae, d_in)")
        number = whole_number(feature)
        if number is None or not 0 <= number < shape[0]:
            raise ValueError(f"there is no feature {feature!r}: it has features 0..{shape[0] - 1}")
        row = rows[number : number + 1][0].float()
    scale: Literal["raw", "unit"] = "raw" if config.get("normalize_activations") in UNSCALED else "unit"
    provenance = {"feature": number, "sae": str(folder), "d_sae": shape[0], "position": None}
    if scale == "unit" and bool(row.any()):
        row = row / row.norm()
    with reading(f"{folder} gives no steering vector", "mend its files, or name another feature"):
        return SteeringVector(
            {layer: row}, at=at, model=config.get("model_name"), method="sae", scale=scale, provenance=provenance
        )


def _open(weights: Path) -> Any:
    expect(weights, "safetensors")
    return safe_open(weights, framework="pt")


def _config(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG
    if not path.is_file():
        raise FileNotFoundError(f"no {CONFIG} in {folder}: expected a folder as SAELens saves it{_what_else(folder)}")
    config = json_file(path)
    if not isinstance(config, dict) or not isinstance(config.get("metadata", {}), dict):
        raise FormatError(f"{path} holds no configuration: expected an object")
    return config | config.get("metadata", {})


def _what_else(folder: Path) -> str:
    """What lies there instead, and how to come to a vector of it."""
    if folder.is_file():
        kind = kind_of(folder)
        return f"; this is a file{f' ({kind.words})' if kind else ''}: name the folder it lies in"
    others = sorted(p.name for p in folder.glob("*") if p.suffix in (".npz", ".pt", ".safetensors"))
    if not others:
        return ""
    return (
        f"; {others[0]} may hold another project's autoencoder, which does not say where it belongs: take the row of "
        f"its decoder yourself, and make SteeringVector({{layer: row}}, at=...). {BY_HAND}"
    )


def _place(config: dict[str, Any], folder: Path) -> tuple[HookPoint, int]:
    """Hook point and layer. SAELens before version 3 says hook_point and hook_point_layer, the layer's number perhaps
    only in the latter: `blocks.{layer}.hook_resid_pre`."""
    path = folder / CONFIG
    said = {key: config[key] for key in ("hook_name", "hook_point") if config.get(key) is not None}
    layers = {key: config[key] for key in ("hook_layer", "hook_point_layer") if config.get(key) is not None}
    heads = {key: config[key] for key in ("hook_head_index", "hook_point_head_index") if config.get(key) is not None}
    name = config.get("hook_name_out") or next(iter(said.values()), None)
    if name is None:
        raise FormatError(
            f"{path} does not say at which hook the autoencoder was trained (hook_name, or hook_point in older files), "
            f"so its layer and hook point are not known: write hook_name into it. {BY_HAND}"
        )
    layer = next(iter(layers.values()), None)
    if isinstance(name, str) and "{layer}" in name and type(layer) is int:
        name = name.replace("{layer}", str(layer))
    hook = HOOK_NAME.fullmatch(name) if isinstance(name, str) else None
    if hook is None or heads:
        head = f", head {next(iter(heads.values()))}" if heads else ""
        raise FormatError(
            f"{path} names the hook {name!r}{head}, which is no hook point of the residual stream: expected "
            "blocks.<layer>.hook_ and resid_pre, resid_mid, resid_post, attn_out or mlp_out"
        )
    names = {str(value).replace("{layer}", str(layer)) for value in said.values()}
    numbers = {int(hook[1]), *([] if config.get("hook_name_out") else layers.values())}
    if len(names) > 1 or len(numbers) > 1:
        raise FormatError(
            f"{path} contradicts itself ({said | layers}): write the hook that the autoencoder was trained on into it"
        )
    return hook[2], int(hook[1])  # type: ignore[return-value]


def _weights(folder: Path) -> Path:
    files = sorted(folder.glob("*.safetensors"))
    named = folder / WEIGHTS
    if named in files:
        return named
    if len(files) != 1:
        raise FileNotFoundError(
            f"{folder} has no {WEIGHTS} and {len(files) or 'no'} other .safetensors file(s): expected one"
        )
    return files[0]
