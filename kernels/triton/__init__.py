"""The Triton back end: every operator of docs/kernels.md, for CUDA tensors, and for CPU tensors where Triton's
interpreter is on (TRITON_INTERPRET=1 before Triton is first imported).

The functions take the arguments of the operators' schemas, in their order, and do not check them. They do not
synchronise with the host and allocate nothing but their results, so that a graph capture can contain them, once
`warmup` has compiled them.

Run so far in Triton's interpreter, and compiled for sm_80, sm_90 and sm_100; no GPU has run any of it yet.
"""

from faststeer.kernels.residual import add_steer, add_steer_rmsnorm, latch_, steer, steer_pair_
from faststeer.kernels.warmup import warmup

__all__ = [
    "add_steer",
    "add_steer_rmsnorm",
    "latch_",
    "steer",
    "steer_pair_",
    "warmup",
]
