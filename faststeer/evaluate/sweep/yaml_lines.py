"""YAML and JSON read so that whatever is wrong with a value can be said with its line."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml

from faststeer.files import UNREADABLE, FormatError, read_text

Where = tuple[Any, ...]
MAX_VALUES = 200_000  # in a description: ten thousand prompts with ids and tags are a third of that
MAX_DEPTH = 50  # values inside values; a chat inside a list of prompts is 5 deep


class Lines:
    """Where in a file each value stands. An alias stands for a copy of what it names: a few lines of them can stand for
    more values than fit into memory, or for a value inside itself."""

    def __init__(self, path: Path, document: yaml.Node | None = None) -> None:
        self._path, self._values = path, 0
        self._lines: dict[Where, int] = {}
        if document is not None:
            self._walk(document, ())

    def line(self, where: Where) -> int:
        """The line of a value, or of what it is in."""
        while where and where not in self._lines:
            where = where[:-1]
        return self._lines.get(where, 1)

    def error(self, where: Where, message: str) -> FormatError:
        return FormatError(f"{self._path}, line {self.line(where)}: {message}")

    def only(self, data: Mapping[str, Any], where: Where, known: Iterable[str]) -> None:
        """Raise for a key that is not known, with the one that may have been meant."""
        known = list(known)
        for key in data:
            if key not in known:
                near = difflib.get_close_matches(str(key), known, 1)
                hint = f"did you mean {near[0]!r}?" if near else f"expected {', '.join(known)}"
                raise self.error((*where, key), f"unknown field {key!r}: {hint}")

    def _walk(self, node: yaml.Node, where: Where) -> None:
        line = node.start_mark.line + 1
        self._lines.setdefault(where, line)
        self._values += 1
        if len(where) > MAX_DEPTH or self._values > MAX_VALUES:
            raise FormatError(
                f"{self._path}, line {line}: more than {MAX_VALUES:,} values, or values more than {MAX_DEPTH} deep (an "
                "alias, as in *name, counts as what it stands for): write fewer"
            )
        if isinstance(node, yaml.SequenceNode):
            for i, item in enumerate(node.value):
                self._walk(item, (*where, i))
        elif isinstance(node, yaml.MappingNode):
            seen = set()
            for key, value in node.value:
                start = key.start_mark.line + 1
                if not isinstance(key, yaml.ScalarNode):
                    raise FormatError(f"{self._path}, line {start}: a field's name is a list or an object")
                if key.value in seen:
                    raise FormatError(f"{self._path}, line {start}: {key.value!r} is given twice")
                seen.add(key.value)
                inner = (*where, key.value)
                self._lines[inner] = start
                self._walk(value, inner)


def read_lines(path: Path) -> tuple[dict[str, Any], Lines]:
    """An object from a YAML or JSON file, and where its values stand.

    Raises:
        FileNotFoundError: there is no such file.
        FormatError: another ending, no UTF-8, no YAML or JSON, no object, a key given twice, too many values; with
            file and line.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no description at {path}: no such file")
    if path.suffix not in (".yaml", ".yml", ".json"):
        raise FormatError(f"{path}: expected a file that ends in .yaml, .yml or .json")
    text = read_text(path)
    kind, lines = "JSON" if path.suffix == ".json" else "YAML", Lines(path)
    try:
        data = json.loads(text) if kind == "JSON" else None
        # JSON is YAML, but for tabs between values.
        node = yaml.compose(text.replace("\t", " ") if kind == "JSON" else text, _Loader)
        lines = Lines(path, node)
        if kind == "YAML":
            data = yaml.load(text, _Loader)
    except FormatError:
        raise
    except json.JSONDecodeError as error:
        raise FormatError(f"{path}, line {error.lineno}: no valid JSON: {error.msg}") from error
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise FormatError(f"{path}, line {line}: no valid {kind}: {error.problem or error}") from error
    except (yaml.YAMLError, *UNREADABLE) as error:
        raise FormatError(f"{path}: no valid {kind}: {str(error) or type(error).__name__}") from error
    if not isinstance(data, dict):
        raise lines.error((), "expected an object with fields such as prompts: and vectors:")
    return data, lines


class _Loader(yaml.SafeLoader):
    """Refuses what is nested too deeply while it reads: its time grows with the square of the depth."""

    def fetch_flow_collection_start(self, token: Any) -> None:
        if self.flow_level >= MAX_DEPTH:
            raise yaml.scanner.ScannerError(None, None, f"more than {MAX_DEPTH} brackets deep", self.get_mark())
        super().fetch_flow_collection_start(token)
