"""What a model's norms compute, and which one stands between the last layer and the unembedding: seen in what they make
of tensors, whatever their class."""

from __future__ import annotations

import copy
import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from faststeer.hf.anatomy import find_hook_points, watch
from faststeer.hf.hook_points import quiet
from faststeer.hf.known import known_of


class NotSeen(ValueError):
    """What a forward pass does not show."""


@dataclass(frozen=True)
class Norm:
    """A norm y = r(x) C x * w + b, with r(x) = (mean((C x)^2) + eps)^-1/2: RMSNorm (C = 1, b = 0) or LayerNorm
    (C subtracts the mean).

    Attributes:
        path: of the module inside its layer (or the model, for the last norm).
        weight_offset: 1 where w = 1 + weight, as in Gemma.
    """

    path: str
    eps: float
    centred: bool
    weight_offset: float

    def scale(self, x: Tensor) -> Tensor:
        """r(x) `[..., 1]`, in fp32 or better."""
        x = self._centre(wide(x))
        return torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps)

    def linear(self, holder: nn.Module, x: Tensor) -> Tensor:
        """C x * w: what the norm does to x, without the scale that the whole stream gives it. `[..., hidden]`, in fp32
        or better. `holder`: what `path` is a path in."""
        return self._weighted(holder, self._centre(wide(x)))

    def transposed(self, holder: nn.Module, u: Tensor) -> Tensor:
        """C (w * u): the direction of x along which u . linear(x) rises fastest. `[..., hidden]`, as `linear`."""
        return self._centre(self._weighted(holder, wide(u)))

    def _weighted(self, holder: nn.Module, x: Tensor) -> Tensor:
        weight = getattr(holder.get_submodule(self.path), "weight", None)
        return x if weight is None else x * (self.weight_offset + wide(weight)).to(x)

    def _centre(self, x: Tensor) -> Tensor:
        return x - x.mean(-1, keepdim=True) if self.centred else x


def is_norm(module: nn.Module) -> bool:
    """Whether a module has what a norm has: no children, a weight per feature or none, and an eps."""
    weight = getattr(module, "weight", None)
    flat = weight is None or weight.ndim == 1
    return flat and next(module.children(), None) is None and eps_of(module)[1] is not None


def norm_form(holder: nn.Module, path: str, size: int) -> Norm:
    """What a norm of rows of `size` numbers computes, found by comparing with the formulas, in fp32 and on a copy with
    a random weight (at its first value two of them are the same).

    Raises:
        NotSeen: neither RMSNorm nor LayerNorm.
    """
    module = holder.get_submodule(path)
    if any(parameter.is_meta for parameter in module.parameters()):
        raise NotSeen(f"{path} is on the meta device and holds no values: load the model into memory")
    with torch.no_grad():
        trial, x = on_trial(module, size, torch.float32, torch.device("cpu"))
        expected, eps = trial(x), eps_of(module)[1]
        for centred in (False, True):
            for offset in (0.0, 1.0):
                norm = Norm("", _eps_felt(trial, x, centred) if eps is None else eps, centred, offset)
                made = norm.scale(x) * norm.linear(trial, x)
                if made.shape == expected.shape and torch.allclose(made, expected, rtol=1e-5, atol=1e-5):
                    return dataclasses.replace(norm, path=path)
    raise NotSeen(f"{path} is a {type(module).__name__}, neither RMSNorm nor LayerNorm")


def on_trial(norm: nn.Module, size: int, dtype: torch.dtype, device: torch.device) -> tuple[Any, Tensor]:
    """A copy of a norm without hooks and bias, with a random weight (at its first value two formulas are the same), and
    rows `[7, size]` to compare them on."""
    generator = torch.Generator().manual_seed(0)
    trial = copy.deepcopy(norm).to(device, dtype).eval()
    trial._forward_hooks.clear()
    trial._forward_pre_hooks.clear()
    if (weight := getattr(trial, "weight", None)) is not None:
        weight.copy_(torch.randn(weight.shape, generator=generator, device="cpu"))
    if (bias := getattr(trial, "bias", None)) is not None:
        bias.zero_()
    return trial, (3 * torch.randn(7, size, generator=generator, device="cpu") + 0.5).to(device, dtype)


def final_norm(model: nn.Module) -> Norm | None:
    """The norm between the last layer and the unembedding; None where the unembedding reads the stream itself. Found
    once per model, by a forward pass over four tokens.

    Raises:
        ValueError: no output embedding; something else than one RMSNorm or LayerNorm between.
    """
    return known_of(model).get("final norm", lambda: _final_norm(model))


def unembedding_of(model: Any) -> nn.Module:
    """The module that makes logits of the last hidden states.

    Raises:
        ValueError: the model has none.
    """
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    if head is None:
        raise ValueError(
            f"{type(model).__name__} has no output embedding: load the causal language model, not its base"
        )
    return head


def _final_norm(model: nn.Module) -> Norm | None:
    points, head = find_hook_points(model), unembedding_of(model)
    with quiet(model):
        calls = watch(model)
    end = calls[f"{points.layers}.{points.n_layers - 1}"].sent
    read = next((call.received for name, call in calls.items() if model.get_submodule(name) is head), None)
    if read is None:
        raise ValueError(f"a forward pass of {type(model).__name__} does not reach its output embedding")
    if torch.equal(read, end):
        return None
    for name, call in calls.items():
        if torch.equal(call.received, end) and torch.equal(call.sent, read):
            try:
                return norm_form(model, name, points.hidden_size)
            except NotSeen as error:
                what = f"{type(model).__name__}: {error}, between the last layer and the unembedding"
                raise ValueError(what) from error
    raise ValueError(
        f"{type(model).__name__} has something else than one norm between its last layer and its unembedding, which "
        "does not read the residual stream through that norm alone"
    )


def eps_of(module: nn.Module) -> tuple[str, float | None]:
    """What a norm calls its eps, and its value; None if it has none."""
    for name in ("variance_epsilon", "eps"):
        if isinstance(eps := getattr(module, name, None), float):
            return name, eps
    return "", None


def _eps_felt(norm: nn.Module, x: Tensor, centred: bool) -> float:
    """The eps that shows in a small row, of a norm that has no such number."""
    row = x[:1] - x[:1].mean() if centred else x[:1]
    row = 1e-3 * row
    size, ratio = row.square().mean(), (norm(row) / norm(1e3 * row)).median()  # eps is nothing beside the larger row
    return float(size / ratio.square() - size)


def wide(x: Tensor) -> Tensor:
    """In fp32, or fp64 where it is that already."""
    return x if x.dtype == torch.float64 else x.float()
