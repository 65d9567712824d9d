"""Functions of vLLM's are put behind faststeer's once; one that is not there is left out, or refused."""

import asyncio
import sys
from types import ModuleType

import pytest

from faststeer.vllm.wrapping import wrap, wrap_imported


class Model:
    def run(self, x):
        """Twice."""
        return 2 * x

    async def later(self, x):
        return 2 * x

    async def each(self, x):
        yield 2 * x


def one_more(run, self, x):
    return run(self, x) + 1


@pytest.fixture
def kind():
    return type("Model", (Model,), {})


def test_a_function_is_wrapped_once(kind):
    for _ in range(2):
        wrap(kind, "run", one_more)
    assert kind().run(x=3) == 7 and kind.run.__doc__ == "Twice." and Model().run(3) == 6


def test_of_one_instance(kind):
    model = kind()
    for _ in range(2):
        wrap(model, "run", lambda run, x: run(x) + 1)
    assert model.run(3) == 7 and kind().run(3) == 6


def test_subclasses_have_it_and_it_is_not_wrapped_again(kind):
    own = type("Own", (kind,), {"run": lambda self, x: super(own, self).run(x) * 10})
    for owner in (kind, type("Plain", (kind,), {}), own):
        wrap(owner, "run", one_more)
    assert type("Plain", (kind,), {})().run(3) == 7 and own().run(3) == 71


def test_asynchronous_functions_and_generators(kind):
    async def later(function, self, x):
        return await function(self, x) + 1

    async def each(function, self, x):
        async for y in function(self, x):
            yield y + 1

    async def run():
        return await kind().later(3), [y async for y in kind().each(3)]

    wrap(kind, "later", later)
    wrap(kind, "each", each)
    assert asyncio.run(run()) == (7, [7])


def test_what_is_not_there(kind, monkeypatch):
    with pytest.raises(AttributeError, match="walk"):
        wrap(kind, "walk", one_more)
    module = ModuleType("part_of_vllm")
    wrap_imported("part_of_vllm", "Model.run", one_more)  # not imported
    monkeypatch.setitem(sys.modules, "part_of_vllm", module)
    wrap_imported("part_of_vllm", "Model.run", one_more)  # no such class
    module.Model, module.double = kind, lambda x: 2 * x
    wrap_imported("part_of_vllm", "Model.walk", one_more)  # no such function
    wrap_imported("part_of_vllm", "Model.run", one_more)
    wrap_imported("part_of_vllm", "double", lambda double, x: double(x) + 1)
    assert kind().run(3) == 7 and module.double(3) == 7
