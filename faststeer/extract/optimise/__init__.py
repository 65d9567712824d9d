"""Vectors by optimisation: trained on preference pairs through the gradients of the steering ops, the model frozen."""

from faststeer.extract.optimise.objectives import METHODS, NTP, PO, BiPO, RePS
from faststeer.extract.optimise.recipe import Recipe, read_options
from faststeer.extract.optimise.training import Run, Training, TrainingDiverged, train

__all__ = [
    "METHODS",
    "NTP",
    "PO",
    "BiPO",
    "RePS",
    "Recipe",
    "Run",
    "Training",
    "TrainingDiverged",
    "read_options",
    "train",
]
