"""Where a sweep's rows are kept: one SQLite file, written row by row, shared by any number of processes of a machine.

Every row is a transaction in a write-ahead log, so that a killed process leaves all rows it had finished and no half of
one. A run is known by the digest of everything its answers depend on; rows of different runs lie side by side in one
file and never mix. The tables are described in docs/evaluate.md.
"""

from __future__ import annotations

import json
import os
import re
import socket
import sqlite3
import time
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from faststeer.algebra import random_like
from faststeer.evaluate.sweep.description import Setting, Sweep
from faststeer.evaluate.sweep.projections import unpacked
from faststeer.file_kinds import expect
from faststeer.files import FormatError, read_json, reading, writing
from faststeer.plan import Plan
from faststeer.vector import SteeringVector

FORMAT = 2
APPLICATION = 0x66737377  # "fssw", in the file's header
LEASE = 60.0  # seconds without a sign of life after which another process takes a unit over
BUSY = 60.0  # seconds to wait for another process's transaction

SCHEMA = """
CREATE TABLE runs (
    run TEXT PRIMARY KEY, created REAL NOT NULL, chunk INTEGER NOT NULL, description TEXT NOT NULL,
    versions TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE vectors (run TEXT, name TEXT, control INTEGER, data BLOB NOT NULL, PRIMARY KEY (run, name, control));
CREATE TABLE settings (
    run TEXT, setting INTEGER, name TEXT NOT NULL, kind TEXT NOT NULL, vector TEXT NOT NULL, layers TEXT NOT NULL,
    coefficient REAL, control INTEGER, plan TEXT, PRIMARY KEY (run, setting)) WITHOUT ROWID;
CREATE TABLE prompts (
    run TEXT, prompt INTEGER, id TEXT NOT NULL, tag TEXT NOT NULL, content TEXT NOT NULL, PRIMARY KEY (run, prompt)
    ) WITHOUT ROWID;
CREATE TABLE answers (
    run TEXT, setting INTEGER, prompt INTEGER, chunk INTEGER NOT NULL, text TEXT NOT NULL, tokens INTEGER NOT NULL,
    ids BLOB NOT NULL, finish TEXT NOT NULL, error TEXT, PRIMARY KEY (run, setting, prompt)) WITHOUT ROWID;
CREATE INDEX answers_by_chunk ON answers (run, chunk);
CREATE TABLE judges (
    run TEXT, judge TEXT, name TEXT NOT NULL, shows REAL, identity TEXT NOT NULL, PRIMARY KEY (run, judge)
    ) WITHOUT ROWID;
CREATE TABLE verdicts (
    run TEXT, judge TEXT, setting INTEGER, prompt INTEGER, label TEXT, score REAL, parts TEXT, raw TEXT,
    PRIMARY KEY (run, judge, setting, prompt)) WITHOUT ROWID;
CREATE TABLE effects (
    run TEXT, effect TEXT, setting INTEGER, item INTEGER, kl REAL, cross_entropy REAL, tokens INTEGER, correct INTEGER,
    PRIMARY KEY (run, effect, setting, item)) WITHOUT ROWID;
CREATE TABLE directions (
    run TEXT, direction INTEGER, vector TEXT NOT NULL, control INTEGER, layer INTEGER, PRIMARY KEY (run, direction)
    ) WITHOUT ROWID;
CREATE TABLE tokens (
    run TEXT, setting INTEGER, prompt INTEGER, of_prompt INTEGER NOT NULL, texts TEXT NOT NULL,
    PRIMARY KEY (run, setting, prompt)) WITHOUT ROWID;
CREATE TABLE projections (
    run TEXT, setting INTEGER, prompt INTEGER, direction INTEGER, scale REAL NOT NULL, data BLOB NOT NULL,
    PRIMARY KEY (run, setting, prompt, direction));
CREATE TABLE units (
    run TEXT, unit TEXT, number INTEGER NOT NULL, needs TEXT, done INTEGER NOT NULL DEFAULT 0, worker TEXT, host TEXT,
    pid INTEGER, seen REAL, PRIMARY KEY (run, unit)) WITHOUT ROWID;
"""


# The type of each column; a name has the same type in every table.
_TYPES = {
    name: {"TEXT": str, "INTEGER": int, "REAL": float, "BLOB": bytes}[kind]
    for name, kind in re.findall(r"(\w+) (TEXT|INTEGER|REAL|BLOB)\b", SCHEMA)
}
# Columns that hold JSON, and what is in it.
_JSON: dict[str, type | tuple[type, ...]] = {
    "description": dict, "versions": dict, "layers": list, "content": (str, list), "parts": dict, "texts": list,
}  # fmt: skip


class StoreError(FormatError):
    """The store cannot be used as it is; the message says why and what to do. What was in it is unchanged."""


class Store(AbstractContextManager["Store"]):
    """An open store. Use it in a `with` block, or close it.

    Args:
        path: the file; made where there is none (with its folder), unless `create` is False.

    Raises:
        FileNotFoundError: no such file, with `create=False`.
        StoreError: another kind of file, a store of another version of faststeer.
    """

    def __init__(self, path: str | os.PathLike[str], *, create: bool = True) -> None:
        self.path = Path(path)
        if not create and not self.path.is_file():
            raise FileNotFoundError(f"no store at {self.path}: no such file")
        with writing(self.path), reading(f"{self.path} is no store of sweeps", "name another file", StoreError):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            if self.path.is_file():
                expect(self.path, "sqlite", "empty")
        self.worker = uuid.uuid4().hex
        try:
            self._db = sqlite3.connect(self.path, timeout=BUSY, isolation_level=None)
        except sqlite3.Error as error:
            raise _readable(error, self.path) from error
        self._db.row_factory = sqlite3.Row
        try:
            self._open()
        except sqlite3.DatabaseError as error:
            self._db.close()
            raise _readable(error, self.path) from error
        except BaseException:
            self._db.close()
            raise

    def _open(self) -> None:
        self._db.execute("PRAGMA foreign_keys = OFF")
        self._db.execute("BEGIN")  # all read at one moment: another process may be making the tables
        application, version, tables = (
            self._db.execute(query).fetchone()[0]
            for query in ("PRAGMA application_id", "PRAGMA user_version", "SELECT count(*) FROM sqlite_master")
        )
        self._db.execute("COMMIT")
        if tables and application != APPLICATION:
            raise StoreError(f"{self.path} is a database of something else: name another file")
        if tables and version != FORMAT:
            raise StoreError(
                f"{self.path} was written by another version of faststeer (store format {version}, this one has "
                f"{FORMAT}): use that version, or name another file; nothing in it was changed"
            )
        if tables:
            self._check_schema()
        self._write_ahead()
        self._db.execute("PRAGMA synchronous = NORMAL")
        if not tables:
            with self.transaction():
                if not self._db.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]:
                    for statement in SCHEMA.split(";"):
                        self._db.execute(statement)
                    self._db.execute(f"PRAGMA application_id = {APPLICATION}")
                    self._db.execute(f"PRAGMA user_version = {FORMAT}")

    def _check_schema(self) -> None:
        """Refuse a file with other tables, views or triggers than are made here: what a view or a trigger does decides
        the file, not this program."""
        made = self._db.execute("SELECT name, sql FROM sqlite_master WHERE sql IS NOT NULL").fetchall()
        there = {str(row["name"]): " ".join(str(row["sql"]).split()) for row in made}
        expected = [" ".join(statement.split()) for statement in SCHEMA.split(";") if statement.strip()]
        if there != {statement.split()[2]: statement for statement in expected}:
            differing = {name for name, sql in there.items() if sql not in expected} or "one is missing"
            raise StoreError(
                f"{self.path} does not have a store's tables ({str(differing)[:200]}): restore it from a copy, or name "
                "another file"
            )

    def _write_ahead(self) -> None:
        """For this change of mode, SQLite does not wait for another process by itself."""
        end = time.monotonic() + BUSY
        while True:
            try:
                self._db.execute("PRAGMA journal_mode = WAL")
                return
            except sqlite3.OperationalError as error:
                if "locked" not in str(error) or time.monotonic() > end:
                    raise
            time.sleep(0.01)

    def close(self) -> None:
        self._db.close()

    def __exit__(self, *exception: object) -> None:
        self.close()

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """All of it, or nothing. Raises OSError where the disk is full."""
        try:
            self._db.execute("BEGIN IMMEDIATE")
            try:
                yield
                self._db.execute("COMMIT")
            except BaseException:
                if self._db.in_transaction:
                    self._db.execute("ROLLBACK")
                raise
        except sqlite3.Error as error:
            raise _readable(error, self.path) from error

    def _all(self, query: str, *values: Any) -> list[sqlite3.Row]:
        try:
            rows = self._db.execute(query, values).fetchall()
        except sqlite3.Error as error:
            raise _readable(error, self.path) from error
        for row in rows:  # SQLite holds values of any type in any column
            for name in row.keys():  # noqa: SIM118 (iterating over a row gives its values)
                if row[name] is not None and type(row[name]) is not _TYPES.get(name, type(row[name])):
                    raise StoreError(
                        f"{self.path} is damaged (a {name} is {str(row[name])[:40]!r}): restore it from a copy, or "
                        "name another file"
                    )
        return rows

    def _damaged(self, what: str) -> AbstractContextManager[None]:
        """Inside, data that makes no sense is a StoreError that names `what`."""
        return reading(f"{self.path}: {what} is damaged", "restore it from a copy, or name another file", StoreError)

    def _dicts(self, query: str, *values: Any) -> list[dict[str, Any]]:
        """What a query finds, by column, JSON read."""
        return [
            {name: self._json(row[name], name) if name in _JSON else row[name] for name in row.keys()}  # noqa: SIM118
            for row in self._all(query, *values)
        ]

    def _json(self, text: str | None, column: str) -> Any:
        if text is None:
            return {}
        with self._damaged(f"a row's {column}"):
            if not isinstance(data := read_json(text), _JSON[column]):
                raise ValueError(f"it holds a {type(data).__name__}")
            return data

    # Runs

    def runs(self) -> list[dict[str, Any]]:
        """Every run in the file, newest first: its digest, when it began, its description, answers there are and will
        be."""
        return [
            {name: row[name] for name in ("run", "created", "description", "versions")}
            | {
                "answers": self.count("answers", row["run"]),
                "expected": self.count("settings", row["run"]) * self.count("prompts", row["run"]),
                "done": self.finished(row["run"]),
            }
            for row in self._dicts("SELECT * FROM runs ORDER BY created DESC")
        ]

    def run(self, prefix: str | None = None) -> str:
        """The digest of the run that begins so; by default of the newest.

        Raises:
            StoreError: no run, none or several that begin so.
        """
        runs = [row["run"] for row in self._all("SELECT run FROM runs ORDER BY created DESC")]
        if not runs:
            raise StoreError(f"{self.path} holds no sweep yet")
        fitting = runs[:1] if prefix is None else [run for run in runs if run.startswith(prefix)]
        if len(fitting) != 1:
            raise StoreError(f"{self.path}: {len(fitting)} sweeps begin with {prefix!r}; there are {', '.join(runs)}")
        return fitting[0]

    def count(self, table: str, run: str) -> int:
        """How many rows of a run a table has."""
        return self._all(f"SELECT count(*) FROM {table} WHERE run = ?", run)[0][0]

    def begin(self, run: str, chunk: int, sweep: Sweep, versions: Mapping[str, str]) -> int:
        """Write a run's settings, prompts and vectors, where they are not there yet; return its rows per chunk."""
        with self.transaction():
            if not self._all("SELECT 1 FROM runs WHERE run = ?", run):
                vectors: list[tuple[str, int | None, bytes]] = []
                for name, vector in sweep.vectors.items():
                    controls = (random_like(vector, sweep.seed + n).to_bytes() for n in range(sweep.controls))
                    vectors += [(name, None, vector.to_bytes()), *((name, n, data) for n, data in enumerate(controls))]
                self._insert(
                    run,
                    runs=[(time.time(), chunk, json.dumps(sweep.to_dict()), json.dumps(versions))],
                    vectors=vectors,
                    settings=[(i, *_setting_row(setting)) for i, setting in enumerate(sweep.settings)],
                    prompts=[(i, p.id, p.tag, json.dumps(p.prompt)) for i, p in enumerate(sweep.prompts)],
                )
        return self._all("SELECT chunk FROM runs WHERE run = ?", run)[0]["chunk"]

    def add(self, run: str, **rows: Iterable[Sequence[Any]]) -> None:
        """Write rows of a run by the names of their tables, all of them or none. A row is what its table's columns hold
        behind `run`; lists and objects are written as JSON. One that is there already stays as it is."""
        with self.transaction():
            self._insert(run, **rows)

    def _insert(self, run: str, **rows: Iterable[Sequence[Any]]) -> None:
        for table, listed in rows.items():
            for row in listed:
                values = [run, *(json.dumps(v) if isinstance(v, list | dict) else v for v in row)]
                marks = ", ".join("?" * len(values))
                self._db.execute(f"INSERT OR IGNORE INTO {table} VALUES ({marks})", values)

    # Units: who does what

    def add_units(self, run: str, units: Mapping[str, str | None]) -> None:
        """Add work that is not there yet, by name: a piece that one process does, such as "answers:3",
        "judge:<digest>:3", "effect:<digest>:0" or "projections:4:3" (of the first 4 prompts, in chunk 3), with the
        piece that must be done before it. It is done in this order."""
        nobody = (0, None, None, None, None)
        self.add(run, units=[(name, number, needs, *nobody) for number, (name, needs) in enumerate(units.items())])

    def claim(self, run: str, units: Iterable[str]) -> str | None:
        """Take one of these units that nobody works on: the first whose needs are done; None if there is none now.

        A unit whose process has died (on this machine), or has given no sign of life for LEASE seconds, is free.
        """
        names, now, host = set(units), time.time(), socket.gethostname()
        with self.transaction():
            done = {row["unit"] for row in self._all("SELECT unit FROM units WHERE run = ? AND done = 1", run)}
            for row in self._all("SELECT * FROM units WHERE run = ? AND done = 0 ORDER BY number", run):
                if row["unit"] not in names or (row["needs"] is not None and row["needs"] not in done):
                    continue
                if row["worker"] is not None and _alive(row, now, host):
                    continue
                query = "UPDATE units SET worker = ?, host = ?, pid = ?, seen = ? WHERE run = ? AND unit = ?"
                self._db.execute(query, (self.worker, host, os.getpid(), now, run, row["unit"]))
                return row["unit"]
        return None

    def beat(self) -> None:
        """Give a sign of life for what is claimed by this store."""
        with self.transaction():
            self._db.execute("UPDATE units SET seen = ? WHERE worker = ? AND done = 0", (time.time(), self.worker))

    def release(self) -> None:
        """Let go of what is claimed and not done."""
        with self.transaction():
            self._db.execute("UPDATE units SET worker = NULL WHERE worker = ? AND done = 0", (self.worker,))

    def finish(self, run: str, unit: str) -> None:
        with self.transaction():
            self._db.execute("UPDATE units SET done = 1, worker = NULL WHERE run = ? AND unit = ?", (run, unit))

    def finished(self, run: str, units: Iterable[str] | None = None) -> bool:
        """Whether all units (or these) of a run are done."""
        left = {row["unit"] for row in self._all("SELECT unit FROM units WHERE run = ? AND done = 0", run)}
        return not left if units is None else not left & set(units)

    # Rows

    def answered(self, run: str, chunk: int) -> set[tuple[int, int]]:
        """(setting, prompt) of the chunk's answers."""
        rows = self._all("SELECT setting, prompt FROM answers WHERE run = ? AND chunk = ?", run, chunk)
        return {(row["setting"], row["prompt"]) for row in rows}

    def unjudged(self, run: str, judge: str, chunk: int) -> list[tuple[int, int, str]]:
        """(setting, prompt, text) of the chunk's answers without this judge's verdict, but for those that failed."""
        query = (
            "SELECT setting, prompt, text FROM answers a WHERE run = ? AND chunk = ? AND error IS NULL AND NOT EXISTS "
            "(SELECT 1 FROM verdicts v WHERE v.run = a.run AND v.judge = ? AND v.setting = a.setting AND "
            "v.prompt = a.prompt) ORDER BY setting, prompt"
        )
        return [tuple(row) for row in self._all(query, run, chunk, judge)]

    def unprojected(self, run: str, chunk: int, prompts: int) -> list[tuple[int, int, list[int]]]:
        """(setting, prompt, the answer's token ids) of the chunk's answers to the first so many prompts that are not
        projected yet, but for those that failed."""
        query = (
            "SELECT setting, prompt, ids FROM answers a WHERE run = ? AND chunk = ? AND prompt < ? AND error IS NULL "
            "AND NOT EXISTS (SELECT 1 FROM tokens t WHERE t.run = a.run AND t.setting = a.setting AND "
            "t.prompt = a.prompt) ORDER BY setting, prompt"
        )
        rows = self._all(query, run, chunk, prompts)
        with self._damaged("an answer's token ids"):
            return [(row["setting"], row["prompt"], np.frombuffer(row["ids"], "<i4").tolist()) for row in rows]

    # Reading

    def settings(self, run: str) -> list[dict[str, Any]]:
        """Every setting: `setting` (its number), `name`, `kind`, `vector`, `layers`, `coefficient`, `control`."""
        columns = "setting, name, kind, vector, layers, coefficient, control"
        rows = self._dicts(f"SELECT {columns} FROM settings WHERE run = ? ORDER BY setting", run)
        return [row | {"layers": tuple(row["layers"])} for row in rows]

    def plan(self, run: str, setting: int) -> Plan | None:
        """The plan of a setting, with the vectors that the store holds; None for the unsteered one."""
        row = self._all("SELECT plan, control FROM settings WHERE run = ? AND setting = ?", run, setting)
        if not row:
            raise StoreError(f"{self.path}: the sweep {run[:12]} has no setting {setting}")
        if row[0]["plan"] is None:
            return None
        vectors = self._all("SELECT name, data FROM vectors WHERE run = ? AND control IS ?", run, row[0]["control"])
        with self._damaged(f"the plan of setting {setting}"):
            names = {v["name"]: SteeringVector.from_bytes(v["data"], f"the vector {v['name']!r}") for v in vectors}
            return Plan.from_json(row[0]["plan"], names)

    def prompts(self, run: str) -> list[dict[str, Any]]:
        """Every prompt: `prompt` (its number), `id`, `tag`, `content` (a text or a chat)."""
        return self._dicts("SELECT prompt, id, tag, content FROM prompts WHERE run = ? ORDER BY prompt", run)

    def answers(self, run: str) -> list[dict[str, Any]]:
        """Every answer: `setting`, `prompt`, `text`, `tokens`, `finish`, `error`."""
        columns = "setting, prompt, text, tokens, finish, error"
        return self._dicts(f"SELECT {columns} FROM answers WHERE run = ? ORDER BY setting, prompt", run)

    def judges(self, run: str) -> list[dict[str, Any]]:
        """The judges: `judge` (digest), `name`, `shows`."""
        return self._dicts("SELECT judge, name, shows FROM judges WHERE run = ? ORDER BY name", run)

    def verdicts(self, run: str, judge: str) -> list[dict[str, Any]]:
        """A judge's verdicts: `setting`, `prompt`, `label`, `score` (None: a parse failure), `parts`, `raw`."""
        columns = "setting, prompt, label, score, parts, raw"
        query = f"SELECT {columns} FROM verdicts WHERE run = ? AND judge = ? ORDER BY setting, prompt"
        return self._dicts(query, run, judge)

    def effects(self, run: str) -> list[dict[str, Any]]:
        """Side effects per setting and text or question: `effect`, `setting`, `item`, `kl`, `cross_entropy`, `tokens`,
        `correct`."""
        columns = "effect, setting, item, kl, cross_entropy, tokens, correct"
        return self._dicts(f"SELECT {columns} FROM effects WHERE run = ? ORDER BY effect, setting, item", run)

    def directions(self, run: str) -> list[dict[str, Any]]:
        """What answers are projected on: `direction` (its number), `vector`, `control`, `layer`."""
        columns = "direction, vector, control, layer"
        return self._dicts(f"SELECT {columns} FROM directions WHERE run = ? ORDER BY direction", run)

    def projections(self, run: str, setting: int | None = None, prompt: int | None = None) -> Iterator[dict[str, Any]]:
        """Projected answers, all or of one setting, one prompt: `setting`, `prompt`, `direction`, `of_prompt` (tokens
        of the prompt), `texts` (of the tokens), `values` `[layers + 1, tokens]` fp32.

        The unsteered answer is there once for every direction, a steered one for its own.
        """
        columns = "p.setting, p.prompt, p.direction, t.of_prompt, t.texts, p.scale, p.data"
        chosen = {"p.run": run, "p.setting": setting, "p.prompt": prompt}
        chosen = {column: value for column, value in chosen.items() if value is not None}
        rows = self._dicts(
            f"SELECT {columns} FROM projections p JOIN tokens t USING (run, setting, prompt) WHERE "
            f"{' AND '.join(f'{column} = ?' for column in chosen)} ORDER BY p.setting, p.prompt, p.direction",
            *chosen.values(),
        )
        for row in rows:
            with self._damaged("the projections of an answer"):
                values = unpacked(row.pop("scale"), row.pop("data"), len(row["texts"]))
            yield row | {"values": values}


def _setting_row(setting: Setting) -> tuple[Any, ...]:
    layers, plan = list(setting.layers), setting.plan
    text = None
    if plan is not None:
        if setting.coefficient is None:  # a whole plan, which carries its own vectors
            text = plan.to_json(inline=True)
        else:
            (vector,) = plan.interventions[0].directions()[:1]
            assert isinstance(vector, SteeringVector)
            text = plan.to_json({setting.vector: vector})
    return setting.name, setting.kind, setting.vector, layers, setting.coefficient, setting.control, text


def _alive(row: sqlite3.Row, now: float, host: str) -> bool:
    if row["seen"] is None or row["pid"] is None or not 0 < row["pid"] < 2**31:
        return False  # nobody who works on it wrote that
    if now - row["seen"] > LEASE:
        return False
    if row["host"] != host:
        return True
    try:
        os.kill(row["pid"], 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def _readable(error: sqlite3.Error, path: Path) -> Exception:
    text = str(error)
    if "not a database" in text or "malformed" in text:
        return StoreError(f"{path} is no store of sweeps ({text}): name another file, or restore it from a copy")
    if "full" in text or "disk I/O" in text:
        return OSError(
            f"the disk of {path} is full, or the size of files limited ({text}): what was finished is kept; make room "
            "or raise the limit (ulimit -f), and run the same command again, it goes on where it stopped"
        )
    if "readonly" in text or "unable to open" in text:
        return OSError(
            f"{path} cannot be opened for writing ({text}): check the permissions of the file and its folder, and the "
            "limit of open files (ulimit -n)"
        )
    if "locked" in text:
        return OSError(f"{path} is held by another process for more than {BUSY:g} s ({text})")
    if isinstance(error, sqlite3.ProgrammingError | sqlite3.InterfaceError):
        return error  # a mistake of this program, or a store that is closed
    return StoreError(f"{path} is damaged ({text}): restore it from a copy, or name another file")
