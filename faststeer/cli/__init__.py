"""The command line. One module per command; what they share is in `common`."""

from faststeer.cli import (
    convert,
    demo,
    evaluate,
    extract,
    fold,
    generate,
    info,
    observe,
    plan,
    report,
    search,
    sweep,
    ui,
    verify,
)
from faststeer.cli.common import app

__all__ = [
    "app",
    "convert",
    "demo",
    "evaluate",
    "extract",
    "fold",
    "generate",
    "info",
    "observe",
    "plan",
    "report",
    "search",
    "sweep",
    "ui",
    "verify",
]
