"""faststeer ui: what it says and what it refuses; the page itself is in tests/ui."""

from __future__ import annotations

import json
import socket
import sys

import pytest
import torch
from typer.testing import CliRunner

from faststeer import SteeringVector, demo
from faststeer.cli import app

pytest.importorskip("gradio", reason="gradio is not installed: pip install 'faststeer[ui]'")


def ui(*arguments):
    return CliRunner().invoke(app, ["ui", "--port", "0", *map(str, arguments)])


@pytest.fixture()
def vector(tmp_path):
    path = tmp_path / "calm.safetensors"
    SteeringVector({2: torch.randn(128), 3: torch.randn(128)}, at="resid_post").save(path)
    return path


def test_serves_until_ctrl_c(vector, monkeypatch):
    from faststeer.ui import server as serving

    served = []

    class Stopped:
        def run(self, sockets):
            served.extend(socket.getsockname() for socket in sockets)
            raise KeyboardInterrupt

    def server(playground, **options):
        served.append((playground.name, list(playground.vectors), options))
        return Stopped()

    monkeypatch.setattr(serving, "server", server)
    result = ui("--model", demo.FOLDER, "--vector", vector, "--vector", f"other={vector}", "--system", "Be.", "--json")
    assert result.exit_code == 0, result.output
    made, (host, port) = served
    assert made == (str(demo.FOLDER), ["calm", "other"], {"max_new_tokens": 64, "system": "Be."})
    assert host == "127.0.0.1"
    facts = {"url": f"http://127.0.0.1:{port}/", "model": str(demo.FOLDER), "vectors": ["calm", "other"]}
    assert json.loads(result.stdout) == facts


def test_refused(vector, tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        result = ui("--port", port)
        assert result.exit_code == 1 and f"port {port} on 127.0.0.1 is taken" in result.output
    SteeringVector({2: torch.randn(64)}, at="resid_post").save(tmp_path / "short.safetensors")
    for arguments, said in (
        (["--model", demo.FOLDER], "give their files with --vector"),
        (["--vector", vector, "--vector", vector], "two vectors are called 'calm'"),
        (["--vector", tmp_path / "short.safetensors"], "hidden size 64, the model 128"),
        (["--vector", tmp_path / "none.safetensors"], "none.safetensors"),
        (["--model", tmp_path / "none", "--vector", vector], "no model could be loaded"),
        (["--host", "no.such.host.invalid"], "is no address of this machine"),
    ):
        result = ui(*arguments)
        assert result.exit_code == 1 and said in " ".join(result.output.split()), (said, result.output)
    assert ui("--port", "70000").exit_code == 2


def test_without_the_extra(monkeypatch):
    import faststeer.ui

    for name in ("faststeer.ui.page", "faststeer.ui.server"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.delattr(faststeer.ui, "server", raising=False)
    monkeypatch.setitem(sys.modules, "gradio", None)
    result = ui()
    assert result.exit_code == 1 and "pip install 'faststeer[ui]'" in " ".join(result.output.split())
