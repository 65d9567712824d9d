"""Batched generation: a fixed number of rows, a plan per request, results as they finish."""

from faststeer.engine.engine import Engine, end_tokens
from faststeer.generator import Completion

__all__ = ["Completion", "Engine", "end_tokens"]
