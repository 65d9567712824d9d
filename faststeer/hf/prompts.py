"""Contrast prompts: two sets of prompts that differ in what a direction is to stand for, and the token positions at
which to look for it.

Files are read as UTF-8 whatever their kind, and a file that cannot be understood is refused by name and line; nothing
is guessed, skipped or repaired.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from faststeer.files import FormatError, ending_of, file_items, json_file
from faststeer.hf.batching import Prompt, encode, prompt_fault
from faststeer.hf.encoding import has_template
from faststeer.hf.prefix import common_length

ENDINGS = (".json", ".jsonl", ".csv", ".tsv", ".txt")
CHAT_FIELDS = ("messages", "conversation", "chat")
FIELDS = (
    "prompt", "instruction", "text", "goal", "question", "behavior", "query", "forbidden_prompt", *CHAT_FIELDS
)  # fmt: skip
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
        field: the object's field or the column with the prompt; by default the first there is of FIELDS, in any case.
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
    if field is not None and ending == ".txt":
        raise FormatError(f"{path} is plain text and has no field {field!r}: leave field= out")
    items = file_items(path, name)
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
    "Name a colour", "write: ABC", "What is 12 + 7", "Why?", "Stop.", "go on (please)", 'Say "yes"', "x = [1, 2]",
    "Hurry!", "\u043f\u0440\u0438\u0432\u0435\u0442",
)  # fmt: skip


def _prompt(item: Any, where: str, field: str | None) -> Prompt:
    if isinstance(item, dict):
        field = _field_of(item, field, where)
        item, where = item[field], f"{where}, {field!r}"
    if fault := prompt_fault(item):
        raise FormatError(
            f"{where} {fault}: expected a text, an object with one, "
            "or a list of messages {'role': ..., 'content': ...}"
        )
    return item


def _field_of(item: dict[str, Any], field: str | None, where: str) -> str:
    """The field of an object that holds the prompt. One that is named like a chat is none if it holds a text."""
    if field is not None:
        names = [field] if field in item else []
    else:
        by_lower = {name.strip().lower(): name for name in reversed(item)}
        names = [by_lower[name] for name in FIELDS if name in by_lower]
        names = [name for name in names if name.strip().lower() not in CHAT_FIELDS or isinstance(item[name], list)]
    if not names:
        has = ", ".join(map(repr, item)) or "(none)"
        lacks = f"none of {', '.join(FIELDS)}: name the prompt's with field=" if field is None else f"no {field!r}"
        raise FormatError(f"{where} has the fields {has}, and {lacks}")
    return names[0]
