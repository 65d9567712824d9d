"""`faststeer evaluate`."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from faststeer.cli.common import (
    FAILED,
    Device,
    Dtype,
    Json,
    MaxBatch,
    MaxNewTokens,
    Model,
    Rendered,
    System,
    VectorLayer,
    app,
    behaviour_of,
    check_files,
    load_model,
    reports_errors,
    vector_layers,
)
from faststeer.cli.sweep import results_table
from faststeer.files import FormatError, json_lines, read_json

if TYPE_CHECKING:
    from faststeer.behaviours import Behaviour
    from faststeer.evaluate.sweep import Moved

JUDGES = ("refusal", "perplexity", "repetition", "length")


@app.command()
@reports_errors
def evaluate(
    model: Model = "demo",
    plan: Annotated[Path | None, typer.Option(help="A plan as JSON (Plan.to_json).")] = None,
    vector: Annotated[Path | None, typer.Option(help="A vector's file, added with --coefficient at --layer.")] = None,
    coefficient: Annotated[float, typer.Option(help="For --vector.")] = 1.0,
    layer: VectorLayer = None,
    prompts: Annotated[Path | None, typer.Option(help="Prompts: .txt (one a line), .json, .jsonl or .csv.")] = None,
    field: Annotated[str | None, typer.Option(help="The column or field that holds the prompt.")] = None,
    answers: Annotated[
        Path | None, typer.Option(help="Judge these instead: JSON lines with prompt and completion; no model runs.")
    ] = None,
    judge: Annotated[
        list[str] | None, typer.Option(help="A judge, or an object of one in JSON; may be given several times.")
    ] = None,
    controls: Annotated[int, typer.Option(min=0, help="Random vectors to compare with.")] = 1,
    questions: Annotated[
        Path | None, typer.Option(help="Multiple choice: JSON lines with question, choices, answer.")
    ] = None,
    look_alikes: Annotated[
        bool, typer.Option("--look-alikes", help="Also count refusals of harmless questions that sound harmful.")
    ] = False,
    behaviour: Annotated[
        list[str] | None,
        typer.Option(help="Judge a behaviour's test prompts (those to induce it on) by its judge; several times."),
    ] = None,
    meant: Annotated[str | None, typer.Option(help="Which --behaviour the plan or vector is for.")] = None,
    max_new_tokens: MaxNewTokens = 64,
    system: System = None,
    rendered: Rendered = False,
    max_batch: MaxBatch = 128,
    dtype: Dtype = "auto",
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Say what a plan does and what it costs, next to the unsteered model and random vectors of the same length.

    Judges: refusal, refusal-score, sentiment, demo, perplexity, repetition, length, regex:PATTERN,
    python:MODULE:FUNCTION, and by a model's name or folder sentiment:, classifier:, llamaguard:, harmbench:,
    strongreject:, axbench:. Options go in JSON: '{"judge": "axbench:./judge", "concept": "the sea"}'.

    \b
    Example: faststeer evaluate --vector refusal.safetensors --layer 3 --prompts harmless.txt --judge refusal
    Example: faststeer evaluate --vector tone.safetensors --layer 4 --behaviour tone --behaviour refusal --meant tone
    Example: faststeer evaluate --answers answers.jsonl --judge refusal --judge 'regex:(?i)as an ai'

    With several --behaviour it also says what moved beside the one that was --meant.

    Exit codes: 0 measured; 1 wrong input; 2 wrong usage; 3 measured, but some answers could not be generated or some
    verdicts not read.
    """
    check_files(plan=plan, vector=vector, prompts=prompts, answers=answers, questions=questions)
    import faststeer.demo  # noqa: F401  its judges

    usual = () if behaviour else JUDGES if answers is None else ("refusal",)
    judges = [_judge(text) for text in judge or usual]
    if answers is not None:
        if plan is not None or vector is not None or prompts is not None or behaviour:
            raise typer.BadParameter(
                "--answers are judged as they are: leave --plan, --vector, --prompts and --behaviour out"
            )
        failed = _judge_answers(answers, judges, as_json)
    else:
        if (plan is None) == (vector is None) or (prompts is None and not behaviour):
            raise typer.BadParameter("give --prompts or --behaviour, and --plan or --vector")
        tried = [behaviour_of(model, name, None, None, None) for name in behaviour or ()]
        if meant is not None and meant not in [each.name for each in tried]:
            raise typer.BadParameter(f"--meant {meant}: name that behaviour with --behaviour, too")
        judges += [name for name in dict.fromkeys(each.judge for each in tried) if name not in judges]
        options = {"max_new_tokens": max_new_tokens, "system": system, "controls": controls, "judges": judges}
        loaded, tokenizer = load_model(model, dtype, device)
        asked = _sweep(
            plan, vector, coefficient, layer, prompts, field, rendered, questions, look_alikes, tried, options
        )
        failed = _measure(asked, loaded, tokenizer, max_batch, as_json, tried, meant)
    if failed:
        raise typer.Exit(FAILED)


def _judge(text: str) -> Any:
    if not text.lstrip().startswith("{"):
        return text
    try:
        return read_json(text)
    except ValueError as error:
        raise typer.BadParameter(f"--judge {text}: no valid JSON: {error}") from error


def _sweep(
    plan: Path | None,
    vector: Path | None,
    coefficient: float,
    layer: str | None,
    prompts: Path | None,
    field: str | None,
    rendered: bool,
    questions: Path | None,
    look_alikes: bool,
    behaviours: list[Behaviour],
    options: dict[str, Any],
) -> Any:
    from faststeer import Plan, SteeringVector
    from faststeer.evaluate.multiple_choice import load_questions
    from faststeer.evaluate.side_effects import LOOK_ALIKES
    from faststeer.evaluate.sweep import Sweep, SweepPrompt
    from faststeer.extract import load_prompts
    from faststeer.hf.batching import check_prompts

    listed = [] if prompts is None else load_prompts(prompts, field=field)
    listed = check_prompts(listed, rendered=True) if rendered and listed else listed
    asked = [SweepPrompt(str(i), p, "prompts") for i, p in enumerate(listed)]
    for each in behaviours:
        asked += [SweepPrompt(f"{each.name}-{i}", p, each.name) for i, p in enumerate(each.test.induce)]
    if look_alikes:
        asked += [SweepPrompt(f"look-alike-{i}", p, "look-alikes") for i, p in enumerate(LOOK_ALIKES)]
    if questions is not None:
        options["questions"] = load_questions(questions)
    if plan is not None:
        options["plans"] = {"plan": Plan.load(plan)}
    elif vector is not None:
        loaded = SteeringVector.load(vector)
        layers = [vector_layers(vector, loaded, layer)]
        options |= {"vectors": {vector.stem: loaded}, "layers": layers, "coefficients": [coefficient]}
    return Sweep(asked, projections=0, **options)


def _measure(
    asked: Any, model: Any, tokenizer: Any, max_batch: int, as_json: bool, tried: list[Behaviour], meant: str | None
) -> bool:
    from faststeer.evaluate.judging import make
    from faststeer.evaluate.sweep import Store, entanglement, run, table

    tags = list(dict.fromkeys(prompt.tag for prompt in asked.prompts))
    with tempfile.TemporaryDirectory() as folder, Store(Path(folder) / "rows.db") as store:
        digest = run(asked, model, tokenizer, store, max_batch=max_batch)
        tables = {tag: table(store, digest, tag=tag) for tag in tags}
        judges = {each.name: make(each.judge, model=model, tokenizer=tokenizer).name for each in tried}
        purpose = {} if meant is None else dict.fromkeys([*asked.vectors, *asked.plans], meant)
        moved = entanglement(store, judges, purpose, digest) if tried else []
    if as_json:
        report: dict[str, Any] = {tag: [line.to_dict() for line in lines] for tag, lines in tables.items()}
        typer.echo(json.dumps(report | ({"moved": [row.to_dict() for row in moved]} if tried else {})))
    else:
        for tag, lines in tables.items():
            Console().print(results_table(lines, tag))
        if tried:
            Console().print(_matrix(moved))
    every = [line for lines in tables.values() for line in lines]
    return any(line.errors or any(score.failures for score in line.scores.values()) for line in every)


def _matrix(moved: list[Moved]) -> Table:
    matrix = Table("setting", *moved[0].moved, "others", title="What moved, in points of the answers that show it")
    for row in moved:
        cells = []
        for name, change in row.moved.items():
            sure = change is not None and change.low is not None and (change.low > 0 or (change.high or 0) < 0)
            text = "unread" if change is None else f"{100 * change.mean:+.0f}{'*' if sure else ''}"
            cells.append(f"[bold]{text}[/]" if name == row.meant else text)
        matrix.add_row(row.name, *cells, "" if row.entanglement is None else f"{100 * row.entanglement:.0f}")
    matrix.caption = (
        "bold: what was meant; * its 95 % interval leaves 0 out; others: root mean square over what was not meant"
    )
    return matrix


def _judge_answers(path: Path, judges: list[Any], as_json: bool) -> bool:
    from faststeer.evaluate.judging import judged, make

    prompts, completions = _read_answers(path)
    instances = [make(judge) for judge in judges]
    judged_answers = {judge.name: judged(judge, prompts, completions) for judge in instances}
    if as_json:
        each = {
            name: [{"label": v.label, "score": v.score, "parts": dict(v.parts)} for v in verdicts]
            for name, verdicts in judged_answers.items()
        }
        totals = {name: verdicts.to_dict() for name, verdicts in judged_answers.items()}
        typer.echo(json.dumps({"answers": str(path), "judges": totals, "verdicts": each}))
    else:
        made_table = Table("judge", "mean score", "shows it", "labels", "not read", title=f"{len(prompts)} answers")
        for name, verdicts in judged_answers.items():
            labels = ", ".join(f"{label} {n}" for label, n in verdicts.labels.items())
            mean = "" if verdicts.mean is None else f"{verdicts.mean:.3g}"
            made_table.add_row(name, mean, str(verdicts.rate or ""), labels, str(verdicts.failures))
        Console().print(made_table)
    return any(verdicts.failures for verdicts in judged_answers.values())


def _read_answers(path: Path) -> tuple[list[Any], list[str]]:
    prompts, completions = [], []
    for where, data in json_lines(path):
        if not isinstance(data, dict) or "prompt" not in data or not isinstance(data.get("completion"), str):
            raise FormatError(f'{where}: expected an object with "prompt" and "completion" (a text)')
        prompts.append(data["prompt"])
        completions.append(data["completion"])
    if not prompts:
        raise FormatError(f"{path} holds no answers: expected one JSON object per line")
    return prompts, completions
