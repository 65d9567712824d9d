"""What a server was started with: whether faststeer is on in it, and its limits. Checked once, when the server starts;
this module imports no vLLM."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, fields
from math import inf
from pathlib import Path
from typing import Any

from faststeer.files import read_json
from faststeer.vector import HOOK_POINTS, check_hook_point
from faststeer.vllm.switch import OFF, ON, SWITCH, configured, environment

WHEN_FULL = ("wait", "refuse")


@dataclass(frozen=True)
class ServerSettings:
    """How faststeer runs in a vLLM server.

    Args:
        folder: where requests may name files, and where names that are not registered are looked for; None: no files.
        default_plan: name of the plan of requests that say nothing; it lies in the folder, or is registered before the
            first request.
        http_registration: whether vectors and plans may be registered and removed over HTTP.
        max_plan_bytes: of a request's JSON, inline vectors included.
        max_vector_bytes: of a file, and of what is registered under one name.
        max_registered_bytes: of everything registered.
        max_interventions: of a plan.
        max_directions: of one subspace.
        hook_points: those that the model is built with: fewer cost less. "all": all five.
        max_plans: different plans at one time; None: as many as sequences, so that there is always room.
        when_full: what becomes of a request whose plan would be one more than `max_plans`: "wait" until there is room,
            or "refuse" it.
        max_entries: of a plan: its interventions, counted once per hook point and layer; None: four per hook point and
            layer.
        max_vectors: of a plan, counted like entries, k for a subspace of k; None: two per layer and 8 more.
        probe_columns: most values that a plan may watch at one hook point; 0: none.
        latched_gates: most latched gates of a plan; 0: none.
        max_projection_bytes: of what probes saw that a worker keeps in the host's memory for who asks; the oldest
            request's is forgotten first.
        max_dose: the largest |c v| / |h| of a plan at one hook point (see `dose`); None: no limit.

    Raises:
        ValueError: a value of another kind or out of range.
    """

    folder: Path | None = None
    default_plan: str | None = None
    http_registration: bool = False
    max_plan_bytes: int = 2**22
    max_vector_bytes: int = 2**26
    max_registered_bytes: int = 2**30
    max_interventions: int = 32
    max_directions: int = 16
    hook_points: tuple[str, ...] = ("resid_pre", "resid_post")
    max_plans: int | None = None
    when_full: str = "wait"
    max_entries: int | None = None
    max_vectors: int | None = None
    probe_columns: int = 4
    latched_gates: int = 0
    max_projection_bytes: int = 2**28
    max_dose: float | None = 64.0

    def __post_init__(self) -> None:
        for name, low in _WHOLE.items():
            value = getattr(self, name)
            if value is None and name in _OPTIONAL:
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < low:
                raise ValueError(f"faststeer's setting {name} is {value!r}: expected a whole number from {low}")
        dose = self.max_dose
        if dose is not None and (isinstance(dose, bool) or not isinstance(dose, int | float) or not 0 < dose < inf):
            raise ValueError(
                f"faststeer's setting max_dose is {dose!r}: expected a number above 0, or null for no limit"
            )
        if not isinstance(self.http_registration, bool):
            raise ValueError(f"faststeer's setting http_registration is {self.http_registration!r}: true or false")
        if self.default_plan is not None and not isinstance(self.default_plan, str):
            raise ValueError(f"faststeer's setting default_plan is {self.default_plan!r}: expected a plan's name")
        if self.when_full not in WHEN_FULL:
            raise ValueError(f"faststeer's setting when_full is {self.when_full!r}: expected {' or '.join(WHEN_FULL)}")
        if self.when_full == "refuse" and self.max_plans is None:
            raise ValueError("faststeer's setting when_full is refuse, and no max_plans says what is full: set it, too")
        object.__setattr__(self, "hook_points", _points(self.hook_points))
        if self.folder is not None:
            if not isinstance(self.folder, str | os.PathLike) or not Path(self.folder).is_dir():
                raise ValueError(f"faststeer's setting folder is {self.folder!r}: there is no such folder")
            object.__setattr__(self, "folder", Path(self.folder).resolve())

    @classmethod
    def of(cls, vllm_config: Any) -> ServerSettings | None:
        """The settings of a server: `additional_config["faststeer"]` (true, false or an object), or else the
        environment's FASTSTEER_VLLM (1, 0 or a JSON object). None: faststeer is off.

        Raises:
            ValueError: settings that are wrong.
        """
        speaks, said = configured(vllm_config)
        if speaks:
            return cls.read(said)
        text = environment()
        if text.lower() in (*OFF, *ON):
            return cls() if text.lower() in ON else None
        try:
            data = read_json(text)
        except ValueError as error:
            raise ValueError(
                f"{SWITCH} is {text[:200]!r}: expected 1, 0, or a JSON object of settings ({error})"
            ) from error
        return cls.read(data)

    @classmethod
    def read(cls, value: Any) -> ServerSettings | None:
        """Settings as plain data: true, false, or an object of fields."""
        if isinstance(value, bool):
            return cls() if value else None
        if not isinstance(value, Mapping):
            raise ValueError(f"faststeer's settings are {value!r}: expected true, false, or an object")
        known = [f.name for f in fields(cls)]
        if unknown := [name for name in value if name not in known]:
            raise ValueError(f"faststeer has no setting {unknown[0]!r}: it has {', '.join(known)}")
        return cls(**value)


_OPTIONAL = ("max_plans", "max_entries", "max_vectors")
_WHOLE = {
    "max_plan_bytes": 1, "max_vector_bytes": 1, "max_registered_bytes": 0, "max_interventions": 1, "max_directions": 1,
    "max_plans": 1, "max_entries": 1, "max_vectors": 1, "probe_columns": 0, "latched_gates": 0,
    "max_projection_bytes": 0,
}  # fmt: skip


def _points(value: Any) -> tuple[str, ...]:
    if value == "all":
        return HOOK_POINTS
    if isinstance(value, str) or not isinstance(value, tuple | list) or not value:
        raise ValueError(f"faststeer's setting hook_points is {value!r}: expected a list of hook points, or 'all'")
    try:
        return tuple(point for point in HOOK_POINTS if point in [check_hook_point(one) for one in value])
    except ValueError as error:
        raise ValueError(f"faststeer's setting hook_points: {error}") from error
