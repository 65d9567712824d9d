"""Behaviours: what a steering vector is to stand for, as data: contrast prompts, target completions, held-out prompts,
and the judge that reads the answers."""

from faststeer.behaviours.behaviour import Behaviour, BehaviourSplit, load, names, of_prompts
from faststeer.behaviours.layouts import DatasetRow, pairs_of, read_records

__all__ = ["Behaviour", "BehaviourSplit", "DatasetRow", "load", "names", "of_prompts", "pairs_of", "read_records"]
