"""What probes saw, by site, in the order of the passes."""

from __future__ import annotations

import torch
from torch import Tensor

from faststeer.plan import site_name
from faststeer.vector import HookPoint


class ProbeLog:
    """Dot products `[batch, tokens, k]` of every pass."""

    def __init__(self, n_layers: int) -> None:
        self._n_layers = n_layers
        self._pieces: dict[int, list[Tensor]] = {}

    def add(self, site: int, piece: Tensor) -> None:
        """What a pass saw at a site."""
        self._pieces.setdefault(site, []).append(piece)

    def last(self, site: int) -> Tensor:
        """What the last pass saw there."""
        return self._pieces[site][-1]

    def all(self) -> dict[tuple[HookPoint, int], Tensor]:
        """`Steering.projections`."""
        found = {}
        for site, pieces in sorted(self._pieces.items()):
            if len({piece.shape[0] for piece in pieces}) > 1:
                raise ValueError(
                    "forward passes with different batch sizes were probed: call clear_projections() between them"
                )
            width = max(piece.shape[2] for piece in pieces)
            padded = [torch.nn.functional.pad(piece, (0, width - piece.shape[2])) for piece in pieces]
            found[site_name(site, self._n_layers)] = torch.cat(padded, dim=1)
        return found

    def clear(self) -> None:
        """Forget it."""
        self._pieces.clear()
