"""Files of steering vectors, ours and other projects', and plans made permanent in a model's weights."""

from faststeer.formats import control_vectors, hub
from faststeer.formats.conventions import FORMATS, Said
from faststeer.formats.files import from_bytes, load, save
from faststeer.formats.hub import pull, push
from faststeer.vector import VectorFileError

__all__ = ["FORMATS", "Said", "VectorFileError", "control_vectors", "from_bytes", "hub", "load", "pull", "push", "save"]
