"""What a sweep asks: checked, and expanded into settings. Nothing here touches a model.

Every vector is compared with random vectors of its lengths, unless `controls: 0` says otherwise.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal, get_args

import torch

from faststeer.algebra import random_like
from faststeer.evaluate.judging import make
from faststeer.evaluate.multiple_choice import Question, load_questions
from faststeer.evaluate.side_effects import NEUTRAL_TEXT
from faststeer.evaluate.sweep.yaml_lines import Lines, Where, read_lines
from faststeer.files import UNREADABLE, json_lines
from faststeer.hf.batching import Prompt, Rendered, prompt_fault
from faststeer.hf.prompts import load_prompts
from faststeer.intervention import Ablate, Add, Clamp, Direction, Intervention
from faststeer.plan import Plan
from faststeer.vector import SteeringVector
from faststeer.version import __version__

Kind = Literal["add", "ablate", "clamp"]
UNSTEERED = "unsteered"
# What a file may ask for; each is far more than a machine gets through.
MAX_STEPS = 10_000  # coefficients of one range
MAX_SETTINGS = 50_000  # a plan is built for each before the sweep begins, which takes seconds
MAX_PROMPTS = 10_000_000
MAX_TOKENS = 10_000_000  # of an answer; no model reads more
MAX_SEED = 2**53  # generators take 64 bits, and numbers are added to it
RANDOM_STRIDE = 1_000_003  # between the seeds of a plan's random directions
# What `demo:` may name in a description: faststeer.demo adds its prompts when it is imported.
NAMED_PROMPTS: dict[str, Callable[[], Sequence[Prompt]]] = {}
JUDGES: tuple[Any, ...] = ("refusal", "perplexity", "repetition", "length")


@dataclass(frozen=True)
class SweepPrompt:
    """A prompt with its id, and a tag by which results can be told apart (such as "look-alike")."""

    id: str
    prompt: Prompt
    tag: str = ""


@dataclass(frozen=True, eq=False)
class Setting:
    """One way of steering.

    Attributes:
        kind: "unsteered", "vector", "control" (a random vector of the same lengths) or "plan".
        vector: name of the vector, or of the plan.
        layers: where it acts; () for a plan, which says so itself.
        coefficient: None for "unsteered" and a plan.
        control: number of the random vector, from 0.
        plan: what is done.
    """

    kind: Literal["unsteered", "vector", "control", "plan"]
    vector: str
    layers: tuple[int, ...]
    coefficient: float | None
    control: int | None
    plan: Plan | None

    @property
    def name(self) -> str:
        """Short and unique in a sweep: `refusal L3 c0.5`, `refusal~random0 L3,4 c0.5`."""
        if self.kind in ("unsteered", "plan"):
            return self.vector
        name = self.vector if self.control is None else f"{self.vector}~random{self.control}"
        where = f" L{','.join(map(str, self.layers))} c{self.coefficient:g}" if self.coefficient is not None else ""
        return name + where


@dataclass(frozen=True, eq=False)
class Sweep:
    """A sweep, in Python; `load_sweep` reads one from YAML or JSON.

    Args:
        prompts: texts, chats or SweepPrompts; ids are given by place where there are none.
        vectors: by name.
        layers: each an int or several that are steered together; by default each layer that all vectors have.
        coefficients: of `Add`; strengths of `Ablate`; the projection that `Clamp` sets. 0 of the first two is the
            unsteered model, which is always measured, once.
        intervention: "add", "ablate" or "clamp".
        positions, at: as of every intervention.
        plans: whole plans by name, measured as they are.
        controls: random vectors beside each vector, with its layers and lengths (`extract.random_like`), and plans with
            random directions beside each plan (`random_plan`); 0 for none.
        judges: as `judging.make` names them.
        text: neutral texts on which KL and cross-entropy are measured for every setting; () for none.
        questions: multiple choice questions answered under every setting; () for none.
        projections: of this many prompts, the first of the list, each setting's answers are projected on the vector
            that steered them, token by token at every layer, and the unsteered answers on every vector; 0 for none. An
            answer takes a forward pass, and 2 bytes x (layers + 1) x tokens in the store.
        model, dtype, device: of the command line's `faststeer sweep`; `run` is given a model.
        system: a system prompt before every prompt.
        max_new_tokens, temperature, top_k, top_p: as of `Engine.generate`.
        seed: of sampling (a prompt draws the same numbers under every setting) and of the random vectors.
        engine: what generates the answers: "faststeer" (`fs.Engine`), or "vllm", which must be installed and loads the
            model's files itself (docs/vllm.md). Judges and side effects use the model that `run` is given.

    Raises:
        ValueError, TypeError: everything that can be told without a model: what was wrong, what was expected.
    """

    prompts: Sequence[Any]
    vectors: Mapping[str, SteeringVector] = field(default_factory=dict)
    layers: Sequence[int | Sequence[int]] | None = None
    coefficients: Sequence[float] = (1.0,)
    intervention: Kind = "add"
    positions: Any = "all"
    at: Any = None
    plans: Mapping[str, Plan] = field(default_factory=dict)
    controls: int = 1
    judges: Sequence[Any] = JUDGES
    text: Sequence[str] = NEUTRAL_TEXT
    questions: Sequence[Question] = ()
    projections: int = 4
    model: str = "demo"
    dtype: str = "auto"
    device: str = "auto"
    system: str | None = None
    max_new_tokens: int = 64
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    engine: Literal["faststeer", "vllm"] = "faststeer"

    def __post_init__(self) -> None:
        for name, check in _CHECKS.items():
            try:
                object.__setattr__(self, name, check(getattr(self, name)))
            except FieldError:
                raise
            except (ValueError, TypeError) as error:
                raise FieldError(name, str(error)) from error
        if not self.vectors and not self.plans:
            raise FieldError("vectors", "there is no vector and no plan: name at least one")
        if both := {UNSTEERED, *self.vectors} & set(self.plans):
            raise FieldError("plans", f"the name {sorted(both)[0]!r} is given twice")
        self.settings  # noqa: B018  expanded now, so that what is wrong is said before anything runs

    @cached_property
    def settings(self) -> tuple[Setting, ...]:
        """Every setting, the unsteered model first."""
        self._check_number()
        settings = [Setting("unsteered", UNSTEERED, (), None, None, None)]
        # 0 leaves the model alone, but for `clamp`.
        coefficients = [c for c in self.coefficients if c != 0 or self.intervention == "clamp"]
        for name, vector in self.vectors.items():
            controls = [(n, random_like(vector, self.seed + n)) for n in range(self.controls)]
            for control, own in [(None, vector), *controls]:
                kind: Literal["vector", "control"] = "vector" if control is None else "control"
                for layers in self._layers_of(name, vector):
                    for c in coefficients:
                        plan = Plan([self._intervention(name, own, layers, c)])
                        settings.append(Setting(kind, name, layers, c, control, plan))
        for name, plan in self.plans.items():
            settings.append(Setting("plan", name, (), None, None, plan))
            for n in range(self.controls):
                settings.append(Setting("control", name, (), None, n, random_plan(plan, self.seed + n)))
        return tuple(settings)

    def _check_number(self) -> None:
        """Refuse more settings than can be built, before one is."""
        groups = sum(len(v.layers) if self.layers is None else len(self.layers) for v in self.vectors.values())
        number = 1 + (1 + self.controls) * (groups * len(self.coefficients) + len(self.plans))
        if number > MAX_SETTINGS:
            raise FieldError(
                "coefficients",
                f"with {groups} layer(s) of {len(self.vectors)} vector(s) and {self.controls} control(s) they make "
                f"{number:,} settings, more than {MAX_SETTINGS:,}: name fewer layers, coefficients or controls",
            )

    def _layers_of(self, name: str, vector: SteeringVector) -> list[tuple[int, ...]]:
        if self.layers is None:
            return [(layer,) for layer in vector.layers]
        groups: Any = self.layers  # tuples, since they were checked
        if missing := [layer for group in groups for layer in group if layer not in vector]:
            raise FieldError(
                "layers", f"the vector {name!r} has no direction for layer {missing[0]}; it has {list(vector.layers)}"
            )
        return list(groups)

    def _intervention(self, name: str, vector: SteeringVector, layers: tuple[int, ...], c: float) -> Intervention:
        where: dict[str, Any] = {"layers": list(layers), "positions": self.positions, "at": self.at}
        try:
            if self.intervention == "clamp":
                return Clamp(vector, c, c, **where)
            return (Add if self.intervention == "add" else Ablate)(vector, c, **where)
        except (ValueError, TypeError) as error:
            raise FieldError("vectors", f"{name!r}: {error}") from error

    def identity(self, model: str) -> str:
        """A digest of everything that the answers depend on, the model's fingerprint included: answers of sweeps that
        differ in it are never mixed. Judges and side effects are not in it; they have digests of their own."""
        content: dict[str, Any] = {
            "faststeer": __version__,
            "model": model,
            "prompts": [[p.id, p.tag, p.prompt] for p in self.prompts],
            "settings": [
                [s.name, s.kind, None if s.plan is None else text_digest(s.plan.to_json(inline=True))]
                for s in self.settings
            ],
            "system": self.system,
            "generation": [self.max_new_tokens, self.temperature, self.top_k, self.top_p, self.seed],
        }
        if self.engine != "faststeer":  # stores from before there was another one keep their digests
            content["engine"] = self.engine
        if rendered := [i for i, p in enumerate(self.prompts) if isinstance(p.prompt, Rendered)]:
            content["rendered"] = rendered
        return text_digest(json.dumps(content, sort_keys=True))

    def to_dict(self) -> dict[str, Any]:
        """The description in words, ready for JSON: vectors and plans by digest."""
        plain = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in ("prompts", "vectors", "plans")}
        plain["questions"] = [[q.question, list(q.choices), q.answer] for q in self.questions]
        plain["judges"] = [judge if isinstance(judge, str | Mapping) else make(judge).name for judge in self.judges]
        plain["n_prompts"] = len(self.prompts)
        plain["vectors"] = {name: hashlib.sha256(v.to_bytes()).hexdigest() for name, v in self.vectors.items()}
        plain["plans"] = {name: text_digest(plan.to_json(inline=True)) for name, plan in self.plans.items()}
        return json.loads(json.dumps(plain, default=str))


def random_plan(plan: Plan, seed: int) -> Plan:
    """The same plan with random directions of the same lengths in place of its own; its gates look where they looked.

    Equal directions of a plan get equal random ones.
    """
    directions: dict[int, Direction] = {}  # by the identity of the plan's own

    def random(direction: Direction) -> Direction:
        if id(direction) not in directions:
            number = seed + RANDOM_STRIDE * len(directions)
            if isinstance(direction, SteeringVector):
                directions[id(direction)] = random_like(direction, number)
            else:
                generator = torch.Generator().manual_seed(number)
                draw = torch.randn(direction.shape, generator=generator, dtype=torch.float64)
                lengths = direction.detach().double().cpu().norm(dim=-1, keepdim=True)
                directions[id(direction)] = (draw / draw.norm(dim=-1, keepdim=True) * lengths).to(direction)
        return directions[id(direction)]

    changes: list[dict[str, Any]] = [{name: random(getattr(i, name)) for name in i.direction_names} for i in plan]
    return Plan([replace(i, **change) for i, change in zip(plan, changes, strict=True)])


class FieldError(ValueError):
    """What is wrong with one field of a description, or with one item of it, so that a reader of files can add the
    line."""

    def __init__(self, name: str, message: str, item: int | None = None) -> None:
        super().__init__(f"{name}: {message}")
        self.name, self.message, self.item = name, message, item


def text_digest(text: str) -> str:
    """The SHA-256 of a text, in hexadecimal."""
    return hashlib.sha256(text.encode()).hexdigest()


# Checks: each takes a field's value as it was given, and returns it as the sweep has it -------------------------------


def _prompts(values: Any) -> tuple[SweepPrompt, ...]:
    listed = _listed(values, "at least one prompt")
    prompts = tuple(p if isinstance(p, SweepPrompt) else SweepPrompt(str(i), p) for i, p in enumerate(listed))
    first: dict[str, int] = {}
    for i, prompt in enumerate(prompts):
        if fault := prompt_fault(prompt.prompt):
            raise FieldError("prompts", f"prompt {i} {fault}: expected a text or a list of messages", i)
        if (earlier := first.setdefault(prompt.id, i)) != i:
            message = f"prompts {earlier} and {i} have the same id {prompt.id!r}: give each its own"
            raise FieldError("prompts", message, i)
    return prompts


def _named(cls: type, what: str) -> Any:
    def check(values: Any) -> dict[str, Any]:
        if not isinstance(values, Mapping):
            raise TypeError(f"expected {what} by name, got {type(values).__name__}")
        for name, value in values.items():
            if not isinstance(name, str) or not name.strip() or "~" in name:
                raise ValueError(f"{name!r} is no name: expected a text that is not blank, without ~")
            if not isinstance(value, cls):
                raise TypeError(f"{name!r} is a {type(value).__name__}: expected a {cls.__name__}")
        return dict(values)

    return check


def _layers(values: Any) -> Any:
    if values is None:
        return None
    listed = _listed(values, "layers, or of lists that are steered together")
    groups = [tuple(item) if isinstance(item, Sequence) and not isinstance(item, str) else (item,) for item in listed]
    for group in groups:
        if not group or not all(type(layer) is int and layer >= 0 for layer in group):
            raise ValueError(f"{list(group)!r}: expected layers, whole numbers from 0")
    return _distinct([tuple(sorted(set(group))) for group in groups], values, "layer")


def _coefficients(values: Any) -> tuple[float, ...]:
    return _distinct([_number(c) for c in _listed(values, "numbers")], values, "number")


def _distinct(items: list[Any], values: Any, what: str) -> tuple[Any, ...]:
    if len(set(items)) < len(items):
        raise ValueError(f"{list(values)!r}: a {what} is given twice")
    return tuple(items)


def _number(value: Any) -> float:
    try:
        number = math.nan if isinstance(value, bool) else float(value)  # YAML 1.1 reads 1e-3 as a text
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not math.isfinite(number):
        raise ValueError(f"{str(value)[:40]!r} is no finite number")
    return number


def _at_least(low: float, whole: bool, high: float = math.inf) -> Any:
    def check(value: Any) -> float:
        number = _number(value)
        if (whole and type(value) is not int) or not low <= number <= high:
            raise ValueError(
                f"{value!r}: expected a {'whole ' if whole else ''}number from {low:g}"
                f"{'' if high == math.inf else f' to {high:g}'}"
            )
        return value if whole else number

    return check


def _one_of(*names: str) -> Any:
    def check(value: Any) -> Any:
        if not isinstance(value, str) or value not in names:
            raise ValueError(f"{value!r}: expected one of {', '.join(names)}")
        return value

    return check


def _text(value: Any) -> str:
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"{str(value)[:60]!r}: expected a text that is not blank")
    return value


def _text_or_none(value: Any) -> str | None:
    if value is not None and not isinstance(value, str):
        raise ValueError(f"{str(value)[:60]!r}: expected a text")
    return value


def _texts(values: Any) -> tuple[str, ...]:
    if isinstance(values, str) or not isinstance(values, Sequence):
        raise ValueError(f"{values!r}: expected a list of texts, [] for none")
    return tuple(_text(text) for text in values)


def _listed(values: Any, what: str) -> Sequence[Any]:
    if isinstance(values, str | Mapping) or not isinstance(values, Sequence) or not values:
        raise ValueError(f"{repr(values)[:200]}: expected a list of {what}")
    return values


_CHECKS: dict[str, Any] = {
    "prompts": _prompts,
    "vectors": _named(SteeringVector, "vectors"),
    "plans": _named(Plan, "plans"),
    "layers": _layers,
    "coefficients": _coefficients,
    "intervention": _one_of(*get_args(Kind)),
    "controls": _at_least(0, True, 100),
    "judges": lambda values: tuple(_listed(values, "at least one judge")),
    "text": _texts,
    "questions": tuple,
    "projections": _at_least(0, True, MAX_PROMPTS),
    "model": _text,
    "dtype": _text,
    "device": _text,
    "system": _text_or_none,
    "max_new_tokens": _at_least(1, True, MAX_TOKENS),
    "temperature": _at_least(0, False),
    "top_k": _at_least(0, True, MAX_TOKENS),
    "top_p": _at_least(1e-9, False, 1),
    "seed": _at_least(0, True, MAX_SEED),
    "engine": _one_of("faststeer", "vllm"),
}


# Files ----------------------------------------------------------------------------------------------------------------


def load_sweep(path: str | os.PathLike[str]) -> Sweep:
    """Read a sweep from `.yaml`, `.yml` or `.json`: an object with the fields of `Sweep`, where

    | field | is |
    |---|---|
    | `prompts` | a list of texts, chats, or objects with `prompt`, `id`, `tag`; a file; or a list of / one object with
    `file` or `demo` (`harmful`, `harmless`, `questions`), and `field`, `limit`, `tag` |
    | `vectors` | name: file |
    | `plans` | name: file |
    | `coefficients` | a list, or `{from, to, steps}`, both ends included |
    | `text` | a list, a file with a text per line, or `false` |
    | `questions` | a JSONL file, see `load_questions` |

    Relative paths start at the file's own folder.

    Raises:
        FileNotFoundError: there is no such file.
        FormatError: no YAML or JSON, an unknown field, a wrong value; with file and line.
    """
    path = Path(path)
    data, lines = read_lines(path)
    lines.only(data, (), [f.name for f in fields(Sweep)])
    if "prompts" not in data:
        raise lines.error((), "there are no prompts: say prompts:")
    reader = _DescriptionReader(path.parent, lines)
    values = reader.read(data)
    try:
        return Sweep(**values)
    except FieldError as error:
        where = (error.name,) if error.item is None else reader.prompt_places[error.item]
        raise lines.error(where, str(error)) from error


class _DescriptionReader:
    """What a description in a file says, as `Sweep` takes it: files are read, ranges and lists written out.

    Attributes:
        prompt_places: where in the file each prompt stands.
    """

    def __init__(self, folder: Path, lines: Lines) -> None:
        self._folder, self._lines = folder, lines
        self.prompt_places: list[Where] = []

    def read(self, data: Mapping[str, Any]) -> dict[str, Any]:
        readers: dict[str, Callable[[Any], Any]] = {
            "prompts": self._prompts,
            "vectors": lambda files: self._named(SteeringVector.load, "vectors", files),
            "plans": lambda files: self._named(Plan.load, "plans", files),
            "questions": lambda file: self._load(load_questions, file, ("questions",)) if file else (),
            "text": self._text,
            "coefficients": self._coefficients,
            "layers": lambda value: None if value == "each" else value,
            "model": self._model,
        }
        return {name: readers[name](value) if name in readers else value for name, value in data.items()}

    def _load(self, load: Callable[[Path], Any], name: Any, where: Where) -> Any:
        """What a file beside the description holds."""
        if not isinstance(name, str):
            raise self._lines.error(where, f"{name!r}: expected the name of a file")
        path = self._folder / name
        try:
            if not path.is_file():
                raise self._lines.error(where, f"there is no file {path}")
        except OSError as error:
            raise self._lines.error(where, f"{name[:200]!r} is no file's name: {error.strerror}") from error
        try:
            return load(path)
        except (OSError, *UNREADABLE) as error:
            raise self._lines.error(where, str(error)) from error

    def _named(self, load: Callable[[Path], Any], field: str, files: Any) -> dict[str, Any]:
        if not isinstance(files, dict):
            raise self._lines.error((field,), f"{field}: expected names with a file each")
        return {name: self._load(load, file, (field, name)) for name, file in files.items()}

    def _model(self, name: Any) -> Any:
        """A file or folder beside the description, else the name as it stands."""
        if not isinstance(name, str) or name in ("demo", "smollm2"):
            return name
        path = self._folder / name
        return str(path) if path.is_file() or (path / "config.json").is_file() else name

    def _text(self, value: Any) -> Any:
        if value is False:
            return ()
        return self._load(load_prompts, value, ("text",)) if isinstance(value, str) else value

    def _coefficients(self, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        where = ("coefficients",)
        self._lines.only(value, where, ("from", "to", "steps"))
        try:
            low, high = _number(value["from"]), _number(value["to"])
            steps = _at_least(2, True, MAX_STEPS)(value["steps"])
        except KeyError as error:
            raise self._lines.error(where, "coefficients: expected from, to and steps") from error
        except ValueError as error:
            raise self._lines.error(where, f"coefficients: {error}") from error
        # Rounded, so that 0.1 x 3 is the 0.3 that a person would write.
        return [round(low + (high - low) * i / (steps - 1), 12) for i in range(steps)]

    def _prompts(self, value: Any) -> list[SweepPrompt]:
        items = [{"file": value}] if isinstance(value, str) else [value] if isinstance(value, dict) else value
        if not isinstance(items, list) or not items:
            raise self._lines.error(("prompts",), "prompts: expected a list, a file, or an object with file: or demo:")
        prompts: list[SweepPrompt] = []
        for i, item in enumerate(items):
            where: Where = ("prompts", i) if items is value else ("prompts",)
            some = self._prompts_of(item, where, len(prompts))
            prompts += some
            self.prompt_places += [where] * len(some)
        return prompts

    def _prompts_of(self, item: Any, where: Where, start: int) -> list[SweepPrompt]:
        """The prompts of one item of the list, of which so many come before it."""
        if not isinstance(item, dict):
            return [SweepPrompt(str(start), item)]
        if "prompt" in item:
            self._lines.only(item, where, ("prompt", "id", "tag"))
            return [SweepPrompt(str(item.get("id", start)), item["prompt"], str(item.get("tag", "")))]
        if len({"file", "demo"} & set(item)) != 1:
            raise self._lines.error(where, "expected an object with prompt:, file: or demo:")
        self._lines.only(item, where, ("file", "demo", "field", "limit", "tag"))
        limit, tag = item.get("limit"), str(item.get("tag", ""))
        if limit is not None and (type(limit) is not int or limit < 1):
            raise self._lines.error((*where, "limit"), f"limit is {limit!r}: expected a whole number from 1")
        if "file" in item:
            load = partial(_file_prompts, field=item.get("field"), start=start)
            prompts = self._load(load, item["file"], (*where, "file"))[:limit]
            return [replace(prompt, tag=prompt.tag or tag) for prompt in prompts]
        name = item["demo"]
        if not isinstance(name, str) or name not in NAMED_PROMPTS:
            known = ", ".join(NAMED_PROMPTS) or "no name before `import faststeer.demo`"
            raise self._lines.error(where, f"demo: {name!r}: expected {known}")
        return [SweepPrompt(f"{name}-{i}", prompt, tag) for i, prompt in enumerate(NAMED_PROMPTS[name]()[:limit])]


def _file_prompts(path: Path, *, field: str | None, start: int) -> list[SweepPrompt]:
    """Prompts of a file, with the ids and tags that objects of a JSONL have."""
    prompts = load_prompts(path, field=field)
    items = [item for _, item in json_lines(path)] if path.suffix == ".jsonl" else [None] * len(prompts)
    facts = [item if isinstance(item, dict) else {} for item in items]
    return [
        SweepPrompt(str(fact.get("id", start + i)), prompt, str(fact.get("tag", "")))
        for i, (fact, prompt) in enumerate(zip(facts, prompts, strict=True))
    ]
