"""Plans made permanent: in a model's weights, or as a LoRA adapter."""

from faststeer.folding.adapter import Adapter, fold_adapter
from faststeer.folding.affine import FoldError
from faststeer.folding.weights import Check, Folded, fold

__all__ = ["Adapter", "Check", "FoldError", "Folded", "fold", "fold_adapter"]
