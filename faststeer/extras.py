"""Packages that only a part of faststeer needs. They come with its extras, and an import that fails names the extra."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def needed_for(what: str, extra: str) -> Iterator[None]:
    """Context manager around an import: its failure becomes an ImportError that says what to install.

    Args:
        what: what needs the package, such as "the playground".
        extra: the extra of pyproject.toml that brings it.
    """
    try:
        yield
    except ImportError as error:
        missing = error.name or str(error)
        raise ImportError(f"{what} needs {missing}: pip install 'faststeer[{extra}]'", name=error.name) from error
