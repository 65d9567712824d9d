"""The page of a sweep: all settings, measures and answers as data of one HTML file, so that 10^5 answers stay a few
megabytes and no text of a model or a user ever is markup."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable
from typing import Any

from faststeer.evaluate.sweep import Store
from faststeer.report.choice import choose
from faststeer.report.document import render
from faststeer.report.figures import cost_title
from faststeer.report.findings import Findings, Goal, Measure
from faststeer.report.projections import page_data

GOALS: tuple[Goal, ...] = ("more", "less")
OF_SETTINGS = ("name", "kind", "vector", "control", "layers", "coefficient", "answers", "errors")


def page(
    store: Store,
    findings: Findings,
    behaviour: Measure,
    price: Measure | None,
    goal: Goal = "more",
    *,
    share: float,
    limit: float | None,
    title: str | None = None,
) -> str:
    """Return the HTML of a run; `behaviour`, `price`, `goal`, `share` and `limit` are what it shows first.

    Raises:
        ImportError: Jinja or Plotly is not installed.
    """
    facts = findings.facts
    start = {
        "behaviour": behaviour.key,
        "price": price and price.key,
        "goal": goal,
        "share": share,
        "limit": limit,
    }
    projections = page_data(store, findings.run)
    context = {
        "title": title or f"Sweep of {facts['description'].get('model', 'a model')}",
        "findings": findings,
        "facts": facts,
        "created": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(facts["created"])),
        "unfinished": not facts["done"],
        "failed": sum(line.errors for line in findings.lines),
        "unread": {name: sum(line.scores[name].failures for line in findings.lines) for name in findings.judges},
        "store": store.path.name,
        "reason": findings.reason(behaviour),
        "has_vectors": any(line.kind == "vector" for line in findings.lines),
        "has_prices": price is not None,
        "has_projections": bool(projections["setting"]),
    }
    summary, answers = _summary(store, findings, start), _answers(store, findings)
    summary["projected"] = context["has_projections"]
    parts = {"summary": summary, "answers": answers, "projections": projections}
    return render("report", context, {name: json.dumps(part, allow_nan=False) for name, part in parts.items()})


def _summary(store: Store, findings: Findings, start: dict[str, Any]) -> dict[str, Any]:
    """Settings, measures and, for every behaviour, goal and price, who is eligible and on the front."""
    index = {m.key: i for i, m in enumerate(findings.measures)}
    behaviours = findings.behaviours
    prices = {b.key: findings.prices(b) for b in behaviours}
    return {
        "start": start,
        "versus": findings.versus,
        "intervention": findings.facts["description"].get("intervention"),
        "prompts": store.prompts(findings.run),
        "judges": [
            {"name": n, "shows": j["shows"]} for n, j in zip(findings.judges, store.judges(findings.run), strict=True)
        ],
        "settings": [
            {name: getattr(line, name) for name in OF_SETTINGS}
            | {"unread": {name: score.failures for name, score in line.scores.items() if score.failures}}
            for line in findings.lines
        ],
        "measures": [_plain(measure) for measure in findings.measures],
        "behaviours": [index[b.key] for b in behaviours],
        "prices": {b.key: [index[p.key] for p in prices[b.key]] for b in behaviours},
        "choices": {
            f"{b.key} {goal} {p.key if p else ''}": _choice(findings, b, p, goal)
            for b in behaviours
            for goal in GOALS
            for p in (prices[b.key] or [None])
        },
    }


def _choice(findings: Findings, behaviour: Measure, price: Measure | None, goal: Goal) -> dict[str, Any]:
    choice = choose(findings, behaviour, price, goal)
    return {"front": choice.front, "eligible": choice.eligible}


def _plain(measure: Measure) -> dict[str, Any]:
    names = ("key", "title", "label", "name", "tag", "share", "price")
    numbers = ("value", "low", "high", "n", "over")
    return (
        {name: getattr(measure, name) for name in names}
        | {"costs": cost_title(measure)}
        | {name: [point and getattr(point, name) for point in measure.points] for name in numbers}
    )


def _answers(store: Store, findings: Findings) -> dict[str, Any]:
    """Answers as columns, equal texts once."""
    rows = store.answers(findings.run)
    at = {(row["setting"], row["prompt"]): i for i, row in enumerate(rows)}
    texts, text = _numbered(row["text"] for row in rows)
    finishes, finish = _numbered(row["finish"] for row in rows)
    judged = []
    for judge in store.judges(findings.run):
        verdicts = store.verdicts(findings.run, judge["judge"])
        labels, label = _numbered(v["label"] for v in verdicts)
        judged.append(
            {
                "labels": labels,
                "row": [at[v["setting"], v["prompt"]] for v in verdicts],
                "label": label,
                "score": [None if v["score"] is None else float(f"{v['score']:.6g}") for v in verdicts],
                "parts": {i: v["parts"] for i, v in enumerate(verdicts) if v["parts"]},
                "raw": {i: v["raw"] for i, v in enumerate(verdicts) if v["raw"] is not None},
            }
        )
    return {
        "setting": [row["setting"] for row in rows],
        "prompt": [row["prompt"] for row in rows],
        "tokens": [row["tokens"] for row in rows],
        "texts": texts,
        "text": text,
        "finishes": finishes,
        "finish": finish,
        "errors": {i: row["error"] for i, row in enumerate(rows) if row["error"] is not None},
        "verdicts": judged,
    }


def _numbered(values: Iterable[Any]) -> tuple[list[Any], list[int]]:
    """The distinct values in order of appearance, and each value's number among them."""
    numbers: dict[Any, int] = {}
    which = [numbers.setdefault(value, len(numbers)) for value in values]
    return list(numbers), which
