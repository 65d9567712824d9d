"""Steering by hooks and steering in fused layers mean the same, bit for bit, where the arithmetic is PyTorch's."""

import pytest

import faststeer as fs

BOTH_WAYS = {"test_architectures", "test_steering"}


def pytest_generate_tests(metafunc):
    if metafunc.module.__name__ in BOTH_WAYS:
        metafunc.parametrize("way", ["hooks", "fused"], indirect=True)


@pytest.fixture(autouse=True)
def way(request, monkeypatch):
    """hooks: through the C++. fused: where the layers allow it, in plain PyTorch, whose norms sum like the model's own;
    test_fused.py has the C++."""
    chosen = getattr(request, "param", None)
    if chosen == "hooks":
        monkeypatch.setenv("FASTSTEER_PATH", "hooks")
    with fs.backend("reference" if chosen == "fused" else "auto"):
        yield chosen
