"""`faststeer search` and `faststeer replay`."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.console import Console
from rich.table import Table

from faststeer.cli.common import (
    FAILED,
    BehaviourName,
    Device,
    Dtype,
    Field,
    Json,
    Judge,
    MaxBatch,
    MaxNewTokens,
    Model,
    Negative,
    Positive,
    Title,
    app,
    behaviour_of,
    check_files,
    check_sides,
    errors,
    keeps,
    layer_numbers,
    load_model,
    positions_of,
    reports_errors,
)


@app.command()
@reports_errors
def search(
    out: Annotated[Path, typer.Option(help="Folder of the search; name it again to continue.")] = Path("search"),
    model: Model = "demo",
    behaviour: BehaviourName = None,
    positive: Positive = None,
    negative: Negative = None,
    field: Field = None,
    judge: Judge = None,
    answers: Annotated[int, typer.Option(help="How many answers may be generated in all.")] = 600,
    goal: Annotated[Literal["more", "less"], typer.Option(help="More or less of the behaviour.")] = "more",
    method: Annotated[str, typer.Option(help="Some of dim,pca,lat,probe.")] = "dim,pca,probe",
    op: Annotated[str, typer.Option(help="Some of add,ablate,clamp.")] = "add,ablate,clamp",
    layers: Annotated[str, typer.Option(help="Layers to try, such as 8-20 or 8,12,16, or all.")] = "all",
    position: Annotated[
        str,
        typer.Option(
            help="Tokens to try, counted from the prompt's end, such as -1,-2; all: those after the instruction."
        ),
    ] = "all",
    max_kl: Annotated[float, typer.Option(min=0, help="The highest KL on neutral text, in nats per token.")] = 0.5,
    max_perplexity: Annotated[
        float, typer.Option(min=1, help="The highest perplexity, as a multiple of that of the unsteered answers.")
    ] = 2.0,
    max_repetition: Annotated[
        float, typer.Option(min=0, max=1, help="The highest increase of the share of repeated 4-grams.")
    ] = 0.1,
    max_over_refusal: Annotated[
        float,
        typer.Option(
            min=0, max=1, help="The highest increase of the share of refusals; not used if refusal is the behaviour."
        ),
    ] = 0.1,
    share: Annotated[
        float, typer.Option(min=0, max=1, help="The share of the largest gain that the chosen setting must have.")
    ] = 0.9,
    prompts: Annotated[int, typer.Option(help="Validation prompts for each setting.")] = 8,
    finalists: Annotated[int, typer.Option(help="How many of the best settings answer more validation prompts.")] = 6,
    train: Annotated[
        int | None, typer.Option(help="The most training prompts in each set to find vectors on (default: all).")
    ] = None,
    max_new_tokens: MaxNewTokens = 32,
    seed: Annotated[int, typer.Option(help="Seed of the proposals.")] = 0,
    max_batch: MaxBatch = 32,
    title: Title = None,
    dtype: Dtype = "auto",
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Look for the setting that changes a behaviour with the smallest side effects: layer, token, method, op and
    strength, by Optuna's TPE, against KL, perplexity, repetition and over-refusal.

    Writes search.json (everything that was measured), plan.json (the chosen plan) and search.html (one page that needs
    no network) to --out. After a kill or Ctrl-C the same command continues, and ends with the same bytes.
    `faststeer replay` repeats the choice.

    \b
    Example: faststeer search --behaviour tone --model ./my-model --out tone-search
    Example: faststeer search --model ./my-model --positive happy.txt --negative sad.txt --judge sentiment

    Exit codes: 0 chosen; 1 wrong input, or a full disk; 2 wrong usage; 3 finished, but no setting gains anything within
    the limits, or the page could not be made; 130 stopped by Ctrl-C (finished work is kept).
    """
    check_sides(positive, negative)
    from faststeer.behaviours import search as searching

    settings = searching.SearchSettings(
        answers=answers,
        goal=goal,
        methods=tuple(part.strip() for part in method.split(",")),
        ops=tuple(part.strip() for part in op.split(",")),
        layers=None if (numbers := layer_numbers(layers)) is None else tuple(numbers),
        positions=None if (tokens := positions_of(position, None)) is None else tuple(tokens),
        max_kl=max_kl,
        max_perplexity=max_perplexity,
        max_repetition=max_repetition,
        max_over_refusal=max_over_refusal,
        share=share,
        prompts=prompts,
        finalists=finalists,
        train=train,
        max_new_tokens=max_new_tokens,
        batch=max_batch,
        seed=seed,
    )
    searched = behaviour_of(model, behaviour, positive, negative, field, judge)
    loaded, tokenizer = load_model(model, dtype, device)
    with keeps(out):
        state = searching.search(loaded, tokenizer, searched, out, settings, name=model, progress=True)
    page = _page(state, out / "search.html", title)
    if as_json:
        facts = {"chosen": state["chosen"], "test": state["test"], "settings": searching.rows(state)}
        typer.echo(json.dumps(facts | {"page": str(out / "search.html") if page else None}))
    else:
        _print(state, out)
    if state["chosen"] is None or not page:
        raise typer.Exit(FAILED)


def _page(state: dict[str, Any], path: Path, title: str | None) -> bool:
    """Write the page; what was found is worth keeping where the packages for it are not there."""
    from faststeer.files import write_atomically
    from faststeer.report import search_page

    try:
        write_atomically(path, search_page(state, title))
    except ImportError as error:
        errors.print(f"No page: {error}", highlight=False, markup=False)
        return False
    return True


def _print(state: dict[str, Any], out: Path) -> None:
    from faststeer.behaviours.search import rows, setting_text

    console, lines = Console(), rows(state)
    front = Table("setting", "gain", "KL, nats", "perplexity", "repetition", "answers", title="The Pareto front")
    for line in sorted((line for line in lines if line["front"]), key=lambda line: line["kl"]):
        mark = " (chosen)" if line["chosen"] else ""
        front.add_row(
            setting_text(line) + mark,
            f"{line['gain']:+.3f}",
            f"{line['kl']:.4f}",
            f"x {line['perplexity']:.2f}",
            f"{line['repetition']:+.3f}",
            str(line["answers"]),
        )
    front.caption = "against the unsteered model on the same validation prompts"
    console.print(front)
    if state["chosen"] is None:
        console.print("No setting gains anything within the limits: raise --max-kl, or search with more --answers")
        return
    gain, n = state["test"]["gain"], len(state["test"]["steered"]["scores"])
    interval = f" [{gain['low']:+.3f}, {gain['high']:+.3f}]" if gain["low"] is not None else ""
    console.print(
        f"Chosen: {setting_text(lines[state['chosen']])}. On {n} test prompts it gains {gain['mean']:+.3f}{interval}",
        highlight=False,
        markup=False,
    )
    console.print(f"Written to {out}: search.json, plan.json, search.html", highlight=False, markup=False)
    use = shlex.join(["faststeer", "generate", "--model", state["model"] or "demo", "--plan", str(out / "plan.json")])
    console.print(f'Next: {use} --prompt "..." --compare', highlight=False, markup=False, soft_wrap=True)


@app.command()
@reports_errors
def replay(
    record: Annotated[Path, typer.Argument(help="A search.json.")] = Path("search/search.json"),
    model: Annotated[
        str | None, typer.Option(help="The model (default: the name that was given to the search).")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Write the plan here.")] = None,
    dtype: Dtype = "auto",
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Repeat a search's choice: extract the vectors again, apply the rule to the recorded settings, make the plan,
    measure it on the test prompts, and say whether every number is the same, bit for bit.

    Example: faststeer replay search/search.json --out plan.json

    Exit codes: 0 the same; 1 wrong input (also: another model, or numbers that were changed); 2 wrong usage; 3
    repeated, but something differs, as on another machine or with other versions.
    """
    check_files(record=record)
    import faststeer.demo  # noqa: F401  its judges
    from faststeer.behaviours import search as searching
    from faststeer.files import write_atomically
    from faststeer.version import versions

    state = searching.load(record)
    loaded, tokenizer = load_model(model or state["model"] or "demo", dtype, device)
    differences, plan = searching.replay(loaded, tokenizer, record, progress=True)
    if out is not None:
        write_atomically(out, searching.plan_text(plan))
    chosen = searching.setting_text(searching.rows(state)[state["chosen"]])
    if as_json:
        typer.echo(json.dumps({"same": not differences, "differs": sorted(differences), "chosen": chosen}))
    elif differences:
        other = {k: v for k, v in versions().items() if state["versions"].get(k) != v}
        why = (
            f"The search ran with other versions: {state['versions']}"
            if other
            else "The versions are those of the search; another processor, back end (`faststeer info`) or number of "
            "threads gives other roundings"
        )
        text = f"Repeated, but these numbers differ: {', '.join(differences)}. {why}"
        errors.print(text, highlight=False, markup=False, soft_wrap=True)
    else:
        Console().print(f"The same, bit for bit: {chosen}", highlight=False, markup=False)
    if differences:
        raise typer.Exit(FAILED)
