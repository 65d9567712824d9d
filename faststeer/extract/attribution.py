"""Attribution vectors: along which direction a metric of the model's output rises, by integrated gradients with respect
to the residual stream at a layer.

The model's weights take no gradient and are not changed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from faststeer.compile import layer_numbers
from faststeer.extract.contrast import Directions
from faststeer.extract.dim import Candidates
from faststeer.extract.reading import check_lengths
from faststeer.hf import find_hook_points
from faststeer.hf.batching import (
    Prompt,
    batches,
    check_evaluating,
    encode,
    forward_arguments,
    model_device,
    model_name,
    pad,
    padding_id,
)
from faststeer.hf.changes import changing
from faststeer.hf.hook_points import install, next_order
from faststeer.plan import site
from faststeer.progress import progress_bar

Metric = Callable[[Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class Attribution:
    """Integrated gradients of a metric, means over prompts.

    Args:
        gradients: the gradient averaged over the path, at each position and layer: the direction to steer along.
        contributions: `[positions, layers, hidden]` fp64, (h - baseline) times the averaged gradient: how much of the
            metric's change each coordinate accounts for.
        change: `[layers]` fp64, metric at h minus metric at the baseline.

    Completeness: `contributions` summed over positions and coordinates is `change`, up to the error of the quadrature.
    """

    gradients: Directions
    contributions: Tensor
    change: Tensor

    @property
    def completeness_error(self) -> Tensor:
        """`[layers]`: sum of the contributions minus the change."""
        return self.contributions.sum((0, 2)) - self.change


def attribution(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Prompt],
    metric: Metric,
    baseline: Candidates,
    *,
    layers: Iterable[int] | None = None,
    steps: int = 8,
    system: str | None = None,
    rendered: bool = False,
    batch_size: int = 32,
    progress: bool = False,
) -> Attribution:
    """Return the integrated gradients of `metric` with respect to the residual stream, layer by layer.

    At one layer, the tokens at the baseline's positions are moved on a straight line from b, the mean activation of the
    negative prompts, to h, what the prompt has there; all else follows. With x(t) = b + t (h - b),

        gradient_i = integral over t in 0..1 of d metric / d x_i (x(t)),    contribution_i = (h_i - b_i) gradient_i.

    The integral is a Gauss-Legendre sum of `steps` points, whose error falls exponentially for a smooth path; a
    midpoint rule of 10 points is the paper's. The contributions add up to metric(h) - metric(b), whatever the model
    (completeness), which `completeness_error` checks. Source: arXiv 1703.01365; used on steering in arXiv 2604.08524.

    Args:
        prompts: usually the positive ones.
        metric: from logits `[rows, vocabulary]` of the next token after the prompt to `[rows]`, differentiable and
            independent between rows: `logit_difference(...)`, or the refusal score.
        baseline: means from `candidates` or `contrast(...).dim()`, which also say hook point and positions.
        layers: which (all).
        steps: points of the quadrature.
        system, rendered, batch_size, progress: as in `candidates`; a batch mixes points and prompts.

    Raises:
        ValueError: no prompts, `steps` below 1, a baseline of another model, a metric that is not finite or has no
            gradient, a model with several residual streams for each token.
    """
    check_evaluating(model)
    if steps < 1:
        raise ValueError(f"steps is {steps}: expected at least 1 point of the quadrature")
    points = find_hook_points(model)
    if points.streams != (1, 1):
        raise ValueError(f"{type(model).__name__} keeps several residual streams for each token: expected one")
    shape = len(baseline.positions), points.n_layers, points.hidden_size
    if baseline.negative_mean.shape != shape:
        raise ValueError(
            f"the baseline has [positions, layers, hidden] {list(baseline.negative_mean.shape)}, the model "
            f"{list(shape)}: extract it from this model"
        )
    encoded = encode(tokenizer, prompts, system, rendered=rendered)
    check_lengths({"prompts": encoded}, baseline.positions)
    layers = sorted(set(layer_numbers(layers, points.n_layers)))
    nodes, weights = np.polynomial.legendre.leggauss(steps)
    # The ends of the path carry no weight: they give the change of the metric.
    times = torch.tensor([0.0, 1.0, *((nodes + 1) / 2)])
    shares = torch.tensor([0.0, 0.0, *(weights / 2)], dtype=torch.float64)
    ends = torch.tensor([-1.0, 1.0] + [0.0] * steps, dtype=torch.float64)
    rows = [(prompt, number) for prompt in range(len(encoded)) for number in range(len(times))]
    groups = batches([len(encoded[prompt]) for prompt, _ in rows], batch_size)
    gradients, contributions = torch.zeros(shape, dtype=torch.float64), torch.zeros(shape, dtype=torch.float64)
    change = torch.zeros(points.n_layers, dtype=torch.float64)
    with progress_bar("Attributing", len(groups) * len(layers), progress) as advance:
        for layer in layers:
            path = _Path(baseline, layer)
            with changing() as changes:
                install(changes, model, points, {site(baseline.at, layer): path}, next_order())
                for group in groups:
                    numbers = [rows[index][1] for index in group]
                    path.times = times[numbers]
                    ids = [encoded[rows[index][0]] for index in group]
                    values, gradient = _gradient(
                        model, pad(ids, padding_id(tokenizer), model_device(model)), metric, path
                    )
                    weighted = gradient * shares[numbers, None, None]
                    gradients[:, layer] += weighted.sum(0)
                    contributions[:, layer] += (weighted * path.step).sum(0)
                    change[layer] += (ends[numbers] * values).sum()
                    advance()
    n = len(encoded)
    table = Directions(
        gradients / n,
        baseline.positions,
        baseline.at,
        "attribution",
        "raw",
        model_name(model),
        provenance={"n_prompts": n, "steps": steps},
    )
    return Attribution(table, contributions / n, change / n)


class _Path:
    """Puts a batch's rows on their points of the path, at one layer; what was put there is the leaf."""

    def __init__(self, baseline: Candidates, layer: int) -> None:
        self.columns = list(baseline.positions)
        self.base = baseline.negative_mean[:, layer]
        self.times: Tensor
        self.leaf: Tensor
        self.step: Tensor  # h - b, `[rows, positions, hidden]` fp64 on the CPU

    def __call__(self, x: Tensor) -> Tensor:
        here = x.detach()[:, self.columns]
        base, times = self.base.to(x.device, x.dtype), self.times.to(x.device, x.dtype)[:, None, None]
        self.step = here.cpu().double() - base.cpu().double()
        self.leaf = torch.lerp(base.expand_as(here), here, times).detach().requires_grad_()
        moved = x.detach().clone()
        moved[:, self.columns] = self.leaf
        return moved


@torch.enable_grad()
def _gradient(model: Any, batch: dict[str, Tensor], metric: Metric, path: _Path) -> tuple[Tensor, Tensor]:
    """The metric `[rows]` and its gradient `[rows, positions, hidden]`, fp64 on the CPU."""
    logits = model(**forward_arguments(model, batch)).logits[:, -1]
    values = metric(logits)
    if values.shape != logits.shape[:1] or not values.requires_grad:
        raise ValueError(
            f"the metric gave shape {list(values.shape)}{'' if values.requires_grad else ' without a gradient'} for "
            f"logits {list(logits.shape)}: expected one differentiable number per row"
        )
    if not bool(torch.isfinite(values).all()):
        raise ValueError("the metric is NaN or infinite on the path from the baseline: use one that is finite there")
    (gradient,) = torch.autograd.grad(values.sum(), path.leaf)
    return values.detach().cpu().double(), gradient.cpu().double()


def logit_difference(tokens: Sequence[int], against: Sequence[int]) -> Metric:
    """Return the metric log P(one of `tokens`) - log P(one of `against`) of the next token.

    Raises:
        ValueError: an empty list, or a token in both.
    """
    first, second = sorted(set(tokens)), sorted(set(against))
    if not first or not second or set(first) & set(second):
        raise ValueError(f"tokens {first} against {second}: expected two lists that share no token")

    def metric(logits: Tensor) -> Tensor:
        logits = logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits
        return logits[:, first].logsumexp(-1) - logits[:, second].logsumexp(-1)

    return metric
