"""The operators: what steering does to the rows of a tensor, on the back end that fits. Knows tables and rows; knows no
model, no plan and no hook."""

from faststeer.ops import reference
from faststeer.ops.dispatch import (
    Backend,
    BackendState,
    add_steer,
    add_steer_rmsnorm,
    add_steer_rmsnorm_at,
    backend,
    backend_for,
    latch_,
    overload,
    prepare,
    states,
    steer,
    steer_,
    steer_at,
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
    "Tables",
    "add_steer",
    "add_steer_rmsnorm",
    "add_steer_rmsnorm_at",
    "backend",
    "backend_for",
    "latch_",
    "linear",
    "overload",
    "prepare",
    "reference",
    "states",
    "steer",
    "steer_",
    "steer_at",
    "steer_pair_",
    "takes_prepared",
    "warmup",
]
