"""Finding directions: from contrast in one pass, from pairs, by optimisation, by interpretability; selection among
layers, positions and coefficients; and random controls."""

from faststeer.algebra import random_like
from faststeer.extract.activations import Activations
from faststeer.extract.attribution import Attribution, attribution, logit_difference
from faststeer.extract.caa import caa, caa_table
from faststeer.extract.contrast import (
    Contrast,
    Directions,
    ace,
    ace_plan,
    contrast,
    lat,
    of_activations,
    pca,
    probe,
)
from faststeer.extract.cosmic import CosmicSelection, select_cosmic
from faststeer.extract.costs import selection_seconds
from faststeer.extract.dim import Candidates, candidates, dim
from faststeer.extract.optimise import NTP, PO, BiPO, Recipe, RePS, Training, TrainingDiverged, train
from faststeer.extract.pairs import Pair
from faststeer.extract.sae import sae_feature
from faststeer.extract.select import RefusalRow, Selection, check_refusal, select
from faststeer.extract.steered_pairs import steered_pairs
from faststeer.extract.sweep import JudgeSelection, select_by_judge
from faststeer.extract.unembedding import unembedding
from faststeer.hf.prompts import (
    load_contrast,
    load_prompts,
    post_instruction_positions,
)

__all__ = [
    "NTP",
    "PO",
    "Activations",
    "Attribution",
    "BiPO",
    "Candidates",
    "Contrast",
    "CosmicSelection",
    "Directions",
    "JudgeSelection",
    "Pair",
    "RePS",
    "Recipe",
    "RefusalRow",
    "Selection",
    "Training",
    "TrainingDiverged",
    "ace",
    "ace_plan",
    "attribution",
    "caa",
    "caa_table",
    "candidates",
    "check_refusal",
    "contrast",
    "dim",
    "lat",
    "load_contrast",
    "load_prompts",
    "logit_difference",
    "of_activations",
    "pca",
    "post_instruction_positions",
    "probe",
    "random_like",
    "sae_feature",
    "select",
    "select_by_judge",
    "select_cosmic",
    "selection_seconds",
    "steered_pairs",
    "train",
    "unembedding",
]
