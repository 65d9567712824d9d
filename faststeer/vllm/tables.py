"""How large a server's tables are, and whether a plan has room in them. Decided once, from the model and the settings:
the tables stand before the model is compiled and captured. This module imports no vLLM."""

from __future__ import annotations

import torch

from faststeer.compile import Entry, Need
from faststeer.plan import n_sites, site, site_name
from faststeer.program import Capacity, Program
from faststeer.vllm.settings import ServerSettings


def room_of(settings: ServerSettings, n_layers: int) -> Need:
    """What one plan may take."""
    vectors, entries = settings.max_vectors or 2 * n_layers + 8, settings.max_entries or 4 * n_sites(n_layers)
    return Need(1, vectors, entries, settings.probe_columns, settings.latched_gates)


def sites_of(settings: ServerSettings, n_layers: int) -> list[int]:
    """The sites that the model is built with, ascending."""
    return sorted({site(at, layer) for at in settings.hook_points for layer in range(n_layers)})  # type: ignore[arg-type]


def check_fits(entries: list[Entry], settings: ServerSettings, n_layers: int) -> None:
    """Raise ValueError unless a server's tables have room for a plan of these entries, whatever else they hold."""
    sites, need, room = set(sites_of(settings, n_layers)), Need.of([entries]), room_of(settings, n_layers)
    for entry in entries:
        if entry.site not in sites:
            at, layer = site_name(entry.site, n_layers)
            raise ValueError(
                f"the plan acts at {at} of layer {layer}: this server is built with {', '.join(settings.hook_points)} "
                'alone; start it with the setting "hook_points": "all"'
            )
    for setting, needed, available, what in (
        ("max_entries", need.entries, room.entries, "entries (interventions, once per hook point and layer)"),
        ("max_vectors", need.vectors, room.vectors, "vectors"),
        ("probe_columns", need.probe_columns, room.probe_columns, "probed values at one hook point"),
        ("latched_gates", need.latched_gates, room.latched_gates, "latched gates"),
    ):
        if needed > available:
            raise ValueError(
                f"the plan needs {needed} {what}, this server has room for {available}: start it with the setting "
                f'"{setting}": {needed}'
            )


def make_program(
    settings: ServerSettings, n_layers: int, hidden_size: int, slots: int, device: torch.device | str
) -> Program:
    """A program with room for `slots` plans of any kind that `check_fits` lets through."""
    room = room_of(settings, n_layers)
    return Program(n_layers, hidden_size, Capacity(slots, slots * room.vectors, room.entries), device)
