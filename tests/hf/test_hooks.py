"""Single hooks: `hook`, the drop-in for a hand-written forward hook, and `read`."""

from __future__ import annotations

from typing import Any

import models
import pytest
import torch
from test_architectures import hand_hook, logits
from test_hook_points import hooks_of
from torch import Tensor, nn

import faststeer as fs
from faststeer.hf import read

V, W = models.direction(), models.direction(1)


@pytest.fixture
def model() -> nn.Module:
    return models.model("llama")


@pytest.fixture
def ids() -> Tensor:
    return models.tokens(2, 5)


class Wrapped(nn.Module):
    """Passes its hidden states through a Linear and returns them as asked for."""

    def __init__(self, output: str = "tensor") -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inner, self.output = nn.Linear(32, 32), output

    def forward(self, hidden_states: Tensor, scale: float = 1.0) -> Any:
        y = self.inner(hidden_states) * scale
        return {"tensor": y, "tuple": (y, "more", None), "list": [y, "more", None], "dict": {"hidden_states": y}}[
            self.output
        ]


X = torch.randn(2, 3, 32, generator=torch.Generator().manual_seed(2))


class TestHook:
    def test_is_the_hook_that_one_would_write(self, model, ids):
        layer = model.model.layers[0]
        with hand_hook(model, "llama", "resid_post", 0, lambda x: x + 0.7 * V):
            expected = logits(model, ids)
        with layer.register_forward_hook(fs.hook(fs.Add(V, 0.7))):
            assert torch.equal(logits(model, ids), expected)
        assert not torch.equal(logits(model, ids), expected)

    @pytest.mark.parametrize("layer", [0, 1])
    @pytest.mark.parametrize("at", ["resid_pre", "resid_post"])
    def test_of_a_vector_acts_at_its_hook_point(self, at, layer, model, ids):
        intervention = fs.Add(fs.SteeringVector({layer: V}, at=at), 0.7)
        module, call = model.model.layers[layer], fs.hook(intervention)
        right, wrong = module.register_forward_pre_hook, module.register_forward_hook
        if at == "resid_post":
            right, wrong = wrong, right
        with hand_hook(model, "llama", at, layer, lambda x: x + 0.7 * V):
            expected = logits(model, ids)
        with right(call):
            assert torch.equal(logits(model, ids), expected)
        with wrong(call), pytest.raises(ValueError, match=rf"is for {at}.*register it with {right.__name__}"):
            logits(model, ids)
        other = "resid_pre" if at == "resid_post" else "resid_post"  # the other remedy
        with hand_hook(model, "llama", other, layer, lambda x: x + 0.7 * V):
            there = logits(model, ids)
        with wrong(fs.hook(fs.Add(intervention.direction, 0.7, at=other))):
            assert torch.equal(logits(model, ids), there)

    @pytest.mark.parametrize("with_kwargs", [False, True], ids=["", "with_kwargs"])
    @pytest.mark.parametrize("name", ["llama", "gpt2"])
    def test_on_an_output_that_is_a_tuple(self, name, with_kwargs, ids):
        """Attention returns its output and its weights."""
        model, modules = models.model(name), models.MODULES[name]
        attention = model.get_submodule(modules.layers)[1].get_submodule(modules.attn_out)
        with hand_hook(model, name, "attn_out", 1, lambda x: x + 2.0 * V):
            expected = logits(model, ids)
        with attention.register_forward_hook(fs.hook(fs.Add(V, 2.0)), with_kwargs=with_kwargs):
            assert torch.equal(logits(model, ids), expected)

    @pytest.mark.parametrize("with_kwargs", [False, True], ids=["", "with_kwargs"])
    def test_as_a_pre_hook(self, with_kwargs):
        module = Wrapped()
        with module.register_forward_pre_hook(fs.hook(fs.Add(V, 2.0)), with_kwargs=with_kwargs):
            assert torch.equal(module(X, scale=3.0), module.inner(X + 2.0 * V) * 3.0)
            assert torch.equal(module(X, 3.0), module.inner(X + 2.0 * V) * 3.0)

    def test_as_a_pre_hook_of_a_module_called_by_name(self):
        module = Wrapped()
        with module.register_forward_pre_hook(fs.hook(fs.Add(V, 2.0)), with_kwargs=True):
            assert torch.equal(module(scale=3.0, hidden_states=X), module.inner(X + 2.0 * V) * 3.0)
        module.register_forward_pre_hook(fs.hook(fs.Add(V, 2.0)))
        with pytest.raises(ValueError, match="keyword arguments only: register the hook with with_kwargs=True"):
            module(hidden_states=X)

    @pytest.mark.parametrize("output", ["tuple", "list"])
    def test_keeps_the_rest_of_the_output(self, output):
        module = Wrapped(output)
        with module.register_forward_hook(fs.hook(fs.Ablate(V))):
            y, *rest = module(X)
        assert rest == ["more", None]
        assert not torch.equal(y, module(X)[0]) and y.shape == X.shape

    @pytest.mark.parametrize("with_kwargs", [False, True], ids=["", "with_kwargs"])
    def test_an_output_that_it_cannot_steer_is_refused(self, with_kwargs):
        """Not taken for something else in silence."""
        module = Wrapped("dict")
        module.register_forward_hook(fs.hook(fs.Add(V)), with_kwargs=with_kwargs)
        with pytest.raises((TypeError, ValueError), match=r"tuple|tensor|Tensor|dict"):
            module(X)

    @pytest.mark.parametrize("given", [(X, X), torch.tensor(1.0)], ids=["tuple", "number"])
    def test_what_holds_no_hidden_states_is_refused(self, given):
        module = nn.Identity()
        for register in (module.register_forward_pre_hook, module.register_forward_hook):
            with register(fs.hook(fs.Add(V))), pytest.raises(TypeError, match="expected hidden states"):
                module((given,))

    def test_several_interventions_act_in_order(self):
        module = Wrapped()
        gate = fs.Gate(W, 0.1, kind="cosine")
        plan = [
            fs.Add(V, 2.0),
            fs.Ablate(torch.stack([V, W])),
            fs.Rotate(V, W, 30.0, relative=True, when=gate),
            fs.Clamp(W, high=0.1, keep_norm=True),
        ]
        one_by_one = module(X)
        for intervention in plan:
            with nn.Identity().register_forward_hook(fs.hook(intervention)):
                one_by_one = fs.hook(intervention)(module, (), one_by_one)
        with module.register_forward_hook(fs.hook(plan)):
            torch.testing.assert_close(module(X), one_by_one)

    @pytest.mark.parametrize("shape", [(32,), (4, 32), (2, 3, 32), (2, 2, 2, 32), (0, 32)], ids=str)
    def test_any_shape(self, shape):
        x = torch.randn(shape)
        assert torch.equal(fs.hook(fs.Add(V, 2.0))(nn.Identity(), (), x), x + 2.0 * V)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=["bf16", "fp16", "fp64"])
    def test_any_dtype(self, dtype):
        """One hook serves tensors of several dtypes."""
        call, compute = fs.hook(fs.Add(V, 2.0)), torch.promote_types(dtype, torch.float32)
        for x in (X.to(dtype), X):
            wide = x.to(torch.promote_types(x.dtype, compute if x.dtype == dtype else torch.float32))
            assert torch.equal(call(nn.Identity(), (), x), (wide + 2.0 * V.to(wide.dtype)).to(x.dtype))

    def test_not_contiguous(self):
        x = X.transpose(0, 1)
        assert torch.equal(fs.hook(fs.Add(V, 2.0))(nn.Identity(), (), x), x + 2.0 * V)

    def test_the_layer_of_a_vector(self):
        v = fs.SteeringVector({3: V, 5: W}, at="attn_out")
        one = fs.SteeringVector({7: V})
        identity = nn.Identity()
        assert torch.equal(fs.hook(fs.Add(one))(identity, (), X), X + V)
        assert torch.equal(fs.hook(fs.Add(v, layers=5))(identity, (), X), X + W)
        assert torch.equal(fs.hook(fs.Add(v, layers=3))(identity, (), X), X + V)
        with pytest.raises(
            ValueError,
            match=r"the vector has several layers: pass one layer's direction, such as v\[3\], or name the layer",
        ):
            fs.hook(fs.Add(v))
        with pytest.raises(
            ValueError, match=r"name different layers \[3, 5\]: one hook sits at one layer; use steer\(\) for several"
        ):
            fs.hook([fs.Add(v, layers=3), fs.Add(v, layers=5)])
        with pytest.raises(ValueError, match="layer"):
            fs.hook(fs.Add(v, layers=4))(identity, (), X)

    @pytest.mark.parametrize(
        "intervention",
        [
            lambda: fs.Add(V, positions="last"),
            lambda: fs.Add(V, when=fs.Gate(V, latched=True)),
            lambda: fs.Ablate(V, probe=True),
            lambda: fs.Probe(V),
        ],
        ids=["positions", "latched", "probe", "Probe"],
    )
    def test_what_a_single_module_cannot_know_is_refused(self, intervention):
        with pytest.raises(
            ValueError,
            match=r"does not know where the prompt ends nor where to write probes.*use faststeer\.steer\(model, plan\)",
        ):
            fs.hook(intervention())

    def test_wrong_hidden_size(self):
        with pytest.raises(ValueError, match="hidden size 32, the model has 16"):
            fs.hook(fs.Add(V))(nn.Identity(), (), torch.zeros(2, 16))

    @pytest.mark.parametrize("bad", [None, "Add", [V]], ids=["None", "str", "tensor"])
    def test_takes_only_interventions(self, bad):
        with pytest.raises(TypeError):
            fs.hook(bad)

    def test_gradients(self):
        v, v2 = V.clone().requires_grad_(), V.clone().requires_grad_()
        c = torch.tensor(2.0, requires_grad=True)
        x, x2 = X.clone().requires_grad_(), X.clone().requires_grad_()
        fs.hook([fs.Add(v, c), fs.Ablate(W)])(nn.Identity(), (), x).pow(2).sum().backward()
        y = x2 + 2.0 * v2
        q = W / W.norm()
        (y - (y @ q).unsqueeze(-1) * q).pow(2).sum().backward()
        torch.testing.assert_close(x.grad, x2.grad)
        torch.testing.assert_close(v.grad, v2.grad)
        torch.testing.assert_close(c.grad, (v2.grad * V).sum() / 2.0)

    def test_trained_values_are_used_as_they_are_now(self):
        v = V.clone().requires_grad_()
        call = fs.hook(fs.Add(v))
        call(nn.Identity(), (), X)
        with torch.no_grad():
            v.mul_(3.0)
        assert torch.equal(call(nn.Identity(), (), X), X + v)


class TestRead:
    def test_of_the_last_pass(self, model, ids):
        with read(model, at="resid_post") as taken:
            assert taken == {}
            logits(model, ids)
            first = dict(taken)
            logits(model, ids[:1])
            assert taken[0].shape == (1, 5, 32) and first[0].shape == (2, 5, 32)
            assert torch.equal(taken[0], first[0][:1]) or torch.allclose(taken[0], first[0][:1], atol=1e-5)

    def test_some_layers_and_tokens(self, model, ids):
        with read(model, at="attn_out") as everything:
            logits(model, ids)
        with read(model, at="attn_out", layers=[1], tokens=[-1, 0]) as taken:
            logits(model, ids)
        assert list(taken) == [1]
        assert torch.equal(taken[1], everything[1][:, [-1, 0]])

    @pytest.mark.parametrize("at", ["resid_pre", "attn_out", "resid_mid", "mlp_out", "resid_post"])
    def test_layers_from_the_end(self, model, ids, at):
        """Negative layer numbers count from the end, here as everywhere."""
        with read(model, at=at) as everything:
            logits(model, ids)
        with read(model, at=at, layers=[-1]) as taken:
            logits(model, ids)
        (tensor,) = taken.values()
        assert torch.equal(tensor, everything[1])

    def test_is_detached_and_a_copy(self, model, ids):
        with read(model, at="resid_mid") as taken:
            with fs.steer(model, fs.Add(V, layers=0, at="resid_mid")):
                pass
            model(ids)
            before = taken[0].clone()
            logits(model, ids[:, :3])
        assert not before.requires_grad and before.shape == (2, 5, 32)

    def test_what_steering_left_there(self, model, ids):
        with read(model, at="resid_post", layers=[0]) as plain:
            logits(model, ids)
        # By hooks: fused layers norm to rounding.
        steering = fs.steer(model, fs.Add(V, 2.0, layers=0), path="hooks")
        with steering, read(model, at="resid_post", layers=[0]) as inside:
            logits(model, ids)
        assert torch.equal(inside[0], plain[0] + 2.0 * V)
        with read(model, at="resid_post", layers=[0]) as outside, fs.steer(model, fs.Add(V, 2.0, layers=0)):
            logits(model, ids)
        assert torch.equal(outside[0], plain[0]), "entered before: it reads what was there before"

    def test_changes_nothing_and_leaves_nothing(self, ids):
        model = models.build("gpt2")
        fs.hf.find_hook_points(model)
        before, plain = hooks_of(model), logits(model, ids)
        with read(model, at="resid_mid"):
            assert torch.equal(logits(model, ids), plain)
        with pytest.raises(RuntimeError, match="stop"), read(model):
            raise RuntimeError("stop")
        assert hooks_of(model) == before

    @pytest.mark.parametrize(
        ("name", "wrong", "message"),
        [
            ("llama", {"at": "resid"}, "unknown hook point 'resid': expected one of resid_pre"),
            ("llama", {"layers": [0, 2]}, r"layer 2 .*0\.\.1"),
            ("llama", {"at": "resid_post", "layers": [2]}, r"layer 2 .*0\.\.1"),
            ("llama", {"at": "attn_out", "layers": [0, -3]}, r"layer -3 .*0\.\.1"),
            ("phi", {"at": "resid_mid"}, "attention and MLP run in parallel"),
        ],
        ids=["hook_point", "layer", "layer_after_the_last", "layer_before_the_first", "no_resid_mid"],
    )
    def test_refused_and_nothing_left(self, name, wrong, message):
        model = models.build(name)
        fs.hf.find_hook_points(model)
        before = hooks_of(model)
        with pytest.raises(ValueError, match=message), read(model, **wrong):
            pass
        assert hooks_of(model) == before
