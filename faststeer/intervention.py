"""Interventions: what to do to the residual stream, where and when. Frozen descriptions with no device memory; a
`Plan` puts them in order, `compile_plan` makes entries of them."""

from __future__ import annotations

import math
import numbers
from collections.abc import Iterable, Mapping
from dataclasses import KW_ONLY, dataclass
from itertools import islice
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from faststeer.ops.tables import POSITION_MAX, POSITION_MIN, EntryKind, GateMode
from faststeer.vector import (
    MAX_LAYERS,
    HookPoint,
    SteeringVector,
    check_direction,
    check_hook_point,
    in_tables,
    is_trained,
    whole_number,
)

Direction = SteeringVector | Tensor
Layers = int | Iterable[int] | Literal["all"] | None
Positions = Literal["all", "prompt", "generated", "last"] | str | slice | int
Number = float | Tensor
FLOAT32_MAX = torch.finfo(torch.float32).max


@dataclass(frozen=True, eq=False)
class Gate:
    """A condition on the residual stream under which an intervention acts.

    The value is h . d (`kind="dot"`, d as given) or cos(h, d) (`kind="cosine"`; 0 for a zero row). It opens where value
    > threshold, with `above=False` where value <= threshold.

    Args:
        direction: `[hidden]`, or a SteeringVector, whose direction for the gate's layer is used.
        threshold: in the units of the value.
        kind: which value is compared, "dot" or "cosine", which is right for norms from 1e-15 to 1e19, and 0 beyond.
        above: open above the threshold; False: at the threshold and below.
        latched: decide once per sequence, at its last prompt token, on the row as it enters the gate's site; the
            decision holds from that token on. False: each token is decided separately, on the row right before the
            intervention.
        layer, at: the site whose row a latched gate reads; by default the first site where the intervention acts. It
            may be earlier than that site, but not later.

    Source: conditional activation steering, arXiv 2409.05907; the adaptive mode of angular steering, arXiv 2510.26243.
    """

    direction: Direction
    threshold: float = 0.0
    _: KW_ONLY
    kind: Literal["dot", "cosine"] = "dot"
    above: bool = True
    latched: bool = False
    layer: int | None = None
    at: HookPoint | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "direction", _direction(self.direction, "the gate's direction"))
        object.__setattr__(self, "threshold", float(_finite(self.threshold, "the gate's threshold")))
        if isinstance(self.direction, Tensor) and not bool(in_tables(self.direction).any()):
            raise ValueError("the gate's direction is zero: every row has the same value there")
        if self.kind not in ("dot", "cosine"):
            raise ValueError(f"unknown gate kind {self.kind!r}: expected 'dot' or 'cosine'")
        if self.at is not None:
            check_hook_point(self.at)
        if self.layer is not None:
            if (layer := whole_number(self.layer)) is None:
                raise ValueError(f"the gate's layer {self.layer!r} is no layer number")
            object.__setattr__(self, "layer", layer)
        _switches(self, "above", "latched")
        if not self.latched and (self.layer is not None or self.at is not None):
            raise ValueError(
                "a gate that every token decides for itself looks where the intervention acts: drop layer= and at=, "
                "or set latched=True"
            )

    @property
    def mode(self) -> int:
        """The gate's number in the op's tables: a GateMode, negative where the gate opens at or below the threshold."""
        mode = GateMode.COSINE if self.kind == "cosine" else GateMode.DOT
        return int(mode) if self.above else -int(mode)


@dataclass(frozen=True, eq=False)
class Intervention:
    """What every intervention has in common; the kinds are `Add`, `Ablate`, `Project`, `Clamp`, `Rotate` and `Probe`.

    Args:
        layers: decoder layers from 0, negative ones from the end: an int, several, a range, or "all". None: the layers
            of the SteeringVector given.
        at: hook point or hook points. None: that of the SteeringVector; "resid_post" for a bare tensor.
        positions: "all", "prompt", "generated", "last" (the last prompt token), a slice counted from the prompt's end
            such as `slice(-5, None)` or "[-5:]", or one position as int.
        when: a Gate.
        keep_norm: scale the row back to the norm it had. Both norms must be from 1e-15 to 1e19, whose squares fp32 can
            hold; beyond, the row becomes zero, infinite or NaN. (A model's own RMSNorm has the same limit.)
        probe: also write the row's dot products with the directions, before acting, to the probe buffer.
    """

    _: KW_ONLY
    layers: Layers = None
    at: HookPoint | tuple[HookPoint, ...] | None = None
    positions: Positions = "all"
    when: Gate | None = None
    keep_norm: bool = False
    probe: bool = False

    direction_names: ClassVar[tuple[str, ...]] = ("direction",)
    vectors: ClassVar[Literal["as they are", "each of length 1", "orthonormal"]] = "orthonormal"  # in the bank

    def __post_init__(self) -> None:
        set_ = object.__setattr__
        for name in self.direction_names:
            set_(
                self,
                name,
                _direction(getattr(self, name), f"{type(self).__name__}'s {name}", subspace=self._takes_subspace),
            )
        set_(self, "layers", _layers(self.layers))
        if self.at is not None:
            points = tuple(self.at) if isinstance(self.at, (tuple, list)) else (self.at,)
            if not points:
                raise ValueError("at=() names no hook point: leave it out for the default")
            if len(points) > len({str(point) for point in points}):
                raise ValueError(f"at={points[:5]} names a hook point twice: an intervention acts once at each")
            set_(self, "at", tuple(check_hook_point(point) for point in points))
        set_(self, "positions", _positions(self.positions))
        _switches(self, "keep_norm", "probe")
        if self.when is not None and not isinstance(self.when, Gate):
            raise TypeError(f"when= takes a Gate, got {type(self.when).__name__}")
        self._check()

    _takes_subspace: ClassVar[bool] = False

    def _check(self) -> None:
        """What a kind has to check of its own numbers."""

    @property
    def kind(self) -> EntryKind:
        """The intervention's number in the op's tables."""
        return EntryKind[type(self).__name__.upper()]

    @property
    def scalars(self) -> tuple[Number, Number]:
        """The two numbers the op needs (columns A and B of `entries`)."""
        return 0.0, 0.0

    @property
    def position_range(self) -> tuple[int, int]:
        """low, high: acts where low <= r < high, r counted from the prompt's end."""
        return position_range(self.positions)

    def directions(self) -> list[Direction]:
        """The direction, or for `Rotate` both, as SteeringVector or tensor."""
        return [getattr(self, name) for name in self.direction_names]

    @property
    def requires_grad(self) -> bool:
        """Whether a direction or a number is being trained."""
        tensors = [
            t for d in self.directions() for t in (d.directions.values() if isinstance(d, SteeringVector) else [d])
        ]
        return any(isinstance(t, Tensor) and is_trained(t) for t in [*tensors, *self.scalars])


@dataclass(frozen=True, eq=False)
class Add(Intervention):
    """h + coefficient * v: activation addition, CAA, RePS, control vectors. v is used as it is, not normalised.

    Args:
        direction: `[hidden]` or a SteeringVector.
        coefficient: finite float, or a tensor of one element where a gradient is wanted.

    Source: arXiv 2308.10248 (activation addition), 2312.06681 (CAA).
    """

    direction: Direction
    coefficient: Number = 1.0
    vectors: ClassVar[Literal["as they are"]] = "as they are"

    def _check(self) -> None:
        object.__setattr__(self, "coefficient", _finite(self.coefficient, "Add's coefficient"))
        direction = self.direction
        if isinstance(direction, Tensor) and not is_trained(direction) and not bool(in_tables(direction).any()):
            raise ValueError(
                "Add's direction is zero: adding it does nothing; check where it came from (to switch steering off, "
                "use coefficient=0)"
            )
        if self.probe:
            raise ValueError(
                "Add takes no dot product, so there is nothing to probe: put Probe(direction) before it in the plan"
            )

    @property
    def scalars(self) -> tuple[Number, Number]:
        """The coefficient, and 0."""
        return self.coefficient, 0.0


@dataclass(frozen=True, eq=False)
class Ablate(Intervention):
    """h - strength * sum_k (h . q_k) q_k: directional ablation; strength 2 reflects (Householder).

    Args:
        direction: `[hidden]`, `[k, hidden]` (linearly independent; made orthonormal), or a SteeringVector.
        strength: 1 removes the component, 0 nothing.

    Source: arXiv 2406.11717.
    """

    direction: Direction
    strength: Number = 1.0
    _takes_subspace: ClassVar[bool] = True

    def _check(self) -> None:
        object.__setattr__(self, "strength", _finite(self.strength, "Ablate's strength"))

    @property
    def scalars(self) -> tuple[Number, Number]:
        """The strength, and 0."""
        return self.strength, 0.0


@dataclass(frozen=True, eq=False)
class Project(Intervention):
    """sum_k (h . q_k) q_k: keep only the part of h in the subspace.

    Args:
        direction: `[hidden]`, `[k, hidden]` (linearly independent; made orthonormal), or a SteeringVector.
    """

    direction: Direction
    _takes_subspace: ClassVar[bool] = True


@dataclass(frozen=True, eq=False)
class Clamp(Intervention):
    """h + (clip(p, low, high) - p) q with p = h . q: sets (low = high), caps or floors the projection on a direction.
    With `Add`: ACE, AxBench's clamp.

    Args:
        direction: `[hidden]` or a SteeringVector; its length does not matter.
        low, high: in units of the residual stream; None for no bound. At least one is needed.

    Source: arXiv 2411.09003 (ACE), 2501.17148 (AxBench).
    """

    direction: Direction
    low: float | None = None
    high: float | None = None

    def _check(self) -> None:
        if self.low is None and self.high is None:
            raise ValueError("Clamp without low and high does nothing: give at least one bound")
        for name in ("low", "high"):
            if (value := getattr(self, name)) is not None:
                object.__setattr__(self, name, _finite(value, f"Clamp's {name}"))
        if self.low is not None and self.high is not None and float(self.low) > float(self.high):
            raise ValueError(f"Clamp's low {self.low} is above its high {self.high}")

    @property
    def scalars(self) -> tuple[Number, Number]:
        """The bounds low and high, minus and plus infinity where there is none."""
        return -math.inf if self.low is None else self.low, math.inf if self.high is None else self.high


@dataclass(frozen=True, eq=False)
class Rotate(Intervention):
    """Rotate the part of h in the plane of a and b; the rest of h, and its norm, do not change.

    b1 = a / |a|, b2 = the part of b orthogonal to a, normalised. Absolute: h - p1 b1 - p2 b2 + sqrt(p1^2 + p2^2) (cos t
    b1 + sin t b2), so 0 degrees points along a. Relative: the part in the plane is turned by t from b1 towards b2.

    Args:
        a, b: `[hidden]` or SteeringVectors, not parallel.
        degrees: the angle t.
        relative: rotate by t. False: rotate to the angle t from a.

    Source: arXiv 2510.26243 (absolute), 2601.19375 (relative).
    """

    a: Direction
    b: Direction
    degrees: float = 0.0
    _: KW_ONLY
    relative: bool = False

    direction_names: ClassVar[tuple[str, ...]] = ("a", "b")

    def _check(self) -> None:
        object.__setattr__(self, "degrees", _finite(self.degrees, "Rotate's degrees"))
        _switches(self, "relative")

    @property
    def kind(self) -> EntryKind:
        """The number in the op's tables; absolute and relative rotations have one each."""
        return EntryKind.ROTATE_RELATIVE if self.relative else EntryKind.ROTATE

    @property
    def scalars(self) -> tuple[Number, Number]:
        """Cosine and sine of the angle."""
        if isinstance(self.degrees, Tensor):
            return torch.deg2rad(self.degrees).cos(), torch.deg2rad(self.degrees).sin()
        # Whole turns first, so that 360 degrees turn by exactly nothing.
        angle = math.radians(math.remainder(self.degrees, 360.0))
        return math.cos(angle), math.sin(angle)


@dataclass(frozen=True, eq=False)
class Probe(Intervention):
    """Leaves h as it is and writes h . v_k / |v_k| to the probe buffer, for every token, whatever `positions` says.

    Args:
        direction: `[hidden]`, `[k, hidden]` or a SteeringVector. Each direction is normalised; the order is kept.
    """

    direction: Direction
    _takes_subspace: ClassVar[bool] = True
    vectors: ClassVar[Literal["each of length 1"]] = "each of length 1"

    def _check(self) -> None:
        if self.when is not None or self.positions != "all" or self.keep_norm:
            raise ValueError("a Probe looks at every token and changes none: it takes no when, positions or keep_norm")
        object.__setattr__(self, "probe", True)


KINDS: dict[str, type[Intervention]] = {kind.__name__: kind for kind in (Add, Ablate, Project, Clamp, Rotate, Probe)}


def position_range(positions: Positions) -> tuple[int, int]:
    """The half-open range [low, high) of positions, counted from the prompt's end (docs/design.md)."""
    named = {
        "all": (POSITION_MIN, POSITION_MAX),
        "prompt": (POSITION_MIN, 0),
        "generated": (0, POSITION_MAX),
        "last": (-1, 0),
    }
    if isinstance(positions, int):
        return positions, positions + 1
    if positions in named:
        return named[positions]
    start, _, stop = str(positions).strip("[]").partition(":")
    low = int(start) if start else POSITION_MIN
    high = int(stop) if stop else (0 if low < 0 else POSITION_MAX)
    return low, high


def _positions(positions: object) -> str | int:
    """`positions` in the form that is kept and written to JSON: a name, "[a:b]", or an int."""
    expected = (
        "expected 'all', 'prompt', 'generated', 'last', an int, or a slice counted from the prompt's end such as "
        "slice(-5, None) or '[-5:]'"
    )
    if isinstance(positions, slice):
        if positions.step not in (None, 1):
            raise ValueError(f"positions={positions!r} has a step: {expected}")
        bounds = ["" if b is None else whole_number(b) for b in (positions.start, positions.stop)]
        if None in bounds:
            raise ValueError(f"positions={positions!r}: {expected}")
        positions = f"[{bounds[0]}:{bounds[1]}]"
    if not isinstance(positions, str):
        if (position := whole_number(positions)) is None:
            raise ValueError(f"positions={positions!r}: {expected}")
        positions = position
    try:
        low, high = position_range(positions)
    except ValueError:
        raise ValueError(f"positions={positions!r}: {expected}") from None
    if isinstance(positions, str) and positions not in ("all", "prompt", "generated", "last"):
        if ":" not in positions:
            raise ValueError(f"positions={positions!r}: {expected}")
        if not positions.startswith("["):
            positions = f"[{positions}]"
    if not POSITION_MIN <= low <= POSITION_MAX or not POSITION_MIN <= high <= POSITION_MAX:
        raise ValueError(f"positions={positions!r} does not fit 32 bits")
    if low >= high:
        raise ValueError(
            f"positions={positions!r} selects no token: positions count from the prompt's end, -1 is the last prompt "
            "token and 0 the first generated one"
        )
    return positions


def _layers(layers: Layers) -> tuple[int, ...] | Literal["all"] | None:
    if layers is None or (isinstance(layers, str) and layers == "all"):
        return layers
    if (layer := whole_number(layers)) is not None:
        return (layer,)
    # An array of another shape names no layers, and neither do the keys of a table.
    several = isinstance(layers, Iterable) and getattr(layers, "ndim", 1) == 1
    if not several or isinstance(layers, (str, Mapping)):
        raise ValueError(f"layers={layers!r}: expected an int, several, a range or 'all'; that is no layer number")
    named: list[Any] = list(islice(layers, MAX_LAYERS + 1))  # type: ignore[arg-type]
    if len(named) > MAX_LAYERS:
        raise ValueError(f"layers names more than {MAX_LAYERS:,} layers, more than any model has: name fewer")
    listed: list[int] = []
    for each in named:
        if (layer := whole_number(each)) is None:
            raise ValueError(f"layers={layers!r}: {each!r} is no layer number")
        listed.append(layer)
    if not listed:
        raise ValueError("layers is empty: an intervention that acts nowhere is a mistake")
    if len(set(listed)) < len(listed):
        raise ValueError(
            f"layers={layers!r} names a layer twice: put the intervention in the plan twice if it is to act twice"
        )
    return tuple(listed)


def _direction(direction: object, what: str, *, subspace: bool = False) -> Direction:
    if isinstance(direction, SteeringVector):
        return direction
    return check_direction(direction, what, subspace=subspace)


def _finite(value: object, what: str) -> Number:
    if isinstance(value, Tensor):
        one = value.numel() == 1 and not (value.is_complex() or value.is_meta)
        if not one or not bool(torch.isfinite(value.detach().float()).all()):
            shown = float(value) if one else f"a tensor {list(value.shape)} of {value.dtype} on {value.device}"
            raise ValueError(f"{what} must be one finite number, got {shown}; the tables hold float32")
        return value.reshape(()) if is_trained(value) else float(value)
    # Finite in float32, which is what the tables hold.
    real = isinstance(value, numbers.Real) and not isinstance(value, bool)
    if not real or not abs(value) <= FLOAT32_MAX:  # type: ignore[arg-type]
        kind = type(value).__name__
        raise ValueError(f"{what} must be a finite number, got {str(value)[:40]!r} ({kind}); the tables hold float32")
    return float(value)  # type: ignore[arg-type]


def _switches(item: Gate | Intervention, *names: str) -> None:
    for name in names:
        if not isinstance(getattr(item, name), bool):
            raise ValueError(f"{type(item).__name__}'s {name} must be True or False, got {getattr(item, name)!r}")
