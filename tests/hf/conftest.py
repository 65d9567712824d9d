"""Steering by hooks and steering in fused layers mean the same, bit for bit, where the arithmetic is PyTorch's."""

import pytest

import faststeer as fs

BOTH_WAYS = {"test_architectures", "test_contracts", "test_steering"}
# Architectures that have no fused layers (test_fused.py says so of each): both ways are the same hooks, with another
# back end. GPT-2 stands for them in the shorter run.
BY_HOOKS_ANYWAY = {"neox_parallel", "neox_sequential", "opt", "falcon", "phi", "cohere", "stablelm"}


def pytest_generate_tests(metafunc):
    if metafunc.module.__name__ in BOTH_WAYS:
        metafunc.parametrize("way", ["hooks", "fused"], indirect=True)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    for item in items:
        given = getattr(getattr(item, "callspec", None), "params", {})
        if given.get("way") == "fused" and given.get("name") in BY_HOOKS_ANYWAY:
            item.add_marker(pytest.mark.full)


@pytest.fixture(autouse=True)
def way(request, monkeypatch):
    """hooks: through the C++. fused: where the layers allow it, in plain PyTorch, whose norms sum like the model's own;
    test_fused.py has the C++."""
    chosen = getattr(request, "param", None)
    if chosen == "hooks":
        monkeypatch.setenv("FASTSTEER_PATH", "hooks")
    with fs.backend("reference" if chosen == "fused" else "auto"):
        yield chosen
