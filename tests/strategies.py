"""Random plans: every kind of intervention, with every field that it has, as hypothesis strategies. Numbers come from
a seed, structure from hypothesis, so that a failure shrinks to few parts."""

from __future__ import annotations

import functools
from typing import Any

import hypothesis
import torch
from hypothesis import strategies as st
from oracle import is_vector, sites_of
from torch import Tensor

import faststeer as fs

POINTS = ("resid_pre", "attn_out", "resid_mid", "mlp_out", "resid_post")
KINDS = ("Add", "Ablate", "Project", "Clamp", "Rotate", "Probe")
seeds = st.integers(0, 2**31 - 1)


def randn(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def independent(rows: Tensor) -> bool:
    """Far from the dependence that is refused."""
    scales = torch.linalg.svdvals(torch.nn.functional.normalize(rows.double(), dim=1))
    return bool(scales[-1] > 1e-2)


def _slices() -> st.SearchStrategy[slice]:
    bounds = [(a, b) for a in (None, *range(-6, 7)) for b in (None, *range(-6, 7))]
    some = [(a, b) for a, b in bounds if a is None or (a < 0 if b is None else a < b) or (b is None and a >= 0)]
    return st.sampled_from(some).map(lambda bound: slice(*bound))


# Strategies are made once: building them is a large part of what drawing costs.
_named_positions = st.sampled_from(["all", "all", "prompt", "generated", "last"])
_as_text = _slices().map(lambda s: f"[{'' if s.start is None else s.start}:{'' if s.stop is None else s.stop}]")
positions = st.one_of(_named_positions, _named_positions, st.integers(-4, 4), _slices(), _as_text)
_yes = st.booleans()
_number = st.floats(-2, 2, allow_nan=False, width=16)
_strength = st.sampled_from([1.0, 1.0, 2.0, 0.0]) | _number
_degrees = st.sampled_from([0.0, 90.0, -360.0]) | st.floats(-400, 400, allow_nan=False, width=16)
_threshold = st.floats(-1.5, 1.5, allow_nan=False, width=16)
_dtype = st.sampled_from([torch.float32, torch.float32, torch.float64])
_point = st.sampled_from(POINTS)
_vector_points = st.sampled_from([None, *POINTS, ("attn_out", "mlp_out"), ("mlp_out", "resid_mid", "resid_pre")])
_tensor_points = st.sampled_from([None, *POINTS, ("resid_pre", "attn_out", "mlp_out"), ("resid_post", "resid_pre")])
_subsets = {n: [[i for i in range(n) if mask >> i & 1] for mask in range(1, 2**n)] for n in (1, 2, 3)}
_layer_sets = {n: st.sampled_from(subsets) for n, subsets in _subsets.items()}
_tensor_layers = {n: st.sampled_from(["all", *range(-n, n), *_subsets[n]]) for n in _subsets}


def _direction(draw: st.DrawFn, hidden: int, n_layers: int, *, most: int = 1) -> Any:
    """A tensor `[hidden]`, `[k, hidden]` with k up to `most`, or a SteeringVector for some layers."""
    seed, dtype = draw(seeds), draw(_dtype)
    form = draw(_form if most > 1 else _form_of_one)
    if form == "vector":
        layers = draw(_layer_sets[n_layers])
        return fs.SteeringVector({layer: randn(seed + layer, hidden, dtype=dtype) for layer in layers}, at=draw(_point))
    if form == "subspace":
        rows = randn(seed, most - seed % 2, hidden, dtype=dtype)
        hypothesis.assume(independent(rows))
        return rows
    return randn(seed, hidden, dtype=dtype)


_form, _form_of_one = st.sampled_from(["tensor", "subspace", "vector"]), st.sampled_from(["tensor", "vector"])


def _gate(draw: st.DrawFn, hidden: int, acts: dict[int, tuple[str, int]], n_layers: int) -> fs.Gate:
    """A gate for an intervention that acts at these sites."""
    cosine, above, latched, has_vector = draw(_yes), draw(_yes), draw(_yes), draw(_yes)
    threshold, seed = draw(_threshold) * (1 / hidden**0.5 if cosine else 2.0), draw(seeds)
    common = {"threshold": threshold, "kind": "cosine" if cosine else "dot", "above": above}
    if not latched:
        layers = {layer for _, layer in acts.values()}
        vector = fs.SteeringVector({layer: randn(seed + layer, hidden) for layer in layers})
        return fs.Gate(vector if has_vector else randn(seed, hidden), **common)
    first = next(iter(acts))
    where: dict[str, Any] = {}
    if draw(_yes):  # an earlier place, or the same
        number = draw(seeds) % (first + 1)
        layer, offset = (number // 4, number % 4) if number < 4 * n_layers else (n_layers - 1, 4)
        where = {"layer": layer - n_layers if draw(_yes) else layer, "at": POINTS[offset]}
    layer = where["layer"] % n_layers if where else acts[first][1]
    direction = fs.SteeringVector({layer: randn(seed, hidden)}) if has_vector else randn(seed, hidden)
    return fs.Gate(direction, **common, latched=True, **where)


@st.composite
def _interventions(draw: st.DrawFn, hidden: int, n_layers: int) -> fs.Intervention:
    kind = draw(_kinds if hidden > 1 else _kinds_of_one)
    own: dict[str, Any] = {}
    if kind == "Rotate":
        direction = _direction(draw, hidden, n_layers)
        other = randn(2**31 + draw(seeds), hidden)
        ways = direction.directions.values() if is_vector(direction) else [direction]
        hypothesis.assume(all(independent(torch.stack([way.double(), other.double()])) for way in ways))
        given = (direction, other) if draw(_yes) else (other, direction)
        own = {"degrees": draw(_degrees), "relative": draw(_yes)}
    else:
        direction = _direction(
            draw, hidden, n_layers, most=min(3, hidden) if kind in ("Ablate", "Project", "Probe") else 1
        )
        given = (direction,)
    if kind == "Add":
        own = {"coefficient": draw(_number)}
    elif kind == "Ablate":
        own = {"strength": draw(_strength)}
    elif kind == "Clamp":
        low, high = sorted([draw(_number), draw(_number)])
        own = ({"low": low}, {"high": high}, {"low": low, "high": high}, {"low": low, "high": low})[draw(_four)]
    if is_vector(direction):
        names = sorted(direction.directions)
        own["layers"] = (None, names, names[:1], [names[-1] - n_layers])[draw(_four)]
        own["at"] = draw(_vector_points)
    else:
        own["layers"] = draw(_tensor_layers[n_layers])
        own["at"] = draw(_tensor_points)
    if kind == "Probe":
        return fs.Probe(*given, **own)
    more = {"positions": draw(positions), "keep_norm": draw(_yes), "probe": kind != "Add" and draw(_yes)}
    if draw(_yes):
        more["when"] = _gate(draw, hidden, sites_of(getattr(fs, kind)(*given, **own), n_layers), n_layers)
    return getattr(fs, kind)(*given, **own, **more)


_kinds, _kinds_of_one, _four = (
    st.sampled_from(KINDS),
    st.sampled_from([k for k in KINDS if k != "Rotate"]),
    st.integers(0, 3),
)


@functools.cache
def plans(hidden: int, n_layers: int, most: int = 8) -> st.SearchStrategy[fs.Plan]:
    """Plans of up to `most` interventions for a model of this shape."""
    return st.lists(_interventions(hidden, n_layers), max_size=most).map(fs.Plan)
