"""Decoder rows from folders in SAELens's layout, old and new."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from faststeer.extract.sae import sae_feature

W_DEC = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))


def folder(path, config, tensors=None, name="sae_weights.safetensors"):
    path.mkdir(exist_ok=True)
    (path / "cfg.json").write_text(config if isinstance(config, str) else json.dumps(config))
    default = {"W_dec": W_DEC, "W_enc": torch.zeros(4, 6), "b_enc": torch.zeros(6), "b_dec": torch.zeros(4)}
    save_file(default if tensors is None else tensors, path / name)
    return path


OLD = {"hook_name": "blocks.12.hook_resid_post", "hook_layer": 12, "d_in": 4, "d_sae": 6, "model_name": "gemma-2-2b"}
NEW = {"architecture": "jumprelu", "d_in": 4, "d_sae": 6, "normalize_activations": "none"}


def test_old_layout_beside_new_layout(tmp_path):
    old = sae_feature(folder(tmp_path / "old", OLD), 3)
    new = {**NEW, "metadata": {"hook_name": "blocks.12.hook_resid_post", "model_name": "gemma-2-2b"}}
    new = sae_feature(folder(tmp_path / "new", new, name="any.safetensors"), 3)
    for vector in (old, new):
        assert (vector.layers, vector.at, vector.model) == ((12,), "resid_post", "gemma-2-2b")
        assert (vector.method, vector.scale, vector.provenance["feature"]) == ("sae", "raw", 3)
        assert torch.equal(vector[12], W_DEC[3])


@pytest.mark.parametrize("hook", ["resid_pre", "resid_mid", "attn_out", "mlp_out"])
def test_hook_points(tmp_path, hook):
    vector = sae_feature(folder(tmp_path / "a", OLD | {"hook_name": f"blocks.0.hook_{hook}", "hook_layer": 0}), 0)
    assert (vector.at, vector.layers) == (hook, (0,))


def test_a_transcoder_writes_where_its_output_is(tmp_path):
    config = OLD | {"hook_name": "blocks.3.ln2.hook_normalized", "hook_name_out": "blocks.3.hook_mlp_out"}
    assert sae_feature(folder(tmp_path / "a", config), 0).at == "mlp_out"
    wide = folder(tmp_path / "b", config | {"d_in": 7, "d_out": 4})  # what it reads may have another width
    assert torch.equal(sae_feature(wide, 1)[3], W_DEC[1])


@pytest.mark.parametrize("feature", [np.int64(2), torch.tensor(2)])
def test_whole_numbers_of_other_libraries(tmp_path, feature):
    vector = sae_feature(folder(tmp_path / "a", OLD), feature)
    assert torch.equal(vector[12], W_DEC[2]) and type(vector.provenance["feature"]) is int


def test_rows_in_units_of_their_own_keep_their_direction_only(tmp_path):
    vector = sae_feature(folder(tmp_path / "a", OLD | {"normalize_activations": "expected_average_only_in"}), 5)
    assert vector.scale == "unit"
    torch.testing.assert_close(vector[12], W_DEC[5] / W_DEC[5].norm())


@pytest.mark.parametrize(
    ("config", "tensors", "feature", "message"),
    [
        (OLD | {"hook_name": "blocks.3.attn.hook_z"}, None, 0, "no hook point of the residual stream"),
        (OLD | {"hook_head_index": 2}, None, 0, "head 2, which is no hook point"),
        ({"d_in": 4}, None, 0, "does not say at which hook"),
        ("{", None, 0, "no valid JSON"),
        ("[]", None, 0, "holds no configuration"),
        (OLD, None, 6, r"no feature 6: it has features 0\.\.5"),
        (OLD, None, -1, "no feature -1"),
        (OLD | {"d_in": 5}, None, 0, r"W_dec has shape \[6, 4\], cfg.json says \[6, 5\]"),
        (OLD, {"decoder": W_DEC}, 0, "and no W_dec"),
        (OLD, {"W_dec": torch.zeros(6, 4)}, 0, "zero"),
        (OLD, {"W_dec": W_DEC * torch.nan}, 0, "NaN"),
    ],
)
def test_folders_that_cannot_be_used(tmp_path, config, tensors, feature, message):
    with pytest.raises(ValueError, match=message):
        sae_feature(folder(tmp_path / "a", config, tensors), feature)


def test_missing_and_truncated_files(tmp_path):
    path = folder(tmp_path / "a", OLD)
    weights = path / "sae_weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:-8])
    with pytest.raises(ValueError, match="cannot be used"):
        sae_feature(path, 0)
    weights.unlink()
    with pytest.raises(FileNotFoundError, match=r"has no sae_weights\.safetensors and no other"):
        sae_feature(path, 0)
    with pytest.raises(FileNotFoundError, match=r"no cfg\.json"):
        sae_feature(tmp_path / "nowhere", 0)
