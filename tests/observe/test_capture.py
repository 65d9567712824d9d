"""What is captured is what the model gives each prompt alone; a folder holds the same, also after an interruption."""

from __future__ import annotations

import functools

import pytest
import torch

import faststeer as fs
from faststeer import observe
from faststeer.hf.batching import encode

PROMPTS = ["How do I bake a cake?", "Tell me a story about a boat.", "Why?", "Name three colours."]
NEW = 6


@functools.cache
def demo():
    return fs.demo.load()


def vector():
    return torch.randn(128, generator=torch.Generator().manual_seed(0))


def plan(coefficient=0.5, positions="all"):
    return fs.Plan([fs.Add(vector(), coefficient, layers=2, at="resid_pre", positions=positions)])


def stream(ids, steering=None, end=None):
    """resid_pre of every layer `[layers, tokens, hidden]`, of one row alone, with the vector times `steering` (a
    function of the position) added before layer 2."""
    model, _ = demo()
    taken = {}
    handles = []
    for i, layer in enumerate(model.model.layers):

        def take(module, args, i=i):
            h = args[0]
            if i == 2 and steering is not None:
                amount = torch.tensor([steering(t - end) for t in range(h.shape[1])]).view(1, -1, 1)
                h = h + amount * vector()
            taken[i] = h[0]
            return (h, *args[1:])

        handles.append(layer.register_forward_pre_hook(take))
    with torch.no_grad():
        model(input_ids=torch.tensor([ids]), use_cache=False)
    for handle in handles:
        handle.remove()
    return torch.stack([taken[i] for i in range(len(handles))])


def close(found, expected):
    """fp32, in other batches and with a cache."""
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


def test_prompts_alone_and_in_a_batch():
    model, tokenizer = demo()
    found = observe.capture(model, tokenizer, PROMPTS, at=["resid_pre", "mlp_out"], batch_size=3)
    assert len(found) == 4
    with fs.hf.read(model, "mlp_out", [3]) as branch:
        for prompt, ids in zip(found, encode(tokenizer, PROMPTS), strict=True):
            assert prompt.token_ids == ids == prompt.kept_ids
            assert prompt.n_prompt == len(ids)
            assert prompt.positions.tolist() == list(range(-len(ids), 0))
            expected = stream(ids)
            for layer in range(6):
                close(prompt["resid_pre", layer], expected[layer])
            close(prompt["mlp_out", 3], branch[3][0])
    with pytest.raises(KeyError):
        found[0]["attn_out", 1]


def test_generated_tokens_steered_row_by_row():
    model, tokenizer = demo()
    plans = [plan(), None, plan(-0.5, "generated"), plan(0.25, "[-2:]")]
    ways = [lambda p: 0.5, lambda p: 0.0, lambda p: -0.5 * (p >= 0), lambda p: 0.25 * (-2 <= p < 0)]
    found = observe.capture(model, tokenizer, PROMPTS, plans, layers=[1, -1], max_new_tokens=NEW, batch_size=4)
    texts = fs.evaluate.complete(model, tokenizer, PROMPTS, plans, max_new_tokens=NEW)
    for prompt, text, way in zip(found, texts, ways, strict=True):
        assert tokenizer.decode(prompt.token_ids[prompt.n_prompt :], skip_special_tokens=True) == text
        expected = stream(prompt.token_ids, way, prompt.n_prompt)
        n = len(prompt.positions)
        # The last token was generated and not read again, unless the end-of-sequence token came after it.
        assert n in (len(prompt.token_ids) - 1, len(prompt.token_ids))
        assert prompt.kept_ids == prompt.token_ids[:n]
        for layer in (1, 5):
            close(prompt["resid_pre", layer], expected[layer, :n])


def test_given_completions():
    model, tokenizer = demo()
    answers = ["Sure, here it is.", [5, 6, 7], "No.", "A b c d e f"]
    found = observe.capture(model, tokenizer, PROMPTS, plan(0.5, "generated"), layers=[3], completions=answers)
    for prompt, answer in zip(found, answers, strict=True):
        ids = answer if isinstance(answer, list) else tokenizer(answer, add_special_tokens=False)["input_ids"]
        assert prompt.token_ids[prompt.n_prompt :] == ids
        expected = stream(prompt.token_ids, lambda p: 0.5 * (p >= 0), prompt.n_prompt)
        close(prompt["resid_pre", 3], expected[3])


@pytest.mark.parametrize(
    ("positions", "kept"),
    [("last", [-1]), ("prompt", None), ("generated", [0, 1, 2]), ("[-2:2]", [-2, -1, 0, 1]), (1, [1])],
)
def test_positions(positions, kept):
    model, tokenizer = demo()
    whole = observe.capture(model, tokenizer, PROMPTS[:2], layers=[2], max_new_tokens=4)
    answers = [prompt.token_ids[prompt.n_prompt :] for prompt in whole]
    generated = observe.capture(model, tokenizer, PROMPTS[:2], layers=[2], positions=positions, max_new_tokens=4)
    given = observe.capture(model, tokenizer, PROMPTS[:2], layers=[2], positions=positions, completions=answers)
    for one, other, all_ in zip(generated, given, whole, strict=True):
        expected = list(range(-all_.n_prompt, 0)) if kept is None else kept
        assert one.positions.tolist() == expected
        close(one["resid_pre", 2], all_["resid_pre", 2][[p + all_.n_prompt for p in expected]])
        same = other["resid_pre", 2][: len(expected)]  # the last generated token is read there
        close(same, one["resid_pre", 2])


def test_frozen_and_ablated_runs():
    model, tokenizer = demo()
    settings = {"layers": [4], "completions": ["Sure, here it is."] * 4}
    plain = observe.capture(model, tokenizer, PROMPTS, **settings)
    steered = observe.capture(model, tokenizer, PROMPTS, plan(), **settings)
    for way, arguments in ((observe.freeze, {"what": "qk"}), (observe.ablate, {"what": "svv"})):
        within = functools.partial(way, **arguments)
        found = observe.capture(model, tokenizer, PROMPTS, plan(), within=within, **settings)
        for i, prompt in enumerate(found):
            with way(model, plan(), **arguments), fs.hf.read(model, "resid_pre", [4]) as taken, torch.no_grad():
                model(input_ids=torch.tensor([prompt.token_ids]))
            close(prompt["resid_pre", 4], taken[4][-1])
            for other in (plain[i], steered[i]):
                assert not torch.allclose(prompt["resid_pre", 4], other["resid_pre", 4], atol=0.1)


def test_dtype():
    model, tokenizer = demo()
    found = observe.capture(model, tokenizer, PROMPTS[:1], layers=[2], dtype=torch.bfloat16)[0]["resid_pre", 2]
    exact = observe.capture(model, tokenizer, PROMPTS[:1], layers=[2])[0]["resid_pre", 2]
    assert torch.equal(found, exact.bfloat16())


class Interrupted(Exception):
    pass


def passes(model, stop_after=None, at_most=None):
    """Counts forward passes; raises after some, or as if more rows than `at_most` did not fit."""
    count = []

    def hook(module, args, kwargs):
        count.append(kwargs["input_ids"].shape[0])
        if at_most is not None and count[-1] > at_most:
            raise torch.OutOfMemoryError("CUDA out of memory")
        if stop_after is not None and len(count) > stop_after:
            raise Interrupted

    return count, model.model.register_forward_pre_hook(hook, with_kwargs=True)


def test_a_folder_is_streamed_and_resumed(tmp_path):
    model, tokenizer = demo()
    settings = {"at": ("resid_pre", "resid_post"), "layers": [0, 3], "batch_size": 1}
    expected = observe.capture(model, tokenizer, PROMPTS, plan(), **settings)
    count, handle = passes(model, stop_after=2)
    with pytest.raises(Interrupted):
        observe.capture(model, tokenizer, PROMPTS, plan(), folder=tmp_path, **settings)
    handle.remove()
    assert len(list(tmp_path.glob("*.safetensors"))) == 2
    with pytest.raises(ValueError, match=r"lacks 2 of 4 prompts.*goes on where it stopped"):
        observe.Capture.load(tmp_path)
    count, handle = passes(model)
    found = observe.capture(model, tokenizer, PROMPTS, plan(), folder=tmp_path, **settings)
    handle.remove()
    assert len(count) == 2  # what was there is not computed again
    for capture in (found, observe.Capture.load(tmp_path)):
        for one, other in zip(capture, expected, strict=True):
            assert one.token_ids == other.token_ids and one.n_prompt == other.n_prompt
            for key in (("resid_pre", 0), ("resid_post", 3)):
                assert torch.equal(one[key], other[key])
    with pytest.raises(KeyError):
        found[0]["resid_pre", 1]
    assert not list(tmp_path.glob(".*"))  # no temporary files


def test_another_capture_or_a_broken_file_in_the_folder_is_refused(tmp_path):
    model, tokenizer = demo()
    with pytest.raises(FileNotFoundError, match="no capture"):
        observe.Capture.load(tmp_path)
    observe.capture(model, tokenizer, PROMPTS[:2], layers=[0], folder=tmp_path)
    for change in ({"layers": [1]}, {"plans": plan()}, {"dtype": torch.bfloat16}, {"at": "mlp_out"}):
        settings = {"layers": [0], **change}
        with pytest.raises(ValueError, match="another capture"):
            observe.capture(model, tokenizer, PROMPTS[:2], folder=tmp_path, **settings)
    path = next(tmp_path.glob("*.safetensors"))
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"is no batch of a capture.*delete it and capture again"):
        observe.Capture.load(tmp_path)
    plan_file = fs.SteeringVector({0: vector()}).save(path)
    with pytest.raises(ValueError, match=r"no batch of a capture.*its format is"):
        observe.Capture.load(plan_file.parent)


def test_a_fine_tuned_model_does_not_get_the_old_activations(tmp_path):
    """Of the same name and configuration, with other weights: its interrupted capture is not gone on with."""
    model, tokenizer = fs.demo.load()
    fs.hf.find_hook_points(model)  # its own passes are not counted
    settings = {"layers": [3], "batch_size": 1, "folder": tmp_path}
    _, handle = passes(model, stop_after=2)
    with pytest.raises(Interrupted):
        observe.capture(model, tokenizer, PROMPTS, **settings)
    handle.remove()
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    assert len(before) == 2
    with torch.no_grad():  # one step of training
        for parameter in model.parameters():
            parameter += 1e-3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
    with pytest.raises(ValueError, match=r"another capture.*other weights"):
        observe.capture(model, tokenizer, PROMPTS, **settings)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_too_little_memory_lowers_the_batch():
    model, tokenizer = demo()
    expected = observe.capture(model, tokenizer, PROMPTS, layers=[2])
    count, handle = passes(model, at_most=1)
    with pytest.warns(UserWarning, match="do not fit into memory"):
        found = observe.capture(model, tokenizer, PROMPTS, layers=[2], batch_size=4)
    handle.remove()
    assert count == [4, 2, 1, 1, 1, 1]
    for one, other in zip(found, expected, strict=True):
        close(one["resid_pre", 2], other["resid_pre", 2])
    count, handle = passes(model, at_most=0)
    with pytest.raises(torch.OutOfMemoryError):
        observe.capture(model, tokenizer, PROMPTS[:1], layers=[2])
    handle.remove()


def test_bad_input_is_refused():
    model, tokenizer = demo()
    refused = [
        ({"completions": ["a"] * 4, "max_new_tokens": 2}, "one of them"),
        ({"completions": ["a"]}, "1 completions for 4 prompts"),
        ({"plans": [plan()]}, "1 plans for 4 prompts"),
        ({"positions": "generated"}, "keep no token of prompt 0.*give completions"),
        ({"positions": "generated", "max_new_tokens": 1}, "keep no token of prompt 0"),
        ({"at": "residual"}, "unknown hook point"),
        ({"layers": [6]}, r"the model has layers 0\.\.5"),
        ({"layers": []}, "no layer is named"),
        ({"dtype": torch.int8}, "expected one of float64"),
        ({"max_new_tokens": -1}, "0 .none. or more"),
        ({"batch_size": 0}, "at least 1"),
    ]
    fs.hf.find_hook_points(model)  # found by passes of its own
    count, handle = passes(model)
    for settings, message in refused:
        with pytest.raises(ValueError, match=message):
            observe.capture(model, tokenizer, PROMPTS, **settings)
    handle.remove()
    assert not count  # before any forward pass
