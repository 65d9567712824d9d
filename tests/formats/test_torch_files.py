"""`.pt` files of other projects: read with their meaning, asked about where they do not say it, never executed."""

from __future__ import annotations

import dataclasses
import io
import json
import pickle
import sys
import types
import zipfile

import numpy as np
import pytest
import torch
from strategies import randn

import faststeer as fs
from faststeer.formats import FormatError, Said, from_bytes


def saved(content: object, **how: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer, **how)
    return buffer.getvalue()


def read(content: object, **said: object) -> fs.SteeringVector:
    return from_bytes(saved(content), "v.pt", Said(**said))


class TestSteeringVectors:
    def test_its_own_class_is_read_without_its_code(self, monkeypatch):
        module = types.ModuleType("steering_vectors.steering_vector")

        @dataclasses.dataclass
        class SteeringVector:
            layer_activations: dict
            layer_type: str = "decoder_block"

        SteeringVector.__module__, SteeringVector.__qualname__ = module.__name__, "SteeringVector"
        module.SteeringVector = SteeringVector
        monkeypatch.setitem(sys.modules, "steering_vectors", types.ModuleType("steering_vectors"))
        monkeypatch.setitem(sys.modules, module.__name__, module)
        data = saved(SteeringVector({3: randn(3, 8), 1: randn(1, 8)[None]}))
        monkeypatch.delitem(sys.modules, module.__name__)
        monkeypatch.delitem(sys.modules, "steering_vectors")
        v = from_bytes(data)
        assert (v.layers, v.at, v.op) == ((1, 3), "resid_post", "add")
        assert torch.equal(v[1], randn(1, 8)) and torch.equal(v[3], randn(3, 8))

    def test_modules_inside_a_layer_are_asked_about(self):
        content = {"layer_activations": {2: randn(2, 8)}, "layer_type": "self_attn"}
        with pytest.raises(FormatError, match=r"attn_out in a model without norms.*Gemma 2: say at="):
            read(content)
        assert read(content, at="attn_out").at == "attn_out"
        with pytest.raises(FormatError, match="'input_layernorm', whose output is no part of the residual stream"):
            read({"layer_activations": {2: randn(2, 8)}, "layer_type": "input_layernorm"}, at="resid_pre")

    def test_what_it_says_is_not_contradicted(self):
        with pytest.raises(FormatError, match="says at='resid_post', the call at='resid_pre'"):
            read({"layer_activations": {2: randn(2, 8)}}, at="resid_pre")


class TestOneDirection:
    def test_caa_by_its_name(self, tmp_path):
        path = tmp_path / "vec_layer_13_Llama-2-7b-chat-hf.pt"
        torch.save(randn(0, 8).half(), path)
        v = fs.SteeringVector.load(path)
        assert (v.layers, v.at, v.method, v.model) == ((13,), "resid_post", "caa", "Llama-2-7b-chat-hf")
        assert torch.equal(v[13], randn(0, 8).half().float())
        with pytest.raises(FormatError, match="says layer=13, the call layer=12"):
            fs.SteeringVector.load(path, layer=12)

    def test_refusal_direction_by_what_lies_beside_it(self, tmp_path):
        torch.save(randn(0, 8).double(), tmp_path / "direction.pt")
        with pytest.raises(FormatError, match="say layer= and at="):
            fs.SteeringVector.load(tmp_path / "direction.pt")
        (tmp_path / "direction_metadata.json").write_text(json.dumps({"pos": -2, "layer": 10}))
        v = fs.SteeringVector.load(tmp_path / "direction.pt")
        assert (v.layers, v.at, v.method, v.provenance["position"]) == ((10,), "resid_pre", "dim", -2)

    @pytest.mark.parametrize(
        "content", ["{", "[]", '{"pos": -2}', '{"pos": -2, "layer": -1}', '{"pos": 1, "layer": "x"}']
    )
    def test_another_file_beside_it_says_nothing(self, content, tmp_path):
        torch.save(randn(0, 8), tmp_path / "direction.pt")
        (tmp_path / "direction_metadata.json").write_text(content)
        with pytest.raises(FormatError, match="say layer= and at="):
            fs.SteeringVector.load(tmp_path / "direction.pt")

    def test_as_the_caller_says(self):
        assert read(randn(0, 8), format="caa", layer=3).at == "resid_post"
        assert read(randn(0, 8), format="refusal_direction", layer=3).at == "resid_pre"
        v = read(randn(0, 8), layer=3, at="mlp_out", op="ablate", model="m")
        assert (v.layers, v.at, v.op, v.model) == ((3,), "mlp_out", "ablate", "m")
        for said in ({}, {"layer": 3}, {"at": "resid_pre"}, {"format": "caa"}):
            with pytest.raises(FormatError, match="say layer= and at="):
                read(randn(0, 8), **said)

    def test_one_row_is_one_direction(self):
        with pytest.raises(FormatError, match="say layer= and at="):
            read(randn(0, 8)[None], at="resid_pre")
        for layer in (3, np.int64(3), torch.tensor(3)):
            v = read(randn(0, 8)[None, None], at="resid_pre", layer=layer)
            assert v.layers == (3,) and torch.equal(v[3], randn(0, 8))


class TestSeveral:
    def test_mean_diffs(self):
        diffs = torch.stack([torch.stack([randn(10 * p + n, 8) for n in range(4)]) for p in range(3)]).double()
        diffs[2, 0] = 0  # where both prompts end in the same token
        for said in ({}, {"format": "refusal_direction"}, {"position": -1}):
            with pytest.raises(FormatError, match=r"say (format|position)="):
                read(diffs, **said)
        v = read(diffs, format="refusal_direction", position=-1)
        assert (v.layers, v.at, v.provenance["zero_layers"]) == ((1, 2, 3), "resid_pre", [0])
        assert torch.equal(v[3], diffs[2, 3])
        assert torch.equal(read(diffs, format="refusal_direction", position=-3, layer=2)[2], diffs[0, 2])
        with pytest.raises(FormatError, match=r"position=-4 is not among them \(-3..-1\)"):
            read(diffs, format="refusal_direction", position=-4)

    @pytest.mark.parametrize(
        "content", [{0: randn(0, 8), 2: randn(2, 8)}, {"0": randn(0, 8), "2": randn(2, 8)}], ids=["int", "str"]
    )
    def test_directions_by_layer(self, content):
        with pytest.raises(FormatError, match="does not say at which hook point: say at="):
            read(content)
        v = read(content, at="resid_mid")
        assert (v.layers, v.at) == ((0, 2), "resid_mid") and torch.equal(v[2], randn(2, 8))

    def test_rows_of_one_direction_by_layer(self):
        for content in ({2: randn(2, 8)[None]}, {"layer_activations": {2: randn(2, 8)[None, None]}}):
            v = read(content, at="resid_post")
            assert v.layers == (2,) and torch.equal(v[2], randn(2, 8))
        for content in ({2: torch.ones(2, 8)}, {"layer_activations": {2: torch.ones(2, 8)}}):
            with pytest.raises(FormatError, match=r"layer 2 has shape \[2, 8\]"):
                read(content, at="resid_post")

    def test_rows_by_layer(self):
        v = read(torch.stack([randn(n, 8) for n in range(3)]), at="resid_pre", layer=2)
        assert v.layers == (2,) and torch.equal(v[2], randn(2, 8))


class TestHostile:
    def test_code_is_never_run(self, tmp_path):
        class Bomb:
            def __reduce__(self):
                return pytest.fail, ("a pickle was executed",)

        for data in (saved(Bomb()), saved({0: Bomb()}), saved(Bomb(), _use_new_zipfile_serialization=False)):
            with pytest.raises(FormatError, match="a pickle of code, which is never run"):
                from_bytes(data)
        with pytest.raises(FormatError):
            from_bytes(pickle.dumps(Bomb()))

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            (randn(0, 8).expand(2**20, 8), "larger than the file"),
            (torch.ones(1).expand(2**50), "larger than the file"),
            ({0: torch.ones(4).to_sparse()}, "expected dense floating numbers"),
            (torch.ones(4, dtype=torch.complex64), "expected dense floating numbers"),
            (torch.arange(4), "int64 tensor on cpu: expected dense floating numbers"),
            ({3: np.ones(4)}, "such as that of a NumPy array .*save tensors"),
            ({"weights": torch.ones(4)}, "key 'weights': expected layer numbers"),
            ({-1: torch.ones(4)}, "key '-1'"),
            ({0: torch.ones(4), "0": torch.ones(4)}, "names a layer twice"),
            ({0: [1.0]}, "layer 0 is a list"),
            ({}, "holds a dict"),
            ("text", "holds a str"),
            (torch.ones(2, 2, 2, 2), r"shape \[2, 2, 2, 2\]"),
            (torch.tensor(1.0), r"shape \[\]"),
            ({"layer_activations": []}, "no {layer: tensor}"),
            ({"layer_activations": {0: torch.full((4,), torch.nan)}}, "NaN or infinite"),
            (torch.ones(4, device="meta"), "expected dense floating numbers"),
        ],
        ids=[
            "expanded",
            "endless",
            "sparse",
            "complex",
            "whole",
            "numpy",
            "key",
            "negative",
            "twice",
            "list",
            "empty",
            "text",
            "4d",
            "0d",
            "no_layers",
            "nan",
            "meta",
        ],
    )
    def test_refused_with_the_reason(self, content, message):
        with pytest.raises(FormatError, match=message):
            from_bytes(saved(content), said=Said(at="resid_post"))

    def test_a_zip_bomb_is_not_unpacked(self):
        source, target = zipfile.ZipFile(io.BytesIO(saved(torch.zeros(2**20)))), io.BytesIO()
        with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as archive:
            for name in source.namelist():
                archive.writestr(name, source.read(name))
        with pytest.raises(FormatError, match=r"compressed, which torch.save never does"):
            from_bytes(target.getvalue())

    def test_the_format_before_zip(self):
        data = saved({"layer_activations": {1: randn(1, 8)}}, _use_new_zipfile_serialization=False)
        assert torch.equal(from_bytes(data)[1], randn(1, 8))
        for length in range(0, len(data), 5):
            with pytest.raises(FormatError):
                from_bytes(data[:length])
