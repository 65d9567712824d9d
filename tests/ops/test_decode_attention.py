"""`decode_attention` against PyTorch's attention in fp64, on tensors as a cache has them."""

from __future__ import annotations

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from faststeer import ops

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
BACKENDS = pytest.mark.parametrize("backend", ["cpu", "reference"])


def case(seed: int, rows: int, groups: tuple[int, int], columns: int, sizes: tuple[int, int], dtype: torch.dtype):
    """A query as a layer makes it, keys and values inside larger ones, and masks of every kind: from a column on, up to
    one, with a bias, with holes."""
    key_heads, group = groups
    generator = torch.Generator().manual_seed(seed)

    def some(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    query = 2 * some(rows, 1, key_heads * group, sizes[0]).transpose(1, 2)
    keys = some(rows + 2, key_heads, columns + 5, sizes[0])[:rows, :, :columns]
    values = some(rows + 2, key_heads, columns + 5, sizes[1])[:rows, :, :columns]
    column = torch.arange(columns)
    end = torch.randint(1, columns + 1, (rows, 1), generator=generator)
    seen = (column < end) & ((column >= end - 1 - column.numel() // 2) | (end % 2 == 0))
    seen &= (torch.rand(rows, columns, generator=generator) < 0.8) | (end % 3 > 0) | (column == end - 1)
    mask = some(rows, columns).masked_fill(~seen, torch.finfo(dtype).min)
    return query.squeeze(2), keys, values, mask


def exact(query: Tensor, keys: Tensor, values: Tensor, mask: Tensor, scaling: float, softcap: float = 0.0) -> Tensor:
    """One column after the other, in fp64."""
    outputs = []
    for row in range(len(query)):
        seen = mask[row] > torch.finfo(mask.dtype).min
        for head in range(query.shape[1]):
            shared = head * keys.shape[1] // query.shape[1]
            scores = keys[row, shared, seen].double() @ query[row, head].double() * scaling
            if softcap:
                scores = softcap * torch.tanh(scores / softcap)
            weights = torch.softmax(scores + mask[row, seen].double(), 0)
            outputs.append(weights @ values[row, shared, seen].double())
    return torch.stack(outputs).view(*query.shape[:2], -1)


@BACKENDS
@settings(deadline=None, max_examples=60)
@given(
    st.integers(0, 2**31),
    st.integers(1, 5),
    st.tuples(st.integers(1, 3), st.integers(1, 4)),
    st.one_of(st.integers(1, 40), st.integers(120, 300)),
    st.tuples(st.sampled_from([1, 8, 16, 32, 40, 64, 128, 144]), st.sampled_from([1, 8, 16, 32, 40, 64, 112, 128])),
    st.sampled_from(sorted(DTYPES)),
    st.sampled_from([0.0, 5.0]),
)
@example(0, 64, (2, 2), 100, (32, 32), "fp32", 0.0)
def test_agrees_with_fp64(backend, seed, rows, groups, columns, sizes, dtype, softcap):
    """No more than twice the error of PyTorch in the same dtype, up to a rounding of the largest value."""
    given = case(seed, rows, groups, columns, sizes, DTYPES[dtype])
    scaling = sizes[0] ** -0.5
    found = ops.decode_attention(*given, scaling, softcap, backend=backend)
    expected = exact(*given, scaling, softcap)
    assert found.dtype == DTYPES[dtype] and found.is_contiguous()
    error = (found.double() - expected).abs().amax()
    # In the same dtype: scores and weights are rounded to it, as eager attention does.
    query, keys, values, mask = given
    wide_keys, wide_values = (t.repeat_interleave(groups[1], 1) for t in (keys, values))
    scores = (query.unsqueeze(2) @ wide_keys.transpose(2, 3)) * scaling
    if softcap:
        scores = softcap * (scores / softcap).tanh()
    weights = (scores + mask[:, None, None]).float().softmax(-1).to(query.dtype)
    plain = ((weights @ wide_values).squeeze(2).double() - expected).abs().amax()
    assert error <= 2 * plain + 2 * torch.finfo(DTYPES[dtype]).eps * values.double().abs().amax()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_row_does_not_depend_on_the_others_nor_on_what_is_hidden(dtype):
    query, keys, values, mask = case(1, 5, (2, 3), 150, (32, 40), DTYPES[dtype])
    expected = ops.decode_attention(query, keys, values, mask, 0.2, backend="cpu")
    hidden = (mask <= torch.finfo(mask.dtype).min)[:, None, :, None]
    least = torch.finfo(mask.dtype).min
    for row in range(5):
        end = int((mask[row] > least).nonzero().max()) + 1
        alone = (t[row : row + 1, :, :end] for t in (keys, values))
        found = ops.decode_attention(query[row : row + 1], *alone, mask[row : row + 1, :end], 0.2, backend="cpu")
        assert torch.equal(found[0], expected[row])
    keys, values = (t.masked_fill(hidden, 100.0) for t in (keys, values))
    assert torch.equal(ops.decode_attention(query, keys, values, mask, 0.2, backend="cpu"), expected)


@BACKENDS
def test_a_row_that_may_look_at_nothing_gets_zeros(backend):
    query, keys, values, mask = case(2, 3, (1, 2), 20, (16, 16), torch.float32)
    mask[1] = -torch.inf
    found = ops.decode_attention(query, keys, values, mask, 0.25, backend=backend)
    assert not found[1].any() and found[0].any() and found.isfinite().all()


@BACKENDS
@pytest.mark.parametrize("worse", [torch.nan, torch.inf])
def test_what_is_not_finite_stays_so(backend, worse):
    query, keys, values, mask = case(3, 3, (2, 2), 150, (32, 16), torch.float32)
    mask.zero_()
    query[1] = worse
    found = ops.decode_attention(query, keys, values, mask, 0.25, backend=backend)
    assert found[1].isnan().all() and found[::2].isfinite().all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"query": (3, 4)}, "query"),
        ({"query": (3, 5, 16)}, "keys"),
        ({"keys": (3, 2, 9, 15)}, "keys"),
        ({"keys": (2, 2, 9, 16)}, "keys"),
        ({"values": (3, 2, 8, 16)}, "values"),
        ({"mask": (3, 8)}, "mask"),
    ],
)
@BACKENDS
def test_wrong_shapes_are_refused(backend, change, message):
    shapes = {"query": (3, 4, 16), "keys": (3, 2, 9, 16), "values": (3, 2, 9, 16), "mask": (3, 9)} | change
    with pytest.raises(ValueError, match=message):
        ops.decode_attention(*(torch.zeros(shape) for shape in shapes.values()), 1.0, backend=backend)


@BACKENDS
def test_wrong_dtypes_strides_and_gradients_are_refused(backend):
    query, keys, values, mask = case(4, 2, (1, 2), 9, (16, 16), torch.float32)
    for wrong in ({0: query.int()}, {2: values.half()}, {3: mask > 0}):
        arguments = [wrong.get(i, tensor) for i, tensor in enumerate((query, keys, values, mask))]
        with pytest.raises((TypeError, ValueError), match=r"dtype|expected the same"):
            ops.decode_attention(*arguments, 1.0, backend=backend)
    across = keys.transpose(2, 3).contiguous().transpose(2, 3)
    with pytest.raises(ValueError, match="stride"):
        ops.decode_attention(query, across, values, mask, 1.0, backend=backend)
    with pytest.raises(RuntimeError, match="no gradient"):
        ops.decode_attention(query.requires_grad_(), keys, values, mask, 1.0, backend=backend)


def test_opcheck():
    given = case(5, 3, (2, 2), 20, (16, 8), torch.bfloat16)
    torch.library.opcheck(torch.ops.faststeer.decode_attention.cpp, (*given, 0.25, 0.0))
