"""What a vector's file may leave unsaid, and how saying it is asked for.

A direction without its hook point, layer or op can be applied one layer off, or added where it should be removed, and
nobody sees it. So what a file does not say is never guessed: it is an argument, and an argument that contradicts the
file is an error.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from faststeer.files import FormatError
from faststeer.vector import OPS, HookPoint, SteeringVector, check_hook_point, in_tables, whole_number

Format = Literal["faststeer", "gguf", "steering-vectors", "caa", "refusal_direction"]
FORMATS: tuple[Format, ...] = ("faststeer", "gguf", "steering-vectors", "caa", "refusal_direction")


@dataclass(frozen=True)
class Said:
    """What the caller says about a file; None: nothing.

    Args:
        format: whose convention the file follows, where its content fits several.
        at: hook point of the directions.
        layer: decoder layer of a single direction, from 0; of several, the one to keep.
        position: which token of several (refusal_direction's mean_diffs), counted from the prompt's end (-1: the last).
        op: what the direction is meant for.
        model: name of the model it was found in.
        scale: whether the directions' lengths mean something ("raw"), or are 1 ("unit").

    Raises:
        ValueError: an unknown format, hook point or op, a negative layer, a position that is not negative.
    """

    format: Format | None = None
    at: HookPoint | None = None
    layer: int | None = None
    position: int | None = None
    op: str | None = None
    model: str | None = None
    scale: Literal["raw", "unit"] | None = None

    def __post_init__(self) -> None:
        if self.format is not None and self.format not in FORMATS:
            raise ValueError(f"unknown format {self.format!r}: expected one of {', '.join(FORMATS)}")
        if self.at is not None:
            check_hook_point(self.at)
        if self.op is not None and self.op not in OPS:
            raise ValueError(f"unknown op {self.op!r}: expected one of {', '.join(OPS)}")
        if self.scale not in (None, "raw", "unit"):
            raise ValueError(f"unknown scale {self.scale!r}: expected 'raw' or 'unit'")
        for name, counted in (("layer", "counted from 0"), ("position", "negative: -1 is the prompt's last token")):
            if (value := getattr(self, name)) is not None:
                number = whole_number(value)
                if number is None or (number < 0) != (name == "position"):
                    raise ValueError(f"{name}={value!r}: expected an integer, {counted}")
                object.__setattr__(self, name, number)

    def known(self, name: str, value: Any, what: str) -> Any:
        """What the file says of `name`, which the caller may repeat but not contradict."""
        said = getattr(self, name)
        if said is not None and said != value:
            raise FormatError(f"{what} says {name}={value!r}, the call {name}={said!r}: leave {name} out")
        return value

    def needed(self, name: str, what: str, why: str) -> Any:
        """What the caller says of `name`, which the file does not."""
        said = getattr(self, name)
        if said is None:
            raise FormatError(f"{what} {why}: say {name}=")
        return said

    def kept(self, directions: Mapping[int, Tensor], what: str) -> Mapping[int, Tensor]:
        """The directions of a file that says their layers, or the one that the caller names."""
        if self.layer is None:
            return directions
        if self.layer not in directions:
            raise FormatError(f"{what} has no direction for layer={self.layer}; it has {list(directions)}")
        return {self.layer: directions[self.layer]}

    def unused(self, what: str, *names: str) -> None:
        """Refuse arguments that have no meaning for this file."""
        for name in names:
            if getattr(self, name) is not None:
                raise FormatError(f"{what} has no choice of {name}: leave {name}={getattr(self, name)!r} out")


def one_row(tensor: Tensor) -> Tensor:
    """`[1, hidden]` as `[hidden]`: one direction, not that of layer 0. Anything else as it is."""
    return tensor.reshape(-1) if tensor.ndim > 1 and tensor.numel() == tensor.shape[-1] else tensor


def built(what: str, directions: Mapping[int, Tensor], **fields: Any) -> SteeringVector:
    """A SteeringVector of what a file holds.

    Directions that are all zero are left out (adding or removing nothing is what having none means; other tools write
    them where two prompts share a token), and their layers are noted in the provenance.

    Raises:
        FormatError: what a SteeringVector refuses, naming the file.
    """
    directions = {layer: one_row(direction) for layer, direction in directions.items()}
    zero = [layer for layer, direction in directions.items() if not bool(in_tables(direction).any())]
    nonzero = {layer: direction for layer, direction in directions.items() if layer not in zero}
    if directions and not nonzero:
        raise FormatError(f"{what} holds only zeros: it points nowhere")
    provenance = dict(fields.pop("provenance", {})) | ({"zero_layers": sorted(zero)} if zero else {})
    try:
        return SteeringVector(nonzero, provenance=provenance, **fields)
    except (TypeError, ValueError, RuntimeError) as error:
        raise FormatError(f"{what} is not a valid steering vector: {error}") from error


def as_said(directions: dict[int, Tensor], what: str, said: Said, provenance: Mapping[str, Any]) -> SteeringVector:
    """Directions by layer, of a tool that is not known: the hook point is the caller's to say."""
    if said.format is not None:
        raise FormatError(f"{what} holds directions for {len(directions)} layers: no file of {said.format}")
    said.unused(what, "position")
    at = said.needed("at", what, f"holds directions for {len(directions)} layers and does not say at which hook point")
    return built(what, said.kept(directions, what), at=at, op=said.op, model=said.model, provenance=provenance)


def single(direction: Tensor, what: str, said: Said, provenance: Mapping[str, Any]) -> SteeringVector:
    """One direction, of a tool that is not known: hook point and layer are the caller's to say."""
    if said.format is not None:
        raise FormatError(f"{what} holds one direction: no file of {said.format}")
    said.unused(what, "position")
    if said.at is None or said.layer is None:
        raise FormatError(f"{what} is one direction and does not say where it belongs: say layer= and at=")
    return built(what, {said.layer: direction}, at=said.at, op=said.op, model=said.model, provenance=provenance)
