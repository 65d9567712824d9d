"""GGUF control vectors: what is written reads back through the gguf library, what repeng wrote means here what it means
there, and what cannot be known is refused."""

from __future__ import annotations

import struct
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from strategies import randn

import faststeer as fs
from faststeer.formats import FormatError, control_vectors, from_bytes

FIXTURES = Path(__file__).parent / "fixtures"


def vector(**changes) -> fs.SteeringVector:
    words = {"at": "resid_post", "model": "a-model", "method": "dim", "scale": "unit", "provenance": {"n": [1, "ü"]}}
    return fs.SteeringVector({1: randn(1, 8), 4: randn(4, 8)}, **(words | changes))


def written(tensors: dict[str, np.ndarray], architecture: str = "controlvector", **strings: str) -> bytes:
    """A file by the library's own writer."""
    path = Path(written.folder) / "v.gguf"
    writer = gguf.GGUFWriter(path, architecture)
    for name, value in strings.items():
        writer.add_string(name.replace("__", "."), value)
    for name, tensor in tensors.items():
        writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path.read_bytes()


@pytest.fixture(autouse=True)
def folder(tmp_path):
    written.folder = tmp_path


class TestWritten:
    def test_reads_back_equal_through_the_gguf_library(self, tmp_path):
        v = vector()
        fs.formats.save(v, tmp_path / "v.gguf", model_hint="llama")
        reader = gguf.GGUFReader(tmp_path / "v.gguf")
        assert {t.name: t.data.tolist() for t in reader.tensors} == {
            "direction.1": v[1].tolist(),
            "direction.4": v[4].tolist(),
        }
        assert {t.tensor_type.name for t in reader.tensors} == {"F32"}
        assert reader.get_field("general.architecture").contents() == "controlvector"
        assert reader.get_field("controlvector.model_hint").contents() == "llama"
        assert reader.get_field("controlvector.layer_count").contents() == 2

    def test_comes_back_with_everything_it_says(self):
        v = vector()
        back = from_bytes(control_vectors.to_bytes(v))
        assert back.layers == v.layers and all(torch.equal(back[n], v[n]) for n in v.layers)
        assert (back.at, back.op, back.model, back.method, back.scale) == (
            "resid_post",
            "add",
            "a-model",
            "dim",
            "unit",
        )
        assert back.provenance == v.provenance

    def test_resid_pre_is_the_tensor_that_leaves_the_layer_before(self):
        v = vector(at="resid_pre")
        v = fs.SteeringVector({layer + 1: v[layer] for layer in v.layers}, at="resid_pre")
        back = from_bytes(control_vectors.to_bytes(v))
        assert back.at == "resid_post" and torch.equal(back[4], v[5])

    @pytest.mark.parametrize(
        ("make", "message"),
        [
            (lambda: vector(at="attn_out"), "at attn_out: llama.cpp and repeng steer resid_post only"),
            (lambda: vector(op="ablate"), "meant to ablate: llama.cpp and repeng would add it"),
            (lambda: fs.SteeringVector({0: randn(0, 8)}), "resid_post of layer 0 would be written as direction.0"),
            (lambda: vector(at="resid_pre"), "resid_pre of layer 1 would be written as direction.0"),
        ],
        ids=["hook_point", "op", "layer_0", "resid_pre_1"],
    )
    def test_what_the_format_cannot_say_is_not_written(self, make, message, tmp_path):
        with pytest.raises(ValueError, match=message):
            fs.formats.save(make(), tmp_path / "v.gguf")
        assert not list(tmp_path.iterdir())


class TestOtherProjects:
    @pytest.mark.parametrize("name", ["repeng.gguf", "steering_vectors.pt"])
    def test_the_same_direction_at_the_same_layer(self, name):
        v = fs.SteeringVector.load(FIXTURES / name)
        theirs = load_file(FIXTURES / f"{name.partition('.')[0]}.safetensors")
        assert v.layers == (1, 2) and (v.at, v.op) == ("resid_post", "add")
        assert all(torch.equal(v[layer], theirs[f"layers.{layer}"]) for layer in v.layers)

    @pytest.mark.parametrize("name", ["repeng.gguf", "steering_vectors.pt"])
    def test_the_same_logits_as_under_their_own_hooks(self, name):
        """The bound: what the same fp32 steering is away from fp64, on the same prompt; theirs may be as far."""
        v = fs.SteeringVector.load(FIXTURES / name)
        theirs = load_file(FIXTURES / f"{name.partition('.')[0]}.safetensors")

        def logits(dtype: torch.dtype, vector: fs.SteeringVector) -> torch.Tensor:
            model, _ = fs.demo.load(dtype=dtype)
            with torch.no_grad(), fs.steer(model, fs.Add(vector, 1.5)):
                return model(theirs["ids"]).logits.double()

        exact = logits(torch.float64, v)
        bound = 4 * (logits(torch.float32, v) - exact).abs().max()
        assert (theirs["logits"] - exact).abs().max() <= bound
        off = fs.SteeringVector({layer + 1: v[layer] for layer in v.layers})
        assert (theirs["logits"] - logits(torch.float64, off)).abs().max() > 100 * bound

    def test_live(self, tmp_path):
        """Where repeng is installed: its exporter and its importer."""
        repeng = pytest.importorskip("repeng")
        directions = {layer: randn(layer, 8).numpy() for layer in (0, 3, 7)}
        repeng.ControlVector("llama", directions).export_gguf(str(tmp_path / "theirs.gguf"))
        v = fs.SteeringVector.load(tmp_path / "theirs.gguf")
        assert v.layers == (0, 3, 7) and all(np.array_equal(v[n].numpy(), directions[n]) for n in v.layers)
        fs.formats.save(vector(), tmp_path / "ours.gguf")
        back = repeng.ControlVector.import_gguf(tmp_path / "ours.gguf").directions
        assert all(np.array_equal(back[n], vector()[n].numpy()) for n in vector().layers)


class TestRefused:
    direction = np.ones(4, np.float32)

    @pytest.mark.parametrize(
        ("make", "message"),
        [
            (lambda d: written({"direction.1": d}, "llama"), "architecture 'llama'.*is it a model"),
            (lambda d: written({"token_embd.weight": d}), "'token_embd.weight': a control vector holds only"),
            (lambda d: written({"direction.1.a": d}), "direction.1.a"),
            (lambda d: written({"direction.01": d}), "direction.01"),
            (lambda d: written({"direction.-1": d}), "direction.-1"),
            (lambda d: written({"direction.1": d.reshape(2, 2)}), r"shape \[2, 2\]"),
            (lambda d: written({"direction.1": d.astype(np.int32)}), "direction.1 is I32"),
            (lambda d: written({"direction.1": d, "direction.2": d[:2]}), "different hidden sizes"),
            (lambda d: written({"direction.1": d * np.inf}), "NaN or infinite"),
            (lambda d: written({"direction.1": 0 * d}), "only zeros"),
            (lambda d: written({}), "no direction"),
            (lambda d: written({"direction.1": d}, controlvector__mode="project"), 'mode.*say op="add" if they are'),
            (lambda d: written({"direction.1": d}, faststeer__op="ablate"), "op='ablate'"),
            (lambda d: written({"direction.1": d}, faststeer__provenance="[1"), "provenance cannot be read"),
            (lambda d: b"GGUF" + struct.pack("<IQQ", 3, 2**60, 0), "claims .* tensors"),
            (lambda d: b"GGUF" + struct.pack("<IQQ", 3, 0, 2**60), "claims .* metadata values"),
            (
                lambda d: (
                    b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 1) + b"k" + struct.pack("<IIQ", 9, 0, 2**60) + b"\0" * 64
                ),
                "claims .* elements of one array",
            ),
            (lambda d: b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 2**62) + b"k" * 64, "ends inside its header"),
            (lambda d: b"GGUF" + struct.pack("<IQQ", 77, 0, 0), "version 77"),
            (lambda d: b"GGUF", "ends inside its header"),
        ],
        ids=[
            "model",
            "tensor",
            "dotted",
            "padded",
            "negative",
            "2d",
            "int",
            "sizes",
            "infinite",
            "zero",
            "empty",
            "op_unknown",
            "our_op",
            "provenance",
            "tensors",
            "values",
            "array",
            "string",
            "version",
            "magic_only",
        ],
    )
    def test_with_the_reason(self, make, message):
        with pytest.raises(FormatError, match=message):
            from_bytes(make(self.direction), "v.gguf")

    def test_unknown_metadata_is_asked_about(self):
        data = written({"direction.2": self.direction}, controlvector__method="mean")
        assert from_bytes(data, said=fs.formats.Said(op="add")).op == "add"
        with pytest.raises(FormatError, match="op='add', the call op='ablate'"):
            from_bytes(data, said=fs.formats.Said(op="ablate"))

    def test_every_truncation(self):
        whole = control_vectors.to_bytes(vector())
        # The last tensor's padding to the alignment is no part of it.
        for length in range(4, len(whole) - gguf.GGUF_DEFAULT_ALIGNMENT, 7):
            with pytest.raises(FormatError):
                from_bytes(whole[:length])

    def test_layers_of_zeros_are_none(self):
        data = written({"direction.1": 0 * self.direction, "direction.2": self.direction})
        v = from_bytes(data)
        assert v.layers == (2,) and v.provenance["zero_layers"] == [1]


def test_save_of_a_vector_writes_no_gguf(tmp_path):
    with pytest.raises(ValueError, match=r"faststeer\.formats\.save\(vector, path\) writes a GGUF file"):
        vector().save(tmp_path / "v.gguf")
    assert not list(tmp_path.iterdir())
