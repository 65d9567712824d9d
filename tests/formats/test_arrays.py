"""Vectors as bare numbers: what NumPy or JSON wrote is what is read, once the caller says where it belongs."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

import faststeer as fs
from faststeer.files import FormatError

ROWS = np.random.default_rng(3).standard_normal((4, 6)).astype(np.float32)


def load(path, **said):
    return fs.SteeringVector.load(path, **said)


def written(folder, name, content):
    path = folder / name
    if isinstance(content, dict) and name.endswith(".npz"):
        np.savez(path, **content)
    elif name.endswith(".npy"):
        np.save(path, content)
    else:
        path.write_text(json.dumps(content))
    return path


BY_LAYER = {
    "v.npz": {"5": ROWS[0], "11": ROWS[1]},
    "v.json": {"5": ROWS[0].tolist(), "11": ROWS[1].tolist()},
    "v.svec": {
        "model_type": "qwen2",
        "explained_variances": {"5": 0.4, "11": 0.6},
        "directions": {"5": ROWS[0].tolist(), "11": ROWS[1].tolist()},
    },
}


@pytest.mark.parametrize("name", BY_LAYER)
def test_directions_by_layer(name, tmp_path):
    path = written(tmp_path, name, BY_LAYER[name])
    vector = load(path, at="resid_pre", op="ablate", model="m")
    assert (vector.at, vector.op, vector.model, vector.scale) == ("resid_pre", "ablate", "m", "raw")
    assert vector.layers == (5, 11)
    assert all(np.array_equal(vector[layer].numpy(), ROWS[n]) for n, layer in enumerate((5, 11)))
    assert load(path, at="mlp_out", layer=11).layers == (11,)
    if name == "v.svec":
        assert vector.provenance["model_type"] == "qwen2"
    with pytest.raises(FormatError, match="does not say at which hook point: say at="):
        load(path)
    with pytest.raises(FormatError, match="no direction for layer=4"):
        load(path, at="resid_pre", layer=4)
    with pytest.raises(FormatError, match="no file of caa"):
        load(path, at="resid_pre", format="caa")


@pytest.mark.parametrize("name", ["v.npy", "v.npz", "v.json"])
@pytest.mark.parametrize("one", [True, False])
def test_one_direction_and_all_layers(name, one, tmp_path):
    content = ROWS[2] if one else ROWS
    content = {"arr_0": content} if name == "v.npz" else content.tolist() if name == "v.json" else content
    path = written(tmp_path, name, content)
    if one:
        with pytest.raises(FormatError, match="say layer= and at="):
            load(path, at="resid_post")
        assert np.array_equal(load(path, at="resid_post", layer=9)[9].numpy(), ROWS[2])
    else:
        vector = load(path, at="resid_post")
        assert all(np.array_equal(vector[n].numpy(), ROWS[n]) for n in range(4))


@given(
    st.sampled_from([np.float16, np.float32, np.float64, ">f4", ">f8"]),
    st.booleans(),
    st.booleans(),
    st.integers(2, 5),
    st.integers(1, 7),
)
def test_arrays_of_every_kind_equal_numpys(tmp_path_factory, dtype, fortran, compressed, layers, hidden):
    folder = tmp_path_factory.mktemp("arrays")
    array = (np.arange(1, layers * hidden + 1).reshape(layers, hidden) / 8).astype(dtype)
    array = np.asfortranarray(array) if fortran else array
    np.save(folder / "v.npy", array)
    (np.savez_compressed if compressed else np.savez)(folder / "v.npz", v=array)
    for name in ("v.npy", "v.npz"):
        vector = load(folder / name, at="resid_mid")
        for layer in range(layers):
            assert np.array_equal(vector[layer].numpy(), array[layer].astype(vector[layer].numpy().dtype))


def test_the_scale_is_the_callers_to_say(tmp_path):
    unit = ROWS[0] / np.linalg.norm(ROWS[0])
    path = written(tmp_path, "v.npy", unit)
    assert load(path, at="resid_post", layer=1, scale="unit").scale == "unit"
    assert load(path, at="resid_post", layer=1, scale="raw").scale == "raw"
    with pytest.raises(FormatError, match=r"the direction of layer 1 has length .*leave scale='unit' out"):
        load(written(tmp_path, "w.npy", ROWS[0] * 3), at="resid_post", layer=1, scale="unit")
    with pytest.raises(ValueError, match="unknown scale 'half'"):
        load(path, at="resid_post", layer=1, scale="half")
    ours = fs.SteeringVector({1: torch.from_numpy(ROWS[0])}).save(tmp_path / "o.safetensors")
    with pytest.raises(FormatError, match="says scale='raw', the call scale='unit'"):
        load(ours, scale="unit")


ONE_ROW = {"v.npy": ROWS[:1], "v.npz": {"mean": ROWS[:1]}, "v.json": ROWS[:1].tolist()}


@pytest.mark.parametrize("name", ONE_ROW)
def test_one_row_is_one_direction(name, tmp_path):
    """Kept as [1, hidden] by whoever took a mean: not the direction of layer 0."""
    path = written(tmp_path, name, ONE_ROW[name])
    with pytest.raises(FormatError, match="say layer= and at="):
        load(path, at="resid_post")
    vector = load(path, at="resid_post", layer=9)
    assert vector.layers == (9,) and np.array_equal(vector[9].numpy(), ROWS[0])
    by_layer = written(tmp_path, "w.npz", {"9": ROWS[:1], "10": ROWS[1:2]})
    assert np.array_equal(load(by_layer, at="resid_post")[10].numpy(), ROWS[1])


def test_safetensors_of_another_project(tmp_path):
    tensors = {str(layer): torch.from_numpy(ROWS[n]) for n, layer in enumerate((5, 11))}
    for words in (None, {"format": "pt"}):
        save_file(tensors, tmp_path / "v.safetensors", words)
        with pytest.raises(FormatError, match="does not say at which hook point: say at="):
            load(tmp_path / "v.safetensors")
        vector = load(tmp_path / "v.safetensors", at="resid_pre")
        assert vector.layers == (5, 11) and np.array_equal(vector[11].numpy(), ROWS[1])
    save_file({"direction": tensors["5"]}, tmp_path / "one.safetensors")
    assert load(tmp_path / "one.safetensors", at="mlp_out", layer=3).layers == (3,)
    save_file({"model.norm.weight": tensors["5"], "lm_head.weight": tensors["11"]}, tmp_path / "model.safetensors")
    with pytest.raises(FormatError, match=r"holds '(lm_head|model\.norm)\.weight', .*: expected directions by layer"):
        load(tmp_path / "model.safetensors", at="resid_pre")
    save_file({"5": torch.arange(6)}, tmp_path / "ids.safetensors")
    with pytest.raises(FormatError, match=r"5 of torch\.int64, expected floating numbers"):
        load(tmp_path / "ids.safetensors", at="resid_pre")


REFUSED = {
    "names that are no layers": ("v.npz", {"W_enc": ROWS, "W_dec": ROWS.T}, "holds 'W_enc', 'W_dec'"),
    "a layer twice": ("v.npz", {"1": ROWS[0], "01": ROWS[1]}, "each once"),
    "rows by layer": ("v.npz", {"1": ROWS, "2": ROWS}, r"layer 1 has shape \[4, 6\]"),
    "three axes": ("v.npy", ROWS.reshape(2, 2, 6), r"shape \[2, 2, 6\]"),
    "words": ("v.npy", np.array(["red", "blue"]), "expected floating numbers"),
    "whole numbers": ("v.npy", np.arange(6), "expected floating numbers"),
    "objects, which are pickled": ("v.npy", np.array([{1: 2}], dtype=object), "never read"),
    "complex numbers": ("v.npy", ROWS[0].astype(complex), "expected floating numbers"),
    "nothing finite": ("v.npy", np.full(6, np.inf, np.float32), "NaN or infinite|finite"),
    "another object": ("v.json", {"format": "faststeer.plan/1", "interventions": []}, "a plan is read by Plan.load"),
    "a text": ("v.json", {"1": "red"}, "expected a list of numbers"),
    "true": ("v.json", [True, False], "expected a list of numbers"),
    "rows of other lengths": ("v.json", [[1.0, 2.0], [3.0]], "different hidden sizes"),
    "no layers": ("v.svec", {"directions": {}}, "holds no directions"),
    "too large": ("v.json", [10**400], "too large"),
}


SEVERAL = ("rows by layer", "rows of other lengths", "no layers")


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused(name, tmp_path):
    file, content, message = REFUSED[name]
    with pytest.raises(FormatError, match=message) as caught:
        load(written(tmp_path, file, content), at="resid_post", layer=None if name in SEVERAL else 1)
    assert file in str(caught.value)


def test_a_small_file_never_becomes_a_large_array(tmp_path):
    """A header that promises more than there is, and zeros that pack well."""
    path = written(tmp_path, "v.npy", ROWS[0])
    path.write_bytes(path.read_bytes().replace(b"(6,), }", b"(600000000000,), }"))
    with pytest.raises(FormatError, match=r"its shape is \[600000000000\], and it has 35 bytes"):
        load(path, at="resid_post", layer=1)
    np.savez_compressed(tmp_path / "z.npz", **{"1": np.zeros(2**24 + 1, np.float32)})
    assert (tmp_path / "z.npz").stat().st_size < 100_000
    with pytest.raises(FormatError, match="more than"):
        load(tmp_path / "z.npz", at="resid_post")
