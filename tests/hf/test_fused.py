"""Fused layers through the compiled ops: as close to the truth as hooks, and nothing of the model's own lost.

(That steering in fused layers means bit for bit what it means by hooks: test_architectures.py and test_steering.py, in
plain PyTorch.)"""

from __future__ import annotations

from typing import Any

import models
import pytest
import torch
from test_architectures import close, far, generate, logits, rich_plan
from torch import Tensor, nn
from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.olmo2.modeling_olmo2 import Olmo2RMSNorm

import faststeer as fs
from faststeer.hf import fused, read

FUSED = ("llama", "mistral", "mixtral", "qwen2", "qwen3", "qwen3_moe", "gemma2", "gemma3", "phi3", "olmo2")
HOOKS = tuple(name for name in models.ARCHITECTURES if name not in FUSED)
ALL = pytest.mark.parametrize("name", FUSED)


@pytest.fixture
def model() -> nn.Module:
    return models.build("llama")


@pytest.fixture
def ids() -> Tensor:
    return models.tokens(3, 6)


def plans(name: str) -> list[fs.Plan | None]:
    return [rich_plan(name), None, fs.Plan([fs.Add(models.direction(50), 2.0, layers="all")])]


def patched(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if "forward" in module.__dict__]


@ALL
def test_which_are_fused(name):
    steering = fs.steer(models.model(name), [None])
    assert (steering.path, steering.why, steering.backend) == ("fused", "", "cpu")


@pytest.mark.parametrize("name", HOOKS)
def test_which_are_not_and_why(name):
    steering = fs.steer(models.model(name), [None])
    assert steering.path == "hooks" and ("is not made of" in steering.why or "which is no RMSNorm" in steering.why)
    with pytest.raises(RuntimeError, match="path='fused' was chosen, but the layers cannot be fused"):
        fs.steer(models.model(name), [None], path="fused")


@ALL
def test_generates_as_by_hooks(name):
    """Different plans per row, with positions, gates, left padding and a cache."""
    model, batch = models.model(name), models.left_padded([models.tokens(1, n, seed=n)[0] for n in (3, 7, 5)])
    with fs.steer(model, plans(name), path="fused"):
        found = generate(model, batch)
    with fs.backend("reference"), fs.steer(model, plans(name), path="hooks"):
        expected = generate(model, batch)
    close(found, expected)
    assert far(expected[1], generate(model, batch)[1])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@ALL
def test_half_precision_is_as_close_to_the_truth_as_hooks(name, dtype, ids):
    """Both against the same weights in fp32, whose own error is thousands of times smaller."""
    model = models.build(name).to(dtype)
    exact = models.build(name)
    exact.load_state_dict(model.state_dict())
    found = {}
    for path in ("fused", "hooks"):
        with fs.steer(model, plans(name), path=path):
            found[path] = logits(model, ids).float()
    with fs.backend("reference"), fs.steer(exact, plans(name), path="hooks"):
        truth = logits(exact, ids)
    errors = {path: float((x - truth).norm() / truth.norm()) for path, x in found.items()}
    # Two roundings of one random walk: each error is one draw, hence the factor of contract 3 and a floor of one step.
    assert errors["fused"] <= 2 * errors["hooks"] + torch.finfo(dtype).eps, errors


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@ALL
class TestContracts:
    def test_a_row_without_plan_is_the_unsteered_row(self, name, dtype, ids):
        """Contract 1: bit for bit that of the fused model without any plan; so is coefficient 0."""
        model = models.build(name).to(dtype)
        nothing = fs.Plan([fs.Add(models.direction(), 0.0, layers="all"), fs.Ablate(models.direction(), 0.0, layers=0)])
        with fs.steer(model, [None] * 3, path="fused"):
            plain = logits(model, ids)
        with fs.steer(model, [plans(name)[2], None, nothing], path="fused"):
            mixed = logits(model, ids)
        assert torch.equal(mixed[1:], plain[1:]) and not torch.equal(mixed[0], plain[0])

    def test_a_plan_changes_its_own_row_alone(self, name, dtype, ids):
        """Contract 2, where the matrix products have the same shapes."""
        model = models.build(name).to(dtype)
        a, b = plans(name)[0], plans(name)[2]
        with fs.steer(model, [a, None, b], path="fused") as steering:
            first = logits(model, ids)
            steering.assign([a, b, None])
            second = logits(model, ids)
        if name in models.EXPERTS:  # whose matrix products depend on which tokens share an expert
            close(first[0], second[0])
        else:
            assert torch.equal(first[0], second[0])

    def test_leaving_restores_the_model(self, name, dtype, ids):
        """Contract 5, also after an exception."""
        model = models.build(name).to(dtype)
        before = logits(model, ids)
        with pytest.raises(KeyError), fs.steer(model, plans(name), path="fused"):
            logits(model, ids)
            raise KeyError
        assert not patched(model)
        assert torch.equal(logits(model, ids), before)


@pytest.mark.parametrize("name", ["llama", "gemma2", "olmo2"])
class TestTheModelsOwn:
    """What a user sees and does inside: as by hooks."""

    def both(self, name: str, run: Any) -> list[Any]:
        found = []
        for path in ("fused", "hooks"):
            model = models.build(name)
            with fs.steer(model, plans(name), path=path) as steering:
                assert steering.path == path
                found.append(run(model))
        return found

    def test_hidden_states(self, name, ids):
        a, b = self.both(name, lambda m: torch.stack(m(ids, output_hidden_states=True).hidden_states))
        close(a, b)

    def test_activations(self, name, ids):
        def run(model: nn.Module) -> Tensor:
            with read(model, "resid_mid") as mid, read(model, "resid_post") as post, read(model, "mlp_out") as out:
                logits(model, ids)
            return torch.stack([x.view(3, 6, -1) for taken in (mid, post, out) for x in taken.values()])

        close(*self.both(name, run))

    def test_every_norm_is_still_called_with_its_hooks(self, name, ids):
        norms = [n for n, m in models.model(name).named_modules() if "RMSNorm" in type(m).__name__]

        def run(model: nn.Module) -> dict[str, Tensor]:
            seen: dict[str, Tensor] = {}
            for norm in norms:
                module = model.get_submodule(norm)
                module.register_forward_hook(lambda _m, args, out, norm=norm: seen.__setitem__(norm, out.clone()))
            logits(model, ids)
            return seen

        a, b = self.both(name, run)
        assert set(a) == set(b) == set(norms)
        for norm in norms:
            close(a[norm], b[norm])

    @pytest.mark.parametrize("how", ["replaces", "writes"])
    @pytest.mark.parametrize("where", ["layer", "next layer", "norm input", "norm output"])
    def test_hooks_that_change_something_count(self, name, where, how, ids):
        """Also where they write into a tensor that the op has normed already."""
        change = models.direction(77)

        def changed(x: Tensor) -> Tensor:
            return x.add_(change) if how == "writes" else x + change

        def run(model: nn.Module) -> Tensor:
            layers = model.model.layers
            if where == "layer":
                layers[0].register_forward_hook(lambda _m, _a, out: changed(out))
            elif where == "next layer":
                layers[1].register_forward_pre_hook(lambda _m, args: (changed(args[0]), *args[1:]))
            elif where == "norm input":
                norm = getattr(layers[1], "input_layernorm", layers[1].post_attention_layernorm)
                norm.register_forward_pre_hook(lambda _m, args: (changed(args[0].clone()),))
            else:
                model.model.norm.register_forward_hook(lambda _m, _a, out: changed(out))
            return logits(model, ids)

        a, b = self.both(name, run)
        close(a, b)
        with fs.steer(models.model(name), plans(name)):
            assert far(a, logits(models.model(name), ids))

    def test_gradients(self, name, ids):
        def run(model: nn.Module) -> list[Tensor]:
            model.requires_grad_(True)
            model(ids).logits.pow(2).mean().backward()
            return [p.grad for p in model.parameters() if p.grad is not None]

        for a, b in zip(*self.both(name, run), strict=True):
            close(a, b)

    def test_gradients_to_a_vector_and_a_coefficient(self, name, ids):
        found = []
        for path in ("fused", "hooks"):
            v = models.direction(3).requires_grad_()
            c = torch.tensor(1.5, requires_grad=True)
            with fs.steer(models.model(name), fs.Add(v, c, layers=0), path=path):
                models.model(name)(ids).logits.pow(2).mean().backward()
            found.append((v.grad, c.grad))
        for a, b in zip(*found, strict=True):
            close(a, b)

    def test_static_cache(self, name):
        model, batch = models.model(name), models.left_padded([models.tokens(1, n, seed=n)[0] for n in (4, 6)])
        with fs.steer(model, plans(name)[:2], path="fused"):
            dynamic = generate(model, batch)
            static = generate(model, batch, cache_implementation="static", disable_compile=True)
        close(static, dynamic)


class TestContexts:
    plan = fs.Plan([fs.Add(models.direction(1), 2.0, layers="all", at=("resid_mid", "resid_post", "attn_out"))])
    other = fs.Plan([fs.Ablate(models.direction(2), layers="all", at=("resid_mid", "resid_post", "attn_out"))])

    def test_one_inside_another(self, model, ids):
        """The inner one acts by hooks, after the outer one at every hook point."""
        with fs.steer(model, fs.Plan([*self.plan, *self.other]), path="hooks"):
            expected = logits(model, ids)
        with fs.steer(model, self.plan) as outer, fs.steer(model, self.other) as inner:
            assert (outer.path, inner.path) == ("fused", "hooks")
            assert "patched already, by another steer" in inner.why
            close(logits(model, ids), expected)
        assert not patched(model)

    def test_inside_read(self, model, ids):
        """Who entered before sees what was there before."""
        with read(model, "resid_post") as alone:
            logits(model, ids)
        add = fs.Add(models.direction(), 2.0, layers=0)
        with read(model, "resid_post") as seen, fs.steer(model, add) as steering:
            assert steering.path == "hooks" and "inside another" in steering.why
            logits(model, ids)
        assert torch.equal(seen[0], alone[0]) and not torch.equal(seen[1], alone[1])

    def test_fused_was_chosen_and_cannot_be(self, model):
        steering = fs.steer(model, self.plan, path="fused")
        with fs.steer(model, self.plan), pytest.raises(RuntimeError, match="patched already"), steering:
            pass
        assert not patched(model)

    @pytest.mark.parametrize("source", ["argument", "environment"])
    def test_an_unknown_path(self, model, source, monkeypatch):
        if source == "environment":
            monkeypatch.setenv("FASTSTEER_PATH", "fast")
        with pytest.raises(ValueError, match="is 'fast': expected auto, fused or hooks"):
            fs.steer(model, self.plan, path="fast" if source == "argument" else None)

    def test_with_gradient_checkpointing_by_hooks(self, model):
        model.gradient_checkpointing_enable()
        with fs.steer(model, self.plan) as steering:
            assert (steering.path, steering.why) == ("hooks", "gradient checkpointing is on")

    def test_checkpointing_switched_on_inside_is_refused(self, model, ids):
        model.requires_grad_(True).train()
        with fs.steer(model, self.plan, path="fused"):
            model.gradient_checkpointing_enable()
            with pytest.raises(RuntimeError, match="gradient checkpointing was switched on inside"):
                model(ids)

    def test_an_eps_that_was_changed_since_is_seen(self, model, ids):
        """What was found once is found anew where it would not be true any more."""
        for _ in range(2):
            with fs.steer(model, self.plan, path="fused"):
                fused = logits(model, ids)
            with fs.steer(model, self.plan, path="hooks"):
                torch.testing.assert_close(fused, logits(model, ids), rtol=1e-4, atol=1e-5)
            for layer in model.model.layers:
                layer.post_attention_layernorm.variance_epsilon = 0.5

    @pytest.mark.parametrize("compiled", [False, True])
    def test_an_eps_that_is_changed_inside_is_seen(self, model, ids, compiled):
        norms = [each for name, each in model.named_modules() if name.endswith("norm")]
        assert len(norms) == 2 * len(model.model.layers) + 1
        with fs.steer(model, self.plan, path="fused"):
            run = torch.compile(model, backend="eager") if compiled else model
            run(ids)
            for norm in norms:
                norm.variance_epsilon = 0.5
            changed = logits(run, ids)
        with fs.steer(model, self.plan, path="hooks"):
            torch.testing.assert_close(changed, logits(model, ids), rtol=1e-4, atol=1e-5)

    def test_under_autocast(self, model, ids):
        """Branches in bf16, residual stream in fp32."""
        found = []
        for path in ("fused", "hooks"):
            with fs.steer(model, self.plan, path=path), torch.autocast("cpu", torch.bfloat16):
                found.append(logits(model, ids).float())
        close(found[0].to(torch.bfloat16), found[1].to(torch.bfloat16))

    def test_a_forward_that_the_user_put_there_meanwhile_stays(self, model):
        def mine(*_args: Any) -> None: ...

        with fs.steer(model, self.plan):
            model.model.layers[0].forward = mine
        assert model.model.layers[0].forward is mine and patched(model) == ["model.layers.0"]


class TestForms:
    """Each norm is known by what it computes."""

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
    @pytest.mark.parametrize(
        ("norm", "offset", "fp32_weight"),
        [(LlamaRMSNorm, 0.0, False), (Gemma2RMSNorm, 1.0, True), (Olmo2RMSNorm, 0.0, True)],
        ids=["llama", "gemma2", "olmo2"],
    )
    def test_known(self, norm, offset, fp32_weight, dtype):
        form = fused._form(norm(48, eps=1e-5).to(dtype), "norm")
        rounding = form.weight_offset, form.fp32_weight
        assert (form.eps, *rounding) == (1e-5, offset, fp32_weight), "in fp32 as well: the model may be cast later"

    def test_others_are_refused(self):
        class Halved(LlamaRMSNorm):
            def forward(self, x: Tensor) -> Tensor:
                return super().forward(x) / 2

        for norm in (nn.LayerNorm(48), Halved(48), LlamaRMSNorm(48).to("meta")):
            with pytest.raises(fused.CannotFuse, match=r"^norm is a \w+, "):
                fused._form(norm, "norm")

    def test_a_layer_that_computes_something_else_is_not_fused(self, ids):
        model = models.build("llama")
        layer = type(model.model.layers[0])

        class Scaled(layer):
            def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
                return super().forward(hidden_states, *args, **kwargs) * 1.0 + self.mlp(hidden_states) * 1e-3

        model.model.layers[1].__class__ = Scaled
        points = fs.HookPoints("model.layers", "self_attn", "mlp", "post_attention_layernorm", 2, 32)
        found = fused.find_fusion(model, points)
        assert found == "LlamaDecoderLayer computes something else than its modules' names say"
        assert not patched(model)
