"""The projection heat map: layers by tokens, of both answers, on one colour scale around zero."""

from __future__ import annotations

from typing import Any

import numpy as np

from faststeer.extras import needed_for
from faststeer.ui.answers import PlaygroundAnswers

LABELS = 24  # of tokens, at most: as many as can be read side by side on a phone of 360 pixels


def heat_map(answers: PlaygroundAnswers | None, vector: int, title: str) -> Any:
    """A plotly figure of what the answers project on vector number `vector`; empty without answers.

    Raises:
        ImportError: plotly is not installed.
    """
    with needed_for("the heat map", "ui"):
        from plotly.subplots import make_subplots
    figure = make_subplots(rows=2, cols=1, vertical_spacing=0.27, subplot_titles=("unsteered", "steered"))
    figure.update_layout(
        title={"text": title, "font": {"size": 14}, "x": 0.01, "y": 0.97, "yanchor": "top"},
        height=495,
        modebar={"bgcolor": "rgba(0,0,0,0)", "color": "#808894"},
        margin={"l": 55, "r": 10, "t": 85, "b": 60},
        coloraxis={"colorscale": "RdBu_r", "cmid": 0, "colorbar": {"thickness": 12, "outlinewidth": 0}},
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        font={"color": "#808894"},  # to be read on white and on black
    )
    if answers is None:
        return figure
    values = answers.projections[..., vector].numpy()  # [2, layers, tokens]
    # Without the first token, where there are others: in many models it is a hundred times as long as all of them.
    reach = float(np.nanmax(np.abs(values[..., 1:] if values.shape[2] > 1 else values))) or 1.0
    figure.update_layout(coloraxis={"cmin": -reach, "cmax": reach})
    width = values.shape[2]  # a column is the same token of the prompt in both, and labels are as far apart in both
    figure.update_xaxes(range=[-0.5, width - 0.5])
    for row, (name, tokens) in enumerate(zip(("unsteered", "steered"), answers.tokens, strict=True)):
        _add(figure, row + 1, name, values[row, :, : len(tokens)], tokens, answers.n_prompt, width)
    return figure


def _add(figure: Any, row: int, name: str, values: np.ndarray, tokens: list[str], n_prompt: int, width: int) -> None:
    """One answer: `values` is `[layers, tokens]`; the axis has room for `width` tokens."""
    n_layers, n_tokens = values.shape
    labels = [_shown(token) for token in tokens]
    figure.add_heatmap(
        z=values.tolist(),
        x=list(range(n_tokens)),
        y=list(range(n_layers)),
        customdata=[labels] * n_layers,
        hovertemplate="%{customdata}<br>layer %{y}<br>projection %{z:.3g}<extra></extra>",
        coloraxis="coloraxis",
        name=name,
        row=row,
        col=1,
    )
    every = max(1, -(-width // LABELS))
    places = list(range(0, n_tokens, every))
    figure.update_xaxes(
        tickvals=places, ticktext=[labels[i] for i in places], tickangle=-60, tickfont={"size": 10}, row=row, col=1
    )
    figure.update_yaxes(title="layer", showgrid=False, zeroline=False, row=row, col=1)
    figure.update_xaxes(showgrid=False, zeroline=False, row=row, col=1)
    figure.add_vline(x=n_prompt - 0.5, line={"color": "#808894", "width": 2, "dash": "dot"}, row=row, col=1)


def _shown(token: str) -> str:
    """A token as a label: spaces and line ends to be seen."""
    text = token.replace("\n", "⏎").strip(" ") or "␣"
    return escaped(text if len(text) <= 14 else text[:13] + "…")


def escaped(text: str) -> str:
    """A text in which Plotly finds no HTML."""
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
