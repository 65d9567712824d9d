"""Behaviours: what a steering vector is to stand for, as data: contrast prompts, target completions, held-out prompts,
and the judge that reads the answers."""

from faststeer.behaviours.behaviour import Behaviour, Split, load, names, of_prompts
from faststeer.behaviours.layouts import (
    Record,
    advbench,
    alpaca,
    axbench,
    caa_pairs,
    harmbench,
    jailbreakbench,
    read_records,
)

__all__ = [
    "Behaviour",
    "Record",
    "Split",
    "advbench",
    "alpaca",
    "axbench",
    "caa_pairs",
    "harmbench",
    "jailbreakbench",
    "load",
    "names",
    "of_prompts",
    "read_records",
]
