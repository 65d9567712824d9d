"""Prompts that begin alike: the common tokens run once, the same activations to rounding, and whole prompts wherever
that cannot be."""

from __future__ import annotations

import random

import pytest
import tiny_chat
import torch
from models import ARCHITECTURES, VOCAB, build, model
from transformers import GPTNeoConfig, GPTNeoForCausalLM, LlamaConfig, LlamaForCausalLM

import faststeer as fs
from faststeer import hf
from faststeer.extract.reading import read_batches
from faststeer.hf.batching import encode
from faststeer.hf.prefix import Prefix, common_prefix, rounding_bound

WINDOWED = {"gemma2", "gemma3"}  # a cache that forgets


def prompts(seed, common=24, count=8, longest=9):
    """Rows of token ids that begin with `common` tokens alike and differ right after."""
    draw = random.Random(seed)
    head = [draw.randrange(1, VOCAB) for _ in range(common)]
    tails = [[1 + i, *(draw.randrange(1, VOCAB) for _ in range(draw.randint(1, longest)))] for i in range(count)]
    return [head + tail for tail in tails]


def reader(subject, columns=(-2, -1)):
    """A function that runs the model and returns its activations `[rows, columns, hidden]` by layer."""

    def read(arguments):
        with torch.no_grad(), hf.read(subject, at="resid_post", tokens=list(columns)) as taken:
            subject(**arguments)
        return [taken[layer] for layer in range(len(taken))]

    return read


def exact(subject, rows, columns=(-2, -1)):
    """The same in fp64, one whole prompt at a time, as transformers captures it (the last layer's by a hook)."""
    double, wide = build_like(subject), []
    for row in rows:
        with torch.no_grad(), hf.read(double, at="resid_post", tokens=list(columns)) as taken:
            double(input_ids=torch.tensor([row]), use_cache=False)
        wide.append(torch.stack([taken[layer][0] for layer in range(len(taken))]))
    return torch.stack(wide, 1)  # [layers, rows, columns, hidden]


def build_like(subject):
    double = type(subject)(subject.config).double().eval()
    double.load_state_dict(subject.state_dict())
    if hasattr(subject.config, "_experts_implementation"):
        double.set_experts_implementation("eager")  # grouped products have no fp64
    return double


def counted(subject, run):
    """How many tokens the model embeds while `run` runs."""
    counts = []
    handle = subject.get_input_embeddings().register_forward_hook(lambda _m, args, _out: counts.append(args[0].numel()))
    try:
        run()
    finally:
        handle.remove()
    return sum(counts)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_shared_equals_whole_prompts(name):
    """Within twice the error of whole prompts against fp64, whatever the lengths; unless the cache is a window's."""
    subject = model(name)
    read = reader(subject)
    for seed in range(3):
        rows = prompts(seed)
        prefix = common_prefix(subject, rows, 2, 0)
        assert prefix.length == (0 if name in WINDOWED else 24)
        oracle = exact(subject, rows)
        whole, shared = (torch.stack(read(p.arguments(rows))).double() for p in (Prefix(subject, 0), prefix))
        scale = oracle.norm(dim=-1, keepdim=True)
        error, allowed = (((x - oracle) / scale).abs().max() for x in (shared, whole))
        assert error <= 2 * allowed


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_extraction_reads_the_common_tokens_once(dtype):
    tokenizer = tiny_chat.bpe_tokenizer()
    subject = tiny_chat.llama(len(tokenizer)).to(dtype).eval()
    system = "You are a cook who bakes a cake and tells a story about the sea."
    sides = {"positive": tiny_chat.HARMFUL, "negative": tiny_chat.HARMLESS}
    rows = {side: encode(tokenizer, texts * 3, system) for side, texts in sides.items()}
    options = {"at": "resid_post", "positions": [-2, -1], "batch_size": 4, "progress": False}
    batches = {}

    def read(share):
        batches[share] = list(read_batches(subject, tokenizer, rows, share_prefix=share, **options))

    whole, shared = (counted(subject, lambda share=share: read(share)) for share in (False, True))
    assert shared < 0.6 * whole
    for a, b in zip(batches[False], batches[True], strict=True):
        assert (a.side, a.numbers) == (b.side, b.numbers)
        difference = (a.activations.float() - b.activations.float()).norm(dim=-1)
        bounds = torch.tensor([rounding_bound(dtype, layer) for layer in range(a.activations.shape[2])])
        assert bool((difference <= bounds * a.activations.float().norm(dim=-1)).all())


def test_a_pair_shares_what_both_sides_begin_with():
    tokenizer = tiny_chat.bpe_tokenizer()
    subject = tiny_chat.llama(len(tokenizer)).double().eval()
    chats = [
        [[{"role": "system", "content": "You are a cook. " * 4 + tone}, {"role": "user", "content": f"Name {i}"}]
         for i in range(6)]
        for tone in ("Be glad and sing.", "Be sad.")
    ]  # fmt: skip
    rows = dict(zip(("positive", "negative"), (encode(tokenizer, side) for side in chats), strict=True))
    options = {"at": "resid_pre", "positions": [-1], "batch_size": 4, "progress": False, "paired": True}
    for a, b in zip(
        *(list(read_batches(subject, tokenizer, rows, share_prefix=share, **options)) for share in (False, True)),
        strict=True,
    ):
        assert (a.side, a.numbers) == (b.side, b.numbers)
        torch.testing.assert_close(a.activations, b.activations, rtol=1e-9, atol=1e-9)


def test_a_model_that_counts_columns_is_run_on_whole_prompts():
    """GPT-Neo's local attention looks back a number of columns, and padding in the middle moves them."""
    torch.manual_seed(0)
    config = GPTNeoConfig(
        vocab_size=VOCAB, hidden_size=32, num_layers=2, num_heads=4, attention_types=[[["local", "global"], 1]],
        window_size=6, max_position_embeddings=128, initializer_range=0.25,
    )  # fmt: skip
    subject = GPTNeoForCausalLM(config).eval()
    assert common_prefix(subject, prompts(0), 2, 0).length == 0


def test_a_model_that_looks_at_the_whole_length_is_run_on_whole_prompts():
    """Dynamic rotations depend on how long the longest row is; that of the common tokens alone is another."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48,
        max_position_embeddings=26, initializer_range=0.25,
        rope_parameters={"rope_type": "dynamic", "factor": 8.0, "rope_theta": 10000.0},
    )  # fmt: skip
    subject, rows = LlamaForCausalLM(config).eval(), prompts(0)
    rows = [row[: min(map(len, rows))] for row in rows]
    assert common_prefix(subject, rows, 2, 0).length == 0


def test_a_steered_model_is_run_on_whole_prompts():
    subject, rows = build("llama"), prompts(1)
    read = reader(subject)
    vector = torch.ones(32)
    for positions in ("all", "last", "prompt", "generated"):
        with fs.steer(subject, fs.Plan([fs.Add(vector, 1.0, layers="all", positions=positions)])):
            prefix = common_prefix(subject, rows, 2, 0)
            whole, shared = (torch.stack(read(p.arguments(rows))) for p in (Prefix(subject, 0), prefix))
        torch.testing.assert_close(shared, whole, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "rows",
    [
        [[1, 2, 3, 4, 5], [1, 2, 3, 4, 6]],  # two prompts: comparing costs more than it saves
        [[i, 2, 3, 4] for i in range(1, 20)],  # nothing in common
        [[1, 2]] * 20,  # nothing in common that is not read
    ],
)
def test_what_saves_little_is_not_shared(rows):
    subject = model("llama")
    assert common_prefix(subject, rows, 2, 0).length == 0


def test_models_not_of_transformers_are_run_on_whole_prompts():
    class Wrapper(torch.nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner, self.dtype = inner, torch.float32

        def get_input_embeddings(self):
            return self.inner.get_input_embeddings()

        def forward(self, input_ids=None, attention_mask=None, past_key_values=None, use_cache=None):
            raise AssertionError("not run")

    assert common_prefix(Wrapper(model("llama")), prompts(0), 2, 0).length == 0
