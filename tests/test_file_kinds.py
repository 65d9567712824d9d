"""Every reader that gets another kind of file says which one, and what to do; the files are written by the libraries
and servers that make them."""

from __future__ import annotations

import gzip
import io
import pickle
import re
import tarfile
import zipfile

import numpy as np
import pytest
import torch
from readers import READERS
from safetensors.torch import save
from test_readers import reads, write

from faststeer import Plan
from faststeer.extract import sae_feature
from faststeer.file_kinds import kind_of
from faststeer.files import FormatError
from faststeer.hf import load


def _buffer(writes) -> bytes:
    buffer = io.BytesIO()
    writes(buffer)
    return buffer.getvalue()


def _zip(**entries: bytes) -> bytes:
    def writes(buffer):
        with zipfile.ZipFile(buffer, "w") as archive:
            for name, content in entries.items():
                archive.writestr(name.replace("__", "/"), content)

    return _buffer(writes)


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"4d" * 32 + b"\nsize 26832\n"
PAGE = b"\n<!DOCTYPE html>\n<html lang='en'><head><title>Sign in</title></head><body>403</body></html>\n"
ARRAY = np.arange(6, dtype=np.float32)
FILES = {
    "lfs": (POINTER, "Git LFS pointer", "git lfs pull"),
    "annex": (b"/annex/objects/SHA256E-s26832--4d4d.safetensors\n", "git-annex", "git annex get"),
    "html": (PAGE, "web page", "download the file itself"),
    "xml": (b"<?xml version='1.0'?><Error><Code>AccessDenied</Code></Error>", "XML", "download the file itself"),
    "parquet": (b"PAR1\x15\x04\x15\x10" + bytes(40) + b"PAR1", "Parquet", "datasets:FOLDER"),
    "pickle": (pickle.dumps({1: ARRAY}), "a pickle, which may run code", "numpy.savez"),
    "pickle of protocol 0": (pickle.dumps({1: [1.0]}, protocol=0), "a pickle", "numpy.savez"),
    "pickle of protocol 2": (pickle.dumps([ARRAY], protocol=2), "a pickle", "numpy.savez"),
    "gzip": (gzip.compress(b"{}"), "compressed by gzip", "unpack it"),
    "zip": (_zip(a__b=b"x", c=b"y"), "a zip archive", "unpack it"),
    "hdf5": (b"\x89HDF\r\n\x1a\n" + bytes(64), "HDF5", "h5py"),
    "utf-16": ("red, blue".encode("utf-16"), "UTF-16", "save it as UTF-8"),
    "nulls": (bytes(5000), "nothing but zero bytes", "again"),
}  # fmt: skip
OTHERS = {
    "npy": (_buffer(lambda b: np.save(b, ARRAY)), "NumPy array"),
    "npz": (_buffer(lambda b: np.savez(b, a=ARRAY)), "NumPy archive"),
    "torch": (_buffer(lambda b: torch.save({"a": torch.ones(3)}, b)), "file of torch.save"),
    "torch, old": (
        _buffer(lambda b: torch.save(torch.ones(3), b, _use_new_zipfile_serialization=False)), "file of torch.save"
    ),
    "safetensors": (save({"a": torch.ones(3)}), "safetensors"),
    "json": (b' \n{"a": [1]}', "JSON"),
    "json with a mark in front": (b"\xef\xbb\xbf[1, 2]", "JSON"),
    "office": (_zip(**{"[Content_Types].xml": b"", "xl__workbook.xml": b""}), "office document"),
    "empty": (b"", "empty"),
}  # fmt: skip


@pytest.mark.parametrize("name", [*FILES, *OTHERS])
def test_kinds_are_told_apart_in_memory_and_on_disk(name, tmp_path):
    content, words, *_ = (FILES | OTHERS)[name]
    path = tmp_path / "file"
    path.write_bytes(content)
    for source in (content, path):
        kind = kind_of(source)
        assert kind is not None
        assert words in kind.words


@pytest.mark.parametrize(
    "content",
    [b"one prompt\nand another", b"a,b\n1,2\n", b"version 2 of a text", b"<b>bold</b> words", b"prompts:\n- a\n", b"c",
     b"\x80", b"P", "Ünï".encode(), b"GGUF files, what are they?\n", b"PAR1 is a word\n",
     b"BZhello", b"(lp records)\n",
     b"ccc\nfoo\n", b"<html> is a tag, is it?\n", b"<head> or <body>?",
     b"version https://git-lfs.github.com/ is what?"],
)  # fmt: skip
def test_plain_texts_are_of_no_kind(content):
    assert kind_of(content) is None


def test_a_tar_archive_and_a_model_are_not_taken_for_text():
    archive = _buffer(lambda b: tarfile.open(fileobj=b, mode="w:gz").close())
    assert kind_of(archive).name == "gzip"


# What comes by HTTP is a text or an object, no file.
OF_FILES = [
    (name, file)
    for name, reader in READERS.items()
    for file in reader.wrong or tuple(reader.files)
    if not name.startswith(("request", "wire", "server's settings")) and (name, file) != ("plan", "plan.json")
]


@pytest.mark.parametrize(("name", "file"), OF_FILES)
def test_every_reader_names_the_kind_and_the_remedy(name, file, tmp_path):
    reader = READERS[name]
    for kind, (content, words, remedy) in FILES.items():
        refusal = reads(reader, write(tmp_path / "folder", {**reader.files, file: content}))
        assert words in refusal, (kind, refusal)
        assert remedy in refusal, (kind, refusal)


@pytest.mark.parametrize("kind", ["lfs", "html", "annex"])
@pytest.mark.parametrize("file", ["model.safetensors", "config.json", "tokenizer.model", "pytorch_model.bin"])
def test_a_models_folder_that_was_not_downloaded_whole(kind, file, tmp_path):
    content, words, remedy = FILES[kind]
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / file).write_bytes(content)
    with pytest.raises(ValueError, match=f"{file} is .*{words}.*{remedy}"):
        load(tmp_path)


@pytest.mark.parametrize("kind", ["lfs", "html", "gzip", "safetensors", "json"])
def test_a_model_file_of_another_kind(kind, tmp_path):
    content, words = (FILES | OTHERS)[kind][:2]
    path = tmp_path / "m.gguf"
    path.write_bytes(content)
    remedy = "name the folder it lies in" if kind in ("safetensors", "json") else FILES[kind][2]
    with pytest.raises(ValueError, match=rf"m\.gguf is no GGUF file .it is .*{words}.*{remedy}"):
        load(path)


@pytest.mark.parametrize("kind", FILES)
def test_a_plans_file(kind, tmp_path):
    content, words, remedy = FILES[kind]
    (tmp_path / "p.json").write_bytes(content)
    with pytest.raises(FormatError, match=rf"p\.json cannot be read as text .*{re.escape(words)}.*{re.escape(remedy)}"):
        Plan.load(tmp_path / "p.json")


# Sparse autoencoders --------------------------------------------------------------------------------------------------

W_DEC = torch.randn(3, 4, generator=torch.Generator().manual_seed(5))


def autoencoder(folder, config: str):
    folder.mkdir(exist_ok=True)
    (folder / "cfg.json").write_text(config)
    (folder / "sae_weights.safetensors").write_bytes(save({"W_dec": W_DEC}))
    return folder


@pytest.mark.parametrize(
    ("config", "layer", "at"),
    [
        ('{"hook_point": "blocks.7.hook_resid_post", "hook_point_layer": 7, "d_in": 4}', 7, "resid_post"),
        ('{"hook_point": "blocks.{layer}.hook_mlp_out", "hook_point_layer": 2}', 2, "mlp_out"),
        ('{"hook_point": "blocks.0.hook_attn_out", "hook_point_head_index": null}', 0, "attn_out"),
        ('{"hook_name": "blocks.3.hook_resid_mid", "hook_point": "blocks.3.hook_resid_mid", "hook_layer": 3}', 3,
         "resid_mid"),
    ],
)  # fmt: skip
def test_the_older_names_of_saelens(config, layer, at, tmp_path):
    vector = sae_feature(autoencoder(tmp_path / "sae", config), 2)
    assert (vector.layers, vector.at) == ((layer,), at)
    assert torch.equal(vector[layer], W_DEC[2])


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ('{"hook_point": "blocks.7.hook_resid_post", "hook_point_layer": 6}', "contradicts itself"),
        ('{"hook_point": "blocks.7.hook_resid_post", "hook_name": "blocks.6.hook_resid_post"}', "contradicts itself"),
        ('{"hook_point": "blocks.{layer}.hook_resid_post"}', "which is no hook point of the residual stream"),
        ('{"hook_point": "blocks.1.attn.hook_z", "hook_point_head_index": 3}', "head 3"),
        ('{"d_in": 4, "d_sae": 3, "k": 32}', "does not say at which hook .*write hook_name into it"),
    ],
)
def test_autoencoders_that_do_not_say_where_they_belong(config, message, tmp_path):
    with pytest.raises(FormatError, match=message):
        sae_feature(autoencoder(tmp_path / "sae", config), 0)


def test_autoencoders_of_other_projects_are_named(tmp_path):
    np.savez(tmp_path / "params.npz", W_dec=np.ones((3, 4)))
    with pytest.raises(FileNotFoundError, match=r"params\.npz may hold another project's autoencoder.*SteeringVector"):
        sae_feature(tmp_path, 0)
    with pytest.raises(FileNotFoundError, match=r"this is a file .a NumPy archive.*name the folder"):
        sae_feature(tmp_path / "params.npz", 0)
