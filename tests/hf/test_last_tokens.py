"""Rows under many plans share the common tokens and the layers in front of their plans: the same logits and activations
to rounding, over architectures and kinds of plans; whole passes where the model does not allow it."""

from __future__ import annotations

import random
from contextlib import contextmanager

import every_model
import models
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import faststeer as fs
from faststeer.hf import last_tokens as module
from faststeer.hf.last_tokens import find_common, first_layer, last_tokens

LAYERS = 4
WINDOWED = {"gemma2", "gemma3"}  # a cache that forgets: no common tokens
UNTIED = {"falcon"}  # layers that give a tuple: none is left out
HYBRID = ["jamba", "lfm2", "mamba"]


def prompts(common=24, count=8, longest=9, seed=0):
    """Rows of token ids that begin with `common` tokens alike and differ right after."""
    draw = random.Random(seed)
    head = [draw.randrange(2, models.VOCAB) for _ in range(common)]
    tails = [[2 + i, *(draw.randrange(2, models.VOCAB) for _ in range(draw.randint(0, longest)))] for i in range(count)]
    return [head + tail for tail in tails]


def plans(n_layers=LAYERS):
    """Two for each layer, of several kinds; one in every layer, one that does nothing, and one that asks where a
    prompt's tokens stand."""
    v, w = models.direction(1), models.direction(2)
    made = []
    for layer in range(n_layers):
        others = [
            fs.Add(w, -0.5, layers=layer, at="resid_pre", keep_norm=True),
            fs.Ablate(v, layers=layer, at="resid_post"),
            fs.Clamp(w, 1.0, 2.0, layers=layer, when=fs.Gate(v, 0.1)),
        ]
        made += [fs.Plan([fs.Add(v, 1.0, layers=layer, at="resid_pre")]), fs.Plan([others[layer % 3]])]
    last = fs.Plan([fs.Add(v, 2.0, layers=n_layers - 1, at="resid_pre", positions="last")])
    return [*made, fs.Plan([fs.Ablate(v, layers="all", at="resid_pre")]), fs.Plan(), last]


def run(subject, encoded, rows, **options):
    """`[rows, vocabulary]` and `{layer: [rows, hidden]}`, fp64."""
    logits, activations = {}, {}
    for numbers, here, taken in last_tokens(subject, encoded, rows, **options):
        logits |= dict(zip(numbers, here.double(), strict=True))
        for layer, x in taken.items():
            activations.setdefault(layer, {}).update(zip(numbers, x.double(), strict=True))
    stacked = {layer: torch.stack([by_row[n] for n in range(len(rows))]) for layer, by_row in activations.items()}
    return torch.stack([logits[n] for n in range(len(rows))]), stacked


def rows_of(encoded, some):
    return [(prompt, plan) for plan in [None, *some] for prompt in range(len(encoded))]


@contextmanager
def counted(subject, layer):
    """The tokens that a layer's own modules see, once the block is left."""
    seen = []
    module = next(m for m in subject.get_submodule(fs.hf.find_hook_points(subject).layers)[layer].children())
    handle = module.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append((args[0] if args else kwargs["hidden_states"]).shape[:2].numel()),
        with_kwargs=True,
    )
    try:
        yield seen
    finally:
        handle.remove()


def assert_near(ours, whole, dtype):
    """Each row within the rounding of `LAYERS` layers, several times."""
    bound = 4 * module.rounding_bound(dtype, LAYERS)
    assert bool(((ours - whole).norm(dim=-1) <= bound * whole.norm(dim=-1)).all())


@pytest.mark.parametrize("name", models.ARCHITECTURES)
def test_shared_passes_equal_whole_ones(name):
    changes = {"num_hidden_layers": LAYERS} | ({"n_layer": LAYERS} if name == "gpt2" else {})
    if name == "gemma3":
        changes["layer_types"] = ["sliding_attention", "full_attention"] * 2
    subject, encoded = models.build(name, **changes), prompts()
    some = plans()
    rows = rows_of(encoded, some)
    common = find_common(subject, encoded, rows, (), 0, 12)
    assert common.prefix.length == (0 if name in WINDOWED else 24)
    assert set(common.begins.values()) == ({0} if name in UNTIED else {0, 1, 2, 3})
    whole, shared = (run(subject, encoded, rows, batch_size=12, share=s)[0] for s in (False, True))
    assert_near(shared, whole, torch.float32)
    assert torch.equal(shared[:8], whole[:8]), "unsteered rows are run whole"
    assert not torch.allclose(shared[8:16], shared[:8], atol=1e-3), "the plan does nothing"


@pytest.mark.parametrize("family", HYBRID)
def test_models_with_states_begin_behind_layers_as_well(family):
    """Mamba's, convolutions' and hybrid layers: no common tokens, as a state is no cache of theirs."""
    subject, encoded = every_model.build(family), prompts(common=6)
    points = fs.hf.find_hook_points(subject)
    v = torch.randn(points.hidden_size, generator=torch.Generator().manual_seed(1))
    some = [fs.Plan([fs.Add(c * v, layers=3, at="resid_pre")]) for c in (-3, -2, -1, 1, 2, 3)]
    rows = rows_of(encoded, some)
    assert set(find_common(subject, encoded, rows, (), 0, 12).begins.values()) == {2}
    with counted(subject, 0) as seen:
        shared, _ = run(subject, encoded, rows, batch_size=5)
    with counted(subject, 0) as seen_whole:
        whole, _ = run(subject, encoded, rows, batch_size=5, share=False)
    assert_near(shared, whole, torch.float32)
    assert sum(seen) < 0.6 * sum(seen_whole)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("path", ["fused", "hooks"])
def test_activations_dtypes_and_paths(dtype, path, monkeypatch):
    monkeypatch.setenv("FASTSTEER_PATH", path)
    subject, encoded = models.build("llama", num_hidden_layers=LAYERS).to(dtype), prompts()
    rows = rows_of(encoded, plans())
    options = {"batch_size": 16, "layers": [1, 3]}
    (whole, a), (shared, b) = (run(subject, encoded, rows, share=share, **options) for share in (False, True))
    assert_near(shared, whole, dtype)
    for layer in (1, 3):
        assert_near(b[layer], a[layer], dtype)
    assert max(find_common(subject, encoded, rows, [1, 3], 0, 12).begins.values()) == 1, (
        "layer 1 is read as it is steered"
    )


def test_layers_in_front_of_a_plan_run_once_for_each_prompt():
    subject, encoded = models.build("llama", num_hidden_layers=LAYERS), prompts(common=0, count=6)
    some = [fs.Plan([fs.Add(c * models.direction(), layers=3, at="resid_pre")]) for c in range(1, 11)]
    rows = rows_of(encoded, some)[6:]  # without unsteered rows
    run(subject, encoded, rows, batch_size=6)  # what the model allows is found out once
    with counted(subject, 1) as front, counted(subject, 2) as behind:
        run(subject, encoded, rows, batch_size=6)
    assert sum(front) < sum(behind) / 8


def test_only_as_many_layers_are_kept_as_memory_allows(monkeypatch):
    subject, encoded = models.build("llama", num_hidden_layers=LAYERS), prompts()
    rows = rows_of(encoded, plans())
    width = max(map(len, encoded))
    monkeypatch.setattr(module, "STATES_BYTES", 2 * len(encoded) * width * models.HIDDEN * 4)
    whole, _ = run(subject, encoded, rows, batch_size=16, share=False)
    shared, _ = run(subject, encoded, rows, batch_size=16)
    assert_near(shared, whole, torch.float32)
    assert set(find_common(subject, encoded, rows, (), 0, 12).begins.values()) == {0, 2}


def test_where_a_plan_begins():
    v = models.direction()
    first = {
        "resid_pre": 1, "attn_out": 2, "resid_mid": 2, "mlp_out": 2, "resid_post": 2,
    }  # fmt: skip
    for at, layer in first.items():  # what enters layer 2 is steered where it leaves layer 1
        assert first_layer(fs.Plan([fs.Add(v, layers=2, at=at)]), LAYERS) == layer
    assert first_layer(fs.Plan([fs.Add(v, layers=0, at="resid_pre")]), LAYERS) == 0
    assert first_layer(fs.Plan([fs.Add(v, layers=-1), fs.Ablate(v, layers=2)]), LAYERS) == 2
    assert first_layer(fs.Plan(), LAYERS) == LAYERS - 1
    for positions in ("last", "prompt", "generated", slice(-3, None)):
        assert first_layer(fs.Plan([fs.Add(v, layers=2, positions=positions)]), LAYERS) is None
    assert first_layer(fs.Plan([fs.Add(v, layers=2, when=fs.Gate(v, 0.0, latched=True))]), LAYERS) is None


class Leaving(LlamaForCausalLM):
    """A model whose last layer adds what its first layer left behind, beside the residual stream."""

    def __init__(self, config, on):
        super().__init__(config)
        kept = {}
        first, last = self.model.layers[0], self.model.layers[-1]
        first.mlp.register_forward_hook(lambda _m, _a, out: kept.update(x=out))
        last.mlp.register_forward_hook(lambda _m, _a, out: out + kept["x"] if on == "stale" else out + kept.pop("x"))


@pytest.mark.parametrize("on", ["stale", "missing"])
def test_a_model_whose_layers_look_past_the_stream_is_run_whole(on):
    """Whether the last layer finds what another batch left there, or nothing."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=models.VOCAB, hidden_size=32, num_hidden_layers=LAYERS, num_attention_heads=4, intermediate_size=48,
        initializer_range=0.25,
    )  # fmt: skip
    subject, encoded = Leaving(config, on).eval(), prompts()
    rows = rows_of(encoded, plans())
    common = find_common(subject, encoded, rows, (), 0, 12)
    assert set(common.begins.values()) == {0}
    whole, shared = (run(subject, encoded, rows, batch_size=16, share=share)[0] for share in (False, True))
    assert_near(shared, whole, torch.float32)


def test_a_steered_model_is_run_whole():
    subject, encoded = models.model("llama"), prompts()
    rows = rows_of(encoded, plans(2))
    with fs.steer(subject, fs.Plan([fs.Add(models.direction(3), layers=0, positions="last")])):
        assert find_common(subject, encoded, rows, (), 0, 12).begins == {}


@pytest.mark.parametrize(
    "encoded, n_plans",
    [
        (prompts(common=0, count=3), 1),  # one plan saves nothing of the layers, and nothing is common
        (prompts(common=24, count=1), 2),  # a single prompt
    ],
)
def test_what_saves_little_is_run_whole(encoded, n_plans):
    subject = models.model("llama")
    some = [fs.Plan([fs.Add(models.direction(), layers=1, at="resid_post")])] * n_plans
    assert find_common(subject, encoded, rows_of(encoded, some), (), 0, 12).begins == {}


def test_the_model_is_as_before_when_the_work_is_left_half_done():
    subject, encoded = models.build("llama", num_hidden_layers=LAYERS), prompts()
    before = [dict(vars(layer)) for layer in subject.model.layers]
    work = last_tokens(subject, encoded, rows_of(encoded, plans())[8:], batch_size=4)
    for _ in range(12):
        next(work)
    assert "forward" in vars(subject.model.layers[-1]), "nothing is changed yet"
    work.close()
    assert [dict(vars(layer)) for layer in subject.model.layers] == before


def test_plans_begin_at_as_many_layers_as_their_rows_fill_batches():
    """A plan for each of 20 layers, with one row or ten, and batches of 6; a plan in one layer begins there."""
    subject, encoded = models.build("llama", num_hidden_layers=20), prompts(count=10)
    layer_plans = [fs.Plan([fs.Add(models.direction(), layers=layer)]) for layer in range(20)]
    for rows, layers in (
        ([(0, plan) for plan in layer_plans], {0, 5, 10, 15}),
        (rows_of(encoded, layer_plans)[10:], set(range(0, 20, 2))),
        ([(0, layer_plans[18])] * 3, {18}),
    ):
        assert set(find_common(subject, encoded, rows, (), 0, 6).begins.values()) == layers
