"""What steering changes, and through which parts: activations, lenses, steering value vectors, frozen attention."""

from faststeer.hf.attention import AttentionCall, attention_modules, exchange_attention
from faststeer.hf.freeze import Freezing, freeze
from faststeer.observe.capture import Capture, Captured, capture
from faststeer.observe.difference import Difference, difference, kept_positions
from faststeer.observe.lens import LogitLens
from faststeer.observe.parts import Norm, Parts, find_parts
from faststeer.observe.svv import Ablating, Split, SteeringValueVectors, ablate, split, svv

__all__ = [
    "Ablating",
    "AttentionCall",
    "Capture",
    "Captured",
    "Difference",
    "Freezing",
    "LogitLens",
    "Norm",
    "Parts",
    "Split",
    "SteeringValueVectors",
    "ablate",
    "attention_modules",
    "capture",
    "difference",
    "exchange_attention",
    "find_parts",
    "freeze",
    "kept_positions",
    "split",
    "svv",
]
