"""YAML and JSON read so that whatever is wrong with a value can be said with its line."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml

Where = tuple[Any, ...]


class Lines:
    """Where in a file each value stands."""

    def __init__(self, path: Path, found: Mapping[Where, int]) -> None:
        self._path, self._found = path, found

    def line(self, where: Where) -> int:
        """The line of a value, or of what it is in."""
        while where and where not in self._found:
            where = where[:-1]
        return self._found.get(where, 1)

    def error(self, where: Where, message: str) -> ValueError:
        return ValueError(f"{self._path}, line {self.line(where)}: {message}")

    def only(self, data: Mapping[str, Any], where: Where, known: Iterable[str]) -> None:
        """Raise for a key that is not known, with the one that may have been meant."""
        known = list(known)
        for key in data:
            if key not in known:
                near = difflib.get_close_matches(str(key), known, 1)
                hint = f"did you mean {near[0]!r}?" if near else f"expected {', '.join(known)}"
                raise self.error((*where, key), f"unknown field {key!r}: {hint}")


def read_lines(path: Path) -> tuple[dict[str, Any], Lines]:
    """An object from a YAML or JSON file, and where its values stand.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: another ending, no UTF-8, no YAML or JSON, no object, a key given twice; with file and line.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no description at {path}: no such file")
    if path.suffix not in (".yaml", ".yml", ".json"):
        raise ValueError(f"{path}: expected a file that ends in .yaml, .yml or .json")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no UTF-8 text: {error}") from error
    try:
        if path.suffix == ".json":
            data = json.loads(text)
            # JSON is YAML, but for tabs between values.
            node = yaml.compose(text.replace("\t", " "), yaml.SafeLoader)
        else:
            node = yaml.compose(text, yaml.SafeLoader)
            data = yaml.safe_load(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}, line {error.lineno}: no valid JSON: {error.msg}") from error
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise ValueError(f"{path}, line {line}: no valid YAML: {error.problem or error}") from error
    except (yaml.YAMLError, RecursionError) as error:
        raise ValueError(f"{path}: no valid YAML: {error}") from error
    found: dict[Where, int] = {}
    if node is not None:
        _walk(path, node, (), found)
    lines = Lines(path, found)
    if not isinstance(data, dict):
        raise lines.error((), "expected an object with fields such as prompts: and vectors:")
    return data, lines


def _walk(path: Path, node: yaml.Node, where: Where, found: dict[Where, int]) -> None:
    found.setdefault(where, node.start_mark.line + 1)
    if isinstance(node, yaml.SequenceNode):
        for i, item in enumerate(node.value):
            _walk(path, item, (*where, i), found)
    elif isinstance(node, yaml.MappingNode):
        seen = set()
        for key, value in node.value:
            if key.value in seen:
                raise ValueError(f"{path}, line {key.start_mark.line + 1}: {key.value!r} is given twice")
            seen.add(key.value)
            inner = (*where, key.value)
            found[inner] = key.start_mark.line + 1
            _walk(path, value, inner, found)
