"""`faststeer sweep`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from faststeer.cli.common import FAILED, Json, MaxBatch, app, check_files, keeps, load_model, reports_errors

if TYPE_CHECKING:
    from faststeer.evaluate.sweep import Line


@app.command()
@reports_errors
def sweep(
    description: Annotated[Path | None, typer.Argument(help="What to measure: .yaml or .json.")] = None,
    store: Annotated[Path, typer.Option(help="Where rows are kept; go on with it after a kill.")] = Path("sweep.db"),
    check: Annotated[bool, typer.Option("--check", help="Only check the description and count its rows.")] = False,
    show: Annotated[str | None, typer.Option(help="Only print this run of the store (a prefix, or 'newest').")] = None,
    judge: Annotated[str | None, typer.Option(help="Sort the table by this judge's mean score.")] = None,
    tag: Annotated[str | None, typer.Option(help="Count only prompts with this tag.")] = None,
    lines: Annotated[int, typer.Option(min=1, help="Lines of the table; --json has all.")] = 20,
    max_batch: MaxBatch = 256,
    as_json: Json = False,
) -> None:
    """Measure layers x coefficients x vectors x prompts in one go, next to random vectors, and print what they do.

    Every finished row is in the store: run the same command again after a kill, and several times at once to share the
    work among processes (CUDA_VISIBLE_DEVICES for several GPUs).

    Example: faststeer sweep sweep.yaml --store sweep.db, where sweep.yaml holds

    \b
        model: demo
        prompts: {demo: harmless, limit: 16}
        vectors: {refusal: refusal.safetensors}
        layers: [2, 3, [2, 3]]
        coefficients: {from: 0, to: 2, steps: 5}
        judges:
        - refusal
        - perplexity

    Exit codes: 0 finished; 1 wrong input, or a full disk; 2 wrong usage; 3 finished, but some answers could not be
    generated or some verdicts not read; 130 stopped by Ctrl-C (what was finished is kept).
    """
    if (description is None) == (show is None):
        raise typer.BadParameter("give a description, or --show RUN to print what a store holds")
    check_files(description=description)
    import faststeer.demo  # noqa: F401  its judges and prompts
    from faststeer.evaluate import sweep as sweeps
    from faststeer.vllm.runner import VllmEngine

    if description is None:
        with sweeps.Store(store, create=False) as opened:
            _print(opened, opened.run(None if show == "newest" else show), judge, tag, lines, as_json)
        return
    asked = sweeps.load_sweep(description)
    if check:
        _count(asked, as_json)
        return
    with sweeps.Store(store) as opened:
        model, tokenizer = load_model(asked.model, asked.dtype, asked.device)
        with keeps(store):
            engine = VllmEngine if asked.engine == "vllm" else None
            run = sweeps.run(asked, model, tokenizer, opened, max_batch=max_batch, engine=engine)
        rows = _print(opened, run, judge, tag, lines, as_json)
    if any(line.errors or any(score.failures for score in line.scores.values()) for line in rows):
        raise typer.Exit(FAILED)


def _count(asked: Any, as_json: bool) -> None:
    facts = {"settings": len(asked.settings), "prompts": len(asked.prompts)}
    facts["rows"] = facts["settings"] * facts["prompts"]
    if as_json:
        typer.echo(json.dumps(facts))
    else:
        Console().print(f"{facts['settings']} settings x {facts['prompts']} prompts = {facts['rows']} answers")


def _print(store: Any, run: str, judge: str | None, tag: str | None, n: int, as_json: bool) -> list[Line]:
    from faststeer.evaluate.sweep import table

    rows = table(store, run, tag=tag)
    if tag is not None and not any(line.answers for line in rows):
        raise ValueError(f"no prompt of this sweep has the tag {tag!r}")
    names = list(rows[0].scores)
    if judge is not None and judge not in names:
        raise ValueError(f"there is no judge {judge!r}: this sweep has {', '.join(names)}")
    if judge is not None:
        rows.sort(key=lambda line: -_mean(line, judge))
    if as_json:
        typer.echo(json.dumps({"run": run, "store": str(store.path), "lines": [line.to_dict() for line in rows]}))
        return rows
    Console().print(results_table(rows[:n], f"Run {run[:12]} in {store.path}"))
    if len(rows) > n:
        Console().print(f"{len(rows) - n} more lines: --lines, or --json")
    return rows


def _mean(line: Line, judge: str) -> float:
    mean = line.scores[judge].mean if judge in line.scores else None
    return float("-inf") if mean is None else mean.mean


def results_table(rows: list[Line], title: str) -> Table:
    """Settings by judges, one unit per column (`shows_share`); * where a vector or plan differs from the random vectors
    (or, without those, from the unsteered model)."""
    from faststeer.evaluate.sweep import shows_share

    names = list(rows[0].scores) if rows else []
    shares = {name: shows_share(rows, name) for name in names}
    costs = sorted({name for line in rows for name in line.effects})
    heads = (f"{name}, {'share' if shares[name] else 'mean score'}" for name in names)
    shown = Table("setting", *heads, *costs, "n", title=title)
    for line in rows:
        effects = [f"{line.effects[name]:.3f}" if name in line.effects else "" for name in costs]
        shown.add_row(line.name, *(_cell(line, name, shares[name]) for name in names), *effects, str(line.answers))
    shown.caption = (
        "95 % intervals; * differs from the random vectors, or where there are none from the unsteered model"
    )
    return shown


def _cell(line: Line, judge: str, share: bool) -> str:
    score: Any = line.scores[judge]
    if score.mean is None:
        return f"unread: {score.failures}"
    other = score.over_control or score.over_unsteered
    tested = line.kind in ("vector", "plan") and other is not None and other.low is not None
    star = "*" if tested and (other.low > 0 or other.high < 0) else ""
    if share:
        text = f"{score.rate.rate:.0%} [{score.rate.low:.0%}, {score.rate.high:.0%}]"
    else:
        text = f"{score.mean.mean:.3g}"
        text += f" [{score.mean.low:.3g}, {score.mean.high:.3g}]" if score.mean.low is not None else ""
    return text + star + (f", unread: {score.failures}" if score.failures else "")
