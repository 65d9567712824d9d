"""In inference a site calls an operator on prepared tables, the quick way: it gives the bits of the full way, which
whatever it does not take goes."""

from __future__ import annotations

import threading
from types import SimpleNamespace

import models
import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

import faststeer as fs
from faststeer import ops, program
from faststeer.hf import passes
from faststeer.hf.cache import cache_argument, caches_in
from faststeer.plan import site

V, W = models.direction(), models.direction(1)
PLANS = [
    fs.Plan([fs.Add(V, 0.7, layers="all"), fs.Ablate(W, layers=1, at="mlp_out", positions="generated")]),
    None,
    fs.Plan([fs.Rotate(V, W, 30.0, layers=0, at="resid_post", positions="prompt")]),
]
PROBED = fs.Plan([fs.Add(V, 0.7, layers="all"), fs.Probe(W, layers="all")])
LATCHED = fs.Plan([fs.Add(V, 0.7, layers="all", when=fs.Gate(W, 0.0, latched=True))])


@pytest.fixture
def quick(monkeypatch) -> list[int]:
    """The sites at which the quick operators gave a result."""
    sites: list[int] = []

    def counted(own):
        def call(*arguments):
            result = own(*arguments)
            sites.extend([] if result is None else arguments[-1:])
            return result

        return call

    def prepare(*tables):
        own = ops.prepare(*tables)
        return SimpleNamespace(steer=counted(own.steer), add_steer_rmsnorm=counted(own.add_steer_rmsnorm))

    monkeypatch.setattr(program, "prepare", prepare)
    return sites


def steps(model: nn.Module, plans: object, path: str) -> Tensor:
    """Logits of a prompt and of two steps behind it."""
    ids, cache, found = models.tokens(3, 5), None, []
    with fs.steer(model, plans, path=path):
        for tokens in (ids, ids[:, :1], ids[:, 1:2]):
            output = model(tokens, **{cache_argument(model): cache}, use_cache=True)
            (cache,) = caches_in(output)
            found.append(output.logits.detach())
    return torch.cat(found, 1)


@pytest.mark.parametrize("no_gradient", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("path", ["hooks", "fused"])
def test_the_quick_way_gives_the_bits_of_the_full_way(path, dtype, no_gradient, quick, monkeypatch):
    model = models.build("llama").to(dtype)
    with no_gradient():
        found = steps(model, PLANS, path)
        assert len(quick) >= 3 * 2, "three passes over two layers or more"
        quick.clear()
        monkeypatch.setattr(passes, "takes_prepared", lambda x: False)
        assert torch.equal(found, steps(model, PLANS, path)) and not quick
        assert not torch.equal(found, steps(model, [None] * 3, path))


@pytest.mark.parametrize("path", ["hooks", "fused"])
@pytest.mark.parametrize("plans", [PROBED, LATCHED], ids=["probed", "latched"])
def test_probes_and_latches_go_the_full_way(plans, path, quick, monkeypatch):
    model = models.model("llama")
    with torch.no_grad():
        found, sites = steps(model, plans, path), set(quick)
        monkeypatch.setattr(passes, "takes_prepared", lambda x: False)
        assert torch.equal(found, steps(model, plans, path))
    assert plans is LATCHED or sites.isdisjoint(site("resid_post", layer) for layer in range(2))


@pytest.mark.parametrize("path", ["hooks", "fused"])
def test_gradients_go_the_full_way(path, quick):
    model, vector = models.model("llama"), V.clone().requires_grad_()
    with fs.steer(model, fs.Plan([fs.Add(vector, 0.7, layers="all")]), path=path):
        logits = model(models.tokens(2, 5)).logits
    assert not quick
    logits.sum().backward()
    assert vector.grad is not None and vector.grad.abs().max() > 0


@pytest.mark.parametrize("path", ["hooks", "fused"])
def test_gradients_that_are_switched_on_between_two_layers(path, quick):
    model, ids, q = models.model("llama"), models.tokens(2, 5), V / V.norm()

    def derivative(steering) -> Tensor:
        def switch_on(module, args):
            torch.set_grad_enabled(True)
            leaves.append(args[0].clone().requires_grad_())
            return leaves[-1], *args[1:]

        leaves: list[Tensor] = []
        last = model.model.layers[1]
        with torch.no_grad(), last.register_forward_pre_hook(switch_on), steering:
            logits = model(ids).logits
        return torch.autograd.grad(logits.square().sum(), leaves)[0]

    derived = derivative(fs.steer(model, fs.Plan([fs.Ablate(V, layers="all", at="resid_post")]), path=path))
    assert max(quick, default=0) <= site("resid_post", 0)
    with model.model.layers[0].register_forward_hook(lambda _m, _a, x: x - (x @ q)[..., None] * q):
        by_hand = model.model.layers[1].register_forward_hook(lambda _m, _a, x: x - (x @ q)[..., None] * q)
        expected = derivative(by_hand)
    # Sums in another order, of some hundred terms.
    torch.testing.assert_close(
        derived, expected, rtol=0, atol=100 * torch.finfo(V.dtype).eps * float(expected.abs().max())
    )


def test_a_layer_whose_output_is_not_contiguous_goes_the_full_way(quick, monkeypatch):
    model, ids, plan = models.model("llama"), models.tokens(2, 5), fs.Plan([fs.Add(V, 0.7, layers="all")])
    with torch.no_grad(), fs.steer(model, plan, path="hooks"):
        expected = model(ids).logits
    assert len(quick) == 2
    quick.clear()
    for layer in model.model.layers:
        monkeypatch.setattr(layer, "forward", turned(layer.forward))
    with torch.no_grad(), fs.steer(model, plan, path="hooks"):
        assert torch.equal(model(ids).logits, expected)
    assert not quick


def turned(forward):
    """The same values, in memory with tokens in front of rows."""
    return lambda *args, **kwargs: forward(*args, **kwargs).transpose(0, 1).contiguous().transpose(0, 1)


@pytest.mark.parametrize("gradients", [torch.no_grad, torch.enable_grad])
@pytest.mark.parametrize("path", ["hooks", "fused"])
def test_forward_mode_derivatives_are_those_of_a_hook(path, gradients, quick):
    model = models.build("llama", attn_implementation="eager")
    x = model.get_input_embeddings()(models.tokens(2, 5)).detach()
    tangent, w = torch.randn(x.shape, generator=torch.Generator().manual_seed(0)), W / W.norm()

    def derivative() -> Tensor:
        with gradients(), forward_ad.dual_level():
            logits = model(inputs_embeds=forward_ad.make_dual(x, tangent), use_cache=False).logits
            return forward_ad.unpack_dual(logits).tangent

    layer = model.model.layers[0]
    with layer.register_forward_hook(lambda module, args, output: output - (output @ w).unsqueeze(-1) * w):
        expected = derivative()
    plan = fs.Plan([fs.Ablate(W, layers=0, at="resid_post")])
    with fs.steer(model, plan, path=path):
        torch.testing.assert_close(derivative(), expected, rtol=1e-4, atol=1e-4)
    assert not quick


@pytest.mark.parametrize("path", ["hooks", "fused"])
def test_torch_func_derives_by_states_and_weights_as_of_a_hook(path, quick):
    model = models.build("llama", attn_implementation="eager")
    weights = {name: p.detach() for name, p in model.named_parameters() if "layers.0" in name}
    x, w = model.get_input_embeddings()(models.tokens(2, 5)).detach(), W / W.norm()

    def loss(x, weights):
        output = torch.func.functional_call(model, weights, (), {"inputs_embeds": x, "use_cache": False})
        return output.logits.square().sum()

    tracked = [x.clone().requires_grad_(), *(p.clone().requires_grad_() for p in weights.values())]
    with model.model.layers[0].register_forward_hook(lambda module, args, output: output - (output @ w)[..., None] * w):
        of_hook = torch.autograd.grad(loss(tracked[0], dict(zip(weights, tracked[1:], strict=True))), tracked)
    with fs.steer(model, fs.Plan([fs.Ablate(W, layers=0, at="resid_post")]), path=path):
        of_grad = torch.func.grad(loss, (0, 1))(x, weights)
        of_vjp = torch.func.vjp(loss, x, weights)[1](torch.tensor(1.0))
    for by_x, by_weights in (of_grad, of_vjp):
        torch.testing.assert_close((by_x, *by_weights.values()), of_hook, rtol=1e-4, atol=1e-4)
    assert not quick


@pytest.mark.parametrize("path", ["hooks", "fused"])
@pytest.mark.parametrize("trained", [True, False])
def test_derivatives_along_a_vector_and_a_coefficient_are_those_of_a_hook(path, trained):
    """A tangent is not dropped where nothing requires a gradient besides."""
    model, ids = models.build("llama", attn_implementation="eager"), models.tokens(2, 5)
    values = V.clone().requires_grad_(trained), torch.tensor(0.7, requires_grad=trained)
    tangents = torch.randn(len(V), generator=torch.Generator().manual_seed(0)), torch.tensor(-0.3)

    def hooked(v, c):
        with model.model.layers[0].register_forward_hook(lambda module, args, output: output + c * v):
            return model(ids, use_cache=False).logits

    def steered(v, c):
        with fs.steer(model, fs.Plan([fs.Add(v, c, layers=0, at="resid_post")]), path=path):
            return model(ids, use_cache=False).logits

    for v, c in ((values[0], 0.7), (V, values[1]), values):
        duals = [(x, t) for x, t in zip((v, c), tangents, strict=True) if any(x is y for y in values)]

        def along(run, v=v, c=c, duals=duals):
            with forward_ad.dual_level():
                dual = {id(x): forward_ad.make_dual(x, t) for x, t in duals}
                return forward_ad.unpack_dual(run(dual.get(id(v), v), dual.get(id(c), c))).tangent

        torch.testing.assert_close(along(steered), along(hooked), rtol=1e-4, atol=1e-4)
    expected, of_func = (torch.func.jvp(run, values, tangents)[1] for run in (hooked, steered))
    torch.testing.assert_close(of_func, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("path", ["fused", "hooks"])
def test_functional_gradients(path):
    """`torch.func.grad` over embeddings, by itself and inside `vmap`: those of a hook written by hand."""
    model = models.build("llama", attn_implementation="eager")
    x, w = model.get_input_embeddings()(models.tokens(2, 5)).detach(), W / W.norm()

    def gradients() -> tuple[Tensor, Tensor]:
        gradient = torch.func.grad(lambda each: model(inputs_embeds=each, use_cache=False).logits.square().mean())
        return gradient(x), torch.func.vmap(gradient)(torch.stack([x, x.flip(0)]))

    layer = model.model.layers[0]
    with layer.register_forward_hook(lambda module, args, output: output - (output @ w).unsqueeze(-1) * w):
        expected = gradients()
    with fs.steer(model, fs.Plan([fs.Ablate(W, layers=0, at="resid_post")]), path=path):
        for found, by_hand in zip(gradients(), expected, strict=True):
            torch.testing.assert_close(found, by_hand, rtol=1e-4, atol=1e-6)


@pytest.mark.skipif(ops.backend_for("cpu") != "cpu", reason="of a compiled back end")
@pytest.mark.parametrize("of_func", [False, True], ids=["forward mode", "torch.func"])
def test_a_back_end_without_such_a_derivative_refuses_it(of_func):
    model = models.build("llama", attn_implementation="eager")
    x = model.get_input_embeddings()(models.tokens(2, 5)).detach()
    plan = fs.Plan([fs.Add(V, 0.7, layers="all")])

    def loss(x):
        return model(inputs_embeds=x, use_cache=False).logits.sum()

    refused = pytest.raises(NotImplementedError, match=r"no forward-mode .*torch\.func: use .*backend\('reference'\)")
    with ops.backend("cpu"), fs.steer(model, plan, path="hooks"), refused:
        if of_func:
            torch.func.grad(loss)(x)
        with torch.no_grad(), forward_ad.dual_level():
            loss(forward_ad.make_dual(x, x))


def test_threads_are_served_each_their_own_rows():
    """What a site may call first is shared; it serves the thread that made it alone."""
    model, ids, expected, wrong = models.model("llama"), models.tokens(3, 5), [], []

    @torch.no_grad()
    def run(number: int) -> None:
        rows = ids.roll(number, 0)
        wrong.extend(n for n in range(30) if not torch.equal(model(rows).logits, expected[number]))

    with fs.steer(model, PLANS, path="hooks"):
        with torch.no_grad():
            expected += [model(ids.roll(number, 0)).logits for number in range(3)]
        threads = [threading.Thread(target=run, args=(number,)) for number in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not wrong and not torch.equal(expected[0], expected[1].roll(-1, 0)), "rows have plans of their own"


@torch.no_grad()
def test_a_layer_that_is_compiled_by_itself_stays_compiled():
    model, ids = models.build("llama"), models.tokens(2, 5)
    plan = fs.Plan([fs.Add(V, 0.7, layers="all")])
    with fs.steer(model, plan, path="hooks"):
        expected = model(ids).logits
    torch._dynamo.reset()
    model.model.layers[1].compile(backend="eager", fullgraph=True)
    with fs.steer(model, plan, path="hooks"):
        model(ids)
        with torch._dynamo.config.patch(error_on_recompile=True):
            for _ in range(2):
                torch.testing.assert_close(model(ids).logits, expected)
    torch._dynamo.reset()


def test_what_leaves_a_module_is_steered_in_its_forward_unless_another_context_acts():
    model, plan = models.build("llama"), fs.Plan([fs.Add(V, 0.7, layers="all")])

    def hooked() -> list[tuple[bool, int]]:
        return [("forward" in vars(layer), len(layer._forward_hooks)) for layer in model.model.layers]

    with fs.steer(model, plan, path="hooks"):
        assert hooked() == [(True, 0)] * 2
        with fs.steer(model, plan, path="hooks"):
            assert hooked() == [(True, 1)] * 2
    with fs.hf.read(model), fs.steer(model, plan, path="hooks"):
        assert all(count for _, count in hooked()) and not any(own for own, _ in hooked())
    assert hooked() == [(False, 0)] * 2
