"""`faststeer report`."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.console import Console

from faststeer.cli.common import Json, Title, app, errors, reports_errors


@contextmanager
def _needs_packages() -> Iterator[None]:
    try:
        yield
    except ImportError as error:
        raise ValueError(str(error)) from error


@app.command()
@reports_errors
def report(
    store: Annotated[Path, typer.Argument(help="Where `faststeer sweep` keeps its rows.")] = Path("sweep.db"),
    out: Annotated[Path, typer.Option(help="The page.")] = Path("report.html"),
    png: Annotated[Path | None, typer.Option(help="Folder for the figures as PNGs.")] = None,
    run: Annotated[str, typer.Option(help="Which run of the store: a prefix, or 'newest'.")] = "newest",
    judge: Annotated[str | None, typer.Option(help="Judge of the behaviour; by default the first with a line.")] = None,
    tag: Annotated[str | None, typer.Option(help="Count only prompts with this tag.")] = None,
    goal: Annotated[Literal["more", "less"], typer.Option(help="Whether more or less of it is wanted.")] = "more",
    price: Annotated[str | None, typer.Option(help="The price: kl, cross_entropy, accuracy or a judge.")] = None,
    share: Annotated[float, typer.Option(min=0, max=1, help="Of the largest effect, good enough to recommend.")] = 0.9,
    limit: Annotated[float | None, typer.Option(help="Recommend nothing that costs more than this.")] = None,
    title: Title = None,
    as_json: Json = False,
) -> None:
    """Make one HTML page of a sweep: dose and response, heat maps, the Pareto front with the setting to use, answers,
    and what they project on the vectors.

    The page needs no server and no network. What the options choose is what it shows first; it can be changed there.

    Example: faststeer report sweep.db --out report.html --png figures --judge refusal --tag harmless

    Exit codes: 0 written; 1 wrong input; 2 wrong usage.
    """
    from faststeer import report as reports
    from faststeer.evaluate.sweep import Store
    from faststeer.files import write_atomically

    with _needs_packages(), Store(store, create=False) as opened, errors.status("Intervals of every setting ..."):
        findings = reports.findings(opened, None if run == "newest" else run)
        behaviour = findings.measure(judge, tag)
        paid = findings.price(behaviour, price)
        choice = reports.choose(findings, behaviour, paid, goal, share=share, limit=limit)
        html = reports.page(opened, findings, behaviour, paid, goal, share=share, limit=limit, title=title)
        best = choice.recommended
        shown = None if png is None or best is None else reports.projected(opened, findings.run, best, tag)
    pictures = {} if png is None else reports.figures(findings, behaviour, paid, choice, shown)
    write_atomically(out, html)
    for name, picture in pictures.items():
        write_atomically(Path(png or ".") / name, picture)
    facts: dict[str, Any] = {
        "run": findings.run,
        "page": str(out),
        "figures": [str(Path(png or ".") / n) for n in pictures],
    }
    facts |= {"behaviour": behaviour.title, "goal": goal, "price": paid and paid.title}
    facts["recommended"] = None if best is None else findings.lines[best].name
    if as_json:
        typer.echo(json.dumps(facts))
        return
    said = facts["recommended"] or f"nothing: no setting differs from the {findings.versus} (within the limit)"
    Console().print(f"Recommended: {said}", highlight=False, markup=False)
    Console().print(f"Written to {out}{f' and {png}' if png else ''}", highlight=False, markup=False)
