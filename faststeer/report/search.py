"""A search (`faststeer search`) as one HTML page, drawn from its JSON alone: what was tried, the Pareto front, the
choice, and answers to test prompts. It makes no number of its own."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from faststeer.behaviours.search import COSTS, rows, setting_text
from faststeer.report.document import render

TITLES = {
    "kl": "KL on neutral text, nats per token",
    "perplexity": "perplexity of the answers, times unsteered",
    "repetition": "repeated 4-grams, above unsteered",
    "over_refusal": "answers that refuse, above unsteered",
}


def search_page(state: Mapping[str, Any], title: str | None = None) -> str:
    """Return the HTML of a finished search.

    Raises:
        ImportError: Jinja or Plotly is not installed.
    """
    lines = [line | {"text": setting_text(line)} for line in rows(state)]
    measured = [line for line in lines if line["gain"] is not None]
    costs = [name for name in COSTS if any(line[name] is not None for line in measured)]
    reasons: dict[str, int] = {}
    for line in lines:
        if line["pruned"]:
            reasons[line["pruned"]] = reasons.get(line["pruned"], 0) + 1
    context = {
        "title": title or f"Search for {state['behaviour']['name']} on {state['model'] or 'a model'}",
        "state": state,
        "settings": state["settings"],
        "front": sorted((line for line in measured if line["front"]), key=lambda line: line["kl"]),
        "tried": len(lines),
        "answered": len(measured),
        "reasons": reasons,
        "chosen": next((line for line in lines if line["chosen"]), None),
        "costs": costs,
        "titles": TITLES,
    }
    columns = ("text", "op", "gain", *costs, "front", "finalist", "chosen", "answers")
    data = {"lines": [{k: line[k] for k in columns} for line in measured], "costs": [[c, TITLES[c]] for c in costs]}
    return render("search", context, {"search": json.dumps(data, allow_nan=False)})
