"""An iterator of the Engine, or any context, that is open when the interpreter exits."""

from __future__ import annotations

import gc
import subprocess
import sys
from pathlib import Path

import models
import pytest
from support import engine, mixed, prompts, tokens

# Imports once. Then a fork for each way to end, which leaves the loop and exits as any interpreter does.
PROGRAM = """
import os, signal, sys, threading
sys.path[:0] = {path!r}
import faststeer as fs, models, transformers
from support import engine, mixed, prompts

transformers.logging.set_verbosity_error()
models.build("llama"), models.build("gpt2")

def opened(name="llama"):
    iterator = engine(name).generate(prompts(), mixed(name), max_new_tokens=5, in_order=False)
    next(iterator)
    return iterator

for name, end in {ends!r}.items():
    if not (child := os.fork()):
        signal.alarm(300)
        for descriptor, stream in ((1, "stdout"), (2, "stderr")):
            os.dup2(os.open(f"{{name}}.{{stream}}", os.O_WRONLY | os.O_CREAT), descriptor)
        exec(end)
        break
    with open(f"{{name}}.code", "w") as file:
        file.write(str(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])))
"""
ENDS = {
    "open": "iterator = opened()",
    "two": "iterators = [opened(), opened('gpt2')]",
    "in a thread": """
def work():
    global iterator
    iterator = opened()

thread = threading.Thread(target=work)
thread.start()
thread.join()
""",
    "in a thread that waits": """
ready = threading.Event()

def work():
    iterator = opened()
    ready.set()
    threading.Event().wait()

threading.Thread(target=work, daemon=True).start()
ready.wait()
""",
    "in a context": """
def steered():
    with fs.steer(models.model("gpt2"), mixed("gpt2")[0]) as steering:
        yield steering

context = steered()
next(context)
iterator = opened()
""",
    "exited": "iterator = opened(); sys.exit(0)",
}
FAILS = "iterator = opened(); raise RuntimeError('the iterator is half consumed')"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """What each process printed, and its exit code."""
    folder = tmp_path_factory.mktemp("ends")
    program = PROGRAM.format(path=[path for path in sys.path if "tests" in path], ends={**ENDS, "failed": FAILS})
    subprocess.run([sys.executable, "-c", program], cwd=folder, check=True, timeout=600)
    return folder


def ended(folder: Path, name: str) -> list[str]:
    return [(folder / f"{name}.{kind}").read_text() for kind in ("code", "stdout", "stderr")]


@pytest.mark.parametrize("end", ENDS)
def test_the_interpreter_exits_quietly(folder, end):
    assert ended(folder, end) == ["0", "", ""]


def test_the_users_own_error_is_all_that_is_said(folder):
    code, _, errors = ended(folder, "failed")
    assert code == "1"
    assert errors.count("Traceback") == 1 and errors.strip().endswith("RuntimeError: the iterator is half consumed")


def test_a_dropped_iterator_gives_the_model_back():
    model = models.model("llama")
    ours, expected = engine(model), tokens(engine(model).generate(prompts(), mixed("llama"), max_new_tokens=5))
    for cyclic in (False, True):
        iterator = ours.generate(prompts(), mixed("llama"), max_new_tokens=5)
        next(iterator)
        if cyclic:
            cycle = [iterator]
            cycle.append(cycle)
            del cycle
        del iterator
        gc.collect()
        assert not any("forward" in module.__dict__ for module in model.modules())
        assert tokens(ours.generate(prompts(), mixed("llama"), max_new_tokens=5)) == expected
