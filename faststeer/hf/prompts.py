"""Contrast prompts: two sets of prompts that differ in what a direction is to stand for, and the token positions at
which to look for it.

Files are read as UTF-8 whatever their kind, and a file that cannot be understood is refused by name and line; nothing
is guessed, skipped or repaired.
"""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from faststeer.file_kinds import kind_of
from faststeer.files import FormatError, read_json, read_text
from faststeer.hf.batching import Prompt, encode, prompt_fault
from faststeer.hf.prefix import common_length

ENDINGS = (".json", ".jsonl", ".csv", ".tsv", ".txt")
TEXT_FIELDS = ("prompt", "instruction", "text", "goal", "question", "behavior", "query", "forbidden_prompt")
CHAT_FIELDS = ("messages", "conversation", "chat")
CONTRASTS = (("positive", "negative"), ("harmful", "harmless"))


def load_prompts(path: str | os.PathLike[str], *, field: str | None = None, name: str | None = None) -> list[Prompt]:
    """Read one set of prompts from a file.

    | ending | holds |
    |---|---|
    | `.json` | a list of texts, of objects with a text field, or of chats; or an object of such lists, of which `name`
    is taken |
    | `.jsonl` | one text, object or chat per line |
    | `.csv`, `.tsv` | a header line and one prompt per row, in the column `field` |
    | `.txt` | one prompt per line, blank lines left out |

    A chat is a list of messages `{"role": ..., "content": ...}`, bare or as the object's field `messages`.

    Args:
        field: the object's field or the column with the prompt; by default the first there is of TEXT_FIELDS, in any
            case, or a CSV file's only column.
        name: which list of a JSON object.

    Raises:
        FileNotFoundError: there is no such file.
        FormatError: another ending, no UTF-8, no JSON or CSV, nothing in it, a missing field or name, or something that
            is no prompt; with file and line.
    """
    path = Path(path)
    text = _read(path)
    if path.suffix == ".json":
        data = _parse_json(text, path)
        if isinstance(data, dict):
            data = _named(data, name, path)
        elif name is not None:
            raise FormatError(
                f"{path} holds no named lists, so there is no {name!r}: expected an object such as {{{name!r}: [...]}}"
            )
        return _prompts(data, path, field)
    if name is not None:
        raise FormatError(f"{path}: only a .json file holds several named lists; leave name={name!r} out")
    if path.suffix in (".csv", ".tsv"):
        return _read_table(text, path, field)
    # Only line feeds end a line: str.splitlines would also cut a prompt at a form feed or a Unicode separator.
    lines = [(n, line) for n, line in enumerate(text.replace("\r\n", "\n").split("\n"), 1) if line.strip()]
    if path.suffix == ".jsonl":
        return [_prompt(_parse_json(line, path, n), f"{path}, line {n}", field) for n, line in lines]
    if field is not None:
        raise FormatError(f"{path} is plain text and has no field {field!r}: leave field= out")
    return [line.strip() for _, line in lines]


def load_contrast(
    path: str | os.PathLike[str], *, positive: str | None = None, negative: str | None = None, field: str | None = None
) -> tuple[list[Prompt], list[Prompt]]:
    """Read both sets from one JSON file, an object of two named lists; each list as in `load_prompts`.

    Args:
        positive, negative: the names of the lists; by default "positive" and "negative", else "harmful" and "harmless",
            whichever the file has.

    Raises:
        FileNotFoundError, FormatError: as `load_prompts`; only one name given; none of the default names in the file.
    """
    path = Path(path)
    if (positive is None) != (negative is None):
        raise ValueError("give both positive= and negative=, or neither")
    if path.suffix != ".json":
        raise FormatError(
            f"{path} cannot hold two named lists: expected a .json file; read two files with load_prompts instead"
        )
    data = _parse_json(_read(path), path)
    if not isinstance(data, dict):
        raise FormatError(
            f"{path} holds a {type(data).__name__}: expected an object of two lists, "
            'such as {"positive": [...], "negative": [...]}'
        )
    pairs = CONTRASTS if positive is None else ((positive, negative),)
    pair = next((pair for pair in pairs if all(name in data for name in pair)), None)
    if pair is None:
        expected = " or ".join(f"{first!r} and {second!r}" for first, second in pairs)
        raise FormatError(
            f"{path} holds {', '.join(map(repr, data)) or 'nothing'}: expected {expected}; "
            "name the lists with positive= and negative="
        )
    first, second = (_prompts(_named(data, name, path), path, field, name) for name in pair)
    return first, second


def post_instruction_positions(tokenizer: Any) -> list[int]:
    """Return the positions, from the end, of the tokens that follow the instruction in every prompt, such as `[-5, -4,
    -3, -2, -1]`.

    Found from the chat template itself: the longest common suffix of the tokens of prompts whose instructions share
    nothing at their ends, so that a token which an instruction's last character merges into is never among them. `[-1]`
    where nothing follows the instruction, or without a chat template. Differences in means are looked for there (arXiv
    2406.11717, 2604.08524).
    """
    if not getattr(tokenizer, "chat_template", None):
        return [-1]
    behind = common_length([ids[::-1] for ids in encode(tokenizer, DISSIMILAR)], 0)
    return list(range(-behind, 0)) or [-1]


# Instructions that end in every way that tokenizers treat apart: letter, capital, digit, marks, bracket, quotation
# mark, another script.
DISSIMILAR = (
    "Name a colour",
    "write: ABC",
    "What is 12 + 7",
    "Why?",
    "Stop.",
    "go on (please)",
    'Say "yes"',
    "x = [1, 2]",
    "Hurry!",
    "\u043f\u0440\u0438\u0432\u0435\u0442",
)


def _read(path: Path) -> str:
    if path.suffix not in ENDINGS:
        kind = kind_of(path) if path.is_file() else None
        more = f"; it is {kind.words}: {kind.remedy}" if kind else ""
        raise FormatError(f"{path} ends in {path.suffix!r}: expected one of {', '.join(ENDINGS)}{more}")
    if not path.is_file():
        raise FileNotFoundError(f"no prompts at {path}: {'a folder' if path.is_dir() else 'no such file'}")
    text = read_text(path)
    if not text.strip():
        raise FormatError(f"{path} is empty: expected at least one prompt")
    return text


def _parse_json(text: str, path: Path, line: int | None = None) -> Any:
    try:
        return read_json(text)
    except json.JSONDecodeError as error:
        raise FormatError(
            f"{path}, line {line or error.lineno}, column {error.colno}: no JSON ({error.msg})"
        ) from error
    except ValueError as error:
        raise FormatError(f"{path}{f', line {line}' if line else ''}: no JSON that can be read: {error}") from error


def _named(data: dict[str, Any], name: str | None, path: Path) -> Any:
    if name not in data:
        wanted = "name= says which one to take" if name is None else f"there is no {name!r}"
        raise FormatError(f"{path} holds an object with {', '.join(map(repr, data)) or 'nothing'}: {wanted}")
    return data[name]


def _prompts(data: Any, path: Path, field: str | None, name: str | None = None) -> list[Prompt]:
    where = f"{path}, {name!r}" if name else str(path)
    if not isinstance(data, list):
        raise FormatError(f"{where} holds a {type(data).__name__}: expected a list of prompts")
    if not data:
        raise FormatError(f"{where} is an empty list: expected at least one prompt")
    return [_prompt(item, f"{where}, item {number}", field) for number, item in enumerate(data, 1)]


def _prompt(item: Any, where: str, field: str | None) -> Prompt:
    if isinstance(item, dict):
        if set(item) == {"role", "content"}:
            raise FormatError(
                f"{where} is a single message: a chat is a list of messages, so put it in one more pair of brackets"
            )
        item = item[_field_of(list(item), field, where, TEXT_FIELDS + CHAT_FIELDS, "field")]
    if fault := prompt_fault(item):
        raise FormatError(
            f"{where} {fault}: expected a text, an object with one, "
            "or a list of messages {'role': ..., 'content': ...}"
        )
    return item


def _field_of(names: list[str], field: str | None, where: str, known: tuple[str, ...], what: str) -> str:
    if field is not None:
        if field in names:
            return field
        raise FormatError(f"{where} has no {what} {field!r}: it has {', '.join(map(repr, names)) or 'none'}")
    by_lower = {name.strip().lower(): name for name in reversed(names)}
    match = next((by_lower[name] for name in known if name in by_lower), None)
    if match is None:
        raise FormatError(
            f"{where} has the {what}s {', '.join(map(repr, names)) or '(none)'}, and none of {', '.join(known)}: "
            "name the prompt's with field="
        )
    return match


def _read_table(text: str, path: Path, field: str | None) -> list[Prompt]:
    rows = table_rows(text, path)
    first, header = next(rows)
    alone = len(header) == 1 and field is None
    column = 0 if alone else header.index(_field_of(header, field, f"{path}, line {first}", TEXT_FIELDS, "column"))
    prompts = [_prompt(row[column], f"{path}, line {line}, column {header[column]!r}", None) for line, row in rows]
    if not prompts:
        raise FormatError(f"{path} has a header and no rows: expected at least one prompt")
    return prompts


def table_rows(text: str, path: Path) -> Iterator[tuple[int, list[str]]]:
    """Yield the line and the cells of the header and of each row of a .csv or .tsv; blank rows are left out.

    Raises:
        FormatError: nothing in it, no CSV, a row with another number of cells than the header.
    """
    reader = csv.reader(io.StringIO(text, newline=""), delimiter="\t" if path.suffix == ".tsv" else ",", strict=True)
    n_cells, start = 0, 1
    try:
        for row in reader:
            line, start = start, reader.line_num + 1
            if not any(cell.strip() for cell in row):
                continue
            if n_cells and len(row) != n_cells:
                raise FormatError(
                    f"{path}, line {line} has {len(row)} cell(s), the header {n_cells}: "
                    "is a comma or a quotation mark not quoted?"
                )
            n_cells = len(row)
            yield line, row
    except csv.Error as error:
        raise FormatError(f"{path}, line {reader.line_num}: no CSV ({error})") from error
    if not n_cells:
        raise FormatError(f"{path} is empty: expected a header line and rows")
