"""Hugging Face models: where their hook points are, single hooks, and the context manager that steers a whole model."""

from faststeer.hf.anatomy import find_hook_points
from faststeer.hf.batching import Prompt, Rendered, render, tokenize
from faststeer.hf.hook_points import HookPoints
from faststeer.hf.hooks import hook, read
from faststeer.hf.loading import load
from faststeer.hf.steering import Steering, steer

__all__ = [
    "HookPoints",
    "Prompt",
    "Rendered",
    "Steering",
    "find_hook_points",
    "hook",
    "load",
    "read",
    "render",
    "steer",
    "tokenize",
]
