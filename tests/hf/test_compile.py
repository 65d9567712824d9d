"""A compiled model: one graph with the steering in it, which later plans change without compiling again."""

from __future__ import annotations

import models
import pytest
import torch
from test_architectures import close, far
from torch import Tensor
from transformers import CompileConfig

import faststeer as fs
from faststeer.hf import read

# Tracing warns of what it does itself.
pytestmark = pytest.mark.filterwarnings("ignore")


def plan(seed: int, *, latched: bool = True) -> fs.Plan:
    """Small, since tracing takes its time; with positions, a gate, and the hook that writes in place."""
    v, w = models.direction(seed), models.direction(seed + 1)
    gate = fs.Gate(v, latched=True, layer=0, at="resid_pre") if latched else fs.Gate(v)
    return fs.Plan(
        [
            fs.Ablate(v, layers=0, at="resid_mid", positions="[-3:]"),
            fs.Add(w, 2.0, layers=0, at="resid_mid", when=gate, keep_norm=seed % 2 == 0),
        ]
    )


class Counting:
    """The eager back end, which counts the graphs that it is given."""

    def __init__(self) -> None:
        self.graphs = 0

    def __call__(self, graph: torch.fx.GraphModule, _inputs: list[Tensor]) -> torch.fx.GraphModule:
        self.graphs += 1
        return graph


@pytest.fixture(autouse=True)
def fresh():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def one_layer(name: str = "llama") -> torch.nn.Module:
    return models.build(name, **{"n_layer" if name == "gpt2" else "num_hidden_layers": 1})


@pytest.mark.parametrize("latched", [False, True], ids=["", "latched"])
@pytest.mark.parametrize("name", ["llama", pytest.param("gpt2", marks=pytest.mark.full)])
def test_one_graph_for_all_plans(name, latched):
    """fullgraph=True, so nothing breaks out of it; other plans at the same sites take effect with no graph made
    anew."""
    model, ids, backend = one_layer(name), models.tokens(2, 5), Counting()
    a, b, c = (plan(seed, latched=latched) for seed in range(3))
    plans = [[a, None], [b, c]]
    with torch.no_grad(), fs.steer(model, plans[0]) as steering:
        compiled = torch.compile(model, backend=backend, fullgraph=True)
        outputs = {}
        for which in (0, 1, 0):
            steering.assign(plans[which])
            compiled_logits, eager = compiled(ids, use_cache=False).logits, model(ids, use_cache=False).logits
            close(compiled_logits, eager)
            outputs[which] = eager
        assert backend.graphs == 1
    assert far(outputs[0], outputs[1])


def test_compiled_before_steering():
    """What was compiled unsteered is not steered by an old graph in silence, nor the other way round."""
    model, ids = one_layer(), models.tokens(2, 5)
    with torch.no_grad():
        compiled = torch.compile(model, backend="eager")
        plain = model(ids, use_cache=False).logits
        close(compiled(ids, use_cache=False).logits, plain)
        with fs.steer(model, plan(0)):
            steered = model(ids, use_cache=False).logits
            close(compiled(ids, use_cache=False).logits, steered)
        close(compiled(ids, use_cache=False).logits, plain)
        with fs.steer(model, plan(1)):
            close(compiled(ids, use_cache=False).logits, model(ids, use_cache=False).logits)
        with read(model) as taken:
            compiled(ids, use_cache=False)
        assert taken[0].shape == (2, 5, model.config.hidden_size)
    assert far(steered, plain)


def test_read_and_another_steering_inside_of_a_compiled_one():
    """Both are entered behind the compilation, and the graph is made anew for each."""
    model, ids = one_layer(), models.tokens(2, 5)
    with torch.no_grad(), fs.steer(model, plan(0), path="hooks"):
        compiled = torch.compile(model, backend="eager")
        outer = compiled(ids, use_cache=False).logits
        with read(model) as taken:
            compiled(ids, use_cache=False)
        assert taken[0].shape == (2, 5, model.config.hidden_size)
        with fs.steer(model, fs.Add(models.direction(3), layers=0)):
            both = compiled(ids, use_cache=False).logits
            close(both, model(ids, use_cache=False).logits)
        close(compiled(ids, use_cache=False).logits, outer)
    assert far(both, outer)


def test_a_plan_at_other_sites_is_not_ignored():
    """The graph has no steering there: it is made anew, not used as it is."""
    model, ids, v = one_layer(), models.tokens(2, 5), models.direction()
    with torch.no_grad(), fs.steer(model, fs.Add(v, layers=0, at="attn_out")) as steering:
        compiled = torch.compile(model, backend="eager")
        for at in ("attn_out", "mlp_out"):
            steering.assign(fs.Add(v, 2.0, layers=0, at=at))
            close(compiled(ids, use_cache=False).logits, model(ids, use_cache=False).logits)


@pytest.mark.full
def test_through_aot_autograd():
    """Functionalised: the in-place hook of resid_mid and the gate state survive it."""
    model, ids = one_layer(), models.tokens(2, 5)
    with torch.no_grad(), fs.steer(model, [plan(0), plan(1)]) as steering:
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        close(compiled(ids, use_cache=False).logits, model(ids, use_cache=False).logits)
        steering.assign([None, plan(0)])
        close(compiled(ids, use_cache=False).logits, model(ids, use_cache=False).logits)


@pytest.mark.parametrize("path", ["fused", "hooks"])
def test_generation_with_a_static_cache_is_one_graph_for_all_plans(path):
    """`generate` as it compiles by itself: one graph for the decode step, without a break, and no other one when plans
    change between generations or tokens. The prompt is read without a graph."""
    model, ids, graphs = one_layer(), models.tokens(2, 5), []

    def backend(graph, _inputs):  # not a Counting: transformers copies the configuration, and what is in it
        graphs.append(graph)
        return graph

    settings = {"max_new_tokens": 4, "do_sample": False, "cache_implementation": "static"}
    compiled = CompileConfig(backend=backend, fullgraph=True, dynamic=False, mode=None)
    compiled._compile_all_devices = True  # transformers compiles by itself on accelerators only
    plans = [[plan(0), None], [plan(1), plan(2)], [plan(0), None]]
    with torch.no_grad(), fs.steer(model, plans[0], path=path) as steering:
        outputs = []
        for which in plans:
            steering.assign(which)
            expected = model.generate(ids, **settings, disable_compile=True)
            outputs.append(model.generate(ids, **settings, compile_config=compiled))
            assert torch.equal(outputs[-1], expected)
        assert len(graphs) == 1
    assert not torch.equal(outputs[0], outputs[1]) and torch.equal(outputs[0], outputs[2])
