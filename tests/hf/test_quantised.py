"""Steering models whose weights are not plain: torchao, bitsandbytes, PyTorch's own dynamic quantisation. What a hook
written by hand gives is what must come out; layers that quantise what they are given are where fused norms may not
stand in for the model's own."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import models
import pytest
import torch
from torch import Tensor, nn

import faststeer as fs
from faststeer.folding import FoldError, fold
from faststeer.hf import read
from faststeer.hf.anatomy import find_hook_points

sys.path.append(str(Path(sys.prefix) / "quantised"))  # where `make test` has them
bnb = pytest.importorskip("bitsandbytes")
torchao = pytest.importorskip("torchao.quantization")

LAYER, HIDDEN, NEW = 1, 64, 6  # bitsandbytes takes its weights in blocks of 64


def plain(dtype: torch.dtype = torch.float32) -> Any:
    return models.build("llama", hidden_size=HIDDEN, intermediate_size=128, num_hidden_layers=3).to(dtype)


def by_torchao(config: Any) -> Callable[[Any], Any]:
    def quantise(model: Any) -> Any:
        torchao.quantize_(model, config)
        return model

    return quantise


def by_bitsandbytes(linear: Callable[[nn.Linear], nn.Module]) -> Callable[[Any], Any]:
    def quantise(model: Any) -> Any:
        for path, module in list(model.named_modules()):
            if isinstance(module, nn.Linear) and path != "lm_head":
                parent, _, name = path.rpartition(".")
                setattr(model.get_submodule(parent), name, linear(module).to("cpu"))
        with torch.no_grad():  # packs the weights: passes before it compute with others
            model.eval()(models.tokens(1, 3))
        return model

    return quantise


def eight_bits(plain: nn.Linear) -> nn.Module:
    made = bnb.nn.Linear8bitLt(plain.in_features, plain.out_features, bias=False, has_fp16_weights=False)
    made.weight = bnb.nn.Int8Params(plain.weight.data, requires_grad=False, has_fp16_weights=False)
    return made


def four_bits(plain: nn.Linear) -> nn.Module:
    made = bnb.nn.Linear4bit(plain.in_features, plain.out_features, bias=False, quant_type="nf4")
    made.compute_dtype = plain.weight.dtype
    made.weight = bnb.nn.Params4bit(plain.weight.data, requires_grad=False, quant_type="nf4")
    return made


def over_the_batch(model: Any) -> Any:
    return torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)


KINDS: dict[str, Callable[[Any], Any]] = {
    "torchao int8": by_torchao(torchao.Int8WeightOnlyConfig()),
    "torchao int8 dynamic": by_torchao(torchao.Int8DynamicActivationInt8WeightConfig()),
    "bitsandbytes int8": by_bitsandbytes(eight_bits),
    "bitsandbytes nf4": by_bitsandbytes(four_bits),
}
ROWWISE = pytest.mark.parametrize("kind", KINDS)
V = 6 * models.direction(0, HIDDEN)


@pytest.fixture(scope="module")
def made() -> Callable[..., Any]:
    known: dict[Any, Any] = {}

    def of(kind: str, dtype: torch.dtype = torch.float32) -> Any:
        if (kind, dtype) not in known:
            known[kind, dtype] = KINDS[kind](plain(dtype))
        return known[kind, dtype]

    return of


def batch() -> dict[str, Tensor]:
    return models.left_padded([models.tokens(1, length, seed=length)[0] for length in (9, 5, 7)])


@torch.no_grad()
def outputs(model: Any, inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    return model(**inputs).logits, model.generate(**inputs, max_new_tokens=NEW, do_sample=False, pad_token_id=0)


def by_hand(model: Any, inputs: dict[str, Tensor], rows: list[int]) -> tuple[Tensor, Tensor]:
    def hook(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        moved = output.clone()
        moved[rows] = (output[rows].float() + V).to(output.dtype)
        return moved

    handle = model.model.layers[LAYER].register_forward_hook(hook)
    try:
        return outputs(model, inputs)
    finally:
        handle.remove()


@ROWWISE
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_as_a_hook_by_hand(made, kind, dtype):
    model, inputs, plan = made(kind, dtype), batch(), fs.Plan([fs.Add(V, 1.0, layers=[LAYER])])
    before, expected = outputs(model, inputs), by_hand(model, inputs, [0, 2])
    real = inputs["attention_mask"].bool()
    with fs.steer(model, [plan, None, plan], path="hooks"):
        steered = outputs(model, inputs)
    assert torch.equal(steered[0][real], expected[0][real]) and torch.equal(steered[1], expected[1])
    assert torch.equal(steered[0][1][real[1]], before[0][1][real[1]]), "a row without a plan"
    assert not torch.equal(steered[0][0], before[0][0])
    with fs.steer(model, [plan, None, plan]) as steering:
        chosen = outputs(model, inputs)
    if steering.path == "hooks":
        assert torch.equal(chosen[0][real], expected[0][real])
    elif dtype is torch.float32:
        torch.testing.assert_close(chosen[0][real], expected[0][real], rtol=1e-5, atol=1e-5)
        assert torch.equal(chosen[1], expected[1])
    after = outputs(model, inputs)
    assert torch.equal(after[0], before[0]) and torch.equal(after[1], before[1])


@pytest.mark.parametrize("kind", ["torchao int8 dynamic", "bitsandbytes int8"])
def test_no_fused_norms_in_front_of_what_quantises_its_input(made, kind):
    """A row's largest number gives the scale: rounded otherwise, it moves every product of the row."""
    steering = fs.steer(made(kind), fs.Plan([fs.Add(V, 1.0, layers=[LAYER])]))
    assert steering.path == "hooks" and "quantises what it is given" in steering.why
    with pytest.raises(RuntimeError, match="quantises what it is given"):
        fs.steer(made(kind), fs.Plan([fs.Add(V, 1.0, layers=[LAYER])]), path="fused")


def test_fused_where_weights_alone_are_quantised(made):
    assert fs.steer(made("torchao int8"), fs.Plan([fs.Add(V, 1.0, layers=[LAYER])])).path == "fused"


@ROWWISE
def test_engine(made, kind):
    """Each request as `generate` answers it alone under a hook."""
    model, prompts = made(kind), [models.tokens(1, length, seed=length) for length in (9, 5, 7)]
    engine = fs.Engine(model, Tokens(), max_batch=2, max_length=32)
    plans = [fs.Plan([fs.Add(V, 1.0, layers=[LAYER])]), None, fs.Plan([fs.Ablate(V, layers="all")])]
    answers = engine.generate([prompt[0].tolist() for prompt in prompts], plans, max_new_tokens=NEW)
    for prompt, plan, answer in zip(prompts, plans, [each.token_ids for each in answers], strict=True):
        with fs.steer(model, plan, path="hooks") if plan else torch.no_grad():
            alone = outputs(model, {"input_ids": prompt, "attention_mask": torch.ones_like(prompt)})[1]
        assert answer == alone[0, prompt.shape[1] :].tolist()


@ROWWISE
def test_reading(made, kind):
    """What is read is what a hook sees."""
    model, inputs = made(kind), batch()
    seen: list[Tensor] = []
    handle = model.model.layers[LAYER].register_forward_hook(lambda module, args, output: seen.append(output.clone()))
    with torch.no_grad(), read(model, at="resid_post", layers=[LAYER]) as taken:
        model(**inputs)
    handle.remove()
    assert torch.equal(taken[LAYER], seen[-1])  # before it, the passes that find what the model is made of


@ROWWISE
def test_fold_refuses(made, kind):
    model = made(kind)
    everywhere = fs.Ablate(V, layers="all", at=("resid_pre", "attn_out", "mlp_out"))
    for plan in (fs.Plan([fs.Add(V, 1.0, layers=[LAYER])]), fs.Plan([everywhere])):
        with pytest.raises(FoldError, match="quantis"):
            fold(model, plan)


def test_rows_that_look_at_each_other_take_one_plan():
    """PyTorch's dynamic quantisation takes one scale for the whole batch, so that a neighbour's plan moves a row."""
    model, inputs = over_the_batch(plain()), batch()
    plan = fs.Plan([fs.Add(V, 1.0, layers=[LAYER])])
    expected = by_hand(model, inputs, [0, 1, 2])
    with fs.steer(model, plan) as steering:
        assert steering.path == "hooks"
        steered = outputs(model, inputs)
        with pytest.raises(ValueError, match="one plan for all rows"):
            steering.assign([plan, None, plan])
        again = outputs(model, inputs)
    assert torch.equal(steered[0], expected[0]) and torch.equal(steered[1], expected[1])
    assert torch.equal(again[0], expected[0]), "nothing is changed by what is refused"
    with pytest.raises(ValueError, match="one plan for all rows, or run rows with different plans one after another"):
        fs.steer(model, [plan, None, None])
    with pytest.raises(ValueError, match=r"use model\.generate"):
        fs.Engine(model, Tokens(), max_batch=2, max_length=32)


@pytest.mark.parametrize("name", models.ARCHITECTURES)
def test_rows_of_a_plain_model_do_not(name):
    assert not find_hook_points(models.model(name)).mixed


def test_a_copy_of_a_quantised_model_is_not_steered(made):
    model, inputs = made("torchao int8"), batch()
    before = outputs(model, inputs)
    with fs.steer(model, fs.Plan([fs.Add(V, 1.0, layers=[LAYER])])):
        other = copy.deepcopy(model)
    assert torch.equal(outputs(other, inputs)[0], before[0])


class Tokens:
    """A tokenizer that is never asked for text."""

    chat_template = None
    bos_token_id = eos_token_id = None
    pad_token_id = 0

    def decode(self, ids: list[int], **_: Any) -> str:
        return " ".join(map(str, ids))
