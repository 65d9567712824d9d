"""The command line. One module per command; what they share is in `common`."""

from faststeer.cli import demo, extract, generate, info
from faststeer.cli.common import app

__all__ = ["app", "demo", "extract", "generate", "info"]
