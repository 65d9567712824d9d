"""A plan made permanent: weights that do what its hooks did.

A residual stream is a sum: the embeddings plus what every attention and MLP wrote into it. An intervention that is the
same linear map for every row, h -> M h + c, is folded into the writers, W -> M W and b -> M b + c, where that changes
what everybody reads exactly as the hook did. `schedule` walks through the sites in the order of a forward pass and
keeps, for every writer, the map that its output has been through. At a site of a branch (attn_out, mlp_out) any map can
be folded. At a site of the stream (resid_pre, resid_mid, resid_post) a map also changes what earlier writers wrote and
others have read already, unchanged: it can be folded only if it leaves those as they are, as an ablation does of which
every earlier writer has been cleared. So ablation everywhere is foldable, ablation from layer 10 on is not, and
addition always is, where there is a bias to hold it.
"""

from __future__ import annotations

import copy
import dataclasses
import itertools
import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from faststeer.compile import Entry, compile_plan
from faststeer.files import new_folder, write_atomically
from faststeer.folding.affine import FoldError, Map, affine
from faststeer.folding.saving import check_savable, check_saved, check_unadapted, leave_quantizer
from faststeer.hf.anatomy import find_hook_points, watch
from faststeer.hf.changes import changing, is_changed
from faststeer.hf.hook_points import HookPoints, first_output, install, quiet
from faststeer.hf.steering import steer
from faststeer.intervention import Intervention
from faststeer.plan import Plan, as_plan, n_sites, site, site_name
from faststeer.vector import SteeringVector

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
NOISE_FACTOR = 4.0  # logits may differ by this many times what noise of one rounding at every writer does to them
CHUNK = 4096  # columns of a weight that are in fp64 at once


# What writes into the residual stream ---------------------------------------------------------------------------------


@dataclass
class StreamParameter:
    """One parameter whose `axis` is the residual stream."""

    path: str
    module: Any
    name: str
    axis: int

    @property
    def parameter(self) -> nn.Parameter:
        return getattr(self.module, self.name)

    @property
    def full_name(self) -> str:
        return f"{self.path}.{self.name}"


@dataclass
class Writer:
    """What adds one summand w to the residual stream, and what it is to be: change(w) + constant.

    `closed` says why it cannot be changed, if it cannot be.
    """

    name: str
    parts: list[StreamParameter] = field(default_factory=list)
    closed: str = ""
    kind: str = "linear"  # "linear", "embedding" or "experts"
    scale: float = 1.0  # embedding: what the sum of the tables is multiplied with
    change: Map = None  # type: ignore[assignment]
    constant: Tensor = None  # type: ignore[assignment]

    @property
    def is_changed(self) -> bool:
        return not self.change.is_identity or bool(self.constant.any())


def find_writers(model: nn.Module, points: HookPoints) -> list[Writer]:
    """The embeddings, then attention and MLP of every layer."""
    branches = [(i, at, getattr(points, at)) for i in range(points.n_layers) for at in ("attn_out", "mlp_out")]
    inside = f"{points.layers}."
    linear = [n for n, m in model.named_modules() if isinstance(m, (nn.Linear, Conv1D)) and n.startswith(inside)]
    tables = [n for n, m in model.named_modules() if isinstance(m, nn.Embedding) and not n.startswith(inside)]
    ends = [f"{inside}{i}.{name}" for i, _, name in branches]
    with quiet(model):
        calls = watch(model, sorted({*linear, *tables, *ends, f"{inside}0"}))
    seen = {name: call.sent for name, call in calls.items()}
    writers = [_embedding(model, tables, seen, calls[f"{inside}0"].received)]
    for i, at, name in branches:
        what = f"{'attention' if at == 'attn_out' else 'the MLP'} of layer {i}"
        end = f"{inside}{i}.{name}"
        paths = [
            n
            for n in linear
            if n.startswith(f"{inside}{i}.") and n in seen and torch.equal(seen[n].flatten(), seen[end].flatten())
        ]
        if paths:
            writers.append(_linear(model, what, paths[-1]))
        else:
            writers.append(_experts(model, what, end, points.hidden_size))
    for writer in writers:
        writer.change = Map.identity(points.hidden_size)
        writer.constant = torch.zeros(points.hidden_size, dtype=torch.float64, device="cpu")
    return writers


def _embedding(model: nn.Module, tables: list[str], seen: dict[str, Tensor], entering: Tensor) -> Writer:
    """The tables whose sum, times a number, enters the first layer."""
    writer = Writer("the embedding", kind="embedding")
    width = entering.shape[-1]
    used = [name for name in tables if name in seen and seen[name].shape[-1] == width]
    target = entering.double()
    total = torch.zeros_like(target)
    for name in used:
        total = total + seen[name].double()  # that of positions is one for all rows
    writer.scale = float((target * total).sum() / (total * total).sum()) if used else 0.0
    rounding = 8 * torch.finfo(entering.dtype).eps
    if not used or (target - writer.scale * total).abs().max() > rounding * target.abs().max():
        writer.closed = "what enters the first layer is no sum of embeddings: a norm or a projection lies between"
        return writer
    config = getattr(model, "config", None)
    if any(getattr(config, name, None) is not None for name in ("vision_config", "audio_config")):
        writer.closed = "the model reads images or sounds, which enter the residual stream past the embedding"
        return writer
    # A constant goes to the last table: that of positions, where there is a plain one, so that a tied head stays tied.
    used.sort(key=lambda name: type(model.get_submodule(name)) is nn.Embedding)
    writer.parts = [_part(model, writer, name, "weight", 1) for name in used]
    return writer


def _linear(model: nn.Module, what: str, name: str) -> Writer:
    writer = Writer(what)
    module = model.get_submodule(name)
    if type(module) not in (nn.Linear, Conv1D) and not type(module).__module__.startswith("transformers.models."):
        writer.closed = (
            f"{name} is a {type(module).__module__}.{type(module).__name__}, no plain linear layer: is it quantised?"
        )
        return writer
    writer.parts = [_part(model, writer, name, "weight", 1 if isinstance(module, Conv1D) else 0)]
    return writer


def _experts(model: nn.Module, what: str, end: str, width: int) -> Writer:
    """A mixture of experts: the last projection of each, shared ones too. Where that is not it either: why not."""
    writer = Writer(what, kind="experts")
    module = model.get_submodule(end)
    for name, child in module.named_modules():
        path = f"{end}.{name}".rstrip(".")
        stacked = child._parameters.get("down_proj")
        if stacked is not None and stacked.ndim == 3 and (stacked.shape[1] == width) != (stacked.shape[2] == width):
            writer.parts.append(_part(model, writer, path, "down_proj", 1 if stacked.shape[1] == width else 2))
            if "down_proj_bias" in child._parameters:
                writer.parts.append(_part(model, writer, path, "down_proj_bias", 1))
        elif (
            type(child) is nn.Linear and name.rpartition(".")[2] in ("down_proj", "w2") and child.out_features == width
        ):
            writer.parts.append(_part(model, writer, path, "weight", 0))
            if child.bias is not None:
                writer.parts.append(_part(model, writer, path, "bias", 0))
    if not writer.parts:
        parameters = list(module.parameters())
        norm = parameters and all(p.ndim == 1 for p in parameters)
        writer.closed = (
            f"{end} is a {type(module).__name__} after its last projection: an ablation before a norm is none "
            "after it, and the norm has no bias"
            if norm
            else f"no linear layer in {end} gives what it adds to the residual stream"
        )
    return writer


def _part(model: nn.Module, writer: Writer, path: str, name: str, axis: int) -> StreamParameter:
    part = StreamParameter(path, model.get_submodule(path), name, axis)
    if part.parameter.dtype not in FLOATS or part.parameter.is_meta:
        writer.closed = f"{part.full_name} is {part.parameter.dtype} on {part.parameter.device}: load it unquantised"
    return part


# Which writer gets what -----------------------------------------------------------------------------------------------


def schedule(entries: list[Entry], writers: list[Writer], points: HookPoints) -> None:
    """Give every writer its map and constant (see the top of this module).

    Raises:
        FoldError: a map that would have to change what others have read already, or one that is none.
    """
    parallel = points.resid_mid is None
    at_site: dict[int, list[Entry]] = {}
    for entry in entries:
        at_site.setdefault(entry.site, []).append(entry)
    total = torch.zeros(points.hidden_size, dtype=torch.float64, device="cpu")  # the constants in the stream
    read: list[Writer] = []
    unread = [writers[0]]
    for number in range(n_sites(points.n_layers)):
        layer, point = divmod(number, 4)
        if point in (1, 3):
            if point == 1 or not parallel:  # attention, then the MLP, reads what the stream holds
                read, unread = read + unread, []
            unread.append(writers[1 + 2 * layer + point // 2])
        at, of = site_name(number, points.n_layers)
        for entry in at_site.get(number, ()):
            change, constant = affine(entry, f"{at} of layer {of}")
            if point in (1, 3):
                newest = unread[-1]
                total -= newest.constant
                newest.change, newest.constant = change.after(newest.change), change(newest.constant) + constant
                total += newest.constant
                continue
            for writer in read:
                if not change.leaves(writer.change):
                    raise FoldError(_read_already(entry, at, of, writer))
            moved = change(total) + constant
            for writer in unread:
                writer.change = change.after(writer.change)
            unread[-1].constant = unread[-1].constant + moved - total
            total = moved


def _read_already(entry: Entry, at: str, layer: int, writer: Writer) -> str:
    kind = entry.kind.name.capitalize().replace("_relative", "")
    return (
        f"{kind} at {at} of layer {layer} also changes what {writer.name} wrote, which the layers in between have read "
        "as it was: no weights give both. To fold an ablation, clear every writer of the same direction: "
        'Ablate(direction, layers="all", at=("resid_pre", "attn_out", "mlp_out"))'
    )


# Biases and ties ------------------------------------------------------------------------------------------------------


def _needs_bias(writer: Writer) -> bool:
    return bool(writer.constant.any()) and writer.kind == "linear" and writer.parts[0].module.bias is None


def bias_switches(model: Any, missing: set[str]) -> tuple[dict[str, bool], set[str]] | None:
    """The switches in the model's configuration (such as Llama's `mlp_bias`) that give it the wanted biases, and all
    the biases that they bring; None where there are none. Found by building the model on the meta device."""
    base = set(_meta_keys(model, {}))
    if other := sorted(base ^ model.state_dict().keys()):
        raise FoldError(
            f"{type(model).__name__} would not be loaded as it is: model.config makes a model that differs in "
            f"{', '.join(other[:3])}: correct model.config (num_hidden_layers, say) first"
        )
    text = model.config.get_text_config()
    offered = [name for name, value in text.to_dict().items() if "bias" in name and value is False]
    for several in (1, 2):
        for names in itertools.combinations(offered, several):
            switches = dict.fromkeys(names, True)
            try:
                brought = set(_meta_keys(model, switches))
            except (TypeError, ValueError, RuntimeError):
                continue  # a switch that this class does not have in truth
            new = brought - base
            if base <= brought and missing <= new and all(name.endswith(".bias") for name in new):
                return switches, new
    return None


def _meta_keys(model: Any, switches: dict[str, bool]) -> list[str]:
    config = copy.deepcopy(model.config)
    text = config.get_text_config()
    for name, value in switches.items():
        setattr(text, name, value)
    with torch.device("meta"):
        return list(type(model)(config).state_dict())


def _shared(model: nn.Module, part: StreamParameter) -> list[str]:
    """Other names of the same parameter."""
    same = [name for name, p in model.named_parameters(remove_duplicate=False) if p is part.parameter]
    return [name for name in same if name != part.full_name]


def _head(model: Any) -> Any:
    return model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None


def check_writers(model: nn.Module, writers: list[Writer]) -> None:
    """Refuse what cannot be changed, before anything is."""
    head = _head(model)
    for writer in writers:
        if not writer.is_changed:
            continue
        if writer.closed:
            raise FoldError(f"{writer.name} cannot be changed: {writer.closed}")
        if writer.kind == "experts" and bool(writer.constant.any()):
            raise FoldError(
                f"{writer.name} is a mixture of experts, which has no bias that every token gets: an addition there "
                "cannot be folded"
            )
        for part in writer.parts:
            if type(part.parameter.data) is not Tensor:
                kind = type(part.parameter.data).__name__
                raise FoldError(f"{part.full_name} is a {kind}: fold into plain weights, and quantise afterwards")
            tied = writer.kind == "embedding" and head is not None and head.weight is part.parameter
            if (others := _shared(model, part)) and not (tied and len(others) == 1):
                raise FoldError(f"{part.full_name} is shared with {', '.join(others)}: changing one changes both")


# Folding --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Check:
    """How far a folded model is from its plan's hooks.

    Attributes:
        difference: the largest difference of two logits, over all sequences, positions and tokens.
        tolerance: what rounding explains: 4 times what noise of one rounding at every writer does to the same logits.
        tokens: greedy continuations compared, token by token.
        equal: how many of them are the same.
    """

    difference: float
    tolerance: float
    tokens: int
    equal: int


@dataclass(frozen=True)
class Folded:
    """What `fold` gives: the model, what was changed in it, and the check against the hooks."""

    model: nn.Module
    plan: Plan
    changed: tuple[str, ...]
    untied: bool
    switches: dict[str, bool]
    check: Check

    def report(self) -> dict[str, Any]:
        """JSON-serialisable."""
        return {
            "changed": list(self.changed),
            "untied": self.untied,
            "config": self.switches,
            "check": dict(vars(self.check)),
        }

    def save(self, folder: str | os.PathLike[str], tokenizer: Any = None) -> Path:
        """Write the model (and tokenizer) with `save_pretrained`, and `faststeer_fold.json` with the plan and the
        check. The folder appears whole or not at all, after it was loaded again, and its weights and logits compared.

        Raises:
            ValueError: the folder is there and not empty. FoldError: what is loaded from it is another model.
        """
        with new_folder(folder) as path:
            self.model.save_pretrained(path)  # type: ignore[operator]
            check_saved(self.model, path)
            if tokenizer is not None:
                tokenizer.save_pretrained(path)
            write_report(path, self.plan, self.report())
        return Path(folder)


def fold(
    model: nn.Module, plan: Plan | Intervention, *, in_place: bool = False, tokens: Tensor | None = None
) -> Folded:
    """Make a plan permanent in a model's weights; saved and loaded with transformers as ever.

    Add anywhere, Ablate everywhere (every writer cleared of the same directions), and at attn_out and mlp_out also
    Project, Clamp with low = high and relative Rotate. Tied heads are untied, as changing the embedding must not change
    the head. An addition goes to a bias; where an architecture has none, its configuration is asked for one (Llama:
    `mlp_bias`, `attention_bias`), and where that has none the plan is refused: see `fold_adapter`.

    Every change is computed in fp64 and rounded once. Then logits and greedy tokens are compared with those under the
    plan's hooks.

    Args:
        model: a causal language model of transformers, unquantised and without peft's adapters.
        plan: acting at all positions, without gates, norms kept or probes.
        in_place: change the model itself, not a copy.
        tokens: `[batch, seq]` token ids for the check (default: 4 random sequences of 16); 16 greedy tokens follow.

    Returns:
        Folded, whose `.model` is the changed model.

    Raises:
        FoldError (a ValueError): the plan cannot be folded into this architecture, and why (nothing is changed); or the
            check failed (the copy is dropped; with `in_place` the model must be loaded again).
        TypeError: no plan.
    """
    check_savable(model)
    plan, writers, points = prepare(model, plan)
    check_writers(model, writers)
    missing = {f"{writer.parts[0].path}.bias" for writer in writers if _needs_bias(writer)}
    switches: dict[str, bool] = {}
    brought: set[str] = set()
    if missing:
        switched = bias_switches(model, missing)
        if switched is None:
            raise FoldError(
                f"{type(model).__name__} has no bias at {min(missing).removesuffix('.bias')}, nor a switch in its "
                "configuration that gives it one: it would be lost when the model is loaded. Fold it into a peft "
                "adapter (fold_adapter, faststeer fold --adapter)"
            )
        switches, brought = switched
    expected = Expected(model, plan, points, tokens)
    target = model if in_place else copy.deepcopy(model)
    leave_quantizer(target)
    with torch.no_grad():
        _open_biases(target, switches, brought)
        moved = [_moved(writer, target) for writer in writers if writer.is_changed]
        untied = _untie(target, moved)
        for writer in moved:
            _write(writer)
    changed = [name for writer in moved for name in _changed_names(writer)]
    check = expected.compare(target)
    return Folded(target, plan, tuple(changed), untied, switches, check)


def prepare(model: nn.Module, plan: Plan | Intervention) -> tuple[Plan, list[Writer], HookPoints]:
    """The plan, the model's writers with what it makes of them, and the hook points; nothing is changed.

    Raises:
        FoldError, ValueError, TypeError: as for `fold`.
    """
    plan = as_plan(plan, "plan") or Plan([])
    check_unadapted(model)
    points = find_hook_points(model)
    try:
        points.check_uniform(model, "fold")
    except ValueError as error:
        raise FoldError(str(error)) from None
    if is_changed(points.owner(model)):
        raise FoldError("the model is being steered: leave steer(...) first")
    writers = find_writers(model, points)
    wide = Plan([_in_fp64(intervention) for intervention in plan])
    schedule(compile_plan(wide, points.n_layers, points.hidden_size), writers, points)
    if not any(writer.is_changed for writer in writers):
        raise FoldError("the plan changes nothing")
    return plan, writers, points


def _in_fp64(intervention: Intervention) -> Intervention:
    """The same with fp64 directions, so that they are made orthonormal to fp64 too."""
    wide = copy.copy(intervention)
    for name in intervention.direction_names:
        value = getattr(intervention, name)
        if isinstance(value, SteeringVector):
            value = dataclasses.replace(value, directions={n: d.detach().double() for n, d in value.directions.items()})
        else:
            value = value.detach().double()
        object.__setattr__(wide, name, value)
    return wide


def _moved(writer: Writer, target: nn.Module) -> Writer:
    """The writer in a copy of its model."""
    parts = [StreamParameter(part.path, target.get_submodule(part.path), part.name, part.axis) for part in writer.parts]
    return Writer(writer.name, parts, "", writer.kind, writer.scale, writer.change, writer.constant)


def _open_biases(model: Any, switches: dict[str, bool], names: set[str]) -> None:
    for name in sorted(names):
        module = model.get_submodule(name.removesuffix(".bias"))
        weight = module.weight
        out = weight.shape[1] if isinstance(module, Conv1D) else weight.shape[0]
        module.bias = nn.Parameter(weight.new_zeros(out), requires_grad=weight.requires_grad)
    for name, value in switches.items():
        setattr(model.config.get_text_config(), name, value)


def _untie(model: Any, writers: list[Writer]) -> bool:
    """Give the head its own weights, if it shares those of a table that is to change."""
    head = _head(model)
    if head is None:
        return False
    changed = [part for writer in writers if writer.kind == "embedding" for part in changed_tables(writer)]
    if not any(part.parameter is head.weight for part in changed):
        return False
    head.weight = nn.Parameter(head.weight.detach().clone(), requires_grad=head.weight.requires_grad)
    for config in (model.config, model.config.get_text_config()):
        config.tie_word_embeddings = False
    if getattr(model, "all_tied_weights_keys", None):
        model.all_tied_weights_keys = {}
    return True


def changed_tables(writer: Writer) -> list[StreamParameter]:
    """A map changes every table, a constant the last one."""
    return writer.parts if not writer.change.is_identity else writer.parts[-1:]


def _changed_names(writer: Writer) -> list[str]:
    parts = writer.parts if not writer.change.is_identity else []
    if writer.kind == "embedding":
        parts = changed_tables(writer)
    names = [part.full_name for part in parts]
    if writer.kind == "linear" and writer.parts[0].module.bias is not None:
        names.append(f"{writer.parts[0].path}.bias")
    return names


def _write(writer: Writer) -> None:
    """W -> M W, b -> M b + c."""
    if not writer.change.is_identity:
        for part in writer.parts:
            apply(writer.change, part)
    if writer.kind == "embedding":
        if bool(writer.constant.any()):
            table = writer.parts[-1]
            factor = writer.scale * own_scale(table.module)
            add_rows(table.parameter, writer.constant / factor)
    elif writer.kind == "linear" and (bias := writer.parts[0].module.bias) is not None:
        changed = writer.change(bias.detach().double()) + writer.constant.to(bias.device)
        bias.copy_(changed)


def apply(change: Map, part: StreamParameter) -> None:
    rows = part.parameter.data.movedim(part.axis, 0)
    flat = rows.flatten(1) if rows.ndim > 1 else rows.unsqueeze(1)
    done = torch.empty_like(flat)
    for start in range(0, flat.shape[1], CHUNK):
        done[:, start : start + CHUNK] = change(flat[:, start : start + CHUNK].double())
    part.parameter.data.copy_(done.reshape(rows.shape).movedim(0, part.axis))


def add_rows(table: nn.Parameter, constant: Tensor) -> None:
    for start in range(0, table.shape[0], CHUNK):
        rows = table.data[start : start + CHUNK]
        rows.copy_(rows.double() + constant.to(rows.device))


def own_scale(module: Any) -> float:
    """What an embedding multiplies its rows with by itself (Gemma 3)."""
    weight: Tensor = module.weight
    ids = torch.arange(min(4, weight.shape[0]), device=weight.device)
    if type(module).forward is nn.Embedding.forward or getattr(module, "embed_scale", None) is None:
        return 1.0
    rows, embedded = weight[ids].double(), module(ids).double()
    return float((rows * embedded).sum() / (rows * rows).sum())


# The check ------------------------------------------------------------------------------------------------------------


class Expected:
    """What the model says under the plan's hooks, and how far rounding alone moves that."""

    def __init__(self, model: nn.Module, plan: Plan, points: HookPoints, tokens: Tensor | None) -> None:
        device = next(model.parameters()).device
        self.ids = _check_tokens(model, tokens).to(device)
        self.start = self.ids.shape[1]
        with evaluating(model), torch.no_grad(), steer(model, plan, path="hooks"):
            if hasattr(model, "generate"):
                self.ids = model.generate(  # type: ignore[operator]
                    self.ids,
                    attention_mask=torch.ones_like(self.ids),
                    do_sample=False,
                    num_beams=1,
                    max_new_tokens=16,
                    eos_token_id=None,
                    pad_token_id=0,
                )
            self.logits = _logits(model, self.ids)
            moved = [(self._noisy(model, points, seed) - self.logits).abs().max() for seed in range(3)]
        self.tolerance = NOISE_FACTOR * float(max(moved))

    def _noisy(self, model: nn.Module, points: HookPoints, seed: int) -> Tensor:
        """The logits with noise of one rounding at every writer's output: of a dot product of n terms in fp32, sqrt(n)
        unit roundoffs of the row's root mean square; in 16 bits the result's own rounding is the larger, and in
        fp64 the hooks' directions are fp32."""
        generator = torch.Generator().manual_seed(seed)
        wide = 4 * points.hidden_size

        def noise(x: Tensor) -> Tensor:
            eps = max(torch.finfo(x.dtype).eps, torch.finfo(torch.float32).eps)
            unit = eps / 2 * (wide if x.dtype in (torch.float32, torch.float64) else 1) ** 0.5
            drawn = torch.randn(x.shape, generator=generator, dtype=torch.float64, device="cpu").to(x.device)
            size = x.double().pow(2).mean(-1, keepdim=True).sqrt()
            return (x.double() + unit * size * drawn).to(x.dtype)

        numbers = [site("resid_pre", 0)]
        numbers += [site(at, i) for i in range(points.n_layers) for at in ("attn_out", "mlp_out")]
        with changing() as changes:
            install(changes, model, points, dict.fromkeys(numbers, noise))
            return _logits(model, self.ids)

    def compare(self, folded: nn.Module) -> Check:
        """Raises FoldError where the folded model is further away than rounding explains, or says another token where
        the two best are further apart than that."""
        with evaluating(folded), torch.no_grad():
            logits = _logits(folded, self.ids)
        difference = float((logits - self.logits).abs().max())
        answer = slice(self.start - 1, -1) if self.ids.shape[1] > self.start else slice(None)
        best, second = self.logits[:, answer].topk(2, dim=-1).values.unbind(-1)
        same = logits[:, answer].argmax(-1) == self.logits[:, answer].argmax(-1)
        check = Check(difference, self.tolerance, same.numel(), int(same.sum()))
        finite = bool(torch.isfinite(logits).all())
        if not finite or difference > self.tolerance or bool((~same & (best - second > 2 * self.tolerance)).any()):
            raise FoldError(
                f"the folded model is not the steered one: logits differ by {difference:.3g}, rounding explains "
                f"{self.tolerance:.3g}, {check.equal} of {check.tokens} greedy tokens agree; this architecture does "
                "something with its weights that is not known here"
            )
        return check


def _check_tokens(model: Any, tokens: Tensor | None) -> Tensor:
    vocabulary = model.get_input_embeddings().num_embeddings
    if tokens is None:
        return torch.randint(vocabulary, (4, 16), generator=torch.Generator().manual_seed(0), device="cpu")
    tokens = torch.as_tensor(tokens)
    whole = not (tokens.is_floating_point() or tokens.is_complex() or tokens.dtype == torch.bool)
    if tokens.ndim != 2 or not tokens.numel() or not whole or int(tokens.min()) < 0:
        raise ValueError(f"tokens has shape {list(tokens.shape)}, {tokens.dtype}: expected token ids [batch, seq]")
    if int(tokens.max()) >= vocabulary:
        raise ValueError(f"tokens has id {int(tokens.max())}: the model's vocabulary has {vocabulary}")
    return tokens


def _logits(model: nn.Module, ids: Tensor) -> Tensor:
    return first_output(model(input_ids=ids, use_cache=False)).double()


class evaluating:
    """Evaluation mode, and back."""

    def __init__(self, model: nn.Module) -> None:
        self.model, self.modes = model, {module: module.training for module in model.modules()}

    def __enter__(self) -> None:
        self.model.eval()

    def __exit__(self, *exception: object) -> None:
        for module, mode in self.modes.items():
            module.training = mode


# Saving ---------------------------------------------------------------------------------------------------------------


def write_report(folder: Path, plan: Plan, report: dict[str, Any]) -> None:
    content = {"plan": json.loads(plan.to_json(inline=True)), **report}
    write_atomically(folder / "faststeer_fold.json", json.dumps(content, indent=2) + "\n")
