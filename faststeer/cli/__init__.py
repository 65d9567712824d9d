"""The command line. One module per command; what they share is in `common`."""

from faststeer.cli import convert, demo, extract, fold, generate, info
from faststeer.cli.common import app

__all__ = ["app", "convert", "demo", "extract", "fold", "generate", "info"]
