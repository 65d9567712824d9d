"""What a file is, by its content: so that a reader that gets another kind says which one, and what to do.

Nothing is unpacked or run: the first bytes tell, and for a zip archive the names inside it.
"""

from __future__ import annotations

import io
import re
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

HEAD = 4096  # bytes that are looked at
MAX_POINTER = 1024  # a pointer of Git LFS is smaller

# Who reads what ("vector") in all its formats: faststeer/__init__.py names them, for modules that they build on.
READERS: dict[str, Callable[..., Any]] = {}


class FileKind(NamedTuple):
    """A kind of file: its name in code, what an error says it is, and how to come to a file that can be read."""

    name: str
    words: str
    remedy: str


class OtherKind(ValueError):
    """A file of another kind than the reader's. `files.reading` makes a FormatError of it."""

    def __init__(self, kind: FileKind) -> None:
        super().__init__(f"it is {kind.words}: {kind.remedy}")
        self.kind = kind


_AGAIN = "download or write it again"
_UNPACK = "unpack it, and give a file from inside"
_TEXT = "save it as UTF-8 text"
_HERE = "give the kind of file that is expected here"
_VECTOR = f"as a vector it is read by SteeringVector.load; elsewhere {_HERE}"
_ROWS = "write it as .jsonl or .csv, or name its folder as datasets:FOLDER where data sets are taken"
_TORCH = FileKind("torch", "a file of torch.save", _VECTOR)
_BEGINNINGS = {
    b"GGUF": FileKind("gguf", "a GGUF file", "give it where a GGUF model or control vector is taken"),
    b"PAR1": FileKind("parquet", "a Parquet file", _ROWS),
    b"ARROW1": FileKind("arrow", "an Arrow file", _ROWS),
    b"\x93NUMPY": FileKind("npy", "a NumPy array (.npy)", _VECTOR),
    b"SQLite format 3\0": FileKind("sqlite", "an SQLite database", "give it where a sweep's store is taken"),
    b"\x89HDF\r\n\x1a\n": FileKind("hdf5", "an HDF5 file", "read it with h5py, and write its arrays with numpy.savez"),
    b"\x1f\x8b": FileKind("gzip", "compressed by gzip", _UNPACK),
    b"\x28\xb5\x2f\xfd": FileKind("zstd", "compressed by Zstandard", _UNPACK),
    b"\xfd7zXZ\0": FileKind("xz", "compressed by xz", _UNPACK),
    b"BZh91AY&SY": FileKind("bzip2", "compressed by bzip2", _UNPACK),
    b"7z\xbc\xaf\x27\x1c": FileKind("7z", "a 7z archive", _UNPACK),
    b"%PDF-": FileKind("pdf", "a PDF document", _TEXT),
    b"\xff\xfe": FileKind("utf-16", "text in UTF-16", _TEXT),
    b"\xfe\xff": FileKind("utf-16", "text in UTF-16", _TEXT),
    b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19.": _TORCH,  # before torch 1.6
}
_EMPTY = FileKind("empty", "empty", _AGAIN)
_NULLS = FileKind("nulls", "nothing but zero bytes, as an interrupted download leaves it", _AGAIN)
_LFS = FileKind(
    "lfs",
    "a Git LFS pointer, not the file itself",
    "fetch it with git lfs pull, or download the file from its page",
)
_ANNEX = FileKind("annex", "a pointer of git-annex, not the file itself", "fetch it with git annex get")
_HTML = FileKind(
    "html",
    "a web page (HTML), such as a page of an error or of a login",
    "download the file itself, by the link that says download or raw",
)
_XML = FileKind("xml", "XML, such as a storage server's error", "download the file itself")
_PICKLE = FileKind(
    "pickle",
    "a pickle, which may run code and is never read",
    "load it where you trust it, and write its arrays with torch.save, numpy.savez or SteeringVector.save",
)
_NPZ = FileKind("npz", "a NumPy archive (.npz)", _VECTOR)
_ZIP = FileKind("zip", "a zip archive", _UNPACK)
_OFFICE = FileKind("office", "an office document", "save it as .csv in UTF-8")
_SAFETENSORS = FileKind("safetensors", "a safetensors file", _HERE)
_SVEC = FileKind("json", "JSON in the layout of activation-steering (.svec)", _VECTOR)
_JSON = FileKind("json", "JSON", _HERE)
_PROTOCOL_0 = re.compile(rb"\([dl]p\d*\n|c(?:numpy|torch|copy_reg|collections|builtins|__builtin__)[\w.]*\n\w+\n")
_PAGE = re.compile(rb"<(?:!doctype html|html)\b", re.IGNORECASE)
_WORDS = re.compile(rb"(?:GGUF|PAR1|ARROW1)[\x20-\x7e]{8}")  # texts that begin like such a file


def kind_of(source: bytes | Path) -> FileKind | None:
    """What a file or its content is; None for what is no known kind, such as plain text.

    Raises:
        OSError: it cannot be read.
    """
    head, size = _head(source)
    if not size:
        return _EMPTY
    text = head.removeprefix(b"\xef\xbb\xbf").lstrip()
    if head.startswith(b"version https://git-lfs.github.com/spec/") and size <= MAX_POINTER:
        return _LFS
    if b"/annex/objects/" in head[:200] and size <= MAX_POINTER:
        return _ANNEX
    if head.startswith(b"PK\x03\x04"):
        return _of_zip(source)
    for beginning, kind in _BEGINNINGS.items():
        if head.startswith(beginning) and not _WORDS.match(head):
            return kind
    if _PAGE.match(text) and re.search(rb"<(?:head|body|title|meta)\b", text, re.IGNORECASE):
        return _HTML
    if text.startswith(b"<?xml"):
        return _HTML if b"<html" in text.lower() else _XML
    if len(head) > 8 and head[8:9] == b"{" and 2 <= int.from_bytes(head[:8], "little") <= size - 8:
        return _SAFETENSORS
    if text[:1] in (b"{", b"[") and b"\0" not in head:
        return _SVEC if b'"explained_variances"' in head or b'"model_type"' in head[:200] else _JSON
    if re.match(rb"\x80[\x02-\x05]", head) or _PROTOCOL_0.match(head):
        return _PICKLE
    return _NULLS if not head.strip(b"\0") else None


def expect(source: bytes | Path, *names: str) -> None:
    """Raise OtherKind where a file is of a known kind and not of one of these."""
    kind = kind_of(source)
    if kind is not None and kind.name not in names:
        raise OtherKind(kind)


def _head(source: bytes | Path) -> tuple[bytes, int]:
    if isinstance(source, bytes):
        return source[:HEAD], len(source)
    with source.open("rb") as file:
        return file.read(HEAD), source.stat().st_size


def _of_zip(source: bytes | Path) -> FileKind:
    try:
        with zipfile.ZipFile(io.BytesIO(source) if isinstance(source, bytes) else source) as archive:
            names = archive.namelist()
    except Exception:  # whatever zipfile says of bytes that make no sense
        return _TORCH if b"data.pkl" in _head(source)[0] else _ZIP
    if any(name.endswith("/data.pkl") for name in names):
        return _TORCH
    if names and all(name.endswith(".npy") for name in names):
        return _NPZ
    return _OFFICE if "[Content_Types].xml" in names else _ZIP
