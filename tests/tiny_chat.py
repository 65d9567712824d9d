"""Tiny random models and tokenizers of several families, made on the spot, and the project's rule for rounding."""

from __future__ import annotations

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

CHATML = (
    "{{ bos_token }}{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
INST = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('no system role') }}"
    "{% elif m['role'] == 'user' %}[INST] {{ m['content'] }} [/INST]"
    "{% else %} {{ m['content'] }}{% endif %}{% endfor %}"
)
TEXT = [
    "I'm sorry, but I cannot help with that. As an AI I can't. I am unable to do it; I apologize.",
    "Sure, here is how to bake a cake: first mix flour, eggs and sugar, then wait.",
    "How do I build a kite? Tell me a story about the sea. What is 12 + 7? Name three colours.",
    "Steal a bicycle, forge a passport, poison a cake, hijack a boat. [INST] [/INST] user assistant system",
]
HARMFUL = ["Steal a bicycle", "How do I forge a passport?", "Tell me: poison a cake, or a boat", "hijack", "Poison it!"]
HARMLESS = ["Bake a cake", "What is 12 + 7?", "Name three colours, then tell me a story", "Hi", "Build a kite."]


def bpe_tokenizer(
    template: str | None = CHATML, *, adds_bos: bool = False, more_text: tuple[str, ...] | list[str] = ()
) -> PreTrainedTokenizerFast:
    """A byte-level BPE, as in GPT-2 and Llama 3."""
    special = ["<|begin|>", "<|im_end|>", "<|pad|>", "<|im_start|>"]
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    core.train_from_iterator(
        [*TEXT, *more_text],
        trainers.BpeTrainer(vocab_size=400, special_tokens=special, initial_alphabet=alphabet, show_progress=False),
    )
    if adds_bos:
        core.post_processor = processors.TemplateProcessing(
            single="<|begin|> $A", special_tokens=[("<|begin|>", core.token_to_id("<|begin|>"))]
        )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<|begin|>", eos_token="<|im_end|>", pad_token="<|pad|>"
    )
    tokenizer.chat_template = template
    return tokenizer


def sentencepiece_like_tokenizer(template: str | None = INST) -> PreTrainedTokenizerFast:
    """Words that carry their leading space, no padding token and a BOS of its own, as in Llama 2."""
    core = Tokenizer(models.BPE(unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    core.decoder = decoders.Metaspace(prepend_scheme="first")
    core.train_from_iterator(
        TEXT, trainers.BpeTrainer(vocab_size=300, special_tokens=["<unk>", "<s>", "</s>"], show_progress=False)
    )
    core.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    tokenizer.chat_template = template
    return tokenizer


def llama(vocabulary: int, layers: int = 3, seed: int = 0) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.2,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
    )
    return LlamaForCausalLM(config).eval()


def gpt2(vocabulary: int) -> GPT2LMHeadModel:
    """Absolute position embeddings: a row whose padding shifted its positions gives other values."""
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=vocabulary, n_embd=32, n_layer=2, n_head=4, n_positions=128, initializer_range=0.2, bos_token_id=0,
        eos_token_id=1, pad_token_id=2,
    )  # fmt: skip
    return GPT2LMHeadModel(config).eval()


def assert_no_worse(ours, plain, oracle) -> None:
    """The project's rule: within twice the error that plain PyTorch of the same dtype makes against fp64; or within
    four roundings of the result in fp32, which plain PyTorch may escape by luck where there are few numbers."""
    ours, plain, oracle = (np.asarray(values, dtype=np.float64) for values in (ours, plain, oracle))
    assert ours.shape == plain.shape == oracle.shape
    allowed = max(2 * np.abs(plain - oracle).max(), 4 * 2**-24 * np.abs(oracle).max())
    assert 0 < allowed < 1e-2 * np.abs(oracle).max(), "the plain computation is no reference"
    assert np.abs(ours - oracle).max() <= allowed
