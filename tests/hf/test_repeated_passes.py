"""A step of decoding that is like the step before takes what was derived then. Here whatever a pass depends on changes
between two steps, and the next step must be what a hand-written hook makes of it."""

from __future__ import annotations

import copy
import gc
import threading
import weakref
from contextlib import ExitStack
from typing import Any

import models
import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode

import faststeer as fs
from faststeer import ops, program
from faststeer.hf import passes
from faststeer.hf.cache import cache_argument, caches_in
from faststeer.hf.freeze import freeze

V, W = models.direction(), models.direction(1)
PATHS = pytest.mark.parametrize("path", ["hooks", "fused"])


def add(vector: Tensor, **where: Any) -> fs.Plan:
    return fs.Plan([fs.Add(vector, 1.0, layers="all", at="resid_post", **where)])


@pytest.fixture
def derived(monkeypatch) -> list[int]:
    """The lengths of the passes of which something was derived."""
    lengths: list[int] = []
    own = passes.Inputs.of

    def of(given: Any, traced: bool) -> passes.Inputs:
        inputs = own(given, traced)
        lengths.append(inputs.length)
        return inputs

    monkeypatch.setattr(passes.Inputs, "of", of)
    return lengths


class Decoding:
    """A steered model whose last step was like the one before."""

    def __init__(self, path: str, plans: Any = None) -> None:
        self.model: Any = models.build("llama", attn_implementation="eager")
        self.steering = fs.steer(self.model, add(V) if plans is None else plans, path=path)
        self.ids = models.tokens(2, 8)
        self.cache: Any = None

    def __enter__(self) -> Decoding:
        self.contexts = ExitStack()
        self.contexts.enter_context(torch.no_grad())
        self.contexts.enter_context(self.steering)
        self.begin()
        return self

    def __exit__(self, *exception: object) -> None:
        self.contexts.close()

    def begin(self) -> None:
        """A prompt and three steps."""
        output = self.model(self.ids[:, :5], use_cache=True)
        (self.cache,) = caches_in(output)
        for column in (5, 6, 7):
            self.step(self.ids[:, column : column + 1])

    def step(self, ids: Tensor | None = None, cache: Any = None, **more: Any) -> Tensor:
        tokens = {"input_ids": self.ids[:, :1] if ids is None else ids} | more
        cache = self.cache if cache is None else cache
        return self.model(**tokens, **{cache_argument(self.model): cache}).logits

    def check(self, vectors: Tensor, ids: Tensor | None = None, **more: Any) -> None:
        """The next step adds `vectors`, `[hidden]`, `[batch, 1, hidden]` or by token, at every layer."""
        cache = copy.deepcopy(self.cache)
        steered = self.step(ids, **more)
        self.contexts.close()

        def hook(module: nn.Module, args: Any, output: Tensor) -> Tensor:
            return (output + vectors).to(output.dtype)

        with ExitStack() as hooks, torch.no_grad():
            for layer in self.model.model.layers:
                hooks.enter_context(layer.register_forward_hook(hook))
            expected = self.step(ids, cache, **more)
        torch.testing.assert_close(steered, expected, rtol=1e-5, atol=1e-5)


@PATHS
def test_a_step_like_the_one_before_derives_nothing(path, derived):
    with Decoding(path) as decoding:
        assert derived == [5, 1], "the prompt and the first step"
        decoding.check(V)
    assert derived == [5, 1]


@PATHS
@pytest.mark.parametrize(
    "plans", [add(W), None, [None, add(W)], [add(W), add(V)]], ids=["other", "none", "row", "rows"]
)
def test_other_plans(path, plans):
    rows = {0: W, 1: 0 * V, 2: torch.stack([0 * V, W])[:, None], 3: torch.stack([W, V])[:, None]}
    with Decoding(path) as decoding:
        number = 0 if isinstance(plans, fs.Plan) else 1 if plans is None else 2 if plans[0] is None else 3
        decoding.steering.assign([None, None] if plans is None else plans)
        decoding.check(rows[number])


@PATHS
@pytest.mark.parametrize(("positions", "acts"), [("prompt", 0), ("generated", 1), (3, 1), (2, 0)], ids=str)
def test_a_plan_with_positions(path, positions, acts):
    """The steps before, which derived nothing, are counted."""
    with Decoding(path) as decoding:
        decoding.steering.assign(add(W, positions=positions))
        decoding.check(acts * W)


@PATHS
def test_a_plan_with_positions_after_the_cache_was_emptied_and_filled_again(path):
    with Decoding(path) as decoding:
        for layer in decoding.cache.layers:
            layer.keys, layer.values = layer.keys[:, :, :0], layer.values[:, :, :0]
        for column in range(3):  # a prompt of one token, like a step
            decoding.step(decoding.ids[:, column : column + 1])
        decoding.steering.assign(add(W, positions=2))
        decoding.check(W)


@PATHS
def test_a_plan_with_positions_from_the_start(path):
    with Decoding(path, add(W, positions=3)) as decoding:
        decoding.check(W)


@PATHS
def test_a_new_cache_whose_prompt_is_like_a_step(path):
    with Decoding(path) as decoding:
        (decoding.cache,) = caches_in(decoding.model(decoding.ids[:, :1], use_cache=True))
        decoding.step()
        decoding.steering.assign(add(W, positions=1))
        decoding.check(W)


@PATHS
def test_a_generation_that_goes_on_with_the_cache(path):
    """Its prompt, of one new token, ends behind column 8."""
    with Decoding(path) as decoding:
        ids = torch.cat([decoding.ids, decoding.ids[:, :1]], 1)
        settings = {"max_new_tokens": 2, "min_new_tokens": 2, "do_sample": False}
        decoding.model.generate(ids, **settings, **{cache_argument(decoding.model): decoding.cache})
        decoding.steering.assign(add(W, positions=1))
        decoding.check(W)


@PATHS
def test_a_vector_in_training(path):
    vector = V.clone().requires_grad_()
    with Decoding(path, add(vector)) as decoding:
        vector.data.copy_(W)
        decoding.check(W)


@PATHS
def test_a_latched_gate_behind_a_prompt_that_is_set(path):
    """The steps before belong to the prompt: the gate of a plan that comes later is undecided, which is no error."""
    with Decoding(path) as decoding:
        decoding.steering.set_prompt(10)
        decoding.step()
        decoding.step()
        decoding.steering.assign(add(W, when=fs.Gate(V, latched=True)))
        decoding.check(0 * W)


@PATHS
def test_a_prompt_is_set(path):
    with Decoding(path) as decoding:
        decoding.steering.set_prompt(8)
        decoding.step()
        decoding.steering.assign(add(W, positions=1))
        decoding.check(W)


@PATHS
def test_rows_are_set(path):
    with Decoding(path, [add(V), add(W)]) as decoding:
        decoding.steering.set_rows(torch.tensor([[1, -1], [0, 0], [0, 1]], dtype=torch.int32), 2)
        decoding.check(torch.stack([W, 0 * V])[:, None])
    with Decoding(path, [add(V), add(W)]) as decoding:
        decoding.steering.set_rows(torch.tensor([[1, -1], [0, 0], [0, 1]], dtype=torch.int32), 2)
        decoding.step()
        decoding.steering.set_rows(None)
        decoding.check(torch.stack([V, W])[:, None])


@PATHS
def test_more_tokens(path):
    with Decoding(path) as decoding:
        decoding.check(V, decoding.ids[:, :3])


@PATHS
def test_embeddings(path):
    with Decoding(path) as decoding:
        embeds = decoding.model.get_input_embeddings()(decoding.ids[:, :1])
        decoding.check(V, input_ids=None, inputs_embeds=embeds)


@PATHS
def test_another_cache_of_another_number_of_rows(path):
    with Decoding(path) as decoding:
        ids = models.tokens(3, 5, seed=1)
        (decoding.cache,) = caches_in(decoding.model(ids, use_cache=True))
        decoding.step(ids[:, :1])
        decoding.steering.assign(add(W, positions=1))
        decoding.check(W, ids[:, :1])


@PATHS
def test_a_plan_for_each_row_and_another_number_of_rows(path):
    with Decoding(path, [add(V), add(W)]) as decoding, pytest.raises(ValueError, match="the batch has 3 rows"):
        decoding.step(models.tokens(3, 1))


@PATHS
def test_beams_of_two_plans_are_no_batch_outside_of_generate(path):
    with Decoding(path, [add(V), add(W)]) as decoding:
        settings = {"max_new_tokens": 4, "num_beams": 2, "do_sample": False, "return_dict_in_generate": True}
        (cache,) = caches_in(decoding.model.generate(decoding.ids, **settings))
        with pytest.raises(ValueError, match="the batch has 4 rows"):
            decoding.step(models.tokens(4, 1), cache)


@PATHS
def test_sequences_one_after_another(path):
    with Decoding(path, [add(V), add(W)]) as decoding, pytest.raises(ValueError, match="packed"):
        decoding.step(cu_seq_lens_q=torch.tensor([0, 1, 2]))


@PATHS
def test_a_generation_between_two_steps(path):
    with Decoding(path) as decoding:
        settings = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
        before = decoding.model.generate(decoding.ids, **settings)
        decoding.step()
        assert torch.equal(decoding.model.generate(decoding.ids, **settings), before)
        decoding.steering.assign(add(W, positions=4))
        decoding.check(W)


@PATHS
@pytest.mark.parametrize("mode", [torch.inference_mode, torch.enable_grad])
def test_gradients_and_inference_mode(path, mode):
    with Decoding(path) as decoding, mode():
        ids = decoding.ids[:, :1].clone()
        cache = copy.deepcopy(decoding.cache)
        weight = decoding.model.model.layers[0].mlp.up_proj.weight.requires_grad_()
        logits = decoding.step(ids)
        assert logits.requires_grad == (mode is torch.enable_grad)
        assert logits.is_inference() == (mode is torch.inference_mode)
        if logits.requires_grad:
            logits.sum().backward()
            assert weight.grad is not None and weight.grad.abs().max() > 0
        with torch.no_grad():
            torch.testing.assert_close(logits, decoding.step(ids.clone(), cache))


def test_gradients_behind_inference_where_rows_are_made_for_each_pass():
    """Rows that were made in inference mode cannot be saved for a backward pass."""
    with Decoding("hooks") as decoding:
        decoding.contexts.close()
        model, plan = decoding.model, add(V)
        weight = model.model.layers[0].mlp.up_proj.weight.requires_grad_()
        with freeze(model, plan, "qk"):
            with torch.inference_mode():
                decoding.begin()
            for layer in decoding.cache.layers:
                layer.keys, layer.values = layer.keys.clone(), layer.values.clone()
            decoding.step(decoding.ids[:, :1].clone()).sum().backward()
    assert weight.grad is not None and weight.grad.abs().max() > 0


@PATHS
def test_autocast(path):
    with Decoding(path) as decoding, torch.autocast("cpu", torch.bfloat16):
        cache = copy.deepcopy(decoding.cache)
        steered = decoding.step()
        decoding.steering.assign(add(V.clone()))  # nothing of the step before holds
        assert torch.equal(steered, decoding.step(cache=cache))


@PATHS
def test_another_dtype(path):
    """The same steering at a model that was converted inside of it."""
    with Decoding(path) as decoding:
        decoding.model.to(torch.bfloat16)
        decoding.begin()
        cache = copy.deepcopy(decoding.cache)
        steered = decoding.step()
        decoding.steering.assign(add(V.clone()))
        assert steered.dtype == torch.bfloat16 and torch.equal(steered, decoding.step(cache=cache))


class Seen(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.add(str(function))
        return function(*args, **kwargs or {})


@pytest.mark.skipif(ops.backend_for("cpu") != "cpu", reason="of a compiled back end")
@PATHS
def test_a_mode_of_torch_sees_the_op(path):
    with Decoding(path) as decoding, Seen() as seen:
        decoding.step()
    assert any(name.startswith("faststeer.") for name in seen.names)


@PATHS
def test_another_back_end(path, monkeypatch):
    called: list[str] = []
    for name in ("steer", "add_steer_rmsnorm"):
        own = getattr(ops.reference, name)
        monkeypatch.setattr(ops.reference, name, lambda *a, own=own, name=name: (called.append(name), own(*a))[1])
    with Decoding(path) as decoding:
        called.clear()
        with ops.backend("reference"):
            decoding.step()
        assert called
        called.clear()
        decoding.step()
        assert not called or ops.backend_for("cpu") == "reference"


@PATHS
def test_forward_mode_derivatives(path):
    with Decoding(path, fs.Plan([fs.Ablate(W, layers="all", at="resid_post")])) as decoding:
        weight = decoding.model.model.layers[0].mlp.up_proj.weight
        tangent = torch.randn(weight.shape, generator=torch.Generator().manual_seed(0))
        caches = [copy.deepcopy(decoding.cache) for _ in range(2)]

        def derivative(cache: Any) -> Tensor:
            with forward_ad.dual_level():
                changed = {"model.layers.0.mlp.up_proj.weight": forward_ad.make_dual(weight.detach(), tangent)}
                given = {"input_ids": decoding.ids[:, :1], cache_argument(decoding.model): cache}
                logits = torch.func.functional_call(decoding.model, changed, (), given).logits
                return forward_ad.unpack_dual(logits).tangent

        steered = derivative(caches[0])
        decoding.steering.assign(fs.Plan([fs.Ablate(W.clone(), layers="all", at="resid_post")]))
        torch.testing.assert_close(steered, derivative(caches[1]))
        assert steered.abs().max() > 0


@PATHS
def test_another_thread_goes_on_with_the_cache(path):
    with Decoding(path) as decoding:
        steps: list[Tensor] = []
        cache = copy.deepcopy(decoding.cache)

        @torch.no_grad()
        def run() -> None:
            steps.extend(decoding.step() for _ in range(3))

        thread = threading.Thread(target=run)
        thread.start()
        thread.join()
        assert all(torch.equal(each, decoding.step(cache=cache)) for each in steps) and len(steps) == 3
        decoding.steering.assign(add(W, positions=6))
        decoding.check(W)


@PATHS
def test_an_interrupted_change_is_seen(path, monkeypatch):
    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    with Decoding(path) as decoding:
        with monkeypatch.context() as patches, pytest.raises(KeyboardInterrupt):
            patches.setattr(program, "send", interrupted)
            decoding.steering.assign(add(W))
        with pytest.raises(RuntimeError, match="interrupted"):
            decoding.step()
        decoding.steering.assign(add(W))
        decoding.check(W)


@PATHS
def test_left_and_entered_again(path):
    """What was read in between was not steered: nobody knows where the prompt ends."""
    with Decoding(path) as decoding:
        decoding.contexts.close()
        with torch.no_grad():
            decoding.step()
            with decoding.steering as steering:
                decoding.step()
                steering.assign(add(W, positions="generated"))
                with pytest.raises(ValueError, match="filled outside"):
                    decoding.step()


@PATHS
def test_the_cache_is_not_kept_alive(path):
    with Decoding(path) as decoding:
        cache = weakref.ref(decoding.cache)
        decoding.cache = None
        gc.collect()
        assert cache() is None


def test_a_layer_called_by_itself_between_two_steps_is_refused():
    with Decoding("hooks") as decoding:
        x, base = torch.zeros(2, 1, 32), decoding.model.model
        rotary = base.rotary_emb(x, torch.zeros(2, 1, dtype=torch.long))
        with pytest.raises(RuntimeError, match="outside the model's forward pass"):
            base.layers[0](x, position_embeddings=rotary)


@PATHS
def test_replicas_are_refused(path):
    with Decoding(path) as decoding, pytest.raises(RuntimeError, match="DataParallel"):
        [module._replicate_for_data_parallel() for module in decoding.model.modules()]
    assert [module._replicate_for_data_parallel() for module in decoding.model.modules()]
