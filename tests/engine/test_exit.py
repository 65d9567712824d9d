"""An iterator of the Engine, or any context, that is open when the interpreter exits."""

from __future__ import annotations

import gc
import subprocess
import sys

import models
import pytest
from support import engine, mixed, prompts, tokens

MODEL = """
import sys, threading
sys.path[:0] = {path!r}
import faststeer as fs, models, transformers
from support import engine, mixed, prompts

transformers.logging.set_verbosity_error()

def opened(name="llama"):
    iterator = engine(name).generate(prompts(), mixed(name), max_new_tokens=5, in_order=False)
    next(iterator)
    return iterator

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


@pytest.mark.parametrize("end", ENDS)
def test_the_interpreter_exits_quietly(end):
    program = MODEL.format(path=[path for path in sys.path if "tests" in path]) + ENDS[end]
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_the_users_own_error_is_all_that_is_said():
    program = MODEL.format(path=[path for path in sys.path if "tests" in path])
    program += "iterator = opened(); raise RuntimeError('the iterator is half consumed')"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=300)
    assert done.returncode == 1
    assert done.stderr.count("Traceback") == 1 and done.stderr.strip().endswith(
        "RuntimeError: the iterator is half consumed"
    )


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
