"""Coarse attention: both executors against the definition, and what it is exact about."""

from __future__ import annotations

from functools import partial

import plain_attention
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pooling import attend, groups_seen

HEADS = plain_attention.HEADS
# frames, height, width, near, sinks, pool, spatial, guides, anchors
CASES = [
    (9, 2, 3, 1, 1, 2, 1, 0, 0),
    (10, 4, 4, 1, 0, 2, 2, 3, 0),
    (7, 3, 5, 0, 2, 4, 2, 2, 1),
    (13, 2, 2, 2, 1, 3, 1, 0, 2),
    (8, 5, 7, 1, 1, 1, 4, 1, 0),
    (9, 1, 1, 0, 0, 8, 3, 0, 0),
]


@pytest.fixture
def kernel(pack):
    return pack("patches.kernels.coarse")


@pytest.fixture
def made(pack, kernel):
    """`made(case, window=None)`: tokens, segments and what each token sees, by definition."""

    def make(case, window=None):
        frames, height, width, near, sinks, pool, spatial, guides, anchors = case
        tokens = pack("patches.kernels.tokens").VideoTokens.grid(frames, height, width, guides, anchors)
        segments = pack("patches.kernels.segments").Segments.dense(tokens.total, tokens.total)
        clip, a_frame = frames - anchors, height * width
        if window is not None:
            segments = pack("patches.kernels.window").window_segments(tokens, *window)

        def seen(token):
            frame = token // a_frame - anchors
            frame = frame if 0 <= frame < clip else None
            sees = None
            if window is not None and frame is not None:
                low = min(max(frame - window[0], 0), clip - 2 * window[0] - 1)
                sees = set(range(low, low + 2 * window[0] + 1)) | set(range(window[1]))
            return groups_seen(
                frame, frames, height, width, near, sinks, pool, spatial, guides, anchors, sees
            )

        return tokens, kernel.coarsened(segments, tokens, near, sinks, pool, spatial), seen

    return make


def executors(kernel):
    return {
        "masked": lambda q, k, v, rows, segments: kernel.attend_masked(
            q, k, v, rows, segments, plain_attention.attend
        ),
        "merged": lambda q, k, v, rows, segments: kernel.attend_merged(q, k, v, HEADS, None, rows, segments),
    }


@pytest.mark.parametrize("executor", ["masked", "merged"])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("batch", [1, 2])
def test_equals_the_definition(case, batch, executor, kernel, made):
    tokens, segments, seen = made(case)
    assert segments.is_coarse and not segments.is_dense
    q, k, v = plain_attention.tensors(tokens.total, batch=batch)
    out = executors(kernel)[executor](q, k, v, range(tokens.total), segments)
    torch.testing.assert_close(out, attend(q, k, v, HEADS, seen), rtol=1e-9, atol=1e-9)
    assert segments.pairs(range(tokens.total)) == sum(len(seen(n)) for n in range(tokens.total))


@pytest.mark.parametrize("executor", ["masked", "merged"])
@pytest.mark.parametrize(("case", "window"), [(CASES[0], (3, 1)), (CASES[1], (3, 0)), (CASES[3], (4, 2))])
def test_behind_a_window(case, window, executor, kernel, made):
    """The window says which frames are seen, this how: a group that it cuts is seen exactly."""
    tokens, segments, seen = made(case, window)
    assert segments.is_coarse
    q, k, v = plain_attention.tensors(tokens.total)
    out = executors(kernel)[executor](q, k, v, range(tokens.total), segments)
    torch.testing.assert_close(out, attend(q, k, v, HEADS, seen), rtol=1e-9, atol=1e-9)


@given(
    st.integers(2, 9),
    st.integers(1, 5),
    st.integers(1, 5),
    st.integers(0, 3),
    st.integers(0, 3),
    st.integers(1, 4),
    st.integers(1, 3),
    st.integers(0, 2),
    st.integers(0, 1),
)
@settings(max_examples=60, deadline=None)
def test_any_grid(pack, frames, height, width, near, sinks, pool, spatial, guides, anchors):
    kernel = pack("patches.kernels.coarse")
    tokens = pack("patches.kernels.tokens").VideoTokens.grid(frames, height, width, guides, anchors)
    dense = pack("patches.kernels.segments").Segments.dense(tokens.total, tokens.total)
    segments = kernel.coarsened(dense, tokens, near, sinks, pool, spatial)
    see = partial(
        groups_seen,
        frames=frames,
        height=height,
        width=width,
        near=near,
        sinks=sinks,
        pool=pool,
        spatial=spatial,
        guides=guides,
        anchors=anchors,
    )

    def seen(token):
        frame = token // (height * width) - anchors
        return see(frame if 0 <= frame < frames - anchors else None)

    is_dense = all(len(group) == 1 for token in range(tokens.total) for group in seen(token))
    assert (segments is dense) == is_dense
    if is_dense:
        return
    q, k, v = plain_attention.tensors(tokens.total)
    out = executors(kernel)["merged"](q, k, v, range(tokens.total), segments)
    torch.testing.assert_close(out, attend(q, k, v, HEADS, seen), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("executor", ["masked", "merged"])
def test_equal_keys_in_a_group_make_it_dense(executor, kernel, made):
    """Then a pooled key loses nothing: the logarithm of its size is right."""
    tokens, segments, _ = made((9, 4, 4, 1, 1, 2, 2, 0, 0))
    q, k, v = plain_attention.tensors(tokens.total)
    grid = torch.arange(tokens.total).view(9, 2, 2, 2, 2)
    for first in range(1, 9, 2):
        for y in range(2):
            for x in range(2):
                group = grid[first : first + 2, y, :, x].flatten()
                k[:, group], v[:, group] = k[:, group[:1]], v[:, group[:1]]
    out = executors(kernel)[executor](q, k, v, range(tokens.total), segments)
    torch.testing.assert_close(out, plain_attention.attend(q, k, v), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("executor", ["masked", "merged"])
def test_rows_are_a_part_of_the_queries(executor, kernel, made):
    tokens, segments, _ = made(CASES[1])
    q, k, v = plain_attention.tensors(tokens.total)
    run = executors(kernel)[executor]
    whole = run(q, k, v, range(tokens.total), segments)
    part = run(q[:, 20:100], k, v, range(20, 100), segments)
    torch.testing.assert_close(part, whole[:, 20:100], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", CASES[:3])
def test_types(case, dtype, kernel, made):
    tokens, segments, seen = made(case)
    q, k, v = plain_attention.tensors(tokens.total, dtype=dtype)
    expected = attend(q, k, v, HEADS, seen)
    for run in executors(kernel).values():
        out = run(q, k, v, range(tokens.total), segments)
        assert out.dtype == dtype
        error = (out.double() - expected).abs().max() / expected.abs().max()
        assert error < {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}[dtype]


def test_pools_once_a_call_and_copies_no_keys(kernel, made, monkeypatch):
    """Views of keys and of pooled keys; what neighbours share is attended once for all."""
    tokens, segments, _ = made((13, 2, 2, 1, 1, 2, 1, 0, 0))
    q, k, v = plain_attention.tensors(tokens.total)
    pooled, pooling, calls, stores = kernel.Grid.pooled, [], [], set()
    monkeypatch.setattr(kernel.Grid, "pooled", lambda self, x: pooling.append(x) or pooled(self, x))
    attend_with_lse = kernel.attend_with_lse

    def looking(q, k, v, scale):
        stores.update(x.untyped_storage().data_ptr() for x in (k, v))
        calls.append((q.shape[2], k.shape[2]))
        return attend_with_lse(q, k, v, scale)

    monkeypatch.setattr(kernel, "attend_with_lse", looking)
    kernel.attend_merged(q, k, v, HEADS, None, range(tokens.total), segments)
    assert [x is y for x, y in zip(pooling, (k, v), strict=True)] == [True, True]
    # Plain keys and values, and pooled ones in one ring.
    assert len(stores) == 4 and {k.untyped_storage().data_ptr(), v.untyped_storage().data_ptr()} < stores
    # Seven stretches of frames see near and far keys in one call each, and all but the first ones the sink.
    assert len(calls) == 7 + 7 + 1 and sum(queries * keys for queries, keys in calls) == segments.pairs(
        range(tokens.total)
    )
