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
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from faststeer.hf.cache import accepts
from faststeer.hf.changes import changing
from faststeer.hf.hook_points import HookPoints, first_output, first_tensor, install, quiet, with_first
from faststeer.hf.known import Known, known_of
from faststeer.plan import site
from faststeer.vector import HOOK_POINTS, HookPoint

ROWS, TOKENS = 2, 4  # of a pass that looks for something
BY_HOOK = "steer a single module with module.register_forward_hook(faststeer.hook(...))"

BRANCHES: tuple[HookPoint, ...] = ("attn_out", "mlp_out", "resid_mid")
Branches = tuple[str | None, ...]  # a layer's modules of these
NO_BRANCHES: Branches = (None, None, None)


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
        if named is not None:
            _check_names(model, named)
        with quiet(model):
            calls = watch_calls(model)
            points = _find_layers(model, calls, named)
            if named is None:
                points = _find_branches(points, {call.name: call for call in calls})
            else:
                points = dataclasses.replace(points, **{at: getattr(named, at) for at in BRANCHES})
            return _confirm(model, points, by_hand=named is not None)

    known = known or known_of(model)
    if named is not None:
        known.findings.clear()  # the others depend on the hook points
    return known.get("hook points", find)


# Watching -------------------------------------------------------------------------------------------------------------


@dataclass
class Call:
    """One call of a module in a forward pass; tensors are on the CPU, and empty where there is none.

    Attributes:
        times: how often the module was called up to then.
        widths: the second dimensions of its arguments that have two or three: tokens, or columns of hidden states.
        received: its first floating-point argument.
        raw: its output before anybody's hooks.
        sent: its output as the next module sees it.
    """

    name: str
    order: int
    times: int
    widths: set[int]
    received: Tensor
    raw: Tensor
    sent: Tensor

    @property
    def index(self) -> int:
        """Which one it is of its ModuleList."""
        return int(self.name.rpartition(".")[2])


def watch_calls(model: nn.Module, names: Iterable[str] | None = None, second: int = 5) -> list[Call]:
    """Make a short pass and note what each named module (None: every one) received and sent in each of its calls
    (copies, since a later operation may write in place). `second`: the second row's first token."""
    calls: list[Call] = []
    latest: dict[str, Call] = {}
    nothing = torch.empty(0, device="cpu")

    def before(name: str, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        tensors = [x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)]
        received = next((_copy(x) for x in tensors if x.is_floating_point()), nothing)
        widths = {x.shape[1] for x in tensors if x.ndim in (2, 3)}
        times = latest[name].times + 1 if name in latest else 1
        latest[name] = Call(name, len(calls), times, widths, received, nothing, nothing)
        calls.append(latest[name])

    def after(name: str, field: str, _module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        tensor = output[0] if isinstance(output, (tuple, list)) and output else output
        if isinstance(tensor, Tensor):
            setattr(latest[name], field, _copy(tensor))

    with changing() as changes:
        for name in dict(model.named_modules()) if names is None else names:
            module = model.get_submodule(name)
            changes.hook(module.register_forward_pre_hook, partial(before, name), with_kwargs=True)
            changes.hook(module.register_forward_hook, partial(after, name, "raw"), prepend=True)
            changes.hook(module.register_forward_hook, partial(after, name, "sent"))
        run_four_tokens(model, second)
    return calls


def watch(model: nn.Module, names: Iterable[str] | None = None) -> dict[str, Call]:
    """The last call of each named module (None: every one) in a short pass."""
    return {call.name: call for call in watch_calls(model, names)}


def _copy(x: Tensor) -> Tensor:
    return x.detach().to("cpu", copy=True)


def run_four_tokens(model: nn.Module, second: int = 5) -> Tensor:
    """The first output of the shortest forward pass that shows what a model does: four tokens of each of two rows.
    `second`: the second row's first token."""
    tables: list[Any] = [getattr(model, "get_input_embeddings", lambda: None)(), *model.modules()]
    table = next((each for each in tables if hasattr(each, "num_embeddings")), None)
    weight, size = (next(model.parameters()), 9) if table is None else (table.weight, table.num_embeddings)
    ids = torch.stack([torch.arange(first, first + TOKENS, device="cpu") for first in (1, second)]) % size
    ids = ids.to("cpu" if weight.is_meta else weight.device)
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


def _check_names(model: nn.Module, named: HookPoints) -> None:
    """Raise ValueError if a model has no such modules."""
    try:
        layers = model.get_submodule(named.layers)
        if not isinstance(layers, nn.ModuleList) or not len(layers):
            raise AttributeError(f"{named.layers} is a {type(layers).__name__}, expected a ModuleList")
        for at in BRANCHES:
            names = getattr(named, at)
            if isinstance(names, tuple) and len(names) != len(layers):
                raise AttributeError(f"{at} has {len(names)} names for {len(layers)} layers")
        for i, layer in enumerate(layers):
            attn_out, mlp_out, mid = own = _branches_of(named, i)
            for name in own:
                layer.get_submodule(name or "")
            if (attn_out is None) != (mlp_out is None) or (mid is not None and attn_out is None):
                what = f"layer {i} is given one of attn_out and mlp_out, or resid_mid alone: name both or neither"
                raise ValueError(_refusal(model, what))
    except AttributeError as error:
        raise ValueError(_refusal(model, f"it has no such hook points ({error}): {named}")) from error


def _refusal(model: nn.Module, what: str) -> str:
    return f"{type(model).__name__}: {what}; {BY_HOOK}"


def _find_layers(model: nn.Module, calls: Sequence[Call], named: HookPoints | None) -> HookPoints:
    """The ModuleList that holds the layers, with what the calls of its members say.

    Raises:
        ValueError: none does, or two do; or these layers cannot be steered.
    """
    lists = {name: module for name, module in model.named_modules() if isinstance(module, nn.ModuleList)}
    if named is not None:  # by any of its names
        lists = {name: module for name, module in lists.items() if module is model.get_submodule(named.layers)}
    by_list = {path: [call for call in calls if call.name.rpartition(".")[0] == path] for path in lists}
    sizes = {path: len({call.name for call in members}) for path, members in by_list.items() if _is_stack(members)}
    path = max(sizes, key=lambda path: sizes[path], default="")
    for each in [path] if path else lists:
        if len(set(lists[each])) < len(lists[each]):
            what = f"a module stands twice in {each}, where a hook cannot tell its places apart: copy it"
            raise ValueError(_refusal(model, what))
        # NaN equals nothing, so that what is equal would not be seen to be.
        if infinite := [call.name for call in by_list[each] if not call.sent.isfinite().all()]:
            raise ValueError(
                f"{type(model).__name__}: {infinite[0]} gives NaN or infinity for four tokens, so that the model "
                "cannot be steered: are its weights right? What overflows in float16 may not in bfloat16 or float32"
            )
    if not path:
        whose = "no ModuleList whose members" if named is None else f"the members of {named.layers} do not"
        raise ValueError(_refusal(model, f"{whose} pass one tensor from each to the next"))
    points = _level_of_layers(model, calls, path, by_list[path])
    for other in sizes:
        if other != path and sizes[other] == sizes[path] > 1 and not f"{other}.".startswith(f"{path}."):
            remedy = "name one, steer(..., hook_points=HookPoints(layers=...))"
            raise ValueError(_refusal(model, f"{path} and {other} are two stacks of layers: {remedy}"))
    return points


def _is_stack(calls: Sequence[Call]) -> bool:
    """Whether the members of a list take and give tensors of one shape, and most of them what the one before gave."""
    if len({x.shape for call in calls for x in (call.received, call.sent)}) != 1:
        return False
    forward = [(a, b) for a, b in itertools.pairwise(calls) if a.index < b.index]
    return 2 * sum(torch.equal(a.sent, b.received) for a, b in forward) >= max(len(forward), len(calls) > 1)


def _level_of_layers(model: nn.Module, calls: Sequence[Call], path: str, members: Sequence[Call]) -> HookPoints:
    """What the calls of the layers say: sizes, layout, and which layers lack `resid_pre` or `resid_post`."""
    shape, n_layers = tuple(members[0].received.shape), len(model.get_submodule(path))  # type: ignore[arg-type]
    streams = _streams(model, members[0].name, shape)
    _check_owner(model, calls, path.rpartition(".")[0], shape[2] if streams[0] > 1 else shape[1])
    other = watch_calls(model, [members[-1].name], second=0)[-1]
    first_row = (slice(None), 0) if streams[0] > 1 else 0
    mixed = not same_but_for_rounding(members[-1].sent[first_row], other.sent[first_row])
    # resid_pre of a layer is resid_post of the one before if the two are always called in a row, in loops as well.
    apart = {members[0].index, members[-1].index + 1}
    for a, b in itertools.pairwise(members):
        if b.index != a.index + 1 or not torch.equal(a.sent, b.received):
            apart |= {a.index + 1, b.index}
    idle = set(range(n_layers)) - {call.index for call in members}
    missing = [("resid_pre", i) for i in sorted(apart - {0, n_layers} | idle)]
    missing += [("resid_post", i) for i in sorted(idle)]
    loops = max(call.times for call in members)
    return HookPoints(path, None, None, None, n_layers, shape[-1], streams, loops, tuple(missing), mixed)


def _streams(model: nn.Module, name: str, shape: tuple[int, ...]) -> tuple[int, int]:
    """How many residual streams stand in front of `[batch, tokens]` and behind it."""
    if len(shape) in (3, 4) and shape[0] == ROWS and shape[1] >= TOKENS:  # more with virtual tokens
        return 1, shape[2] if len(shape) == 4 else 1
    if len(shape) == 4 and shape[1] == ROWS and shape[2] >= TOKENS:
        return shape[0], 1
    turned = shape[1:-1] == (ROWS,)
    what = "[tokens, batch, hidden]" if turned else f"{list(shape)} for {ROWS} x {TOKENS} tokens"
    raise ValueError(
        f"{type(model).__name__}: {name} takes hidden states as {what}: rows of the batch and positions can be "
        f"told in [batch, tokens, hidden] alone; {BY_HOOK}"
    )


def _check_owner(model: nn.Module, calls: Sequence[Call], owner: str, columns: int) -> None:
    """Raise ValueError unless the module that runs the layers is called once in a pass, with a token for each column
    of the hidden states."""
    runs, unseen = [call for call in calls if call.name == owner], "so that where a pass begins cannot be seen"
    if not runs:
        raise ValueError(_refusal(model, f"{owner}, which holds the layers, is not called itself, {unseen}"))
    if len(runs) > 1:
        raise ValueError(_refusal(model, f"{owner} runs {len(runs)} times in one forward pass, {unseen}"))
    if runs[0].widths and columns not in runs[0].widths:
        tokens = min(runs[0].widths)
        raise ValueError(_refusal(model, f"its layers take {columns} columns of hidden states for {tokens} tokens"))


def same_but_for_rounding(a: Tensor, b: Tensor) -> bool:
    """Whether two results of one computation differ by no more than sums in another order make of it: 1,000 units in
    the last place of the largest number, and 2 %. To quantise what a layer is given to 8 bits makes some percent."""
    bound = min(1000 * torch.finfo(a.dtype).eps, 0.02) * a.abs().max()
    return not bool((a - b).abs().max() > bound)


# Branches -------------------------------------------------------------------------------------------------------------


def _find_branches(points: HookPoints, calls: Mapping[str, Call]) -> HookPoints:
    """With the branches of each layer, by the same names in all of them where that is possible."""
    if points.streams != (1, 1):
        return points
    by_layer = [_branches(calls, f"{points.layers}.{i}") for i in range(points.n_layers)]
    having = [candidates for candidates in by_layer if candidates]
    common = [names for names in having[0] if all(names in candidates for candidates in having)] if having else []
    return _with_branches(points, [(common or candidates)[0] if candidates else NO_BRANCHES for candidates in by_layer])


def _branches(calls: Mapping[str, Call], layer: str) -> list[Branches]:
    """(attn_out, mlp_out, resid_mid) of a layer, best first: the shallowest modules, of equals the last that sends a
    branch and the first that receives the middle."""
    if layer not in calls:
        return []
    order = {
        name[len(layer) + 1 :]: call.order
        for name, call in calls.items()
        if name.startswith(f"{layer}.") and call.sent.numel() == calls[layer].sent.numel()
    }
    senders = sorted(order, key=lambda name: (name.count("."), -order[name]))
    receivers = sorted(order, key=lambda name: (name.count("."), order[name]))
    pairs = [(a, m) for a in senders for m in senders if order[a] < order[m] and _adds_up(calls, layer, (a, m, None))]
    in_turn: list[Branches] = [(a, m, mid) for a, m in pairs for mid in receivers if order[a] < order[mid]]
    # Two parts of one module are parts of one branch: routed and shared experts, say.
    apart: list[Branches] = [(a, m, None) for a, m in pairs if a.split(".")[0] != m.split(".")[0]]
    return [names for names in in_turn if _adds_up(calls, layer, names)] or apart


def _adds_up(
    calls: Mapping[str, Call], layer: str, names: Branches, move: Callable[[Tensor], Tensor] = lambda x: x
) -> bool:
    """Whether a layer's output is the sum of its input and these branches, bit for bit, each made in one call: a hook
    cannot tell the calls of a module (a shared dropout) apart. `move`: what is done to `resid_mid`."""
    paths = [layer, *(f"{layer}.{name}" for name in names if name is not None)]
    if any(path not in calls or calls[path].times > 1 for path in paths):
        return False
    whole, attn, mlp, *mid = (calls[path] for path in paths)
    start, end = whole.received, whole.raw
    if not attn.sent.numel() == mlp.sent.numel() == start.numel():
        return False
    a, m = attn.sent.reshape_as(start), mlp.sent.reshape_as(start)
    if not mid:  # in one of the orders in which models add them
        return torch.equal(end, start + a + m) or torch.equal(end, m + a + start)
    middle, received = move(start + a), mid[0].received
    reads = received.numel() == middle.numel() and torch.equal(received.reshape_as(middle), middle)
    return reads and torch.equal(end, middle + m)


def _branches_of(points: HookPoints, layer: int) -> Branches:
    return tuple(points.branch(at, layer) for at in BRANCHES)


def _with_branches(points: HookPoints, branches: Sequence[Branches]) -> HookPoints:
    columns = zip(BRANCHES, zip(*branches, strict=True), strict=True)
    named: dict[str, Any] = {at: names[0] if len(set(names)) == 1 else names for at, names in columns}
    return dataclasses.replace(points, **named)


# Confirming -----------------------------------------------------------------------------------------------------------


def _move(number: int, x: Tensor) -> Tensor:
    """Another row at every site, of the size it had: a deep stack must not overflow."""
    return x.roll(1 + number % 5, -1) + 0.5


def _confirm(model: nn.Module, points: HookPoints, by_hand: bool) -> HookPoints:
    """Steer every site at once and check that each tensor is what follows from the steered ones, bit for bit: then
    each hook writes exactly the tensor it is named for. A layer whose branches are not confirmed has none, unless they
    were named by hand.

    A module's `sent` is what the next one sees, after hooks of the user; so a model that somebody steers already is
    confirmed too.
    """
    layers = [f"{points.layers}.{i}" for i in range(points.n_layers)]
    inside = [f"{layer}.{name}" for i, layer in enumerate(layers) for name in _branches_of(points, i) if name]
    sites = {site(at, i) for i in range(points.n_layers) for at in HOOK_POINTS if points.has(at, i)}
    with changing() as changes:
        install(changes, model, points, {number: partial(_move, number) for number in sorted(sites)})
        calls = watch_calls(model, {*layers, *inside})
    for a, b in itertools.pairwise(call for call in calls if call.name in layers):
        chained = b.index > 0 and points.has("resid_pre", b.index)
        if chained and not points.layer(model, b.index)._forward_pre_hooks and not torch.equal(a.sent, b.received):
            raise ValueError(_refusal(model, f"steering resid_pre of layer {b.index} does not reach it"))
    last, branches = {call.name: call for call in calls}, []
    for i, layer in enumerate(layers):
        names, move = _branches_of(points, i), partial(_move, site("resid_mid", i))
        if names != NO_BRANCHES and not _adds_up(last, layer, names, move):
            if by_hand:
                what = (
                    f"steering attn_out, resid_mid or mlp_out of layer {i} does not move its output as it should: each "
                    "must run once in a forward pass, with tensors of the residual stream's size; "
                    f"HookPoints(layers={points.layers!r}) alone has no such names"
                )
                raise ValueError(_refusal(model, what))
            names = NO_BRANCHES
        branches.append(names)
    return _without_second_readers(model, _with_branches(points, branches))


def _without_second_readers(model: nn.Module, points: HookPoints) -> HookPoints:
    """Without `resid_pre` of the layers whose input somebody else reads as well, such as attention over the outputs of
    earlier layers: there, steering what the layer before gives is not steering what the layer takes."""
    layers = [i for i in range(1, points.n_layers) if points.has("resid_pre", i)]
    move = partial(_move, 0)

    def in_front(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return with_first(args, kwargs, move(first_tensor(args, kwargs)))

    def steered(some: Sequence[int], behind: bool) -> Tensor:
        with changing() as changes:
            if behind:
                install(changes, model, points, {site("resid_pre", i): move for i in some})
            else:
                for i in some:
                    changes.hook(points.layer(model, i).register_forward_pre_hook, in_front, with_kwargs=True)
            return run_four_tokens(model)

    def differ(some: Sequence[int]) -> bool:
        there, here = steered(some, behind=True), steered(some, behind=False)
        if torch.equal(there, here):
            return False
        noise = steered(some, behind=False) - here  # kernels of experts may add in any order
        return bool((there - here).abs().max() > 10 * noise.abs().max())

    if not layers or not differ(layers):
        return points
    apart = tuple(("resid_pre", i) for i in layers if differ([i]))
    return dataclasses.replace(points, missing=(*points.missing, *apart))
