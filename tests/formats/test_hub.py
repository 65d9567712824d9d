"""Push and pull through huggingface_hub, against a server on this machine that speaks the part of the hub's protocol
that they use."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch
from strategies import randn
from typer.testing import CliRunner

import faststeer as fs
from faststeer.formats import hub, pull, push

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub(BaseHTTPRequestHandler):
    """Repositories as `server.repositories[name][filename]`."""

    def log_message(self, *args):
        pass

    def answer(self, code: int, body: bytes = b"", **headers: str) -> None:
        self.send_response(code)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def answer_json(self, content: object) -> None:
        self.answer(200, json.dumps(content).encode(), Content_Type="application/json")

    def do_POST(self):
        size = self.headers.get("Content-Length")
        if size is not None:
            body = self.rfile.read(int(size))
        else:
            body = b""
            while length := int(self.rfile.readline(), 16):
                body += self.rfile.read(length)
                self.rfile.readline()
            self.rfile.readline()
        repositories, path = self.server.repositories, self.path.partition("?")[0]
        if path == "/api/repos/create":
            asked = json.loads(body)
            repositories.setdefault(f"user/{asked['name']}", {})
            self.answer_json({"url": f"{self.server.address}/user/{asked['name']}"})
        elif "/preupload/" in path:
            files = [
                {"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in json.loads(body)["files"]
            ]
            self.answer_json({"files": files})
        elif "/commit/" in path:
            name = path.removeprefix("/api/models/").partition("/commit/")[0]
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    repositories[name][line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            self.answer_json({"commitOid": COMMIT, "commitUrl": f"{self.server.address}/{name}/commit/{COMMIT}"})
        else:
            self.answer(404)

    def do_GET(self):
        name, _, rest = self.path.partition("?")[0].strip("/").partition("/resolve/")
        filename = rest.partition("/")[2]
        files = self.server.repositories.get(name)
        if files is None:
            self.answer(404, X_Error_Code="RepoNotFound")
        elif filename not in files:
            self.answer(404, X_Error_Code="EntryNotFound")
        else:
            data = files[filename]
            self.answer(200, data, ETag=f'"{hashlib.sha1(data).hexdigest()}"', X_Repo_Commit=COMMIT)

    do_HEAD = do_GET


@pytest.fixture
def server(monkeypatch):
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    with ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        server.repositories = {}
        server.address = f"http://127.0.0.1:{server.server_port}"
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()  # seconds between looks
        yield server
        server.shutdown()


def vector() -> fs.SteeringVector:
    return fs.SteeringVector({1: randn(1, 8)}, at="resid_mid", method="dim", op="ablate")


def test_what_is_pushed_is_pulled(server, tmp_path):
    at = {"endpoint": server.address, "token": "hf_none"}
    url = push(vector(), "user/refusal", **at)
    assert url.endswith(COMMIT) and server.repositories["user/refusal"][hub.FILE] == vector().to_bytes()
    push(fs.SteeringVector({2: randn(2, 8)}), "user/refusal", "v.gguf", model_hint="llama", **at)
    assert server.repositories["user/refusal"]["v.gguf"].startswith(b"GGUF")
    with pytest.raises(ValueError, match="meant to ablate"):
        push(vector(), "user/none", "v.gguf", **at)
    assert "user/none" not in server.repositories
    back = pull("user/refusal", cache_dir=tmp_path, **at)
    assert torch.equal(back[1], vector()[1]) and (back.at, back.method, back.op) == ("resid_mid", "dim", "ablate")


def test_other_formats_are_pulled_with_what_they_leave_unsaid(server, tmp_path):
    torch.save(randn(0, 8), tmp_path / "d.pt")
    server.repositories["user/other"] = {"folder/d.pt": (tmp_path / "d.pt").read_bytes()}
    at = {"endpoint": server.address, "token": "hf_none", "cache_dir": tmp_path / "cache"}
    with pytest.raises(fs.FormatError, match="say layer= and at="):
        pull("user/other", "folder/d.pt", **at)
    assert pull("user/other", "folder/d.pt", layer=2, at="resid_pre", **at).layers == (2,)


@pytest.mark.parametrize(("repo", "filename"), [("user/none", hub.FILE), ("user/there", "none.gguf")])
def test_what_is_not_there(server, tmp_path, repo, filename):
    server.repositories["user/there"] = {}
    with pytest.raises(FileNotFoundError, match=f"no {filename} in {repo} on the hub"):
        pull(repo, filename, endpoint=server.address, token="hf_none", cache_dir=tmp_path)


def test_a_hub_that_is_not_reached_is_not_one_without_the_file(tmp_path, monkeypatch):
    monkeypatch.setattr(time, "sleep", lambda seconds: None)  # huggingface_hub waits and tries again
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    nowhere = {"endpoint": "http://127.0.0.1:9", "token": "hf_none", "cache_dir": tmp_path}
    with pytest.raises(OSError, match=r"of user/name is not in the cache, and the hub cannot be reached") as caught:
        pull("user/name", **nowhere)
    assert not isinstance(caught.value, FileNotFoundError)


def test_addresses():
    assert hub.parse("hub:user/name") == {"repo": "user/name"}
    assert hub.parse("hub:user/name@v1/a/b.gguf") == {"repo": "user/name", "revision": "v1", "filename": "a/b.gguf"}
    for address in ("hub:", "hub:name", "hub:/name", "hub:user/", "hub:user/@v1"):
        with pytest.raises(fs.FormatError, match="expected hub:user/name"):
            hub.parse(address)


def test_from_the_command_line(server, tmp_path, monkeypatch):
    from faststeer.cli import app

    server.repositories["user/name"] = {"v.safetensors": vector().to_bytes()}
    real = hub.pull
    at = {"endpoint": server.address, "token": "hf_none", "cache_dir": tmp_path / "cache"}
    monkeypatch.setattr(fs.formats, "pull", lambda *args, **said: real(*args, **said, **at))
    result = CliRunner().invoke(app, ["convert", "hub:user/name/v.safetensors", str(tmp_path / "out")])
    assert result.exit_code == 0, result.output
    assert torch.equal(fs.SteeringVector.load(tmp_path / "out")[1], vector()[1])
