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
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, get_args

import torch

from faststeer.algebra import random_like
from faststeer.evaluate.judging import make
from faststeer.evaluate.multiple_choice import Question, load_questions
from faststeer.evaluate.side_effects import NEUTRAL_TEXT
from faststeer.evaluate.sweep.yaml_lines import Lines, read_lines
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
        found = [Setting("unsteered", UNSTEERED, (), None, None, None)]
        for name, vector in self.vectors.items():
            pairs: list[tuple[int | None, SteeringVector]] = [(None, vector)]
            pairs += [(n, random_like(vector, self.seed + n)) for n in range(self.controls)]
            for control, used in pairs:
                for layers in self._layers_of(name, vector):
                    for c in self.coefficients:
                        if c == 0 and self.intervention != "clamp":
                            continue
                        plan = Plan([self._intervention(name, used, layers, c)])
                        kind: Any = "vector" if control is None else "control"
                        found.append(Setting(kind, name, layers, c, control, plan))
        for name, plan in self.plans.items():
            found.append(Setting("plan", name, (), None, None, plan))
            for n in range(self.controls):
                found.append(Setting("control", name, (), None, n, random_plan(plan, self.seed + n)))
        return tuple(found)

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
        chosen = [(layer,) if isinstance(layer, int) else tuple(layer) for layer in self.layers]
        if missing := [layer for group in chosen for layer in group if layer not in vector]:
            raise FieldError(
                "layers", f"the vector {name!r} has no direction for layer {missing[0]}; it has {list(vector.layers)}"
            )
        return chosen

    def _intervention(self, name: str, vector: SteeringVector, layers: tuple[int, ...], c: float) -> Intervention:
        where: dict[str, Any] = {"layers": list(layers), "positions": self.positions, "at": self.at}
        try:
            if self.intervention == "add":
                return Add(vector, c, **where)
            if self.intervention == "ablate":
                return Ablate(vector, c, **where)
            return Clamp(vector, c, c, **where)
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
                [s.name, s.kind, None if s.plan is None else _digest(s.plan.to_json(inline=True))]
                for s in self.settings
            ],
            "system": self.system,
            "generation": [self.max_new_tokens, self.temperature, self.top_k, self.top_p, self.seed],
        }
        if self.engine != "faststeer":  # stores from before there was another one keep their digests
            content["engine"] = self.engine
        if rendered := [i for i, p in enumerate(self.prompts) if isinstance(p.prompt, Rendered)]:
            content["rendered"] = rendered
        return _digest(json.dumps(content, sort_keys=True))

    def to_dict(self) -> dict[str, Any]:
        """The description in words, ready for JSON: vectors and plans by digest."""
        plain = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in ("prompts", "vectors", "plans")}
        plain["questions"] = [[q.question, list(q.choices), q.answer] for q in self.questions]
        plain["judges"] = [judge if isinstance(judge, str | Mapping) else make(judge).name for judge in self.judges]
        plain["n_prompts"] = len(self.prompts)
        plain["vectors"] = {name: hashlib.sha256(v.to_bytes()).hexdigest() for name, v in self.vectors.items()}
        plain["plans"] = {name: _digest(plan.to_json(inline=True)) for name, plan in self.plans.items()}
        return json.loads(json.dumps(plain, default=str))


def random_plan(plan: Plan, seed: int) -> Plan:
    """The same plan with random directions of the same lengths in place of its own; its gates look where they looked.

    Equal directions of a plan get equal random ones.
    """
    made: dict[int, Direction] = {}

    def random(direction: Direction) -> Direction:
        if id(direction) not in made:
            number = seed + RANDOM_STRIDE * len(made)
            if isinstance(direction, SteeringVector):
                made[id(direction)] = random_like(direction, number)
            else:
                generator = torch.Generator().manual_seed(number)
                draw = torch.randn(direction.shape, generator=generator, dtype=torch.float64)
                lengths = direction.detach().double().cpu().norm(dim=-1, keepdim=True)
                made[id(direction)] = (draw / draw.norm(dim=-1, keepdim=True) * lengths).to(direction)
        return made[id(direction)]

    changes: list[dict[str, Any]] = [{name: random(getattr(i, name)) for name in i.direction_names} for i in plan]
    return Plan([replace(i, **change) for i, change in zip(plan, changes, strict=True)])


class FieldError(ValueError):
    """What is wrong with one field of a description, so that a reader of files can add the line."""

    def __init__(self, name: str, message: str) -> None:
        super().__init__(f"{name}: {message}")
        self.name, self.message = name, message


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


# Checks ---------------------------------------------------------------------------------------------------------------


def _prompts(given: Any) -> tuple[SweepPrompt, ...]:
    if isinstance(given, str | Mapping) or not isinstance(given, Sequence) or not given:
        raise ValueError("expected a list of at least one prompt")
    found = tuple(p if isinstance(p, SweepPrompt) else SweepPrompt(str(i), p) for i, p in enumerate(given))
    first: dict[str, int] = {}
    for i, prompt in enumerate(found):
        if fault := prompt_fault(prompt.prompt):
            raise ValueError(f"prompt {i} {fault}: expected a text or a list of messages")
        if (earlier := first.setdefault(prompt.id, i)) != i:
            raise ValueError(f"prompts {earlier} and {i} have the same id {prompt.id!r}: give each its own")
    return found


def _named(cls: type, what: str) -> Any:
    def check(given: Any) -> dict[str, Any]:
        if not isinstance(given, Mapping):
            raise TypeError(f"expected {what} by name, got {type(given).__name__}")
        for name, value in given.items():
            if not isinstance(name, str) or not name.strip() or "~" in name:
                raise ValueError(f"{name!r} is no name: expected a text that is not blank, without ~")
            if not isinstance(value, cls):
                raise TypeError(f"{name!r} is a {type(value).__name__}: expected a {cls.__name__}")
        return dict(given)

    return check


def _layers(given: Any) -> Any:
    if given is None:
        return None
    given = _listed(given, "layers, or of lists that are steered together")
    groups = [tuple(item) if isinstance(item, Sequence) and not isinstance(item, str) else (item,) for item in given]
    for group in groups:
        if not group or not all(type(layer) is int and layer >= 0 for layer in group):
            raise ValueError(f"{list(group)!r}: expected layers, whole numbers from 0")
    ordered = [tuple(sorted(set(group))) for group in groups]
    if len(set(ordered)) < len(ordered):
        raise ValueError(f"{list(given)!r}: a layer is given twice")
    return tuple(ordered)


def _coefficients(given: Any) -> tuple[float, ...]:
    found = tuple(_number(c) for c in _listed(given, "numbers"))
    if len(set(found)) < len(found):
        raise ValueError(f"{list(given)!r}: a number is given twice")
    return found


def _number(given: Any) -> float:
    try:
        value = math.nan if isinstance(given, bool) else float(given)  # YAML 1.1 reads 1e-3 as a text
    except (TypeError, ValueError, OverflowError):
        value = math.nan
    if not math.isfinite(value):
        raise ValueError(f"{str(given)[:40]!r} is no finite number")
    return value


def _at_least(low: float, whole: bool, high: float = math.inf) -> Any:
    def check(given: Any) -> float:
        value = _number(given)
        if (whole and type(given) is not int) or not low <= value <= high:
            raise ValueError(
                f"{given!r}: expected a {'whole ' if whole else ''}number from {low:g}"
                f"{'' if high == math.inf else f' to {high:g}'}"
            )
        return given if whole else value

    return check


def _one_of(*names: str) -> Any:
    def check(given: Any) -> Any:
        if not isinstance(given, str) or given not in names:
            raise ValueError(f"{given!r}: expected one of {', '.join(names)}")
        return given

    return check


def _text(given: Any) -> str:
    if not isinstance(given, str) or not given.strip():
        raise ValueError(f"{str(given)[:60]!r}: expected a text that is not blank")
    return given


def _text_or_none(given: Any) -> str | None:
    if given is not None and not isinstance(given, str):
        raise ValueError(f"{str(given)[:60]!r}: expected a text")
    return given


def _texts(given: Any) -> tuple[str, ...]:
    if isinstance(given, str) or not isinstance(given, Sequence):
        raise ValueError(f"{given!r}: expected a list of texts, [] for none")
    if not all(isinstance(text, str) and text.strip() for text in given):
        raise ValueError("expected texts that are not blank")
    return tuple(given)


def _judges(given: Any) -> tuple[Any, ...]:
    return tuple(_listed(given, "at least one judge"))


def _listed(given: Any, what: str) -> Sequence[Any]:
    if isinstance(given, str | Mapping) or not isinstance(given, Sequence) or not given:
        raise ValueError(f"{given!r}: expected a list of {what}")
    return given


_CHECKS: dict[str, Any] = {
    "prompts": _prompts,
    "vectors": _named(SteeringVector, "vectors"),
    "plans": _named(Plan, "plans"),
    "layers": _layers,
    "coefficients": _coefficients,
    "intervention": _one_of(*get_args(Kind)),
    "controls": _at_least(0, True, 100),
    "judges": _judges,
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
    known = [f.name for f in fields(Sweep)]
    lines.only(data, (), known)
    reader = _DescriptionReader(path.parent, lines)
    if "prompts" not in data:
        raise lines.error((), "there are no prompts: say prompts:")
    given = {name: reader.read(name, value) for name, value in data.items()}
    try:
        return Sweep(**given)
    except FieldError as error:
        raise lines.error((error.name,), f"{error.name}: {error.message}") from error


@dataclass(frozen=True)
class _DescriptionReader:
    folder: Path
    lines: Lines

    def read(self, name: str, value: Any) -> Any:
        read = getattr(self, f"_{name}", None)
        return value if read is None else read(value)

    def _path(self, value: Any, where: tuple[Any, ...]) -> Path:
        if not isinstance(value, str):
            raise self.lines.error(where, f"{value!r}: expected the name of a file")
        path = self.folder / value
        try:
            there = path.is_file()
        except OSError as error:
            raise self.lines.error(where, f"{value[:200]!r} is no file's name: {error.strerror}") from error
        if not there:
            raise self.lines.error(where, f"there is no file {path}")
        return path

    def _load(self, load: Any, value: Any, where: tuple[Any, ...]) -> Any:
        path = self._path(value, where)
        try:
            return load(path)
        except (OSError, *UNREADABLE) as error:
            raise self.lines.error(where, str(error)) from error

    def _named(self, load: Any, name: str, value: Any) -> dict[str, Any]:
        if not isinstance(value, dict):
            raise self.lines.error((name,), f"{name}: expected names with a file each")
        return {key: self._load(load, file, (name, key)) for key, file in value.items()}

    def _model(self, value: Any) -> Any:
        """A file or folder beside the description, else the name as it stands."""
        if not isinstance(value, str) or value in ("demo", "smollm2"):
            return value
        path = self.folder / value
        return str(path) if path.is_file() or (path / "config.json").is_file() else value

    def _vectors(self, value: Any) -> Any:
        return self._named(SteeringVector.load, "vectors", value)

    def _plans(self, value: Any) -> Any:
        return self._named(Plan.load, "plans", value)

    def _questions(self, value: Any) -> Any:
        return self._load(load_questions, value, ("questions",)) if value else ()

    def _text(self, value: Any) -> Any:
        if value is False:
            return ()
        if isinstance(value, str):
            return self._load(load_prompts, value, ("text",))
        return value

    def _coefficients(self, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        where = ("coefficients",)
        self.lines.only(value, where, ("from", "to", "steps"))
        try:
            low, high = _number(value["from"]), _number(value["to"])
            steps = _at_least(2, True, MAX_STEPS)(value["steps"])
        except KeyError as error:
            raise self.lines.error(where, "coefficients: expected from, to and steps") from error
        except ValueError as error:
            raise self.lines.error(where, f"coefficients: {error}") from error
        # Rounded, so that 0.1 x 3 is the 0.3 that a person would write.
        return [round(low + (high - low) * i / (steps - 1), 12) for i in range(steps)]

    def _layers(self, value: Any) -> Any:
        return None if value in ("each", None) else value

    # Prompts

    def _prompts(self, value: Any) -> list[SweepPrompt]:
        found: list[SweepPrompt] = []
        places: dict[str, tuple[Any, ...]] = {}
        items = [value] if isinstance(value, str | dict) else value
        if not isinstance(items, list) or not items:
            raise self.lines.error(("prompts",), "prompts: expected a list, a file, or an object with file: or demo:")
        for i, item in enumerate(items):
            where = ("prompts",) if items is not value else ("prompts", i)
            for prompt in self._some(item, where, len(found), isinstance(value, str)):
                if prompt.id in places:
                    raise self.lines.error(
                        where,
                        f"prompts: the id {prompt.id!r} is given twice (also line "
                        f"{self.lines.line(places[prompt.id])}): give each prompt its own",
                    )
                places[prompt.id] = where
                found.append(prompt)
        return found

    def _some(self, item: Any, where: tuple[Any, ...], start: int, is_file: bool) -> list[SweepPrompt]:
        if is_file:
            item = {"file": item}
        if not isinstance(item, dict):
            if fault := prompt_fault(item):
                raise self.lines.error(where, f"the prompt {fault}: expected a text, a chat, or an object")
            return [SweepPrompt(str(start), item)]
        if "prompt" in item:
            self.lines.only(item, where, ("prompt", "id", "tag"))
            if fault := prompt_fault(item["prompt"]):
                raise self.lines.error(where, f"the prompt {fault}")
            return [SweepPrompt(str(item.get("id", start)), item["prompt"], str(item.get("tag", "")))]
        if len({"file", "demo"} & set(item)) != 1:
            raise self.lines.error(where, "expected an object with prompt:, file: or demo:")
        self.lines.only(item, where, ("file", "demo", "field", "limit", "tag"))
        limit, tag = item.get("limit"), str(item.get("tag", ""))
        if limit is not None and (type(limit) is not int or limit < 1):
            raise self.lines.error((*where, "limit"), f"limit is {limit!r}: expected a whole number from 1")
        if "demo" in item:
            listed = self._of_demo(item["demo"], where)[:limit]
            return [SweepPrompt(f"{item['demo']}-{i}", prompt, tag) for i, prompt in enumerate(listed)]
        path = self._path(item["file"], (*where, "file") if not is_file else where)
        try:
            return [replace(p, tag=p.tag or tag) for p in _file_prompts(path, item.get("field"), start)[:limit]]
        except ValueError as error:
            raise self.lines.error(where, str(error)) from error

    def _of_demo(self, name: Any, where: tuple[Any, ...]) -> list[Prompt]:
        if not isinstance(name, str) or name not in NAMED_PROMPTS:
            known = ", ".join(NAMED_PROMPTS) or "no name before `import faststeer.demo`"
            raise self.lines.error(where, f"demo: {name!r}: expected {known}")
        return list(NAMED_PROMPTS[name]())


def _file_prompts(path: Path, field: str | None, start: int) -> list[SweepPrompt]:
    """Prompts of a file, with the ids and tags that objects of a JSONL have."""
    listed = load_prompts(path, field=field)
    ids, tags = [str(start + i) for i in range(len(listed))], [""] * len(listed)
    if path.suffix == ".jsonl":
        first: dict[str, int] = {}
        for i, (_, item) in enumerate(json_lines(path)):
            if isinstance(item, dict):
                ids[i], tags[i] = str(item.get("id", ids[i])), str(item.get("tag", ""))
            if (earlier := first.setdefault(ids[i], i)) != i:
                raise ValueError(
                    f"{path}: prompts {earlier + 1} and {i + 1} have the same id {ids[i]!r}: give each its own"
                )
    return [SweepPrompt(*values) for values in zip(ids, listed, tags, strict=True)]
