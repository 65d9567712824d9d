"""Files are there whole, old or new, whatever happens while they are written."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import faststeer as fs
from faststeer.files import new_folder, temporary_beside, write_atomically


def test_writes_bytes_and_text(tmp_path):
    write_atomically(tmp_path / "a" / "b.txt", "grün\n")
    assert (tmp_path / "a" / "b.txt").read_bytes() == "grün\n".encode()
    write_atomically(str(tmp_path / "a" / "b.txt"), b"\x00\x01")
    assert (tmp_path / "a" / "b.txt").read_bytes() == b"\x00\x01"
    assert os.listdir(tmp_path / "a") == ["b.txt"]


def test_has_the_usual_permissions(tmp_path):
    (tmp_path / "by_hand").write_text("")
    write_atomically(tmp_path / "ours", "")
    assert (tmp_path / "ours").stat().st_mode == (tmp_path / "by_hand").stat().st_mode


def test_a_link_stays_one_and_its_target_is_written(tmp_path):
    for name, target in (("to_a_file", "file"), ("to_nothing", "new"), ("to_a_folder", "folder")):
        (tmp_path / "there" / "folder").mkdir(parents=True, exist_ok=True)
        (tmp_path / "there" / "file").write_text("old")
        (tmp_path / name).symlink_to(tmp_path / "there" / target)
    for name in ("to_a_file", "to_nothing"):
        write_atomically(tmp_path / name, name)
    with new_folder(tmp_path / "to_a_folder") as folder:
        (folder / "inside").write_text("new")
    assert all(path.is_symlink() for path in tmp_path.glob("to_*"))
    there = tmp_path / "there"
    assert ((there / "file").read_text(), (there / "new").read_text()) == ("to_a_file", "to_nothing")
    assert (there / "folder" / "inside").read_text() == "new" and len(list(there.iterdir())) == 3


@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()], ids=["disk_full", "ctrl_c"])
@pytest.mark.parametrize("step", ["fsync", "chmod", "replace"])
def test_a_failure_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch, step, error):
    old = fs.SteeringVector({0: torch.ones(4)})
    path = old.save(tmp_path / "v.safetensors")
    before = path.read_bytes()

    def fail(*_args, **_more):
        raise error

    monkeypatch.setattr(os, step, fail)
    new = fs.SteeringVector({0: torch.full((4,), 2.0)})
    with pytest.raises(type(error)):
        new.save(path)
    monkeypatch.undo()
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["v.safetensors"]
    assert new.path is None, "it has no file"


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "v"
    write_atomically(path, "old")
    real = os.fdopen

    def broken(descriptor: int, mode: str):
        file = real(descriptor, mode)

        class Full:
            def __enter__(self):
                return self

            def __exit__(self, *_exception):
                file.close()

            def write(self, data: bytes):
                file.write(data[:1])
                raise OSError("no space left on device")

        return Full()

    monkeypatch.setattr(os, "fdopen", broken)
    with pytest.raises(OSError, match="no space left"):
        write_atomically(path, "new")
    monkeypatch.undo()
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["v"]


def test_the_new_file_is_whole_before_it_has_the_name(tmp_path, monkeypatch):
    """At the moment of renaming, the temporary file beside it holds everything."""
    seen = []
    real = os.replace

    def look(source, target):
        seen.append((Path(source).parent, Path(source).read_bytes()))
        real(source, target)

    monkeypatch.setattr(os, "replace", look)
    write_atomically(tmp_path / "v", b"content")
    assert seen == [(tmp_path, b"content")]


REMEDIES = {
    "limit": "ulimit -f",
    "files": "ulimit -n",
    "full": "make room",
    "readonly": "name another folder|check the permissions",
}


def test_every_writer_where_nothing_can_be_written(tmp_path):
    """A limit of the size of files, one of their number, a full disk, one that can only be read: one sentence that
    names the file and the remedy, nothing torn, and no temporary file left. The disk is one of the test's own; where
    nobody may mount one, the two limits are tested alone."""
    folder = tmp_path / "folder"
    folder.mkdir()
    namespace = ["unshare", "-rm", "sh", "-c"]
    mounted = f"mount -t tmpfs -o size=16m tmpfs {shlex.quote(str(folder))}"
    try:
        may_mount = subprocess.run([*namespace, mounted], capture_output=True).returncode == 0
    except FileNotFoundError:
        may_mount = False
    conditions = list(REMEDIES) if may_mount else ["limit", "files"]
    command = [sys.executable, str(Path(__file__).parent / "writers.py"), ",".join(conditions), str(folder)]
    if may_mount:
        command = [*namespace, f"{mounted} && exec {shlex.join(command)}"]
    run = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr[-3000:]
    said = json.loads(run.stdout)
    assert len(said) >= 16 * len(conditions)
    for writer, one in said.items():
        assert one["kind"] == "OSError", (writer, one)
        assert one["same"], f"{writer}: something else is in the folder"
        named = str(folder) in one["text"] or "temporary file for a GGUF" in one["text"]
        assert named and "\n" not in one["text"], (writer, one["text"])
        assert re.search(REMEDIES[writer.rpartition(", ")[2]], one["text"]), (writer, one["text"])


def test_what_killed_writers_left_goes_and_what_others_write_stays(tmp_path):
    (tmp_path / ".v.abcdefgh.part").write_text("half")
    (tmp_path / ".v.abcdefgi.part").mkdir()
    (tmp_path / ".v.abcdefgi.part" / "a").write_text("half")
    others = [".w.abcdefgh.part", ".v.part", ".v.b.part"]
    for name in others:
        (tmp_path / name).write_text("not of v")
    running, descriptor = temporary_beside(tmp_path / "v")
    write_atomically(tmp_path / "v", "new")
    assert sorted(os.listdir(tmp_path)) == sorted([*others, running.name, "v"])
    os.close(descriptor)
    write_atomically(tmp_path / "v", "newer")
    assert sorted(os.listdir(tmp_path)) == sorted([*others, "v"])
