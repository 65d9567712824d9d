"""What `make lint` asks of text, beside spelling: pages in short sentences and plain words, and a docstring that stands
alone for every public name, method and command."""

from __future__ import annotations

import importlib
import inspect
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer

ROOT = Path(__file__).parents[1]
PAGES = (*sorted((ROOT / "docs").glob("*.md")), ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "SECURITY.md")
PUBLIC = ("", "behaviours", "evaluate", "extract", "folding", "formats", "hf", "observe", "ops", "report")
COLUMNS = 160
WORDS = 30  # in a sentence
LINES = 4  # in a paragraph of the README
# Each with what to write instead.
AVOIDED = {
    r"likewise": "repeat what is meant",
    r"see there": "say it here",
    r"another maker": "name the makers",
    r"lest": "so that ... not",
    r"in silence": "without an error",
    r"but for": "except",
    r"whatsoever|wherein|whence|thereof|hitherto": "a shorter word",
    r"utili[sz]e[sd]?": "use",
    r"leverages?": "use",
    r"simply|obviously|of course": "nothing",
    r"in order to": "to",
    r"note that": "nothing",
}


def prose(text: str) -> Iterator[tuple[int, str]]:
    """Paragraphs and list items of a page, with the line they begin at: without code, tables, headings and comments."""
    text = re.sub(r"(?ms)^```.*?^```$|<!--.*?-->", lambda match: "\n" * match[0].count("\n"), text)
    start, lines = 0, []
    for number, line in enumerate([*text.splitlines(), ""], 1):
        item = re.match(r"\s*(?:[-*]|\d+\.) ", line)
        code = line.startswith("    ") and not lines
        if item or code or not line.strip() or line.startswith(("|", "#", "!")):
            if lines:
                yield start, "\n".join(lines)
            start, lines = number, [line[item.end() :]] if item and not code else []
        else:
            start = start if lines else number
            lines.append(line)


def sentences(paragraph: str) -> list[str]:
    """A code span is one word, and the address of a link none."""
    plain = re.sub(r"\]\([^)]*\)", "]", re.sub("`[^`]*`", "code", " ".join(paragraph.split())))
    return re.split(r"(?<=[.!?:;])[\"')*]*\s+", plain)


def faults_of_page(path: Path, text: str) -> Iterator[str]:
    name = path.relative_to(ROOT)
    for number, line in enumerate(text.splitlines(), 1):
        if len(line) > COLUMNS and not line.startswith(("|", "![")) and not re.fullmatch("`[^`]*`", line):
            yield f"{name}:{number}: {len(line)} columns, at most {COLUMNS}"
    for number, paragraph in prose(text):
        if name.name == "README.md" and paragraph.count("\n") >= LINES:
            yield f"{name}:{number}: a paragraph of {paragraph.count(chr(10)) + 1} lines, at most {LINES} in the README"
        for sentence in sentences(paragraph):
            if (length := len(sentence.split())) > WORDS:
                yield f"{name}:{number}: a sentence of {length} words, at most {WORDS}: {sentence}"
            yield from (f"{name}:{number}: {fault}" for fault in faults_of_words(sentence))


def faults_of_words(text: str) -> Iterator[str]:
    for pattern, better in AVOIDED.items():
        if match := re.search(rf"(?i)\b(?:{pattern})\b", text):
            yield f"{match[0]!r}: write {better}"


def public() -> Iterator[tuple[str, Any]]:
    """Every public class, its public methods and properties, and every public function, by name."""
    shown: set[int] = set()
    for package in PUBLIC:
        module = importlib.import_module(".".join(["faststeer", *filter(None, [package])]))
        for name in module.__all__:
            value = getattr(module, name)
            if not (inspect.isclass(value) or inspect.isfunction(value)) or id(value) in shown:
                continue
            shown.add(id(value))
            yield f"{module.__name__}.{name}", value
            if inspect.isclass(value):
                for member, method in vars(value).items():
                    method = getattr(method, "__func__", method)
                    if not member.startswith("_") and (inspect.isfunction(method) or hasattr(method, "fget")):
                        yield f"{module.__name__}.{name}.{member}", method


def faults_of_docstring(name: str, value: Any) -> Iterator[str]:
    text = value.__doc__ or ""
    if not text.strip() or text.startswith(f"{getattr(value, '__name__', '')}("):  # what dataclasses write themselves
        yield f"{name} has no docstring"
    yield from (f"{name}: {fault}" for fault in faults_of_words(text))


def faults_of_commands() -> Iterator[str]:
    from faststeer.cli import app

    for name, command in typer.main.get_command(app).commands.items():  # type: ignore[attr-defined]
        if not command.help:
            yield f"faststeer {name} has no help"
        for parameter in command.params:
            if not parameter.help:
                yield f"faststeer {name} {parameter.opts[0]} has no help"


def main() -> int:
    faults = [fault for path in PAGES for fault in faults_of_page(path, path.read_text(encoding="utf-8"))]
    faults += [fault for name, value in public() for fault in faults_of_docstring(name, value)]
    faults += faults_of_commands()
    print("\n".join(faults), file=sys.stderr)
    return bool(faults)


if __name__ == "__main__":
    sys.exit(main())
