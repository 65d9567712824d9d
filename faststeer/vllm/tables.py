"""How large a server's tables are, and whether a plan has room in them. Decided once, from the model and the settings:
the tables stand before the model is compiled and captured. This module imports no vLLM."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from faststeer.ops.tables import Kind
from faststeer.plan import Entry, n_sites, site, site_name
from faststeer.program import Capacity, Program
from faststeer.vector import HOOK_POINTS
from faststeer.vllm.settings import Settings


@dataclass(frozen=True)
class Room:
    """What one plan may take.

    Args:
        entries, vectors: see `Settings.max_entries`, `Settings.max_vectors`.
        probe_columns, latched_gates: see there.
        sites: those that the model is built with.
    """

    entries: int
    vectors: int
    probe_columns: int
    latched_gates: int
    sites: frozenset[int]

    @classmethod
    def of(cls, settings: Settings, n_layers: int) -> Room:
        sites = {site(at, layer) for at in HOOK_POINTS for layer in range(n_layers) if at in settings.hook_points}
        return cls(
            entries=settings.max_entries or 4 * n_sites(n_layers),
            vectors=settings.max_vectors or 2 * n_layers + 8,
            probe_columns=settings.probe_columns,
            latched_gates=settings.latched_gates,
            sites=frozenset(sites),
        )


def check_fits(entries: list[Entry], settings: Settings, n_layers: int) -> None:
    """Raise ValueError unless a server's tables have room for a plan of these entries, whatever else they hold."""
    room = Room.of(settings, n_layers)
    for entry in entries:
        if entry.site not in room.sites:
            at, layer = site_name(entry.site, n_layers)
            raise ValueError(
                f"the plan acts at {at} of layer {layer}: this server is built with {', '.join(settings.hook_points)} "
                'alone; start it with the setting "hook_points": "all"'
            )
    blocks = {block_key(rows): len(rows) for e in entries for rows in (e.basis, e.gate_vector) if rows is not None}
    probed: dict[int, int] = {}
    for entry in entries:
        if entry.probe_column >= 0:
            probed[entry.site] = max(probed.get(entry.site, 0), entry.probe_column + len(entry.basis))
    needs = {
        "max_entries": (len(entries), room.entries, "entries (interventions, once per hook point and layer)"),
        "max_vectors": (sum(blocks.values()), room.vectors, "vectors"),
        "probe_columns": (max(probed.values(), default=0), room.probe_columns, "probed values at one hook point"),
        "latched_gates": (sum(e.kind == Kind.LATCH for e in entries), room.latched_gates, "latched gates"),
    }
    for setting, (needed, available, what) in needs.items():
        if needed > available:
            raise ValueError(
                f"the plan needs {needed} {what}, this server has room for {available}: start it with the setting "
                f'"{setting}": {needed}'
            )


def block_key(rows: Tensor) -> bytes:
    """What tells blocks of bank rows apart: equal ones are held once."""
    return len(rows).to_bytes(4, "little") + rows.detach().to("cpu", torch.float32).contiguous().numpy().tobytes()


def make_program(
    settings: Settings, n_layers: int, hidden_size: int, slots: int, device: torch.device | str
) -> Program:
    """A program with room for `slots` plans of any kind that `check_fits` lets through."""
    room = Room.of(settings, n_layers)
    capacity = Capacity(slots=slots, vectors=slots * room.vectors, entries=room.entries)
    return Program(n_layers, hidden_size, capacity, device)
