"""`faststeer observe`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.console import Console
from rich.table import Table

from faststeer.cli.common import (
    DEMO_STEPS,
    FAILED,
    BatchSize,
    BehaviourName,
    Device,
    Dtype,
    Field,
    Json,
    Judge,
    MaxNewTokens,
    Model,
    Negative,
    Positive,
    Title,
    app,
    behaviour_of,
    check_sides,
    errors,
    keeps,
    load_model,
    numbers,
    reports_errors,
)


@app.command()
@reports_errors
def observe(
    out: Annotated[Path, typer.Option(help="Folder of the study; go on with it after a kill.")] = Path("observe"),
    model: Model = "demo",
    behaviour: BehaviourName = None,
    positive: Positive = None,
    negative: Negative = None,
    field: Field = None,
    judge: Judge = None,
    method: Annotated[str, typer.Option(help="Some of dim,pca,lat,probe,ntp,po,reps,bipo.")] = "dim,ntp,po",
    layer: Annotated[int | None, typer.Option(min=0, help="Steer before it (chosen on validation prompts).")] = None,
    position: Annotated[
        int | None, typer.Option(max=-1, help="Prompt token of the difference in means (chosen likewise).")
    ] = None,
    coefficient: Annotated[float, typer.Option(help="Of the vectors; its negative suppresses.")] = 1.0,
    steps: Annotated[int | None, typer.Option(min=1, help="Training steps (10 epochs; 24 on the demo model).")] = None,
    prompts: Annotated[int, typer.Option(min=1, help="Test prompts a side that are answered, at most.")] = 100,
    patched: Annotated[int, typer.Option(min=1, help="Training prompts a side that score edges, at most.")] = 32,
    tried: Annotated[int, typer.Option(min=1, help="Test prompts a side that circuits are tried on, at most.")] = 16,
    utility: Annotated[
        int, typer.Option(min=1, help="Neutral texts, and questions, that are read under steering, at most.")
    ] = 48,
    metric: Annotated[
        Literal["logit_difference", "directed_kl"], typer.Option(help="What edges are scored by.")
    ] = "logit_difference",
    points: Annotated[int, typer.Option(min=1, help="Of the quadrature along the coefficient.")] = 10,
    shares: Annotated[
        str, typer.Option(help="Sizes of circuits, as shares of the edges.")
    ] = "0.01,0.02,0.05,0.1,0.15,0.2,0.3,0.5,1",
    sparsities: Annotated[
        str, typer.Option(help="Shares of the vector's coordinates that are zero.")
    ] = "0,0.5,0.8,0.9,0.95,0.99",
    controls: Annotated[int, typer.Option(min=1, help="Random circuits of each size, and random sparse vectors.")] = 3,
    max_new_tokens: MaxNewTokens = 64,
    seed: Annotated[int, typer.Option(min=0, help="Of training and of every control.")] = 0,
    batch_size: BatchSize = 32,
    patch_batch: Annotated[int, typer.Option(min=1, help="Examples that are patched together.")] = 4,
    png: Annotated[Path | None, typer.Option(help="Folder for the figures as PNGs.")] = None,
    title: Title = None,
    dtype: Dtype = "auto",
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Study what drives a steering vector, as arXiv 2604.08524 does: what is left with attention frozen or values
    ablated, which edges carry it, how alike the circuits of different methods are, what heads' values say, and how few
    coordinates are enough; every figure with its interval, next to random controls.

    Writes observe.json and observe.html (one page, no network needed) to --out. Every finished part is kept there: the
    same command goes on after a kill, and an option that is changed costs what depends on it.

    \b
    Example: faststeer observe --out refusal-study
    Example: faststeer observe --model ./my-model --behaviour refusal --max-new-tokens 256 --png figures

    Exit codes: 0 finished; 1 wrong input, or a full disk; 2 wrong usage; 3 finished, but something had to be left out
    (it says what, and why); 130 stopped by Ctrl-C (what was finished is kept).
    """
    check_sides(positive, negative)
    from faststeer import report
    from faststeer.files import write_atomically
    from faststeer.observe import study

    settings = study.Settings(
        methods=[part.strip() for part in method.split(",")],
        layer=layer,
        position=position,
        coefficient=coefficient,
        steps=DEMO_STEPS if steps is None and model == "demo" else steps,
        n_patch=patched,
        n_faithful=tried,
        n_test=prompts,
        n_utility=utility,
        metric=metric,
        quadrature=points,
        shares=numbers(shares, "--shares"),
        sparsities=numbers(sparsities, "--sparsities"),
        controls=controls,
        max_new_tokens=max_new_tokens,
        seed=seed,
    )
    studied = behaviour_of(model, behaviour, positive, negative, field, judge)
    loaded, tokenizer = load_model(model, dtype, device)
    run: dict[str, Any] = {"name": model, "batch_size": batch_size, "patch_batch": patch_batch, "progress": True}
    with keeps(out):
        results = study.run(loaded, tokenizer, studied, out, settings, **run)
    page = _page(results, title)
    if page is not None:
        write_atomically(out / "observe.html", page)
    for name, picture in ({} if png is None else report.study_figures(results)).items():
        write_atomically(Path(png or ".") / name, picture)
    if as_json:
        typer.echo(json.dumps(results))
    else:
        _print(results, out)
    left_out = _left_out(results)
    for line in left_out:
        errors.print(f"Left out: {line}", highlight=False, markup=False)
    if page is None:
        errors.print(
            "No page: it needs Jinja and Plotly: pip install 'faststeer[report]'", highlight=False, markup=False
        )
    if left_out or page is None:
        raise typer.Exit(FAILED)


def _page(results: dict[str, Any], title: str | None) -> str | None:
    """None where the packages for it are not there: the figures are worth keeping without it."""
    from faststeer import report

    try:
        return report.study_page(results, title)
    except ImportError:
        return None


def _left_out(results: dict[str, Any]) -> list[str]:
    lines = [f"{name}: {why}" for part in results["skipped"].values() for name, why in part.items()]
    for split, of_vectors in results["without_examples"].items():
        lines += [
            f"{n}, {side}, {split} prompts: {why}" for n, sides in of_vectors.items() for side, why in sides.items()
        ]
    return lines


def _print(results: dict[str, Any], out: Path) -> None:
    from faststeer.report.study import CONTEXTS, HIGH, reached

    console = Console()
    sides = {"induce": "behaviour, added", "suppress": "opposite, subtracted"}
    table = Table(
        "vector", "context", *sides.values(), title=f"{results['behaviour']}, steered before {results['layer']}"
    )
    rows = {(row["vector"], row["context"], row["side"]): row["shown"] for row in results["answers"]}
    for vector, context in dict.fromkeys(key[:2] for key in rows):
        cells = (rows[vector, context, side] for side in sides)
        shares = (f"{r['rate']:.0%} [{r['low']:.0%}, {r['high']:.0%}]" for r in cells)
        table.add_row(vector, CONTEXTS[context], *shares)
    table.caption = "share of answers to test prompts that show it, with Wilson's 95 % interval"
    console.print(table)
    loss = {(row["vector"], row["context"]): row for row in results["utility"] if row["side"] == "induce"}
    for vector in results["methods"]:
        costs = (f"{CONTEXTS[c]} {row['loss']['mean']:.3f}, {row['right']['rate']:.0%}" for c in CONTEXTS
               if (row := loss.get((vector, c))))  # fmt: skip
        console.print(
            f"{vector}: loss on neutral text, questions answered rightly: {'; '.join(costs)}", highlight=False
        )
    for vector, scored in results["patching"].items():
        best, total = reached(results, vector), scored["n_edges"]
        said = (
            f"{best['edges']} of {total} edges carry {best['value']:.0%}" if best else f"no circuit carries {HIGH:.0%}"
        )
        console.print(f"{vector}: {said} of what it does to the next tokens", highlight=False)
    for row in (row for row in results["overlap"] if "intervals" in row):
        iou = row["intervals"]["iou"]
        share = f"{iou['value']:.0%} [{iou['low']:.0%}, {iou['high']:.0%}]"
        console.print(
            f"{row['a']} and {row['b']}: cosine {row['cosine']:+.2f}, circuits share {share}", highlight=False
        )
    console.print(f"Written to {out}: observe.json, observe.html", highlight=False, markup=False)
