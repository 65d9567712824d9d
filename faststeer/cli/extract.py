"""`faststeer extract`."""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, cast

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from faststeer.cli.common import (
    DEMO_STEPS,
    BatchSize,
    BehaviourName,
    Device,
    Dtype,
    Field,
    Json,
    Judge,
    Model,
    Negative,
    Positive,
    Rendered,
    System,
    app,
    behaviour_of,
    check_sides,
    keeps,
    layer_numbers,
    load_model,
    numbers,
    positions_of,
    reports_errors,
    two_sides,
)

if TYPE_CHECKING:
    from faststeer.behaviours import Behaviour
    from faststeer.extract import Candidates
    from faststeer.hf.batching import Prompt
    from faststeer.vector import HookPoint


Selection = Literal["refusal", "cosmic", "judge"]
SHORT_SECONDS = 120.0  # that the options take which a forecast of long work names
FEWEST = 4  # prompts a side that they leave


@app.command()
@reports_errors
def extract(
    out: Annotated[
        Path | None, typer.Option(help="The vector's file (.safetensors); with --method, a folder for all of them.")
    ] = None,
    model: Model = "demo",
    behaviour: BehaviourName = None,
    method: Annotated[
        str | None,
        typer.Option(
            help="Compare methods: 'all', or some of dim,pca,lat,probe,ace,caa,attribution,unembedding,ntp,"
            "po,reps,bipo."
        ),
    ] = None,
    select: Annotated[
        Selection | None,
        typer.Option(
            help="Choose layer and token on held-out prompts: by refusal scores, by activations (cosmic), or by what "
            "a judge says of the answers."
        ),
    ] = None,
    positive: Positive = None,
    negative: Negative = None,
    field: Field = None,
    judge: Judge = None,
    at: Annotated[
        str, typer.Option(help="Hook point: resid_pre, attn_out, resid_mid, mlp_out or resid_post.")
    ] = "resid_pre",
    position: Annotated[
        str | None,
        typer.Option(
            help="Token, counted from the prompt's end: -1 is the last. With --select and --method several, such as "
            "-1,-2, or all (those after the instruction; what --method takes by default)."
        ),
    ] = None,
    layer: Annotated[int | None, typer.Option(min=0, help="Keep one layer's direction (default: all layers).")] = None,
    layers: Annotated[
        str | None,
        typer.Option(
            help="With --select and --method: layers to try, such as 8-20 or 8,12,16 (all; with --select judge every "
            "second one between 20 and 80 % of the depth)."
        ),
    ] = None,
    coefficients: Annotated[
        str, typer.Option(help="With --select and --method: coefficients to try, such as 0.5,1,2.")
    ] = "1",
    train: Annotated[
        int | None,
        typer.Option(min=2, help="Prompts a side, and of a behaviour's completions, to extract from, at most (all)."),
    ] = None,
    held_out: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="With --select and --method: held-out prompts a side to choose layer and token on, at most (all; with "
            "--method 16).",
        ),
    ] = None,
    steps: Annotated[
        int | None, typer.Option(min=1, help="With --method: training steps (10 epochs; 24 on the demo model).")
    ] = None,
    training: Annotated[
        list[str] | None,
        typer.Option(help="With --method: NAME=VALUE of faststeer.extract.Recipe, such as lr=0.02; several times."),
    ] = None,
    prompts: Annotated[
        int | None, typer.Option(min=1, help="With --method: test prompts a side, at most (all).")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer that a judge reads.")] = 64,
    seed: Annotated[int, typer.Option(min=0, help="With --method: of training and of the random control.")] = 0,
    system: System = None,
    rendered: Rendered = False,
    batch_size: BatchSize = 32,
    dtype: Dtype = "auto",
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Find a direction: by difference in means between two sets of prompts, or by several methods side by side.

    With --select a fifth of each set is held out, and the layer and token that do most on it are kept. With --method
    the behaviour's vector is found by each method, its layer, token and coefficient are chosen on validation prompts,
    and what it does is measured on test prompts, next to a random vector; what is finished is kept in --out, and the
    same command goes on with it after a kill or Ctrl-C. The demo model brings its own prompts. How long it takes is
    said before the work and while it runs.

    \b
    Example: faststeer extract --model ./my-model --positive cheerful.txt --negative gloomy.txt --out tone.safetensors
    Example: faststeer extract --model ./my-model --positive cheerful.txt --negative gloomy.txt --select judge
             --judge sentiment --out tone.safetensors
    Example: faststeer extract --behaviour refusal --method all
    """
    check_sides(positive, negative)
    candidate_layers = None if layers is None else layer_numbers(layers)
    if method is not None:
        if select is not None or layer is not None or system is not None or rendered:
            raise typer.BadParameter(
                "--method chooses layer and token, and takes no --select, --layer, --system or --rendered"
            )
        from faststeer.extract.optimise import read_options

        contrast = _shortened(behaviour_of(model, behaviour, positive, negative, field, judge), train)
        _compare(
            contrast, model, method, out, as_json, dtype, device,
            at=at, positions=positions_of(position, None), layers=candidate_layers,
            coefficients=numbers(coefficients, "--coefficients"), n_select=held_out or 16, n_test=prompts, seed=seed,
            max_new_tokens=max_new_tokens, batch_size=batch_size, progress=True,
            steps=DEMO_STEPS if steps is None and model == "demo" else steps, training=read_options(training or ()),
        )  # fmt: skip
        return
    if out is None:
        raise typer.BadParameter("--out is needed: the vector's file (or --method, to compare methods)")
    if select is not None and layer is not None:
        raise typer.BadParameter("--select chooses the layer: leave --layer out, or name candidates with --layers")
    if select is None and layers is not None:
        raise typer.BadParameter("--layers names candidates of --select or --method; one layer is kept by --layer")
    positions = positions_of(position, [-1])
    if select is None and (positions is None or len(positions) > 1):
        raise typer.BadParameter(f"--position {position}: without --select and --method, one token is read")
    contrast_prompts = _prompts(model, behaviour, positive, negative, field, judge, select).limited(train, held_out)
    asked = _Asked(
        model, contrast_prompts, at, positions, layer, candidate_layers, select,
        numbers(coefficients, "--coefficients"), max_new_tokens, system, rendered, batch_size,
    )  # fmt: skip
    _one(asked, out, dtype, device, as_json)


@dataclass(frozen=True)
class _Prompts:
    """Prompts to extract from, and with --select those to choose on and what reads the answers."""

    positive: Sequence[Prompt]
    negative: Sequence[Prompt]
    induce: Sequence[Prompt] = ()
    suppress: Sequence[Prompt] = ()
    judge: str | None = None
    coherence: str = "no-loop"

    def limited(self, train: int | None, held_out: int | None) -> _Prompts:
        """The same with so many a side at most."""
        return replace(
            self, positive=self.positive[:train], negative=self.negative[:train], induce=self.induce[:held_out],
            suppress=self.suppress[:held_out],
        )  # fmt: skip


@dataclass(frozen=True)
class _Asked:
    """What one vector is extracted by: the command's options, read."""

    model: str
    prompts: _Prompts
    at: str
    positions: list[int] | None
    layer: int | None
    layers: list[int] | None
    select: Selection | None
    coefficients: list[float]
    max_new_tokens: int
    system: str | None
    rendered: bool
    batch_size: int


def _prompts(
    model: str,
    behaviour: str | None,
    positive: Path | None,
    negative: Path | None,
    field: str | None,
    judge: str | None,
    select: Selection | None,
) -> _Prompts:
    """The prompts of two files or of a behaviour; held out is every fifth of a file's, or the behaviour's validation
    prompts."""
    import faststeer.demo  # noqa: F401  its judges

    if behaviour is not None or (positive is None and negative is None):
        contrast = behaviour_of(model, behaviour, positive, negative, field, judge)
        train, held_out = contrast.train, contrast.validation
        asked = held_out.induce, held_out.suppress
        return _Prompts(train.positive, train.negative, *asked, contrast.judge, contrast.coherence)
    shown, absent = two_sides(positive, negative, field)
    if select is None:
        return _Prompts(shown, absent)
    if select == "judge" and judge is None:
        from faststeer.evaluate.judging import judge_names

        raise typer.BadParameter(f"--select judge needs --judge: one of {', '.join(judge_names())}")
    sides = [[prompt for number, prompt in enumerate(prompts) if number % 5] for prompts in (shown, absent)]
    return _Prompts(sides[0], sides[1], induce=absent[::5], suppress=shown[::5], judge=judge)


def _shortened(behaviour: Behaviour, n: int | None) -> Behaviour:
    """The behaviour with so many training prompts a side, and pairs, at most."""
    from faststeer.behaviours import BehaviourSplit

    whole = behaviour.train
    return behaviour if n is None else replace(
        behaviour, train=BehaviourSplit(whole.positive[:n], whole.negative[:n], pairs=whole.pairs[:n])
    )  # fmt: skip


def _one(asked: _Asked, out: Path, dtype: str, device: str, as_json: bool) -> None:
    """The difference in means, written to a file."""
    from faststeer import extract as extraction
    from faststeer.evaluate.judging import check_name
    from faststeer.vector import check_ending

    prompts = asked.prompts
    check_ending(out)
    if asked.select == "judge":  # one there is not is told before the model is loaded
        assert prompts.judge is not None
        check_name(prompts.judge)
    loaded, tokenizer = load_model(asked.model, dtype, device)
    settings: dict[str, Any] = {
        "system": asked.system, "rendered": asked.rendered, "batch_size": asked.batch_size
    }  # fmt: skip
    if asked.select == "refusal":  # before any work that would be in vain
        extraction.check_refusal(loaded, tokenizer, prompts.suppress, prompts.induce, **settings)
    if asked.select is not None:
        asked = replace(asked, layers=_tried(asked, loaded))
        _forecast(asked, loaded, tokenizer, settings)
    settings["progress"] = True
    candidates = extraction.candidates(
        loaded, tokenizer, prompts.positive, prompts.negative, at=cast("HookPoint", asked.at),
        positions=asked.positions, **settings,
    )  # fmt: skip
    report: dict[str, Any] = {
        "out": str(out), "n_positive": len(prompts.positive), "n_negative": len(prompts.negative)
    }  # fmt: skip
    if asked.select is None:
        vector = candidates.vector(-1 if asked.positions is None else asked.positions[0], asked.layer)
    else:
        selection = _selection(asked, loaded, tokenizer, candidates, settings)
        vector = selection.vector
        report["selection"] = selection.to_dict()
    vector.save(out)
    report |= {
        "at": vector.at,
        "layers": list(vector.layers),
        "norms": {number: float(vector[number].norm()) for number in vector.layers},
        "relative": {n: candidates.relative_norm(vector.provenance["position"], n) for n in vector.layers},
    }  # fmt: skip
    report["next"] = _next_step(asked, out, report, candidates.n_layers)
    if as_json:
        typer.echo(json.dumps(report))
        return
    table = _norm_table(report) if asked.select is None else _selection_table(asked.select, report["selection"])
    Console().print(table)
    Console().print(f"Written to {out}: {vector!r}")
    Console().print(f"Try it next:\n  {report['next']}", soft_wrap=True, highlight=False)


def _tried(asked: _Asked, model: Any) -> list[int]:
    """The layers that a selection tries."""
    from faststeer.compile import layer_numbers
    from faststeer.hf import find_hook_points

    n_layers = find_hook_points(model).n_layers
    if asked.layers is not None:
        return sorted(set(layer_numbers(asked.layers, n_layers)))
    if asked.select == "judge":  # generating answers takes long
        return list(range(round(0.2 * n_layers), max(round(0.8 * n_layers), 1), 2 if n_layers > 8 else 1))
    return list(range(n_layers))


def _forecast(asked: _Asked, model: Any, tokenizer: Any, settings: dict[str, Any]) -> None:
    """Say before any work how long the selection will take, and where that is long, with which options less."""
    from faststeer import extract as extraction
    from faststeer.progress import forecast

    assert asked.layers is not None and asked.select is not None
    prompts = asked.prompts
    positions = asked.positions or extraction.post_instruction_positions(tokenizer)
    n = len(asked.layers) * len(positions)
    seconds = extraction.selection_seconds(
        model, tokenizer, asked.select, prompts.induce, prompts.suppress, n, len(asked.coefficients),
        layers=asked.layers, max_new_tokens=asked.max_new_tokens, **settings,
    )  # fmt: skip
    sides = f"{len(prompts.induce)} + {len(prompts.suppress)} prompts"
    less = _less(seconds, max(len(prompts.induce), len(prompts.suppress)), asked.layers)
    forecast(f"Choosing among {n * len(asked.coefficients)} candidates on {sides}", seconds, less)


def _less(seconds: float, n_prompts: int, layers: Sequence[int]) -> str:
    """The options with which a selection of so many seconds takes SHORT_SECONDS at most, and how long it takes then:
    fewer prompts, but for FEWEST, then fewer layers."""
    from faststeer.progress import duration

    share = min(SHORT_SECONDS / seconds, 1.0)
    fewer = min(n_prompts, max(int(n_prompts * share), FEWEST))
    every = math.ceil(fewer / n_prompts / share)
    thinned = layers[(min(every, len(layers)) - 1) // 2 :: every]
    options = [f"--held-out {fewer}"] if fewer < n_prompts else []
    options += [f"--layers {','.join(map(str, thinned))}"] if len(thinned) < len(layers) else []
    about = duration(seconds * fewer / n_prompts * len(thinned) / len(layers))
    return f"With {' '.join(options)}: about {about}" if options else ""


def _selection(asked: _Asked, model: Any, tokenizer: Any, candidates: Candidates, settings: dict[str, Any]) -> Any:
    """The choice among the candidates by the rule that was asked for."""
    from faststeer import extract as extraction

    prompts = asked.prompts
    options = {**settings, "coefficients": asked.coefficients, "layers": asked.layers}
    if asked.select == "refusal":
        return extraction.select(model, tokenizer, candidates, prompts.suppress, prompts.induce, **options)
    if asked.select == "cosmic":
        return extraction.select_cosmic(model, tokenizer, candidates, prompts.suppress, prompts.induce, **options)
    assert prompts.judge is not None
    return extraction.select_by_judge(
        model, tokenizer, candidates, prompts.judge, prompts.induce, prompts.suppress,
        coherent=prompts.coherence, max_new_tokens=asked.max_new_tokens, **options,
    )  # fmt: skip


def _next_step(asked: _Asked, out: Path, report: dict[str, Any], n_layers: int) -> str:
    """The command that shows what the vector does: at its layer, or, where it has all of them, at the layer of the
    middle of the model (30 to 75 % of the depth) at which the two sides lie furthest apart for their length."""
    candidate = report.get("selection", {}).get("chosen", {})
    middle = [n for n in report["layers"] if 0.3 * n_layers <= n <= 0.75 * n_layers] or report["layers"]
    layer = candidate.get("layer", max(middle, key=report["relative"].__getitem__))
    words = ["faststeer", "generate", "--model", asked.model, "--vector", str(out), "--layer", str(layer)]
    words += ["--coefficient", f"{candidate.get('coefficient', 1):g}", "--prompt", "How was your day?", "--compare"]
    return shlex.join(words)


def _compare(
    behaviour: Behaviour,
    model: str,
    method: str,
    out: Path | None,
    as_json: bool,
    dtype: str,
    device: str,
    **options: Any,
) -> None:
    """The comparison of methods, printed, and its vectors and figures written to a folder if one is named."""
    from faststeer.behaviours.compare import METHODS, compare
    from faststeer.files import write_atomically

    methods = list(METHODS) if method == "all" else [part.strip() for part in method.split(",")]
    loaded, tokenizer = load_model(model, dtype, device)
    folder = None if out is None else out / "parts"
    with keeps(folder):
        comparison = compare(loaded, tokenizer, behaviour, methods, folder=folder, **options)
    report = comparison.to_dict() | {"model": model}
    if out is not None:
        for result in comparison.results:
            if result.vector is not None:
                result.vector.save(out / f"{result.method}.safetensors")
        write_atomically(out / "comparison.json", json.dumps(report, indent=2) + "\n")
    if as_json:
        typer.echo(json.dumps(report))
        return
    Console().print(_comparison_table(report))
    for name, why in comparison.skipped.items():
        Console().print(f"{name} left out: {why}", highlight=False)
    if out is not None:
        Console().print(f"Written to {out}: comparison.json and a vector of each method")


def _comparison_table(report: dict[str, Any]) -> Table:
    columns = ("method", "layer", "token", "coeff.", "induce", "bypass", "KL", "coherent", "cos DIM")
    table = Table(
        *columns,
        box=SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        pad_edge=False,
        collapse_padding=True,
        title=f"{report['behaviour']}: chosen on validation prompts, measured on test prompts",
    )
    for row in report["results"]:
        rates = [f"{row[name]['rate']:.1%}" for name in ("induce", "bypass", "coherent")]
        numbers = [
            "-" if row[name] is None else f"{row[name]:{form}}" for name, form in (("kl", ".3f"), ("cosine", "+.2f"))
        ]
        places = ["-" if row[name] is None else str(row[name]) for name in ("layer", "position")]
        coefficient = "-" if row["coefficient"] is None else f"{row['coefficient']:g}"
        table.add_row(row["method"], *places, coefficient, rates[0], rates[1], numbers[0], rates[2], numbers[1])
    n = report["n_prompts"]
    table.caption = (
        f"{n['test_induce']} prompts to induce on, {n['test_suppress']} to suppress on; every vector has the length of "
        f"the difference in means ({report['settings']['at']}); cos DIM: cosine with it"
    )
    return table


def _selection_table(rule: Selection, selection: dict[str, Any]) -> Table:
    columns, texts, order = {
        "refusal": (("induce", "bypass", "ablate", "KL"), _refusal_cells, lambda row: row["bypass"] - row["induce"]),
        "cosmic": (("suppress", "induce", "KL"), _cosmic_cells, lambda row: -row["score"]),
        "judge": (("induce", "suppress", "coherent"), _judged_cells, lambda row: -row["both"]),
    }[rule]
    table = Table("layer", "token", "coeff.", *columns, "", title="Candidates, best ten")
    measured = [row for row in selection["table"] if all(value is not None for value in row.values())]
    for row in sorted(measured, key=order)[:10]:
        refusal = ", ".join(f"not {name}" for name in row.get("violated", ()))
        remark = "chosen" if row == selection["chosen"] else refusal
        place = (str(row["layer"]), str(row["position"]), f"{row['coefficient']:g}")
        table.add_row(*place, *texts(row), remark)
    if selection.get("relaxed"):
        table.caption = f"No candidate satisfies every constraint; given up: {', '.join(selection['relaxed'])}"
    if "unsteered" in selection and rule == "judge":
        table.add_row(
            "-", "-", "-", *(f"{selection['unsteered'][n]['rate']:.0%}" for n in columns[:2]), "", "unsteered"
        )
    return table


def _refusal_cells(row: dict[str, Any]) -> list[str]:
    return [*(f"{row[name]:+.2f}" for name in ("induce", "bypass", "ablate")), f"{row['kl']:.3f}"]


def _cosmic_cells(row: dict[str, Any]) -> list[str]:
    return [f"{row['suppress']:+.3f}", f"{row['induce']:+.3f}", f"{row['kl']:.3f}"]


def _judged_cells(row: dict[str, Any]) -> list[str]:
    return [f"{row[name]['rate']:.0%}" for name in ("induce", "suppress", "coherent")]


def _norm_table(report: dict[str, Any]) -> Table:
    table = Table("layer", "length", "of the activations'", title=f"Difference in means at {report['at']}")
    for layer, norm in report["norms"].items():
        table.add_row(str(layer), f"{norm:.3f}", f"{report['relative'][layer]:.1%}")
    return table
