"""A virtual environment for each peer under `.venv-peers/`, from its pinned requirements.

All of them stand on one environment with PyTorch and transformers, the versions that faststeer is measured with: each
has its site-packages on its path, and installs what its own pins ask for differently in front of it.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch
import transformers

ROOT = Path(__file__).parents[2] / ".venv-peers"
REQUIREMENTS = Path(__file__).parent / "requirements"


class NotInstalled(Exception):
    """A peer's environment could not be made; the message says why."""


def shared_pins() -> list[str]:
    """Return the requirements of the environment below all others; no open range of PyTorch is ever asked for."""
    version = torch.__version__.partition("+")[0]
    return [f"torch=={version}", f"transformers=={transformers.__version__}", "numpy", "accelerate"]


def make(name: str, seconds: float = 1800) -> Path:
    """Return the Python of the peer's environment, which is made or brought up to date where it has to be.

    Raises:
        NotInstalled: pip failed or took longer than `seconds`.
    """
    base = _venv("base", shared_pins(), None, 900)
    pins = (REQUIREMENTS / f"{name}.txt").read_text().split()
    return _venv(name, pins, base, seconds)


def _venv(name: str, pins: list[str], below: Path | None, seconds: float) -> Path:
    folder = ROOT / name
    python, ready = folder / "bin" / "python", folder / ".ready"
    state = "\n".join([*shared_pins(), *pins])
    if ready.is_file() and ready.read_text() == state:
        return python
    print(f"installing {' '.join(pins)} (at most {seconds / 60:.0f} min) ...", file=sys.stderr, flush=True)
    start, log = time.monotonic(), ROOT / f"{name}.log"
    ROOT.mkdir(exist_ok=True)
    _run([sys.executable, "-m", "venv", "--clear", str(folder)], log, 120)
    (site,) = folder.glob("lib/python*/site-packages")
    if below is not None:
        (shared,) = below.parents[1].glob("lib/python*/site-packages")
        (site / "shared.pth").write_text(f"{shared}\n")
    constraints = ROOT / "constraints.txt"
    constraints.write_text(shared_pins()[0] + "\n")
    pip = [str(python), "-m", "pip", "install", "--disable-pip-version-check", "--constraint", str(constraints)]
    _run([*pip, *pins], log, seconds)
    ready.write_text(state)
    print(f"  {time.monotonic() - start:.0f} s", file=sys.stderr, flush=True)
    return python


def _run(command: list[str], log: Path, seconds: float) -> None:
    """Run a command whose output goes to the log; it and all it started end after so many seconds."""
    with log.open("w") as file:
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            status = process.wait(seconds)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            raise NotInstalled(f"its installation took longer than {seconds / 60:.0f} minutes") from None
        except BaseException:
            os.killpg(process.pid, signal.SIGKILL)
            raise
    if status:
        lines = [line.strip() for line in log.read_text(errors="replace").splitlines()]
        errors = [line for line in lines if line.lower().startswith("error")]
        raise NotInstalled(f"pip: {(errors or lines or ['no output'])[-1][:200]}")
