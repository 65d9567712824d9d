"""A row that steering makes infinite or NaN, and the rows beside it: they have the bits that they have beside a row
without a plan."""

from __future__ import annotations

import models
import pytest
import torch
from test_architectures import close, generate
from torch import Tensor
from transformers import StaticCache

import faststeer as fs
from faststeer.hf.cache import cache_argument

ROWS, PROMPT, NEW = 4, 7, 5
BAD = 1  # the row that overflows
PATH = pytest.mark.parametrize("path", ["hooks", "fused"])
FUSED = ["llama", "gemma2", "gemma3", "mixtral", "qwen3_moe", "olmo2"]
NAMES = [*FUSED, "gpt2", "neox_parallel"]
# Another row's choice of experts changes how many rows an expert multiplies at once, and so how the sums are rounded.
EXPERTS = {"mixtral", "qwen3_moe"}


def d(seed: int = 0) -> Tensor:
    return models.direction(seed)


def overflow(positions: str = "all") -> fs.Plan:
    return fs.Plan([fs.Add(d(), 3e38, layers="all", positions=positions)])


def plans(bad: fs.Plan | None) -> list[fs.Plan | None]:
    fine = fs.Plan([fs.Add(d(1), 2.0, layers="all"), fs.Ablate(d(2), layers=0)])
    return [fine, bad, None, fine]


def left_padded() -> dict[str, Tensor]:
    ids, mask = models.tokens(ROWS, PROMPT), torch.ones(ROWS, PROMPT, dtype=torch.long)
    for row, missing in enumerate((3, 1, 0, 2)):
        ids[row, :missing], mask[row, :missing] = 0, 0
    return {"input_ids": ids, "attention_mask": mask}


def without_bad(x: Tensor) -> Tensor:
    """Rows of `x`, some of each prompt, but for those of the bad one."""
    each = x.shape[0] // ROWS
    return torch.cat([x[: BAD * each], x[(BAD + 1) * each :]])


@pytest.mark.parametrize(("name", "path"), [*((n, "hooks") for n in NAMES), *((n, "fused") for n in FUSED)])
@pytest.mark.parametrize("cache", [None, "static"], ids=["dynamic cache", "static cache"])
def test_neighbours_in_a_batch(name, path, cache):
    """From the prompt on, and from a generated token on, when keys and values of the row before it are finite."""
    model, batch = models.model(name), left_padded()
    options = {} if cache is None else {"cache_implementation": cache, "disable_compile": True}
    results = []
    for bad in (None, overflow(), overflow("[1:]")):
        with fs.steer(model, plans(bad), path=path):
            results.append(generate(model, batch, NEW, **options))
    (tokens, logits), *others = results
    for number, (their_tokens, their_logits) in enumerate(others):
        beside, before = ([without_bad(t) for t in both] for both in ((their_tokens, their_logits), (tokens, logits)))
        if name in EXPERTS:
            close(tuple(beside), tuple(before))
        else:
            assert torch.equal(beside[0], before[0]) and torch.equal(beside[1], before[1])
        assert not their_logits[BAD, 2 * number :].isfinite().all(-1).any(), "the row was to overflow"


@PATH
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_neighbours_in_16_bits(path, dtype):
    model, ids = models.build("llama").to(dtype), models.tokens(ROWS, PROMPT)
    results = []
    for bad in (None, overflow()):
        with torch.no_grad(), fs.steer(model, plans(bad), path=path):
            results.append(model(ids).logits)
    assert torch.equal(without_bad(results[1]), without_bad(results[0]))
    assert not results[1][BAD].isfinite().any()


@PATH
@pytest.mark.parametrize("sample", [False, True], ids=["greedy", "sampled"])
def test_neighbours_of_beams(path, sample):
    """Beams of a row are chosen among its own."""
    model, batch = models.model("llama"), left_padded()
    settings = {"num_beams": 3, "num_return_sequences": 2, "do_sample": sample, "max_new_tokens": NEW}
    if sample:
        with pytest.raises(RuntimeError, match="inf"), fs.steer(model, plans(overflow()), path=path):
            model.generate(**batch, **settings)
        return
    results = []
    for bad in (None, overflow()):
        with fs.steer(model, plans(bad), path=path):
            results.append(model.generate(**batch, **settings))
    assert torch.equal(without_bad(results[1]), without_bad(results[0]))


@PATH
def test_a_cache_that_held_nan_serves_the_next_prompts(path):
    """A static cache, reset and used again, as a server would."""
    model, ids = models.model("llama"), models.tokens(ROWS, PROMPT)
    name = cache_argument(model)

    def new_cache() -> StaticCache:
        return StaticCache(config=model.config, max_cache_len=PROMPT + NEW)

    cache = new_cache()
    with fs.steer(model, plans(overflow()), path=path):
        _, logits = generate(model, ids, NEW, **{name: cache}, disable_compile=True)
    assert not logits[BAD].isfinite().any()
    cache.reset()
    again, fresh = (generate(model, ids, NEW, **{name: c}, disable_compile=True) for c in (cache, new_cache()))
    assert torch.equal(again[0], fresh[0]) and torch.equal(again[1], fresh[1])
