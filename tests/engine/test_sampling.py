"""Sampling: the distribution is Hugging Face's, and a row's draws are its own."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from faststeer.engine.sampling import Mode, Sampling, choose, top, uniform

VOCAB = 23


def logits(rows: int, seed: int = 0) -> torch.Tensor:
    return 3 * torch.randn(rows, VOCAB, generator=torch.Generator().manual_seed(seed))


def sampling(rows: int, temperature=1.0, top_k=0, top_p=1.0, seed=0) -> Sampling:
    def column(value, dtype) -> torch.Tensor:
        return torch.as_tensor(value, dtype=dtype).expand(rows).contiguous()

    whole, real = torch.int64, torch.float32
    return Sampling(column(temperature, real), column(top_k, whole), column(top_p, real), column(seed, whole))


def probabilities(row: torch.Tensor, temperature: float, top_k: int, top_p: float) -> torch.Tensor:
    warpers = LogitsProcessorList([TemperatureLogitsWarper(temperature)])
    warpers += [TopKLogitsWarper(top_k)] if top_k else []
    warpers += [TopPLogitsWarper(top_p)] if top_p < 1 else []
    return warpers(torch.zeros(1, 1, dtype=torch.long), row.unsqueeze(0))[0].softmax(-1)


@settings(deadline=None, max_examples=25)
@given(
    st.integers(0, 1000),
    st.floats(0.2, 3.0),
    st.one_of(st.just(0), st.integers(1, VOCAB + 5)),
    st.one_of(st.just(1.0), st.floats(0.05, 0.999)),
)
def test_draws_have_the_distribution_of_transformers(seed, temperature, top_k, top_p):
    """Chi-square over 4,000 draws, at a level that one run in a million fails."""
    row, n = logits(1, seed), 4000
    mode = Mode.FILTER if top_k or top_p < 1 else Mode.TEMPERATURE
    how = sampling(n, temperature, top_k, top_p, torch.arange(n))
    drawn = torch.bincount(choose(row.expand(n, -1), how, torch.zeros(n), mode), minlength=VOCAB)
    expected = probabilities(row[0], temperature, top_k, top_p).double()
    assert not drawn[expected == 0].any()
    likely = expected * n >= 5
    seen = torch.cat([drawn[likely].double(), drawn[~likely].sum().double().reshape(1)])
    wanted = torch.cat([expected[likely] * n, expected[~likely].sum().reshape(1) * n])
    seen, wanted = seen[wanted > 0], wanted[wanted > 0]
    if len(wanted) > 1:
        statistic = ((seen - wanted) ** 2 / wanted).sum()
        assert stats.chi2.sf(float(statistic), len(wanted) - 1) > 1e-6


@settings(deadline=None, max_examples=25)
@given(
    st.lists(
        st.tuples(st.sampled_from([0.0, 0.5, 1.0]), st.integers(0, 5), st.sampled_from([0.3, 1.0])),
        min_size=1,
        max_size=6,
    ),
    st.integers(0, 99),
)
def test_a_row_draws_the_same_whatever_stands_around_it(rows, seed):
    temperature, top_k, top_p = zip(*rows, strict=True)
    n = len(rows)
    x, count = logits(n, seed), torch.arange(n)
    how = sampling(n, torch.tensor(temperature), torch.tensor(top_k), torch.tensor(top_p), torch.arange(n) + seed)
    together = choose(x, how, count, Mode.FILTER)
    for i in range(n):
        one = Sampling(*(t[i : i + 1] for t in how))
        assert choose(x[i : i + 1], one, count[i : i + 1], Mode.FILTER) == together[i]
        if temperature[i] == 0:
            assert together[i] == x[i].argmax()
        elif top_k[i] == 0 and top_p[i] == 1:
            assert choose(x[i : i + 1], one, count[i : i + 1], Mode.TEMPERATURE) == together[i]


def test_uniform_numbers_are_uniform_and_independent():
    seed, count = (t.reshape(-1) for t in torch.meshgrid(torch.arange(200), torch.arange(200), indexing="ij"))
    u = uniform(seed, count)
    assert u.min() >= 0 and u.max() < 1
    assert stats.kstest(u.numpy(), "uniform").pvalue > 1e-6
    grid = u.view(200, 200)
    for a, b in ((grid[:, :-1], grid[:, 1:]), (grid[:-1], grid[1:])):
        assert abs(torch.corrcoef(torch.stack([a.reshape(-1), b.reshape(-1)]))[0, 1]) < 0.03
    assert torch.equal(
        uniform(torch.tensor([-5, 2**62]), torch.tensor([3, 3])),
        uniform(torch.tensor([-5, 2**62]), torch.tensor([3, 3])),
    )


def test_logits_that_are_not_finite():
    x = logits(4)
    x[1, 3], x[2, 5], x[3, :] = torch.nan, torch.inf, -torch.inf
    x[3, 7] = 1.0
    for mode in Mode:
        assert choose(x, sampling(4), torch.zeros(4), mode)[1:].tolist() == [-1, -1, 7]


def test_a_tiny_temperature_is_greedy_and_does_not_overflow():
    x = logits(50)
    for mode in (Mode.TEMPERATURE, Mode.FILTER):
        assert torch.equal(choose(x, sampling(50, 1e-6), torch.zeros(50), mode), x.argmax(-1))


def test_top_is_the_first_of_equals():
    x = torch.zeros(3, VOCAB)
    x[1, [4, 9]] = 2.0
    for dtype in (torch.float32, torch.bfloat16):
        assert top(x.to(dtype))[1].tolist() == [0, 4, 0]
