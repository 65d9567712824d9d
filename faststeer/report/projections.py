"""What the answers of a run project on the vectors that steered them, as the page and the figures show it: a steered
answer beside the unsteered one on the same direction."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from faststeer.evaluate.sweep import Store
from faststeer.evaluate.sweep.projections import packed


@dataclass(frozen=True)
class Projected:
    """A steered answer and the unsteered one, on the direction of the steered.

    Attributes:
        title: what they are projected on.
        of_prompt: how many of the tokens are the prompt's.
        texts: the tokens, of the unsteered answer and of the steered one.
        values: `[layers + 1, tokens]` fp32 each: what enters each layer, last what leaves the last one.
    """

    title: str
    of_prompt: int
    texts: tuple[list[str], list[str]]
    values: tuple[np.ndarray, np.ndarray]


def projected(store: Store, run: str, setting: int, tag: str | None = None) -> Projected | None:
    """The first of a setting's projected answers, if possible to a prompt with this tag; None where there is none."""
    tagged = {p["prompt"] for p in store.prompts(run) if tag is not None and p["tag"] == tag}
    steered = min(
        store.projections(run, setting), key=lambda row: (row["prompt"] not in tagged, row["prompt"]), default=None
    )
    if setting == 0 or steered is None:
        return None
    base = [row for row in store.projections(run, 0, steered["prompt"]) if row["direction"] == steered["direction"]]
    if not base:
        return None
    return Projected(
        title_of(store.directions(run)[steered["direction"]]),
        steered["of_prompt"],
        (base[0]["texts"], steered["texts"]),
        (base[0]["values"], steered["values"]),
    )


def title_of(direction: Mapping[str, Any]) -> str:
    """What is projected on, such as "projection on refusal (of layer 3)"."""
    control, layer = direction["control"], direction["layer"]
    name = direction["vector"] if control is None else f"{direction['vector']}~random{control}"
    return f"projection on {name}" + ("" if layer is None else f" (its direction for layer {layer})")


def colour_range(*values: np.ndarray) -> tuple[float, float]:
    """From the least to the greatest finite value. The first token is left out where there are others: in many models
    it is a hundred times as long as all of them."""
    shown = np.concatenate([v[:, 1:].ravel() if v.shape[1] > 1 else v.ravel() for v in values])
    shown = shown[np.isfinite(shown)]
    return (float(shown.min()), float(shown.max())) if shown.size else (0.0, 1.0)


def page_data(store: Store, run: str) -> dict[str, Any]:
    """Every projection as columns: `data` is the halves of all rows (`packed`), one after another, in base64; equal
    texts of tokens stand once."""
    rows: list[tuple[Any, ...]] = []
    pieces: list[bytes] = []
    texts: dict[str, int] = {}
    answers: dict[tuple[int, int], dict[str, Any]] = {}
    for row in store.projections(run):
        scale, data = packed(row["values"])
        pieces.append(data)
        rows.append((row["setting"], row["prompt"], row["direction"], scale, len(row["values"])))
        answers.setdefault(
            (row["setting"], row["prompt"]),
            {
                "setting": row["setting"],
                "prompt": row["prompt"],
                "of_prompt": row["of_prompt"],
                "text": [texts.setdefault(text, len(texts)) for text in row["texts"]],
            },
        )
    names = ("setting", "prompt", "direction", "scale", "sites")
    return {
        **{name: [row[i] for row in rows] for i, name in enumerate(names)},
        "titles": [title_of(direction) for direction in store.directions(run)],
        "texts": list(texts),
        "answers": list(answers.values()),
        "data": base64.b64encode(b"".join(pieces)).decode(),
    }
