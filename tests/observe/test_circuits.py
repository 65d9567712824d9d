"""Circuits: faithfulness at its two ends and against frozen attention, pruning against paths found by networkx."""

from __future__ import annotations

import functools
import random

import by_hand
import models
import networkx as nx
import numpy as np
import patched_by_hand
import pytest
import torch
from by_hand import Case
from hypothesis import given, settings
from hypothesis import strategies as st

import faststeer as fs
from faststeer.observe import circuits, freeze, patching
from faststeer.observe.circuits import Circuit, faithfulness, overlap, random_circuit, select
from faststeer.observe.patching import Example, Graph, Scores

FP64 = torch.float64
BATCH = {"gemma2": 1}  # in fp64 its eager attention gives NaN for padded rows: transformers' softmax is in fp32
SMALL = Graph(1, 4, 4, 2)


@functools.cache
def model(name, dtype=FP64):
    return by_hand.build(name, dtype)


PLAN = fs.Plan([fs.Add(models.direction(1), 1.0, layers=1, at="resid_pre")])


@functools.cache
def examples(plan=PLAN):
    """Two rows of different lengths, any positions and tokens."""
    made = []
    for row in range(2):
        ids = models.tokens(1, 8 + row, seed=row)[0].tolist()
        kept = [3, 5, 6]
        made.append(Example(ids[:4], ids[4:], plan, kept, [5, 6, 7], [8, 9, 10]))
    return made


@functools.cache
def scores(name):
    return patching.patch(model(name), examples(), steps=4, batch_size=BATCH.get(name, 4))


def slack(name):
    return 1e-12 if name in ("gpt2", "neox_parallel") else 64 * 2**-23


def metric_of(logits, row):
    """Sum over kept positions of logit(y) - logit(y*), from logits `[tokens, vocabulary]`."""
    kept = logits[row.kept]
    places = torch.arange(len(row.kept))
    return (kept[places, row.steered_tokens] - kept[places, row.base_tokens]).sum()


# Faithfulness ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("metric", ["logit_difference", "directed_kl"])
@pytest.mark.parametrize("name", [*by_hand.FAMILIES, "neox_parallel", "olmo2", "phi3"])
def test_full_is_one_and_empty_is_zero(name, metric):
    graph = scores(name).graph
    both = [Circuit.full(graph), Circuit.empty(graph)]
    found = faithfulness(model(name), examples(), both, metric=metric, batch_size=BATCH.get(name, 3))
    torch.testing.assert_close(found.values, torch.tensor([1.0, 0.0], dtype=FP64), rtol=0, atol=slack(name))
    for side, plan in ((found.steered, PLAN), (found.base, None)):
        if metric == "logit_difference":
            for value, row in zip(side, examples(), strict=True):
                with torch.no_grad(), fs.steer(model(name), [plan]):
                    logits = model(name)(input_ids=torch.tensor([row.prompt + row.completion])).logits[0]
                torch.testing.assert_close(value, metric_of(logits, row), rtol=slack(name), atol=slack(name))


@pytest.mark.parametrize("what", ["qk", "ov"])
@pytest.mark.parametrize("name", by_hand.FAMILIES)
def test_without_query_and_key_edges_it_is_frozen_attention(name, what):
    """Queries and keys that read the unsteered stream make the unsteered pattern, values the unsteered values."""
    m, graph = model(name), scores(name).graph
    kinds = [graph.kind(receiver) for receiver in range(graph.n_receivers)]
    steered = torch.tensor([kind not in (("q", "k") if what == "qk" else ("v",)) for kind in kinds])
    circuit = Circuit(graph, graph.edges & steered)
    found = faithfulness(m, examples(), [circuit], batch_size=1)
    for row, value in zip(examples(), found.circuits[0], strict=True):
        with freeze(m, PLAN, what), torch.no_grad():
            logits = m(input_ids=torch.tensor([row.prompt + row.completion]), use_cache=False).logits[0]
        torch.testing.assert_close(value, metric_of(logits, row), rtol=slack(name), atol=slack(name))


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2"])
def test_a_path_of_two_edges_by_hand(name):
    """steering -> one receiver -> logits: the head (or MLP) computed by hand on its moved input."""
    m, graph = model(name), scores(name).graph
    (row, _), case = examples(), Case(models.direction(1), 1.0)
    ids = torch.tensor([row.prompt + row.completion])
    steering = case.vector.double().expand(ids.shape[1], -1)
    base = patched_by_hand.writes(m, ids)
    paths = [("L1.V0", ["L1.H0", "L1.H1"][: 1 if name == "gpt2" else 2]), ("L2.Q3", ["L2.H3"]), ("L1.MLP", ["L1.MLP"])]
    chosen, expected = [], []
    for receiver, senders in paths:
        edges = torch.zeros_like(graph.edges)
        edges[0, graph.receivers.index(receiver)] = True
        edges[[graph.senders.index(sender) for sender in senders], -1] = True
        chosen.append(Circuit(graph, edges))
        assert len(chosen[-1].pruned()) == len(chosen[-1])
        moved = patched_by_hand.writes_patched(m, ids, receiver, steering)
        difference = sum(moved[sender] - base[sender] for sender in senders)
        expected.append(metric_of(patched_by_hand.patched_logits(m, ids, "logits", difference), row))
    found = faithfulness(m, [row], chosen, batch_size=2).circuits[:, 0]
    torch.testing.assert_close(found, torch.stack(expected), rtol=slack(name), atol=slack(name))


def test_circuits_in_one_pass_are_those_alone():
    m, s = model("qwen3"), scores("qwen3")
    chosen = [select(s, 0.2), random_circuit(s.graph, 0.5), Circuit.full(s.graph), select(s, 0.4).complement()]
    together = faithfulness(m, examples(), chosen, batch_size=5)
    for number, circuit in enumerate(chosen):
        alone = faithfulness(m, examples(), [circuit], batch_size=1)
        torch.testing.assert_close(together.circuits[number], alone.circuits[0], rtol=slack("qwen3"), atol=1e-5)
    change = (together.circuits.sum(1) - together.base.sum()) / (together.steered.sum() - together.base.sum())
    torch.testing.assert_close(together.values, change)
    interval = together.interval(samples=200)
    assert interval.shape == (4, 2) and (interval[:, 0] <= interval[:, 1]).all()
    # Two examples: the pooled value lies between the two alone.
    each = (together.circuits - together.base) / (together.steered - together.base)
    assert (interval >= each.amin(1, keepdim=True) - 1e-9).all() and (
        interval <= each.amax(1, keepdim=True) + 1e-9
    ).all()


def test_low_precision():
    m, s = model("llama", torch.bfloat16), scores("llama")
    found = faithfulness(m, examples(), [Circuit.full(s.graph), Circuit.empty(s.graph)])
    assert found.values[0] == pytest.approx(1, abs=32 * 2**-8)
    assert found.values[1] == 0


def test_too_little_memory_lowers_the_batch(monkeypatch):
    m, s = model("llama"), scores("llama")
    chosen = [select(s, 0.3), Circuit.full(s.graph)]
    whole = faithfulness(m, examples(), chosen)
    base = patching.Network.base

    def scarce(self, batch):
        if len(batch["input_ids"]) > 1:
            raise torch.OutOfMemoryError("out of memory")
        return base(self, batch)

    monkeypatch.setattr(patching.Network, "base", scarce)
    with pytest.warns(UserWarning, match="do not fit into memory"):
        lowered = faithfulness(m, examples(), chosen)
    torch.testing.assert_close(lowered.values, whole.values, rtol=0, atol=1e-5)


def test_bad_input():
    m, s = model("llama"), scores("llama")
    with pytest.raises(ValueError, match=r"circuits\[0\] is of Graph"):
        faithfulness(m, examples(), [Circuit.full(SMALL)])
    nothing = fs.Plan([fs.Add(models.direction(1), 0.0, layers=1, at="resid_pre")])
    with pytest.raises(ValueError, match="same steered and unsteered"):
        faithfulness(m, examples(nothing), [Circuit.full(s.graph)])
    with pytest.raises(ValueError, match="expected one of"):
        faithfulness(m, examples(), [], metric="other")
    with pytest.raises(ValueError, match=r"expected torch.bool \[senders, receivers\]"):
        Circuit(SMALL, SMALL.edges.float())
    with pytest.raises(ValueError, match=r"no edge L1\.H0 -> L1\.Q0"):
        Circuit(SMALL, torch.ones_like(SMALL.edges))
    for n in (-1, SMALL.n_edges + 1, 1.5, -0.1):
        with pytest.raises(ValueError, match="expected a whole number from 0 to"):
            random_circuit(SMALL, n)
    with pytest.raises(ValueError, match="different graphs"):
        overlap(Circuit.full(SMALL), Circuit.full(s.graph))


# Selection ------------------------------------------------------------------------------------------------------------


def some_edges(graph, share, seed):
    numbers = torch.rand(graph.edges.shape, generator=torch.Generator().manual_seed(seed))
    return Circuit(graph, graph.edges & (numbers < share))


def paths(circuit):
    """The same graph written once more: a receiver is a node of its own, in front of the parts it belongs to."""
    g = circuit.graph
    made = nx.DiGraph(
        [(("out", g.senders[s]), ("in", g.receivers[r])) for s, r in torch.nonzero(circuit.edges).tolist()]
    )
    group = g.heads // g.kv_heads
    for name in g.receivers[:-1]:
        layer, part = name.split(".")
        if part == "MLP":
            made.add_edge(("in", name), ("out", name))
        else:
            number = int(part[1:])
            heads = [number] if part[0] == "Q" else range(number * group, (number + 1) * group)
            made.add_edges_from((("in", name), ("out", f"{layer}.H{head}")) for head in heads)
    made.add_nodes_from([("out", "steering"), ("in", "logits")])
    return made


@settings(max_examples=40)
@given(st.integers(1, 4), st.integers(1, 2), st.integers(1, 3), st.booleans(), st.floats(0, 0.6), st.integers(0, 99))
def test_pruning_keeps_what_lies_on_a_path(depth, kv_heads, group, parallel, share, seed):
    graph = Graph(2, 2 + depth, kv_heads * group, kv_heads, parallel)
    circuit = some_edges(graph, share, seed)
    whole = paths(circuit)
    before = nx.descendants(whole, ("out", "steering")) | {("out", "steering")}
    after = nx.ancestors(whole, ("in", "logits")) | {("in", "logits")}
    expected = [(s, r) for s, r in circuit.list() if ("out", s) in before and ("in", r) in after]
    pruned = circuit.pruned()
    assert pruned.list() == expected
    assert pruned.pruned().list() == expected


def scores_of(graph, seed):
    numbers = torch.from_numpy(np.random.default_rng(seed).normal(size=graph.edges.shape)) * graph.edges
    return Scores(graph, numbers, numbers.sum(1), torch.zeros(4), 1.0, 0.0, 1, "logit_difference", 1)


@settings(max_examples=8)
@given(st.integers(0, SMALL.n_edges), st.integers(0, 9))
def test_selection_takes_the_best_that_leave_at_most_n(n, seed):
    made = scores_of(SMALL, seed)
    chosen = select(made, n)
    assert len(chosen) <= n
    strength = made.edges.abs()
    order = strength.flatten().argsort(descending=True)[: SMALL.n_edges]
    sizes = []
    for k in range(len(order) + 1):  # one edge more at a time, as the paper does
        edges = torch.zeros(SMALL.edges.numel(), dtype=torch.bool)
        edges[order[:k]] = True
        top = Circuit(SMALL, edges.view_as(SMALL.edges)).pruned()
        sizes.append(len(top))
        if len(top) <= n:
            best = top
    assert sizes == sorted(sizes)
    assert torch.equal(chosen.edges, best.edges)


def test_selection_by_share_and_random_control():
    made = scores_of(SMALL, 0)
    assert len(select(made, 1.0)) == SMALL.n_edges == len(select(made, SMALL.n_edges))
    assert len(select(made, 0)) == len(select(made, 0.0)) == 0
    a, b = random_circuit(SMALL, 40, seed=0), random_circuit(SMALL, 40, seed=1)
    assert 30 <= len(a) <= 40 and a.pruned().list() == a.list()
    assert a.list() != b.list() and random_circuit(SMALL, 40, seed=0).list() == a.list()
    assert (a.complement().edges ^ a.edges).equal(SMALL.edges)


def test_overlap_is_set_arithmetic():
    a, b = random_circuit(SMALL, 40, seed=0), random_circuit(SMALL, 60, seed=1)
    one, two = set(a.list()), set(b.list())
    found = overlap(a, b)
    assert (found.shared, found.sizes) == (len(one & two), (len(one), len(two)))
    assert found.fraction == len(one & two) / min(len(one), len(two))
    assert found.iou == len(one & two) / len(one | two)
    assert overlap(a, a).iou == overlap(a, a).fraction == 1
    assert np.isnan(overlap(Circuit.empty(SMALL), a).fraction)
    assert np.isnan(overlap(Circuit.empty(SMALL), Circuit.empty(SMALL)).iou)


# Export ---------------------------------------------------------------------------------------------------------------


def test_networkx_graph():
    made = scores_of(SMALL, 3)
    circuit = select(made, 50)
    found = circuit.to_networkx(made)
    assert {(u, data["receiver"]) for u, _, data in found.edges(data=True)} == set(circuit.list())
    for u, v, key, data in found.edges(keys=True, data=True):
        s, r = SMALL.senders.index(u), SMALL.receivers.index(data["receiver"])
        assert data["score"] == float(made.edges[s, r]) and key == SMALL.kind(r)
        assert found.nodes[u]["layer"] <= found.nodes[v]["layer"]
    assert nx.is_directed_acyclic_graph(found)
    assert all(nx.has_path(found, "steering", node) and nx.has_path(found, node, "logits") for node in found)
    assert {found.nodes[node]["kind"] for node in found} == {"steering", "head", "mlp", "logits"}
    assert "score" not in next(iter(circuit.to_networkx().edges(data=True)))[2]


@pytest.mark.parametrize("suffix", ["png", "svg"])
def test_picture(tmp_path, suffix):
    made = scores_of(SMALL, 3)
    circuit = select(made, 50)
    figure = circuit.plot(tmp_path / f"circuit.{suffix}", made)
    data = (tmp_path / f"circuit.{suffix}").read_bytes()
    assert data[:4] == b"\x89PNG" if suffix == "png" else b"<svg" in data
    labels = {text.get_text() for text in figure.axes[0].get_legend().get_texts()}
    counts = {
        kind: sum(SMALL.kind(SMALL.receivers.index(r)) == kind for _, r in circuit.list()) for kind in SMALL.counts
    }
    assert labels == {f"{kind}: {n}" for kind, n in counts.items() if n}
    assert f"{len(circuit)} of {SMALL.n_edges} edges" in figure.axes[0].get_title()
    Circuit.empty(SMALL).plot(tmp_path / f"empty.{suffix}")


def test_edges_of_a_large_graph_are_selected_quickly():
    """The Llama set-up's 124,441 edges."""
    graph = Graph(12, 28, 24, 8)
    circuit = random_circuit(graph, 0.1, seed=random.Random(0).randrange(9))
    assert 0.09 * graph.n_edges < len(circuit) <= 0.1 * graph.n_edges
    assert circuits.overlap(circuit, circuit).iou == 1
