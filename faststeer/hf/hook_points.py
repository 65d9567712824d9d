"""Where a model keeps its hook points: found by watching one short forward pass, confirmed by steering every point in a
second one.

No table of architectures: a residual stream shows itself in the values (`mid = input + attention`, `output = mid +
MLP`, bit for bit). What does not show it is refused, with the way to name the modules by hand; names given by hand go
through the same confirmation.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import types
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from faststeer.hf.cache import accepts
from faststeer.hf.changes import Changes, Context, changing, is_changed, own_attribute
from faststeer.hf.known import Known
from faststeer.plan import n_sites, site_name

Steer = Callable[[Tensor], Tensor]

ROWS, TOKENS = 2, 4  # of a pass that looks for something

next_order = itertools.count(1).__next__  # of entering a context: what was entered first acts first

known_points: Known[HookPoints] = Known()


@dataclass(frozen=True)
class HookPoints:
    """The modules at which a model's residual stream can be read and written.

    Args:
        layers: path of the ModuleList of decoder layers, such as "model.layers".
        attn_out: module inside a layer whose output is what attention adds to the residual stream, such as "self_attn"
            (with a post-norm: that norm).
        mlp_out: the same for the MLP.
        resid_mid: module inside a layer whose input is the residual stream between attention and MLP, such as
            "post_attention_layernorm"; None where there is no such tensor (attention and MLP in parallel).
    """

    layers: str
    attn_out: str
    mlp_out: str
    resid_mid: str | None
    n_layers: int = 0
    hidden_size: int = 0

    def layer(self, model: nn.Module, layer: int) -> nn.Module:
        return model.get_submodule(self.layers)[layer]  # type: ignore[index]

    def owner(self, model: nn.Module) -> nn.Module:
        """The module that runs the layers: its forward pass sees the inputs, mask and cache of every pass."""
        return model.get_submodule(self.layers.rpartition(".")[0])


def find_hook_points(model: nn.Module, named: HookPoints | None = None) -> HookPoints:
    """Find and confirm a model's hook points, by two short forward passes (none if the model is known already and has
    not been changed since).

    Args:
        model: a causal language model of transformers, or its base model; anything whose forward pass takes `input_ids`
            and runs a ModuleList of pre- or sandwich-norm layers.
        named: names to confirm instead of finding them.

    Raises:
        ValueError: no residual structure was found, or the named points do not behave as one.
    """

    def find() -> HookPoints:
        with quiet(model):
            points = _with_sizes(model, named) if named else _find(model)
            _confirm(model, points)
        return points

    return known_points.get(model, find) if named is None else known_points.put(model, find())


def install(
    changes: Changes, model: nn.Module, points: HookPoints, steers: Mapping[int, Steer], order: int = 0
) -> None:
    """Register a function at each of the given sites; it takes the tensor there and returns the one to use instead. A
    function that is registered there already stays so.

    Our hooks come before all others of a module, so that whoever observes it (the user, transformers' capture of hidden
    states) sees the steered stream; among our own, the one with the lower `order` acts first.
    """
    for number, steer in steers.items():
        at, layer = site_name(number, points.n_layers)
        module = points.layer(model, layer)
        if at == "resid_pre" and layer == 0:
            _register(changes, module, steer, _pre_hook, order)
        elif at in ("resid_pre", "resid_post"):
            # The tensor that leaves the layer before: steering it there shows it in the captured hidden states too.
            module = points.layer(model, layer - 1 if at == "resid_pre" else layer)
            _register(changes, module, steer, _output_hook, order)
        elif at == "resid_mid":
            if points.resid_mid is None:
                raise ValueError(no_resid_mid(model))
            _register(changes, module.get_submodule(points.resid_mid), steer, _in_place_hook, order)
        else:
            _register(changes, module.get_submodule(getattr(points, at)), steer, _output_hook, order)


def own_forward(changes: Changes, module: nn.Module) -> None:
    """Give a module a `forward` attribute of its own that does what its class's does.

    torch.compile does not look whether a module that had no hooks has some now, so a graph compiled without ours would
    run on without them; but it does look whether `forward` is still the class's. (A module that has one of its own
    already, as accelerate makes them, keeps it.)
    """
    own = own_attribute(module, "forward")
    if own is None:
        changes.replace(module, "forward", types.MethodType(type(module).forward, module))


def is_held(owner: nn.Module) -> bool:
    """Whether any context of ours is active on a model."""
    return is_changed(owner)


def no_resid_mid(model: nn.Module) -> str:
    """Why a hook point is refused where attention and MLP run in parallel."""
    return (
        f"{type(model).__name__} runs attention and MLP in parallel: there is no resid_mid; use resid_pre, attn_out, "
        "mlp_out or resid_post"
    )


def _register(
    changes: Changes, module: nn.Module, steer: Steer, make: Callable[[Steer], Callable[..., Any]], order: int
) -> None:
    hooks: Any = module._forward_hooks if make is _output_hook else module._forward_pre_hooks
    if any(getattr(hook, "faststeer_steer", None) is steer for hook in hooks.values()):
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
        if args:
            return (steer(args[0]), *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": steer(kwargs["hidden_states"])}

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


def first_output(output: Any) -> Tensor:
    """What a module returns, or the first of what it returns."""
    return output if isinstance(output, Tensor) else output[0]


# Finding --------------------------------------------------------------------------------------------------------------


@dataclass
class _Call:
    """One module's part in a forward pass, on the CPU."""

    name: str
    order: int
    times: int
    received: Tensor
    raw: Tensor  # its output before anybody's hooks
    sent: Tensor  # its output as the next module sees it


def _watch(model: nn.Module, names: list[str]) -> dict[str, _Call]:
    """Make a short pass and note what each named module received and sent (copies, since a later operation may write
    in place)."""
    calls: dict[str, _Call] = {}
    nothing = torch.empty(0)

    def before(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            tensors = [x for x in (*args, *kwargs.values()) if isinstance(x, Tensor) and x.is_floating_point()]
            if tensors:
                times = calls[name].times + 1 if name in calls else 1
                calls[name] = _Call(name, len(calls), times, _copy(tensors[0]), nothing, nothing)

        return hook

    def after(name: str, field: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            tensor = output[0] if isinstance(output, (tuple, list)) and output else output
            if isinstance(tensor, Tensor) and name in calls:
                setattr(calls[name], field, _copy(tensor))

        return hook

    with changing() as changes:
        for name in names:
            module = model.get_submodule(name)
            changes.hook(module.register_forward_pre_hook, before(name), with_kwargs=True)
            changes.hook(module.register_forward_hook, after(name, "raw"), prepend=True)
            changes.hook(module.register_forward_hook, after(name, "sent"))
        run_four_tokens(model)
    return {name: call for name, call in calls.items() if call.sent is not nothing}


def _copy(x: Tensor) -> Tensor:
    return x.detach().to("cpu", copy=True)


def run_four_tokens(model: nn.Module) -> Tensor:
    """The first output of the shortest forward pass that shows what a model does: four tokens of each of two rows."""
    embeddings: list[Any] = [module for module in model.modules() if isinstance(module, nn.Embedding)]
    if isinstance(own := getattr(model, "get_input_embeddings", lambda: None)(), nn.Module):
        embeddings.insert(0, own)
    size = next((e.num_embeddings for e in embeddings if hasattr(e, "num_embeddings")), 9)
    device = next((e.weight.device for e in embeddings), torch.device("cpu"))
    ids = torch.arange(1, 9, device="cpu" if device.type == "meta" else device).view(ROWS, TOKENS) % size
    return first_output(model(input_ids=ids, **({"use_cache": False} if accepts(model, "use_cache") else {})))


def _find(model: nn.Module) -> HookPoints:
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        raise ValueError(f"{type(model).__name__} is an encoder-decoder model: only decoder-only models can be steered")
    lists = {name: module for name, module in model.named_modules() if isinstance(module, nn.ModuleList)}
    members = [f"{name}.{i}" for name, module in lists.items() for i in range(len(module))]
    path = _chained(lists, _watch(model, members))
    if path is None:
        what = "no ModuleList whose members pass one tensor from each to the next"
        raise ValueError(_unknown(model, _shared(lists) or what))
    modules = lists[path]
    inside = [f"{path}.{i}.{name}".rstrip(".") for i, layer in enumerate(modules) for name, _ in layer.named_modules()]
    calls = _watch(model, inside)
    candidates: list[tuple[str, str, str | None]] | None = None
    for i in range(len(modules)):
        found = _branches(calls, f"{path}.{i}")
        candidates = found if candidates is None else [names for names in candidates if names in found]
    if not candidates:
        what = f"the layers of {path} are not input + attention + MLP, bit for bit"
        raise ValueError(_unknown(model, _shared({path: modules}) or what))
    attn_out, mlp_out, resid_mid = candidates[0]
    return _with_sizes(model, HookPoints(path, attn_out, mlp_out, resid_mid))


def _shared(lists: Mapping[str, nn.ModuleList]) -> str:
    """Which module stands in two layers, where hooks cannot tell them apart; "" for none."""
    for path, layers in lists.items():
        first: dict[nn.Module, str] = {}
        for i, layer in enumerate(layers):
            for name, module in layer.named_modules(prefix=f"{path}.{i}"):
                if first.setdefault(module, name) != name and next(module.parameters(), None) is not None:
                    return f"{first[module]} and {name} are one module, and a hook cannot tell them apart: copy it"
    return ""


def _chained(lists: dict[str, nn.ModuleList], calls: dict[str, _Call]) -> str | None:
    """The longest list whose members hand one tensor on."""

    def chain(name: str) -> bool:
        names = [f"{name}.{i}" for i in range(len(lists[name]))]
        members = [calls[name] for name in names if name in calls]
        complete = 0 < len(members) == len(names) and all(m.received.shape == m.sent.shape for m in members)
        return complete and all(torch.equal(a.sent, b.received) for a, b in itertools.pairwise(members))

    return max(filter(chain, lists), key=lambda name: len(lists[name]), default=None)


def _branches(calls: dict[str, _Call], layer: str) -> list[tuple[str, str, str | None]]:
    """(attn_out, mlp_out, resid_mid) of a layer, best first: the shallowest modules, of equals the last that sends a
    branch and the first that receives the middle."""
    whole = calls[layer]
    start, end = whole.received, whole.raw
    # A module that runs twice in a layer (a shared dropout) cannot be told apart by a hook.
    inside = [
        call
        for name, call in calls.items()
        if name.startswith(f"{layer}.") and call.times == 1 and call.sent.numel() == start.numel()
    ]
    short = {call.name: call.name[len(layer) + 1 :] for call in inside}
    depth = {call.name: call.name.count(".") for call in inside}
    senders = sorted(inside, key=lambda call: (depth[call.name], -call.order))
    receivers = sorted(inside, key=lambda call: (depth[call.name], call.order))

    def sent(call: _Call) -> Tensor:
        return call.sent.reshape_as(start)

    found: list[tuple[str, str, str | None]] = []
    for attention in senders:
        middle = start + sent(attention)
        reads = [
            r
            for r in receivers
            if r.order > attention.order
            and r.received.numel() == middle.numel()
            and torch.equal(r.received.reshape_as(middle), middle)
        ]
        for mlp in senders:
            if mlp.order > attention.order and reads and torch.equal(middle + sent(mlp), end):
                found += [(short[attention.name], short[mlp.name], short[r.name]) for r in reads]
    if found:
        return found
    for attention in senders:
        for mlp in senders:
            if mlp.order > attention.order and _is_parallel_sum(end, start, sent(attention), sent(mlp)):
                found.append((short[attention.name], short[mlp.name], None))
    return found


def _is_parallel_sum(end: Tensor, start: Tensor, attention: Tensor, mlp: Tensor) -> bool:
    """Whether a layer's output is the sum of its input and its two branches, in one of the orders in which models
    add them."""
    return any(torch.equal(end, total) for total in (mlp + attention + start, start + attention + mlp))


def _with_sizes(model: nn.Module, points: HookPoints) -> HookPoints:
    try:
        modules = model.get_submodule(points.layers)
        if not isinstance(modules, nn.ModuleList) or not len(modules):
            raise AttributeError(f"{points.layers} is a {type(modules).__name__}, expected a ModuleList")
        for name in (points.attn_out, points.mlp_out, points.resid_mid or ""):
            modules[0].get_submodule(name)
    except AttributeError as error:
        raise ValueError(_unknown(model, f"it has no such hook points ({error}): {points}")) from error
    first = f"{points.layers}.0"
    call = _watch(model, [first]).get(first)
    if call is None:
        raise ValueError(_unknown(model, f"a forward pass does not reach {first}"))
    shape = tuple(call.received.shape)
    if len(shape) != 3 or shape[0] != ROWS or shape[1] < TOKENS:  # more with virtual tokens
        turned = shape[1:-1] == (ROWS,)
        what = "[tokens, batch, hidden]" if turned else f"{list(shape)} for {ROWS} x {TOKENS} tokens"
        raise ValueError(
            f"{type(model).__name__}: {first} takes hidden states as {what}: rows of the batch and positions can be "
            "told in [batch, tokens, hidden] alone; steer a module with register_forward_hook(faststeer.hook(...))"
        )
    return dataclasses.replace(points, n_layers=len(modules), hidden_size=shape[-1])


# Confirming -----------------------------------------------------------------------------------------------------------


def _confirm(model: nn.Module, points: HookPoints) -> None:
    """Steer every site at once and check that each tensor is what follows from the steered ones, bit for bit: then
    each hook writes exactly the tensor it is named for.

    A module's `sent` is what the next one sees, after hooks of the user; so a model that somebody steers already is
    confirmed too.
    """
    before: dict[int, Tensor] = {}
    after: dict[int, Tensor] = {}

    def change(number: int) -> Steer:
        def steer(x: Tensor) -> Tensor:
            # Another row at every site, of the size it had: a deep stack must not overflow.
            moved = x.roll(1 + number % 5, -1) + 0.5
            before[number], after[number] = _copy(x), _copy(moved)
            return moved

        return steer

    sites = [number for number in range(n_sites(points.n_layers)) if points.resid_mid is not None or number % 4 != 2]
    inside = [f".{name}" for name in (points.attn_out, points.mlp_out)]
    layers = [f"{points.layers}.{i}" for i in range(points.n_layers)]
    with changing() as changes:
        install(changes, model, points, {number: change(number) for number in sites})
        calls = _watch(model, [layer + name for layer in layers for name in ("", *inside)])

    if missing := set(sites) - set(after):
        at, layer = site_name(min(missing), points.n_layers)
        raise ValueError(_unknown(model, f"a forward pass does not reach {at} of layer {layer}"))
    for i, path in enumerate(layers):
        call, attn, mlp = (calls[path + name] for name in ("", *inside))
        if attn.sent.numel() != call.received.numel() or mlp.sent.numel() != call.received.numel():
            what = f"attn_out or mlp_out of layer {i} has another size than the residual stream"
            raise ValueError(_unknown(model, what))
        r, a, m = call.received, attn.sent.reshape_as(call.received), mlp.sent.reshape_as(call.received)
        if points.resid_mid is None:
            follows = _is_parallel_sum(call.raw, r, a, m)
        else:
            mid, steered_mid = (tensors[4 * i + 2].reshape(-1) for tensors in (before, after))
            follows = torch.equal(mid, (r + a).reshape(-1)) and torch.equal(call.raw, steered_mid.reshape_as(r) + m)
        if not follows:
            what = f"steering attn_out, resid_mid or mlp_out of layer {i} does not move its output as it should"
            raise ValueError(_unknown(model, what))
        module = points.layer(model, i)
        alone = not module._forward_pre_hooks and (i == 0 or not points.layer(model, i - 1)._forward_hooks)
        if alone and not torch.equal(r, after[4 * i]):
            raise ValueError(_unknown(model, f"steering resid_pre of layer {i} does not reach it"))
        if not module._forward_hooks and not torch.equal(call.sent, after[4 * i + 4]):
            raise ValueError(_unknown(model, f"steering resid_post of layer {i} does not move its output as it should"))


def _unknown(model: nn.Module, what: str) -> str:
    return (
        f"{type(model).__name__}: {what}. If its layers have a residual stream, name the hook points: "
        'HookPoints(layers="model.layers", attn_out="self_attn", resid_mid="post_attention_layernorm", mlp_out="mlp") '
        "with its own module names, "
        "passed as steer(..., hook_points=...); a single module can be steered with "
        "module.register_forward_hook(faststeer.hook(...))"
    )


def quiet(model: nn.Module) -> Context[None]:
    """Evaluation mode without gradients and without our own hooks and fused layers; all restored after."""

    def enter(changes: Changes) -> None:
        training = {module: module.training for module in model.modules()}
        dicts = [hooks for module in model.modules() for hooks in (module._forward_hooks, module._forward_pre_hooks)]
        ours = [(hooks, list(hooks.items())) for hooks in dicts if any(map(_is_ours, hooks.values()))]
        own = {module: module.__dict__.get("forward") for module in model.modules()}
        forwards: dict[nn.Module, Any] = {
            m: forward for m, forward in own.items() if hasattr(forward, "faststeer_fused")
        }

        def restore() -> None:
            for module, forward in forwards.items():
                module.forward = forward
            for hooks, items in ours:
                hooks.clear()
                hooks.update(items)
            for module, mode in training.items():
                module.training = mode

        changes.on_undo(torch.set_grad_enabled, torch.is_grad_enabled())
        changes.on_undo(restore)
        for hooks, items in ours:
            for key, hook in items:
                if _is_ours(hook):
                    del hooks[key]
        for module in forwards:
            del module.forward
        model.eval()
        torch.set_grad_enabled(False)

    return Context(enter)


def _is_ours(hook: Callable[..., Any]) -> bool:
    return getattr(hook, "faststeer_order", None) is not None
