"""Fused layers: residual add, steering and the next RMSNorm in one op (`add_steer_rmsnorm`), two ops a layer.

A decoder layer computes `mid = x + attention(norm(x))`, `output = mid + mlp(norm(mid))`. Only `forward` of the layers
and of the norms is replaced, on the instances, while patched: a layer still takes and returns one tensor, and modules
are called as modules, with their hooks. A norm that is called with the very tensor that the op returned (`is`) returns
the op's normed tensor; otherwise it computes normally. So what comes between (a hook that returns another tensor,
another device) costs the fusion and nothing else.

No table of architectures: the modules are known by the names that transformers gives them everywhere, a norm by what
it computes, and the whole by a forward pass that must come out the same bit for bit.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from faststeer.hf.anatomy import run_four_tokens, same_but_for_rounding
from faststeer.hf.changes import Changes, changing, own_attribute
from faststeer.hf.hook_points import HookPoints, quiet
from faststeer.hf.known import Known, by_name, known_of, parameters
from faststeer.hf.norms import eps_of, on_trial
from faststeer.ops import reference
from faststeer.plan import site

# An RMSNorm as `add_steer_rmsnorm` takes it: weight, eps, weight_offset, fp32_weight.
RmsNorm = tuple[Tensor, float, float, bool]

# (branch, residual, norm) -> (hidden, normed): residual + branch, steered at a site, and what the norm makes of it, or
# None where there is none to compute.
Add = Callable[[Tensor, Tensor, RmsNorm | None], tuple[Tensor, Tensor | None]]


@dataclass(frozen=True)
class NormForm:
    """How an RMSNorm computes, and its name for eps."""

    eps: float
    weight_offset: float
    fp32_weight: bool
    eps_name: str

    def of(self, weight: Tensor) -> RmsNorm:
        """The norm with this weight."""
        return weight, self.eps, self.weight_offset, self.fp32_weight


# What modules raise that are not called as they expect; not what a signal handler may raise.
WRONG_CALL = ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError


class CannotFuse(Exception):
    """Why a model's layers cannot be fused."""


class _Shape(NamedTuple):
    """The modules of a layer, by name; "" for none. `after_*` stand between a branch and its sum."""

    input_norm: str
    after_attention: tuple[str, ...]
    mid_norm: str
    after_mlp: tuple[str, ...]


@dataclass(frozen=True)
class Fusion:
    """How a model's layers are fused: found once per model."""

    shape: _Shape
    forms: Mapping[str, NormForm]  # of each norm, by its path in the model
    final_norm: str  # "" for none


def find_fusion(model: nn.Module, points: HookPoints, known: Known | None = None) -> Fusion | str:
    """How to fuse a model's layers, or why that cannot be done. Two forward passes over four tokens the first time."""

    def find() -> Fusion | str:
        with quiet(model):
            try:
                return _find(model, points)
            except CannotFuse as reason:
                return str(reason)

    return (known or known_of(model)).get("fusion", find)


def patch(changes: Changes, model: nn.Module, points: HookPoints, fusion: Fusion, add: Callable[[int], Add]) -> None:
    """Fuse the layers: `add(site)` computes the sum at a site."""
    norms = {path: model.get_submodule(path) for path in fusion.forms}
    forms = {norms[path]: form for path, form in fusion.forms.items()}
    handover = _Handover()
    for norm in norms.values():
        changes.replace(norm, "forward", _norm_forward(norm, handover))
    layers = [points.layer(model, i) for i in range(points.n_layers)]
    following = [layer._modules.get(fusion.shape.input_norm) for layer in layers[1:]]
    next_to = zip(layers, [*layers[1:], None], [*following, norms.get(fusion.final_norm)], strict=True)
    for i, (layer, after, next_norm) in enumerate(next_to):
        forward = _layer_forward(layer, i, fusion.shape, after, next_norm, forms, handover, add)
        changes.replace(layer, "forward", forward)


class _Handover(threading.local):
    """A tensor and what the norm that reads it next will make of it. Empty between passes."""

    def __init__(self) -> None:
        self.hidden: Tensor | None = None
        self.normed: Tensor | None = None


def _norm_forward(norm: nn.Module, handover: _Handover) -> Callable[..., Tensor]:
    own = type(norm).forward

    def forward(x: Tensor) -> Tensor:
        hidden, normed = handover.hidden, handover.normed
        handover.hidden = handover.normed = None
        return own(norm, x) if normed is None or hidden is not x else normed

    return forward


def _layer_forward(
    layer: nn.Module,
    index: int,
    shape: _Shape,
    after: nn.Module | None,
    following: nn.Module | None,
    forms: Mapping[nn.Module, NormForm],
    handover: _Handover,
    add: Callable[[int], Add],
) -> Callable[..., Tensor]:
    """The layer's `forward`, fused. `following`: the norm that reads the layer's output, `after`: the layer of it."""
    names = parameters(type(layer).forward)[1:]  # after hidden_states
    add_mid, add_end = add(site("resid_mid", index)), add(site("resid_post", index))
    # Looked up in every pass, where a module that was replaced since is seen, but not by nn.Module's slow way.
    modules, own_hooks = layer._modules, layer._forward_hooks
    next_hooks: Mapping[int, Any] = {} if after is None else after._forward_pre_hooks
    input_norm, after_attention, mid_norm, after_mlp = shape

    def sum_into(add: Add, branch: Tensor, residual: Tensor, norm: Any) -> Tensor:
        form = None if norm is None or norm._forward_pre_hooks else forms.get(norm)
        weight = None if form is None else norm._parameters.get("weight")
        if form is None or weight is None or weight.device != branch.device or getattr(norm, form.eps_name) != form.eps:
            return add(branch, residual, None)[0]
        hidden, handover.normed = add(branch, residual, form.of(weight))
        handover.hidden = hidden
        return hidden

    def forward(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if layer.training and getattr(layer, "gradient_checkpointing", False):
            raise RuntimeError(
                "gradient checkpointing was switched on inside steer(...): enter steer(...) after "
                "gradient_checkpointing_enable()"
            )
        kwargs = by_name(names, args, kwargs)
        norm: Any = modules.get(input_norm)
        branch = hidden_states if norm is None else norm(hidden_states)
        branch = modules["self_attn"](hidden_states=branch, **kwargs)  # type: ignore[misc]
        if not isinstance(branch, Tensor):
            branch = branch[0]
        for name in after_attention:
            branch = modules[name](branch)  # type: ignore[misc]
        norm = modules.get(mid_norm)
        x = sum_into(add_mid, branch, hidden_states, norm)
        branch = modules["mlp"](x if norm is None else norm(x))  # type: ignore[misc]
        if not isinstance(branch, Tensor):
            branch = branch[0]
        for name in after_mlp:
            branch = modules[name](branch)  # type: ignore[misc]
        # Who is shown the layer's output may write to it: then the next norm must look at it again.
        shown = (own_hooks and _may_write(own_hooks)) or (next_hooks and _may_write(next_hooks))
        return sum_into(add_end, branch, x, None if shown else following)

    return forward


def _may_write(hooks: Mapping[int, Callable[..., Any]]) -> bool:
    """transformers' own hooks, which collect hidden states, only look."""
    return any(not getattr(hook, "__module__", "").startswith("transformers.") for hook in hooks.values())


# Finding --------------------------------------------------------------------------------------------------------------


def _find(model: nn.Module, points: HookPoints) -> Fusion:
    if not points.uniform:
        raise CannotFuse("not every layer is seen to be its input, attention and an MLP, by the same names")
    layers = [points.layer(model, i) for i in range(points.n_layers)]
    shapes = {_shape(layer) for layer in layers}
    if len(shapes) > 1:
        raise CannotFuse("the layers are not made of the same modules")
    shape = shapes.pop()
    for layer in layers:
        if own_attribute(layer, "forward") is not None:
            raise CannotFuse("a layer's forward is replaced already (accelerate does so where it moves weights)")
        if quantising := _quantising(layer):
            raise CannotFuse(
                f"{quantising} quantises what it is given, so that a norm that sums in another order would move its "
                "output by more than rounding"
            )
    names = [name for name in (shape.input_norm, shape.mid_norm) if name]
    paths = [f"{points.layers}.{i}.{name}" for i in range(points.n_layers) for name in names]
    forms = {path: _form(model.get_submodule(path), path) for path in paths}
    final = f"{points.layers.rpartition('.')[0]}.norm".lstrip(".")
    try:
        forms[final] = _form(model.get_submodule(final), final)
    except (AttributeError, CannotFuse):
        final = ""
    fusion = Fusion(shape, forms, final)
    _confirm(model, points, fusion)
    return fusion


def _quantising(layer: nn.Module) -> str:
    """The first module that is no linear function of its input, though it takes `in_features` numbers and has no plain
    weight; "" for none."""
    plain = next((p for p in layer.parameters() if p.is_floating_point() and type(p) is nn.Parameter), torch.empty(0))
    for name, module in layer.named_modules():
        width = getattr(module, "in_features", None)
        if not isinstance(width, int) or type(getattr(module, "weight", None)) is nn.Parameter or plain.is_meta:
            continue
        a, b = torch.randn(2, 4, width, generator=torch.Generator().manual_seed(0), device="cpu").to(plain)
        try:
            with torch.no_grad():
                together, apart = module(a + b) + module(torch.zeros_like(a)), module(a) + module(b)
        except WRONG_CALL:  # takes more than a tensor: adapters of experts, say
            continue
        if not same_but_for_rounding(together, apart):
            return name
    return ""


def _shape(layer: nn.Module) -> _Shape:
    """The layer's modules, by the names that they have throughout transformers."""
    has = {name for name, _ in layer.named_children()}
    if not {"self_attn", "mlp", "post_attention_layernorm"} <= has:
        raise CannotFuse(f"{type(layer).__name__} is not made of self_attn, mlp and norms before or after them")
    pre, sandwich = "input_layernorm" in has, "pre_feedforward_layernorm" in has
    after_attention = [] if pre and not sandwich else ["post_attention_layernorm"]
    return _Shape(
        input_norm="input_layernorm" if pre else "",
        after_attention=(*after_attention, *sorted(has & {"resid_attn_dropout"})),
        mid_norm="pre_feedforward_layernorm" if sandwich else "post_attention_layernorm" if pre else "",
        after_mlp=(*sorted(has & {"post_feedforward_layernorm"}), *sorted(has & {"resid_mlp_dropout"})),
    )


def _form(norm: nn.Module, path: str) -> NormForm:
    """What an RMSNorm computes, found by comparing with the formulas bit for bit; in bf16 too, as in fp32 two are the
    same, and a model may be cast later."""
    (name, eps), weight = eps_of(norm), getattr(norm, "weight", None)
    if own_attribute(norm, "forward") is not None or eps is None or not isinstance(weight, Tensor) or weight.is_meta:
        raise CannotFuse(f"{path} is a {type(norm).__name__}, no RMSNorm with weights at hand")
    with torch.no_grad():
        dtypes = (weight.dtype, torch.bfloat16)
        trials = [on_trial(norm, weight.shape[-1], dtype, weight.device) for dtype in dtypes]
        for rounding in ((0.0, False), (1.0, True), (0.0, True)):
            form = NormForm(eps, *rounding, name)
            if all(torch.equal(reference.rmsnorm(x, *form.of(trial.weight)), trial(x)) for trial, x in trials):
                return form
    raise CannotFuse(f"{path} is a {type(norm).__name__}, which is no RMSNorm that the op computes")


def _confirm(model: nn.Module, points: HookPoints, fusion: Fusion) -> None:
    """Fused and unfused must give the same bits."""

    def add(branch: Tensor, residual: Tensor, norm: RmsNorm | None) -> tuple[Tensor, Tensor | None]:
        hidden = residual + branch
        return hidden, None if norm is None else reference.rmsnorm(hidden, *norm)

    own = run_four_tokens(model)
    with changing() as changes:
        patch(changes, model, points, fusion, lambda site: add)
        try:
            fused = run_four_tokens(model)
        except WRONG_CALL as error:
            raise CannotFuse(f"{type(error).__name__} in fused layers: {error}") from error
    if not torch.equal(own, fused):
        raise CannotFuse(f"{type(points.layer(model, 0)).__name__} computes something else than its modules' names say")
