"""Folded = steered: against hooks written by hand in fp64, and against the library's own; saved and loaded again; and
what cannot be folded is refused with the reason, before anything is changed.

Where bounds come from: a fold in fp64 is exact to fp64 rounding. A fold in fp32 differs from it by one rounding of each
weight (checked weight by weight), and its logits by what that rounding does to them (run in fp64) plus what fp32
PyTorch does to any logits of this model (twice the unsteered model's own error, as in docs/design.md).
"""

from __future__ import annotations

import copy
import functools
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import hypothesis
import models
import peft
import pytest
import torch
import transformers
from hypothesis import strategies as st
from torch import Tensor, nn

import faststeer as fs
from faststeer.folding import FoldError, fold

d, v = models.direction(1), models.direction(2)
EVERYWHERE = ("resid_pre", "attn_out", "mlp_out")
Change = Callable[[Tensor], Tensor]


def ablation(direction: Tensor, strength: float = 1.0) -> Change:
    q = direction.double() / direction.double().norm()
    return lambda h: h - strength * (h @ q)[..., None] * q


def addition(direction: Tensor, coefficient: float) -> Change:
    return lambda h: h + coefficient * direction.double()


def clamping(direction: Tensor, value: float) -> Change:
    q = direction.double() / direction.double().norm()
    return lambda h: h + (value - h @ q)[..., None] * q


def everywhere(change: Change) -> list[tuple[str, int, Change]]:
    return [(at, layer, change) for layer in range(models.N_LAYERS) for at in EVERYWHERE]


# A plan, and the same by hand: (hook point, layer, what h becomes), in order.
PLANS: dict[str, tuple[fs.Plan, list[tuple[str, int, Change]]]] = {
    "ablate": (fs.Plan([fs.Ablate(d, layers="all", at=EVERYWHERE)]), everywhere(ablation(d))),
    "stream": (
        fs.Plan([fs.Ablate(d, layers="all", at=("resid_pre", "resid_mid", "resid_post"))]),
        [(at, n, ablation(d)) for n in range(2) for at in ("resid_pre", "resid_mid", "resid_post")],
    ),
    "add": (fs.Plan([fs.Add(v, 0.7, layers=0)]), [("resid_post", 0, addition(v, 0.7))]),
    "add_mid": (fs.Plan([fs.Add(v, -0.7, layers=1, at="resid_mid")]), [("resid_mid", 1, addition(v, -0.7))]),
    "add_first": (fs.Plan([fs.Add(v, 0.7, layers=0, at="resid_pre")]), [("resid_pre", 0, addition(v, 0.7))]),
    # The ablation of later sites takes the addition's component away again, which only a constant can do.
    "both": (
        fs.Plan([fs.Ablate(d, layers="all", at=EVERYWHERE), fs.Add(v, 0.7, layers=1, at="resid_pre")]),
        [
            *[(at, 0, ablation(d)) for at in EVERYWHERE],
            ("resid_pre", 1, ablation(d)),
            ("resid_pre", 1, addition(v, 0.7)),
            *[(at, 1, ablation(d)) for at in EVERYWHERE[1:]],
        ],
    ),
    "half": (
        fs.Plan([fs.Ablate(d, 0.5, layers="all", at=("attn_out", "mlp_out"))]),
        [(at, n, ablation(d, 0.5)) for n in range(2) for at in ("attn_out", "mlp_out")],
    ),
    "clamp": (fs.Plan([fs.Clamp(d, 2.0, 2.0, layers=1, at="mlp_out")]), [("mlp_out", 1, clamping(d, 2.0))]),
}
NEEDS_BIAS = {"add", "both", "clamp"}  # where the MLP writes


@contextmanager
def by_hand(model: nn.Module, name: str, changes: list[tuple[str, int, Change]]) -> Iterator[None]:
    """Hooks as a person would write them, computing in the tensor's own dtype."""
    where, handles = models.MODULES[name], []

    def output(change: Change) -> Callable:
        def hook(module, args, out):
            return change(out) if isinstance(out, Tensor) else (change(out[0]), *out[1:])

        return hook

    def entering(change: Change) -> Callable:
        def hook(module, args, kwargs):
            return (
                ((change(args[0]), *args[1:]), kwargs)
                if args
                else (args, kwargs | {"hidden_states": change(kwargs["hidden_states"])})
            )

        return hook

    def middle(change: Change) -> Callable:
        def hook(module, args):
            args[0].copy_(change(args[0]))

        return hook

    for at, layer, change in changes:
        block = model.get_submodule(where.layers)[layer]
        if at == "resid_pre":
            handles.append(block.register_forward_pre_hook(entering(change), with_kwargs=True))
        elif at == "resid_post":
            handles.append(block.register_forward_hook(output(change)))
        elif at == "resid_mid":
            handles.append(block.get_submodule(where.resid_mid).register_forward_pre_hook(middle(change)))
        else:
            handles.append(block.get_submodule(getattr(where, at)).register_forward_hook(output(change)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def logits(model: nn.Module, ids: Tensor | None = None) -> Tensor:
    with torch.no_grad():
        return model(models.tokens(2, 12) if ids is None else ids, use_cache=False).logits.double()


def widened(model: nn.Module) -> nn.Module:
    """A copy in fp64, in which norms do not go through fp32."""
    wide = copy.deepcopy(model).double()
    for norm in wide.modules():
        if type(norm).__name__.endswith("RMSNorm"):
            norm.forward = lambda x, norm=norm: (
                norm.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + norm.variance_epsilon))
            )
    return wide


def exact(model: nn.Module, name: str, plan: str) -> Tensor:
    with by_hand(widen := widened(model), name, PLANS[plan][1]):
        return logits(widen)


def foldable(name: str, plan: str) -> bool:
    return not (name == "qwen3" and plan in NEEDS_BIAS)


# All of a plan's kinds on one architecture; on the others, and tied, those that change other things there.
NORMAL = {
    *(("llama", plan, False) for plan in PLANS),
    *((name, plan, tied) for name in ("qwen3", "gpt2") for plan in ("ablate", "add_mid") for tied in (False, True)),
    *(("llama", plan, True) for plan in ("ablate", "both", "add_first")),
    *(("gpt2", plan, True) for plan in ("both", "add_first")),
}


def cases(names: tuple[str, ...], normal: set[tuple[str, str, bool]]) -> list:
    listed = [(name, plan, tied) for name in names for plan in PLANS for tied in (False, True)]
    return [pytest.param(*case, marks=() if case in normal else pytest.mark.full) for case in listed]


CASES = [case for case in cases(("llama", "qwen3", "gpt2"), NORMAL) if foldable(*case.values[:2])]


@functools.cache
def folded_once(name: str, plan: str, tied: bool) -> tuple[nn.Module, dict[str, Tensor], fs.folding.Folded]:
    """A model, its weights before, and its fold."""
    model = models.build(name, tie_word_embeddings=tied)
    return model, copy.deepcopy(model.state_dict()), fold(model, PLANS[plan][0])


@pytest.mark.parametrize(("name", "plan", "tied"), CASES)
class TestFoldedIsSteered:
    def test_logits(self, name, plan, tied):
        model, _, done = folded_once(name, plan, tied)
        truth, plain = exact(model, name, plan), logits(widened(model))
        # 1e-9: fp64 rounding, amplified a millionfold; a wrong fold is off by the steering's own size.
        in_fp64 = fold(widened(model), PLANS[plan][0]).model
        assert (logits(in_fp64) - truth).abs().max() <= 1e-9 * truth.abs().max()
        assert (truth - plain).abs().max() > 1e-2 * truth.abs().max()

        folded = done.model
        wide = dict(in_fp64.named_parameters())
        for key, weight in folded.named_parameters():
            # A directions' component taken out leaves cancellation behind: one rounding of what was there before.
            before = dict(model.named_parameters()).get(key, weight).double().abs()
            assert ((weight.double() - wide[key]).abs() <= 2.0**-24 * (wide[key].abs() + before)).all(), key
        rounding = (logits(widened(folded)) - truth).abs().max()
        fp32 = 2 * (logits(model) - plain).abs().max()
        assert (logits(folded) - truth).abs().max() <= rounding + fp32

    def test_greedy_tokens(self, name, plan, tied):
        model, _, folded = folded_once(name, plan, tied)
        how = {"max_new_tokens": 8, "do_sample": False, "attention_mask": torch.ones(2, 8, dtype=torch.long)}
        with fs.steer(model, PLANS[plan][0]):
            steered = model.generate(models.tokens(2, 8), **how)
        assert torch.equal(folded.model.generate(models.tokens(2, 8), **how), steered)
        assert folded.check.equal == folded.check.tokens == 64

    def test_saved_and_loaded(self, name, plan, tied, tmp_path):
        model, before, folded = folded_once(name, plan, tied)
        folded.save(tmp_path / "folded")
        back = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "folded").eval()
        assert torch.equal(logits(back), logits(folded.model))
        assert (tmp_path / "folded" / "faststeer_fold.json").is_file()
        # The model given stays as it was, tied or not.
        after = model.state_dict()
        assert after.keys() == before.keys() and all(torch.equal(after[key], before[key]) for key in before)
        assert (model.lm_head.weight is model.get_input_embeddings().weight) == tied
        assert model.config.tie_word_embeddings == tied and not getattr(model.config, "mlp_bias", False)


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(n, marks=() if n in ("gemma2", "neox_parallel", "mixtral", "opt", "phi3") else pytest.mark.full)
        for n in models.ARCHITECTURES
    ],
)
def test_every_architecture_is_right_or_refused(name):
    """`fold` compares with the hooks itself and raises where it is wrong; only post-norms are refused."""
    model = models.build(name)
    sandwich = name in ("gemma2", "gemma3", "olmo2")
    plan = fs.Plan([fs.Ablate(d, layers="all", at=EVERYWHERE)])
    if sandwich:
        with pytest.raises(FoldError, match=r"attention of layer 0 .*Norm after its last projection: an ablation"):
            fold(model, plan)
    else:
        check = fold(model, plan).check
        assert check.difference <= check.tolerance
    # What enters the first layer is written by the embedding alone, which has no norm after it.
    check = fold(model, fs.Add(v, 0.7, layers=0, at="resid_pre")).check
    assert check.difference <= check.tolerance


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_half_dtypes(name, dtype):
    model = models.build(name).to(dtype)
    folded = fold(model, PLANS["ablate"][0], in_place=True)
    assert folded.model is model and model.dtype == dtype
    assert folded.check.difference <= folded.check.tolerance
    # Orthogonal to the rounding of the weights.
    embedding = model.get_input_embeddings().weight
    left = (embedding.double() @ d.double()) / d.double().norm()
    assert left.abs().max() <= torch.finfo(dtype).eps / 2 * embedding.double().norm(dim=1).max()


class TestRefused:
    @pytest.mark.parametrize(
        ("intervention", "message"),
        [
            (fs.Ablate(d, layers=1), "Ablate at resid_post of layer 1 also changes what the embedding wrote"),
            (fs.Ablate(d, layers="all"), "what the embedding wrote, which the layers in between have read"),
            (fs.Ablate(d, 0.5, layers="all", at=EVERYWHERE), "at resid_pre of layer 1 also changes"),
            (fs.Ablate(d, layers=0, at="resid_mid"), "what the embedding wrote"),
            (
                fs.Ablate(fs.SteeringVector({0: d, 1: v}), layers="all", at=EVERYWHERE),
                "Ablate at resid_pre of layer 1 also changes what the embedding wrote",
            ),
            (fs.Add(v, layers=0, positions="generated"), "acts at some positions only"),
            (fs.Add(v, layers=0, when=fs.Gate(d)), "has a gate"),
            (fs.Add(v, layers=0, when=fs.Gate(d, latched=True)), "has a gate"),
            (fs.Add(v, layers=0, keep_norm=True), "keeps the norm"),
            (fs.Clamp(d, low=1.0, layers=0, at="mlp_out"), "clips where a projection is out of bounds"),
            (fs.Rotate(d, v, 30, layers=0, at="mlp_out"), "turns every row by its own angle"),
            (fs.Probe(d, layers=0), "no probe"),
            (fs.Ablate(d, layers="all", at=EVERYWHERE, probe=True), "no probe"),
            (fs.Add(v, 0.0, layers=0), "the plan changes nothing"),
        ],
        ids=[
            *("late", "post_only", "half", "mid", "directions", "positions", "gate", "latched", "norm", "clamp"),
            *("rotate", "probe", "probing", "nothing"),
        ],
    )
    def test_with_the_reason(self, intervention, message):
        model = models.model("llama")
        with pytest.raises(FoldError, match=message):
            fold(model, intervention, in_place=True)
        assert all(
            torch.equal(a, b) for a, b in zip(model.parameters(), models.build("llama").parameters(), strict=True)
        )

    def test_no_bias_anywhere(self):
        with pytest.raises(FoldError, match=r"Qwen3ForCausalLM has no bias at model.layers.0.mlp.down_proj.*--adapter"):
            fold(models.model("qwen3"), fs.Add(v, layers=0))

    def test_shared_weights(self):
        model = models.build("llama")
        layers = model.model.layers
        layers[1].mlp.down_proj.weight = layers[0].mlp.down_proj.weight
        with pytest.raises(FoldError, match=r"down_proj.weight is shared with model\.layers"):
            fold(model, PLANS["ablate"][0])

    def test_quantised_weights(self):
        class Linear4bit(nn.Linear):
            pass

        model = models.build("llama")
        model.model.layers[1].mlp.down_proj.__class__ = Linear4bit
        with pytest.raises(FoldError, match="Linear4bit, no plain linear layer: is it quantised"):
            fold(model, PLANS["ablate"][0])

    def test_a_model_that_is_being_steered(self):
        model = models.build("llama")
        with fs.steer(model, PLANS["add"][0]), pytest.raises(FoldError, match="leave steer"):
            fold(model, PLANS["add"][0])

    def test_the_check_sees_a_wrong_fold(self, monkeypatch):
        """A fold that forgets one writer is told from rounding."""
        from faststeer.folding import weights

        write = weights._write
        monkeypatch.setattr(weights, "_write", lambda w: None if w.name == "the MLP of layer 1" else write(w))
        for name, dtype in (("llama", torch.float32), ("gpt2", torch.bfloat16)):
            with pytest.raises(FoldError, match="the folded model is not the steered one"):
                fold(models.build(name).to(dtype), PLANS["ablate"][0])

    def test_folders_that_are_there_and_failed_saves(self, tmp_path, monkeypatch):
        folded = fold(models.model("llama"), PLANS["half"][0])
        (tmp_path / "there").mkdir()
        (tmp_path / "there" / "file").touch()
        with pytest.raises(ValueError, match="is there already"):
            folded.save(tmp_path / "there")
        monkeypatch.setattr(folded.model, "save_pretrained", lambda path: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            folded.save(tmp_path / "new")
        assert [path.name for path in tmp_path.iterdir()] == ["there"]

    def test_weights_of_another_class(self):
        class Packed(torch.Tensor):
            pass

        model = models.build("llama")
        linear = model.model.layers[1].mlp.down_proj
        linear.weight = nn.Parameter(linear.weight.data.as_subclass(Packed), requires_grad=False)
        with pytest.raises(FoldError, match=r"down_proj\.weight is a Packed: fold into plain weights"):
            fold(model, PLANS["ablate"][0])

    def test_what_was_saved_is_loaded_and_compared(self, tmp_path, monkeypatch):
        folded = fold(models.model("llama"), PLANS["half"][0])
        save = folded.model.save_pretrained

        def save_other(path):
            weights = folded.model.state_dict() | {"lm_head.weight": torch.zeros_like(folded.model.lm_head.weight)}
            save(path, state_dict=weights)

        monkeypatch.setattr(folded.model, "save_pretrained", save_other)
        with pytest.raises(FoldError, match=r"lm_head\.weight of the saved LlamaForCausalLM is not what is in memory"):
            folded.save(tmp_path / "new")
        assert not list(tmp_path.iterdir())

    @pytest.mark.parametrize("tokens", [torch.ones(3), torch.full((1, 2), 1000), torch.zeros(0, 4, dtype=torch.long)])
    def test_tokens_that_are_none(self, tokens):
        with pytest.raises(ValueError, match="tokens has"):
            fold(models.model("llama"), PLANS["half"][0], tokens=tokens)


def test_several_directions_and_a_relative_rotation():
    model = models.model("llama")
    subspace = torch.stack([d, v, models.direction(3)])
    square = v - (v @ d) / (d @ d) * d
    two = [fs.Ablate(each, layers="all", at=EVERYWHERE) for each in (d, square)]
    for plan in (
        fs.Plan([fs.Ablate(subspace, layers="all", at=EVERYWHERE)]),
        fs.Plan([fs.Rotate(d, v, 40, relative=True, layers=0, at="mlp_out")]),
        fs.Plan([fs.Project(subspace, layers=1, at="attn_out")]),
        fs.Plan(two),
    ):
        check = fold(model, plan).check
        assert check.difference <= check.tolerance and check.equal == check.tokens
    # One after the other, ablations of two directions that are not orthogonal never end: each brings the other back.
    with pytest.raises(FoldError, match="Ablate at resid_pre of layer 1 also changes what the embedding wrote"):
        fold(model, fs.Plan([fs.Ablate(each, layers="all", at=EVERYWHERE) for each in (d, v)]))


@st.composite
def interventions(draw: st.DrawFn) -> fs.Intervention:
    """Linear ones, at sites where they often can be folded."""
    a, b = (models.direction(draw(st.integers(0, 3))), models.direction(draw(st.integers(4, 6))))
    branches = draw(st.sampled_from(["attn_out", "mlp_out", ("attn_out", "mlp_out")]))
    anywhere = draw(st.sampled_from(["resid_pre", "resid_post", "attn_out", "mlp_out"]))
    layers = draw(st.sampled_from([0, 1, "all"]))
    number = draw(st.sampled_from([-1.5, 0.25, 1.0, 2.0]))
    kind = draw(
        st.sampled_from(["add", "add", "everywhere", "everywhere", "ablate", "clamp", "rotate", "project", "first"])
    )
    return {
        "add": lambda: fs.Add(a, number, layers=layers, at=anywhere),
        "everywhere": lambda: fs.Ablate(a, layers="all", at=EVERYWHERE),
        "ablate": lambda: fs.Ablate(torch.stack([a, b]), number, layers=layers, at=branches),
        "clamp": lambda: fs.Clamp(a, number, number, layers=layers, at=branches),
        "rotate": lambda: fs.Rotate(a, b, 50 * number, relative=True, layers=layers, at=branches),
        "project": lambda: fs.Project(torch.stack([a, b]), layers=layers, at=branches),
        "first": lambda: fs.Ablate(a, number, layers=0, at="resid_pre"),
    }[kind]()


@hypothesis.settings(
    parent=hypothesis.settings(),
    max_examples=300 if os.environ.get("FASTSTEER_TEST_PROFILE") == "full" else 8,
    suppress_health_check=list(hypothesis.HealthCheck),
    phases=(hypothesis.Phase.explicit, hypothesis.Phase.generate),
)
@hypothesis.given(plan=st.lists(interventions(), min_size=1, max_size=4).map(fs.Plan))
@pytest.mark.parametrize("name", ["gpt2", "neox_parallel"])
def test_any_plan_is_folded_right_or_refused_before(name, plan):
    """`fold` decides from the plan alone whether it can; its comparison with the hooks must never find it wrong."""
    try:
        check = fold(models.model(name), plan).check
    except FoldError as error:
        assert "also changes what" in str(error) or "changes nothing" in str(error)
    else:
        assert check.difference <= check.tolerance


# What is saved is what was folded -------------------------------------------------------------------------------------


@pytest.mark.parametrize("wrapped", [True, False], ids=["peft model", "model inside"])
def test_a_model_with_an_adapter_is_refused_and_merged_it_can_be_folded(wrapped, tmp_path):
    config = peft.LoraConfig(target_modules=["q_proj", "v_proj"], r=2, init_lora_weights=False)
    adapted = peft.get_peft_model(models.build("llama"), config).eval()
    with fs.steer(adapted, PLANS["ablate"][0]), torch.no_grad():
        steered = logits(adapted)
    with pytest.raises(FoldError, match=r"q_proj has an adapter.*merge_and_unload\(\)"):
        fold(adapted if wrapped else adapted.base_model.model, PLANS["ablate"][0])
    folded = fold(adapted.merge_and_unload(), PLANS["ablate"][0])
    folded.save(tmp_path / "model")
    loaded = type(folded.model).from_pretrained(tmp_path / "model").eval()
    assert torch.equal(logits(loaded), logits(folded.model))
    assert (logits(loaded) - steered).abs().max() <= 4 * folded.check.tolerance


def test_what_is_no_plan_and_tokens_that_are_none():
    with pytest.raises(TypeError, match="plan is a Tensor: expected a Plan"):
        fold(models.build("llama"), torch.ones(models.HIDDEN))
    with pytest.raises(FoldError, match="changes nothing"):
        fold(models.build("llama"), None)
    with pytest.raises(ValueError, match=r"torch\.bool: expected token ids"):
        fold(models.build("llama"), PLANS["ablate"][0], tokens=torch.tensor([[True]]))
    assert fold(models.build("llama"), PLANS["ablate"][0], tokens=[[5, 6, 7]]).check.equal == 16


class Quantizer:
    """As transformers leaves one on a model whose weights it has dequantised: GGUF's."""

    is_compileable = False

    def is_serializable(self) -> bool:
        return False


def test_weights_that_were_dequantised_are_saved_as_they_are(tmp_path):
    model = models.build("llama")
    model.hf_quantizer, model.is_quantized = Quantizer(), True
    model.config.quantization_config = {"quant_method": "gguf"}
    folded = fold(model, PLANS["ablate"][0])
    folded.save(tmp_path / "model")
    loaded = type(model).from_pretrained(tmp_path / "model").eval()
    assert torch.equal(logits(loaded), logits(folded.model)) and not hasattr(loaded.config, "quantization_config")


def test_quantised_weights_that_cannot_be_saved_are_refused_before_the_work():
    model = models.build("llama")
    model.hf_quantizer = Quantizer()
    model.lm_head.weight = torch.nn.Parameter(torch.zeros(4, 4, dtype=torch.uint8), requires_grad=False)
    with pytest.raises(FoldError, match="load it without quantisation"):
        fold(model, PLANS["ablate"][0])


def smaller_eps(model):
    model.model.norm.variance_epsilon = 1.0


def hooked(model):
    model.model.layers[1].mlp.register_forward_hook(lambda _module, _args, output: 2 * output)


def other_rotations(model):
    model.model.rotary_emb.inv_freq = 3 * model.model.rotary_emb.inv_freq


def other_activation(model):
    model.model.layers[0].mlp.act_fn = torch.nn.ReLU()


@pytest.mark.parametrize("change", [smaller_eps, hooked, other_rotations, other_activation])
def test_what_stands_in_no_weight_is_not_lost_in_silence(change, tmp_path):
    model = models.build("llama")
    change(model)
    folded = fold(model, fs.Add(v, layers=0, at="mlp_out"))
    with pytest.raises(FoldError, match="computes something else of them"):
        folded.save(tmp_path / "model")
    assert not list(tmp_path.iterdir())
    fold(models.build("llama"), fs.Add(v, layers=0, at="mlp_out")).save(tmp_path / "model")


def test_layers_that_the_configuration_does_not_know_of():
    model = models.build("llama")
    del model.model.layers[1]
    with pytest.raises(FoldError, match=r"differs in model\.layers\.1.*correct model\.config \(num_hidden_layers"):
        fold(model, fs.Add(v, layers=0, at="mlp_out"))
    model.config.num_hidden_layers = 1
    assert fold(model, fs.Add(v, layers=0, at="mlp_out")).changed


def test_a_generation_config_that_cannot_be_saved_is_refused_before_the_work(tmp_path):
    model = models.build("llama")
    model.generation_config.temperature = 0.3  # without do_sample
    with pytest.raises(FoldError, match=r"(?s)correct it first.*temperature") as refused:
        fold(model, PLANS["ablate"][0])
    assert "do_sample" in str(refused.value)
    model.generation_config.do_sample = True
    fold(model, PLANS["ablate"][0]).save(tmp_path / "model")
