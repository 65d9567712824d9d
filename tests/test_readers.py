"""Damaged and hostile files and requests: a reader gives what they say, or the one error that is promised, within
little memory and time. `make test-full` tries 20,000 of them, every other run 2,000."""

from __future__ import annotations

import copy
import hashlib
import json
import os
import random
import signal
import time
import zlib
from collections.abc import Iterator
from pathlib import Path

import pytest
from damage import HUGE, YAML, mutated, places, unchecked
from readers import READERS, Reader

FULL = os.environ.get("FASTSTEER_TEST_PROFILE") == "full"
INPUTS = 20_000 if FULL else 2_000
EACH = -(-INPUTS // len(READERS))
SECONDS = 5.0  # of this process's own time, whatever else the machine does
MEMORY = 2**30  # bytes that a reader may take for one input


class TooSlow(BaseException):
    """Not caught by what catches exceptions."""


def _stop(*_: object) -> None:
    raise TooSlow


def memory(name: str) -> int:
    """Bytes that this process has (VmRSS), or has had at most since `reset` (VmHWM)."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.partition(f"{name}:")[2].split()[0])


def reset() -> int:
    """Begin to note the largest amount of memory anew; returns the present one."""
    Path("/proc/self/clear_refs").write_text("5")
    return memory("VmRSS")


def reads(reader: Reader, folder: Path) -> str:
    """Read the folder within the limits. Returns the refusal, "" where there is none."""
    before, start = reset(), time.process_time()
    signal.signal(signal.SIGPROF, _stop)
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    try:
        reader.read(folder)
    except reader.refusals as error:
        refusal = str(error)
        named = (
            reader.refusals == (ValueError,)
            or folder.name in refusal
            or refusal.startswith(("interv", "the plan", "this JSON", "a plan"))
        )
        assert refusal and named, f"the refusal does not say of what: {refusal[:300]}"
        # A library that was asked for more than there is: the next machine may have it.
        assert not any(word in refusal for word in ("allocate", "MemoryError", "bad_alloc")), refusal[:300]
    else:
        refusal = ""
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
    assert time.process_time() - start < SECONDS
    assert memory("VmHWM") - before < MEMORY
    return refusal


def write(folder: Path, files: dict[str, bytes]) -> Path:
    folder.mkdir(exist_ok=True)
    for path in folder.iterdir():
        path.unlink()
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return folder


def wrong(name: str, number: int, scratch: Path) -> dict[str, bytes]:
    """The files of a reader, one of them made wrong: the input of that number."""
    reader, rng = READERS[name], random.Random(zlib.crc32(name.encode()) + number)
    target = rng.choice(reader.wrong or tuple(reader.files))
    others = tuple(reader.files.values())
    return {**reader.files, target: mutated(rng, target, reader.files[target], others, scratch)}


@pytest.mark.parametrize("name", READERS)
def test_the_examples_are_valid_as_they_stand(name, tmp_path):
    assert reads(READERS[name], write(tmp_path / "folder", READERS[name].files)) == ""


@pytest.mark.parametrize("name", READERS)
def test_damaged(name, tmp_path):
    """Only what is promised comes out; most inputs are refused, and some are still valid."""
    refused = 0
    for number in range(EACH):
        folder = write(tmp_path / "folder", wrong(name, number, tmp_path / "scratch.sqlite"))
        try:
            refused += reads(READERS[name], folder) != ""
        except BaseException as error:
            if hasattr(error, "add_note"):  # Python 3.11
                error.add_note(f"input {number} of {name!r}")
            raise
    assert refused > EACH / 10


# Numbers --------------------------------------------------------------------------------------------------------------


def with_large_numbers(name: str, data: bytes) -> Iterator[bytes]:
    """A file with one of its numbers after the other made larger than anything there is."""
    ending = Path(name).suffix
    if ending in (".json", ".yaml", ".jsonl", ".svec"):
        first, *rest = data.splitlines() if ending == ".jsonl" else [data]
        whole = json.loads(first)
        holder = [whole]
        for n, (_, _) in enumerate(places(holder)):
            for huge in HUGE:
                changed = copy.deepcopy(holder)
                inside, key = list(places(changed))[n]
                if type(inside[key]) not in (int, float):
                    break
                inside[key] = huge
                yield b"\n".join([json.dumps(changed[0]).encode(), *rest])
    elif ending == ".safetensors":
        end = 8 + int.from_bytes(data[:8], "little")
        words = json.loads(data[8:end]).get("__metadata__", {})
        for word, text in words.items():
            if word.startswith("sha256"):
                continue
            if text.isdecimal():
                for huge in HUGE[:-2]:
                    yield unchecked(data, **{word: str(huge)})
            elif text[0] in "{[":
                for changed in with_large_numbers(".json", text.encode()):
                    yield unchecked(data, **{word: changed.decode()})
        header = json.loads(data[8:end])
        for tensor in header:
            for changed in (tensor.replace("1", "100000000000"), tensor.replace("0", "99999"), tensor + "9" * 30):
                if changed != tensor:
                    renamed = {changed if key == tensor else key: value for key, value in header.items()}
                    text = json.dumps(renamed).encode()
                    yield unchecked(len(text).to_bytes(8, "little") + text + data[end:])


NUMBERED = [
    (name, file)
    for name, reader in READERS.items()
    for file in reader.files
    if next(with_large_numbers(file, reader.files[file]), None) is not None
]


@pytest.mark.parametrize(("name", "file"), NUMBERED)
def test_large_numbers(name, file, tmp_path):
    reader = READERS[name]
    for content in with_large_numbers(file, reader.files[file]):
        reads(reader, write(tmp_path / "folder", {**reader.files, file: content}))


def test_every_kind_of_file_has_numbers_that_are_tried():
    tried = {name for name, _ in NUMBERED}
    assert tried >= {
        "vector", "sparse vector", "refusal_direction", "plan", "candidates", "sae", "checkpoint", "capture", "scores",
        "sweep.yaml", "sweep.json", "questions", "request", "request, as an object", "server's settings",
        "vector.json", "svec",
    }  # fmt: skip


@pytest.mark.parametrize("text", YAML, ids=range(len(YAML)))
def test_yaml_that_is_made_to_cost(text, tmp_path):
    reader = READERS["sweep.yaml"]
    refusal = reads(reader, write(tmp_path / "folder", {**reader.files, "s.yaml": text.encode()}))
    assert "s.yaml" in refusal


# Checksums ------------------------------------------------------------------------------------------------------------

CHECKED = [
    (name, file)
    for name in ("vector", "sparse vector", "plan with vectors inside", "activations", "candidates", "checkpoint",
                 "capture", "scores")
    for file in READERS[name].files
]  # fmt: skip


@pytest.mark.parametrize(("name", "file"), CHECKED)
def test_a_flipped_bit_is_refused(name, file, tmp_path):
    """Any bit of the tensors, and of the words beside them."""
    reader = READERS[name]
    whole = reader.files[file]
    end = 8 + int.from_bytes(whole[:8], "little")
    rng = random.Random(0)
    header = [n for n in range(8, end) if whole[n] != ord(" ")]  # but for the padding
    bits = rng.sample(range(8 * end, 8 * len(whole)), 40)
    bits += [8 * n + rng.randrange(8) for n in rng.sample(header, 150)]
    for bit in bits:
        data = bytearray(whole)
        data[bit // 8] ^= 1 << bit % 8
        assert reads(reader, write(tmp_path / "folder", {**reader.files, file: bytes(data)})), f"bit {bit}"


@pytest.mark.parametrize(("name", "file"), CHECKED)
def test_files_without_checksums_are_read(name, file, tmp_path):
    reader = READERS[name]
    older = {**reader.files, file: unchecked(reader.files[file])}
    assert b"sha256" not in older[file]
    assert reads(reader, write(tmp_path / "folder", older)) == ""


def test_the_checksum_is_that_of_the_tensors_bytes():
    """By hand, from the file's own bytes."""
    data = READERS["vector"].files["v.safetensors"]
    end = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:end])
    sums = json.loads(header["__metadata__"]["sha256.tensors"])
    for name in ("layers.1", "layers.2"):
        low, high = header[name]["data_offsets"]
        by_hand = hashlib.sha256(b"torch.float32 [8]\n" + data[end:][low:high]).hexdigest()
        assert sums[name] == by_hand
    words = {name: text for name, text in header["__metadata__"].items() if name != "sha256"}
    assert header["__metadata__"]["sha256"] == hashlib.sha256(json.dumps(words, sort_keys=True).encode()).hexdigest()
