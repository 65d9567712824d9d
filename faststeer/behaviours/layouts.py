"""Files of the usual data sets, as they lie on disk: AdvBench, HarmBench, JailbreakBench, Alpaca, CAA, AxBench; and
data sets by name, where the library `datasets` is installed.

Which layout a file has is told by its columns, never by its name; a file whose columns are none of them is refused.
Nothing is downloaded here except by `datasets`, when it is asked for by name.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from faststeer.extract.pairs import Pair
from faststeer.files import FormatError, ending_of, file_items

Row = Mapping[str, Any]
HARMBENCH_CONTEXT = "\n\n---\n\n"
DATASETS_PREFIX = "datasets:"


@dataclass(frozen=True)
class DatasetRow:
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


def read_records(path: str | os.PathLike[str], *, concept: str | int | None = None) -> list[DatasetRow]:
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
    for _, needs, read in LAYOUTS:
        if needs <= columns:
            return read(rows, where, concept)
    known = "; ".join(f"{name}: {', '.join(sorted(needs))}" for name, needs, _ in LAYOUTS)
    raise FormatError(f"{where} has the columns {', '.join(sorted(columns))}, which are no known layout's ({known})")


def pairs_of(records: Sequence[DatasetRow]) -> list[Pair]:
    """Return the records that have both completions as pairs.

    Raises:
        ValueError: there is none.
    """
    pairs = [Pair(r.prompt, r.completion, r.rejected) for r in records if r.completion and r.rejected]
    if not pairs:
        raise ValueError("none of the records has two completions: expected a layout with pairs, such as CAA's")
    return pairs


# Layouts --------------------------------------------------------------------------------------------------------------


def _goal(row: Row, where: str) -> DatasetRow:
    return DatasetRow(_text(row, "goal", where), _text(row, "target", where, optional=True))


def _harmbench(row: Row, where: str) -> DatasetRow:
    behavior = _text(row, "behavior", where)
    context = _text(row, "contextstring", where, optional=True)
    return DatasetRow(behavior if not context else context + HARMBENCH_CONTEXT + behavior)


def _alpaca(row: Row, where: str) -> DatasetRow:
    instruction = _text(row, "instruction", where)
    more = _text(row, "input", where, optional=True)
    prompt = instruction if not more else f"{instruction}\n\n{more}"
    return DatasetRow(prompt, _text(row, "output", where, optional=True))


def _caa(row: Row, where: str) -> DatasetRow:
    names = ("question", "answer_matching_behavior", "answer_not_matching_behavior")
    return DatasetRow(*(_text(row, name, where) or "" for name in names))


def _each(read: Callable[[Row, str], DatasetRow]) -> Callable[..., list[DatasetRow]]:
    """A layout in which every row stands for itself."""
    return lambda rows, where, concept: [read(row, f"{where}, row {n}") for n, row in enumerate(rows, 1)]


def _axbench(rows: list[dict[str, Any]], where: str, concept: str | int | None) -> list[DatasetRow]:
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
        records.append(DatasetRow(row["input"], row["output"], others.pop(0) if others else None, "positive"))
    left = [(prompt, output) for prompt, outputs in without.items() for output in outputs]
    return records + [DatasetRow(prompt, output, label="negative") for prompt, output in left]


# Name, columns, and who reads the rows. The first whose columns are all there; the narrower ones come first.
LAYOUTS: tuple[tuple[str, set[str], Callable[..., list[DatasetRow]]], ...] = (
    ("CAA", {"question", "answer_matching_behavior", "answer_not_matching_behavior"}, _each(_caa)),
    ("AxBench", {"input", "output", "output_concept", "category"}, _axbench),
    ("JailbreakBench", {"goal", "target", "behavior", "category"}, _each(_goal)),
    ("AdvBench", {"goal", "target"}, _each(_goal)),
    ("HarmBench", {"behavior", "behaviorid"}, _each(_harmbench)),
    ("Alpaca", {"instruction", "output"}, _each(_alpaca)),
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
        ending_of(Path(path), (".csv", ".tsv", ".json", ".jsonl"), "data")
        where, rows = str(path), [row for _, row in file_items(Path(path))]
    if not rows:
        raise FormatError(f"{where} has no rows: expected at least one")
    for n, row in enumerate(rows, 1):
        if not isinstance(row, dict):
            raise FormatError(f"{where}, row {n} is a {type(row).__name__}: expected an object with named columns")
    return [{str(name).strip().lower(): value for name, value in row.items()} for row in rows], where


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
