"""Finding directions: contrast prompts, difference in means over layers and positions, selection, and random
controls."""

from faststeer.extract.control import random_like
from faststeer.extract.dim import Candidates, candidates, dim
from faststeer.extract.optimise import Training, TrainingDiverged, TrainingSettings, bipo, ntp, po, reps
from faststeer.extract.pairs import Pair
from faststeer.extract.prompts import (
    load_contrast,
    load_prompts,
    post_instruction_positions,
)
from faststeer.extract.select import Filtered, Row, Selection, filter_prompts, select

__all__ = [
    "Candidates",
    "Filtered",
    "Pair",
    "Row",
    "Selection",
    "Training",
    "TrainingDiverged",
    "TrainingSettings",
    "bipo",
    "candidates",
    "dim",
    "filter_prompts",
    "load_contrast",
    "load_prompts",
    "ntp",
    "po",
    "post_instruction_positions",
    "random_like",
    "reps",
    "select",
]
