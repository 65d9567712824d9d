"""`linear` against fp64, within the error of its roundings; a row is the same whatever stands beside it."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import forward_ad

from faststeer import ops

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
ROUNDING = {torch.float32: 2**-24, torch.bfloat16: 2**-8, torch.float16: 2**-11}
cpp = pytest.mark.skipif(not ops.states()["cpu"].works, reason="the C++ is not built here")


def drawn(rows, inputs, outputs, dtype, bias=True, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x, weight, shift = (torch.randn(s, generator=generator) for s in ((rows, inputs), (outputs, inputs), (outputs,)))
    return x.to(dtype), (weight / inputs**0.5).to(dtype), shift.to(dtype) if bias else None


def bound(x, weight, bias, exact):
    """Of rounding: sums of n products in fp32, each rounded, in any order, and the result once."""
    terms = x.double().abs() @ weight.double().abs().T + (0 if bias is None else bias.double().abs())
    sums = (x.shape[1] + 1) * 2**-24 * terms
    return sums + ROUNDING[x.dtype] * (exact.abs() + sums) + torch.finfo(x.dtype).tiny


def exactly(x, weight, bias):
    return F.linear(x.double(), weight.double(), None if bias is None else bias.double())


@cpp
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@given(
    rows=st.integers(1, 140),
    inputs=st.integers(1, 1600),
    outputs=st.integers(1, 70),
    bias=st.booleans(),
    seed=st.integers(0, 9),
)
@settings(deadline=None, max_examples=60)
def test_within_the_error_of_rounding(dtype, rows, inputs, outputs, bias, seed):
    given = drawn(rows, inputs, outputs, dtype, bias, seed)
    exact = exactly(*given)
    found = ops.linear(*given, backend="cpu")
    assert found.dtype == dtype and found.is_contiguous()
    assert ((found.double() - exact).abs() <= bound(*given, exact)).all()


@cpp
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_row_does_not_depend_on_the_others(dtype):
    x, weight, bias = drawn(33, 300, 50, dtype)
    whole = ops.linear(x, weight, bias, backend="cpu")
    for rows in (slice(0, 1), slice(5, 12), slice(30, 33)):
        assert torch.equal(ops.linear(x[rows], weight, bias, backend="cpu"), whole[rows])
    assert torch.equal(ops.linear(x, weight[7:29], bias[7:29], backend="cpu"), whole[:, 7:29])


@cpp
def test_strided_rows_and_weights_and_no_rows():
    x, weight, bias = drawn(9, 64, 40, torch.bfloat16)
    expected = ops.linear(x, weight, bias, backend="cpu")
    wide, tall = torch.full((9, 80), torch.nan).to(x), torch.full((40, 90), torch.nan).to(x)
    wide[:, 8:72], tall[:, :64] = x, weight
    assert torch.equal(ops.linear(wide[:, 8:72], tall[:, :64], bias, backend="cpu"), expected)
    assert ops.linear(x[:0], weight, bias, backend="cpu").shape == (0, 40)


@cpp
def test_nan_and_infinity_stay_in_their_row():
    x, weight, _ = drawn(8, 64, 20, torch.bfloat16)
    expected = ops.linear(x, weight, backend="cpu")
    x[3, 5], x[6, 0] = torch.nan, torch.inf
    found = ops.linear(x, weight, backend="cpu")
    kept = [0, 1, 2, 4, 5, 7]
    assert found[3].isnan().all() and not found[6].isfinite().any() and torch.equal(found[kept], expected[kept])


@pytest.mark.parametrize("backend", ["reference", pytest.param("cpu", marks=cpp)])
def test_bad_input_is_refused_alike(backend):
    x, weight, bias = drawn(4, 32, 20, torch.bfloat16)
    for message, arguments in {
        r"weight has shape \[20, 31\]: expected \[any, 32\]": (x, weight[:, :31], bias),
        r"x has shape \[32\]": (x[0], weight, bias),
        r"bias has shape \[19\]: expected \[20\]": (x, weight, bias[:19]),
        r"weight has stride 2": (x, weight.repeat(1, 2)[:, ::2], bias),
        r"x has shape \[4, 0\]": (x[:, :0], weight[:, :0], bias),
    }.items():
        with pytest.raises(ValueError, match=message):
            ops.linear(*arguments, backend=backend)
    with pytest.raises(TypeError, match=r"weight has dtype torch\.float32: expected torch\.bfloat16"):
        ops.linear(x, weight.float(), bias, backend=backend)
    with pytest.raises(TypeError, match=r"x has dtype torch\.int64"):
        ops.linear(x.long(), weight.long(), backend=backend)
    with pytest.raises(RuntimeError, match="linear has no gradient"):
        ops.linear(x, weight.clone().requires_grad_(), bias, backend=backend)


@cpp
def test_opcheck():
    x, weight, bias = drawn(3, 40, 20, torch.bfloat16)
    torch.library.opcheck(torch.ops.faststeer.linear.cpp, (x.float(), weight, bias))


@pytest.mark.parametrize("of_func", [False, True], ids=["forward mode", "torch.func"])
def test_a_tangent_is_not_dropped(of_func):
    x, weight, bias = drawn(3, 20, 5, torch.float32)
    tangent = torch.ones_like(x)
    if of_func:
        along = torch.func.jvp(lambda x: ops.linear(x, weight, bias), (x,), (tangent,))[1]
    else:
        with torch.no_grad(), forward_ad.dual_level():
            along = forward_ad.unpack_dual(ops.linear(forward_ad.make_dual(x, tangent), weight, bias)).tangent
    torch.testing.assert_close(along, tangent @ weight.T)
