"""The whole study of one model and behaviour: vectors by several methods, what is left of them when part of the
steering is withheld, the circuits that carry them, the tokens they raise, and how few coordinates they need."""

from faststeer.observe.study.run import run
from faststeer.observe.study.settings import METHODS, Settings

__all__ = ["METHODS", "Settings", "run"]
