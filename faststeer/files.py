"""Files: writing them so that nobody ever reads half of one, and reading them so that whatever is in them, the reader
gets what the file says or a `FormatError`. And the folder for what is kept between runs."""

from __future__ import annotations

import csv
import errno
import glob
import io
import json
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from faststeer.file_kinds import OtherKind, expect, kind_of

fcntl: Any
try:
    import fcntl
except ImportError:  # no locks on Windows: there what a killed process leaves stays
    fcntl = None

# What libraries raise on bytes that make no sense to them. No OSError: that the disk fails says nothing of the content.
UNREADABLE = (
    ValueError,
    TypeError,
    LookupError,
    AttributeError,
    ArithmeticError,
    RuntimeError,  # RecursionError is one
    MemoryError,
    SafetensorError,
)
REMEDIES = {
    errno.ENOSPC: "make room on its disk and do it again",
    errno.EDQUOT: "your quota on its disk is used up: make room and do it again",
    errno.EFBIG: "it would be larger than this process may write: raise the limit (ulimit -f) and do it again",
    errno.EMFILE: "this process has too many open files: raise the limit (ulimit -n) and do it again",
    errno.ENFILE: "this machine has too many open files: close some programs and do it again",
    errno.EROFS: "its disk can only be read: name another folder",
    errno.EACCES: "check the permissions of its folder, or name another one",
    errno.EPERM: "check the permissions of its folder, or name another one",
    errno.ENAMETOOLONG: "give it a shorter name",
    errno.ENOTDIR: "a part of its path is a file: name another folder",
    errno.EEXIST: "a part of its path is a file: name another folder",
    errno.EISDIR: "there is a folder of that name: give it another name",
}


class FormatError(ValueError):
    """A file or a text that is damaged, of another kind, or with values that cannot be used. The message names it and
    says how to fix it."""


@contextmanager
def reading(fault: str, mend: str, kind: type[FormatError] = FormatError) -> Iterator[None]:
    """Turn what is raised inside by data that makes no sense into a FormatError (`kind`) "<fault> (<reason>): <mend>";
    for a file of another kind, with that one's remedy. What is one already, and an OSError, go through as they are."""
    try:
        yield
    except kind:
        raise
    except OtherKind as error:  # what is to be done about another kind of file is known better
        raise kind(f"{fault} (it is {error.kind.words}): {error.kind.remedy}") from error
    except UNREADABLE as error:
        reason = f"it lacks {error}" if type(error) is KeyError else str(error) or type(error).__name__
        raise kind(f"{fault} ({reason[:500]}): {mend}") from error


def read_text(path: Path) -> str:
    """The text of a file in UTF-8, JSON among it.

    Raises:
        FormatError: it is another kind of file, or no UTF-8.
        OSError: it cannot be read.
    """
    with reading(f"{path} cannot be read as text", "save it as UTF-8"):
        expect(path, "json", "empty")
        data = path.read_bytes()
    if b"\0" in data:
        line = data.count(b"\n", 0, data.index(b"\0")) + 1
        raise FormatError(f"{path}, line {line}: it holds zero bytes, as text in UTF-16 does; save the file as UTF-8")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line, byte = data.count(b"\n", 0, error.start) + 1, data[error.start]
        raise FormatError(
            f"{path}, line {line}: byte {error.start} (0x{byte:02x}) is no UTF-8; save the file as UTF-8"
        ) from error


def read_json(text: str | bytes) -> Any:
    """What JSON says.

    Raises:
        ValueError: no JSON; nested too deeply; an object with a name given twice, of which one would be lost.
    """
    try:
        return json.loads(text, object_pairs_hook=_object)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def json_file(path: Path) -> Any:
    """What a JSON file says.

    Raises:
        FormatError, OSError: as `read_text`; no JSON, with line and column.
    """
    return _json(read_text(path), path)


def json_lines(path: Path) -> list[tuple[str, Any]]:
    """What each line of a JSONL says, with the line's name for errors, such as "a.jsonl, line 3". Blank lines are left
    out; only line feeds end a line, since texts may hold other separators.

    Raises:
        FormatError, OSError: as `read_text`; a line that is no JSON.
    """
    return [(f"{path}, line {number}", _json(line, path, number)) for number, line in _lines(path)]


def _lines(path: Path) -> list[tuple[int, str]]:
    lines = enumerate(read_text(path).replace("\r\n", "\n").split("\n"), 1)
    return [(number, line) for number, line in lines if line.strip()]


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


def file_items(path: Path, name: str | None = None) -> list[tuple[str, Any]]:
    """What a file holds, each item behind its place in words, such as "a.csv, line 3".

    Args:
        path: a .json (the items of its list, of several the one called `name`), a .jsonl (the value of each line), a
            .csv or .tsv (each row as an object), or a text (each line); what is blank is left out.

    Raises:
        FormatError, OSError: as `read_text`; the file cannot be read as that; there is no such list.
    """
    ending = path.suffix.lower()
    if ending == ".jsonl":
        return json_lines(path)
    if ending in (".csv", ".tsv"):
        (_, header), *rows = _table_rows(path)
        return [(f"{path}, line {line}", dict(zip(header, row, strict=True))) for line, row in rows]
    if ending != ".json":
        return [(f"{path}, line {number}", line.strip()) for number, line in _lines(path)]
    data, where = json_file(path), str(path) if name is None else f"{path}, {name!r}"
    if isinstance(data, dict):
        if name not in data:
            remedy = "expected a list; load_prompts takes one of several by name=" if name is None else f"no {name!r}"
            raise FormatError(f"{path} holds an object with {', '.join(map(repr, data)) or 'nothing'}: {remedy}")
        data = data[name]
    elif name is not None:
        raise FormatError(
            f"{path} holds no named lists, so there is no {name!r}: expected an object such as {{{name!r}: [...]}}"
        )
    if not isinstance(data, list):
        raise FormatError(f"{where} holds a {type(data).__name__}: expected a list")
    return [(f"{where}, item {number}", item) for number, item in enumerate(data, 1)]


def _table_rows(path: Path) -> Iterator[tuple[int, list[str]]]:
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


def _json(text: str, path: Path, line: int | None = None) -> Any:
    """What a file's text says, or that of one line of it."""
    try:
        return read_json(text)
    except ValueError as error:
        at, why = (f", line {line}" if line else ""), str(error)
        if isinstance(error, json.JSONDecodeError):
            at, why = f", line {line or error.lineno}, column {error.colno}", error.msg
            why += "; is it one value per line? Name it .jsonl" if why == "Extra data" and line is None else ""
        raise FormatError(f"{path}{at}: no valid JSON: {why}") from error


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    data = dict(pairs)
    if len(data) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"{twice[:60]!r} is given twice in one object: leave one of them out")
    return data


@contextmanager
def writing(path: str | os.PathLike[str]) -> Iterator[None]:
    """Say of an OSError raised inside which file could not be written, why, and how to mend it."""
    try:
        yield
    except OSError as error:
        # What is explained already, of a file inside a folder, is explained anew for the folder.
        first = error.__cause__ if isinstance(error.__cause__, OSError) else error
        remedy = REMEDIES.get(first.errno or 0, "what was there before is unchanged")
        explained = type(error)(f"{path} cannot be written ({first.strerror or first}): {remedy}")
        explained.errno = first.errno
        raise explained from first
    except SafetensorError as error:  # it wraps what the system says
        number = re.search(r"os error (\d+)", str(error))
        remedy = REMEDIES.get(int(number[1]) if number else 0, "what was there before is unchanged")
        raise OSError(f"{path} cannot be written ({error}): {remedy}") from error


def write_atomically(path: str | os.PathLike[str], content: bytes | str) -> None:
    """Write `content` to a temporary file beside `path`, flush it to disk and rename it: after a crash, a kill or
    Ctrl-C there is the old file or the new one. What a killed process left there is removed.

    A link stays one, and its target is written.

    Raises:
        OSError: it cannot be written (a full disk, no permission, a limit), with the path, the reason and the remedy.
    """
    path = Path(os.path.realpath(path))
    data = content.encode() if isinstance(content, str) else content
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary, descriptor = temporary_beside(path)
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
                temporary.chmod(0o666 & ~_umask())  # mkstemp makes private files
                os.replace(temporary, path)  # with the lock held
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise


@contextmanager
def new_folder(folder: str | os.PathLike[str]) -> Iterator[Path]:
    """A folder that appears under its name when the block ends well, and not at all otherwise.

    Raises:
        ValueError: the folder is there and not empty.
        OSError: it cannot be written.
    """
    path = Path(os.path.realpath(folder))
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise ValueError(f"{path} is there already: name a new folder")
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary, descriptor = temporary_beside(path, folder=True)
        try:
            yield temporary
            for file in temporary.rglob("*"):
                if file.is_file():
                    with file.open("rb+") as opened:
                        os.fsync(opened.fileno())
            temporary.chmod(0o777 & ~_umask())
            if path.is_dir():
                path.rmdir()
            temporary.rename(path)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        finally:
            os.close(descriptor)


def _umask() -> int:
    umask = os.umask(0)
    os.umask(umask)
    return umask


def temporary_beside(path: Path, folder: bool = False) -> tuple[Path, int]:
    """A new file (or folder) beside `path` that is to take its place, and its descriptor, which holds a lock on it: it
    is in use until that is closed. What nobody uses any more, since its process was killed, is removed."""
    names: dict[str, Any] = {"dir": path.parent, "prefix": f".{path.name}.", "suffix": ".part"}
    for other in path.parent.glob(f".{glob.escape(path.name)}.????????.part"):
        _remove_unused(other)
    while True:
        if folder:
            temporary = tempfile.mkdtemp(**names)
            descriptor = os.open(temporary, os.O_RDONLY)
        else:
            descriptor, temporary = tempfile.mkstemp(**names)
        if fcntl is not None:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        if os.fstat(descriptor).st_nlink:  # nobody took it for unused before it was locked
            return Path(temporary), descriptor
        os.close(descriptor)


def _remove_unused(temporary: Path) -> None:
    if fcntl is None:
        return
    with suppress(OSError):  # in use, or removed by another process in this moment
        descriptor = os.open(temporary, os.O_RDONLY)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(temporary) if temporary.is_dir() else temporary.unlink()
        finally:
            os.close(descriptor)


def cache_folder() -> Path:
    """Return the folder for what can be computed again: `FASTSTEER_CACHE`, else `faststeer` in the user's cache folder
    (`XDG_CACHE_HOME` or the platform's own)."""
    if folder := os.environ.get("FASTSTEER_CACHE"):
        return Path(folder)
    if base := os.environ.get("XDG_CACHE_HOME"):
        return Path(base) / "faststeer"
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local") / "faststeer" / "Cache"
    return Path.home() / ("Library/Caches" if sys.platform == "darwin" else ".cache") / "faststeer"
