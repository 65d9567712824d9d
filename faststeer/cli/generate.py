"""`faststeer generate`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from faststeer.cli.common import (
    BatchSize,
    Device,
    Dtype,
    Json,
    MaxNewTokens,
    Model,
    Rendered,
    System,
    VectorLayer,
    app,
    check_files,
    load_model,
    reports_errors,
    steering_plan,
)


@app.command()
@reports_errors
def generate(
    model: Model = "demo",
    plan: Annotated[Path | None, typer.Option(help="A plan as JSON (Plan.to_json).")] = None,
    vector: Annotated[Path | None, typer.Option(help="A vector's file, added with --coefficient at --layer.")] = None,
    coefficient: Annotated[float, typer.Option(help="For --vector.")] = 1.0,
    layer: VectorLayer = None,
    prompts: Annotated[Path | None, typer.Option(help="Prompts: .txt (one a line), .json, .jsonl or .csv.")] = None,
    prompt: Annotated[list[str] | None, typer.Option(help="A prompt; may be given several times.")] = None,
    field: Annotated[str | None, typer.Option(help="The column or field that holds the prompt.")] = None,
    compare: Annotated[bool, typer.Option("--compare", help="Also answer unsteered.")] = False,
    max_new_tokens: MaxNewTokens = 128,
    system: System = None,
    rendered: Rendered = False,
    batch_size: BatchSize = 32,
    dtype: Dtype = "auto",
    device: Device = "auto",
    out: Annotated[Path | None, typer.Option(help="Also write the answers as JSON lines.")] = None,
    as_json: Json = False,
) -> None:
    """Answer prompts under a plan.

    Example: faststeer generate --model ./my-model --plan plan.json --prompts prompts.txt --compare
    """
    if (prompts is None) == (not prompt):
        raise typer.BadParameter("give prompts by --prompts FILE or by --prompt TEXT")
    if plan is not None and vector is not None:
        raise typer.BadParameter("give --plan or --vector, not both")
    check_files(plan=plan, vector=vector, prompts=prompts)
    from faststeer import evaluate
    from faststeer.extract import load_prompts

    asked: list[Any] = load_prompts(prompts, field=field) if prompts else list(prompt or [])
    steering = steering_plan(plan, vector, coefficient, layer)
    loaded, tokenizer = load_model(model, dtype, device)

    def complete(under: Any) -> list[str]:
        return evaluate.complete(
            loaded,
            tokenizer,
            asked,
            under,
            system=system,
            rendered=rendered,
            max_new_tokens=max_new_tokens,
            batch_size=batch_size,
            progress=True,
        )

    answers = [{"prompt": text, "completion": answer} for text, answer in zip(asked, complete(steering), strict=True)]
    if compare:
        for answer, unsteered in zip(answers, complete(None), strict=True):
            answer["unsteered"] = unsteered
    if out is not None:
        from faststeer.files import write_atomically

        write_atomically(out, "".join(json.dumps(answer, ensure_ascii=False) + "\n" for answer in answers))
    if as_json:
        typer.echo(json.dumps({"model": model, "completions": answers}, ensure_ascii=False))
        return
    table = Table("prompt", *(["unsteered"] if compare else []), "steered" if steering else "answer", show_lines=True)
    for answer in answers:
        table.add_row(*(str(answer[name]) for name in ("prompt", *(["unsteered"] if compare else []), "completion")))
    Console().print(table)
