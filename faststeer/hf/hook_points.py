"""What a model's hook points are, and the hooks that steer there. `anatomy.py` finds them."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from faststeer.compile import hook_points, resolve_layers
from faststeer.hf.changes import Changes, Context, is_changed, own_attribute, unchanged
from faststeer.plan import Plan, site_name
from faststeer.vector import HOOK_POINTS, SteeringVector

Steer = Callable[[Tensor], Tensor]
Names = str | tuple[str | None, ...] | None  # of a module in every layer: one for all, or one for each

next_order = itertools.count(1).__next__  # of entering a context: what was entered first acts first


@dataclass(frozen=True)
class HookPoints:
    """The modules at which a model's residual stream can be read and written.

    The path of the layers is enough for `resid_pre` and `resid_post`. The three hook points inside a layer may be named
    as well: by one name for all layers, or by a name for each layer, None where a layer has no such module.

    Args:
        layers: path of the ModuleList of decoder layers, such as "model.layers".
        attn_out: module inside a layer whose output is what attention (or what stands in its place, such as a Mamba
            mixer) adds to the residual stream, such as "self_attn" (with a post-norm: that norm).
        mlp_out: the same for the MLP.
        resid_mid: module inside a layer whose input is the residual stream between attention and MLP, such as
            "post_attention_layernorm"; None where there is no such tensor (attention and MLP in parallel).
        n_layers, hidden_size: these and what follows are filled in by `find_hook_points`.
        streams: residual streams of each token, `(in front of the batch, behind the tokens)`: (4, 1) for hidden states
            `[4, batch, tokens, hidden]`.
        loops: how often a layer runs in a forward pass, at most; it is steered each time.
        missing: `(hook point, layer)` of each `resid_pre` and `resid_post` that cannot be steered.
        mixed: whether a row's hidden states depend on the other rows of its batch, as where activations are quantised
            over the whole batch; one plan for all rows then.
    """

    layers: str
    attn_out: Names = None
    mlp_out: Names = None
    resid_mid: Names = None
    n_layers: int = 0
    hidden_size: int = 0
    streams: tuple[int, int] = (1, 1)
    loops: int = 1
    missing: tuple[tuple[str, int], ...] = ()
    mixed: bool = False

    def layer(self, model: nn.Module, layer: int) -> nn.Module:
        """The module of layer `layer`, counted from 0, of a model that these hook points are of."""
        return model.get_submodule(self.layers)[layer]  # type: ignore[index]

    def owner(self, model: nn.Module) -> nn.Module:
        """The module that runs the layers: its forward pass sees the inputs, mask and cache of every pass."""
        return model.get_submodule(self.layers.rpartition(".")[0])

    def branch(self, at: str, layer: int) -> str | None:
        """The module of `attn_out`, `resid_mid` or `mlp_out` inside a layer; None where the layer has none."""
        names: Names = getattr(self, at)
        return names[layer] if isinstance(names, tuple) else names

    def places(self, model: nn.Module, site: int) -> list[tuple[Mapping[str, Any], str, Any]]:
        """Where the module of a site inside a layer stands: its parent's modules, its name there and itself."""
        at, layer = site_name(site, self.n_layers)
        if at in ("resid_pre", "resid_post"):
            return []
        path, _, name = (self.branch(at, layer) or "").rpartition(".")
        modules = self.layer(model, layer).get_submodule(path)._modules
        return [(modules, name, modules[name])]

    def has(self, at: str, layer: int) -> bool:
        """Whether a layer has a hook point."""
        if at in ("resid_pre", "resid_post"):
            return (at, layer) not in self.missing
        return self.branch(at, layer) is not None

    @property
    def uniform(self) -> bool:
        """Whether all layers have `attn_out` and `mlp_out`, each by one name, and one row of the stream per token."""
        named = (
            isinstance(self.attn_out, str) and isinstance(self.mlp_out, str) and not isinstance(self.resid_mid, tuple)
        )
        return named and self.streams == (1, 1) and self.loops == 1 and not self.missing

    def check_uniform(self, model: nn.Module, who: str) -> None:
        """Raise ValueError unless all layers are alike, for what needs attention and MLP of each."""
        if not self.uniform:
            raise ValueError(
                f"{who} needs layers that each add attention and an MLP to one residual stream, by modules of the same "
                f"names, which the layers of this {type(model).__name__} ({self.layers}) are not all seen to do: steer "
                "and read it at resid_pre and resid_post"
            )

    def mean_stream(self, x: Tensor) -> Tensor:
        """`[batch, tokens, hidden]` of hidden states as the layers take them: the mean of a token's streams."""
        ahead, behind = self.streams
        x = x if ahead == 1 else x.mean(0)
        return x if behind == 1 else x.mean(-2)

    def check(self, model: nn.Module, at: str, layers: Iterable[int], who: str) -> None:
        """Raise ValueError if one of the layers has no such hook point, naming those that have it."""
        lacking = next((layer for layer in layers if not self.has(at, layer)), None)
        if lacking is None:
            return
        own = [point for point in HOOK_POINTS if self.has(point, lacking)]
        those = [layer for layer in range(self.n_layers) if self.has(at, layer)]
        where = f"layers={those} have it" if those else "no layer has it"
        if at == "resid_mid" and self.has("attn_out", lacking):
            where += ", as attention and MLP run in parallel"
        raise ValueError(
            f"{who} at {at} of layer {lacking}, which that layer of {type(model).__name__} does not have: it has "
            f"{', '.join(own) or 'none'}; {where}"
        )


def install(
    changes: Changes,
    model: nn.Module,
    points: HookPoints,
    steers: Mapping[int, Steer],
    order: int = 0,
    steered_forward: Callable[[int, nn.Module], Callable[..., Any]] | None = None,
) -> None:
    """Register a function at each of the given sites; it takes the tensor there and returns the one to use instead. A
    function that is registered there already stays so.

    Our hooks come before all others of a module, so that whoever observes it (the user, transformers' capture of hidden
    states) sees the steered stream; among our own, the one with the lower `order` acts first.

    Args:
        steered_forward: makes for a site and a module a `forward` that steers what the module returns. Given where no
            other context of ours was active on the model when this one was entered: module outputs are steered by it,
            in front of all hooks. A module with a hook costs the host some 6 microseconds in a step, whatever the
            hook does.
    """
    for number, steer in steers.items():
        at, layer = site_name(number, points.n_layers)
        module, make = points.layer(model, layer), _output_hook
        if at == "resid_pre" and layer == 0:
            make = _pre_hook
        elif at == "resid_pre":
            # The tensor that leaves the layer before: steering it there shows it in the captured hidden states too.
            module = points.layer(model, layer - 1)
        elif at != "resid_post":
            points.check(model, at, [layer], "steering")
            path = [module]
            for name in (points.branch(at, layer) or "").split("."):
                path.append(path[-1].get_submodule(name))
            if any(map(_is_compiled, path)):
                for inside in path:
                    own_forward(changes, inside)
            module, make = path[-1], _in_place_hook if at == "resid_mid" else _output_hook
        instead = functools.partial(steered_forward, number) if steered_forward and make is _output_hook else None
        _register(changes, module, steer, make, order, instead)


def check_points(model: nn.Module, points: HookPoints, plan: Plan) -> None:
    """Raise ValueError if a plan, or a latched gate of it, names a hook point that a layer does not have, or looks at
    one row where a token has several."""
    for intervention in plan:
        name, gate = type(intervention).__name__, intervention.when
        layers, places = resolve_layers(intervention, points.n_layers), hook_points(intervention)
        for at in places:
            points.check(model, at, layers, name)
        if gate is not None and gate.latched and gate.layer is not None:
            own = gate.direction.at if isinstance(gate.direction, SteeringVector) else places[0]
            points.check(model, gate.at or own, [gate.layer % points.n_layers], "a gate")
        looks = gate is not None or intervention.probe
        if looks and points.streams != (1, 1):
            raise ValueError(
                f"{name}: {type(model).__name__} keeps {max(points.streams)} residual streams for each token, so that "
                "a gate or a probe has no one row to look at: leave when= and probe= out"
            )
        if points.loops > 1 and (intervention.probe or (gate is not None and gate.latched)):
            raise ValueError(
                f"{name}: {type(model).__name__} runs a layer {points.loops} times in a pass, so that a probe or a "
                "latched gate has no one row to look at: leave probe= and latched= out"
            )


def own_forward(changes: Changes, module: nn.Module) -> None:
    """Give a module a `forward` attribute of its own that does what its class's does.

    torch.compile does not look whether a module that had no hooks has some now, so a graph compiled without ours would
    run on without them; but it does look whether `forward` is still the class's, or that of another context. (A module
    that has one of its own already, as accelerate makes them, keeps it.)
    """
    if own_attribute(module, "forward") is None:
        run = module.forward

        @functools.wraps(run)
        def forward(*args: Any, **kwargs: Any) -> Any:
            return run(*args, **kwargs)

        changes.replace(module, "forward", forward)


def _is_compiled(module: nn.Module) -> bool:
    """Whether a module runs code of torch.compile."""
    return module._compiled_call_impl is not None or _uncompiled(module) is not None


def _uncompiled(module: nn.Module) -> Callable[..., Any] | None:
    """What the module's own `forward` was compiled from; None if it was not."""
    return getattr(own_attribute(module, "forward"), "_torchdynamo_orig_callable", None)


def _register(
    changes: Changes,
    module: nn.Module,
    steer: Steer,
    make: Callable[[Steer], Callable[..., Any]],
    order: int,
    instead: Callable[[nn.Module], Callable[..., Any]] | None,
) -> None:
    """`instead` makes a `forward` in place of a hook, where the module is as it was."""
    hooks: Any = module._forward_hooks if make is _output_hook else module._forward_pre_hooks
    forward = vars(module).get("forward")
    if any(getattr(each, "faststeer_steer", None) is steer for each in (forward, *hooks.values())):
        return
    if instead and forward is None and not any(map(_is_ours, hooks.values())):
        forward = instead(module)
        forward.faststeer_steer = steer  # type: ignore[attr-defined]
        changes.replace(module, "forward", forward)
        return
    hook = make(steer)
    hook.faststeer_steer, hook.faststeer_order = steer, order  # type: ignore[attr-defined]
    if make is _output_hook:
        changes.hook(module.register_forward_hook, hook, prepend=True)
    else:
        changes.hook(module.register_forward_pre_hook, hook, prepend=True, with_kwargs=True)
    ours = sorted((key for key in hooks if _is_ours(hooks[key])), key=lambda key: (hooks[key].faststeer_order, key))
    # In one call into C, which nothing interrupts: in between, contexts outside of this one would act in another order.
    list(map(functools.partial(hooks.move_to_end, last=False), reversed(ours)))


def _pre_hook(steer: Steer) -> Callable[..., Any]:
    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        return with_first(args, kwargs, steer(first_tensor(args, kwargs)))

    return hook


def _in_place_hook(steer: Steer) -> Callable[..., Any]:
    """For a tensor that the residual branch holds as well: it is overwritten, so that both see the new values."""

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x = first_tensor(args, kwargs)
        # Autograd may keep the steering's input for the backward pass: then that must not be what is overwritten.
        source = x.clone() if torch.is_grad_enabled() else x
        steered = steer(source)
        if steered is not source:
            x.copy_(steered)

    return hook


def _output_hook(steer: Steer) -> Callable[..., Any]:
    def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        if isinstance(output, Tensor):
            return steer(output)
        return (steer(output[0]), *output[1:])

    return hook


def first_tensor(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
    """The hidden states that a module was called with: its first argument, or its first tensor by name."""
    return args[0] if args else next(value for value in kwargs.values() if isinstance(value, Tensor))


def with_first(args: tuple[Any, ...], kwargs: dict[str, Any], x: Tensor) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of a module with `x` in place of the hidden states."""
    if args:
        return (x, *args[1:]), kwargs
    own = first_tensor(args, kwargs)
    return args, {name: x if value is own else value for name, value in kwargs.items()}


def first_output(output: Any) -> Tensor:
    """What a module returns, or the first of what it returns; of a dict or a dataclass, the first tensor."""
    if isinstance(output, (Tensor, tuple, list)):
        return output if isinstance(output, Tensor) else output[0]
    values = output.values() if isinstance(output, Mapping) else vars(output).values()
    return next(value for value in values if isinstance(value, Tensor))


def quiet(model: nn.Module) -> Context[None]:
    """Evaluation mode without gradients, compiled code, and what our contexts have put there; all restored after."""

    def enter(changes: Changes) -> None:
        changes.on_undo(torch.set_grad_enabled, torch.is_grad_enabled())
        for module in model.modules():
            changes.on_undo(setattr, module, "training", module.training)
            if is_changed(module):
                changes.on_undo(_act, module, vars(module).copy())
                _act(module, unchanged(module))
            if module._compiled_call_impl is not None:  # its graphs do not see hooks that come and go
                changes.replace(module, "_compiled_call_impl", None)
            if (plain := _uncompiled(module)) is not None:
                changes.replace(module, "forward", plain)
        model.eval()
        torch.set_grad_enabled(False)

    return Context(enter)


def _act(module: nn.Module, state: Mapping[str, Any]) -> None:
    """Give a module the hooks and the `forward` of its own that another state of it has."""
    for name in ("_forward_pre_hooks", "_forward_hooks", "forward"):
        if name in state:
            vars(module)[name] = state[name]
        else:
            vars(module).pop(name, None)


def _is_ours(hook: Callable[..., Any]) -> bool:
    return getattr(hook, "faststeer_order", None) is not None
