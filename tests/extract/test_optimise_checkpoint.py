"""Training that was interrupted goes on as if it had not been; a checkpoint of something else is refused."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save
from tiny_chat import bpe_tokenizer, llama
from training import bipo, ntp, po, reps

from faststeer.extract import Pair

PAIRS = [Pair(f"Bake {n} cakes", "I cannot help with that.", "Sure, first mix flour.", 1) for n in range(3)]
PAIRS += [Pair(f"Steal {n} boats", "Sure, wait.", "As an AI I can't do it.", -1) for n in range(3)]
UNSEEN = [Pair("Name three colours", "I'm sorry.", "Sure, here they are."), Pair("hijack", "Sure.", "I can't.", -1)]
HOW = {
    "layers": [0, 2],
    "seed": [0, 1],
    "steps": 9,
    "batch_size": 2,
    "held_out": UNSEEN,
    "settings": dict(every=2, patience=2, start=0.3),
}


@pytest.fixture(scope="module")
def tokenizer():
    return bpe_tokenizer()


@pytest.fixture(scope="module")
def model(tokenizer):
    return llama(len(tokenizer)).requires_grad_(False)


class Interruption:
    """Ctrl-C in the n-th step's forward pass; with n = 0, whenever there is something to train."""

    def __init__(self, model, n: int) -> None:
        self.model, self.left = model, n

    def __enter__(self):
        self.handle = self.model.lm_head.register_forward_hook(self)

    def __exit__(self, *exception) -> None:
        self.handle.remove()

    def __call__(self, module, args, output) -> None:
        if torch.is_grad_enabled():
            self.left -= 1
            if self.left < 0:
                raise KeyboardInterrupt


def same(one, other) -> None:
    """Bit for bit."""
    assert len(one.runs) == len(other.runs)
    for a, b in zip(one.runs, other.runs, strict=True):
        assert torch.equal(a.vector[a.layer], b.vector[b.layer])
        assert (a.losses, a.held_out, a.best_step) == (b.losses, b.held_out, b.best_step)
        assert a.vector.provenance == b.vector.provenance


@pytest.mark.parametrize("method", [ntp, po, reps, bipo])
def test_resumed_is_uninterrupted(method, model, tokenizer, tmp_path):
    """Interrupted twice: after a checkpoint, and later between two."""
    whole = method(model, tokenizer, PAIRS, **HOW, lr=0.2)
    path = tmp_path / "state.safetensors"
    for steps in (3, 3):
        with Interruption(model, steps), pytest.raises(KeyboardInterrupt):
            method(model, tokenizer, PAIRS, **HOW, lr=0.2, checkpoint=path)
    with safe_open(path, "pt") as file:
        assert file.metadata()["step"] == "4"
    same(method(model, tokenizer, PAIRS, **HOW, lr=0.2, checkpoint=path), whole)
    with Interruption(model, 0):  # finished: nothing is trained again
        same(method(model, tokenizer, PAIRS, **HOW, lr=0.2, checkpoint=path), whole)


def test_one_vector_stopped_early_before_the_interruption(model, tokenizer, tmp_path):
    how = {**HOW, "seed": [0, 1, 2], "batch_size": 1, "lr": 0.5, "steps": 12}
    how["settings"] = dict(every=1, patience=2, schedule="constant", clip=None)
    whole = ntp(model, tokenizer, PAIRS, **how)
    lengths = sorted(len(run.losses) for run in whole.runs)
    assert lengths[0] < lengths[-1]
    path = tmp_path / "state.safetensors"
    with Interruption(model, lengths[0] + 1), pytest.raises(KeyboardInterrupt):
        ntp(model, tokenizer, PAIRS, **how, checkpoint=path)
    same(ntp(model, tokenizer, PAIRS, **how, checkpoint=path), whole)


@pytest.fixture(scope="module")
def saved(model, tokenizer, tmp_path_factory):
    path = tmp_path_factory.mktemp("saved") / "state.safetensors"
    ntp(model, tokenizer, PAIRS, layers=1, steps=2, checkpoint=path)
    return path.read_bytes()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lr": 0.5}, r"differs in lr \(there 0.01, here 0.5\)"),
        ({"layers": 2}, "differs in layers"),
        ({"seed": 3}, "differs in seeds"),
        ({"steps": 3}, "differs in steps"),
        ({"length_normalised": False}, "differs in objective"),
        ({"settings": dict(clip=None)}, "differs in clip"),
        ({"pairs": PAIRS[1:]}, r"n_pairs \(there 6, here 5\), pairs"),
        ({"pairs": [*PAIRS[:-1], UNSEEN[0]]}, r"differs in pairs \("),
        ({"held_out": UNSEEN}, "differs in held_out"),
    ],
)
def test_another_training_is_refused(changes, message, saved, model, tokenizer, tmp_path):
    path = tmp_path / "state.safetensors"
    path.write_bytes(saved)
    arguments = {"pairs": PAIRS, "layers": 1, "steps": 2} | changes
    with pytest.raises(ValueError, match=message):
        ntp(model, tokenizer, arguments.pop("pairs"), **arguments, checkpoint=path)
    assert path.read_bytes() == saved


def test_another_model_is_refused(saved, tokenizer, tmp_path):
    path = tmp_path / "state.safetensors"
    path.write_bytes(saved)
    with pytest.raises(ValueError, match="differs in weights"):
        ntp(llama(len(tokenizer), seed=1), tokenizer, PAIRS, layers=1, steps=2, checkpoint=path)


@pytest.mark.parametrize("name", ["model.layers.1.mlp.down_proj.weight", "lm_head.weight"])
def test_a_single_changed_weight_is_another_model(name, saved, model, tokenizer, tmp_path):
    path, tuned = tmp_path / "state.safetensors", copy.deepcopy(model)
    path.write_bytes(saved)
    with torch.no_grad():
        tuned.get_parameter(name).view(-1)[-2] += 1e-3  # neither the first numbers nor the last
    with pytest.raises(ValueError, match="differs in weights"):
        ntp(tuned, tokenizer, PAIRS, layers=1, steps=2, checkpoint=path)
    assert path.read_bytes() == saved


def test_a_folder_is_refused(model, tokenizer, tmp_path):
    with pytest.raises(ValueError, match="holds no checkpoint of a training"):
        ntp(model, tokenizer, PAIRS, layers=1, steps=2, checkpoint=tmp_path)


@settings(max_examples=300)
@given(data=st.data())
def test_only_our_error_comes_out_of_damaged_files(data, saved, tmp_path_factory):
    """Cut short, bytes changed, JSON in the header changed."""
    from faststeer.extract.optimise.checkpoint import Checkpoint

    path = tmp_path_factory.getbasetemp() / "damaged.safetensors"
    length = int.from_bytes(saved[:8], "little")
    header = json.loads(saved[8 : 8 + length])
    description = json.loads(header["__metadata__"]["description"])
    kind = data.draw(st.sampled_from(["cut", "bytes", "json"]))
    if kind == "cut":
        damaged = saved[: data.draw(st.integers(0, len(saved) - 1))]
    elif kind == "bytes":
        place, new = data.draw(st.integers(0, length + 8)), data.draw(st.binary(min_size=1, max_size=4))
        damaged = saved[:place] + new + saved[place + len(new) :]
    else:
        name = data.draw(st.sampled_from(["progress", "description", "step", "format"]))
        value = data.draw(
            st.sampled_from(["", "3", "[]", "{}", "null", "[1]", '[{"losses": 3}]', '[{"losses": [null]}]'])
        )
        tensors = {"values.0": torch.zeros(32)}
        damaged = save(tensors, {**header["__metadata__"], name: value})
    path.write_bytes(damaged)
    try:
        states, step = Checkpoint.of(path, description, 1)
    except ValueError as error:
        assert str(path) in str(error)
    else:
        assert len(states) == 1 and states[0].values.shape == (32,) and isinstance(step, int)
