"""Circuits: the few edges that carry what steering does; how faithful a circuit is when everything outside it behaves
as if unsteered, and how alike two of them are."""

from __future__ import annotations

import io
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from faststeer.extras import needed_for
from faststeer.files import write_atomically
from faststeer.hf.anatomy import find_hook_points
from faststeer.observe.memory import rows_in_batches
from faststeer.observe.patching.examples import Example, steered_layer
from faststeer.observe.patching.graph import Graph, Kind
from faststeer.observe.patching.metrics import Metric, MetricName, check_finite, check_metric
from faststeer.observe.patching.network import Network
from faststeer.observe.patching.scores import Scores, begin

if TYPE_CHECKING:
    import networkx as nx
    from matplotlib.figure import Figure

COLOURS: dict[Kind, str] = {
    "q": "tab:blue",
    "k": "tab:cyan",
    "v": "tab:orange",
    "mlp": "tab:green",
    "logits": "tab:gray",
}


@dataclass(frozen=True, eq=False)
class Circuit:
    """Some edges of a graph.

    Args:
        graph: whose.
        edges: `[senders, receivers]` bool.

    Raises:
        ValueError: another shape or dtype, edges that the graph does not have.
    """

    graph: Graph
    edges: Tensor

    def __post_init__(self) -> None:
        shape = self.graph.n_senders, self.graph.n_receivers
        if self.edges.dtype != torch.bool or tuple(self.edges.shape) != shape:
            raise ValueError(
                f"edges are {self.edges.dtype} {list(self.edges.shape)}: expected torch.bool "
                f"[senders, receivers] {list(shape)}"
            )
        if bool((self.edges & ~self.graph.edges).any()):
            s, r = torch.nonzero(self.edges & ~self.graph.edges)[0].tolist()
            raise ValueError(f"the graph has no edge {self.graph.senders[s]} -> {self.graph.receivers[r]}")

    @classmethod
    def full(cls, graph: Graph) -> Circuit:
        """The circuit of all edges."""
        return cls(graph, graph.edges.clone())

    @classmethod
    def empty(cls, graph: Graph) -> Circuit:
        """The circuit without edges."""
        return cls(graph, torch.zeros_like(graph.edges))

    def __len__(self) -> int:
        return int(self.edges.sum())

    def complement(self) -> Circuit:
        """All edges outside it."""
        return Circuit(self.graph, self.graph.edges & ~self.edges)

    def pruned(self) -> Circuit:
        """Those of its edges that lie on a path, within it, from what steering adds to the logits. An edge to a key or
        value goes on through every head that shares it."""
        reached, useful = _reached(self.graph, self.edges), _useful(self.graph, self.edges)
        return Circuit(self.graph, self.edges & reached.unsqueeze(1) & useful)

    def list(self) -> list[tuple[str, str]]:
        """(sender, receiver) of every edge, in the order of the graph."""
        g = self.graph
        return [(g.senders[s], g.receivers[r]) for s, r in torch.nonzero(self.edges).tolist()]

    def to_networkx(self, scores: Scores | None = None) -> nx.MultiDiGraph:
        """The circuit between parts of the model: nodes "steering", "L12.H3", "L12.MLP" and "logits" (attributes
        `layer` and `kind`: "steering", "head", "mlp", "logits"), edges with the key "q", "k", "v", "mlp" or "logits",
        and attributes `receiver` and, with scores, `score`. An edge to a shared key or value ends at each head that
        uses it and goes on (at all that use it where none goes on), so that distinct (source, `receiver`) are the
        circuit's edges.
        """
        import networkx as nx

        made = nx.MultiDiGraph()
        for s, r in torch.nonzero(self.edges).tolist():
            kind, receiver = self.graph.kind(r), self.graph.receivers[r]
            targets = torch.nonzero(self.graph.passes_on[r]).flatten().tolist()
            going_on = [t for t in targets if bool(self.edges[t].any())]
            names = [self.graph.senders[t] for t in going_on or targets] or ["logits"]
            for name in (self.graph.senders[s], *names):
                made.add_node(name, **_attributes(self.graph, name))
            more = {} if scores is None else {"score": float(scores.edges[s, r])}
            for name in names:
                made.add_edge(self.graph.senders[s], name, key=kind, receiver=receiver, **more)
        return made

    def plot(self, path: str | os.PathLike[str] | None = None, scores: Scores | None = None) -> Figure:
        """Draw it: layers from bottom to top, in each its heads and, at the right, its MLP; edges coloured by what they
        enter, with scores the stronger the larger abs(score). With `path` (.png, .svg, .pdf) it is written too."""
        figure = _draw(self, scores)
        if path is not None:
            kind = Path(path).suffix.lstrip(".").lower() or "png"
            buffer = io.BytesIO()
            figure.savefig(buffer, format=kind, dpi=150, bbox_inches="tight")
            write_atomically(path, buffer.getvalue())
        return figure


def _reached(graph: Graph, edges: Tensor) -> Tensor:
    """`[senders]` bool: to which senders a path leads from what steering adds."""
    reached = torch.zeros(graph.n_senders, dtype=torch.bool)
    reached[0] = True
    for i in range(graph.depth):
        readers, heads = graph.readers(i), graph.heads_of(i)
        active = (edges[:, readers] & reached.unsqueeze(1)).any(0)
        reached[heads] = (graph.passes_on[readers, heads] & active.unsqueeze(1)).any(0)
        reached[graph.mlp_of(i)] = (edges[:, graph.mlp_reader(i)] & reached).any()
    return reached


def _useful(graph: Graph, edges: Tensor) -> Tensor:
    """`[receivers]` bool: from which receivers a path leads to the logits."""
    useful = torch.zeros(graph.n_receivers, dtype=torch.bool)
    useful[-1] = True
    for i in reversed(range(graph.depth)):
        useful[graph.mlp_reader(i)] = (edges[graph.mlp_of(i)] & useful).any()
        readers, heads = graph.readers(i), graph.heads_of(i)
        of_heads = (edges[heads] & useful).any(1)
        useful[readers] = (graph.passes_on[readers, heads] & of_heads).any(1)
    return useful


# Choosing -------------------------------------------------------------------------------------------------------------


def select(scores: Scores, n_edges: int | float) -> Circuit:
    """The circuit of at most n edges that scores choose: the top edges by abs(score), as many as leave at most n when
    those on no path from the steering to the logits are pruned. Source: arXiv 2604.08524.

    Args:
        n_edges: a number of edges, or a float in 0..1: a share of the graph's.

    Raises:
        ValueError: a number below 0 or above the graph's edges.
    """
    return _select(scores.graph, scores.edges.abs(), n_edges)


def random_circuit(graph: Graph, n_edges: int | float, seed: int = 0) -> Circuit:
    """A control: edges drawn at random, then pruned as `select` does, of at most n edges.

    Raises:
        ValueError: as `select`.
    """
    numbers = np.random.default_rng(seed).random((graph.n_senders, graph.n_receivers))
    return _select(graph, torch.from_numpy(numbers), n_edges)


def _select(graph: Graph, strength: Tensor, n_edges: int | float) -> Circuit:
    n = _number(graph, n_edges)
    order = strength.masked_fill(~graph.edges, -1).flatten().sort(descending=True, stable=True).indices

    def of_top(k: int) -> Circuit:
        edges = torch.zeros(graph.n_senders * graph.n_receivers, dtype=torch.bool)
        edges[order[:k]] = True
        return Circuit(graph, edges.view(graph.n_senders, graph.n_receivers)).pruned()

    # What is left grows with k, so the largest k that leaves at most n is found by halving.
    low, high = 0, graph.n_edges
    while low < high:
        middle = (low + high + 1) // 2
        if len(of_top(middle)) <= n:
            low = middle
        else:
            high = middle - 1
    return of_top(low)


def _number(graph: Graph, n_edges: int | float) -> int:
    total = graph.n_edges
    n = round(n_edges * total) if isinstance(n_edges, float) and 0 <= n_edges <= 1 else n_edges
    if isinstance(n, float) or not 0 <= n <= total:
        raise ValueError(f"{n_edges} edges: expected a whole number from 0 to {total}, or a share (a float in 0..1)")
    return n


@dataclass(frozen=True)
class Overlap:
    """How alike two circuits are.

    Attributes:
        shared: edges in both. sizes: edges of each.
        fraction: shared / the smaller size. iou: shared / edges in either. Both nan for empty circuits.
    """

    shared: int
    sizes: tuple[int, int]

    @property
    def fraction(self) -> float:
        """Shared edges as a share of the smaller circuit; NaN where it is empty."""
        return self.shared / min(self.sizes) if min(self.sizes) else float("nan")

    @property
    def iou(self) -> float:
        """Shared edges over those in either circuit (intersection over union); NaN where both are empty."""
        either = sum(self.sizes) - self.shared
        return self.shared / either if either else float("nan")


def overlap(a: Circuit, b: Circuit) -> Overlap:
    """Compare two circuits of one graph; a fair comparison is at equal size (`select` both with the same number).

    Raises:
        ValueError: circuits of different graphs.
    """
    if a.graph != b.graph:
        raise ValueError(f"circuits of different graphs: {a.graph} and {b.graph}")
    return Overlap(int((a.edges & b.edges).sum()), (len(a), len(b)))


# Faithfulness ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Faithfulness:
    """What circuits reach of what the whole steered model does. Sums over an example's kept positions, fp64.

    Attributes:
        circuits: `[circuits, examples]`: the metric where only the circuit's edges are steered.
        steered, base: `[examples]`: of the steered and the unsteered model.
        n_positions: `[examples]`.
    """

    circuits: Tensor
    steered: Tensor
    base: Tensor
    n_positions: Tensor

    @cached_property
    def values(self) -> Tensor:
        """`[circuits]`: (m(C) - m(base)) / (m(steered) - m(base)), m pooled over positions."""
        return self._of(torch.ones_like(self.base))

    def interval(self, level: float = 0.95, samples: int = 1000, seed: int = 0) -> Tensor:
        """`[circuits, 2]`: bootstrap interval of `values`, examples drawn with replacement."""
        n = len(self.base)
        drawn = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=samples)
        values = torch.stack([self._of(torch.from_numpy(times).double()) for times in drawn])
        tail = (1 - level) / 2
        return torch.quantile(values, torch.tensor([tail, 1 - tail], dtype=values.dtype), dim=0).T

    def _of(self, weight: Tensor) -> Tensor:
        return ((self.circuits - self.base) @ weight) / ((self.steered - self.base) @ weight)


def faithfulness(
    model: nn.Module,
    examples: Sequence[Example],
    circuits: Iterable[Circuit],
    *,
    metric: MetricName = "logit_difference",
    batch_size: int = 8,
    progress: bool = False,
) -> Faithfulness:
    """Run the model with only some edges steered. Every receiver reads the unsteered stream plus, over those of its
    edges that the circuit has, what the sender writes now less what it writes unsteered; all parts compute anew from
    what they read, layer by layer. The full circuit is the steered model (1), the empty one the unsteered (0).

    Completeness is the same of `complement()`: near 0 where nothing that matters is outside the circuit.

    A row of a batch is an example under a circuit, so that many circuits share a pass.

    Args:
        examples: as in `patch`. circuits: of the same graph.
        metric: as in `patch`.
        batch_size: rows per pass; halved, with a warning, where they do not fit into memory.

    Raises:
        ValueError: as `patch`; circuits of another graph; steering that does not change the metric.
    """
    check_metric(metric)
    chosen = list(circuits)
    network = Network(model, steered_layer(examples, find_hook_points(model)))
    for number, circuit in enumerate(chosen):
        if circuit.graph != network.graph:
            raise ValueError(f"circuits[{number}] is of {circuit.graph}, the model and its steering of {network.graph}")
    lengths = [len(example) for example in examples]
    # All circuits of an example after each other: a pass mixes circuits, and rows of similar length.
    pairs = [(e, c) for e in range(len(examples)) for c in range(len(chosen))]

    def whole(group: list[int]) -> Tensor:
        return _whole(network, [examples[index] for index in group], metric)

    def partial(group: list[int]) -> Tensor:
        here = [pairs[index] for index in group]
        return _partial(network, [examples[e] for e, _ in here], [chosen[c] for _, c in here], metric)

    with network:
        ends = torch.stack(rows_in_batches(lengths, batch_size, whole, "Steered and base", progress), dim=1)
        check_finite(ends)
        sums = rows_in_batches([lengths[e] for e, _ in pairs], batch_size, partial, "Circuits", progress)
    if ends[0].sum() == ends[1].sum():
        raise ValueError("the metric is the same steered and unsteered: there is nothing to be faithful to")
    n_positions = torch.tensor([len(example.kept) for example in examples], dtype=torch.float64)
    metrics = torch.tensor([float(each) for each in sums], dtype=torch.float64).view(len(examples), len(chosen))
    return Faithfulness(metrics.T.contiguous(), ends[0], ends[1], n_positions)


@torch.no_grad()
def _whole(network: Network, group: Sequence[Example], name: MetricName) -> Tensor:
    """`[examples, 2]`: the metric steered and unsteered."""
    base, stream = begin(network, group)
    steered_end, base_end = _end(network, stream), base[-1].left
    metric = Metric(name, network.lens, group, base_end, steered_end)
    return torch.stack([metric.of(steered_end), metric.of(base_end)], dim=1)


@torch.no_grad()
def _partial(network: Network, group: Sequence[Example], circuits: Sequence[Circuit], name: MetricName) -> Tensor:
    """`[rows]`: the metric of each example under its circuit."""
    graph = network.graph
    base, stream = begin(network, group)
    base_end, steered_end = base[-1].left, _end(network, stream) if name == "directed_kl" else None
    metric = Metric(name, network.lens, group, base_end, steered_end)
    rows, *shape = stream.shape
    edges = torch.stack([circuit.edges for circuit in circuits]).to(stream.device)
    moved = stream.new_zeros(rows, graph.n_senders, *shape)  # what each sender writes, less what it writes unsteered
    moved[:, 0] = stream - base[0].stream

    def reads(upto: int, receivers: slice) -> Tensor:
        """What reaches receivers `[rows, receivers, tokens, hidden]` of the first senders."""
        mask = edges[:, :upto, receivers].transpose(1, 2).to(moved.dtype)
        return torch.bmm(mask, moved[:, :upto].flatten(2)).unflatten(2, shape)

    for i in range(graph.depth):
        unsteered = network.writes(i, base[i])

        def stream_of_mlp(written: Tensor | None, i: int = i, unsteered: Tensor = unsteered) -> Tensor:
            if written is not None:
                moved[:, graph.heads_of(i)] = written - unsteered
            reader = graph.mlp_reader(i)
            return base[i].middle + reads(graph.before_mlp(i), slice(reader, reader + 1))[:, 0]

        attention = base[i].stream.unsqueeze(1) + reads(graph.before(i), graph.readers(i))
        partial = network.run_reading(i, base[i], attention, stream_of_mlp)
        if graph.parallel:
            moved[:, graph.heads_of(i)] = network.writes(i, partial) - unsteered
        moved[:, graph.mlp_of(i)] = partial.mlp_out - base[i].mlp_out
    last = slice(graph.n_receivers - 1, graph.n_receivers)
    return metric.of(base_end + reads(graph.n_senders, last)[:, 0])


def _end(network: Network, stream: Tensor) -> Tensor:
    """The stream that the last layer leaves."""
    for layer_pass in network.run(stream):
        stream = layer_pass.left
    return stream


# Drawing --------------------------------------------------------------------------------------------------------------


def _attributes(graph: Graph, name: str) -> dict[str, Any]:
    if name == "steering":
        return {"kind": "steering", "layer": graph.start}
    if name == "logits":
        return {"kind": "logits", "layer": graph.n_layers}
    layer, part = name[1:].split(".")
    return {"kind": "mlp" if part == "MLP" else "head", "layer": int(layer)}


def _place(graph: Graph, name: str, kind: str, layer: int) -> tuple[float, float]:
    if kind == "head":
        return int(name.partition(".H")[2]), layer
    # An MLP reads its own layer's heads, so it stands a little above them.
    return (graph.heads, layer + 0.35) if kind == "mlp" else (graph.heads / 2, layer - (kind == "steering"))


def _draw(circuit: Circuit, scores: Scores | None) -> Figure:
    with needed_for("a picture", "report"):
        from matplotlib.figure import Figure

    graph, network = circuit.graph, circuit.to_networkx(scores)
    for name in ("steering", "logits"):
        network.add_node(name, **_attributes(graph, name))
    place = {name: _place(graph, name, **attributes) for name, attributes in network.nodes(data=True)}
    figure = Figure(figsize=(min(4 + 0.45 * graph.heads, 16), min(2.5 + 0.6 * graph.depth, 16)))
    axes = figure.add_subplot()
    edges = list(network.edges(keys=True, data=True))
    largest = max((abs(data.get("score", 0.0)) for *_, data in edges), default=0.0)
    for kind, colour in COLOURS.items():
        own = [(u, v, data) for u, v, key, data in edges if key == kind]
        # Few edges may be dark; of thousands, only together.
        alpha = [_alpha(data.get("score"), largest, len(edges)) for *_, data in own]
        for (u, v, _), shade in zip(own, alpha, strict=True):
            axes.plot(*zip(place[u], place[v], strict=True), color=colour, alpha=shade, linewidth=1, zorder=1)
        if own:
            axes.plot([], [], color=colour, label=f"{kind}: {len({(u, d['receiver']) for u, _, d in own})}")
    colours = {"steering": "tab:red", "head": "white", "mlp": "tab:green", "logits": "tab:gray"}
    for name, (x, y) in place.items():
        axes.scatter(x, y, s=60, color=colours[network.nodes[name]["kind"]], edgecolors="black", zorder=2)
        if name in ("steering", "logits"):
            axes.annotate(name, (x, y), xytext=(7, 0), textcoords="offset points", va="center")
    axes.set_xticks([*range(graph.heads), graph.heads], [*(f"H{head}" for head in range(graph.heads)), "MLP"])
    axes.set_yticks(range(graph.start, graph.n_layers))
    axes.set_ylabel("layer")
    axes.set_title(f"{len(circuit)} of {graph.n_edges} edges")
    if edges:
        axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), title="edges into", frameon=False)
    return figure


def _alpha(score: float | None, largest: float, n_edges: int) -> float:
    base = min(1.0, 60 / max(n_edges, 1) + 0.05)
    return base if score is None or not largest else max(0.02, base * abs(score) / largest) ** 0.5
