"""Files of steering vectors, ours and other projects'."""

from faststeer.files import FormatError
from faststeer.formats import control_vectors, hub
from faststeer.formats.conventions import FORMATS, Said
from faststeer.formats.files import from_bytes, load, save
from faststeer.formats.hub import pull, push

__all__ = ["FORMATS", "FormatError", "Said", "control_vectors", "from_bytes", "hub", "load", "pull", "push", "save"]
