"""The operators: what steering does to the rows of a tensor, on the back end that fits. Knows tables and rows; knows no
model, no plan and no hook."""

from faststeer.ops import reference
from faststeer.ops.dispatch import (
    Backend,
    BackendState,
    Prepared,
    add_steer,
    add_steer_rmsnorm,
    backend,
    backend_for,
    latch_,
    overload,
    prepare,
    states,
    steer,
    steer_pair_,
    takes_prepared,
    warmup,
)
from faststeer.ops.linear import linear
from faststeer.ops.tables import EntryKind, Field, GateMode, Tables

__all__ = [
    "Backend",
    "BackendState",
    "EntryKind",
    "Field",
    "GateMode",
    "Prepared",
    "Tables",
    "add_steer",
    "add_steer_rmsnorm",
    "backend",
    "backend_for",
    "latch_",
    "linear",
    "overload",
    "prepare",
    "reference",
    "states",
    "steer",
    "steer_pair_",
    "takes_prepared",
    "warmup",
]
