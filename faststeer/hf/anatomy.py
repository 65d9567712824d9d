"""Where a model keeps its hook points: found by watching one short forward pass, confirmed by steering every point in a
second one.

No table of architectures. The layers are the ModuleList whose members hand one tensor on, bit for bit: that gives
`resid_pre` and `resid_post`, whatever is inside a layer. The branches inside a layer show themselves in the values
(`mid = input + attention`, `output = mid + MLP`, bit for bit); a layer that does not show them has `resid_pre` and
`resid_post` alone. Names given by hand go through the same confirmation.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from faststeer.hf.cache import accepts
from faststeer.hf.changes import changing
from faststeer.hf.hook_points import HookPoints, Names, Steer, first_output, install, quiet
from faststeer.hf.known import Known, known_of
from faststeer.plan import n_sites, site, site_name

ROWS, TOKENS = 2, 4  # of a pass that looks for something
BY_HOOK = "steer a single module with module.register_forward_hook(faststeer.hook(...))"

BRANCHES = ("attn_out", "mlp_out", "resid_mid")
Branches = tuple[str | None, ...]  # a layer's modules of these


def find_hook_points(model: nn.Module, named: HookPoints | None = None, known: Known | None = None) -> HookPoints:
    """Find and confirm a model's hook points, by a few short forward passes (none if the model is known already and has
    not been changed since).

    Args:
        model: a causal language model of transformers, or its base model; anything whose forward pass takes `input_ids`
            and runs a ModuleList of layers that take hidden states and give hidden states.
        named: names to confirm instead of finding them.
        known: `known_of(model)`, where the caller has it.

    Raises:
        ValueError: no layers were found, or the named points are not what they are said to be.
    """

    def find() -> HookPoints:
        _check_kind(model)
        with quiet(model):
            try:
                return _confirm(model, _named(model, named), True) if named else _confirm(model, _find(model), False)
            except ValueError:
                _check_finite(model)
                raise

    known = known or known_of(model)
    return known.get("hook points", find) if named is None else known.begin("hook points", find())


# Watching -------------------------------------------------------------------------------------------------------------


@dataclass
class Call:
    """One call of a module in a forward pass; tensors are on the CPU.

    Attributes:
        times: how often the module was called up to then.
        received: its first floating-point argument; empty if it has none.
        raw: its output before anybody's hooks.
        sent: its output as the next module sees it.
    """

    name: str
    order: int
    times: int
    received: Tensor
    raw: Tensor
    sent: Tensor


def watch_calls(model: nn.Module, names: Sequence[str], second: int = 5) -> list[Call]:
    """Make a short pass and note what each named module received and sent in each of its calls (copies, since a later
    operation may write in place). `second`: the second row's first token."""
    calls: list[Call] = []
    latest: dict[str, Call] = {}
    nothing = torch.empty(0, device="cpu")

    def before(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            tensors = [x for x in (*args, *kwargs.values()) if isinstance(x, Tensor) and x.is_floating_point()]
            times = latest[name].times + 1 if name in latest else 1
            latest[name] = Call(name, len(calls), times, _copy(tensors[0]) if tensors else nothing, nothing, nothing)
            calls.append(latest[name])

        return hook

    def after(name: str, field: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            tensor = output[0] if isinstance(output, (tuple, list)) and output else output
            if isinstance(tensor, Tensor) and name in latest:
                setattr(latest[name], field, _copy(tensor))

        return hook

    with changing() as changes:
        for name in names:
            module = model.get_submodule(name)
            changes.hook(module.register_forward_pre_hook, before(name), with_kwargs=True)
            changes.hook(module.register_forward_hook, after(name, "raw"), prepend=True)
            changes.hook(module.register_forward_hook, after(name, "sent"))
        run_four_tokens(model, second)
    return [call for call in calls if call.sent is not nothing]


def watch(model: nn.Module, names: Sequence[str]) -> dict[str, Call]:
    """The last call of each named module in a short pass."""
    return {call.name: call for call in watch_calls(model, names)}


def _copy(x: Tensor) -> Tensor:
    return x.detach().to("cpu", copy=True)


def run_four_tokens(model: nn.Module, second: int = 5) -> Tensor:
    """The first output of the shortest forward pass that shows what a model does: four tokens of each of two rows.
    `second`: the second row's first token."""
    embeddings: list[Any] = [module for module in model.modules() if isinstance(module, nn.Embedding)]
    if isinstance(own := getattr(model, "get_input_embeddings", lambda: None)(), nn.Module):
        embeddings.insert(0, own)
    size = next((e.num_embeddings for e in embeddings if hasattr(e, "num_embeddings")), 9)
    device = next((e.weight.device for e in embeddings), torch.device("cpu"))
    ids = torch.stack([torch.arange(first, first + TOKENS, device="cpu") for first in (1, second)]) % size
    ids = ids.to("cpu" if device.type == "meta" else device)
    return first_output(model(input_ids=ids, **({"use_cache": False} if accepts(model, "use_cache") else {})))


# Layers ---------------------------------------------------------------------------------------------------------------


def _check_kind(model: nn.Module) -> None:
    """Raise ValueError for a model that no pass can be made with."""
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        raise ValueError(f"{type(model).__name__} is an encoder-decoder model: only decoder-only models can be steered")
    if not accepts(model, "input_ids"):
        raise ValueError(
            f"{type(model).__name__}.forward takes no input_ids: give the language model inside of it, which is "
            "steered whoever calls it"
        )
    loads = any(hasattr(module, "_hf_hook") for module in model.modules())  # accelerate does, layer by layer
    if not loads and any(parameter.is_meta for parameter in model.parameters()):
        raise ValueError(f"{type(model).__name__} is on the meta device and holds no values: load its weights first")


def _check_finite(model: nn.Module) -> None:
    """Raise ValueError if a module gives NaN or infinity, so that equal tensors are not seen to be equal."""
    lists = {name: module for name, module in model.named_modules() if isinstance(module, nn.ModuleList)}
    for call in watch_calls(model, [f"{path}.{i}" for path, members in lists.items() for i in range(len(members))]):
        if not bool(call.sent.isfinite().all()):
            raise ValueError(
                f"{type(model).__name__}: {call.name} gives NaN or infinity for four tokens, so that the model cannot "
                "be steered: are its weights right? What overflows in float16 may not in bfloat16 or float32"
            ) from None


def _find(model: nn.Module) -> HookPoints:
    lists = [name for name, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    points = _find_layers(model, lists, "no ModuleList whose members pass one tensor from each to the next")
    return _with_branches(points, _find_branches(model, points))


def _find_layers(model: nn.Module, lists: Sequence[str], otherwise: str) -> HookPoints:
    """The one of these ModuleLists that holds the layers, with what the calls of its members say.

    Raises:
        ValueError: none is one (`otherwise`), or two are.
    """
    members: dict[str, Any] = {path: model.get_submodule(path) for path in lists}
    calls = watch_calls(model, [f"{path}.{i}" for path in lists for i in range(len(members[path]))])
    by_list = {path: [call for call in calls if call.name.rpartition(".")[0] == path] for path in lists}
    reached = {path: len({call.name for call in calls}) for path, calls in by_list.items() if _is_stack(calls)}
    path = max(reached, key=lambda path: reached[path], default="")
    for twice in [path] if reached else lists:
        if len(set(members[twice])) < len(members[twice]):
            otherwise = f"a module stands twice in {twice}, where a hook cannot tell its places apart: copy it"
            path = ""
    if not path:
        raise ValueError(_refusal(model, otherwise))
    points = _level_of_layers(model, path, by_list[path])
    for other in reached:
        if other != path and reached[other] == reached[path] > 1 and not f"{other}.".startswith(f"{path}."):
            what = (
                f"{path} and {other} are two stacks of layers: name one, steer(..., hook_points=HookPoints(layers=...))"
            )
            raise ValueError(_refusal(model, what))
    return points


def _is_stack(calls: Sequence[Call]) -> bool:
    """Whether the members of a list take and give tensors of one shape, and most of them what the one before gave."""
    if len({x.shape for call in calls for x in (call.received, call.sent)}) != 1:
        return False
    forward = [(a, b) for a, b in itertools.pairwise(calls) if _index(a) < _index(b)]
    return 2 * sum(torch.equal(a.sent, b.received) for a, b in forward) >= max(len(forward), len(calls) > 1)


def _index(call: Call) -> int:
    return int(call.name.rpartition(".")[2])


def _level_of_layers(model: nn.Module, path: str, calls: Sequence[Call]) -> HookPoints:
    """What the calls of the layers say: sizes, layout, and which layers lack `resid_pre` or `resid_post`."""
    shape, n_layers = tuple(calls[0].received.shape), len(model.get_submodule(path))  # type: ignore[arg-type]
    streams = _streams(model, calls[0].name, shape)
    mixed = _check_owner(model, path.rpartition(".")[0], shape[-2] if streams[1] == 1 else shape[1], streams, calls[-1])
    # resid_pre of a layer is resid_post of the one before if the two are always called in a row, in loops as well.
    apart: set[int] = set()
    around: list[Call | None] = [None, *calls, None]
    for a, b in itertools.pairwise(around):
        before, behind = -1 if a is None else _index(a), n_layers if b is None else _index(b)
        if a is None or b is None or behind != before + 1 or not torch.equal(a.sent, b.received):
            apart |= {before + 1, behind}
    reached = {_index(call) for call in calls}
    idle = set(range(n_layers)) - reached
    missing = [("resid_pre", i) for i in range(n_layers) if (i in apart and i > 0) or i in idle]
    missing += [("resid_post", i) for i in sorted(idle)]
    loops = max(call.times for call in calls)
    return HookPoints(path, None, None, None, n_layers, shape[-1], streams, loops, tuple(missing), mixed)


def _check_owner(model: nn.Module, path: str, columns: int, streams: tuple[int, int], last: Call) -> bool:
    """Whether a row's hidden states depend on the other rows of its batch, beyond what sums in another order make of
    them: a pass with another second row than that of `last`, the last layer's call, has another first one.

    Raises:
        ValueError: the module that runs the layers is not called once in a pass, with a token for each column of the
            hidden states.
    """
    widths: list[set[int]] = []

    def note(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        widths.append({x.shape[1] for x in (*args, *kwargs.values()) if isinstance(x, Tensor) and x.ndim in (2, 3)})

    with changing() as changes:
        changes.hook(model.get_submodule(path).register_forward_pre_hook, note, with_kwargs=True)
        other = watch_calls(model, [last.name], second=0)[-1].sent
    if len(widths) > 1:
        what = f"{path} runs {len(widths)} times in one forward pass, so that where a pass begins cannot be seen"
        raise ValueError(_refusal(model, what))
    if not widths:
        what = f"{path}, which holds the layers, is not called itself, so that where a pass begins cannot be seen"
        raise ValueError(_refusal(model, what))
    if widths[0] and columns not in widths[0]:
        what = f"its layers take {columns} columns of hidden states for {min(widths[0])} tokens"
        raise ValueError(_refusal(model, what))
    here, there = (x[0] if streams[0] == 1 else x[:, 0] for x in (last.sent, other))
    return not same_but_for_rounding(here, there)


def same_but_for_rounding(a: Tensor, b: Tensor) -> bool:
    """Whether two results of one computation differ by no more than sums in another order make of it: 1,000 units in
    the last place of the largest number, and 2 %. To quantise what a layer is given to 8 bits makes some percent."""
    bound = min(1000 * torch.finfo(a.dtype).eps, 0.02) * a.abs().max()
    return not bool((a - b).abs().max() > bound)


def _streams(model: nn.Module, name: str, shape: tuple[int, ...]) -> tuple[int, int]:
    """How many residual streams stand in front of `[batch, tokens]` and behind it."""
    if len(shape) >= 3 and shape[0] == ROWS and shape[1] >= TOKENS and len(shape) <= 4:  # more with virtual tokens
        ahead, behind = 1, shape[2] if len(shape) == 4 else 1
    elif len(shape) == 4 and shape[1] == ROWS and shape[2] >= TOKENS:
        ahead, behind = shape[0], 1
    else:
        turned = shape[1:-1] == (ROWS,)
        what = "[tokens, batch, hidden]" if turned else f"{list(shape)} for {ROWS} x {TOKENS} tokens"
        raise ValueError(
            f"{type(model).__name__}: {name} takes hidden states as {what}: rows of the batch and positions can be "
            f"told in [batch, tokens, hidden] alone; {BY_HOOK}"
        )
    return ahead, behind


def _named(model: nn.Module, named: HookPoints) -> HookPoints:
    try:
        layers = model.get_submodule(named.layers)
        if not isinstance(layers, nn.ModuleList) or not len(layers):
            raise AttributeError(f"{named.layers} is a {type(layers).__name__}, expected a ModuleList")
        for at in BRANCHES:
            names: Names = getattr(named, at)
            if isinstance(names, tuple) and len(names) != len(layers):
                raise AttributeError(f"{at} has {len(names)} names for {len(layers)} layers")
        for i, layer in enumerate(layers):
            attn_out, mlp_out, mid = own = [named.branch(at, i) for at in BRANCHES]
            for name in own:
                layer.get_submodule(name or "")
            if (attn_out is None) != (mlp_out is None) or (mid is not None and attn_out is None):
                what = f"layer {i} is given one of attn_out and mlp_out, or resid_mid alone: name both or neither"
                raise ValueError(_refusal(model, what))
    except AttributeError as error:
        raise ValueError(_refusal(model, f"it has no such hook points ({error}): {named}")) from error
    otherwise = f"the members of {named.layers} do not pass one tensor from each to the next"
    points = _find_layers(model, [named.layers], otherwise)
    return dataclasses.replace(points, attn_out=named.attn_out, mlp_out=named.mlp_out, resid_mid=named.resid_mid)


def _refusal(model: nn.Module, what: str) -> str:
    return f"{type(model).__name__}: {what}; {BY_HOOK}"


# Branches -------------------------------------------------------------------------------------------------------------


def _find_branches(model: nn.Module, points: HookPoints) -> list[Branches | None]:
    """The branches of each layer, by the same names in all of them where that is possible."""
    if points.streams != (1, 1):
        return [None] * points.n_layers
    calls = watch(model, [name for name, _ in model.named_modules() if name.startswith(f"{points.layers}.")])
    by_layer = [_branches(calls, f"{points.layers}.{i}") for i in range(points.n_layers)]
    having = [candidates for candidates in by_layer if candidates]
    common = [names for names in having[0] if all(names in candidates for candidates in having)] if having else []
    return [(common or candidates)[0] if candidates else None for candidates in by_layer]


def _branches(calls: dict[str, Call], layer: str) -> list[Branches]:
    """(attn_out, mlp_out, resid_mid) of a layer, best first: the shallowest modules, of equals the last that sends a
    branch and the first that receives the middle."""
    whole = calls.get(layer)
    if whole is None or whole.times > 1:
        return []
    start, end = whole.received, whole.raw
    # A module that runs twice in a layer (a shared dropout) cannot be told apart by a hook.
    inside = [
        call
        for name, call in calls.items()
        if name.startswith(f"{layer}.") and call.times == 1 and call.sent.numel() == start.numel()
    ]
    short = {call.name: call.name[len(layer) + 1 :] for call in inside}
    sent = {call.name: call.sent.reshape_as(start) for call in inside}
    senders = sorted(inside, key=lambda call: (call.name.count("."), -call.order))
    receivers = sorted(inside, key=lambda call: (call.name.count("."), call.order))
    pairs = [(a, b) for a in senders for b in senders if b.order > a.order]
    in_turn: list[Branches] = []
    for attention, mlp in pairs:
        middle = start + sent[attention.name]
        if torch.equal(middle + sent[mlp.name], end):
            reads = [call for call in receivers if call.order > attention.order and _holds(call.received, middle)]
            in_turn += [(short[attention.name], short[mlp.name], short[call.name]) for call in reads]
    # Two parts of one module are parts of one branch: routed and shared experts, say.
    return in_turn or [
        (short[attention.name], short[mlp.name], None)
        for attention, mlp in pairs
        if short[attention.name].split(".")[0] != short[mlp.name].split(".")[0]
        and _is_parallel_sum(end, start, sent[attention.name], sent[mlp.name])
    ]


def _holds(x: Tensor, expected: Tensor) -> bool:
    return x.numel() == expected.numel() and torch.equal(x.reshape_as(expected), expected)


def _is_parallel_sum(end: Tensor, start: Tensor, attention: Tensor, mlp: Tensor) -> bool:
    """Whether a layer's output is the sum of its input and its two branches, in one of the orders in which models
    add them."""
    return any(torch.equal(end, total) for total in (mlp + attention + start, start + attention + mlp))


def _with_branches(points: HookPoints, branches: Sequence[Branches | None]) -> HookPoints:
    columns = zip(*[names or (None, None, None) for names in branches], strict=True)
    named: dict[str, Any] = {
        at: column[0] if len(set(column)) == 1 else column for at, column in zip(BRANCHES, columns, strict=True)
    }
    return dataclasses.replace(points, **named)


# Confirming -----------------------------------------------------------------------------------------------------------


def _confirm(model: nn.Module, points: HookPoints, by_hand: bool) -> HookPoints:
    """Steer every site at once and check that each tensor is what follows from the steered ones, bit for bit: then
    each hook writes exactly the tensor it is named for. A layer whose branches are not confirmed has none, unless they
    were named by hand.

    A module's `sent` is what the next one sees, after hooks of the user; so a model that somebody steers already is
    confirmed too.
    """
    before: dict[int, list[Tensor]] = {}
    after: dict[int, list[Tensor]] = {}

    def change(number: int) -> Steer:
        def steer(x: Tensor) -> Tensor:
            # Another row at every site, of the size it had: a deep stack must not overflow.
            moved = x.roll(1 + number % 5, -1) + 0.5
            before.setdefault(number, []).append(_copy(x))
            after.setdefault(number, []).append(_copy(moved))
            return moved

        return steer

    numbers = [number for number in range(n_sites(points.n_layers)) if _is_site(points, number)]
    inside = [
        f"{points.layers}.{i}.{name}"
        for i in range(points.n_layers)
        for name in (points.branch("attn_out", i), points.branch("mlp_out", i))
        if name is not None
    ]
    layers = [f"{points.layers}.{i}" for i in range(points.n_layers)]
    with changing() as changes:
        install(changes, model, points, {number: change(number) for number in numbers})
        calls = watch_calls(model, [*layers, *inside])
    _confirm_layers(model, points, [call for call in calls if call.name in layers], after)
    points = _without_second_readers(model, points)
    last = {call.name: call for call in calls}
    branches: list[Branches | None] = []
    for i in range(points.n_layers):
        names = tuple(points.branch(at, i) for at in BRANCHES)
        what = _why_not(points, i, last, before, after) if names[0] is not None else ""
        if what and by_hand:
            raise ValueError(_refusal(model, f"{what}; HookPoints(layers={points.layers!r}) alone has no such names"))
        branches.append(None if what else names)
    return _with_branches(points, branches)


def _is_site(points: HookPoints, number: int) -> bool:
    at, layer = site_name(number, points.n_layers)
    if number % 4 == 0 and number > 0:  # a layer's output, which may not be the next one's input
        return points.has("resid_post", number // 4 - 1)
    return points.has(at, layer)


def _confirm_layers(
    model: nn.Module, points: HookPoints, calls: Sequence[Call], after: Mapping[int, Sequence[Tensor]]
) -> None:
    """Raise ValueError unless what steering puts in front of and behind each layer is what goes on from there."""
    for call in calls:
        i, k = _index(call), call.times - 1
        module = points.layer(model, i)
        if i == 0 and not module._forward_pre_hooks and not _follows(call.received, after.get(0), k):
            raise ValueError(_refusal(model, "steering resid_pre of layer 0 does not reach it"))
        if not module._forward_hooks and not _follows(call.sent, after.get(site("resid_post", i)), k):
            raise ValueError(_refusal(model, f"steering resid_post of layer {i} does not move its output as it should"))
    for a, b in itertools.pairwise(calls):
        i = _index(b)
        chained = i > 0 and points.has("resid_pre", i) and not points.layer(model, i)._forward_pre_hooks
        if chained and not torch.equal(a.sent, b.received):
            raise ValueError(_refusal(model, f"steering resid_pre of layer {i} does not reach it"))


def _without_second_readers(model: nn.Module, points: HookPoints) -> HookPoints:
    """Without `resid_pre` of the layers whose input somebody else reads as well, such as attention over the outputs of
    earlier layers: there, steering what the layer before gives is not steering what the layer takes."""
    layers = [i for i in range(1, points.n_layers) if points.has("resid_pre", i)]

    def differ(some: Sequence[int]) -> bool:
        there, here = (_steered(model, points, some, behind) for behind in (True, False))
        if torch.equal(there, here):
            return False
        noise = _steered(model, points, some, False) - here  # kernels of experts may add in any order
        return bool((there - here).abs().max() > 10 * noise.abs().max())

    if not layers or not differ(layers):
        return points
    apart = tuple(("resid_pre", i) for i in layers if differ([i]))
    return dataclasses.replace(points, missing=(*points.missing, *apart))


def _steered(model: nn.Module, points: HookPoints, layers: Sequence[int], behind: bool) -> Tensor:
    """The model's output with what enters some layers changed: behind the layer before, or in front of the layer."""

    def move(x: Tensor) -> Tensor:
        return x.roll(1, -1) + 0.5

    def before(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        names = [name for name, value in kwargs.items() if isinstance(value, Tensor)]
        return ((move(args[0]), *args[1:]), kwargs) if args else (args, kwargs | {names[0]: move(kwargs[names[0]])})

    with changing() as changes:
        if behind:
            install(changes, model, points, {site("resid_pre", i): move for i in layers})
        else:
            for i in layers:
                changes.hook(points.layer(model, i).register_forward_pre_hook, before, with_kwargs=True)
        return run_four_tokens(model)


def _follows(tensor: Tensor, steered: Sequence[Tensor] | None, k: int) -> bool:
    return steered is not None and len(steered) > k and torch.equal(tensor, steered[k])


def _why_not(
    points: HookPoints,
    i: int,
    calls: Mapping[str, Call],
    before: Mapping[int, Sequence[Tensor]],
    after: Mapping[int, Sequence[Tensor]],
) -> str:
    """Why the branches of a layer are not what their names say; "" if they are."""
    names = [f"{points.layers}.{i}.{points.branch(at, i)}" for at in ("attn_out", "mlp_out")]
    mid = site("resid_mid", i) if points.has("resid_mid", i) else None
    for at, number in (("attn_out", site("attn_out", i)), ("resid_mid", mid), ("mlp_out", site("mlp_out", i))):
        if number is not None and len(after.get(number, ())) != 1:
            return f"a forward pass does not reach {at} of layer {i}, or more than once"
    call, attn, mlp = (calls.get(name) for name in (f"{points.layers}.{i}", *names))
    if call is None or attn is None or mlp is None or {attn.sent.numel(), mlp.sent.numel()} != {call.received.numel()}:
        return f"attn_out or mlp_out of layer {i} gives no tensor of the residual stream's size"
    start = call.received
    a, m = attn.sent.reshape_as(start), mlp.sent.reshape_as(start)
    if mid is None:
        follows = _is_parallel_sum(call.raw, start, a, m)
    else:
        middle, steered = before[mid][0], after[mid][0]
        follows = _holds(middle, start + a) and torch.equal(call.raw, steered.reshape_as(start) + m)
    what = f"steering attn_out, resid_mid or mlp_out of layer {i} does not move its output as it should"
    return "" if follows else what
