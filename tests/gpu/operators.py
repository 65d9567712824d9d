"""One back end of faststeer.ops, called as random_tables.check_all wants it."""

from __future__ import annotations

import torch
from random_tables import Case
from torch import Tensor

from faststeer import ops


class Called:
    """random_tables.Operators on the tables of `case`. Probes come back as the op left them in memory full of NaN."""

    def __init__(self, case: Case, backend: ops.Backend) -> None:
        self.arguments, self.backend = (case.tables, case.rows, case.gate_state), backend

    def _probe(self, x: Tensor, columns: int) -> Tensor:
        return torch.full((x.shape[0], columns), float("nan"), device=x.device)

    def steer(self, x: Tensor, columns: int) -> tuple[Tensor, Tensor]:
        probe = self._probe(x, columns)
        return ops.steer(x, *self.arguments, probe, backend=self.backend), probe

    def add_steer(self, x: Tensor, residual: Tensor, columns: int) -> tuple[Tensor, Tensor]:
        probe = self._probe(x, columns)
        return ops.add_steer(x, residual, *self.arguments, probe, backend=self.backend), probe

    def steer_pair_(self, x: Tensor, residual: Tensor, probe: Tensor | None) -> None:
        ops.steer_pair_(x, residual, *self.arguments, probe, backend=self.backend)

    def add_steer_rmsnorm(
        self, x: Tensor, residual: Tensor, weight: Tensor, norm: tuple[float, float, bool], columns: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        probe = self._probe(x, columns)
        found = ops.add_steer_rmsnorm(x, residual, weight, *norm, *self.arguments, probe, backend=self.backend)
        return *found, probe
