"""Sweeps: layers x coefficients x vectors x prompts as mixed rows of one Engine, kept on disk as they finish.

    Sweep (what is asked) -> settings and prompts -> run(sweep, model, tokenizer, store) -> Store -> table

A kill at any moment loses the rows in flight; running the same sweep again goes on. docs/evaluate.md has the store's
tables.
"""

from faststeer.evaluate.sweep.description import Setting, Sweep, SweepPrompt, load_sweep, random_plan
from faststeer.evaluate.sweep.entanglement import Moved, entanglement
from faststeer.evaluate.sweep.run import Progress, run
from faststeer.evaluate.sweep.store import Store, StoreError
from faststeer.evaluate.sweep.table import Line, shows_share, table

__all__ = [
    "Line",
    "Moved",
    "Progress",
    "Setting",
    "Store",
    "StoreError",
    "Sweep",
    "SweepPrompt",
    "entanglement",
    "load_sweep",
    "random_plan",
    "run",
    "shows_share",
    "table",
]
