"""Contrast prompts: two sets of prompts that differ in what a direction is to stand for, and the token positions at
which to look for it.

Files are read as UTF-8 whatever their kind, and a file that cannot be understood is refused by name and line; nothing
is guessed, skipped or repaired.
"""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from faststeer.file_kinds import kind_of
from faststeer.files import FormatError, json_file, json_lines, read_text
from faststeer.hf.batching import Prompt, encode, prompt_fault
from faststeer.hf.encoding import has_template
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
            case.
        name: which list of a JSON object.

    Raises:
        FileNotFoundError: there is no such file.
        FormatError: another ending, no UTF-8, no JSON or CSV, nothing in it, a missing field or name, or something that
            is no prompt; with file and line.
    """
    path = Path(path)
    ending = ending_of(path, ENDINGS, "prompts")
    if name is not None and ending != ".json":
        raise FormatError(f"{path}: only a .json file holds several named lists; leave name={name!r} out")
    if ending == ".jsonl":
        items = json_lines(path)
    elif ending == ".json":
        items = _list_items(path, name)
    elif ending != ".txt":
        items = _column(path, field)
    elif field is not None:
        raise FormatError(f"{path} is plain text and has no field {field!r}: leave field= out")
    else:  # only line feeds end a line: str.splitlines would also cut a prompt at a form feed or a Unicode separator
        lines = enumerate(read_text(path).replace("\r\n", "\n").split("\n"), 1)
        items = [(f"{path}, line {number}", line.strip()) for number, line in lines if line.strip()]
    if not items:
        raise FormatError(f"{path}{f', {name!r}' if name else ''} holds no prompts: expected at least one")
    return [_prompt(item, where, field) for where, item in items]


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
    data = json_file(path) if ending_of(path, ENDINGS, "prompts") == ".json" else None
    names = list(data) if isinstance(data, dict) else []
    pairs = CONTRASTS if positive is None else ((positive, negative),)
    pair = next((pair for pair in pairs if set(pair) <= set(names)), None)
    if pair is None:
        expected = " or ".join(f"{first!r} and {second!r}" for first, second in pairs)
        raise FormatError(
            f"{path} holds {', '.join(map(repr, names)) or 'no named lists'}: expected a .json file, an object with "
            f"the lists {expected}; name them with positive= and negative=, or read two files with load_prompts"
        )
    first, second = (load_prompts(path, field=field, name=name) for name in pair)
    return first, second


def post_instruction_positions(tokenizer: Any) -> list[int]:
    """Return the positions, from the end, of the tokens that follow the instruction in every prompt, such as `[-5, -4,
    -3, -2, -1]`.

    Found from the chat template itself: the longest common suffix of the tokens of prompts whose instructions share
    nothing at their ends, so that a token which an instruction's last character merges into is never among them. `[-1]`
    where nothing follows the instruction, or without a chat template. Differences in means are looked for there (arXiv
    2406.11717, 2604.08524).
    """
    if not has_template(tokenizer):
        return [-1]
    behind = common_length([ids[::-1] for ids in encode(tokenizer, DISSIMILAR, what="example prompts")], 0)
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


def ending_of(path: Path, endings: Sequence[str], what: str) -> str:
    """Return a file's ending in lower case.

    Raises:
        FileNotFoundError: there is no such file, of `what`.
        FormatError: an ending that is none of these, with what the file is.
    """
    if not path.is_file() and (path.is_dir() or path.suffix.lower() in endings):
        raise FileNotFoundError(f"no {what} at {path}: {'a folder' if path.is_dir() else 'no such file'}")
    if path.suffix.lower() not in endings:
        kind = kind_of(path) if path.is_file() else None
        more = f"; it is {kind.words}: {kind.remedy}" if kind else ""
        raise FormatError(f"{path} ends in {path.suffix!r}: expected one of {', '.join(endings)}{more}")
    return path.suffix.lower()


def _list_items(path: Path, name: str | None) -> list[tuple[str, Any]]:
    """The items of a JSON list, or of the named one of several, each behind its place in words."""
    data, where = json_file(path), str(path) if name is None else f"{path}, {name!r}"
    if isinstance(data, dict):
        if name not in data:
            wanted = "name= says which one to take" if name is None else f"there is no {name!r}"
            raise FormatError(f"{path} holds an object with {', '.join(map(repr, data)) or 'nothing'}: {wanted}")
        data = data[name]
    elif name is not None:
        raise FormatError(
            f"{path} holds no named lists, so there is no {name!r}: expected an object such as {{{name!r}: [...]}}"
        )
    if not isinstance(data, list):
        raise FormatError(f"{where} holds a {type(data).__name__}: expected a list of prompts")
    return [(f"{where}, item {number}", item) for number, item in enumerate(data, 1)]


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


def _column(path: Path, field: str | None) -> list[tuple[str, Any]]:
    """The cells of a table's column of prompts, each behind its place in words."""
    rows = table_rows(path)
    first, header = next(rows)
    column = header.index(_field_of(header, field, f"{path}, line {first}", TEXT_FIELDS, "column"))
    return [(f"{path}, line {line}, column {header[column]!r}", row[column]) for line, row in rows]


def table_rows(path: Path) -> Iterator[tuple[int, list[str]]]:
    """Yield the line and the cells of the header and of each row of a .csv or .tsv; blank rows are left out.

    Raises:
        FormatError: nothing in it, no CSV, a column named twice, a row with another number of cells than the header.
    """
    delimiter = "\t" if path.suffix.lower() == ".tsv" else ","
    reader = csv.reader(io.StringIO(read_text(path), newline=""), delimiter=delimiter, strict=True)
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
            names = [name for cell in row if (name := cell.strip().lower())]
            if not n_cells and len(set(names)) < len(names):
                raise FormatError(f"{path}, line {line} names a column twice: {', '.join(map(repr, row))}")
            n_cells = len(row)
            yield line, row
    except csv.Error as error:
        raise FormatError(f"{path}, line {reader.line_num}: no CSV ({error}); mend it, or write .jsonl") from error
    if not n_cells:
        raise FormatError(f"{path} is empty: expected a header line and rows")
