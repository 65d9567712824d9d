"""Multi-token activation patching: how much of what steering does to the next tokens passes each edge, node and
dimension, by integrated gradients along the steering coefficient."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from faststeer.hf.anatomy import find_hook_points
from faststeer.hf.batching import pad_rows
from faststeer.hf.norms import wide
from faststeer.observe.memory import in_batches
from faststeer.observe.patching.examples import Example, added, steered_layer
from faststeer.observe.patching.graph import Graph
from faststeer.observe.patching.metrics import Metric, MetricName, check_finite, check_metric
from faststeer.observe.patching.network import LayerPass, Network
from faststeer.tensor_files import TensorFile, TensorRecord

TENSORS = ("edges", "nodes", "dimensions")


@dataclass(frozen=True, eq=False)
class Scores(TensorRecord):
    """Indirect effects on a metric m, fp64 on the CPU, in its units per kept position; m rises from base to steered.

    Attributes:
        graph: senders and receivers.
        edges: `[senders, receivers]`; 0 where there is no edge.
        nodes: `[senders]`. A node's score is the sum of its edges' scores.
        dimensions: `[hidden]`: the effect of each coordinate of what steering adds; their sum is `nodes[0]`.
        steered, base: m of the two models.
        n_positions: kept positions that the means are over.
        metric, steps: as given.
    """

    FORMAT: ClassVar[str] = "faststeer-patching-1"
    HOLDS: ClassVar[str] = "patching scores"
    MEND: ClassVar[str] = "save them with Scores.save"

    graph: Graph
    edges: Tensor
    nodes: Tensor
    dimensions: Tensor
    steered: float
    base: float
    n_positions: int
    metric: MetricName
    steps: int

    @property
    def completeness_error(self) -> float:
        """`nodes[0]` - (steered - base): the error of the quadrature, which falls as 1 / steps^2."""
        return float(self.nodes[0]) - (self.steered - self.base)

    def top(self, k: int = 20) -> list[tuple[str, str, float]]:
        """The k edges of the largest abs(score): (sender, receiver, score)."""
        order = self.edges.abs().flatten().topk(min(k, self.edges.numel())).indices.tolist()
        places = [divmod(index, self.graph.n_receivers) for index in order]
        return [(self.graph.senders[s], self.graph.receivers[r], float(self.edges[s, r])) for s, r in places]

    @classmethod
    def pooled(cls, several: Sequence[Scores], times: Sequence[float] | None = None) -> Scores:
        """Scores of several sets of examples as if patched at once: means over the kept positions of all.

        Args:
            times: how often each set counts (once), for resampling.

        Raises:
            ValueError: none, none that counts, scores of different graphs, metrics or steps.
        """
        counts = [1.0] * len(several) if times is None else [float(each) for each in times]
        if len(counts) != len(several) or min(counts, default=-1) < 0 or not any(counts):
            raise ValueError(f"{len(several)} scores that count {counts} times: expected one and a count for each")
        first = several[0]
        for one in several[1:]:
            if (one.graph, one.metric, one.steps) != (first.graph, first.metric, first.steps):
                raise ValueError(
                    f"scores of {first.graph}, {first.metric!r}, {first.steps} steps cannot be pooled with those of "
                    f"{one.graph}, {one.metric!r}, {one.steps} steps"
                )
        weights = [times * one.n_positions for times, one in zip(counts, several, strict=True)]
        total = sum(weights)

        def mean(name: str) -> Any:
            return sum(w * getattr(one, name) for w, one in zip(weights, several, strict=True)) / total

        means = {name: mean(name) for name in ("edges", "nodes", "dimensions", "steered", "base")}
        return cls(first.graph, **means, n_positions=round(total), metric=first.metric, steps=first.steps)

    def _content(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        rest = {name: getattr(self, name) for name in ("steered", "base", "n_positions", "metric", "steps")}
        return {name: getattr(self, name) for name in TENSORS}, {"graph": asdict(self.graph), "rest": rest}

    @classmethod
    def _read(cls, file: TensorFile) -> Scores:
        graph, rest, tensors = Graph(**file.json("graph")), file.json("rest"), file.exactly(*TENSORS)
        shapes = [list(tensors["edges"].shape), list(tensors["nodes"].shape)]
        if shapes != [[graph.n_senders, graph.n_receivers], [graph.n_senders]] or tensors["dimensions"].ndim != 1:
            raise ValueError(f"edges and nodes {shapes} do not fit the graph")
        if any(tensor.dtype != torch.float64 for tensor in tensors.values()):
            raise ValueError("its tensors are not fp64")
        check_metric(rest["metric"])
        for name, kind in (("steered", float), ("base", float), ("n_positions", int), ("steps", int)):
            if type(rest[name]) is not kind or (kind is int and rest[name] < 1):
                raise ValueError(f"its {name} is {str(rest[name])[:40]!r}: expected a number")
        fields: dict[str, Any] = {**tensors, **rest}
        return cls(graph, **fields)


def patch(
    model: nn.Module,
    examples: Sequence[Example],
    *,
    metric: MetricName = "logit_difference",
    steps: int = 10,
    batch_size: int = 4,
    progress: bool = False,
) -> Scores:
    """Score every edge, node and steered dimension at once. With H the unsteered run, S what steering adds, u a
    sender's output in H + S, u* that in H, and v the stream as one receiver reads it, before its norm:

        IE(u -> v) = (u - u*)^T (1/T) sum_i d m / d v at H + (i + 1/2) / T S,     i = 0 .. T - 1

    summed over tokens, averaged over the kept positions of all examples. m is a position's metric:

        "logit_difference": logit(y) - logit(y*), the steered and the base model's favourite next tokens
        "directed_kl":      KL(P* || P') - KL(P || P') of their distributions

    Heads of sandwich-norm models write what passes the output norm, at its scale in the run at hand. A query's own
    gradient, and a key's and a value's (of a key-value head where heads share them), are those of their rows of the
    projection.

    Layers before the steered one run once. Each step runs the others forward without gradients and then back, one
    layer at a time; an edge's score is added up where its gradient arises, so that memory does not depend on the
    number of edges: docs/observe.md says what it takes. Source: arXiv 2604.08524.

    Args:
        examples: of `examples(...)`; all steered before the same layer. They may have different plans.
        steps: T of the midpoint rule.
        batch_size: rows per pass; halved, with a warning, where they do not fit into memory.

    Raises:
        ValueError: `steps` or `batch_size` below 1, another metric, examples or a model that cannot be patched.
    """
    check_metric(metric)
    if steps < 1:
        raise ValueError(f"steps is {steps}: expected at least 1 point of the midpoint rule")
    points = find_hook_points(model)
    network = Network(model, steered_layer(examples, points))
    graph = network.graph
    total = _PatchSums.empty(graph, points.hidden_size)

    def run(group: list[int]) -> _PatchSums:
        return _patch_batch(network, [examples[index] for index in group], metric, steps)

    with network:
        for _, sums in in_batches([len(each) for each in examples], batch_size, run, "Patching", progress):
            total = _PatchSums(*map(torch.add, total, sums))
    n = sum(len(example.kept) for example in examples)
    numbers = float(total.steered) / n, float(total.base) / n
    edges = (total.edges / n).masked_fill(~graph.edges, 0)
    return Scores(graph, edges, total.nodes / n, total.dimensions / n, *numbers, n, metric, steps)


class _PatchSums(NamedTuple):
    """Sums over positions, fp64 on the CPU."""

    edges: Tensor
    nodes: Tensor
    dimensions: Tensor
    steered: Tensor
    base: Tensor

    @classmethod
    def empty(cls, graph: Graph, hidden_size: int) -> _PatchSums:
        shapes = (graph.n_senders, graph.n_receivers), (graph.n_senders,), (hidden_size,), (), ()
        return cls(*(torch.zeros(shape, dtype=torch.float64) for shape in shapes))


def begin(network: Network, group: Sequence[Example]) -> tuple[list[LayerPass], Tensor]:
    """What the layers do unsteered, and the steered stream that enters the first."""
    batch, _ = pad_rows(group, 0, network.device)
    base = network.base(batch)
    start = base[0].stream
    return base, start + added(group, batch, network.points, start.dtype)


def _patch_batch(network: Network, group: Sequence[Example], name: MetricName, steps: int) -> _PatchSums:
    graph = network.graph
    base, stream = begin(network, group)
    start, base_end = base[0].stream, base[-1].left
    difference, steered_end = _differences(network, base, stream)
    steering = difference[:, 0]
    metric = Metric(name, network.lens, group, base_end, steered_end)
    sums = _PatchSums.empty(graph, start.shape[-1])
    sums.steered.copy_(metric.of(steered_end).sum())
    sums.base.copy_(metric.of(base_end).sum())
    check_finite(sums.steered, sums.base)
    del base, base_end, stream, steered_end
    per_layer = graph.receivers_per_layer
    for step in range(steps):
        streams = [start + (step + 0.5) / steps * steering]
        streams += [each.left for each in network.run(streams[0])]
        gradient = metric.gradient(streams.pop())
        sums.edges[:, -1:] += dots(difference, gradient.unsqueeze(1)) / steps
        for i in reversed(range(graph.depth)):
            gradients = network.gradients(i, streams.pop(), gradient)
            mlp, heads = graph.mlp_of(i), graph.heads_of(i)
            sums.nodes[mlp] += dots(difference[:, mlp : mlp + 1], gradient.unsqueeze(1))[0, 0] / steps
            sums.nodes[heads] += dots(difference[:, heads], gradients.attn_out.unsqueeze(1))[:, 0] / steps
            upto = graph.before_mlp(i)
            sums.edges[:upto, i * per_layer : (i + 1) * per_layer] += (
                dots(difference[:, :upto], gradients.readers) / steps
            )
            gradient = gradients.stream
            del gradients  # before the next layer's are made
        sums.dimensions.add_((wide(steering) * gradient).sum((0, 1)).double().cpu() / steps)
    sums.nodes[0] = sums.dimensions.sum()
    return sums


@torch.no_grad()
def _differences(network: Network, base: Sequence[LayerPass], stream: Tensor) -> tuple[Tensor, Tensor]:
    """u - u* of every sender `[batch, senders, tokens, hidden]`, in the model's dtype, and the stream that the last
    layer leaves in the steered run."""
    graph = network.graph
    rows, *rest = stream.shape
    difference = stream.new_empty(rows, graph.n_senders, *rest)
    difference[:, 0] = stream - base[0].stream
    for i, steered in enumerate(network.run(stream)):
        torch.sub(network.writes(i, steered), network.writes(i, base[i]), out=difference[:, graph.heads_of(i)])
        difference[:, graph.mlp_of(i)] = steered.mlp_out - base[i].mlp_out
    return difference, steered.left


@torch.no_grad()
def dots(differences: Tensor, gradients: Tensor, chunk: int = 16) -> Tensor:
    """`[senders, receivers]` fp64 on the CPU: inner products over rows, tokens and hidden size of
    `[batch, senders, tokens, hidden]` with `[batch, receivers, tokens, hidden]`; so many senders in fp32 at once."""
    g = wide(gradients).flatten(2).transpose(1, 2)
    made = [(wide(piece.flatten(2)) @ g).sum(0).double().cpu() for piece in differences.split(chunk, dim=1)]
    return torch.cat(made)
