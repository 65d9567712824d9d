"""A compiled model: one graph with the steering in it, which later plans change without compiling again."""

from __future__ import annotations

import gc

import models
import pytest
import torch
from test_architectures import close, far
from torch import Tensor
from transformers import CompileConfig, DynamicCache

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
    """No graphs of other tests. Tracing makes so many objects that looking for garbage takes an eighth of the time."""
    torch.compiler.reset()
    gc.disable()
    yield
    gc.enable()
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


@pytest.mark.parametrize(
    "how",
    [{}, {"use_cache": False}, {"guidance_scale": 1.5, "negative_prompt_ids": models.tokens(2, 2, seed=3)}],
    ids=["", "no cache", "guidance"],
)
def test_generation_of_a_model_compiled_in_place(how):
    """Every pass is compiled, the prompt's too: where each row's prompt ends, and which of two sequences a pass goes on
    with, is told as without. Plans that ask for positions and others take turns."""
    model, compiled, batch = one_layer(), one_layer(), models.right_padded([models.tokens(1, n)[0] for n in (5, 3)])
    compiled.compile(backend="eager")
    settings = {"max_new_tokens": 3, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    everywhere = fs.Plan([fs.Add(models.direction(5), 2.0, layers=0)])
    answers = []
    with torch.no_grad():
        for plans in ([plan(0), None], everywhere, [plan(2), plan(4)]):
            with fs.steer(model, plans):
                expected = model.generate(**batch, **how, **settings)
            with fs.steer(compiled, plans):
                for _ in range(2):
                    answer = compiled.generate(**batch, **how, **settings)
                    close(torch.stack(answer.logits), torch.stack(expected.logits))
            answers.append(torch.stack(expected.logits))
    assert far(answers[0], answers[1]) and far(answers[1], answers[2])


def test_chats_in_turn_with_a_compiled_model():
    """Caches of one's own, each with its prompt."""
    model, compiled = one_layer(), one_layer()
    compiled.compile(backend="eager")
    prompts = [models.tokens(1, n, seed=n) for n in (3, 5)]
    last = fs.Plan([fs.Add(models.direction(4), 3.0, layers=0, positions="last")])

    def chats(model: torch.nn.Module) -> list[Tensor]:
        caches, out = [DynamicCache(config=model.config) for _ in prompts], []
        for ids in (prompts, [ids[:, :1] for ids in prompts], [ids[:, 1:2] for ids in prompts]):
            out += [model(each, past_key_values=cache).logits[:, -1] for each, cache in zip(ids, caches, strict=True)]
        return out

    with torch.no_grad(), fs.steer(model, last), fs.steer(compiled, last):
        for found, expected in zip(chats(compiled), chats(model), strict=True):
            close(found, expected)


@pytest.mark.parametrize("at", ["resid_mid", "mlp_out"])
@pytest.mark.parametrize("how", ["in place", "replaced", "forward"])
def test_layers_that_were_compiled_one_by_one(how, at):
    """Each layer's graph was made before: it is made anew for what is hooked inside of the layer, and nested."""
    model, compiled, ids = one_layer(), one_layer(), models.tokens(2, 5)
    layers = compiled.model.layers
    if how == "in place":
        layers[0].compile(backend="eager")
    elif how == "replaced":
        layers[0] = torch.compile(layers[0], backend="eager")
    else:
        layers[0].forward = torch.compile(layers[0].forward, backend="eager")
    outer, inner = (fs.Plan([fs.Add(models.direction(i), 2.0, layers=0, at=at)]) for i in range(2))
    with torch.no_grad():
        plain = compiled(ids, use_cache=False).logits
        for path in ("hooks", "auto"):
            found = []
            for each in (model, compiled):
                with fs.steer(each, outer, path=path):
                    once = each(ids, use_cache=False).logits
                    with fs.steer(each, inner), read(each, at=at) as taken:
                        found.append((once, each(ids, use_cache=False).logits, taken[0]))
            for expected, got in zip(*found, strict=True):
                close(got, expected)
            assert far(found[0][0], plain) and far(found[0][1], found[0][0])
        close(compiled(ids, use_cache=False).logits, plain)
