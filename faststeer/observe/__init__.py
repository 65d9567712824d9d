"""What steering changes, and through which parts: activations, lenses, steering value vectors, frozen attention."""

from faststeer.hf.attention import AttentionCall, attention_modules, exchange_attention
from faststeer.hf.freeze import freeze
from faststeer.observe.capture import Capture, Captured, capture
from faststeer.observe.circuits import Circuit, Faithfulness, Overlap, faithfulness, overlap, random_circuit, select
from faststeer.observe.difference import Difference, difference, kept_positions
from faststeer.observe.lens import LogitLens
from faststeer.observe.parts import LayerParts, Norm, find_parts
from faststeer.observe.patching import Example, Graph, Scores, examples, patch, patch_bytes, with_positions
from faststeer.observe.sparsity import SparsityPoint, sparsity_curves
from faststeer.observe.svv import AttentionSplit, SteeringValueVectors, ablate, split, svv

__all__ = [
    "AttentionCall",
    "AttentionSplit",
    "Capture",
    "Captured",
    "Circuit",
    "Difference",
    "Example",
    "Faithfulness",
    "Graph",
    "LayerParts",
    "LogitLens",
    "Norm",
    "Overlap",
    "Scores",
    "SparsityPoint",
    "SteeringValueVectors",
    "ablate",
    "attention_modules",
    "capture",
    "difference",
    "examples",
    "exchange_attention",
    "faithfulness",
    "find_parts",
    "freeze",
    "kept_positions",
    "overlap",
    "patch",
    "patch_bytes",
    "random_circuit",
    "select",
    "sparsity_curves",
    "split",
    "svv",
    "with_positions",
]
