"""Attention in another type: near the float64 reference, whatever the size of the values, and told where it breaks."""

from __future__ import annotations

import pytest
import torch
from plain_attention import HEADS, attend, tensors

BOUNDS = {torch.float16: 2e-3, torch.bfloat16: 1.5e-2, torch.float32: 1e-6}
FP16 = torch.float16


@pytest.fixture(scope="module")
def kernel(pack):
    return pack("patches.kernels.precision")


@pytest.fixture
def in_dtype(kernel):
    """`in_dtype(dtype, q, k, v, mask)`: the output, its error by the reference as a share of the largest value, and the flag."""

    def compute(dtype, q, k, v, mask=None):
        out, is_broken = kernel.attend_in(dtype, attend, q, k, v, mask)
        exact = kernel.attend_in_float64(q, k, v, mask, HEADS)
        error = (out.double() - exact).abs().max() / exact.abs().max()
        return out, float(error), bool(is_broken)

    return compute


@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize("own", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", [1e-3, 1.0, 100.0])
def test_error_against_float64(dtype, own, size, in_dtype):
    q, k, v = (x.to(own) for x in tensors(40, 70, batch=2))
    v *= size
    out, error, is_broken = in_dtype(dtype, q, k, v)
    assert out.dtype == own and error < max(BOUNDS[dtype], BOUNDS[own]) and not is_broken
    # So small a value needs no scaling: plain casting, bit for bit.
    assert torch.equal(out, attend(q.to(dtype), k.to(dtype), v.to(dtype)).to(own))


@pytest.mark.parametrize("own", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [1e5, 1e6, 1e30])
def test_large_values_in_float16(size, own, in_dtype):
    q, k, v = (x.to(own) for x in tensors(40, 70, batch=2))
    assert not attend(q.to(FP16), k.to(FP16), (v * size).to(FP16)).isfinite().all()
    out, error, is_broken = in_dtype(FP16, q, k, v * size)
    assert out.isfinite().all() and error < max(BOUNDS[FP16], BOUNDS[own]) and not is_broken


@pytest.mark.parametrize("size", [1e-6, 1e-8, 1e-30])
def test_small_values_in_float16(size, in_dtype):
    q, k, v = (x.float() for x in tensors(40, 70, batch=2))
    v[0, :, 2] = 0
    out, error, is_broken = in_dtype(FP16, q, k, v * size)
    assert error < BOUNDS[FP16] and not is_broken and not out[0, :, 2].any()


def test_values_are_scaled_channel_by_channel_and_item_by_item(in_dtype):
    q, k, v = (x.float() for x in tensors(40, 70, batch=2))
    plain = attend(*(x.to(FP16) for x in (q, k, v))).float()
    v[1, :, 3] *= 1e8
    out, _, _ = in_dtype(FP16, q, k, v)
    others = torch.ones_like(out, dtype=torch.bool)
    others[1, :, 3] = False
    assert torch.equal(out[others], plain[others]) and not torch.equal(out, plain)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("hidden", [torch.finfo(torch.float32).min, -torch.inf])
def test_masks_of_large_numbers(dtype, hidden, kernel, in_dtype):
    q, k, v = (x.float() for x in tensors(40, 70))
    mask = torch.zeros(40, 70)
    mask[:20, 30:] = hidden
    mask[20:, :10] = -0.9
    assert in_dtype(dtype, q, k, v, mask)[1] < BOUNDS[dtype]
    # With infinities, a row that sees nobody is undefined for stock, too.
    mask[5] = hidden
    out, _, is_broken = in_dtype(dtype, q, k, v, mask)
    assert is_broken is not bool(out.isfinite().all())
    assert hidden == -torch.inf or not is_broken


def test_masks_of_bool_stay(kernel):
    mask = torch.ones(3, 4, dtype=torch.bool)
    assert kernel.cast_mask(mask, FP16) is mask and kernel.cast_mask(None, FP16) is None


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_only_what_casting_broke_is_told(bad, kernel):
    q, k, v = (x.float() for x in tensors(40, 70))
    assert kernel.attend_in(FP16, attend, q * 1e6, k, v, None)[1]
    for which in (0, 2):
        given = [q * 1e6, k, v]
        given[which] = given[which].clone()
        given[which][0, 7, 3] = bad
        out, is_broken = kernel.attend_in(FP16, attend, *given, None)
        assert not out.isfinite().all() and not is_broken
