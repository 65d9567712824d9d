"""faststeer: activation steering for language models at full speed.

    SteeringVector -> Intervention -> Plan -> steer(model, plan)

A vector says what was found in a model, an intervention what to do with it, where and when, a plan puts interventions
in order, `steer` applies a plan, or one per row of the batch, to a whole Hugging Face model; `hook` is the drop-in for
one hand-written forward hook. docs/design.md has the semantics.
"""

from faststeer import algebra, behaviours, demo, evaluate, extract, formats, hf, observe
from faststeer.engine import Completion, Engine
from faststeer.hf import HookPoints, Steering, hook, steer
from faststeer.intervention import Ablate, Add, Clamp, Gate, Intervention, Probe, Project, Rotate
from faststeer.ops import backend
from faststeer.plan import Plan
from faststeer.program import Capacity, Program
from faststeer.vector import SteeringVector, VectorFileError

__version__ = "0.1.0"

__all__ = [
    "Ablate",
    "Add",
    "Capacity",
    "Clamp",
    "Completion",
    "Engine",
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
    "VectorFileError",
    "algebra",
    "backend",
    "behaviours",
    "demo",
    "evaluate",
    "extract",
    "formats",
    "hf",
    "hook",
    "observe",
    "steer",
]
