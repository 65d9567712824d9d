"""Vectors by optimisation: trained on preference pairs through the gradients of the steering ops, the model frozen."""

from faststeer.extract.optimise.methods import bipo, ntp, po, reps
from faststeer.extract.optimise.training import Run, Training, TrainingDiverged, TrainingSettings

__all__ = ["Run", "Training", "TrainingDiverged", "TrainingSettings", "bipo", "ntp", "po", "reps"]
