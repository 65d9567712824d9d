"""Writing files and folders so that nobody ever reads half of one, and the folder for what is kept between runs."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from pathlib import Path


def write_atomically(path: str | os.PathLike[str], content: bytes | str) -> None:
    """Write `content` to a temporary file beside `path`, flush it to disk and rename it: after a crash, a kill or
    Ctrl-C there is the old file or the new one."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    data = content.encode() if isinstance(content, str) else content
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part")
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        # mkstemp makes private files; what the user asked for gets the usual permissions.
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


class new_folder:
    """A folder that appears under its name when the block ends well, and not at all otherwise."""

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.path = Path(folder)
        if self.path.exists() and (not self.path.is_dir() or any(self.path.iterdir())):
            raise ValueError(f"{self.path} is there already: name a new folder")

    def __enter__(self) -> Path:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.temporary = Path(tempfile.mkdtemp(dir=self.path.parent, prefix=f".{self.path.name}."))
        return self.temporary

    def __exit__(self, kind: object, *exception: object) -> None:
        if kind is not None:
            shutil.rmtree(self.temporary, ignore_errors=True)
            return
        for file in self.temporary.rglob("*"):
            if file.is_file():
                with file.open("rb+") as opened:
                    os.fsync(opened.fileno())
        umask = os.umask(0)
        os.umask(umask)
        self.temporary.chmod(0o777 & ~umask)
        if self.path.is_dir():
            self.path.rmdir()
        self.temporary.rename(self.path)


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
