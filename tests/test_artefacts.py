"""A model's fingerprint against every kind of change, and its limits; digests; parts in a folder."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny_chat import bpe_tokenizer, llama
from torch import nn

import faststeer as fs
from faststeer.artefacts import SAMPLED, ArtefactStore, digest, fingerprint

TOKENIZER = bpe_tokenizer()


def tiny():
    return llama(len(TOKENIZER))


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def plain():
    return fingerprint(tiny())


def test_the_same_model_has_the_same_fingerprint(plain):
    model = tiny()
    assert fingerprint(model) == plain == fingerprint(copy.deepcopy(model)) and len(plain) == 64
    with fs.steer(model, fs.Plan([fs.Add(torch.ones(model.config.hidden_size), layers=1)])):
        assert fingerprint(model) == plain  # what acts on a model inside a context is no part of it
    model(input_ids=torch.tensor([[1, 2, 3]]))
    assert fingerprint(model.requires_grad_(False)) == plain


def test_training_is_seen(plain):
    model = tiny()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)
    model(input_ids=torch.tensor([[1, 2, 3]]), labels=torch.tensor([[1, 2, 3]])).loss.backward()
    optimizer.step()
    assert fingerprint(model) != plain


@pytest.mark.parametrize("place", ["first", "middle", "last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_one_changed_number_of_any_weight_is_seen(place, dtype):
    """The smallest change that the dtype has, in every weight in turn."""
    model = tiny().to(dtype)
    before = fingerprint(model)
    for name, weight in model.named_parameters():
        flat = weight.detach().view(-1)
        index = {"first": 0, "middle": len(flat) // 2 + 1, "last": len(flat) - 1}[place]
        kept = flat[index].clone()
        flat[index] = torch.nextafter(kept, torch.tensor(1e3, dtype=dtype))
        assert fingerprint(model) != before, name
        flat[index] = kept
    assert fingerprint(model) == before


def test_dtype_configuration_and_buffers_are_seen(plain):
    assert fingerprint(tiny().to(torch.bfloat16)) != plain
    other = tiny()
    other.config.rms_norm_eps *= 2
    assert fingerprint(other) != plain
    other = tiny()
    other.register_buffer("steered_by", torch.zeros(3))
    assert fingerprint(other) != plain


def test_adapters_are_seen(plain):
    """Added, trained, switched off, scaled otherwise, and which of two is active."""
    config = LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj"])
    torch.manual_seed(0)
    model = get_peft_model(tiny(), config)
    prints = [plain, fingerprint(model)]
    with torch.no_grad():
        model.base_model.model.model.layers[1].self_attn.q_proj.lora_B["default"].weight[0, 0] += 1e-3
    prints.append(fingerprint(model))
    with model.disable_adapter():
        prints.append(fingerprint(model))
    assert fingerprint(model) == prints[2]
    model.base_model.model.model.layers[1].self_attn.q_proj.scaling["default"] *= 2
    prints.append(fingerprint(model))
    model.add_adapter("other", config)
    prints.append(fingerprint(model))
    model.set_adapter("other")
    prints.append(fingerprint(model))
    model.merge_adapter()
    prints.append(fingerprint(model))
    assert len(set(prints)) == len(prints)


class Flattened(torch.Tensor):
    """A weight made of two tensors, as torchao's quantised ones are."""

    @staticmethod
    def __new__(cls, whole, scale):
        return torch.Tensor._make_wrapper_subclass(cls, whole.shape, dtype=torch.float32)

    def __init__(self, whole, scale):
        self.whole, self.scale = whole, scale

    def __tensor_flatten__(self):
        return ["whole", "scale"], "int8"

    @classmethod
    def __torch_dispatch__(cls, function, types, arguments=(), keywords=None):
        first = arguments[0]
        return Flattened(first.whole, first.scale)


@pytest.mark.filterwarnings("ignore")  # PyTorch takes its quantised modules out some day
def test_quantised_weights_are_seen():
    """uint8 and int8 parameters with scales in buffers, PyTorch's quantised modules, and tensors made of tensors."""
    eight = nn.Linear(8, 8)
    eight.weight = nn.Parameter(torch.arange(64, dtype=torch.uint8).view(8, 8), requires_grad=False)
    eight.register_buffer("scale", torch.ones(8))
    before = fingerprint(eight)
    eight.weight.data[3, 5] += 1
    changed = fingerprint(eight)
    eight.scale[2] = 2
    assert len({before, changed, fingerprint(eight)}) == 3

    def inner(change):
        module = nn.Module()
        whole, scale = torch.arange(64, dtype=torch.int8), torch.ones(1)
        (whole, scale)[change].view(-1)[0] += 1
        module.weight = nn.Parameter(Flattened(whole, scale), requires_grad=False)
        return fingerprint(module)

    assert inner(0) != inner(1)
    linear = nn.Sequential(nn.Linear(8, 8))
    one = torch.ao.quantization.quantize_dynamic(linear, {nn.Linear}, torch.qint8)
    again = torch.ao.quantization.quantize_dynamic(linear, {nn.Linear}, torch.qint8)
    with torch.no_grad():
        linear[0].weight[3] *= 2
    other = torch.ao.quantization.quantize_dynamic(linear, {nn.Linear}, torch.qint8)
    assert fingerprint(one) == fingerprint(again) != fingerprint(other)


def test_numbers_that_change_places_unsampled_are_not_seen():
    """The limit that the docstring states, and no more: where a sampled number moves, it is seen."""
    linear = nn.Linear(64, 64, bias=False)
    before, flat = fingerprint(linear), linear.weight.detach().view(-1)
    sampled = torch.linspace(0, 4095, SAMPLED, dtype=torch.float64).long().tolist()
    pairs = [i for i in range(1, 4000) if i not in sampled and i + 2 not in sampled]  # the same half of 8 bytes
    flat[[pairs[0], pairs[0] + 2]] = flat[[pairs[0] + 2, pairs[0]]]
    assert fingerprint(linear) == before
    flat[[sampled[3], sampled[4]]] = flat[[sampled[4], sampled[3]]]
    assert fingerprint(linear) != before


def test_weights_at_any_offset_and_layout():
    """Views of one storage, transposed, and lengths that are no multiple of 8 bytes."""
    values = torch.randn(40, generator=generator())
    for dtype in (torch.float32, torch.bfloat16, torch.int8, torch.bool):
        prints = []
        for weight in (values[1:36].to(dtype), torch.cat([values[:1], values]).to(dtype)[2:37]):
            module = nn.Module()
            module.register_buffer("weight", weight.reshape(5, 7))
            prints.append(fingerprint(module))
        module.register_buffer("weight", weight.reshape(5, 7).T.contiguous().T)
        assert prints[0] == prints[1] == fingerprint(module)


def test_weights_without_values_are_refused():
    with pytest.raises(ValueError, match=r"lm_head\.weight has no values.*load the model whole"):
        fingerprint(tiny().to("meta"))


def test_digests():
    vector = fs.SteeringVector({1: torch.ones(4)}, at="resid_pre")
    other = fs.SteeringVector({1: torch.ones(4)}, at="resid_post")
    things = [1, 1.5, "1", [1], {"a": 1}, torch.ones(2), torch.ones(2, 1), torch.ones(2).bfloat16(), vector, other]
    assert len({digest(thing) for thing in things}) == len(things)
    assert digest({"a": 1, "b": vector}) == digest({"b": vector, "a": 1}) != digest({"a": 1}, {"b": vector})


def test_parts_are_made_once_and_damaged_ones_again(tmp_path):
    store, vector = ArtefactStore(tmp_path, "base"), fs.SteeringVector({1: torch.ones(4)}, at="resid_pre")
    made = store.record(fs.SteeringVector, "v", [1], lambda: vector)
    assert made.to_bytes() == vector.to_bytes() and store.made == ["v"]
    again = ArtefactStore(tmp_path, "base")
    assert again.record(fs.SteeringVector, "v", [1], lambda: pytest.fail("it is there")).layers == (1,)
    (path,) = tmp_path.iterdir()
    path.write_bytes(path.read_bytes()[:-3])
    assert again.record(fs.SteeringVector, "v", [1], lambda: vector).to_bytes() == vector.to_bytes()
    assert again.made == ["v"]
    assert ArtefactStore(tmp_path, "other").record(fs.SteeringVector, "v", [1], lambda: vector) and [
        len(list(tmp_path.iterdir()))
    ] == [2]
