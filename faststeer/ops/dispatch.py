"""Which back end runs an op, and the ops as functions of `Tables` and of where rows stand.

`FASTSTEER_BACKEND`, read once, or `with backend("triton")` chooses one; an explicit choice never falls back. `auto`
takes, on CUDA tensors, `cuda` where it is built, else `triton`, else `reference`; on CPU tensors `cpu` where it is
built, else `reference`. It warns once where a library is built but cannot be used: of other sources, as in a checkout
whose csrc/ has changed since, or one that cannot be loaded.
"""

from __future__ import annotations

import ctypes
import functools
import importlib
import importlib.util
import os
import warnings
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, Protocol, cast, get_args

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.compiler import is_compiling

from faststeer.ops import reference, schema
from faststeer.ops.tables import Tables

Backend = Literal["reference", "cpu", "triton", "cuda"]
BACKENDS: tuple[Backend, ...] = get_args(Backend)
KERNELS = "faststeer.kernels"  # the folder kernels/triton, installed under this name

_chosen: Backend | Literal["auto"] | None = None  # None: FASTSTEER_BACKEND decides


@dataclass(frozen=True)
class BackendState:
    """Whether a back end can be used here, and why not."""

    works: bool
    reason: str


@contextmanager
def backend(name: Backend | Literal["auto"]) -> Iterator[None]:
    """Use one back end inside the block.

    Raises:
        ValueError: an unknown name.
        RuntimeError: it does not work here; the message says why.
    """
    global _chosen
    before, _chosen = _chosen, _checked(name, "backend(...)")
    try:
        yield
    finally:
        _chosen = before


def backend_for(device: torch.device | str) -> Backend:
    """The back end that runs an op on tensors of this device.

    Raises:
        ValueError: FASTSTEER_BACKEND names none.
        RuntimeError: the one that was chosen does not work here, or not on this device.
    """
    return _resolve(_chosen, torch.device(device).type)


# A compiler that traces this takes the answer for a constant; that it depends on _chosen, it sees before.
@torch.compiler.assume_constant_result
def _resolve(chosen: Backend | Literal["auto"] | None, kind: str) -> Backend:
    if chosen is None:
        requested = _checked(os.environ.get("FASTSTEER_BACKEND", "auto"), "FASTSTEER_BACKEND")
    else:
        requested = _checked(chosen, "backend")
    if requested == "auto":
        order: tuple[Backend, ...] = ("cuda", "triton") if kind == "cuda" else ("cpu",) if kind == "cpu" else ()
        best: Backend = next((name for name in order if states()[name].works), "reference")
        if order and best != order[0]:
            _warn_if_unfit(order[0], states()[order[0]].reason, f"{best!r} runs in its place")
        return best
    devices = {"cpu": ("cpu",), "cuda": ("cuda",), "triton": ("cuda", "cpu") if _interpreted() else ("cuda",)}
    if kind not in devices.get(requested, (kind,)):
        raise RuntimeError(
            f"the back end {requested!r} was chosen, but the tensors are on {kind}: choose another, or auto"
        )
    return requested


_resolved = functools.cache(_resolve)


@functools.cache
def _warn_if_unfit(library: str, reason: str, instead: str) -> None:
    """Warn, once, where a library that was built is not used."""
    from faststeer import build

    if reason.startswith(build.UNFIT):
        warnings.warn(f"faststeer's compiled library {library!r} is not used, {instead}: {reason}", stacklevel=2)


def warmup(hidden: int, dtype: torch.dtype, device: torch.device | str, operators: Collection[str]) -> None:
    """Compile now what these ops would compile at their first call on rows `[n, hidden]` of this dtype: Triton's
    kernels, where they are what runs on this CUDA device. Elsewhere nothing is compiled, and this does nothing."""
    if torch.device(device).type == "cuda" and backend_for(device) == "triton":
        importlib.import_module(KERNELS).warmup(hidden, dtype, device, operators=operators)


def _checked(name: str, source: str) -> Backend | Literal["auto"]:
    if name != "auto" and name not in BACKENDS:
        raise ValueError(f"{source}: unknown back end {name!r}: expected auto, {', '.join(BACKENDS)}")
    if name != "auto" and not (state := states()[cast(Backend, name)]).works:
        raise RuntimeError(f"{source}: the back end {name!r} does not work here: {state.reason}")
    return cast(Backend, name)


@functools.cache
def states() -> dict[Backend, BackendState]:
    """Each back end's state on this machine. The first call loads the libraries that are built."""
    from faststeer import build

    built = build.load()
    by_name: dict[Backend, BackendState] = {"reference": BackendState(True, "plain PyTorch, any device")}
    names: tuple[Backend, ...] = ("cpu", "cuda")
    for name in names:
        reason = built[name]
        works = reason is None
        if works and name == "cuda" and not torch.cuda.is_available():
            works, reason = False, "built, but there is no GPU that PyTorch can use"
        by_name[name] = BackendState(works, reason or "C++, built for this PyTorch")
    by_name["triton"] = _triton_state()
    return {name: by_name[name] for name in BACKENDS}


def _triton_state() -> BackendState:
    if importlib.util.find_spec("triton") is None:
        return BackendState(False, "Triton is not installed: pip install triton")
    if not _interpreted() and not torch.cuda.is_available():
        return BackendState(
            False, "there is no GPU that PyTorch can use (TRITON_INTERPRET=1 runs the kernels on the CPU, slowly)"
        )
    try:
        importlib.import_module(KERNELS)  # which registers them
    except Exception as error:  # an unfit Triton must not take the other back ends with it
        return BackendState(False, f"its kernels cannot be imported: {error}")
    return BackendState(True, "interpreted on the CPU" if _interpreted() else "Triton kernels")


def _interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


# The ops --------------------------------------------------------------------------------------------------------------


def steer(
    x: Tensor,
    tables: Tables,
    rows: Tensor,
    gate_state: Tensor | None = None,
    probe: Tensor | None = None,
    *,
    backend: Backend | None = None,
) -> Tensor:
    """Steer rows: see `faststeer.ops.reference.steer`, which every back end agrees with.

    Args:
        rows: `[3, rows]` int32, the last dimension contiguous; of more columns the first count. So in the other ops.
        probe: `[rows, n_columns]` fp32, overwritten; zero where no entry writes. So in the other ops.
        backend: the one to use, as `backend_for` gave it; None asks it again.

    Raises:
        TypeError, ValueError: an argument of the wrong dtype, shape, stride or device, named.
    """
    return _run("steer", backend, (x,), tables, rows, gate_state, probe)


def add_steer(
    x: Tensor,
    residual: Tensor,
    tables: Tables,
    rows: Tensor,
    gate_state: Tensor | None = None,
    probe: Tensor | None = None,
    *,
    backend: Backend | None = None,
) -> Tensor:
    """`steer` of x + residual: see `faststeer.ops.reference.add_steer`."""
    return _run("add_steer", backend, (x, residual), tables, rows, gate_state, probe)


def steer_pair_(
    x: Tensor,
    residual: Tensor,
    tables: Tables,
    rows: Tensor,
    gate_state: Tensor | None = None,
    probe: Tensor | None = None,
    *,
    backend: Backend | None = None,
) -> None:
    """Steer a stream kept as the pair (x, residual) in place, for inference: see `faststeer.ops.reference.steer_pair_`.

    Args:
        probe: as there, and not as in the other ops.

    Raises:
        RuntimeError: a gradient would be needed: `add_steer` gives one.
    """
    refuse_gradient("steer_pair_", x, residual, tables.bank, tables.scalars, instead="add_steer")
    _run("steer_pair_", backend, (x, residual), tables, rows, gate_state, probe)


def add_steer_rmsnorm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    eps: float,
    weight_offset: float,
    fp32_weight: bool,
    tables: Tables,
    rows: Tensor,
    gate_state: Tensor | None = None,
    probe: Tensor | None = None,
    *,
    backend: Backend | None = None,
) -> tuple[Tensor, Tensor]:
    """`(normed, hidden)`: see `faststeer.ops.reference.add_steer_rmsnorm`."""
    leading = x, residual, weight, eps, weight_offset, fp32_weight
    return _run("add_steer_rmsnorm", backend, leading, tables, rows, gate_state, probe)


def latch_(
    x: Tensor,
    tables: Tables,
    rows: Tensor,
    gate_state: Tensor,
    *,
    residual: Tensor | None = None,
    backend: Backend | None = None,
) -> None:
    """Decide latched gates on x, or on x + residual: see `faststeer.ops.reference.latch_`."""
    _run("latch_", backend, (x, residual), tables, rows, gate_state, None)


# What every eager call runs is written for speed: together it costs the host less than the operator's own call.


def backend_of(x: Tensor, backend: Backend | None) -> Backend:
    chosen = backend or _chosen
    name = (_resolve if is_compiling() else _resolved)(chosen, _kind(x))
    # The compiled back ends have no fp64, which is for oracles and gradient checks.
    if x.dtype is torch.float64 and not _is_chosen(chosen):
        return "reference"
    return name


def _kind(x: Tensor) -> str:
    # torch writes the name of a device's type anew whenever it is asked for it: some microseconds.
    return "cpu" if x.is_cpu else "cuda" if x.is_cuda else x.device.type


@torch.compiler.assume_constant_result
def _is_chosen(chosen: str | None) -> bool:
    return (chosen or os.environ.get("FASTSTEER_BACKEND", "auto")) != "auto"


_OPS = {
    backend: {name: getattr(getattr(torch.ops.faststeer, name), overload) for name in schema.SCHEMAS}
    for backend, overload in (("cpu", "cpp"), ("cuda", "cpp"), ("triton", "triton"))
}


# What calling an operator's overload calls, without a Python frame between; a compiler must see the overload.
_CALLS = {backend: {name: op._op for name, op in ops.items()} for backend, ops in _OPS.items()}


def overload(name: str, device: torch.device | str) -> Callable[..., Any]:
    """The operator that runs on tensors of this device, for who puts it into a graph; on the reference, one that a
    compiler does not look into (`faststeer.ops.opaque`: there is "steer", "steer_pair_" and "latch_")."""
    if (backend := backend_for(device)) != "reference":
        return _OPS[backend][name]
    importlib.import_module("faststeer.ops.opaque")
    return getattr(torch.ops.faststeer, name).reference


class Prepared(Protocol):
    """A program's tables of all sites and the rows of a pass, checked once: what is called at each site of a pass, for
    inference, at a fraction of what an operator call costs the host. See csrc/prepared.h.

    Both give None for what they do not take, such as x that is not contiguous or has not just as many rows, a site
    with probes, or while gradients are on: the full op takes it, or says what is wrong.
    """

    def steer(self, x: Tensor, site: int, /) -> Tensor | None:
        """Return `steer(x)` at a site, of x's shape `[..., hidden]`."""

    def add_steer_rmsnorm(
        self,
        x: Tensor,
        residual: Tensor,
        weight: Tensor,
        eps: float,
        weight_offset: float,
        fp32_weight: bool,
        site: int,
        /,
    ) -> tuple[Tensor, Tensor] | None:
        """Return `add_steer_rmsnorm(x, residual, ...)` at a site: normed and hidden, of x's shape."""


def prepare(
    bank: Tensor, entries: Tensor, ranges: Tensor, rows: Tensor, gate_state: Tensor | None, plain: Sequence[bool]
) -> Prepared:
    """The tables as `Tables` has them and the rows of a pass, where `takes_prepared`.

    Args:
        ranges: `[sites, slots, 2]`.
        plain: per site, whether there are no probes and no latches.
    """
    run = _run_of(_chosen, _kind(bank))
    assert run is not None, "takes_prepared says whether"
    module, *addresses = run
    return module.Prepared(*addresses, bank, entries, ranges, rows, gate_state, plain)


# Looked up once: the names of torch are too many for a processor's cache, and a pass has some microseconds.
_n_modes, _tracing, _transforms = (
    torch._C._len_torch_dispatch_stack, torch._C._get_tracing_state, torch._C._functorch.peek_interpreter_stack
)  # fmt: skip
_grad_enabled = torch.is_grad_enabled


def plain_choice() -> tuple[Backend | Literal["auto"] | None] | None:
    """What `with backend(...)` chooses, if an op may be called without PyTorch seeing it; None while something is
    derived, traced or transformed, or a mode of PyTorch looks on. Not to be asked while a compiler traces."""
    if _grad_enabled() or forward_ad._current_level >= 0:
        return None
    return None if _n_modes() or _tracing() is not None or _transforms() is not None else (_chosen,)


def takes_prepared(x: Tensor) -> bool:
    """Whether what `prepare` gives may be called on rows like x: by a C++ back end, where there is a `plain_choice`."""
    if type(x) is not Tensor or plain_choice() is None:
        return False
    return x.dtype in schema.DTYPES and _run_of(_chosen, _kind(x)) is not None


@functools.cache
def _run_of(chosen: Backend | Literal["auto"] | None, kind: str) -> tuple[Any, int, int] | None:
    """The module that has `Prepared`, and the addresses of what the library of this kind of device runs ops by and of
    PyTorch's `is_grad_enabled`; None where the back end is none of C++."""
    from faststeer import build

    backend = _resolve(chosen, kind)
    if backend not in ("cpu", "cuda") or not hasattr(Tensor, "__dlpack_c_exchange_api__"):
        return None
    module = build.native()
    if module is None:
        _warn_if_unfit("native", build.obstacle("native") or "", "so that calls cost the host more")
        return None
    library = ctypes.CDLL(str(build.library_path(backend)))
    functions = library.faststeer_run, library.aoti_torch_grad_mode_is_enabled  # the second of a library it needs
    run, derives = (cast(int, ctypes.cast(function, ctypes.c_void_p).value) for function in functions)
    return module, run, derives


def has_tangent(argument: Any) -> bool:
    """Whether it is a tensor with a tangent (`torch.autograd.forward_ad`)."""
    if forward_ad._current_level < 0 or not isinstance(argument, Tensor) or not argument.is_floating_point():
        return False
    return forward_ad.unpack_dual(argument).tangent is not None


def derivable(op: str, name: Backend, backend: Backend | None, arguments: tuple[Any, ...]) -> Backend:
    """The back end `name`, or the reference inside a transform of torch.func and in forward mode, which there may be
    under `no_grad`, too.

    Raises:
        NotImplementedError: then, where another was chosen by `backend`, the context or the environment.
    """
    if name == "reference" or is_compiling():
        return name
    if _transforms() is None and (forward_ad._current_level < 0 or not any(map(has_tangent, arguments))):
        return name
    if _is_chosen(backend or _chosen):
        raise NotImplementedError(
            f"{op}: the back end {name!r} has no forward-mode derivative, and none in torch.func: use "
            "faststeer.ops.backend('reference'), or for a gradient torch.autograd.grad"
        )
    return "reference"


def _run(
    op: str,
    backend: Backend | None,
    first: tuple[Any, ...],
    tables: Tables,
    rows: Tensor,
    gate_state: Tensor | None,
    probe: Tensor | None,
) -> Any:
    """What the operator gives, or the reference's function of the same name, without the probe, which is written. fp64
    rows are for oracles, with tables of any dtype."""
    last: tuple[Any, ...] = () if op == "latch_" else (probe,)
    if op not in ("latch_", "steer_pair_"):
        last = tables.scalars, 0 if probe is None else probe.shape[1]
    arguments = *first, *tables[:3], rows, gate_state, *last
    name = derivable(op, backend_of(first[0], backend), backend, arguments)
    if name == "reference":
        if first[0].dtype != torch.float64:
            schema.check(op, *arguments)
        seen = () if probe is None else (probe if op == "steer_pair_" else probe.zero_(),)
        return getattr(reference, op)(*first, tables, rows, gate_state, *seen)
    try:
        results = (_OPS if is_compiling() else _CALLS)[name][op](*arguments)
    except RuntimeError:
        schema.check(op, *arguments)  # bad arguments get the same error from every back end
        raise
    if results is None:  # in place
        return None
    if probe is not None:
        probe.copy_(results[-1])
    return results[0] if len(results) == 2 else results[:-1]


def refuse_gradient(op: str, *tensors: Tensor | None, instead: str = "") -> None:
    """Raise RuntimeError where a gradient would be needed; `instead` names the op that has one, if there is one."""
    if torch.is_grad_enabled() and any([t is not None and t.requires_grad for t in tensors]):
        raise RuntimeError(f"{op} has no gradient: use {f'{instead}, or ' if instead else ''}torch.no_grad()")
