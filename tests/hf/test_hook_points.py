"""Hook points are found in every architecture, are the tensors that docs/design.md says they are, and what has none is
refused."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import models
import pytest
import torch
from torch import Tensor, nn

import faststeer as fs
from faststeer.hf import find_hook_points, read
from faststeer.hf.hook_points import quiet

ALL = pytest.mark.parametrize("name", models.ARCHITECTURES)
SEQUENTIAL = pytest.mark.parametrize("name", [name for name in models.ARCHITECTURES if name not in models.PARALLEL])


def hooks_of(model: nn.Module) -> dict[str, Any]:
    """All that hooking could leave on a model."""
    kinds = (
        "_forward_hooks",
        "_forward_pre_hooks",
        "_forward_hooks_with_kwargs",
        "_forward_pre_hooks_with_kwargs",
        "_forward_hooks_always_called",
    )
    found: dict[str, Any] = {
        f"{name}.{kind}": list(getattr(module, kind).items())
        for name, module in model.named_modules()
        for kind in kinds
        if getattr(module, kind)
    }
    return found | {"attributes": sorted(model.__dict__), "modes": [module.training for module in model.modules()]}


def first(output: Any) -> Tensor:
    return output if isinstance(output, Tensor) else output[0]


def by_hand(model: nn.Module, name: str, ids: Tensor) -> dict[str, list[Tensor]]:
    """Each hook point's tensor in each layer, taken with hooks on the modules that a person would name."""
    modules, taken = models.MODULES[name], {}
    layers, handles = model.get_submodule(modules.layers), []

    def take(at: str, layer: int, tensor: Tensor) -> None:
        taken[at, layer] = tensor.detach().clone()

    def on_input(at: str, i: int):
        return lambda _module, args, kwargs: take(at, i, args[0] if args else kwargs["hidden_states"])

    def on_output(at: str, i: int):
        return lambda _module, _args, output: take(at, i, first(output))

    for i, layer in enumerate(layers):
        handles.append(layer.register_forward_pre_hook(on_input("resid_pre", i), with_kwargs=True))
        handles.append(layer.register_forward_hook(on_output("resid_post", i)))
        handles += [
            layer.get_submodule(getattr(modules, at)).register_forward_hook(on_output(at, i))
            for at in ("attn_out", "mlp_out")
        ]
        if modules.resid_mid:
            handles.append(
                layer.get_submodule(modules.resid_mid).register_forward_pre_hook(
                    on_input("resid_mid", i), with_kwargs=True
                )
            )
    with torch.no_grad():
        model(ids)
    for handle in handles:
        handle.remove()
    return {at: [taken[at, i].view(*ids.shape, -1) for i in range(len(layers))] for at in models.points(name)}


def taken(model: nn.Module, at: str, ids: Tensor) -> list[Tensor]:
    with read(model, at=at) as found, torch.no_grad():
        model(ids)
    return [found[layer].view(*ids.shape, -1) for layer in sorted(found)]


@ALL
def test_found(name):
    model = models.build(name)
    before = hooks_of(model)
    points = find_hook_points(model)
    assert (points.layers, points.n_layers, points.hidden_size) == (
        models.MODULES[name].layers,
        models.N_LAYERS,
        models.HIDDEN,
    )
    assert (points.resid_mid is None) is (name in models.PARALLEL)
    assert hooks_of(model) == before


@ALL
def test_each_is_the_documented_tensor(name):
    """The same bits as hand-placed hooks see, and as a forward pass reports in its hidden states."""
    model, ids = models.model(name), models.tokens(2, 7)
    expected = by_hand(model, name, ids)
    for at in models.points(name):
        for layer, tensor in enumerate(taken(model, at, ids)):
            assert torch.equal(tensor, expected[at][layer]), f"{at} of layer {layer}"
    with torch.no_grad():
        hidden_states = model(ids, output_hidden_states=True).hidden_states
    for layer in range(models.N_LAYERS):
        assert torch.equal(expected["resid_pre"][layer], hidden_states[layer])


@ALL
def test_the_residual_stream_is_their_sum(name):
    """mid = pre + attention, post = mid + MLP; in parallel, post = pre + attention + MLP: to the rounding of a sum."""
    model, ids = models.model(name), models.tokens(2, 7, seed=1)
    pre, attn, mlp, post = (
        torch.stack(taken(model, at, ids)) for at in ("resid_pre", "attn_out", "mlp_out", "resid_post")
    )
    torch.testing.assert_close(post, pre + attn + mlp)
    assert torch.equal(pre[1:], post[:-1])
    assert all(t.abs().amax() > 0.1 for t in (pre, attn, mlp)), "a branch of zeros would prove nothing"
    if name not in models.PARALLEL:
        mid = torch.stack(taken(model, "resid_mid", ids))
        assert torch.equal(mid, pre + attn) and torch.equal(post, mid + mlp)


@SEQUENTIAL
def test_resid_mid_reaches_both_branches(name):
    """A steered layer is what its own submodules make of the steered middle: the residual branch and the MLP both take
    it."""
    model, ids, v = models.model(name), models.tokens(2, 7), models.direction()
    layer = model.get_submodule(models.MODULES[name].layers)[1]
    unsteered = {at: taken(model, at, ids)[1] for at in ("resid_mid", "resid_post")}
    with fs.backend("reference"), fs.steer(model, fs.Add(v, 1.5, layers=1, at="resid_mid")):
        post = taken(model, "resid_post", ids)[1]
    middle = unsteered["resid_mid"] + 1.5 * v
    with torch.no_grad():
        expected = middle + first(models.MODULES[name].branch(layer, middle)).view_as(middle)
    assert torch.equal(post, expected)
    assert not torch.equal(post, unsteered["resid_post"] + 1.5 * v), "the MLP must see it too"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=["bf16", "fp16", "fp64"])
@ALL
def test_found_in_every_dtype(name, dtype):
    if dtype == torch.float64 and name in models.EXPERTS:
        pytest.skip("PyTorch's grouped matrix product, which the experts use, has no fp64")
    found, known = find_hook_points(models.build(name).to(dtype)), find_hook_points(models.model(name))
    assert (found.layers, found.n_layers, found.hidden_size) == (known.layers, known.n_layers, known.hidden_size)
    assert (found.resid_mid is None) is (known.resid_mid is None)


def test_a_known_model_is_not_run_again():
    model = models.build("llama")
    points, runs = fs.steer(model, fs.Add(models.direction(), layers=0)).points, []
    with model.register_forward_hook(lambda *_: runs.append(1)):
        assert find_hook_points(model) == points
        fs.steer(model, fs.Add(models.direction(), layers=0))
    assert not runs


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt", "neox_parallel"])
def test_a_model_in_training_with_dropout(name):
    """Found without its dropout; afterwards every module is in the mode that it was in."""
    key = {"llama": "attention_dropout", "gpt2": "resid_pdrop", "opt": "dropout", "neox_parallel": "hidden_dropout"}[
        name
    ]
    model = models.build(name, **{key: 0.5}).train()
    model.get_submodule(models.MODULES[name].layers)[0].eval()
    before = hooks_of(model)
    assert find_hook_points(model).n_layers == models.N_LAYERS
    assert hooks_of(model) == before


def test_one_layer():
    assert find_hook_points(models.build("llama", num_hidden_layers=1)).n_layers == 1


@pytest.mark.parametrize("path", ["hooks", "fused"])
def test_quiet_shows_the_model_without_our_contexts(path):
    """And with the hooks of others, in evaluation mode; behind it all is as before."""
    model, ids = models.build("llama").train(), models.tokens(1, 5)
    model.lm_head.register_forward_hook(lambda _module, _args, output: 2 * output)
    plain = model.eval()(ids).logits
    with fs.steer(model.train(), fs.Add(models.direction(), 3.0, layers="all"), path=path), read(model):
        before, steered = hooks_of(model), model(ids).logits
        with quiet(model):
            assert torch.equal(model(ids).logits, plain) and not model.training and not torch.is_grad_enabled()
        assert hooks_of(model) == before and torch.equal(model(ids).logits, steered)
    assert not torch.equal(steered, plain)


def test_the_base_model_alone():
    model, ids = models.model("llama"), models.tokens(2, 5)
    assert find_hook_points(model.model).layers == "layers"
    plan = fs.Plan(
        [
            fs.Add(models.direction(), 2.0, layers=0),
            fs.Ablate(models.direction(1), layers=1, at="attn_out", positions="last"),
        ]
    )
    with torch.no_grad():
        with fs.steer(model, plan):
            expected = model(ids, output_hidden_states=True).hidden_states[-1]
        with fs.steer(model.model, plan):
            assert torch.equal(model.model(ids).last_hidden_state, expected)


def test_a_deep_copy_is_a_model_of_its_own():
    import copy

    model, ids, plan = models.build("llama"), models.tokens(1, 5), fs.Add(models.direction(), 3.0, layers=0)
    find_hook_points(model)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        plain = model(ids).logits
        with fs.steer(twin, plan):
            assert torch.equal(model(ids).logits, plain)
            steered = twin(ids).logits
        assert not torch.equal(steered, plain) and torch.equal(twin(ids).logits, plain)
        with fs.steer(model, plan):
            assert torch.equal(model(ids).logits, steered)


# Models of one's own ------------------------------------------------------------------------------


class Block(nn.Module):
    """Pre-norm, with names that nobody else uses."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.n1, self.mix = nn.LayerNorm(hidden), nn.Linear(hidden, hidden)
        self.n2, self.think = nn.LayerNorm(hidden), nn.Sequential(nn.Linear(hidden, hidden), nn.Tanh())

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.mix(self.n1(x))
        return x + self.think(self.n2(x))


class Own(nn.Module):
    def __init__(self, block: type[nn.Module] = Block, hidden: int = 16) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.stack, self.head = (
            nn.Embedding(11, hidden),
            nn.ModuleList([block(hidden) for _ in range(3)]),
            nn.Linear(hidden, 11),
        )

    def get_input_embeddings(self) -> nn.Module:
        return self.embed

    def forward(self, input_ids: Tensor, use_cache: bool = False) -> Tensor:
        x = self.embed(input_ids)
        for block in self.stack:
            x = block(x)
        return self.head(x)


class PostNorm(Block):
    """The norm is on the stream itself: no sum of branches passes through."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.n1(x + self.mix(x))
        return self.n2(x + self.think(x))


class Named(Block):
    """Called by name, with a name of its own."""

    def forward(self, *, states: Tensor) -> Tensor:
        return super().forward(states)


class NamedOwn(Own):
    """Gives a dict, as many models do that are nobody's library."""

    def __init__(self) -> None:
        super().__init__(Named)

    def forward(self, input_ids: Tensor) -> dict[str, Any]:
        x = self.embed(input_ids)
        for block in self.stack:
            x = block(states=x)
        return {"loss": None, "logits": self.head(x)}


class SortedOwn(Own):
    """Runs the rows in another order."""

    def forward(self, input_ids: Tensor, use_cache: bool = False) -> Tensor:
        order = input_ids[:, 0].argsort()
        return super().forward(input_ids[order])[order.argsort()]


def test_layers_and_outputs_of_other_names():
    model, v, ids = NamedOwn().eval(), torch.ones(16), torch.tensor([[1, 2, 3], [4, 5, 6]])
    with model.embed.register_forward_hook(lambda _module, _args, out: out + v):
        expected = model(ids)["logits"]
    with fs.steer(model, fs.Add(v, layers=0, at="resid_pre")):
        assert torch.equal(model(ids)["logits"], expected)


def test_rows_in_another_order_take_one_plan():
    model, v, ids = SortedOwn().eval(), torch.ones(16), torch.tensor([[5, 2], [1, 3]])
    with pytest.raises(ValueError, match="computes a row from the other rows of its batch"):
        fs.steer(model, [fs.Add(v, layers=1), None])
    with model.stack[1].register_forward_hook(lambda _module, _args, out: out + v):
        expected = model(ids)
    with fs.steer(model, fs.Add(v, layers=1)):
        assert torch.equal(model(ids), expected)


BY_HAND = fs.HookPoints(layers="stack", attn_out="mix", mlp_out="think", resid_mid="n2")


class TestModelsOfOnesOwn:
    def test_found_or_named_is_the_same(self):
        model = Own()
        found, named = find_hook_points(model), find_hook_points(Own(), BY_HAND)
        assert found == named
        assert (found.layers, found.attn_out, found.mlp_out, found.resid_mid) == ("stack", "mix", "think", "n2")
        assert (found.n_layers, found.hidden_size) == (3, 16)

    @pytest.mark.parametrize("given", [None, BY_HAND], ids=["found", "named"])
    def test_steered(self, given):
        model, v, ids = (
            Own().requires_grad_(False),
            torch.randn(16, generator=torch.Generator().manual_seed(1)),
            torch.tensor([[1, 2, 3]]),
        )
        with fs.steer(model, fs.Add(v, 2.0, layers=1, at="resid_mid", positions="last"), hook_points=given):
            steered = model(ids)
        x = model.stack[0](model.embed(ids))
        middle = x + model.stack[1].mix(model.stack[1].n1(x))
        middle[:, -1] += 2.0 * v
        expected = model.head(model.stack[2](middle + model.stack[1].think(model.stack[1].n2(middle))))
        torch.testing.assert_close(steered, expected)
        assert hooks_of(model)["attributes"] == hooks_of(Own())["attributes"]


class TestRefused:
    def check(self, model: nn.Module, message: str, points: fs.HookPoints | None = None) -> None:
        before = hooks_of(model)
        with pytest.raises(ValueError, match=message):
            fs.steer(model, fs.Plan(), hook_points=points)
        assert hooks_of(model) == before

    HOW_TO_MEND = r"register_forward_hook\(faststeer\.hook\(\.\.\.\)\)"

    def test_no_layers(self):
        class Flat(Own):
            def forward(self, input_ids: Tensor, use_cache: bool = False) -> Tensor:
                return self.head(self.embed(input_ids))

        self.check(Flat(), f"Flat: no ModuleList whose members pass one tensor.*{self.HOW_TO_MEND}")

    def test_around_a_language_model(self):
        """What the message says to do works."""

        class Around(torch.nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.parts = torch.nn.ModuleDict({"lm": models.build("llama")})

            def forward(self, batch: dict[str, Tensor]) -> Tensor:
                return self.parts["lm"](**batch).logits

        around, batch = Around(), {"input_ids": models.tokens(1, 4)}
        self.check(around, "Around.forward takes no input_ids: give the language model inside of it")
        plain = around(batch)
        with fs.steer(around.parts["lm"], fs.Add(models.direction(), layers=0, positions="last"), path="hooks"):
            changed = (around(batch) != plain).any(-1)
        assert changed.tolist() == [[False, False, False, True]]

    def test_no_values(self):
        self.check(models.build("llama").to("meta"), "LlamaForCausalLM is on the meta device and holds no values")

    @pytest.mark.parametrize("value", [float("nan"), float("inf")])
    @pytest.mark.parametrize("layer", [0, 1, 2])
    def test_states_that_are_not_finite(self, layer, value):
        model = models.build("llama", num_hidden_layers=3)
        with torch.no_grad():
            model.model.layers[layer].mlp.down_proj.weight[0, 0] = value
        message = rf"LlamaForCausalLM: model\.layers\.{layer} gives NaN or infinity.*bfloat16 or float32"
        self.check(model, message)
        self.check(model, message, fs.HookPoints("model.layers"))

    def test_lists_of_parts_are_no_layers(self):
        """As in XLM: a list of attentions and a list of MLPs."""

        class Parts(Own):
            def forward(self, input_ids: Tensor, use_cache: bool = False) -> Tensor:
                x = self.embed(input_ids)
                for block in self.stack:
                    x = x + block(x)
                return self.head(x)

        self.check(Parts(), f"Parts: no ModuleList whose members pass one tensor.*{self.HOW_TO_MEND}")
        self.check(Parts(), "Parts: the members of stack do not pass one tensor", fs.HookPoints(layers="stack"))

    def test_two_stacks(self):
        class Two(Own):
            def __init__(self) -> None:
                super().__init__()
                self.more = nn.ModuleList([Block(16) for _ in range(3)])

            def forward(self, input_ids: Tensor, use_cache: bool = False) -> Tensor:
                x = self.embed(input_ids)
                for block in [*self.stack, *self.more]:
                    x = block(x)
                return self.head(x)

        self.check(
            Two(),
            r"Two: stack and more are two stacks of layers: name one, steer\(\.\.\., hook_points=HookPoints\(layers=",
        )
        assert find_hook_points(Two(), fs.HookPoints(layers="more")).n_layers == 3

    def test_a_pass_that_cannot_be_told(self):
        """Layers in a dictionary that nobody calls, in a module that runs twice, and with more columns than tokens."""

        class Stack(nn.Module):
            def __init__(self, stack: nn.ModuleList) -> None:
                super().__init__()
                self.stack = stack

            def forward(self, x: Tensor) -> Tensor:
                for block in self.stack:
                    x = block(x)
                return x

        class Held(Own):
            def __init__(self, times: int) -> None:
                super().__init__()
                self.held = Stack(self.stack) if times else nn.ModuleDict({"stack": self.stack})
                self.times = times
                del self.stack

            def forward(self, input_ids: Tensor, use_cache: bool = False) -> Tensor:
                x = self.embed(input_ids)
                for block in [] if self.times else self.held["stack"]:
                    x = block(x)
                for _ in range(self.times):
                    x = self.held(x)
                return self.head(x)

        class Wider(Own):
            def forward(self, input_ids: Tensor, use_cache: bool = False) -> Tensor:
                x = self.embed(input_ids).repeat(1, 2, 1)
                for block in self.stack:
                    x = block(x)
                return self.head(x)

        self.check(Held(0), "held, which holds the layers, is not called itself")
        self.check(Held(2), "held runs 2 times in one forward pass")
        self.check(Wider(), "its layers take 8 columns of hidden states for 4 tokens")
        assert find_hook_points(Held(1)).layers == "held.stack"

    def test_one_branch_is_named(self):
        self.check(Own(), "layer 0 is given one of attn_out and mlp_out", fs.HookPoints("stack", attn_out="mix"))
        self.check(Own(), "attn_out has 2 names for 3 layers", fs.HookPoints("stack", ("mix", "mix"), "think"))

    @pytest.mark.parametrize(
        "wrong",
        [
            {"layers": "model.blocks"},
            {"layers": "model"},
            {"layers": "model.norm"},
            {"layers": ""},
            {"attn_out": "attention"},
            {"mlp_out": "ffn"},
            {"resid_mid": "ln_2"},
            {"resid_mid": "input_layernorm"},
            {"resid_mid": "mlp"},
            {"attn_out": "mlp", "mlp_out": "self_attn"},
            {"attn_out": "input_layernorm"},
            {"attn_out": "self_attn.q_proj"},
            {"attn_out": "mlp.gate_proj"},
            {"mlp_out": "post_attention_layernorm"},
            {"mlp_out": "mlp.up_proj"},
        ],
        ids=str,
    )
    def test_wrong_names(self, wrong):
        """Not there, or there and something else than what it is said to be: neither may pass."""
        right = {
            "layers": "model.layers",
            "attn_out": "self_attn",
            "mlp_out": "mlp",
            "resid_mid": "post_attention_layernorm",
        }
        self.check(models.build("llama"), "LlamaForCausalLM", fs.HookPoints(**(right | wrong)))

    def test_layers_that_have_two_names(self):
        """Whichever is given, the points are those by the name that is found first."""
        model = Own()
        model.register_module("also", model.stack)
        found = find_hook_points(Own())
        assert find_hook_points(model, dataclasses.replace(BY_HAND, layers="also")) == found
        assert find_hook_points(model, BY_HAND) == found

    def test_a_branch_that_runs_twice_and_one_of_another_size(self):
        class Twice(Block):
            def forward(self, x: Tensor) -> Tensor:
                return super().forward(x) + 0 * self.mix(x)

        what = r"layer 0 does not move its output as it should: each must run once .* of the residual stream's size"
        self.check(Own(Twice), what, BY_HAND)
        wide = {"attn_out": "self_attn", "mlp_out": "mlp.up_proj", "resid_mid": "post_attention_layernorm"}
        self.check(models.build("llama"), what, fs.HookPoints("model.layers", **wide))

    def test_right_names(self):
        right = fs.HookPoints(
            layers="model.layers", attn_out="self_attn", mlp_out="mlp", resid_mid="post_attention_layernorm"
        )
        assert find_hook_points(models.build("llama"), right) == find_hook_points(models.model("llama"))

    def test_experts_are_not_layers(self):
        """A list that a forward pass does not reach in a row, or not at all."""
        wrong = fs.HookPoints(layers="spare", attn_out="self_attn", mlp_out="mlp", resid_mid="post_attention_layernorm")
        model = models.build("llama")
        model.spare = nn.ModuleList(type(model.model.layers[0])(model.config, i) for i in range(2))
        self.check(model, "LlamaForCausalLM", wrong)
        assert find_hook_points(model).layers == "model.layers"

    def test_nothing_stays_on_a_model_that_fails_in_the_middle(self):
        model = models.build("llama")

        def fail(*_args):
            raise RuntimeError("broken layer")

        handle = model.model.layers[1].mlp.register_forward_hook(fail)
        before = hooks_of(model)
        with pytest.raises(RuntimeError, match="broken layer"):
            find_hook_points(model)
        assert hooks_of(model) == before
        handle.remove()
        assert find_hook_points(model).n_layers == 2


class Turned(Own):
    """Keeps its hidden states as [tokens, batch, hidden], or flat."""

    def __init__(self, flat: bool) -> None:
        super().__init__()
        self.flat = flat

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embed(input_ids).transpose(0, 1).contiguous()
        shape = x.shape
        x = x.reshape(-1, shape[-1]) if self.flat else x
        for block in self.stack:
            x = block(x)
        return self.head(x.reshape(shape).transpose(0, 1))


@pytest.mark.parametrize("flat", [False, True])
def test_hidden_states_of_another_layout_are_refused(flat):
    with pytest.raises(ValueError, match=r"hidden states as \[.*in \[batch, tokens, hidden\] alone"):
        find_hook_points(Turned(flat))


@pytest.mark.parametrize("layers", [(0, 0, 1), (0, 1, 1), (0, 1, 0)])
def test_a_layer_that_stands_twice_is_refused(layers):
    for model, name in ((Own(), "stack"), (models.build("llama"), "model.layers")):
        stack = model.get_submodule(name)
        model.set_submodule(name, nn.ModuleList([stack[i] for i in layers]))
        with pytest.raises(ValueError, match=rf"a module stands twice in {name}.*copy it"):
            find_hook_points(model)


def test_layers_that_share_a_module_have_no_branches():
    model, ids, v = models.build("llama"), models.tokens(2, 5), models.direction()
    model.model.layers[1].mlp = model.model.layers[0].mlp
    points = find_hook_points(model)
    assert points.attn_out is None and points.has("resid_pre", 1) and points.has("resid_post", 0)
    with pytest.raises(
        ValueError, match="Add at mlp_out of layer 1, which that layer of LlamaForCausalLM does not have"
    ):
        fs.steer(model, fs.Add(v, layers=1, at="mlp_out"))
    steered_as_by_hand(model, "model.layers", ids, v)
    model.model.layers[1].mlp = copy.deepcopy(model.model.layers[0].mlp)
    assert find_hook_points(model).mlp_out == "mlp"


# Layers of which the inside is not seen -------------------------------------------------------------------------------


def steered_as_by_hand(model: nn.Module, path: str, ids: Tensor, v: Tensor) -> None:
    """Adding v to what layer 1 gives is a plain hook on that layer."""

    def add(_module: nn.Module, _args: Any, output: Any) -> Any:
        return output + v if isinstance(output, Tensor) else (output[0] + v, *output[1:])

    def run() -> Tensor:
        output = model(ids)
        return output if isinstance(output, Tensor) else output.logits

    with torch.no_grad():
        plain = run()
        with model.get_submodule(path)[1].register_forward_hook(add):
            expected = run()
        with fs.steer(model, fs.Add(v, 1.0, layers=1)):
            assert torch.equal(run(), expected)
        assert torch.equal(run(), plain) and not torch.equal(expected, plain)


class Scaled(Block):
    """The branches are scaled behind their modules."""

    def forward(self, x: Tensor) -> Tensor:
        x = x + 0.5 * self.mix(self.n1(x))
        return x + 0.5 * self.think(self.n2(x))


class OneOfThree(Block):
    """Layer 1 has another name for its mixer, layer 2 scales it."""

    def __init__(self, hidden: int) -> None:
        super().__init__(hidden)
        self.other, self.kind = nn.Linear(hidden, hidden), 0

    def forward(self, x: Tensor) -> Tensor:
        x = x + (self.other(self.n1(x)) if self.kind == 1 else self.mix(self.n1(x)) * (0.5 if self.kind == 2 else 1))
        return x + self.think(self.n2(x))


def own_of_three() -> nn.Module:
    model = Own(OneOfThree)
    for i, block in enumerate(model.stack):
        block.kind = i
    return model


class TestLayersAlone:
    @pytest.mark.parametrize("block", [PostNorm, Scaled])
    @pytest.mark.parametrize("named", [None, fs.HookPoints(layers="stack")], ids=["found", "named"])
    def test_are_steered_at_their_ends(self, block, named):
        model = Own(block).requires_grad_(False)
        points = find_hook_points(model, named)
        assert (points.layers, points.attn_out, points.mlp_out, points.resid_mid) == ("stack", None, None, None)
        steered_as_by_hand(model, "stack", torch.tensor([[1, 2, 3]]), models.direction(0, 16))
        assert fs.steer(model, [None]).path == "hooks"

    @pytest.mark.parametrize("at", ["attn_out", "resid_mid", "mlp_out"])
    def test_what_a_layer_lacks_is_refused(self, at):
        model = Own(Scaled)
        what = (
            rf"at {at} of layer 0, which that layer of Own does not have: it has resid_pre, resid_post; no layer has it"
        )
        with pytest.raises(ValueError, match=f"Add {what}"):
            fs.steer(model, fs.Add(models.direction(0, 16), layers="all", at=at))
        with pytest.raises(ValueError, match=rf"read\(...\) looks {what}"):
            read(model, at=at)

    def test_names_differ_from_layer_to_layer(self):
        model, v = own_of_three().requires_grad_(False), models.direction(0, 16)
        points, ids = find_hook_points(model), torch.tensor([[1, 2, 3]])
        assert points.attn_out == ("mix", "other", None) and points.resid_mid == ("n2", "n2", None)
        by_hand = fs.HookPoints("stack", ("mix", "other", None), ("think", "think", None), ("n2", "n2", None))
        assert find_hook_points(own_of_three(), by_hand) == points
        with pytest.raises(ValueError, match=r"Ablate at attn_out of layer 2, .*layers=\[0, 1\] have it"):
            fs.steer(model, fs.Ablate(v, layers="all", at="attn_out"))
        with model.stack[1].other.register_forward_hook(lambda _m, _a, output: output + v):
            expected = model(ids)
        with fs.steer(model, fs.Add(v, 1.0, layers=1, at="attn_out")):
            assert torch.equal(model(ids), expected)

    def test_a_latched_gate_looks_where_there_is_something(self):
        gate = fs.Gate(models.direction(1, 16), latched=True, layer=0, at="mlp_out")
        with pytest.raises(ValueError, match="a gate at mlp_out of layer 0, which"):
            fs.steer(Own(Scaled), fs.Add(models.direction(0, 16), layers=1, when=gate))

    def test_branches_that_are_not_confirmed_by_hand(self):
        with pytest.raises(
            ValueError, match=r"of layer 0 does not move its output.*HookPoints\(layers='stack'\) alone"
        ):
            find_hook_points(Own(Scaled), BY_HAND)

    def test_analyses_say_what_they_need(self):
        with pytest.raises(ValueError, match="fold needs layers that each add attention and an MLP"):
            fs.folding.fold(Own(Scaled), fs.Add(models.direction(0, 16), layers=1))


class Between(Own):
    """Something happens between layers 1 and 2."""

    def forward(self, input_ids: Tensor, use_cache: bool = False) -> Tensor:
        x = self.embed(input_ids)
        for i, block in enumerate(self.stack):
            x = block(x / 2 if i == 2 else x)
        return self.head(x)


class Looped(Own):
    """The layers run twice."""

    def forward(self, input_ids: Tensor, use_cache: bool = False) -> Tensor:
        x = self.embed(input_ids)
        for _ in range(2):
            for block in self.stack:
                x = block(x)
        return self.head(x)


class InnerLoop(Own):
    """Layer 1 runs three times."""

    def forward(self, input_ids: Tensor, use_cache: bool = False) -> Tensor:
        x = self.embed(input_ids)
        for i in (0, 1, 1, 1, 2):
            x = self.stack[i](x)
        return self.head(x)


class Streams(Own):
    """Four residual streams for each token."""

    def __init__(self, axis: int) -> None:
        super().__init__()
        self.axis = axis

    def forward(self, input_ids: Tensor, use_cache: bool = False) -> Tensor:
        x = self.embed(input_ids)
        x = torch.stack([x, 2 * x, x.roll(1, -1), -x], self.axis)
        for block in self.stack:
            x = block(x)
        return self.head(x.mean(self.axis))


class TestStacks:
    ids, v = torch.tensor([[1, 2, 3], [4, 5, 6]]), models.direction(0, 16)

    @pytest.mark.parametrize("model_class", [Between, Looped, InnerLoop])
    def test_steered_in_every_call(self, model_class):
        steered_as_by_hand(model_class().requires_grad_(False), "stack", self.ids, self.v)

    @pytest.mark.parametrize(
        ("model_class", "missing"),
        [(Between, [2]), (Looped, []), (InnerLoop, [1, 2])],
        ids=lambda x: getattr(x, "__name__", ""),
    )
    def test_resid_pre_is_where_it_is_resid_post_of_the_layer_before(self, model_class, missing):
        points = find_hook_points(model_class())
        assert points.missing == tuple(("resid_pre", i) for i in missing)
        for i in missing:
            with pytest.raises(ValueError, match=f"Add at resid_pre of layer {i}, which that layer"):
                fs.steer(model_class(), fs.Add(self.v, layers=i, at="resid_pre"))

    @pytest.mark.parametrize("axis", [0, 2])
    def test_all_streams_of_a_token_are_steered(self, axis):
        model = Streams(axis).requires_grad_(False)
        steered_as_by_hand(model, "stack", self.ids, self.v)
        plain = model(self.ids)
        with fs.steer(model, [fs.Add(self.v, layers=1, positions="last"), None]):
            steered = model(self.ids)
        assert torch.equal(steered[1], plain[1]) and torch.equal(steered[0, :-1], plain[0, :-1])
        assert not torch.equal(steered[0, -1], plain[0, -1])
        with read(model, at="resid_post", layers=[0], tokens=[-1]) as taken:
            model(self.ids)
        assert taken[0].shape == (2, 1, 16)

    @pytest.mark.parametrize("more", [{"when": fs.Gate(v)}, {"probe": True}], ids=["gate", "probe"])
    def test_streams_have_no_one_row_to_look_at(self, more):
        with pytest.raises(ValueError, match="Ablate: Streams keeps 4 residual streams for each token"):
            fs.steer(Streams(0), fs.Ablate(self.v, layers=1, **more))

    def test_loops_have_no_one_row_to_look_at(self):
        v = models.direction(0, 16)
        for more in ({"probe": True}, {"when": fs.Gate(v, latched=True)}):
            with pytest.raises(ValueError, match="Ablate: Looped runs a layer 2 times in a pass"):
                fs.steer(Looped(), fs.Ablate(v, layers=1, **more))
        fs.steer(Looped(), fs.Ablate(v, layers=1, when=fs.Gate(v)))
