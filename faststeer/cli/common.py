"""What the commands share: the application, common options, loading a model, errors.

Results go to stdout, progress and errors to stderr; exit code 0 is success, 1 a problem with the input, 2 wrong usage.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer
from rich.console import Console
from rich.markup import escape

if TYPE_CHECKING:
    import torch

    from faststeer import Plan, SteeringVector
    from faststeer.behaviours import Behaviour

FAILED, STOPPED = 3, 130  # exit codes: finished, but something had to be left out; stopped by Ctrl-C
DEMO_STEPS = 24  # of training: a tiny model needs no ten epochs

app = typer.Typer(
    help="Activation steering for language models at full speed.", no_args_is_help=True, pretty_exceptions_enable=False
)
errors = Console(stderr=True)

Command = TypeVar("Command", bound=Callable[..., None])

Model = Annotated[
    str, typer.Option(help="'demo', 'smollm2', a GGUF file, a folder saved by transformers, or a name on the hub.")
]
Dtype = Annotated[str, typer.Option(help="auto (as saved), float32, bfloat16 or float16.")]
Device = Annotated[str, typer.Option(help="auto (a GPU where there is one), cpu, cuda, cuda:1, ...")]
Rendered = Annotated[
    bool, typer.Option("--rendered", help="Prompts hold the chat template's markup already: take them as they are.")
]
System = Annotated[str | None, typer.Option(help="A system prompt before every prompt.")]
Positive = Annotated[Path | None, typer.Option(help="Prompts that show the behaviour: .txt, .json, .jsonl or .csv.")]
Negative = Annotated[Path | None, typer.Option(help="Prompts that do not.")]
Field = Annotated[str | None, typer.Option(help="The column or field that holds the prompt.")]
BatchSize = Annotated[int, typer.Option(min=1, help="Prompts in one forward pass.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of tables.")]
Judge = Annotated[
    str | None, typer.Option(help="What reads the answers: refusal, sentiment, ... (default: the behaviour's).")
]
BehaviourName = Annotated[
    str | None, typer.Option("--behaviour", help="refusal, sentiment, tone, or a behaviour's file or folder.")
]
MaxNewTokens = Annotated[int, typer.Option("--max-new-tokens", min=1, help="Longest answer.")]
MaxBatch = Annotated[int, typer.Option("--max-batch", min=1, help="Rows that run together.")]
Title = Annotated[str | None, typer.Option("--title", help="Heading of the page.")]
VectorLayer = Annotated[
    str | None, typer.Option(help="For --vector: its layers that act, such as 12, 8-12, 3,7, or all.")
]


def print_version(asked: bool) -> None:
    if asked:
        from faststeer import __version__

        typer.echo(f"faststeer {__version__}")
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", callback=print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Activation steering for language models at full speed."""


def reports_errors(command: Command) -> Command:
    """What is wrong with the input is said in one paragraph, without a traceback."""

    @functools.wraps(command)
    def run(*args: Any, **kwargs: Any) -> None:
        try:
            command(*args, **kwargs)
        except (ValueError, TypeError, OSError, ImportError) as error:
            errors.print(f"[bold red]Error:[/] {escape(str(error))}", highlight=False, soft_wrap=True)
            raise typer.Exit(1) from error

    return run  # type: ignore[return-value]


@contextmanager
def keeps(where: Path | None) -> Iterator[None]:
    """A block whose finished work is kept at `where`: Ctrl-C says so and ends the command with STOPPED. None: nothing
    is kept."""
    try:
        yield
    except KeyboardInterrupt:
        if where is None:
            raise
        errors.print(f"Stopped; what was finished is in {where}. The same command goes on.", highlight=False)
        raise typer.Exit(STOPPED) from None


def load_model(name: str, dtype: str, device: str) -> tuple[Any, Any]:
    """Model (evaluating) and tokenizer of a name, as `faststeer.load` takes it; "auto" is the GPU where there is one.

    Raises:
        ValueError, FileNotFoundError, ImportError: as `faststeer.load`.
    """
    from faststeer.hf import load

    return load(name, dtype, device_of(device))


def device_of(name: str) -> torch.device:
    """The device of that name; "auto" is a GPU where there is one.

    Raises:
        ValueError: no name of a device, or one that this PyTorch cannot use here.
    """
    import torch

    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        usable = ["cpu", *(f"cuda:{index}" for index in range(torch.cuda.device_count()))]
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"--device {name} cannot be used here (PyTorch {torch.__version__}: {reason}): expected auto or "
            f"{', '.join(usable)}"
        ) from error
    if device.type == "meta":
        raise ValueError("--device meta holds no values: expected auto, cpu or cuda")
    return device


def check_files(**paths: Path | None) -> None:
    """Raise FileNotFoundError for a named input whose file does not exist. Called before anything large is imported, so
    that a typing error is reported at once."""
    for option, path in paths.items():
        if path is not None and not path.is_file():
            kind = "it is a folder" if path.is_dir() else "no such file"
            raise FileNotFoundError(f"{option} cannot be read from {path}: {kind}")


def layer_numbers(text: str, option: str = "--layers") -> list[int] | None:
    """The layers that an option names: "12", "3,7", "8-12", mixed; None for "all"."""
    if text.strip() == "all":
        return None
    layers: set[int] = set()
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        numbers = (first, last) if dash else (first, first)
        if not all(re.fullmatch(r"[0-9]{1,4}", number) for number in numbers) or int(numbers[0]) > int(numbers[1]):
            raise typer.BadParameter(f"{option} {text!r}: expected layers such as 12, 3,7 or 8-12, or all")
        layers.update(range(int(numbers[0]), int(numbers[1]) + 1))
    return sorted(layers)


def positions_of(text: str | None, default: list[int] | None) -> list[int] | None:
    """The token positions that --position names; None: those after the instruction."""
    if text is None or text == "all":
        return default if text is None else None
    try:
        positions = [int(part) for part in text.split(",")]
    except ValueError:
        positions = [0]
    if max(positions) >= 0:
        raise typer.BadParameter(f"--position {text!r}: expected negative numbers, such as -1 or -1,-2, or all")
    return positions


def vector_layers(path: Path, vector: SteeringVector, text: str | None) -> list[int]:
    """The layers at which a vector's file acts: those that --layer names, or the only one it has.

    Raises:
        ValueError: several layers and no --layer, or layers that the vector does not have.
    """
    from faststeer.vector import layers_text

    layers = list(vector.layers)
    if text is None:
        if len(layers) > 1:
            start = layers[round(0.6 * (len(layers) - 1))]
            raise ValueError(
                f"{path} has a direction for each of {len(layers)} layers ({layers[0]} to {layers[-1]}): say with "
                f"--layer which one acts. One a little past the middle is a good start: --layer {start}. "
                "--layer all adds every one, which needs a much smaller --coefficient, such as 0.1"
            )
        return layers
    acting = layer_numbers(text, "--layer")
    if acting is None:
        return layers
    if missing := sorted(set(acting) - set(layers)):
        raise ValueError(
            f"{path} has no direction for layer {', '.join(map(str, missing))}: it has {layers_text(tuple(layers))}"
        )
    return acting


def steering_plan(plan: Path | None, vector: Path | None, coefficient: float, layer: str | None) -> Plan | None:
    """The plan of --plan, or the one that adds --vector at --layer; None without both.

    Raises:
        ValueError: a vector that is not meant to be added; as `vector_layers`.
    """
    from faststeer import Add, Plan, SteeringVector

    if plan is not None:
        return Plan.load(plan)
    if vector is None:
        return None
    loaded = SteeringVector.load(vector)
    if loaded.op not in (None, "add"):
        raise ValueError(
            f"{vector} says that it is meant to {loaded.op}, and --vector adds: make a plan (faststeer plan "
            f"--{loaded.op} {vector}) and give it with --plan"
        )
    return Plan([Add(loaded, coefficient, layers=vector_layers(vector, loaded, layer))])


def check_sides(positive: Path | None, negative: Path | None) -> None:
    """Refuse one side without the other, and files that do not exist."""
    if (positive is None) != (negative is None):
        raise typer.BadParameter("give both --positive and --negative")
    check_files(positive=positive, negative=negative)


def two_sides(positive: Path | None, negative: Path | None, field: str | None) -> list[list[Any]]:
    """Positive and negative prompts out of their files."""
    from faststeer.behaviours.behaviour import prompts_of_file

    check_sides(positive, negative)
    return [prompts_of_file(path, field) for path in (positive, negative) if path is not None]


def behaviour_of(
    model: str,
    name: str | None,
    positive: Path | None,
    negative: Path | None,
    field: str | None,
    judge: str | None = None,
) -> Behaviour:
    """The behaviour asked for: by name or path, of two files of prompts, or the demo model's refusal; with `judge`,
    judged by that."""
    if judge is not None:
        of_prompts = name is None and positive is not None
        asked = behaviour_of(model, "refusal" if of_prompts else name, positive, negative, field)
        return dataclasses.replace(asked, name="own" if of_prompts else asked.name, judge=judge)
    from faststeer import behaviours, demo
    from faststeer.evaluate.judging import judge_names

    if positive is not None or negative is not None:
        sets = two_sides(positive, negative, field)
        if name is None:
            raise typer.BadParameter(
                f"say what reads the answers: --judge with one of {', '.join(judge_names())}, or --behaviour with one "
                f"of {', '.join(behaviours.names())} for its judge"
            )
        if name in behaviours.names():
            base = behaviours.load(name)
            return behaviours.of_prompts(base.name, *sets, judge=base.judge, coherence=base.coherence)
        raise typer.BadParameter(f"--behaviour {name} has prompts of its own: leave --positive and --negative out")
    if model == "demo" and name in (None, "refusal", "tone"):
        return demo.behaviour(name or "refusal")
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
