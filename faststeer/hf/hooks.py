"""Single hooks: `hook` steers one module, the drop-in for a hand-written forward hook; `read` takes activations at a
hook point."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from faststeer.compile import hook_points, layer_numbers
from faststeer.hf.anatomy import find_hook_points
from faststeer.hf.changes import Changes, Context
from faststeer.hf.hook_points import first_tensor, install, next_order, own_forward
from faststeer.intervention import Intervention
from faststeer.ops import steer
from faststeer.plan import Plan, site
from faststeer.program import Capacity, Program
from faststeer.vector import HookPoint, SteeringVector, check_hook_point

ENTERING: tuple[HookPoint, ...] = ("resid_pre", "resid_mid")  # hook points that are a module's input


def hook(interventions: Intervention | Iterable[Intervention]) -> Callable[..., Any]:
    """A callable for `module.register_forward_hook` (steers the output) or `register_forward_pre_hook` (steers the
    first input), with or without `with_kwargs`.

    It acts on every row of `[..., hidden]`; if the input or output is a tuple, on its first element. It acts at the
    module where you register it, so a SteeringVector must have one layer, or the intervention must name one. The hook
    point (the intervention's `at`, else the vector's) must fit the kind of hook: `resid_pre` and `resid_mid` need a
    pre-hook, `attn_out`, `mlp_out` and `resid_post` a forward hook.

        model.model.layers[14].register_forward_hook(fs.hook(fs.Add(direction, coefficient=1.0)))
        model.model.layers[14].register_forward_pre_hook(fs.hook(fs.Add(resid_pre_vector, layers=14)))

    Raises:
        ValueError: positions, latched gates or probes (a single module does not know where the prompt ends: use
            `steer`), or a vector with several layers. When the module is called: registered as the other kind of hook
            than the hook point needs.
    """
    plan = Plan([interventions] if isinstance(interventions, Intervention) else interventions)
    layers = {layer for i in plan if (layer := _single_layer(i)) is not None}
    if len(layers) > 1:
        raise ValueError(
            f"the interventions of one hook name different layers {sorted(layers)}: one hook sits at one layer; use "
            "steer() for several"
        )
    run = _OneSite(plan, next(iter(layers), 0))
    points = {
        point
        for i in plan
        if i.at or any(isinstance(d, SteeringVector) for d in i.directions())
        for point in hook_points(i)
    }

    def call(module: nn.Module, args: tuple[Any, ...], *rest: Any) -> Any:
        before = _is_pre_hook(call, module, rest)
        _check_side(points, before)
        if before:
            kwargs = rest[0] if rest else None
            if args:
                new_args = (run(args[0]), *args[1:])
                return new_args if kwargs is None else (new_args, kwargs)
            if not kwargs:
                raise ValueError(
                    "the module was called with keyword arguments only: register the hook with with_kwargs=True"
                )
            x = first_tensor(args, kwargs)
            return args, {k: run(v) if v is x else v for k, v in kwargs.items()}
        output = rest[-1]
        return (run(output[0]), *output[1:]) if isinstance(output, (tuple, list)) and output else run(output)

    return call


def _check_side(points: set[HookPoint], before: bool) -> None:
    """Refuse a pre-hook for what leaves a module, and a forward hook for what enters it."""
    wrong = sorted(point for point in points if (point in ENTERING) != before)
    if not wrong:
        return
    point, other = wrong[0], "register_forward_hook" if before else "register_forward_pre_hook"
    acts = "what leaves a module" if before else "what enters a module"
    kind = "enters" if before else "leaves"
    raise ValueError(
        f"the vector is for {point}, {acts}, but this hook steers what {kind} the module: register it with {other}, "
        f"or say at= on the intervention ({'resid_pre' if before else 'resid_post'}) if the vector is meant to act "
        "there"
    )


def _is_pre_hook(hook: Callable[..., Any], module: nn.Module, rest: tuple[Any, ...]) -> bool:
    """Whether a hook called with `(module, args, *rest)` is a pre-hook. A single dict is a pre-hook's kwargs or a
    forward hook's output: how the hook was registered decides."""
    if len(rest) != 1 or not isinstance(rest[0], dict):
        return not rest
    if hook not in module._forward_hooks.values():
        return True
    if hook in module._forward_pre_hooks.values():
        raise ValueError("this hook is registered as a forward hook and as a pre-hook of one module: make two of them")
    return False


def _single_layer(intervention: Intervention) -> int | None:
    name = type(intervention).__name__
    if (
        intervention.positions != "all"
        or intervention.probe
        or (intervention.when is not None and intervention.when.latched)
    ):
        raise ValueError(
            f"{name}: a single hook does not know where the prompt ends nor where to write probes, so it takes no "
            "positions, latched gates or probes: use faststeer.steer(model, plan)"
        )
    vectors = [d for d in intervention.directions() if isinstance(d, SteeringVector)]
    if intervention.when is not None and isinstance(intervention.when.direction, SteeringVector):
        vectors.append(intervention.when.direction)
    if not vectors:
        return None
    if isinstance(intervention.layers, tuple) and len(intervention.layers) == 1 and intervention.layers[0] >= 0:
        return intervention.layers[0]
    if any(len(v.layers) > 1 for v in vectors):
        raise ValueError(
            f"{name}: the vector has several layers: pass one layer's direction, such as v[{vectors[0].layers[0]}], "
            "or name the layer with layers="
        )
    return vectors[0].layers[0]


class _OneSite:
    """A plan at a single tensor: a program whose every intervention sits at one site, made when the first tensor
    shows its size and device."""

    def __init__(self, plan: Plan, layer: int) -> None:
        self.plan, self.layer, self._site = plan, layer, site("resid_pre", layer)
        self.programs: dict[tuple[torch.device, int], Program] = {}
        self._zeros: dict[torch.device, Tensor] = {}  # as many as the most rows so far

    def __call__(self, x: Tensor) -> Tensor:
        if not isinstance(x, Tensor) or not x.ndim:
            kind = "number" if isinstance(x, Tensor) else type(x).__name__
            raise TypeError(
                f"what the module takes or gives is, or begins with, a {kind}: expected hidden states [..., hidden], "
                "or a tuple that starts with them"
            )
        key = (x.device, x.shape[-1])
        if key not in self.programs:
            self.programs[key] = self._program(*key)
        program, flat = self.programs[key], x.reshape(-1, x.shape[-1])
        zeros = self._zeros_for(flat)
        tables = program.tables(self._site)
        if program.requires_grad:
            bank, entries, scalars = program.live()
            tables = tables._replace(bank=bank, entries=entries, scalars=scalars)
        return steer(flat, tables, zeros.expand(3, -1)).view_as(x)

    def _zeros_for(self, flat: Tensor) -> Tensor:
        n = flat.shape[0]
        if torch.compiler.is_compiling():
            return torch.zeros(n, dtype=torch.int32, device=flat.device)
        zeros = self._zeros.get(flat.device)
        if zeros is None or len(zeros) < n:
            with torch.inference_mode(False):  # a later tensor may come outside of it
                zeros = self._zeros[flat.device] = torch.zeros(n, dtype=torch.int32, device=flat.device)
        return zeros if len(zeros) == n else zeros[:n]

    def _program(self, device: torch.device, hidden_size: int) -> Program:
        here = Plan([dataclasses.replace(i, layers=(self.layer,), at="resid_pre") for i in self.plan])
        program = Program(self.layer + 1, hidden_size, Capacity.of([here], self.layer + 1, hidden_size), device)
        program.load(0, here)
        return program


def read(
    model: nn.Module,
    at: HookPoint = "resid_pre",
    layers: Iterable[int] | None = None,
    tokens: Sequence[int] | None = None,
    reduce: Callable[[int, Tensor], Tensor] | None = None,
) -> Context[dict[int, Tensor]]:
    """Take activations while the model runs.

        with read(model, at="resid_pre") as taken:
            model(**batch)
        taken[14]      # [batch, seq, hidden] of the last forward pass

    Args:
        at: hook point. layers: which (all). tokens: columns to keep, such as [-1, -2] (all).
        reduce: `reduce(layer, x)` is kept instead of x, where x itself would be too much. It must not keep a view of x,
            which may be written in place later.

    Returns:
        A context manager over `{layer: [batch, seq or len(tokens), hidden]}`, detached, in the model's dtype,
        overwritten by every forward pass. Reads what steering that was entered before left there. Of a model that
        keeps several residual streams for each token, their mean.

    Raises:
        ValueError: a layer that the model does not have, or that lacks the hook point.
    """
    check_hook_point(at)
    points = find_hook_points(model)
    wanted = list(range(points.n_layers) if layers is None else layers)
    numbers = layer_numbers(wanted, points.n_layers) if wanted else []
    points.check(model, at, numbers, "read(...) looks")
    taken: dict[int, Tensor] = {}

    def taker(layer: int) -> Callable[[Tensor], Tensor]:
        def take(x: Tensor) -> Tensor:
            own, x = x, points.mean_stream(x)
            kept = x.detach() if tokens is None else x.detach()[..., list(tokens), :]
            # The middle of a layer may be written in place later.
            taken[layer] = kept.clone() if reduce is None else reduce(layer, kept)
            return own

        return take

    def enter(changes: Changes) -> dict[int, Tensor]:
        own_forward(changes, points.owner(model))
        takers = {site(at, number): taker(layer) for number, layer in zip(numbers, wanted, strict=True)}
        install(changes, model, points, takers, next_order())
        return taken

    return Context(enter)
