"""Patching scores against the identities that integrated gradients obey, and against every edge patched by hand."""

from __future__ import annotations

import functools
import math
import weakref

import by_hand
import models
import patched_by_hand
import pytest
import torch
from by_hand import Case
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import spearmanr
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import faststeer as fs
from faststeer.evaluate import is_refusal
from faststeer.observe import patching
from faststeer.observe.patching import Example, Graph, Metric
from faststeer.observe.patching.memory import patch_bytes

FP64 = torch.float64
N_PROMPT = 4
BATCH = {
    "gemma2": 1
}  # its eager attention gives NaN for padded rows in fp64, which transformers' softmax in fp32 makes


@functools.cache
def model(name, dtype=FP64):
    return by_hand.build(name, dtype)


def plan(coefficient=1.0, **more):
    return fs.Plan([fs.Add(models.direction(1), coefficient, layers=1, at="resid_pre", **more)])


def made(m, steering, rows=3, seed=0):
    """Examples on random tokens, of different lengths, with the positions where plain steered and unsteered passes
    differ."""
    found = []
    for row in range(rows):
        ids = models.tokens(1, 9 + row, seed=seed + row)
        with torch.no_grad():
            base = m(input_ids=ids).logits[0].argmax(-1)
            with fs.steer(m, steering) as entered:
                entered.set_prompt(N_PROMPT)
                steered = m(input_ids=ids).logits[0].argmax(-1)
        kept = [t for t in range(N_PROMPT - 1, ids.shape[1] - 1) if base[t] != steered[t]]
        tokens = ids[0].tolist()
        pair = steered[kept].tolist(), base[kept].tolist()
        if kept:
            found.append(Example(tokens[:N_PROMPT], tokens[N_PROMPT:], steering, kept, *pair))
    assert found
    return found


@functools.cache
def examples(name, dtype=FP64):
    return made(model(name, dtype), plan())


def slack(name):
    """RMSNorm computes in fp32 in models of fp64: its rounding, through a few layers."""
    return 1e-13 if name == "gpt2" else 64 * 2**-23


# The graph ------------------------------------------------------------------------------------------------------------


def test_edges_of_the_papers_models():
    """Gemma-2-2B steered before layer 15 of 26, Llama-3.2-3B before layer 12 of 28."""
    assert Graph(15, 26, 8, 4).n_edges == 8790
    assert Graph(12, 28, 24, 8).n_edges == 124441


@given(st.integers(0, 4), st.integers(1, 5), st.integers(1, 4), st.integers(1, 4), st.booleans())
def test_edges_are_as_many_as_the_formula_says(start, depth, kv_heads, group, parallel):
    graph = Graph(start, start + depth, kv_heads * group, kv_heads, parallel)
    assert graph.edges.shape == (graph.n_senders, graph.n_receivers)
    assert int(graph.edges.sum()) == graph.n_edges
    found = {kind: 0 for kind in graph.counts}
    for receiver in range(graph.n_receivers):
        found[graph.kind(receiver)] += int(graph.edges[:, receiver].sum())
    assert found == graph.counts
    assert len(set(graph.senders)) == graph.n_senders and len(set(graph.receivers)) == graph.n_receivers
    # A receiver is part of senders of its own layer that write after all that it reads.
    for receiver, name in enumerate(graph.receivers[:-1]):
        own = torch.nonzero(graph.passes_on[receiver]).flatten().tolist()
        assert len(own) == (group if ".K" in name or ".V" in name else 1)
        assert all(graph.senders[sender].split(".")[0] == name.split(".")[0] for sender in own)
        assert min(own) > max(torch.nonzero(graph.edges[:, receiver]).flatten().tolist())


@pytest.mark.parametrize("given", [(3, 3, 4, 4), (-1, 3, 4, 4), (0, 3, 4, 3), (0, 3, 0, 1)])
def test_graphs_that_do_not_exist(given):
    with pytest.raises(ValueError, match="expected"):
        Graph(*given)


# Scores ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("metric", ["logit_difference", "directed_kl"])
@pytest.mark.parametrize("name", by_hand.FAMILIES)
def test_identities(name, metric):
    """The steering node's effect is the change of the metric, up to the error of the midpoint rule, which twice the
    steps quarter; and what a node does is what its edges carry."""
    m, errors = model(name), []
    for steps in (8, 16):
        scores = patching.patch(m, examples(name), metric=metric, steps=steps, batch_size=BATCH.get(name, 4))
        errors.append(scores.completeness_error)
        scale = scores.edges.abs().sum()
        torch.testing.assert_close(scores.edges.sum(1), scores.nodes, rtol=0, atol=float(slack(name) * scale))
        torch.testing.assert_close(scores.dimensions.sum(), scores.nodes[0])
        assert not scores.edges[~scores.graph.edges].any()
        assert (scores.edges[scores.graph.edges] != 0).all()
    # The next term of the error is of fourth order: a few percent at these steps.
    assert errors[0] / errors[1] == pytest.approx(4, rel=0.1)
    assert abs(errors[1]) < 0.01 * abs(scores.steered - scores.base)
    assert scores.steered > scores.base


@pytest.mark.parametrize("name", by_hand.FAMILIES)
def test_metric_by_hand(name):
    m, rows = model(name), examples(name)
    scores = patching.patch(m, rows, steps=1, batch_size=BATCH.get(name, 4))
    kl = patching.patch(m, rows, metric="directed_kl", steps=1, batch_size=BATCH.get(name, 4))
    difference, directed = torch.zeros(2, dtype=FP64), torch.zeros(2, dtype=FP64)
    for row in rows:
        ids = torch.tensor([row.prompt + row.completion])
        with torch.no_grad():
            base = m(input_ids=ids).logits[0, row.kept]
            with fs.steer(m, row.plan):
                steered = m(input_ids=ids).logits[0, row.kept]
        for side, logits in enumerate((steered, base)):
            places = torch.arange(len(row.kept))
            y, other = torch.tensor(row.steered_tokens), torch.tensor(row.base_tokens)
            difference[side] += (logits[places, y] - logits[places, other]).sum()
        p, q = steered.log_softmax(-1), base.log_softmax(-1)
        directed[0] += (q.exp() * (q - p)).sum()
        directed[1] -= (p.exp() * (p - q)).sum()
    n = scores.n_positions
    assert n == sum(len(row.kept) for row in rows)
    for found, expected in ((scores, difference), (kl, directed)):
        both = torch.tensor([found.steered, found.base], dtype=FP64)
        torch.testing.assert_close(both, expected / n, rtol=slack(name), atol=slack(name))


@pytest.mark.parametrize("name", by_hand.FAMILIES)
def test_edges_rank_as_exact_patching(name):
    """Every edge patched alone, by hand; to first order in the coefficient the two are equal."""
    m = model(name)
    ids = models.tokens(1, 9)
    kept = list(range(N_PROMPT - 1, 8))
    y, other = models.tokens(2, len(kept), seed=5).tolist()
    case = Case(models.direction(1), 0.05)
    row = Example(
        *(ids[0].tolist()[part] for part in (slice(N_PROMPT), slice(N_PROMPT, None))), plan(0.05), kept, y, other
    )
    scores = patching.patch(m, [row])
    graph = scores.graph
    base, steered = patched_by_hand.writes(m, ids), patched_by_hand.writes(m, ids, case)
    difference = {sender: steered[sender] - base[sender] for sender in graph.senders[1:]}
    difference["steering"] = (case.coefficient * case.vector.double()).expand(ids.shape[1], -1)

    def metric(logits):
        places = torch.arange(len(kept))
        return float((logits[kept][places, y] - logits[kept][places, other]).mean())

    with torch.no_grad():
        before = metric(m(input_ids=ids).logits[0])
    exact, found = [], []
    for s, r in torch.nonzero(graph.edges).tolist():
        logits = patched_by_hand.patched_logits(m, ids, graph.receivers[r], difference[graph.senders[s]])
        exact.append(metric(logits) - before)
        found.append(float(scores.edges[s, r]))
    assert len(exact) == graph.n_edges
    assert spearmanr(exact, found).statistic >= 0.95
    # Next order: the coefficient, times how curved the metric is.
    assert math.dist(exact, found) <= 0.1 * math.hypot(*exact)


def test_larger_steering_still_ranks_as_exact_patching():
    """There the metric is curved along the path, and a single edge patched alone is only one end of it."""
    m, ids = model("llama"), models.tokens(1, 9)
    (row,) = made(m, plan(0.5), rows=1)
    scores = patching.patch(m, [row])
    case = Case(models.direction(1), 0.5)
    base, steered = patched_by_hand.writes(m, ids), patched_by_hand.writes(m, ids, case)
    exact = []
    places = torch.arange(len(row.kept))
    for s, r in torch.nonzero(scores.graph.edges).tolist():
        sender = scores.graph.senders[s]
        moved = (0.5 * case.vector.double()).expand(9, -1) if s == 0 else steered[sender] - base[sender]
        logits = patched_by_hand.patched_logits(m, ids, scores.graph.receivers[r], moved)[row.kept]
        exact.append(float((logits[places, row.steered_tokens] - logits[places, row.base_tokens]).mean()))
    found = scores.edges[scores.graph.edges]
    assert spearmanr(exact, found).statistic >= 0.95


def test_batches_do_not_matter():
    """Padded rows of different plans and lengths together, as alone; fp32 as fp64."""
    m = model("qwen3")
    rows = [*examples("qwen3"), *made(m, plan(-3.0, positions="generated"))]
    together = patching.patch(m, rows, steps=3, batch_size=8)
    alone = [patching.patch(m, [row], steps=3) for row in rows]
    n = sum(one.n_positions for one in alone)
    assert together.n_positions == n
    for name in ("edges", "nodes", "dimensions"):
        expected = sum(getattr(one, name) * one.n_positions for one in alone) / n
        torch.testing.assert_close(getattr(together, name), expected, rtol=1e-5, atol=slack("qwen3"))
        torch.testing.assert_close(getattr(patching.Scores.pooled(alone), name), expected, rtol=1e-12, atol=1e-15)
    twice, counted = patching.Scores.pooled([*alone, alone[0]]), [2.0, *[1.0] * (len(alone) - 1)]
    torch.testing.assert_close(patching.Scores.pooled(alone, counted).edges, twice.edges, rtol=1e-12, atol=1e-15)
    assert patching.Scores.pooled(alone, counted).n_positions == n + alone[0].n_positions
    for several, times in (([], None), (alone, [0.0] * len(alone)), (alone, [1.0])):
        with pytest.raises(ValueError, match="expected one and a count for each"):
            patching.Scores.pooled(several, times)
    with pytest.raises(ValueError, match="cannot be pooled"):
        patching.Scores.pooled([together, patching.patch(m, rows[:1], steps=2)])
    single = patching.patch(model("qwen3", torch.float32), rows, steps=3, batch_size=4)
    scale = float(together.edges.abs().max())
    torch.testing.assert_close(single.edges, together.edges, rtol=0, atol=64 * 2**-23 * scale * 8)


@pytest.mark.parametrize("name", ["olmo2", "phi3", "neox_parallel", "cohere"])
def test_other_shapes(name):
    """Norms over all heads and behind the branches, one projection for all, attention and MLP in parallel."""
    m = model(name)
    rows = made(m, plan(), rows=2)
    scores = patching.patch(m, rows, steps=8)
    assert scores.graph.parallel == (name in models.PARALLEL)
    scale = float(scores.edges.abs().sum())
    torch.testing.assert_close(scores.edges.sum(1), scores.nodes, rtol=0, atol=64 * 2**-23 * scale)
    change = scores.steered - scores.base
    assert abs(scores.completeness_error) < 0.01 * abs(change)


def test_bf16_is_near_fp32():
    rows = examples("llama", torch.float32)
    wide = patching.patch(model("llama", torch.float32), rows, steps=4)
    narrow = patching.patch(model("llama", torch.bfloat16), rows, steps=4)
    difference = (narrow.edges - wide.edges).norm() / wide.edges.norm()
    assert difference < 32 * 2**-8  # rounding of three layers, forwards and backwards


def test_gradients_and_hooks_are_gone_afterwards():
    m = by_hand.build("llama", torch.float32)
    for parameter in m.parameters():
        parameter.requires_grad_(True)
    ids = models.tokens(1, 6)
    before = m(input_ids=ids).logits
    patching.patch(m, examples("llama", torch.float32), steps=1)
    assert all(parameter.grad is None for parameter in m.parameters())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in m.modules())
    assert torch.equal(m(input_ids=ids).logits, before)


def test_too_little_memory_lowers_the_batch(monkeypatch):
    m, rows = model("llama"), examples("llama")
    whole = patching.patch(m, rows, steps=2)
    base = patching.Network.base

    def scarce(self, batch):
        if len(batch["input_ids"]) > 1:
            raise torch.OutOfMemoryError("out of memory")
        return base(self, batch)

    monkeypatch.setattr(patching.Network, "base", scarce)
    with pytest.warns(UserWarning, match="do not fit into memory"):
        lowered = patching.patch(m, rows, steps=2)
    torch.testing.assert_close(lowered.edges, whole.edges, rtol=1e-5, atol=slack("llama"))


# Memory ---------------------------------------------------------------------------------------------------------------


class Peak(TorchDispatchMode):
    """Most bytes alive at once of all tensors made inside."""

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0
        self._seen = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        inputs = {x.untyped_storage().data_ptr() for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)}
        for x in tree_leaves(out):
            if isinstance(x, torch.Tensor) and (key := x.untyped_storage().data_ptr()) not in inputs | self._seen:
                self._add(x.untyped_storage(), key)
        return out

    def _add(self, storage, key):
        size = storage.nbytes()
        self.now += size
        self.peak = max(self.peak, self.now)
        self._seen.add(key)
        weakref.finalize(storage, self._gone, key, size)

    def _gone(self, key, size):
        self.now -= size
        self._seen.discard(key)


@pytest.mark.parametrize(("heads", "kv_heads", "tokens"), [(16, 4, 120), (8, 8, 60), (16, 2, 240)])
def test_memory_is_what_the_formula_says(heads, kv_heads, tokens):
    m = models.build(
        "llama",
        num_hidden_layers=6,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        hidden_size=128,
        intermediate_size=384,
        max_position_embeddings=256,
    )
    row = Example([3] * 4, models.tokens(1, tokens - 4)[0].tolist(), _plan_of(128), [tokens - 2], [5], [6])
    patching.patch(m, [row], steps=1)  # what is found once per model
    with Peak() as peak:
        patching.patch(m, [row], steps=1)
    expected = patch_bytes(Graph(1, 6, heads, kv_heads), 128, 384, models.VOCAB, tokens, 4)
    assert 0.6 * expected <= peak.peak <= expected


def _plan_of(size):
    return fs.Plan([fs.Add(models.direction(1, size), 1.0, layers=1, at="resid_pre")])


def test_the_bound_that_the_docs_name():
    """Llama-3.2-3B steered before layer 12: 2.5 GB for 600 tokens, 4.0 GB for 1,000."""
    found = [patch_bytes(Graph(12, 28, 24, 8), 3072, 8192, 128256, tokens) for tokens in (600, 1000)]
    assert [f"{size / 1e9:.1f}" for size in found] == ["2.5", "4.0"]


# Examples -------------------------------------------------------------------------------------------------------------


HARMLESS = ["Can you tell me how to bake a cake?", "How do I fix a chair?", "Please help me write a letter."]


@functools.cache
def demo():
    m, tokenizer = fs.demo.load()
    harmful, harmless = (prompts[:32] for prompts in fs.demo.prompts("refusal", "train"))
    vector = fs.extract.dim(m, tokenizer, harmful, harmless)
    return m, tokenizer, fs.Plan([fs.Add(vector[3], 1.0, layers=3, at="resid_pre")])


def refuses(base, steered):
    return is_refusal(steered) and not is_refusal(base)


@functools.cache
def found():
    prompts = fs.demo.prompts("refusal", "test")[1][:4]
    return prompts, patching.examples(*demo()[:2], prompts, demo()[2], changed=refuses, max_new_tokens=12)


def test_examples_are_greedy_completions_where_the_two_models_differ():
    m, tokenizer, steering = demo()
    prompts, rows = found()
    ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in fs.hf.render(tokenizer, prompts)]
    assert len(rows) == 8  # steered completions, then base ones
    for number, row in enumerate(rows):
        assert row.prompt == ids[number % 4]
        sequence = torch.tensor([row.prompt + row.completion])
        with torch.no_grad():
            base = m(input_ids=sequence).logits[0].argmax(-1)
            with fs.steer(m, steering):
                steered = m(input_ids=sequence).logits[0].argmax(-1)
        own = slice(len(row.prompt) - 1, -1)
        written = (steered if number < 4 else base)[own].tolist()
        assert written == row.completion  # each token is that side's favourite
        assert row.kept == [t for t in range(len(row) - 1) if t >= own.start and base[t] != steered[t]]
        assert row.steered_tokens == steered[row.kept].tolist()
        assert row.base_tokens == base[row.kept].tolist()


def test_patching_the_demo_model():
    _, rows = found()
    scores = patching.patch(demo()[0], rows, steps=10)
    assert abs(scores.completeness_error) < 0.02 * (scores.steered - scores.base)
    assert [edge[:2] for edge in scores.top(1)] == [max(zip_edges(scores), key=lambda e: abs(e[2]))[:2]]


def zip_edges(scores):
    return [
        (scores.graph.senders[s], scores.graph.receivers[r], float(scores.edges[s, r]))
        for s, r in torch.nonzero(scores.graph.edges).tolist()
    ]


def test_end_of_sequence_belongs_to_the_completion():
    m, tokenizer, steering = demo()
    (row,) = patching.examples(m, tokenizer, HARMLESS[:1], steering, completions=["steered"], max_new_tokens=60)
    assert row.completion[-1] in [m.generation_config.eos_token_id, tokenizer.eos_token_id]
    assert row.completion.count(row.completion[-1]) == 1


def test_given_completions():
    m, tokenizer, steering = demo()
    rows = patching.with_positions(m, tokenizer, HARMLESS[:2], ["I cannot help.", "Sure, here you go."], steering)
    for row in rows:
        assert tokenizer.decode(row.completion) in ("I cannot help.", "Sure, here you go.")
    with pytest.raises(ValueError, match="no tokens"):
        patching.with_positions(m, tokenizer, HARMLESS[:1], [[]], steering)


# Bad input ------------------------------------------------------------------------------------------------------------


def test_nothing_to_explain():
    m, tokenizer, steering = demo()
    nothing = fs.Plan([fs.Add(models.direction(1, 128), 0.0, layers=3, at="resid_pre")])
    with pytest.raises(ValueError, match=r"same favourite next token at all .* larger coefficient"):
        patching.examples(m, tokenizer, HARMLESS, nothing, max_new_tokens=4)
    with pytest.raises(ValueError, match="changed none of 3 answers"):
        patching.examples(m, tokenizer, HARMLESS, steering, changed=lambda base, steered: False, max_new_tokens=4)
    with pytest.raises(ValueError, match="expected 'steered', 'base' or both"):
        patching.examples(m, tokenizer, HARMLESS, steering, completions=["both"])
    with pytest.raises(ValueError, match="max_new_tokens is 0"):
        patching.examples(m, tokenizer, HARMLESS, steering, max_new_tokens=0)


def with_plan(*interventions):
    row = examples("llama")[0]
    return [Example(row.prompt, row.completion, fs.Plan(interventions), [5], [3], [4])]


@pytest.mark.parametrize(
    ("make", "what"),
    [
        (lambda d: [fs.Ablate(d, layers=1, at="resid_pre")], "Add alone"),
        (lambda d: [fs.Add(d, 1.0, layers=1, at="resid_pre", keep_norm=True)], "keep_norm"),
        (lambda d: [fs.Add(d, 1.0, layers=1, at="resid_pre", when=fs.Gate(d, 0.0))], "a gate"),
        (lambda d: [fs.Add(d, 1.0, layers=1, at="attn_out")], "attn_out of layer 1"),
        (lambda d: [fs.Add(d, 1.0, layers=2, at="resid_post")], "resid_post of layer 2"),
        (lambda d: [fs.Add(d, 1.0, layers=[0, 1], at="resid_pre")], "one layer"),
        (lambda d: [], "no place"),
    ],
)
def test_steering_that_is_no_single_addition(make, what):
    with pytest.raises(ValueError, match=what):
        patching.patch(model("llama"), with_plan(*make(models.direction(1))))


def test_bad_arguments():
    m, rows = model("llama"), examples("llama")
    with pytest.raises(ValueError, match="steps is 0"):
        patching.patch(m, rows, steps=0)
    with pytest.raises(ValueError, match="expected one of logit_difference, directed_kl"):
        patching.patch(m, rows, metric="kl")
    with pytest.raises(ValueError, match="no examples"):
        patching.patch(m, [])
    nothing = Example(rows[0].prompt, rows[0].completion, rows[0].plan, [], [], [])
    with pytest.raises(ValueError, match=r"examples\[1\] has no position"):
        patching.patch(m, [rows[0], nothing])
    with pytest.raises(ValueError, match="batch_size is 0"):
        patching.patch(m, rows, batch_size=0)
    with fs.steer(m, plan()), pytest.raises(RuntimeError, match="being steered"):
        patching.patch(m, rows)
    m = by_hand.build("llama").train()
    with pytest.raises(ValueError, match="training mode"):
        patching.patch(m, rows)


def test_overflow_is_said(monkeypatch):
    infinite = torch.full((3,), float("inf"), dtype=FP64)
    monkeypatch.setattr(Metric, "of", lambda self, stream: infinite)
    with pytest.raises(ValueError, match="NaN or infinite: use a smaller coefficient"):
        patching.patch(model("llama"), examples("llama"))


def test_attention_without_separate_heads():
    m = models.build("falcon")
    row = models.tokens(1, 8)[0].tolist()
    with pytest.raises(ValueError, match="AttentionInterface"):
        patching.patch(m, [Example(row[:4], row[4:], plan(), [5], [3], [4])])


# Files ----------------------------------------------------------------------------------------------------------------


def test_saved_scores_come_back(tmp_path):
    scores = patching.patch(model("llama"), examples("llama"), steps=1)
    scores.save(path := tmp_path / "scores.safetensors")
    again = patching.Scores.load(path)
    assert again.graph == scores.graph
    for name in ("edges", "nodes", "dimensions"):
        assert torch.equal(getattr(again, name), getattr(scores, name))
    for name in ("steered", "base", "n_positions", "metric", "steps"):
        assert getattr(again, name) == getattr(scores, name)
    data = path.read_bytes()
    fs.SteeringVector({1: models.direction(1)}, at="resid_pre").save(tmp_path / "vector.safetensors")
    (tmp_path / "short.safetensors").write_bytes(data[:-100])
    for name in ("vector", "short"):
        with pytest.raises(ValueError, match="holds no patching scores"):
            patching.Scores.load(tmp_path / f"{name}.safetensors")
