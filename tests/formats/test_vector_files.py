"""A file is what its content says: loading by content, our own format with what it says, arguments that fit."""

from __future__ import annotations

import gguf
import pytest
import torch
from strategies import randn

import faststeer as fs
from faststeer.formats import FormatError


@pytest.fixture
def vector() -> fs.SteeringVector:
    return fs.SteeringVector({1: randn(1, 8), 2: randn(2, 8)}, at="resid_mid", model="m", method="dim", op="ablate")


def test_the_name_does_not_matter(vector, tmp_path):
    ours = fs.SteeringVector({1: randn(1, 8)}, op="add")
    (tmp_path / "a.gguf").write_bytes(ours.to_bytes())
    fs.formats.save(ours, tmp_path / "b.safetensors", "gguf")
    torch.save({"layer_activations": {1: randn(1, 8)}}, tmp_path / "c.gguf")
    for name in ("a.gguf", "b.safetensors", "c.gguf"):
        v = fs.SteeringVector.load(tmp_path / name)
        assert (v.layers, v.at, v.op) == ((1,), "resid_post", "add") and torch.equal(v[1], randn(1, 8))


def test_ours_keeps_what_it_is_meant_for(vector, tmp_path):
    v = fs.SteeringVector.load(vector.save(tmp_path / "v"))
    assert (v.at, v.op, v.model, v.method) == ("resid_mid", "ablate", "m", "dim")
    assert fs.SteeringVector({0: randn(0, 4)}).op is None
    with pytest.raises(ValueError, match="unknown op 'erase': expected one of add, ablate"):
        fs.SteeringVector({0: randn(0, 4)}, op="erase")


def test_arguments_repeat_or_complete_and_never_contradict(vector, tmp_path):
    path = vector.save(tmp_path / "v")
    v = fs.SteeringVector.load(path, at="resid_mid", layer=2)
    assert v.layers == (2,) and v.path is None  # a plan must not name a file that holds more
    assert fs.SteeringVector.load(path).path == path
    for said, message in (
        ({"at": "resid_pre"}, "says at='resid_mid', the call at='resid_pre'"),
        ({"op": "add"}, "says op='ablate', the call op='add'"),
        ({"layer": 7}, r"no direction for layer=7; it has \[1, 2\]"),
        ({"position": -1}, "no choice of position"),
        ({"format": "gguf"}, "no file of gguf: by its content it is faststeer"),
    ):
        with pytest.raises(FormatError, match=message):
            fs.SteeringVector.load(path, **said)
    bare = fs.SteeringVector({0: randn(0, 4)}).save(tmp_path / "bare")
    assert fs.SteeringVector.load(bare, op="ablate", model="m").op == "ablate"


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ({"format": "npz"}, "unknown format 'npz'"),
        ({"at": "resid"}, "unknown hook point"),
        ({"layer": -1}, "layer=-1"),
        ({"layer": True}, "layer=True"),
        ({"position": 0}, "position=0"),
        ({"op": "x"}, "unknown op"),
    ],
    ids=str,
)
def test_arguments_that_make_no_sense(vector, said, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        fs.SteeringVector.load(vector.save(tmp_path / "v"), **said)


def test_one_layer_of_any_kind_of_file(tmp_path):
    directions = {1: randn(1, 8), 2: randn(2, 8)}
    fs.formats.save(fs.SteeringVector(directions), tmp_path / "v.gguf")
    torch.save({"layer_activations": directions}, tmp_path / "v.pt")
    torch.save(directions, tmp_path / "open.pt")
    for name, at in (("v.gguf", "resid_post"), ("v.pt", "resid_post"), ("open.pt", "mlp_out")):
        v = fs.SteeringVector.load(tmp_path / name, layer=2, at=at)
        assert (v.layers, v.at) == ((2,), at) and torch.equal(v[2], randn(2, 8))
        with pytest.raises(FormatError, match=r"no direction for layer=7; it has \[1, 2\]"):
            fs.SteeringVector.load(tmp_path / name, layer=7, at=at)


def test_the_scale_of_a_control_vector(tmp_path):
    unit = fs.SteeringVector({1: randn(1, 8) / randn(1, 8).norm()})
    fs.formats.save(unit, tmp_path / "ours.gguf")
    with pytest.raises(FormatError, match="says scale='raw', the call scale='unit'"):
        fs.SteeringVector.load(tmp_path / "ours.gguf", scale="unit")
    writer = gguf.GGUFWriter(tmp_path / "theirs.gguf", "controlvector")
    writer.add_tensor("direction.1", unit[1].numpy()[None])
    for write in (
        writer.write_header_to_file,
        writer.write_kv_data_to_file,
        writer.write_tensors_to_file,
        writer.close,
    ):
        write()
    v = fs.SteeringVector.load(tmp_path / "theirs.gguf", scale="unit")
    assert v.scale == "unit" and torch.equal(v[1], unit[1])


def test_a_file_too_large_is_not_read(tmp_path):
    path = tmp_path / "model.safetensors"
    with path.open("wb") as file:
        file.truncate(2**30 + 1)  # sparse
    with pytest.raises(FormatError, match="is it a model"):
        fs.SteeringVector.load(path)


@pytest.mark.parametrize("name", ["v.pt", "v.NPZ", "v.json"])
def test_a_name_of_another_kind_is_not_written(vector, tmp_path, name):
    """Others would read it as that kind."""
    for save in (fs.formats.save, fs.SteeringVector.save):
        with pytest.raises(ValueError, match=r"writes safetensors: name it \.safetensors"):
            save(vector, tmp_path / name)
    assert not list(tmp_path.iterdir())
    assert fs.SteeringVector.load(fs.formats.save(vector, tmp_path / name, "faststeer")).at == "resid_mid"
    added = fs.SteeringVector({1: randn(1, 8)})
    assert fs.formats.save(added, tmp_path / "v.GGUF").read_bytes().startswith(b"GGUF")


def test_a_folder_is_named_as_one(tmp_path):
    with pytest.raises(FileNotFoundError, match=r": a folder$"):
        fs.SteeringVector.load(tmp_path)


def test_writing_refuses_unknown_formats(vector, tmp_path):
    with pytest.raises(ValueError, match="cannot write format 'caa'"):
        fs.formats.save(vector, tmp_path / "v", "caa")
    with pytest.raises(ValueError, match="model_hint is a field of GGUF"):
        fs.formats.save(vector, tmp_path / "v", model_hint="llama")
