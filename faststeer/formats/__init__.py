"""Files of steering vectors, ours and other projects', and plans made permanent in a model's weights."""

from faststeer.files import FormatError
from faststeer.formats import control_vectors, hub
from faststeer.formats.adapter import Adapter, fold_adapter
from faststeer.formats.affine import FoldError
from faststeer.formats.conventions import FORMATS, Said
from faststeer.formats.files import from_bytes, load, save
from faststeer.formats.folding import Check, Folded, fold
from faststeer.formats.hub import pull, push

__all__ = [
    "FORMATS",
    "Adapter",
    "Check",
    "FoldError",
    "Folded",
    "FormatError",
    "Said",
    "control_vectors",
    "fold",
    "fold_adapter",
    "from_bytes",
    "hub",
    "load",
    "pull",
    "push",
    "save",
]
