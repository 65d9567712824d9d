"""Steering vectors: what they refuse, and that their files come back as they went or not at all."""

from __future__ import annotations

import json
import pickle
import struct

import hypothesis
import numpy as np
import pytest
import torch
from hypothesis import strategies as st
from strategies import POINTS, randn, seeds

import faststeer as fs
from faststeer.vector import LAYER_CONVENTION


def vector(**changes) -> fs.SteeringVector:
    given = {
        "at": "resid_mid",
        "model": "a-model",
        "method": "dim",
        "scale": "unit",
        "provenance": {"prompts": 32, "pad": [1, None, "ü"]},
    }
    return fs.SteeringVector({3: randn(3, 8), 1: randn(1, 8)}, **(given | changes))


def same(a: fs.SteeringVector, b: fs.SteeringVector) -> bool:
    fields = ("at", "model", "method", "scale", "provenance")
    return (
        all(getattr(a, name) == getattr(b, name) for name in fields)
        and a.layers == b.layers
        and all(torch.equal(a[layer], b[layer]) for layer in a.layers)
    )


class TestVector:
    def test_lookup(self):
        v = vector()
        assert v.layers == (1, 3) and v.hidden_size == 8
        assert 3 in v and 2 not in v
        assert torch.equal(v[3], randn(3, 8))

    def test_a_layer_it_does_not_have(self):
        with pytest.raises(KeyError, match="no direction for layer 2; it has 1, 3"):
            vector()[2]

    def test_lists_and_integers_are_directions_too(self):
        v = fs.SteeringVector({0: [1, 0, 2]})
        assert v[0].is_floating_point() and v[0].tolist() == [1, 0, 2]

    @pytest.mark.parametrize(
        "layer", [np.int64(3), np.uint8(3), torch.tensor(3)], ids=lambda layer: type(layer).__name__
    )
    def test_layer_numbers_of_other_libraries(self, layer):
        assert fs.SteeringVector({layer: randn(0, 4), 1: randn(1, 4)}).layers == (1, 3)

    @pytest.mark.parametrize(
        "array",
        [np.arange(4.0)[::-1], np.arange(8.0)[::2], np.arange(4).astype(">f4"), np.broadcast_to(np.float16(2), 4)],
        ids=["reversed", "strided", "big_endian", "expanded"],
    )
    def test_arrays_of_any_layout(self, array):
        v = fs.SteeringVector({0: array})
        assert fs.SteeringVector.from_bytes(v.to_bytes())[0].tolist() == array.tolist()

    def test_a_zero_direction_may_be_trained(self):
        assert fs.SteeringVector({0: torch.zeros(4, requires_grad=True)})[0].requires_grad

    def test_repr_says_where_it_belongs(self):
        text = repr(vector())
        assert all(word in text for word in ("1, 3", "resid_mid", "a-model", "dim", "unit"))
        assert "0..4" in repr(fs.SteeringVector({layer: randn(layer, 4) for layer in range(5)}))

    @pytest.mark.parametrize(
        ("make", "message"),
        [
            (lambda: fs.SteeringVector({}), "at least one layer"),
            (lambda: fs.SteeringVector({-1: randn(0, 4)}), "layer -1: .* counted from 0"),
            (lambda: fs.SteeringVector({True: randn(0, 4)}), "layer True"),
            (lambda: fs.SteeringVector({"1": randn(0, 4)}), "layer '1'"),
            (lambda: fs.SteeringVector({0: randn(0, 4), 1: randn(0, 5)}), r"different hidden sizes \[4, 5\]"),
            (
                lambda: fs.SteeringVector({0: torch.tensor([1.0, float("nan"), float("inf")])}),
                "layer 0 has 2 NaN or infinite.* must be finite; .*try bfloat16",
            ),
            (lambda: fs.SteeringVector({0: torch.zeros(4)}), "layer 0 is zero: it points nowhere"),
            (lambda: fs.SteeringVector({0: randn(0, 2, 4)}), r"layer 0 has shape \[2, 4\]: expected .*\[hidden\]"),
            (lambda: fs.SteeringVector({0: torch.tensor(1.0)}), r"layer 0 has shape \[\]"),
            (lambda: fs.SteeringVector({0: torch.zeros(0)}), r"layer 0 has shape \[0\]"),
            (lambda: fs.SteeringVector({0: torch.zeros(4, device="meta")}), "meta device"),
            (lambda: fs.SteeringVector({0: torch.ones(4, dtype=torch.complex64)}), "complex64.*real numbers"),
            (lambda: fs.SteeringVector({0: torch.ones(4).to_sparse()}), "sparse_coo.*dense tensor"),
            (
                lambda: fs.SteeringVector({0: randn(0, 4)}, at="resid"),
                "unknown hook point 'resid': expected one of resid_pre, attn_out",
            ),
            (lambda: fs.SteeringVector({0: randn(0, 4)}, scale="big"), "unknown scale 'big': expected 'raw' or 'unit'"),
            (lambda: fs.SteeringVector({1: randn(0, 4), "2": randn(0, 4)}), "layer '2'"),
            (lambda: fs.SteeringVector({1: randn(0, 4), torch.tensor(1): randn(0, 4)}), "layer 1 is named twice"),
            (lambda: fs.SteeringVector(randn(0, 2, 4)), "directions is a Tensor: expected {layer"),
            (lambda: fs.SteeringVector([randn(0, 4)]), "directions is a list: expected {layer"),
            (lambda: fs.SteeringVector({0: torch.full((4,), 1e-60, dtype=torch.float64)}), "layer 0 is zero"),
            (
                lambda: fs.SteeringVector({0: torch.quantize_per_tensor(torch.ones(4), 0.1, 0, torch.qint8)}),
                r"qint8.*dense tensor.*\.dequantize",
            ),
            (lambda: fs.SteeringVector({0: torch.nested.nested_tensor([randn(0, 4)])}), "nested.*dense tensor"),
            (lambda: fs.SteeringVector({0: randn(0, 4)}, provenance={"v": randn(0, 4)}), "provenance is not JSON"),
            (lambda: fs.SteeringVector({0: randn(0, 4)}, provenance={1: 2, "a": 3}), "provenance is not JSON"),
            (lambda: fs.SteeringVector({0: randn(0, 4)}, provenance=["a"]), "provenance is a list: expected an object"),
        ],
        ids=[
            "empty",
            "negative",
            "bool",
            "str",
            "sizes",
            "nan",
            "zero",
            "2d",
            "scalar",
            "no_numbers",
            "meta",
            "complex",
            "sparse",
            "hook_point",
            "scale",
            "mixed_layers",
            "layer_twice",
            "no_mapping",
            "list",
            "zero_in_float32",
            "quantised",
            "nested",
            "provenance_tensor",
            "provenance_keys",
            "provenance_list",
        ],
    )
    @pytest.mark.filterwarnings("ignore:.*(quantize|quantized|nested)")
    def test_refused(self, make, message):
        with pytest.raises((TypeError, ValueError), match=message):
            make()


class TestFile:
    def test_comes_back_as_it_went(self, tmp_path):
        path = vector().save(tmp_path / "new" / "folder" / "v.safetensors")
        loaded = fs.SteeringVector.load(path)
        assert same(loaded, vector())
        assert loaded.path == path

    @hypothesis.settings(parent=hypothesis.settings(), max_examples=50)
    @hypothesis.given(
        layers=st.sets(st.integers(0, 100), min_size=1, max_size=4),
        hidden=st.integers(1, 40),
        seed=seeds,
        at=st.sampled_from(POINTS),
        scale=st.sampled_from(["raw", "unit"]),
        words=st.tuples(*[st.none() | st.text(st.characters(codec="utf-8"), max_size=20)] * 2),
        provenance=st.dictionaries(
            st.text(max_size=5), st.integers() | st.text(max_size=5) | st.none() | st.lists(st.booleans()), max_size=3
        ),
    )
    def test_any_vector_comes_back_as_it_went(self, layers, hidden, seed, at, scale, words, provenance):
        v = fs.SteeringVector(
            {layer: randn(seed + layer, hidden) for layer in layers},
            at=at,
            scale=scale,
            model=words[0],
            method=words[1],
            provenance=provenance,
        )
        assert same(fs.SteeringVector.from_bytes(v.to_bytes()), v)

    def test_low_precision_directions_keep_their_values(self):
        v = fs.SteeringVector({0: randn(0, 8, dtype=torch.bfloat16)})
        back = fs.SteeringVector.from_bytes(v.to_bytes())
        assert back[0].dtype == torch.float32 and torch.equal(back[0], v[0].float())

    def test_is_written_the_same_each_time(self):
        assert vector().to_bytes() == vector().to_bytes()

    def test_other_tools_can_read_it(self, tmp_path):
        from safetensors import safe_open

        with safe_open(vector().save(tmp_path / "v.safetensors"), "pt") as file:
            assert sorted(file.keys()) == ["layers.1", "layers.3"]
            assert file.metadata()["at"] == "resid_mid" and file.metadata()["layer_convention"]

    def test_no_such_file(self, tmp_path):
        with pytest.raises(FileNotFoundError, match=r"no steering vector at .*v\.safetensors"):
            fs.SteeringVector.load(tmp_path / "v.safetensors")

    def test_a_pickle_is_never_opened(self, tmp_path):
        class Bomb:
            def __reduce__(self):
                return pytest.fail, ("a pickle was executed",)

        path = tmp_path / "v.safetensors"
        path.write_bytes(pickle.dumps(Bomb()))
        with pytest.raises(ValueError, match="is a pickle, which may run code and is never read"):
            fs.SteeringVector.load(path)
        torch.save({"layers.0": torch.ones(4)}, path)
        with pytest.raises(fs.FormatError, match=r"'layers.0': expected layer numbers"):
            fs.SteeringVector.load(path)

    def test_every_truncation_is_refused(self, tmp_path):
        whole, path = vector().to_bytes(), tmp_path / "v.safetensors"
        for length in range(len(whole)):
            path.write_bytes(whole[:length])
            says = r"v\.safetensors cannot be read as safetensors .*truncated" if length else "is empty"
            with pytest.raises(ValueError, match=says):
                fs.SteeringVector.load(path)

    @hypothesis.settings(parent=hypothesis.settings(), max_examples=200)
    @hypothesis.given(
        flips=st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(1, 255)), min_size=1, max_size=6),
        extra=st.binary(max_size=3),
    )
    def test_flipped_bytes_give_a_vector_or_a_value_error(self, flips, extra):
        data = bytearray(vector().to_bytes() + extra)
        for where, change in flips:
            data[int(where * len(data))] ^= change
        try:
            v = fs.SteeringVector.from_bytes(bytes(data))
        except ValueError as error:
            assert "the data" in str(error)
        else:
            assert v.hidden_size and all(torch.isfinite(v[layer]).all() and v[layer].any() for layer in v.layers)

    @hypothesis.settings(parent=hypothesis.settings(), max_examples=100)
    @hypothesis.given(data=st.binary(max_size=200), with_length=st.booleans())
    def test_any_bytes_are_refused(self, data, with_length):
        with pytest.raises(ValueError, match="the data"):
            fs.SteeringVector.from_bytes(struct.pack("<Q", len(data)) + data if with_length else data)


def written_by_hand(
    tensors: dict[str, tuple[str, list[int], int]] | None = None, metadata: object = None, **changes: object
) -> bytes:
    """A safetensors file: {name: (dtype, shape, bytes)} and metadata, by default those of a valid vector."""
    header: dict[str, object] = {}
    if metadata is None:
        metadata = {"format": "faststeer.vector/1", "at": "resid_post", "scale": "raw", "provenance": "{}"}
        metadata |= {"layer_convention": LAYER_CONVENTION} | changes
    header["__metadata__"] = (
        {k: v for k, v in metadata.items() if v is not None} if isinstance(metadata, dict) else metadata
    )
    start = 0
    for name, (dtype, shape, size) in (tensors or {"layers.0": ("F32", [2], 8)}).items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [start, start + size]}
        start += size
    if metadata == "null":
        header["__metadata__"] = None
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + b"\x3f" * start


class TestHostileFile:
    """Files that are valid safetensors, and no valid vector: refused with ValueError, never another exception."""

    def test_the_file_written_here_is_valid_as_it_stands(self):
        assert fs.SteeringVector.from_bytes(written_by_hand()).layers == (0,)

    @pytest.mark.parametrize(
        ("data", "message"),
        [
            (
                lambda: written_by_hand(format="faststeer.vector/2"),
                r"no faststeer vector \(format 'faststeer.vector/2', expected 'faststeer.vector/1'\)",
            ),
            (
                lambda: written_by_hand(metadata={"from": "elsewhere"}),
                "no faststeer vector .*build one with SteeringVector",
            ),
            (lambda: written_by_hand(metadata="null"), "the data"),
            (
                lambda: written_by_hand({"model.norm": ("F32", [2], 8)}),
                "'model.norm': a faststeer vector holds only tensors named layers.<number>",
            ),
            (lambda: written_by_hand({"layers.-1": ("F32", [2], 8)}), "layers.-1"),
            (lambda: written_by_hand({"layers." + "9" * 5000: ("F32", [2], 8)}), "not a valid steering vector"),
            (lambda: written_by_hand({"layers.0": ("F32", [2], 8), "layers.00": ("F32", [2], 8)}), "layer"),
            (lambda: written_by_hand({"layers.0": ("F32", [2, 1], 8)}), r"shape \[2, 1\]"),
            (lambda: written_by_hand({"layers.0": ("F32", [0], 0)}), r"shape \[0\]"),
            (
                lambda: written_by_hand({"layers.0": ("F32", [2], 8), "layers.1": ("F32", [3], 12)}),
                "different hidden sizes",
            ),
            (lambda: written_by_hand({"layers.0": ("F8_E8M0", [2], 2)}), "the data"),
            (lambda: written_by_hand({"layers.0": ("F4", [4], 2)}), "the data"),
            (lambda: written_by_hand(at="resid"), "unknown hook point 'resid'"),
            (lambda: written_by_hand(at=None), "unknown hook point None"),
            (lambda: written_by_hand(scale="huge"), "unknown scale 'huge'"),
            (
                lambda: written_by_hand(layer_convention="from 1"),
                "layer convention is 'from 1', expected ",
            ),
            (lambda: written_by_hand(layer_convention=None), "layer convention is None"),
            (lambda: written_by_hand(provenance="[]"), "provenance is not an object"),
            (lambda: written_by_hand(provenance="{"), "not a valid steering vector"),
            (lambda: written_by_hand(provenance="[" * 100_000), "the data"),
        ],
        ids=[
            "format",
            "other_tool",
            "null_metadata",
            "other_tensor",
            "negative_layer",
            "endless_layer",
            "layer_twice",
            "2d",
            "no_numbers",
            "sizes",
            "dtype_unknown_to_torch",
            "packed_dtype",
            "hook_point",
            "no_hook_point",
            "scale",
            "layers_from_1",
            "layers_unsaid",
            "provenance_list",
            "provenance_cut",
            "provenance_deep",
        ],
    )
    def test_refused(self, data, message):
        with pytest.raises(ValueError, match=message):
            fs.SteeringVector.from_bytes(data())

    @pytest.mark.parametrize("dtype", ["F8_E4M3", "F8_E5M2", "I8", "BOOL", "F16", "BF16", "I64", "F64", "U64"])
    def test_other_dtypes_are_read_or_refused(self, dtype):
        size = {"F16": 2, "BF16": 2, "I64": 8, "F64": 8, "U64": 8}.get(dtype, 1)
        data = bytearray(written_by_hand({"layers.0": (dtype, [2], 2 * size)}))
        data[-2 * size :] = b"\x01" * 2 * size
        try:
            assert fs.SteeringVector.from_bytes(bytes(data)).hidden_size == 2
        except ValueError as error:
            assert "the data" in str(error)
