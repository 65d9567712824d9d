"""What the commands share: the application, common options, loading a model, errors.

Results go to stdout, progress and errors to stderr; exit code 0 is success, 1 a problem with the input, 2 wrong usage.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer
from rich.console import Console
from rich.markup import escape

if TYPE_CHECKING:
    from faststeer.behaviours import Behaviour

DEMO_STEPS = 24  # of training: a tiny model needs no ten epochs

app = typer.Typer(
    help="Activation steering for language models at full speed.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
errors = Console(stderr=True)

Command = TypeVar("Command", bound=Callable[..., None])

Model = Annotated[
    str, typer.Option(help="'demo', 'smollm2', a GGUF file, a folder saved by transformers, or a name on the hub.")
]
Dtype = Annotated[str, typer.Option(help="auto (as saved), float32, bfloat16 or float16.")]
Device = Annotated[str, typer.Option(help="auto (a GPU where there is one), cpu, cuda, cuda:1, ...")]
System = Annotated[str | None, typer.Option(help="A system prompt before every prompt.")]
Positive = Annotated[Path | None, typer.Option(help="Prompts that show the behaviour: .txt, .json, .jsonl or .csv.")]
Negative = Annotated[Path | None, typer.Option(help="Prompts that do not.")]
Field = Annotated[str | None, typer.Option(help="The column or field that holds the prompt.")]
BatchSize = Annotated[int, typer.Option(min=1, help="Prompts in one forward pass.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of tables.")]


def reports_errors(command: Command) -> Command:
    """What is wrong with the input is said in one paragraph, without a traceback."""

    @functools.wraps(command)
    def run(*args: Any, **kwargs: Any) -> None:
        try:
            command(*args, **kwargs)
        except (ValueError, TypeError, OSError) as error:
            errors.print(f"[bold red]Error:[/] {escape(str(error))}", highlight=False, soft_wrap=True)
            raise typer.Exit(1) from error

    return run  # type: ignore[return-value]


def load_model(name: str, dtype: str, device: str) -> tuple[Any, Any]:
    """Model (evaluating) and tokenizer of a name, as `faststeer.load` takes it; "auto" is the GPU where there is one.

    Raises:
        ValueError, FileNotFoundError, ImportError: as `faststeer.load`.
    """
    import torch

    from faststeer.hf import load

    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    return load(name, dtype, device)


def two_sides(positive: Path | None, negative: Path | None, field: str | None) -> list[list[Any]]:
    """Positive and negative prompts out of their files."""
    from faststeer.behaviours.behaviour import prompts_of_file

    if positive is None or negative is None:
        raise typer.BadParameter("give both --positive and --negative")
    return [prompts_of_file(path, field) for path in (positive, negative)]


def behaviour_of(
    model: str, name: str | None, positive: Path | None, negative: Path | None, field: str | None
) -> Behaviour:
    """The behaviour asked for: by name or path, of two files of prompts, or the demo model's refusal."""
    from faststeer import behaviours

    if positive is not None or negative is not None:
        sets = two_sides(positive, negative, field)
        if name is None or name in behaviours.names():
            base = behaviours.load(name or "refusal")
            return behaviours.of_prompts(base.name, *sets, judge=base.judge, coherence=base.coherence)
        raise typer.BadParameter(f"--behaviour {name} has prompts of its own: leave --positive and --negative out")
    if model == "demo" and name in (None, "refusal", "tone"):
        return behaviours.of_demo(name or "refusal")
    if name is None:
        raise typer.BadParameter(
            "give --behaviour, or --positive and --negative: only the demo model brings its own prompts"
        )
    return behaviours.load(name)


def numbers(text: str, option: str) -> list[float]:
    """The numbers of an option's text, with commas between."""
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise typer.BadParameter(f"{option} {text!r}: expected numbers with commas between, such as 0.5,1,2") from None
