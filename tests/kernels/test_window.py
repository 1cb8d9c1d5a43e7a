"""The window kernel against its definition, in the ways it can be wrong."""

from __future__ import annotations

from itertools import accumulate

import pytest
import torch
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from plain_attention import HEADS, attend, tensors


@pytest.fixture(scope="module")
def kernel(pack):
    return pack("patches.kernels.window")


@pytest.fixture(scope="module")
def Tokens(pack):
    return pack("patches.kernels.tokens").VideoTokens


@pytest.fixture(scope="module")
def run(pack, kernel):
    def run(tokens, window, sinks, q, k, v, mask=None, rows=None, path="attend_batched"):
        rows = range(tokens.total) if rows is None else rows
        segments = kernel.window_segments(tokens, window, sinks)
        attend_by = getattr(pack("patches.kernels.segments"), path)
        return attend_by(q[:, rows.start : rows.stop], k, v, mask, rows, segments, attend)

    return run


layouts = st.fixed_dictionaries(
    {
        "frames": st.integers(4, 14),
        "height": st.integers(1, 3),
        "width": st.integers(1, 3),
        "guides": st.integers(0, 4),
        "anchors": st.integers(0, 1),
    }
)


@settings(max_examples=150, deadline=None)
@given(layout=layouts, window=st.integers(1, 4), sinks=st.integers(0, 8), batch=st.integers(1, 2))
def test_equals_the_definition(pack, run, layout, window, sinks, batch):
    kernel, tokens = pack("patches.kernels.window"), pack("patches.kernels.tokens").VideoTokens.grid(**layout)
    assume(2 * window + 1 < tokens.frames - tokens.anchors)
    q, k, v = tensors(tokens.total, batch=batch)
    expected = kernel.attend_reference(q, k, v, HEADS, tokens, window, sinks)
    torch.testing.assert_close(run(tokens, window, sinks, q, k, v), expected)
    plain = run(tokens, window, sinks, q, k, v, path="attend_segments")
    torch.testing.assert_close(plain, expected)


@pytest.mark.parametrize(
    ("frames", "window", "sinks"), [(40, 1, 1), (40, 1, 3), (26, 2, 1), (13, 4, 1), (61, 4, 2), (20, 1, 8)]
)
def test_long_clips_in_chunks_and_batches(kernel, Tokens, run, frames, window, sinks):
    tokens = Tokens.grid(frames, 1, 2, guides=1)
    q, k, v = tensors(tokens.total, batch=2)
    expected = kernel.attend_reference(q, k, v, HEADS, tokens, window, sinks)
    torch.testing.assert_close(run(tokens, window, sinks, q, k, v), expected)


@pytest.mark.parametrize("sinks", [0, 2])
@pytest.mark.parametrize("shape", [(9, 2, 3), (7, 3, 5)])
def test_frames_outside_change_no_bit_and_frames_inside_do(Tokens, run, shape, sinks):
    tokens, window = Tokens.grid(*shape), 1
    per_frame = shape[1] * shape[2]
    q, k, v = tensors(tokens.total, dtype=torch.float32)
    before = run(tokens, window, sinks, q, k, v)
    for changed in range(tokens.frames):
        k2, v2 = k.clone(), v.clone()
        token = changed * per_frame + per_frame - 1
        k2[:, token] += 1.0
        v2[:, token] += 1.0
        after = run(tokens, window, sinks, q, k2, v2)
        for frame in range(tokens.frames):
            low = min(max(frame - window, 0), tokens.frames - 2 * window - 1)
            seen = low <= changed <= low + 2 * window or changed < sinks
            rows = slice(frame * per_frame, (frame + 1) * per_frame)
            assert torch.equal(before[:, rows], after[:, rows]) is not seen, (changed, frame)


def test_tokens_out_of_sight_may_be_nan(Tokens, run):
    tokens = Tokens.grid(12, 1, 2)
    q, k, v = tensors(tokens.total)
    k[:, 10:12] = v[:, 10:12] = torch.nan  # frame 5
    out = run(tokens, 1, 1, q, k, v)
    bad = {row // 2 for row in range(tokens.total) if out[0, row].isnan().any()}
    assert bad == {4, 5, 6}


def test_guides_and_anchors_see_all_and_are_seen_by_all(Tokens, run):
    tokens = Tokens.grid(9, 1, 1, guides=2, anchors=1)
    q, k, v = tensors(tokens.total)
    before = run(tokens, 1, 0, q, k, v)
    for special in (0, 9, 10):
        v2 = v.clone()
        v2[:, special] += 1
        assert (run(tokens, 1, 0, q, k, v2) != before).any(-1).all(), "seen by all"
    for far in range(1, 9):
        v2 = v.clone()
        v2[:, far] += 1
        changed = (run(tokens, 1, 0, q, k, v2) != before).any(-1)[0]
        assert changed[[0, 9, 10]].all(), "see all"
        assert not changed.all()


def test_dropped_tokens_make_ragged_frames(kernel, Tokens, run):
    tokens = Tokens((0, 3, 5, 5, 9, 10, 12, 14, 15), 17)
    q, k, v = tensors(tokens.total)
    expected = kernel.attend_reference(q, k, v, HEADS, tokens, 2, 1)
    torch.testing.assert_close(run(tokens, 2, 1, q, k, v), expected)


@settings(max_examples=150, deadline=None)
@given(
    sizes=st.lists(st.integers(0, 4), min_size=5, max_size=12),
    guides=st.integers(0, 2),
    window=st.integers(1, 2),
    sinks=st.integers(0, 2),
)
# Sizes that add up to so many frames of the middle one's size, with its neighbours of another one.
@example(sizes=[2, 4, 3, 2, 2], guides=0, window=1, sinks=0)
def test_ragged_frames_of_any_size(pack, kernel, run, sizes, guides, window, sinks):
    assume(2 * window + 1 < len(sizes) and sum(sizes) + guides)
    offsets = tuple(accumulate(sizes, initial=0))
    tokens = pack("patches.kernels.tokens").VideoTokens(offsets, offsets[-1] + guides)
    q, k, v = tensors(tokens.total)
    expected = kernel.attend_reference(q, k, v, HEADS, tokens, window, sinks)
    torch.testing.assert_close(run(tokens, window, sinks, q, k, v), expected)


@pytest.mark.parametrize("mask_rows", ["none", "one", "all"])
@pytest.mark.parametrize("rows", [range(22), range(20), range(4, 13), range(20, 22)])
def test_masks_and_query_slices(kernel, Tokens, run, rows, mask_rows):
    tokens = Tokens.grid(10, 1, 2, guides=2)
    q, k, v = tensors(tokens.total)
    generator = torch.Generator().manual_seed(5)
    bias = torch.randn(
        1, 1, tokens.total if mask_rows == "all" else 1, tokens.total, generator=generator
    ).double()
    if mask_rows == "none":
        bias = torch.zeros_like(bias)
    mask = {"none": None, "one": bias, "all": bias[:, :, rows.start : rows.stop]}[mask_rows]
    out = run(tokens, 1, 1, q, k, v, mask, rows)
    segments = kernel.window_segments(tokens, 1, 1)
    visible = torch.full((tokens.total, tokens.total), -torch.inf, dtype=torch.float64)
    for segment in segments.parts:
        for a, b in segment.keys:
            visible[segment.start : segment.stop, a:b] = 0
    expected = attend(q, k, v, bias + visible)[:, rows.start : rows.stop]
    torch.testing.assert_close(out, expected)


def test_batch_items_do_not_see_each_other(Tokens, run):
    tokens = Tokens.grid(9, 2, 2, guides=3)
    q, k, v = tensors(tokens.total, batch=2)
    both = run(tokens, 1, 1, q, k, v)
    k[1], v[1] = torch.nan, torch.nan
    assert torch.equal(run(tokens, 1, 1, q, k, v)[0], both[0])


def test_every_pair_is_counted(kernel, Tokens):
    tokens = Tokens.grid(16, 2, 2)
    pairs = kernel.window_segments(tokens, 1, 0).pairs
    assert pairs(range(tokens.total)) == 64 * 3 * 4
    assert pairs(range(8)) == 8 * 3 * 4
    # Frames 0 and 1 hold the sink in their window; the other 14 see one frame more.
    assert kernel.window_segments(tokens, 1, 1).pairs(range(tokens.total)) == (16 * 3 + 14) * 16


def test_the_same_settings_give_the_same_object(kernel, Tokens):
    segments = kernel.window_segments(Tokens.grid(9, 1, 2), 1, 1)
    assert kernel.window_segments(Tokens.grid(9, 1, 2), 1, 1) is segments
    assert kernel.window_segments(Tokens.grid(9, 1, 2), 1, 0) != segments
