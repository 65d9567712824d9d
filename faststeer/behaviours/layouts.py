"""Files of the usual data sets, as they lie on disk: AdvBench, HarmBench, JailbreakBench, Alpaca, CAA, AxBench; and
data sets by name, where the library `datasets` is installed.

Which layout a file has is told by its columns, never by its name; a file whose columns are none of them is refused.
Nothing is downloaded here except by `datasets`, when it is asked for by name.
"""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from faststeer.extract.pairs import Pair
from faststeer.file_kinds import kind_of
from faststeer.files import FormatError, read_json, read_text

Row = Mapping[str, Any]
HARMBENCH_CONTEXT = "\n\n---\n\n"
DATASETS_PREFIX = "datasets:"


@dataclass(frozen=True)
class Record:
    """One row of a data set: a prompt and what its layout has besides.

    Args:
        prompt: the text put to the model.
        completion: an answer to it: a target, a demonstration, the answer that shows the behaviour.
        rejected: the answer that does not.
        label: "positive" or "negative" where the layout says which the row is.
    """

    prompt: str
    completion: str | None = None
    rejected: str | None = None
    label: str | None = None


def read_records(path: str | os.PathLike[str], *, concept: str | int | None = None) -> list[Record]:
    """Read a file of any of the layouts below, told apart by its columns.

    | layout | columns (any case) | prompt | completion |
    |---|---|---|---|
    | AdvBench | goal, target | goal | target |
    | JailbreakBench | goal, target, behavior, category | goal | target |
    | HarmBench | behavior, behaviorid, (contextstring) | context, a rule, behavior | |
    | Alpaca | instruction, (input), output | instruction, blank line, input | output |
    | CAA | question, answer_matching_behavior, answer_not_matching_behavior | question | matching; not: rejected |
    | AxBench | input, output, output_concept, category | input | output; of the negative row: rejected |

    Args:
        path: .csv, .tsv, .json (a list of objects) or .jsonl; or, for `datasets.load_dataset`,
            `datasets:<name or folder>[:<configuration>][@<split>]`, the split being "train" unless named.
        concept: which concept of an AxBench file (its words or its id); needed where there are several.

    Raises:
        FileNotFoundError: there is no such file.
        FormatError: a file that cannot be read, columns of no known layout, a blank prompt, with file and row.
    """
    rows, where = _rows(path)
    columns = {str(name).strip().lower() for name in rows[0]}
    for layout in LAYOUTS:
        if layout.needs <= columns:
            return layout.read(rows, where, concept)
    known = "; ".join(f"{layout.name}: {', '.join(sorted(layout.needs))}" for layout in LAYOUTS)
    raise FormatError(f"{where} has the columns {', '.join(sorted(columns))}, which are no known layout's ({known})")


def advbench(path: str | os.PathLike[str]) -> list[Record]:
    """Read AdvBench (arXiv 2307.15043): columns goal and target. Errors as `read_records`."""
    return _as("AdvBench", path)


def jailbreakbench(path: str | os.PathLike[str]) -> list[Record]:
    """Read JailbreakBench (arXiv 2404.01318), harmful or benign. Errors as `read_records`."""
    return _as("JailbreakBench", path)


def harmbench(path: str | os.PathLike[str]) -> list[Record]:
    """Read HarmBench (arXiv 2402.04249); a contextual behaviour's context comes first. Errors as `read_records`."""
    return _as("HarmBench", path)


def alpaca(path: str | os.PathLike[str]) -> list[Record]:
    """Read instructions in Alpaca's layout. Errors as `read_records`."""
    return _as("Alpaca", path)


def caa_pairs(path: str | os.PathLike[str]) -> list[Pair]:
    """Read A/B questions in CAA's layout (arXiv 2312.06681) as pairs, chosen being the answer that matches the
    behaviour. Errors as `read_records`."""
    return pairs_of(_as("CAA", path))


def axbench(path: str | os.PathLike[str], concept: str | int | None = None) -> list[Record]:
    """Read one concept of AxBench (arXiv 2501.17148): its positive rows, each with the output of the negative row that
    has the same input as `rejected`, where there is one; then the negative rows that are left. Errors as
    `read_records`."""
    return _as("AxBench", path, concept)


def pairs_of(records: Sequence[Record]) -> list[Pair]:
    """Return the records that have both completions as pairs.

    Raises:
        ValueError: there is none.
    """
    pairs = [Pair(r.prompt, r.completion, r.rejected) for r in records if r.completion and r.rejected]
    if not pairs:
        raise ValueError("none of the records has two completions: expected a layout with pairs, such as CAA's")
    return pairs


def _as(name: str, path: str | os.PathLike[str], concept: str | int | None = None) -> list[Record]:
    layout = next(layout for layout in LAYOUTS if layout.name == name)
    rows, where = _rows(path)
    columns = {str(column).strip().lower() for column in rows[0]}
    if missing := layout.needs - columns:
        raise FormatError(
            f"{where} is not in {name}'s layout: it has the columns {', '.join(sorted(columns))}, and lacks "
            f"{', '.join(sorted(missing))}"
        )
    return layout.read(rows, where, concept)


# Layouts --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Layout:
    name: str
    needs: frozenset[str]
    read: Callable[[list[dict[str, Any]], str, str | int | None], list[Record]]


def _goals(rows: list[dict[str, Any]], where: str, concept: object) -> list[Record]:
    return [
        Record(_text(row, "goal", f"{where}, row {n}"), _text(row, "target", f"{where}, row {n}", optional=True))
        for n, row in enumerate(rows, 1)
    ]


def _harmbench(rows: list[dict[str, Any]], where: str, concept: object) -> list[Record]:
    records = []
    for n, row in enumerate(rows, 1):
        behavior = _text(row, "behavior", f"{where}, row {n}")
        context = _text(row, "contextstring", f"{where}, row {n}", optional=True)
        records.append(Record(behavior if not context else context + HARMBENCH_CONTEXT + behavior))
    return records


def _alpaca(rows: list[dict[str, Any]], where: str, concept: object) -> list[Record]:
    records = []
    for n, row in enumerate(rows, 1):
        instruction = _text(row, "instruction", f"{where}, row {n}")
        more = _text(row, "input", f"{where}, row {n}", optional=True)
        prompt = instruction if not more else f"{instruction}\n\n{more}"
        records.append(Record(prompt, _text(row, "output", f"{where}, row {n}", optional=True)))
    return records


def _caa(rows: list[dict[str, Any]], where: str, concept: object) -> list[Record]:
    names = ("question", "answer_matching_behavior", "answer_not_matching_behavior")
    return [Record(*(_text(row, name, f"{where}, row {n}") or "" for name in names)) for n, row in enumerate(rows, 1)]


def _axbench(rows: list[dict[str, Any]], where: str, concept: str | int | None) -> list[Record]:
    sides: dict[str, list[dict[str, Any]]] = {"positive": [], "negative": []}
    for n, row in enumerate(rows, 1):
        at, label = f"{where}, row {n}", str(row.get("category", "")).strip().lower()
        if label not in sides:
            raise FormatError(f"{at}: its category is {label!r}, expected positive or negative")
        for name in ("input", "output", *(("output_concept",) if label == "positive" else ())):
            _text(row, name, at)
        sides[label].append(row)
    concepts = list(dict.fromkeys(row["output_concept"] for row in sides["positive"]))
    if concept is not None:
        named = [
            row for row in sides["positive"] if str(concept) in (row["output_concept"], str(row.get("concept_id")))
        ]
        if not named:
            raise FormatError(f"{where} has no concept {concept!r}: it has {', '.join(map(repr, concepts[:8]))}")
        sides["positive"] = named
    elif len(concepts) != 1:
        raise FormatError(f"{where} has {len(concepts)} concepts, such as {concepts[:3]}: say which one by concept=")
    without: dict[str, list[str]] = {}
    for row in sides["negative"]:
        without.setdefault(row["input"], []).append(row["output"])
    records = []
    for row in sides["positive"]:
        others = without.get(row["input"])
        records.append(Record(row["input"], row["output"], others.pop(0) if others else None, "positive"))
    left = [(prompt, output) for prompt, outputs in without.items() for output in outputs]
    return records + [Record(prompt, output, label="negative") for prompt, output in left]


def _set(*names: str) -> frozenset[str]:
    return frozenset(names)


# The first whose columns are all there; the narrower ones come first.
LAYOUTS = (
    _Layout("CAA", _set("question", "answer_matching_behavior", "answer_not_matching_behavior"), _caa),
    _Layout("AxBench", _set("input", "output", "output_concept", "category"), _axbench),
    _Layout("JailbreakBench", _set("goal", "target", "behavior", "category"), _goals),
    _Layout("AdvBench", _set("goal", "target"), _goals),
    _Layout("HarmBench", _set("behavior", "behaviorid"), _harmbench),
    _Layout("Alpaca", _set("instruction", "output"), _alpaca),
)


def _text(row: Row, name: str, where: str, *, optional: bool = False) -> Any:
    value = row.get(name)
    if value is None or (isinstance(value, str) and not value.strip()):
        if optional:
            return None
        raise FormatError(f"{where}: its {name} is blank")
    if not isinstance(value, str):
        raise FormatError(f"{where}: its {name} is of type {type(value).__name__}, expected text")
    return value


# Reading --------------------------------------------------------------------------------------------------------------


def _rows(path: str | os.PathLike[str]) -> tuple[list[dict[str, Any]], str]:
    """The rows of a file with their columns in lower case, and what to call it in errors."""
    if str(path).startswith(DATASETS_PREFIX):
        where, rows = str(path), _of_datasets(str(path)[len(DATASETS_PREFIX) :])
    else:
        where, rows = str(path), _of_file(Path(path))
    if not rows:
        raise FormatError(f"{where} has no rows: expected at least one")
    for n, row in enumerate(rows, 1):
        if not isinstance(row, dict):
            raise FormatError(f"{where}, row {n} is a {type(row).__name__}: expected an object with named columns")
    return [{str(name).strip().lower(): value for name, value in row.items()} for row in rows], where


def _of_file(path: Path) -> list[Any]:
    if not path.is_file():
        raise FileNotFoundError(f"no data at {path}: {'a folder' if path.is_dir() else 'no such file'}")
    if path.suffix not in (".csv", ".tsv", ".json", ".jsonl"):
        kind = kind_of(path)
        what = f" ({kind.words})" if kind else ""
        raise FormatError(
            f"{path} ends in {path.suffix!r}{what}: expected .csv, .tsv, .json or .jsonl"
            f"{f'; {kind.remedy}' if kind else ''}"
        )
    text = read_text(path)
    if path.suffix in (".csv", ".tsv"):
        return _of_table(text, path)
    try:
        if path.suffix == ".jsonl":
            return [read_json(line) for line in text.split("\n") if line.strip()]
        data = read_json(text)
    except ValueError as error:
        raise FormatError(f"{path} is no valid JSON: {error}") from error
    if not isinstance(data, list):
        raise FormatError(f"{path} holds a {type(data).__name__}: expected a list of objects")
    return data


def _of_table(text: str, path: Path) -> list[Any]:
    reader = csv.reader(io.StringIO(text, newline=""), delimiter="\t" if path.suffix == ".tsv" else ",", strict=True)
    try:
        lines = [row for row in reader if any(cell.strip() for cell in row)]
    except csv.Error as error:
        raise FormatError(f"{path}, line {reader.line_num}: no CSV ({error})") from error
    if not lines:
        raise FormatError(f"{path} is empty: expected a header line and rows")
    header = lines[0]
    for n, row in enumerate(lines[1:], 1):
        if len(row) != len(header):
            raise FormatError(
                f"{path}, row {n} has {len(row)} cell(s), the header {len(header)}: is a comma or a quotation mark not "
                "quoted?"
            )
    return [dict(zip(header, row, strict=True)) for row in lines[1:]]


def _of_datasets(name: str) -> list[Any]:
    """The rows of `datasets.load_dataset`: "name", "name:configuration", "name@split", a folder of data files."""
    try:
        import datasets
    except ImportError:
        raise FormatError(
            f"{DATASETS_PREFIX}{name} needs the library datasets: pip install datasets, or give a file"
        ) from None
    name, _, split = name.partition("@")
    name, _, configuration = name.partition(":")
    try:
        found = datasets.load_dataset(name, configuration or None, split=split or "train")
    except Exception as error:  # of many classes, from parsing to the network
        raise FormatError(f"{DATASETS_PREFIX}{name} cannot be loaded by datasets: {error}") from error
    return [dict(row) for row in found]
