"""`rotary_attention_`, `attention_branch_`, `gated_linear` and `gated_mlp` against fp64 and against transformers' own
rotation; what they write to the cache, and what they refuse."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from faststeer import ops

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
BACKENDS = pytest.mark.parametrize("backend", ["cpu", "reference"])
cpp = pytest.mark.skipif(not ops.states()["cpu"].works, reason="the C++ is not built here")


def drawn(seed: int, rows: int, heads: tuple[int, int], columns: int, size: int, rotary: int, dtype: torch.dtype):
    """Arguments of `rotary_attention_` up to the column, of a cache with more rows; each row stands somewhere else."""
    generator = torch.Generator().manual_seed(seed)
    key_heads, group = heads

    def some(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    together = some(rows, (group + 2) * key_heads * size)  # as one projection leaves them
    query, key, value = (
        t.view(rows, -1, size)
        for t in together.split([group * key_heads * size, key_heads * size, key_heads * size], -1)
    )
    keys, values = (some(rows + 2, key_heads, columns, size) for _ in range(2))
    angle = torch.rand(rows, rotary // 2, generator=generator).double().repeat(1, 2) * 6
    column = torch.randint(columns, (rows,), generator=generator)
    return query, key, value, keys, values, angle.cos().to(dtype), angle.sin().to(dtype), column


def rotated(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """By transformers' function, on the first numbers of each head."""
    size = cosine.shape[1]
    turned, _ = apply_rotary_pos_emb(
        x[..., :size].unsqueeze(2), x[..., :size].unsqueeze(2), cosine[:, None], sine[:, None]
    )
    return torch.cat([turned.squeeze(2), x[..., size:]], -1)


def attended(query: Tensor, keys: Tensor, values: Tensor, column: Tensor, scaling: float, window: int) -> Tensor:
    """One row and head after the other, in fp64."""
    out = torch.zeros(*query.shape[:2], values.shape[3], dtype=torch.float64)
    for row in range(query.shape[0]):
        end = int(column[row]) + 1
        first = max(0, end - window) if window else 0
        for head in range(query.shape[1]):
            shared = head * keys.shape[1] // query.shape[1]
            scores = keys[row, shared, first:end].double() @ query[row, head].double() * scaling
            out[row, head] = scores.softmax(0) @ values[row, shared, first:end].double()
    return out


@BACKENDS
@settings(deadline=None, max_examples=40)
@given(
    seed=st.integers(0, 2**31),
    rows=st.integers(1, 5),
    heads=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    columns=st.one_of(st.integers(1, 40), st.integers(120, 280)),
    sizes=st.sampled_from([(2, 2), (8, 8), (16, 8), (32, 32), (40, 20), (64, 64), (128, 32)]),
    dtype=st.sampled_from(sorted(DTYPES)),
    window=st.sampled_from([0, 1, 3, 130]),
)
def test_turns_keeps_and_attends(backend, seed, rows, heads, columns, sizes, dtype, window):
    given = drawn(seed, rows, heads, columns, *sizes, DTYPES[dtype])
    query, key, value, keys, values, cosine, sine, column = given
    before, row = [keys.clone(), values.clone()], torch.arange(rows)
    found = ops.rotary_attention_(*given, None, sizes[0] ** -0.5, window=window, backend=backend)
    for store, old, new in zip((keys, values), before, (rotated(key, cosine, sine), value), strict=True):
        old[row, :, column] = new  # to the bit, and nothing else
        assert torch.equal(store, old)
    turned = rotated(query, cosine, sine)
    expected = attended(turned, keys, values, column, sizes[0] ** -0.5, window)
    # Scores in fp32 are off by this much, and so is the logarithm of every weight; the result is rounded once.
    off = (sizes[0] + 4) * 2**-23 * (turned.double().norm(dim=-1).amax() * keys.double().norm(dim=-1).amax() + columns)
    largest = values.double().abs().amax()
    assert (found.double() - expected).abs().amax() <= largest * (2 * off + torch.finfo(DTYPES[dtype]).eps)


@BACKENDS
@pytest.mark.parametrize("window", [0, 4])
@pytest.mark.parametrize("dtype", DTYPES)
def test_tokens_of_a_prompt_are_tokens_one_after_the_other(backend, dtype, window):
    """To the bit, on the C++: what it computes of a row depends on that row alone."""
    query, key, value, keys, values, *angles, column = drawn(1, 3 * 7, (2, 2), 30, 32, 16, DTYPES[dtype])
    keys, values = keys[:4], values[:4]
    column = torch.tensor([2, 0, 20]).repeat_interleave(7) + torch.arange(7).repeat(3)
    stores = [(keys.clone(), values.clone()) for _ in range(2)]
    how = {"window": window, "backend": backend}
    given = query, key, value, *stores[0], *angles, column, None
    together = ops.rotary_attention_(*given, 0.2, tokens=7, **how)
    for i in range(7):
        each = [t[i::7].contiguous() for t in (query, key, value, *angles, column)]
        found = ops.rotary_attention_(*each[:3], *stores[1], *each[3:], None, 0.2, **how)
        if backend == "cpu":
            assert torch.equal(found, together[i::7])
        else:
            torch.testing.assert_close(found, together[i::7])
    assert all(map(torch.equal, *stores))


@BACKENDS
def test_a_mask_says_the_same_as_none(backend):
    given = drawn(1, 5, (2, 2), 30, 32, 32, torch.float32)
    behind = given[-1].unsqueeze(1) - torch.arange(30)
    for window in (0, 4):
        hidden = (behind < 0) | (behind >= (window or 30))
        mask = torch.zeros(5, 30).masked_fill(hidden, torch.finfo(torch.float32).min)
        by_mask = ops.rotary_attention_(*given, mask, 0.2, backend=backend)
        assert torch.equal(by_mask, ops.rotary_attention_(*given, None, 0.2, window=window, backend=backend))


def projections(seed: int, hidden: int, heads: int, key_heads: int, size: int, bias: bool, dtype: torch.dtype):
    generator = torch.Generator().manual_seed(seed)

    def one(outputs: int, inputs: int):
        weight = torch.randn(outputs, inputs, generator=generator) / inputs**0.5
        return weight.to(dtype), torch.randn(outputs, generator=generator).to(dtype) if bias else None

    keys = one(key_heads * size, hidden), one(key_heads * size, hidden)
    return one(heads * size, hidden), *keys, one(hidden, heads * size)


@cpp
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("rows", "window"), [(1, 0), (6, 3), (64, 0), (0, 0)])
def test_a_branch_is_its_parts(dtype, bias, rows, window):
    """To the bit: in one call, or projections, rotation with attention, and projection."""
    read = projections(0, 48, 6, 2, 16, bias, DTYPES[dtype])
    _, _, _, keys, values, *angles = drawn(2, max(rows, 1), (2, 3), 25, 16, 16, DTYPES[dtype])
    angles = [t[:rows] for t in angles]
    x = torch.randn(rows, 48, generator=torch.Generator().manual_seed(3)).to(DTYPES[dtype])
    stores = [(keys.clone(), values.clone()) for _ in range(2)]
    found = ops.attention_branch_(x, *read, *stores[0], *angles, 0.25, window=window)
    q, k, v = (ops.linear(x, *projection).unflatten(1, (-1, 16)) for projection in read[:3])
    parts = ops.rotary_attention_(q, k, v, *stores[1], *angles, None, 0.25, window=window)
    assert torch.equal(found, ops.linear(parts.flatten(1), *read[3]))
    assert all(map(torch.equal, *stores))


@BACKENDS
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
@pytest.mark.parametrize(("rows", "inputs", "outputs"), [(1, 5, 3), (9, 130, 47), (64, 128, 96), (33, 1100, 16)])
def test_gated(backend, dtype, activation, rows, inputs, outputs):
    generator, kind = torch.Generator().manual_seed(0), DTYPES[dtype]
    x = torch.randn(rows, inputs, generator=generator).to(kind)
    weight, up = (3 * torch.randn(outputs, inputs, generator=generator).div(inputs**0.5).to(kind) for _ in range(2))
    gate, other = (F.linear(x.double(), w.double()) for w in (weight, up))
    act = F.silu(gate) if activation == "silu" else F.gelu(gate, approximate="tanh")
    # Sums of n products in fp32; both activations change by at most 1.13 times what their argument does, and are
    # computed to a few units in the last place.
    off = [(inputs + 1) * 2**-24 * (x.double().abs() @ w.double().abs().T) for w in (weight, up)]
    bound = 1.13 * off[0] * (other.abs() + off[1]) + off[1] * act.abs() + 16 * 2**-24 * (act * other).abs()
    # And GELU's 1 + tanh cancels: it is right to the last place of 1.
    bound = bound + 16 * 2**-24 * gate.abs() * other.abs()
    found = ops.gated_linear(x, weight, up, activation, backend=backend).double()
    rounding = torch.finfo(kind).eps * ((act * other).abs() + bound) + torch.finfo(kind).tiny
    assert ((found - act * other).abs() <= bound + rounding).all()
    down, bias = (torch.randn(shape, generator=generator).to(kind) for shape in ((7, outputs), (7,)))
    inner = ops.gated_linear(x, weight, up, activation, backend=backend)
    mlp = ops.gated_mlp(x, weight, up, down, bias, activation, backend=backend)
    assert torch.equal(mlp, ops.linear(inner, down, bias, backend=backend))


@cpp
@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
def test_gated_is_right_at_the_ends(activation):
    x = torch.tensor([[v] for v in (-torch.inf, -1e30, -100.0, -0.0, 0.0, 100.0, 1e30, torch.inf, torch.nan)])
    one = torch.ones(1, 1)
    found = ops.gated_linear(x, one, one / x.abs().nan_to_num(1).clamp(1, 1e30)[0], activation, backend="cpu")
    expected = ops.gated_linear(x, one, one / x.abs().nan_to_num(1).clamp(1, 1e30)[0], activation, backend="reference")
    torch.testing.assert_close(found[1:], expected[1:], equal_nan=True)


@BACKENDS
@pytest.mark.parametrize(
    ("position", "worse", "message"),
    [
        (0, torch.zeros(5, 3, 32), "keys"),
        (1, torch.zeros(5, 1, 32), "key"),
        (2, torch.zeros(4, 2, 32), "value"),
        (3, torch.zeros(4, 2, 30, 32), "keys"),
        (4, torch.zeros(7, 2, 29, 32), "values"),
        (5, torch.zeros(5, 31), "cosine"),
        (5, torch.zeros(5, 64), "cosine"),
        (6, torch.zeros(5, 30), "sine"),
        (6, torch.zeros(5, 32, dtype=torch.float16), "sine"),
        (7, torch.tensor([0, 1, 2, 3, 30]), "column"),
        (7, torch.tensor([0, -1, 2, 3, 4]), "column"),
        (7, torch.zeros(5, dtype=torch.int32), "column"),
        (8, torch.zeros(5, 31), "keys|mask"),
        (8, torch.zeros(4, 30), "mask"),
        (10, {"window": -1}, "window"),
        (10, {"tokens": 2}, "tokens"),
    ],
)
def test_refuses(backend, position, worse, message):
    """Before anything is written to the cache."""
    arguments = [*drawn(1, 5, (2, 2), 30, 32, 32, torch.float32), None, 0.2, {}]
    before = arguments[3].clone()
    kept = arguments[3]
    arguments[position] = worse
    *most, more = arguments
    with pytest.raises((TypeError, ValueError), match=message):
        ops.rotary_attention_(*most, **more, backend=backend)
    assert torch.equal(kept, before)


@BACKENDS
def test_refuses_gradients_and_unknown_activations(backend):
    given = drawn(1, 5, (2, 2), 30, 32, 32, torch.float32)
    with pytest.raises(RuntimeError, match="gradient"):
        ops.rotary_attention_(given[0].requires_grad_(), *given[1:], None, 0.2, backend=backend)
    x = torch.zeros(2, 3)
    with pytest.raises(ValueError, match="'silu'"):
        ops.gated_linear(x, x, x, "relu", backend=backend)
    with pytest.raises(ValueError, match="up"):
        ops.gated_linear(x, x, torch.zeros(3, 3), "silu", backend=backend)
    with pytest.raises(ValueError, match="down"):
        ops.gated_mlp(x, x, x, torch.zeros(3, 3), None, "silu", backend=backend)


@cpp
@pytest.mark.parametrize(
    ("position", "worse", "message"),
    [
        (1, (torch.zeros(90, 48), None), "query"),
        (2, (torch.zeros(32, 47), None), "key"),
        (3, (torch.zeros(16, 48), None), "value"),
        (4, (torch.zeros(48, 95), None), "output"),
        (4, (torch.zeros(48, 96), torch.zeros(47)), "bias"),
        (9, torch.tensor([0, 1, 25]), "column"),
    ],
)
def test_a_branch_refuses(position, worse, message):
    read = projections(0, 48, 6, 2, 16, False, torch.float32)
    _, _, _, *rest = drawn(2, 3, (2, 3), 25, 16, 16, torch.float32)
    arguments = [torch.zeros(3, 48), *read, *rest]
    arguments[position] = worse
    with pytest.raises((TypeError, ValueError), match=message):
        ops.attention_branch_(*arguments, 0.25)


@cpp
def test_opcheck():
    read = projections(0, 48, 6, 2, 16, True, torch.float32)
    _, key, value, *rest = drawn(2, 3, (2, 3), 25, 16, 16, torch.float32)
    query, x = torch.randn(3, 6, 16), torch.randn(3, 48)
    weights = *(weight for weight, _ in read[:3]), *(bias for _, bias in read[:3]), *read[3]
    up, down = torch.randn(9, 48), torch.randn(5, 9)
    checked = torch.ops.faststeer
    torch.library.opcheck(checked.attention_branch_.cpp, (x, *weights, *rest, 1, 0, 0.25, 0.0))
    torch.library.opcheck(checked.rotary_attention_.cpp, (query, key, value, *rest, None, 1, 0, 0.25, 0.0))
    torch.library.opcheck(checked.gated_linear.cpp, (x, up, up, 0))
    torch.library.opcheck(checked.gated_mlp.cpp, (x, up, up, down, None, 1))
