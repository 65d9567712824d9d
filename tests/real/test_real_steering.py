"""Steering SmolLM2 against hand-written hooks, rows alone, generation token by token, and the model in fp64."""

from __future__ import annotations

import copy

import pytest
import torch
from conftest import PROMPTS
from transformers import ContinuousBatchingConfig, GenerationConfig

import faststeer as fs
from faststeer.hf.batching import encode


def plans(tone) -> list[fs.Plan | None]:
    """A plan per prompt: one layer, several, an ablation everywhere, positions, none."""
    return [
        fs.Plan([fs.Add(tone, 1.0, layers=15)]),
        fs.Plan([fs.Add(tone, -1.0, layers=18, positions="generated")]),
        None,
        fs.Plan([fs.Ablate(tone[20], layers="all", at=("resid_pre", "attn_out", "mlp_out"))]),
        fs.Plan([fs.Add(tone, 0.3, layers=[10, 14, 18]), fs.Clamp(tone[22], low=-1.0, high=1.0, layers=22)]),
        fs.Plan([fs.Add(tone, 1.5, layers=12, positions="prompt")]),
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@torch.no_grad()
def test_every_layer_is_the_hand_written_hook(smollm2, tone, dtype):
    """Row n is steered at layer n, row 0 nowhere: in plain PyTorch bit for bit what hooks that add give; compiled norms
    round otherwise, and err at most twice as much as the hooks do, against the same weights in fp64."""
    model, tokenizer = copy.deepcopy(smollm2[0]).to(dtype), smollm2[1]
    batch = fs.hf.tokenize(tokenizer, [PROMPTS[1]] * (len(tone.layers) + 1))
    vectors = {layer: tone[layer].to(dtype) for layer in tone.layers}
    expected = by_hooks(model, batch, vectors)
    exact = by_hooks(copy.deepcopy(model).double(), batch, vectors)
    plain = model(**batch).logits
    steered = [fs.Plan([fs.Add(fs.SteeringVector({layer: v}, at="resid_pre"), 1.0)]) for layer, v in vectors.items()]
    with fs.backend("reference"), fs.steer(model, [None, *steered]):
        logits = model(**batch).logits
    assert torch.equal(logits, expected)
    assert torch.equal(logits[0], plain[0])
    assert (logits[1:] != plain[1:]).flatten(1).any(1).all()
    with fs.steer(model, [None, *steered]):
        logits = model(**batch).logits
    assert (logits.double() - exact).abs().max() <= 2 * (expected.double() - exact).abs().max()
    assert torch.equal(model(**batch).logits, plain)


def by_hooks(model, batch, vectors):
    """Logits where the n-th vector is added to row n + 1, in front of its layer."""
    handles = []
    for row, (layer, vector) in enumerate(vectors.items(), 1):
        added = torch.zeros(len(vectors) + 1, 1, len(vector), dtype=model.dtype)
        added[row] = vector.to(model.dtype)
        block = model.model.layers[layer]
        handles.append(block.register_forward_pre_hook(lambda m, args, a=added: (args[0] + a, *args[1:])))
    logits = model(**batch).logits
    for handle in handles:
        handle.remove()
    return logits


@torch.no_grad()
def test_rows_of_a_mixed_batch_are_those_rows_alone(smollm2, exact, tone):
    """Against the same row alone in fp64: a padded, mixed batch errs at most twice as much as the row alone."""
    model, tokenizer = smollm2
    batch = fs.hf.tokenize(tokenizer, PROMPTS)
    with fs.steer(model, plans(tone)):
        mixed = model(**batch).logits[:, -1].double()
    errors = []
    for prompt, plan in zip(PROMPTS, plans(tone), strict=True):
        row = fs.hf.tokenize(tokenizer, [prompt])
        logits = []
        for each in (model, exact):
            with fs.steer(each, [plan]):
                logits.append(each(**row).logits[0, -1].double())
        errors.append(((logits[0] - logits[1]).abs().max(), logits[1]))
    largest = max(error for error, _ in errors)
    for number, (_, expected) in enumerate(errors):
        assert (mixed[number] - expected).abs().max() <= 2 * largest, number


@torch.no_grad()
def test_padding_does_not_move_positions_and_the_engine_is_generate(smollm2, tone):
    """Each prompt alone, token by token without a cache; generate on the padded batch; the Engine, refilling rows."""
    model, tokenizer = smollm2
    n = 12
    expected = []
    for prompt, plan in zip(PROMPTS, plans(tone), strict=True):
        (ids,) = encode(tokenizer, [prompt])
        tokens: list[int] = []
        while len(tokens) < n and tokenizer.eos_token_id not in tokens:
            row = torch.tensor([[*ids, *tokens]])
            with fs.steer(model, [plan]) as steering:
                steering.set_prompt([len(ids)])
                tokens.append(int(model(row, use_cache=False).logits[0, -1].argmax()))
        expected.append(tokens)
    batch = fs.hf.tokenize(tokenizer, PROMPTS)
    with fs.steer(model, plans(tone)):
        generated = model.generate(**batch, max_new_tokens=n, do_sample=False)[
            :, batch["input_ids"].shape[1] :
        ].tolist()
    assert [row[: len(tokens)] for row, tokens in zip(generated, expected, strict=True)] == expected
    engine = fs.Engine(model, tokenizer, max_batch=4, max_length=128)
    completions = list(engine.generate(PROMPTS, plans(tone), max_new_tokens=n))
    for completion, tokens in zip(completions, expected, strict=True):
        assert completion.token_ids == [token for token in tokens if token != tokenizer.eos_token_id]


@torch.no_grad()
def test_extraction_is_the_difference_of_means(smollm2, exact, tone):
    """Against hidden states in fp64; batched extraction errs at most twice as much as a plain loop over prompts."""
    model, tokenizer = smollm2
    split = fs.behaviours.load("tone").train

    def means(each):
        sides = []
        for prompts in (split.positive[:8], split.negative[:8]):
            rows = [
                torch.stack(each(torch.tensor([ids]), output_hidden_states=True, use_cache=False).hidden_states)[
                    :, 0, -1
                ]
                for ids in encode(tokenizer, prompts)
            ]
            sides.append(torch.stack(rows).double().mean(0))
        return sides[0] - sides[1], sides[0].abs().amax(-1)

    (expected, size), (by_loop, _) = means(exact), means(model)
    for layer in tone.layers:
        error = (by_loop[layer] - expected[layer]).abs().max()
        # And a unit in the last place of the states whose means these are, for layers at which the loop errs little.
        floor = 2.0**-23 * size[layer]
        assert (tone[layer].double() - expected[layer]).abs().max() <= 2 * error + floor, layer


@torch.no_grad()
@pytest.mark.parametrize("kind", ["addition", "ablation"])
def test_folded_saved_and_loaded(smollm2, tone, tmp_path, kind):
    model, tokenizer = smollm2
    plan = {
        "addition": fs.Plan([fs.Add(tone, 1.0, layers=15)]),
        "ablation": fs.Plan([fs.Ablate(tone[20], layers="all", at=("resid_pre", "attn_out", "mlp_out"))]),
    }[kind]
    batch = fs.hf.tokenize(tokenizer, PROMPTS[:2])
    with fs.steer(model, plan):
        steered = model(**batch).logits
    folded = fs.folding.fold(copy.deepcopy(model), plan, in_place=True)
    folded.save(tmp_path / "folded", tokenizer)
    again, _ = fs.load(tmp_path / "folded")
    assert torch.equal(again(**batch).logits, folded.model(**batch).logits)
    assert (again(**batch).logits - steered)[:, -1].abs().max() <= folded.check.tolerance


@torch.no_grad()
def test_every_request_of_generate_batch_is_that_request_alone(smollm2, tone):
    """Tokens, and their log probabilities to fp32 rounding; the long prompts are read in several passes."""
    model, tokenizer = smollm2
    prompts = encode(tokenizer, PROMPTS)
    gate = fs.Gate(tone[15], 0.0, latched=True)
    steered = [*plans(tone)[:5], fs.Plan([fs.Add(tone, 1.5, layers=12, positions="[-3:2]", when=gate)])]
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": 0}
    small = {"page_size": 16, "num_blocks": 64, "max_batch_tokens": 96, "return_logprobs": True}
    config = ContinuousBatchingConfig(**small)
    with fs.steer(model, steered):
        outputs = model.generate_batch(prompts, GenerationConfig(**options), config).values()
    for plan, prompt, output in zip(steered, prompts, outputs, strict=True):
        with fs.steer(model, [plan]):
            alone = model.generate(torch.tensor([prompt]), output_logits=True, return_dict_in_generate=True, **options)
        tokens = alone.sequences[0, len(prompt) :]
        assert output.generated_tokens == tokens.tolist()
        logprobs = torch.stack(alone.logits)[:, 0].log_softmax(-1).gather(1, tokens[:, None])[:, 0]
        torch.testing.assert_close(torch.tensor(output.logprobs), logprobs, atol=1e-3, rtol=0)
