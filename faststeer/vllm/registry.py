"""Vectors and plans that requests name: held in memory, or lying in the one folder that a server may read.

What is registered is held by value, so that removing a vector never changes a plan that used it. Nothing outside the
folder is ever opened, and nothing but safetensors and JSON is ever read: never a pickle.
"""

from __future__ import annotations

import os
import re
import stat
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Generic, NamedTuple, TypeVar

from faststeer.file_kinds import expect
from faststeer.files import reading
from faststeer.plan import Plan
from faststeer.sparse import FORMAT as SPARSE
from faststeer.sparse import SparseVector
from faststeer.tensor_files import file_words
from faststeer.vector import SteeringVector
from faststeer.vllm.switch import NONE

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
VECTOR_ENDING, PLAN_ENDING = ".safetensors", ".json"
CACHED_FILES = 256


class Stamp(NamedTuple):
    """A file as it was when it was read."""

    path: Path
    number: int  # of its inode: a file that takes its place has another
    modified: int  # ns
    changed: int  # ns; nobody can set it
    size: int

    @classmethod
    def of(cls, path: Path) -> Stamp:
        status = path.stat()
        return cls(path, status.st_ino, status.st_mtime_ns, status.st_ctime_ns, status.st_size)

    def holds(self) -> bool:
        try:
            return Stamp.of(self.path) == self
        except OSError:
            return False


Item = TypeVar("Item")


def _open(path: str, _: int) -> int:
    return os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC)


class Folder(Generic[Item]):
    """Files under one folder, read once and again when they change.

    Args:
        root: the folder.
        read: makes an item of a file's content and path.
        max_bytes: larger files are refused unread.
    """

    def __init__(self, root: Path, read: Callable[[bytes, Path], Item], max_bytes: int) -> None:
        self.root, self._read, self._max_bytes = root.resolve(), read, max_bytes
        self._seen: dict[Path, tuple[Stamp, Item]] = {}

    def get(self, relative: str) -> tuple[Item, Stamp]:
        """The item of a file.

        Raises:
            ValueError: the path leaves the folder (also by a link), is no plain file, is too large, or cannot be read.
        """
        path = self._inside(relative)
        try:
            stamp = Stamp.of(path)
            if path in self._seen and self._seen[path][0] == stamp:
                return self._seen[path][1], stamp
            data = self._bytes(path, relative)
        except OSError as error:
            raise ValueError(f"the file {relative!r} cannot be read: {error.strerror}") from error
        try:
            item = self._read(data, path)
        except ValueError as error:
            raise ValueError(f"the file {relative!r}: {error}") from error
        if len(self._seen) >= CACHED_FILES:
            self._seen.pop(next(iter(self._seen)))
        self._seen[path] = (stamp, item)
        return item, stamp

    def _inside(self, relative: str) -> Path:
        try:
            path = (self.root / relative).resolve()
        except (OSError, ValueError, RuntimeError) as error:  # a zero byte, links in a circle
            raise ValueError(f"{relative[:200]!r} is no path of a file") from error
        # Absolute paths and `..` are told by where they lead, as links are.
        if not path.is_relative_to(self.root):
            raise ValueError(
                f"the path {relative[:200]!r} leads out of the server's folder: name a file in it, relative to it"
            )
        return path

    def _bytes(self, path: Path, relative: str) -> bytes:
        # A pipe would block in open, a link could have been put there meanwhile.
        with open(path, "rb", opener=_open) as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise ValueError(f"{relative!r} is no plain file")
            data = b"" if status.st_size > self._max_bytes else file.read(self._max_bytes + 1)
        if status.st_size > self._max_bytes or len(data) > self._max_bytes:
            raise ValueError(f"the file {relative!r} is larger than the {self._max_bytes:,} bytes that are allowed")
        return data


class Registry:
    """Vectors and plans by name.

    A name that is not registered is looked for in the folder: the vector `refusal` in `refusal.safetensors`, the plan
    `calm` in `calm.json`. All methods may be called from several threads.

    Args:
        folder: the folder that requests may name files of; None: no files.
        max_file_bytes: of one file.
        max_bytes: of all registered vectors and plans together, counted as their files would be.
    """

    def __init__(self, folder: Path | None = None, max_file_bytes: int = 2**26, max_bytes: int = 2**30) -> None:
        if folder is not None and not folder.is_dir():
            raise ValueError(f"there is no folder {folder}: make it, or name another one")
        self.max_file_bytes, self.max_bytes = max_file_bytes, max_bytes
        self._lock = threading.RLock()
        self._vectors: dict[str, SteeringVector] = {}
        self._plans: dict[str, Plan] = {}
        self._bytes: dict[tuple[str, str], int] = {}
        self._vector_files = Folder(folder, _vector, max_file_bytes) if folder else None
        self._plan_files = Folder(folder, _text, max_file_bytes) if folder else None
        self.version = 0  # grows with every change in memory

    def vector(self, name: str) -> tuple[SteeringVector, Stamp | None]:
        """A registered vector, or the folder's; then also the file as it was read.

        Raises:
            ValueError: nothing of that name; the message lists what there is.
        """
        with self._lock:
            if name in self._vectors:
                return self._vectors[name], None
            if self._vector_files and self._has(self._vector_files, name, VECTOR_ENDING):
                return self._vector_files.get(name + VECTOR_ENDING)
            raise ValueError(f"no vector is registered as {name[:200]!r}; known: {_listed(self.vectors())}")

    def vector_file(self, relative: str) -> tuple[SteeringVector, Stamp]:
        """The vector of a file in the folder (ValueError: see `Folder.get`)."""
        if not self._vector_files:
            raise ValueError("this server reads no files: start it with a folder (docs/vllm.md), or send the values")
        with self._lock:
            return self._vector_files.get(relative)

    def plan(self, name: str) -> tuple[Plan | str, Stamp | None]:
        """A registered plan, or the text of the folder's; then also the file as it was read.

        Raises:
            ValueError: nothing of that name; the message lists what there is.
        """
        with self._lock:
            if name in self._plans:
                return self._plans[name], None
            if self._plan_files and self._has(self._plan_files, name, PLAN_ENDING):
                return self._plan_files.get(name + PLAN_ENDING)
            raise ValueError(f"no plan is registered as {name[:200]!r}; known: {_listed(self.plans())}")

    def vectors(self) -> list[str]:
        """Names that requests may use for vectors."""
        with self._lock:
            return sorted({*self._vectors, *self._in_folder(VECTOR_ENDING)})

    def plans(self) -> list[str]:
        """Names that requests may use for plans."""
        with self._lock:
            return sorted({*self._plans, *self._in_folder(PLAN_ENDING)})

    def register_vector(self, name: str, vector: SteeringVector) -> None:
        """Hold a vector under a name, in place of the one that had it.

        Raises:
            ValueError: no name, or more bytes than are allowed.
        """
        if not isinstance(vector, SteeringVector):
            raise ValueError(f"expected a SteeringVector, got {type(vector).__name__}")
        size = sum(direction.numel() * 4 for direction in vector.directions.values())
        self._register("vector", self._vectors, name, vector, size)

    def register_plan(self, name: str, plan: Plan) -> None:
        """Hold a plan, with its vectors by value, under a name, in place of the one that had it.

        Raises:
            ValueError: no name, or more bytes than are allowed.
        """
        if not isinstance(plan, Plan):
            raise ValueError(f"expected a Plan, got {type(plan).__name__}")
        self._register("plan", self._plans, name, plan, len(plan.to_json(inline=True)))

    def _register(self, kind: str, held: dict[str, Item], name: str, item: Item, size: int) -> None:
        check_name(name)
        with self._lock:
            others = sum(self._bytes.values()) - self._bytes.get((kind, name), 0)
            if others + size > self.max_bytes:
                raise ValueError(
                    f"{name!r} would make {others + size:,} bytes of registered vectors and plans, more than the "
                    f"{self.max_bytes:,} that are allowed: remove some"
                )
            held[name], self._bytes[kind, name] = item, size
            self.version += 1

    def remove_vector(self, name: str) -> None:
        """Forget a registered vector; plans that use it keep its values (ValueError: there is none)."""
        self._remove("vector", self._vectors, name)

    def remove_plan(self, name: str) -> None:
        """Forget a registered plan; requests that run under it go on (ValueError: there is none)."""
        self._remove("plan", self._plans, name)

    def _remove(self, kind: str, held: dict[str, Item], name: str) -> None:
        with self._lock:
            if name not in held:
                raise ValueError(f"no {kind} is registered as {name[:200]!r}; registered: {_listed(sorted(held))}")
            del held[name], self._bytes[kind, name]
            self.version += 1

    def _in_folder(self, ending: str) -> list[str]:
        if not self._vector_files:
            return []
        names = (path.name.removesuffix(ending) for path in self._vector_files.root.glob(f"*{ending}"))
        return [name for name in names if NAME.fullmatch(name)]

    @staticmethod
    def _has(files: Folder[Item], name: str, ending: str) -> bool:
        return NAME.fullmatch(name) is not None and (files.root / (name + ending)).is_file()


def check_name(name: object) -> str:
    """Return `name` if it can be one, else raise ValueError."""
    if not isinstance(name, str) or not NAME.fullmatch(name) or name == NONE:
        raise ValueError(
            f"{str(name)[:200]!r} is no name: expected a letter or digit, then at most 127 letters, digits, '.', '_' "
            f"or '-', and not {NONE!r}, which is what a request without a plan says"
        )
    return name


def read_vector(data: bytes, what: str = "the data", most: int | None = None) -> SteeringVector:
    """A vector of a safetensors file's content (ValueError: damaged, another kind of file, or, where `most` is said, a
    sparse vector that would have more values than these when it is dense)."""
    with reading(f"{what} is no safetensors file, and a server reads nothing else", "faststeer convert makes one"):
        expect(data, "safetensors")
        format = file_words(data).get("format")
    if format != SPARSE:
        return SteeringVector.from_bytes(data, what)
    sparse = SparseVector.from_bytes(data, what)
    if most is not None and (n := len(sparse.layers) * sparse.hidden_size) > most:
        raise ValueError(f"{what} stands for {n:,} values, more than the {most:,} that a vector of this model has")
    return sparse.dense()


def _vector(data: bytes, path: Path) -> SteeringVector:
    vector = read_vector(data, "its content")
    vector.belongs_to(path, data)
    return vector


def _text(data: bytes, path: Path) -> str:
    expect(data, "json", "empty")
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise ValueError("it is no UTF-8 text") from error


def _listed(names: list[str]) -> str:
    shown = ", ".join(names[:20]) or "none"
    return shown + (f" and {len(names) - 20} more" if len(names) > 20 else "")
