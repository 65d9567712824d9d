"""SmolLM2 out of its GGUF file, against what the gguf package reads there."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
import torch
from conftest import PROMPTS

import faststeer as fs
from faststeer.hf.loading import smollm2_file


@pytest.fixture(scope="module")
def reader():
    return gguf.GGUFReader(smollm2_file())


def stored(reader, name: str) -> torch.Tensor:
    (tensor,) = (t for t in reader.tensors if t.name == name)
    return torch.from_numpy(gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float32))


@pytest.mark.parametrize("layer", [0, 13, 29])
def test_weights_are_what_the_file_holds(smollm2, reader, layer):
    model, _ = smollm2
    block = model.model.layers[layer]
    for module, name in (
        (block.self_attn.v_proj, "attn_v"),
        (block.self_attn.o_proj, "attn_output"),
        (block.mlp.gate_proj, "ffn_gate"),
        (block.mlp.up_proj, "ffn_up"),
        (block.mlp.down_proj, "ffn_down"),
        (block.input_layernorm, "attn_norm"),
        (block.post_attention_layernorm, "ffn_norm"),
    ):
        assert torch.equal(module.weight, stored(reader, f"blk.{layer}.{name}.weight")), name
    # A GGUF keeps the two halves of a head's rotated dimensions in turn: row 2 i + half is row half * size / 2 + i.
    size = model.config.head_dim
    order = torch.arange(size).reshape(size // 2, 2).T.reshape(-1)
    for module, name in ((block.self_attn.q_proj, "attn_q"), (block.self_attn.k_proj, "attn_k")):
        heads = stored(reader, f"blk.{layer}.{name}.weight").unflatten(0, (-1, size))
        assert torch.equal(module.weight, heads[:, order].flatten(0, 1)), name


@torch.no_grad()
def test_logits_are_the_last_states_times_the_files_embedding(smollm2, reader):
    model, tokenizer = smollm2
    batch = fs.hf.tokenize(tokenizer, PROMPTS[:1])
    output = model(**batch, output_hidden_states=True)
    embedding = stored(reader, "token_embd.weight")
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert torch.equal(output.hidden_states[0], embedding[batch["input_ids"]])
    expected = output.hidden_states[-1].double() @ embedding.double().T
    # Each logit sums 576 products in fp32; in any order its error is below 576 units of the sum of magnitudes.
    bound = 576 * 2.0**-24 * (output.hidden_states[-1].double().abs() @ embedding.double().abs().T)
    assert ((output.logits.double() - expected).abs() <= bound).all()


def test_special_tokens_and_template_are_the_files(smollm2, reader):
    model, tokenizer = smollm2
    fields = {name: field.contents() for name, field in reader.fields.items() if "_token_id" in name or "chat" in name}
    for name, theirs in (("bos", "bos"), ("eos", "eos"), ("pad", "padding"), ("unk", "unknown")):
        assert getattr(tokenizer, f"{name}_token_id") == fields[f"tokenizer.ggml.{theirs}_token_id"]
    assert tokenizer.chat_template == fields["tokenizer.chat_template"]
    assert tokenizer.padding_side == "left"
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id == 2
    assert model.generation_config.pad_token_id == tokenizer.pad_token_id


@pytest.mark.parametrize(
    "text", ["a  12 34", "Hello ▁ world , it 's", "ünïcödé 你好 🗼\n\n\tx", "<|im_start|>user\nhi<|im_end|>"]
)
def test_texts_come_back_and_digits_stand_alone(smollm2, text):
    _, tokenizer = smollm2
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.decode(ids) == text
    assert all(
        len(token.strip("Ġ")) == 1 for token in tokenizer.convert_ids_to_tokens(ids) if any(map(str.isdigit, token))
    )


def test_an_answer_ends(smollm2):
    model, tokenizer = smollm2
    batch = fs.hf.tokenize(tokenizer, ["Say hi."])
    ids = model.generate(**batch, max_new_tokens=100, do_sample=False)[0].tolist()
    assert ids[-1] == tokenizer.eos_token_id and len(ids) < batch["input_ids"].shape[1] + 100


def test_it_is_an_ordinary_model(smollm2, tmp_path):
    model, tokenizer = smollm2
    assert type(model).__name__ == "LlamaForCausalLM" and model.dtype == torch.float32 and not model.training
    assert not hasattr(model.config, "quantization_config") and not getattr(model, "is_quantized", False)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    again, _ = fs.load(tmp_path)
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in model.state_dict().items())
    assert fs.demo.load("smollm2", "bfloat16")[0].dtype == torch.bfloat16
