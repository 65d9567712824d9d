"""Multi-token activation patching: which edges of a model carry what steering does."""

from faststeer.observe.patching.examples import Example, examples, with_positions
from faststeer.observe.patching.graph import Graph
from faststeer.observe.patching.memory import patch_bytes
from faststeer.observe.patching.metrics import Metric, MetricName
from faststeer.observe.patching.network import Network
from faststeer.observe.patching.scores import Scores, patch

__all__ = [
    "Example",
    "Graph",
    "Metric",
    "MetricName",
    "Network",
    "Scores",
    "examples",
    "patch",
    "patch_bytes",
    "with_positions",
]
