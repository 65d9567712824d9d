"""Valid files made wrong, by what they are: bytes changed anywhere; JSON, headers, rows of a database and pickled
objects with other values in their places. All from a `random.Random`, so that a number tells an input."""

from __future__ import annotations

import copy
import io
import json
import random
import sqlite3
import warnings
import zipfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

HUGE = (2**31, 10**9, 10**11, 2**63 - 1, 2**63, 2**70, -(10**11), 10**30, 1e308, 10**400)
STRANGE = (
    *(None, True, 0, -1, 1, 2.5, float("nan"), float("inf"), *HUGE),
    *(
        "",
        " ",
        "x",
        "x" * 300,
        "x" * 5000,
        "layers.0",
        "\ud800",
        "\0",
        "../../etc/passwd",
        "/dev/zero",
        "1e400",
        "9" * 5000,
    ),
    *([], {}, [[]], [None], {"": 0}, list(range(3)), [0] * 3000),
)
WORDS = (
    "",
    "null",
    "[]",
    "[0]",
    "[-1]",
    "[-1, -1]",
    '["-1"]',
    "[-1.5, -2]",
    "9" * 5000,
    "1e9",
    "10" * 9,
    "{",
    "x",
    "[" * 100_000,
)
YAML = (
    "a: &a [*a]\n",
    "a: &a {b: *a}\n",
    "a: &a [x,x,x,x,x,x,x,x,x,x]\n"
    + "".join(f"{b}: &{b} [{','.join([f'*{a}'] * 10)}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True)),
    "".join(f"{b}: &{b} {{<<: [{','.join([f'*{a}'] * 10)}]}}\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True)),
    "seed: 2001-13-45\n",
    "seed: !!timestamp x\n",
    "seed: !!bool x\n",
    "seed: !!int ''\n",
    "seed: !!binary é\n",
    "seed: !!python/object/apply:os.system [ls]\n",
    "? [a, b]\n: 1\n",
    "seed: " + "9" * 5000 + "\n",
    "seed: " + ":".join(["59"] * 3000) + "\n",
    "seed: " + "[" * 2000 + "\n",
    "seed: " + "{a: " * 500 + "\n",
    "%TAG ! x\n---\nseed: 1\n",
    "seed: *nothing\n",
    "--- 1\n--- 2\n",
    "\x00",
)


def damaged(rng: random.Random, whole: bytes, others: tuple[bytes, ...] = ()) -> bytes:
    """`whole` with bytes changed, taken out, put in, repeated, cut off, or with a part of another file."""
    data = bytearray(whole)
    kinds = ("flip", "set", "number", "cut", "drop", "insert", "repeat", *(("splice",) if others else ()))
    for _ in range(rng.randint(1, 4)):
        at = rng.randint(0, max(0, len(data) - 1))
        if rng.random() < 0.3:  # most of what decides anything stands at the beginning
            at = min(at, rng.randint(0, 200))
        kind = rng.choice(kinds)
        span = rng.randint(1, 24)
        if kind == "flip" and data:
            data[at] ^= 1 << rng.randint(0, 7)
        elif kind == "set" and data:
            data[at] = rng.choice((0, 1, 0x7F, 0x80, 0xFF))
        elif kind == "number":
            size = rng.choice((4, 8))
            value = rng.choice((0, 1, -1, 2**31 - 1, 2**31, 2**62, 2**63 - 1)) % 2 ** (8 * size)
            data[at : at + size] = value.to_bytes(size, rng.choice(("little", "big")))
        elif kind == "cut":
            del data[at:]
        elif kind == "drop":
            del data[at : at + span]
        elif kind == "insert":
            data[at:at] = rng.randbytes(span)
        elif kind == "repeat":
            data[at:at] = data[at : at + span]
        elif kind == "splice":
            other = rng.choice(others)
            start = rng.randint(0, len(other) - 1)
            data[at : at + span] = other[start : start + span]
    return bytes(data)


def places(holder: Any) -> Iterator[tuple[Any, Any]]:
    """Every value in nested lists and objects, by what holds it and where."""
    for key, value in holder.items() if isinstance(holder, dict) else enumerate(holder):
        yield holder, key
        if isinstance(value, (dict, list)):
            yield from places(value)


def misshapen(rng: random.Random, whole: Any, strange: tuple[Any, ...] = STRANGE) -> Any:
    """Nested lists and objects like `whole` with one to three values exchanged, taken out or given twice."""
    data = [copy.deepcopy(whole)]
    for _ in range(rng.randint(1, 3)):
        holder, key = rng.choice(list(places(data)))
        kind = rng.choice(("exchange", "exchange", "exchange", "take out", "twice"))
        if kind == "exchange" or holder is data:
            holder[key] = copy.deepcopy(rng.choice(strange))
        elif kind == "take out":
            del holder[key]
        elif isinstance(holder, list):
            holder.insert(key, copy.deepcopy(holder[key]))
        else:
            holder[rng.choice(sorted(holder, key=str))] = copy.deepcopy(holder[key])
    return data[0]


def misshapen_json(rng: random.Random, whole: Any) -> str:
    """JSON like `whole` with other values, a name twice in an object, or nested without end."""
    text = json.dumps(misshapen(rng, whole), ensure_ascii=rng.random() < 0.9)
    kind = rng.random()
    if kind < 0.1 and '": ' in text:
        names = [part.rpartition('"')[2] for part in text.split('": ')[:-1]]
        name = rng.choice(names)
        text = text.replace(f'"{name}": ', f'"{name}": {json.dumps(rng.choice(STRANGE))}, "{name}": ', 1)
    elif kind < 0.15:
        text = rng.choice(("[", '{"a":')) * 100_000 + text
    return text


# safetensors ----------------------------------------------------------------------------------------------------------


def _split(data: bytes) -> tuple[dict[str, Any], bytes]:
    end = 8 + int.from_bytes(data[:8], "little")
    return json.loads(data[8:end]), data[end:]


def _joined(text: str, tensors: bytes) -> bytes:
    header = text.encode("utf-8", "surrogatepass")
    return len(header).to_bytes(8, "little") + header + tensors


def unchecked(data: bytes, **words: str) -> bytes:
    """A safetensors file without its checksums, as older versions wrote them, and with other words in its header."""
    header, tensors = _split(data)
    for name in ("sha256", "sha256.tensors"):
        header.get("__metadata__", {}).pop(name, None)
    if words:
        header["__metadata__"] |= words
    return _joined(json.dumps(header), tensors)


def tensor_file(rng: random.Random, whole: bytes, others: tuple[bytes, ...]) -> bytes:
    if rng.random() < 0.75:  # else nearly all is told by a checksum alone
        whole = unchecked(whole)
    kind = rng.random()
    if kind < 0.4:
        return damaged(rng, whole, others)
    header, tensors = _split(whole)
    if kind < 0.7 and header.get("__metadata__"):
        words = header["__metadata__"]
        name = rng.choice(sorted(words))
        try:
            words[name] = misshapen_json(rng, json.loads(words[name])) if rng.random() < 0.6 else rng.choice(WORDS)
        except ValueError:
            words[name] = rng.choice((*WORDS, *map(str, HUGE[:6])))
        return _joined(json.dumps(header), tensors)
    return _joined(misshapen_json(rng, header), tensors)


# Other kinds ----------------------------------------------------------------------------------------------------------


def _tensors() -> tuple[Any, ...]:
    v = torch.ones(8)
    return (
        *(
            torch.zeros(10**6, 0),
            torch.ones(1).expand(10**6, 8),
            torch.zeros(0),
            torch.ones(()),
            v.to_sparse(),
            v.int(),
        ),
        *(
            v.bool(),
            v.to(torch.complex64),
            v * float("nan"),
            torch.ones(30_000, 2, dtype=torch.int8),
            torch.ones(1, 1, 1, 8),
        ),
        *(torch.empty(4, device="meta"), torch.nn.Parameter(v), v.double()),
    )


def torch_file(rng: random.Random, whole: bytes, others: tuple[bytes, ...]) -> bytes:
    kind = rng.random()
    if kind < 0.4:
        return damaged(rng, whole, others)
    if kind < 0.7 and whole.startswith(b"PK"):  # the pickle inside, with the archive's own checksums right
        with zipfile.ZipFile(io.BytesIO(whole)) as archive:
            entries = {entry.filename: archive.read(entry) for entry in archive.infolist()}
        name = rng.choice([name for name in entries if name.endswith("data.pkl")] * 3 + sorted(entries))
        entries[name] = damaged(rng, entries[name], others)
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w") as archive:
            for name, content in entries.items():
                archive.writestr(name, content)
        return buffer.getvalue()
    content = torch.load(io.BytesIO(whole), weights_only=True)
    buffer = io.BytesIO()
    torch.save(
        misshapen(rng, content, (*STRANGE, *_tensors())), buffer, _use_new_zipfile_serialization=rng.random() < 0.6
    )
    return buffer.getvalue()


def numpy_archive(rng: random.Random, whole: bytes, others: tuple[bytes, ...]) -> bytes:
    """An archive with an array damaged, one whose header promises another shape or kind, or one twice."""
    if rng.random() < 0.3:
        return damaged(rng, whole, others)
    with zipfile.ZipFile(io.BytesIO(whole)) as archive:
        entries = [(entry.filename, archive.read(entry)) for entry in archive.infolist()]
    at = rng.randrange(len(entries))
    name, content = entries[at]
    kind = rng.choice(("bytes", "shape", "dtype", "name", "twice", "more"))
    if kind == "bytes":
        entries[at] = name, damaged(rng, content, others)
    elif kind == "shape":
        shape = rng.choice((b"(1000000000000,)", b"(0,)", b"(-8,)", b"()", b"(8, 1)", b"('8',)", b"(" * 300))
        entries[at] = name, content.replace(b"(8,)", shape)
    elif kind == "dtype":
        entries[at] = name, content.replace(b"<f4", rng.choice((b"|O", b"<c8", b"|V4", b"<i4", b"<f8", b"|S4", b">f4")))
    elif kind == "name":
        entries[at] = rng.choice(("layer_1.npy", "9" * 9 + ".npy", " ", "../x.npy", "-1.npy", "01.npy")), content
    elif kind == "twice":
        entries.append(entries[at])
    else:
        entries.append((f"{rng.choice(HUGE[:5])}.npy", content))
    buffer = io.BytesIO()
    with warnings.catch_warnings(), zipfile.ZipFile(buffer, "w", rng.choice((0, 8))) as archive:
        warnings.simplefilter("ignore")  # about names given twice
        for name, content in entries:
            archive.writestr(name, content)
    return buffer.getvalue()


def database(rng: random.Random, whole: bytes, path: Path) -> bytes:
    """A store with other values in its rows, without a table, with a view or a trigger of its own, or damaged."""
    if rng.random() < 0.3:
        return damaged(rng, whole)
    path.write_bytes(whole)
    db = sqlite3.connect(path, isolation_level=None)
    tables = [row[0] for row in db.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
    kind = rng.random()
    if kind < 0.05:
        db.execute(f"DROP TABLE {rng.choice(tables)}")
    elif kind < 0.1:
        db.execute(f"PRAGMA user_version = {rng.choice((0, 1, 3, 2**31 - 1))}")
    elif kind < 0.15:
        db.execute("DROP TABLE answers")
        db.execute(
            "CREATE VIEW answers AS WITH RECURSIVE n(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM n) SELECT * FROM n"
        )
    elif kind < 0.2:
        db.execute("CREATE TRIGGER t AFTER UPDATE ON units BEGIN DELETE FROM answers; END")
    else:
        for _ in range(rng.randint(1, 3)):
            name = rng.choice(tables)
            column = rng.choice([row[1] for row in db.execute(f"PRAGMA table_info({name})")])
            value: Any = rng.choice(
                (None, b"", b"\xff\xfe", b"\0" * 7, 3, -1, 2**40, 2**62, 0.5, 1e308, "", "x", "[1", "{}", "null")
            )
            now = db.execute(f"SELECT {column} FROM {name} LIMIT 1").fetchone()
            try:
                if now and isinstance(now[0], str) and rng.random() < 0.6:
                    value = (
                        misshapen_json(rng, json.loads(now[0]))
                        .encode("utf-8", "surrogatepass")
                        .decode("utf-8", "replace")
                    )
                elif now and isinstance(now[0], bytes) and now[0] and rng.random() < 0.7:
                    value = damaged(rng, now[0])
            except ValueError:
                pass
            text = "CAST(? AS TEXT)" if isinstance(value, bytes) and rng.random() < 0.2 else "?"
            with suppress(sqlite3.IntegrityError):
                db.execute(f"UPDATE {name} SET {column} = {text}", (value,))
    db.close()
    return path.read_bytes()


def lines(rng: random.Random, whole: bytes, others: tuple[bytes, ...]) -> bytes:
    """JSON lines of which one has other values."""
    if rng.random() < 0.4:
        return damaged(rng, whole, others)
    rows = whole.decode().splitlines()
    at = rng.randrange(len(rows))
    rows[at] = misshapen_json(rng, json.loads(rows[at]))
    return "\n".join(rows).encode("utf-8", "surrogatepass")


def document(rng: random.Random, whole: bytes, others: tuple[bytes, ...], *, yaml: bool) -> bytes:
    """JSON, or YAML (of which JSON is a part)."""
    kind = rng.random()
    if kind < 0.25:
        return damaged(rng, whole, others)
    if yaml and kind < 0.45:
        return whole + rng.choice(YAML).encode() if rng.random() < 0.5 else rng.choice(YAML).encode()
    import yaml as library

    data = library.safe_load(whole) if yaml else json.loads(whole)
    return misshapen_json(rng, data).encode("utf-8", "surrogatepass")


def mutated(rng: random.Random, name: str, whole: bytes, others: tuple[bytes, ...], scratch: Path) -> bytes:
    """The content of a file of this name, made wrong in a way that fits its kind."""
    ending = Path(name).suffix
    if ending == ".safetensors":
        return tensor_file(rng, whole, others)
    if ending == ".pt":
        return torch_file(rng, whole, others)
    if ending == ".npz":
        return numpy_archive(rng, whole, others)
    if ending == ".sqlite":
        return database(rng, whole, scratch)
    if ending == ".jsonl":
        return lines(rng, whole, others)
    if ending in (".json", ".yaml", ".svec"):
        return document(rng, whole, others, yaml=ending == ".yaml")
    return damaged(rng, whole, others)
