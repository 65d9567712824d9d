"""Damaged and hostile files: a reader gives a vector or VectorFileError, whatever the bytes. `make test-full` tries
20,000 of them."""

from __future__ import annotations

import io
import os

import hypothesis
import pytest
import torch
from damage import damaged
from hypothesis import strategies as st
from strategies import randn

import faststeer as fs
from faststeer.algebra import SparseVector, sparsify
from faststeer.formats import Said, VectorFileError, control_vectors, from_bytes
from faststeer.formats.torch_files import LEGACY, ZIP

FULL = os.environ.get("FASTSTEER_TEST_PROFILE") == "full"


def _saved(content: object, zipped: bool = True) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer, _use_new_zipfile_serialization=zipped)
    return buffer.getvalue()


def _seeds() -> dict[str, bytes]:
    """A valid file of every layout that is read."""
    v = fs.SteeringVector({1: randn(1, 8), 2: randn(2, 8)}, model="m", method="dim", provenance={"a": [1]}, op="add")
    activations = {"layer_activations": dict(v.directions), "layer_type": "decoder_block"}
    return {
        "ours": v.to_bytes(),
        "sparse": sparsify(v, keep=0.5).to_bytes(),
        "gguf": control_vectors.to_bytes(v),
        "zip": _saved(activations),
        "legacy": _saved(activations, zipped=False),
        "tensor": _saved(v[1]),
        "rows": _saved(torch.stack([v[1], v[2]]).half(), zipped=False),
    }


SEEDS = _seeds()
SAID = (Said(), Said(at="resid_post", layer=1), Said(format="refusal_direction", position=-1), Said(op="add"))


def survives(data: bytes, said: Said) -> None:
    """What is read is a vector in order, or the file is refused with an error that names it."""
    try:
        vector = from_bytes(data, "the file", said)
    except VectorFileError as error:
        assert str(error).startswith("the file")
    else:
        assert all(torch.isfinite(vector[n].float()).all() and vector[n].any() for n in vector.layers)
    try:
        SparseVector.from_bytes(data, "the file")
    except VectorFileError as error:
        assert str(error).startswith("the file")


# 7 layouts x 2,500 and 2,500 more of plain bytes are the 20,000 of the full run.
many = hypothesis.settings(
    parent=hypothesis.settings(),
    max_examples=2500 if FULL else 40,
    derandomize=not FULL,
    suppress_health_check=list(hypothesis.HealthCheck),
    phases=(hypothesis.Phase.explicit, hypothesis.Phase.generate, hypothesis.Phase.shrink),
)


@pytest.mark.parametrize("name", SEEDS)
def test_the_seeds_are_valid_as_they_stand(name):
    said = Said(at="resid_post", layer=1) if name in ("tensor", "rows") else Said()
    assert from_bytes(SEEDS[name], said=said).hidden_size == 8


@pytest.mark.parametrize("name", SEEDS)
@many
@hypothesis.given(data=st.data())
def test_damaged_files(name, data):
    survives(data.draw(damaged(SEEDS[name], tuple(SEEDS.values()))), data.draw(st.sampled_from(SAID)))


@many
@hypothesis.given(
    start=st.sampled_from((b"", b"GGUF\x03\0\0\0", ZIP, LEGACY, LEGACY + b"\x80\x02M\xe9\x03.", b"\x08\0\0\0\0\0\0\0")),
    rest=st.binary(max_size=200),
    said=st.sampled_from(SAID),
)
def test_any_bytes(start, rest, said):
    survives(start + rest, said)
