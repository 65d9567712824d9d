"""faststeer: activation steering for language models at full speed.

    SteeringVector -> Intervention -> Plan -> steer(model, plan)

A vector says what was found in a model, an intervention what to do with it, where and when, a plan puts interventions
in order, `steer` applies a plan, or one per row of the batch, to a whole Hugging Face model; `hook` is the drop-in for
one hand-written forward hook. docs/design.md has the semantics.

Names are imported when they are first used: vLLM imports this package in each of its processes, steered or not.
"""

import importlib
import importlib.util
from typing import TYPE_CHECKING

from faststeer.file_kinds import READERS
from faststeer.version import __version__

if TYPE_CHECKING:
    from faststeer import algebra, behaviours, demo, evaluate, extract, folding, formats, hf, observe, sparse
    from faststeer.engine import Completion, Engine
    from faststeer.files import FormatError
    from faststeer.hf import HookPoints, Steering, hook, load, steer
    from faststeer.intervention import Ablate, Add, Clamp, Gate, Intervention, Probe, Project, Rotate
    from faststeer.ops import backend
    from faststeer.plan import Plan
    from faststeer.program import Capacity, Program
    from faststeer.vector import SteeringVector

__all__ = [
    "Ablate",
    "Add",
    "Capacity",
    "Clamp",
    "Completion",
    "Engine",
    "FormatError",
    "Gate",
    "HookPoints",
    "Intervention",
    "Plan",
    "Probe",
    "Program",
    "Project",
    "Rotate",
    "Steering",
    "SteeringVector",
    "__version__",
    "algebra",
    "backend",
    "behaviours",
    "demo",
    "evaluate",
    "extract",
    "folding",
    "formats",
    "hf",
    "hook",
    "load",
    "observe",
    "sparse",
    "steer",
]

_MODULES = {
    "engine": ("Completion", "Engine"),
    "files": ("FormatError",),
    "hf": ("HookPoints", "Steering", "hook", "load", "steer"),
    "intervention": ("Ablate", "Add", "Clamp", "Gate", "Intervention", "Probe", "Project", "Rotate"),
    "ops": ("backend",),
    "plan": ("Plan",),
    "program": ("Capacity", "Program"),
    "vector": ("SteeringVector",),
}
_MODULE_OF = {name: module for module, names in _MODULES.items() for name in names}

if not TYPE_CHECKING:

    def __getattr__(name: str) -> object:
        if (module := _MODULE_OF.get(name)) is not None:
            value = globals()[name] = getattr(importlib.import_module(f"{__name__}.{module}"), name)
            return value
        if not name.startswith("_") and importlib.util.find_spec(f"{__name__}.{name}") is not None:
            return importlib.import_module(f"{__name__}.{name}")
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


READERS["vector"] = lambda path, **said: importlib.import_module(f"{__name__}.formats").load(path, **said)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
