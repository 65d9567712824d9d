"""The linear algebra of the methods from contrast, in fp64: top eigenvectors and logistic regression.

It knows tensors, no models.
"""

from __future__ import annotations

import torch
from torch import Tensor

MAX_STEPS = 200


def top_of_factor(factor: Tensor) -> tuple[Tensor, float]:
    """The top eigenvector of factor^T factor, `factor` being `[k, hidden]`, and its eigenvalue's share of the trace,
    without that matrix."""
    _, sizes, rows = torch.linalg.svd(factor, full_matrices=False)
    return rows[0], float(sizes[0] ** 2 / (sizes**2).sum())


def logistic(positive: Tensor, negative: Tensor, c: float) -> tuple[Tensor, float]:
    """The weight `[hidden]` of the L2-penalised logistic regression of positive against negative `[n, hidden]`, and its
    accuracy on them (the objective is in `Contrast.probe`).

    The optimum lies in the span of the centred data, so Newton's method runs in its coordinates, at most as many as
    prompts; steps are halved until the objective falls, and it ends where the gradient is at rounding level.
    """
    x = torch.cat([positive, negative])
    y = torch.cat([torch.ones(len(positive)), -torch.ones(len(negative))]).double()
    x = x - x.mean(0)
    scale = x.pow(2).sum(1).mean().sqrt()
    u, sizes, rows = torch.linalg.svd(x / scale, full_matrices=False)
    rank = int((sizes > sizes[0] * torch.finfo(torch.float64).eps * max(x.shape)).sum())
    z = torch.cat([u[:, :rank] * sizes[:rank], torch.ones(len(x), 1, dtype=torch.float64)], dim=1)
    penalty = torch.ones(rank + 1, dtype=torch.float64)
    penalty[-1] = 0.0  # of the intercept

    def objective(w: Tensor) -> Tensor:
        return 0.5 * (penalty * w * w).sum() + c * torch.nn.functional.softplus(-y * (z @ w)).sum()

    w = torch.zeros(rank + 1, dtype=torch.float64)
    for _ in range(MAX_STEPS):
        wrong = torch.sigmoid(-y * (z @ w))
        gradient = penalty * w - c * (z.T @ (y * wrong))
        if gradient.norm() <= 1e-12 * c * len(x):
            break
        curvature = torch.diag(penalty) + c * (z.T * (wrong * (1 - wrong))) @ z
        step = torch.linalg.lstsq(curvature, gradient.unsqueeze(1)).solution.squeeze(1)
        size, here = 1.0, objective(w)
        while objective(w - size * step) > here - 1e-4 * size * (gradient @ step) and size > 1e-10:
            size /= 2
        if size <= 1e-10:  # nothing lower within rounding
            break
        w = w - size * step
    accuracy = float(((z @ w).sign() == y).double().mean())
    return rows[:rank].T @ w[:-1] / scale, accuracy
