"""Rows of a sparse autoencoder's decoder as steering vectors, from a folder as SAELens saves it.

The autoencoder itself is never run; one row is read, not the whole decoder.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any, Literal

from safetensors import safe_open

from faststeer.files import FormatError, read_json, reading
from faststeer.vector import HookPoint, SteeringVector

CONFIG, WEIGHTS = "cfg.json", "sae_weights.safetensors"
HOOK_NAME = re.compile(r"blocks\.(\d{1,6})\.hook_(resid_pre|resid_mid|resid_post|attn_out|mlp_out)")
UNSCALED = (None, "none")


def sae_feature(path: str | os.PathLike[str], feature: int) -> SteeringVector:
    """Return row `feature` of the decoder `W_dec [d_sae, d_in]` as a direction at the layer and hook point that the
    autoencoder was trained on.

    Its length is that of the row ("raw") where the autoencoder reads activations as they are; where it normalises them
    first (`normalize_activations`), the row is in units of its own, and only its direction is kept ("unit").

    Args:
        path: a folder with cfg.json and sae_weights.safetensors (or one other .safetensors file), as SAELens saves it;
            cfg.json with its entries side by side (before version 6) or under "metadata". For a transcoder the place it
            writes to is taken.
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
        safe_open(weights, framework="pt") as file,
    ):
        if "W_dec" not in file.keys():  # noqa: SIM118 (a safetensors file is no dict)
            raise ValueError(f"it holds {', '.join(sorted(file.keys()))}, and no W_dec")
        rows = file.get_slice("W_dec")
        shape = rows.get_shape()
        expected = [config.get("d_sae", shape[0]), config.get("d_in", shape[-1])]
        if len(shape) != 2 or shape != expected:
            raise ValueError(f"W_dec has shape {shape}, cfg.json says {expected} (d_sae, d_in)")
        if isinstance(feature, bool) or not isinstance(feature, int) or not 0 <= feature < shape[0]:
            raise ValueError(f"there is no feature {feature!r}: it has features 0..{shape[0] - 1}")
        row = rows[feature : feature + 1][0].float()
    scale: Literal["raw", "unit"] = "raw" if config.get("normalize_activations") in UNSCALED else "unit"
    provenance = {"feature": feature, "sae": str(folder), "d_sae": shape[0], "position": None}
    if scale == "unit" and bool(row.any()):
        row = row / row.norm()
    with reading(f"{folder} gives no steering vector", "mend its files, or name another feature"):
        return SteeringVector(
            {layer: row}, at=at, model=config.get("model_name"), method="sae", scale=scale, provenance=provenance
        )


def _config(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG
    if not path.is_file():
        raise FileNotFoundError(f"no {CONFIG} in {folder}: expected a folder as SAELens saves it")
    try:
        config = read_json(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise FormatError(f"{path} is no valid JSON: {error}") from error
    if not isinstance(config, dict) or not isinstance(config.get("metadata", {}), dict):
        raise FormatError(f"{path} holds no configuration: expected an object")
    return config | config.get("metadata", {})


def _place(config: dict[str, Any], folder: Path) -> tuple[HookPoint, int]:
    name = config.get("hook_name_out") or config.get("hook_name")
    found = HOOK_NAME.fullmatch(name) if isinstance(name, str) else None
    if found is None or config.get("hook_head_index") is not None:
        head = "" if config.get("hook_head_index") is None else f", head {config['hook_head_index']}"
        raise FormatError(
            f"{folder / CONFIG} names the hook {name!r}{head}, which is no hook point of the residual stream: expected "
            "blocks.<layer>.hook_ and resid_pre, resid_mid, resid_post, attn_out or mlp_out"
        )
    return found[2], int(found[1])  # type: ignore[return-value]


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
