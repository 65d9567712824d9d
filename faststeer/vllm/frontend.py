"""What a server makes of the plan that a request names or holds: it is read, checked and made self-contained. This is
the only place where names and files are looked up; engine and workers get values.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from typing import Any

from faststeer.compile import Entry
from faststeer.vllm.dose import check_dose
from faststeer.vllm.registry import Registry, Stamp
from faststeer.vllm.requests import Limits, parse
from faststeer.vllm.settings import ServerSettings
from faststeer.vllm.switch import NONE, SWITCH
from faststeer.vllm.tables import check_fits

CACHED_PLANS, CACHED_BYTES = 1024, 2**26


class FrontEnd:
    """The plans of one server, or of one `LLM`.

    Args:
        settings: of the server.
        n_layers, hidden_size: of the model.

    Raises:
        ValueError: the folder has a file for the default plan, and it does not fit the model.
    """

    def __init__(self, settings: ServerSettings, n_layers: int, hidden_size: int) -> None:
        self.settings = settings
        self.registry = Registry(settings.folder, settings.max_vector_bytes, settings.max_registered_bytes)
        self.limits = Limits(
            n_layers,
            hidden_size,
            settings.max_plan_bytes,
            settings.max_interventions,
            settings.max_directions,
            self._check,
        )
        self.norms: dict[int, float] | None = None  # of the residual stream, by layer; None: not measured
        self._lock = threading.Lock()
        self._read: OrderedDict[str, tuple[int, tuple[Stamp, ...], dict[str, Any] | None]] = OrderedDict()
        self._read_bytes = 0
        if settings.default_plan in self.registry.plans():
            self._fresh(settings.default_plan)

    @property
    def waits_for_norms(self) -> bool:
        """Whether plans cannot be checked before the workers have told their norms."""
        return self.settings.max_dose is not None and self.norms is None

    def learn(self, measured: Iterable[Sequence[tuple[int, float]]]) -> None:
        """Take the norms that workers measured, each for its own layers.

        Raises:
            ValueError: the default plan is stronger than the server allows.
        """
        self.norms = {int(number): float(norm) for pairs in measured for number, norm in pairs}
        if self.settings.default_plan in self.registry.plans():
            self.wire(self.settings.default_plan)

    def _check(self, entries: list[Entry]) -> None:
        check_fits(entries, self.settings, self.limits.n_layers)
        if self.settings.max_dose is not None and self.norms is not None:
            check_dose(entries, self.norms, self.limits.n_layers, self.settings.max_dose)

    @classmethod
    def of(cls, vllm_config: Any) -> FrontEnd | None:
        """None where faststeer is off."""
        settings = ServerSettings.of(vllm_config)
        if settings is None:
            return None
        config = vllm_config.model_config.hf_text_config
        return cls(settings, config.num_hidden_layers, config.hidden_size)

    def wire(self, payload: Any) -> dict[str, Any] | None:
        """What a request carries to the engine instead of its payload; None: it is not steered.

        Raises:
            ValueError: see `requests.parse`.
            RuntimeError: the workers have not told their norms yet.
        """
        if payload is None:
            payload = NONE if self.settings.default_plan is None else self.settings.default_plan
        if self.waits_for_norms and payload != NONE:
            raise RuntimeError(
                "a plan is read before the workers have told the norms that max_dose is measured by: send requests "
                "through vLLM's LLM, LLMEngine or AsyncLLM"
            )
        if not isinstance(payload, str) or payload == NONE:
            return self._fresh(payload)[0]
        with self._lock:
            if (known := self._read.get(payload)) is not None:
                version, files, wire = known
                if version == self.registry.version and all(stamp.holds() for stamp in files):
                    self._read.move_to_end(payload)
                    return wire
        version = self.registry.version  # before, so that what changes meanwhile is read again
        wire, files = self._fresh(payload)
        self._keep(payload, version, files, wire)
        return wire

    def _fresh(self, payload: Any) -> tuple[dict[str, Any] | None, tuple[Stamp, ...]]:
        parsed = parse(payload, self.registry, self.limits)
        room = self.settings.max_plans if self.settings.when_full == "refuse" else None
        return (parsed.wire(room or 0), parsed.files) if parsed else (None, ())

    def _keep(self, payload: str, version: int, files: tuple[Stamp, ...], wire: dict[str, Any] | None) -> None:
        with self._lock:
            self._forget(payload)
            self._read[payload] = (version, files, wire)
            self._read_bytes += _size(payload, wire)
            while len(self._read) > CACHED_PLANS or self._read_bytes > CACHED_BYTES:
                self._forget(next(iter(self._read)))

    def _forget(self, payload: str) -> None:
        if payload in self._read:
            self._read_bytes -= _size(payload, self._read.pop(payload)[2])

    def register_plan(self, name: str, payload: Any) -> None:
        """Register a plan as a request would give it, checked against the model (ValueError)."""
        parsed = parse(payload, self.registry, self.limits)
        if parsed is None:
            raise ValueError("the plan does nothing: a request that is not to be steered says 'none'")
        self.registry.register_plan(name, parsed.plan)

    def register_vector(self, name: str, vector: Any) -> None:
        """Register a vector, checked against the model (ValueError)."""
        if (size := getattr(vector, "hidden_size", self.limits.hidden_size)) != self.limits.hidden_size:
            raise ValueError(f"the vector has hidden size {size}, the model has {self.limits.hidden_size}")
        self.registry.register_vector(name, vector)

    def about(self) -> dict[str, Any]:
        """What a client may want to know of the server."""
        return {
            "vectors": self.registry.vectors(),
            "plans": self.registry.plans(),
            "default_plan": self.settings.default_plan,
            "registration": self.settings.http_registration,
            "hook_points": list(self.settings.hook_points),
            "n_layers": self.limits.n_layers,
            "hidden_size": self.limits.hidden_size,
            "max_dose": self.settings.max_dose,
            "norms": self.norms,
        }


def _size(payload: str, wire: dict[str, Any] | None) -> int:
    return len(payload) + len(wire["plan"] if wire else "")


def front_end(engine: Any) -> FrontEnd:
    """The front end of an `LLM`, an `LLMEngine` or an `AsyncLLM`: to register vectors and plans from Python.

    Raises:
        RuntimeError: faststeer is off in it.
    """
    engine = getattr(engine, "llm_engine", engine)
    front = getattr(getattr(engine, "input_processor", None), "faststeer", None)
    if front is None:
        raise RuntimeError(f"faststeer is off in this engine: set {SWITCH}=1 before vLLM is imported")
    return front
