"""The executor of segments: what it computes for any geometry, and the attention calls it makes."""

from __future__ import annotations

import pytest
import torch
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from plain_attention import attend, tensors

PATHS = ("attend_segments", "attend_batched")


@pytest.fixture(scope="module")
def kernel(pack):
    return pack("patches.kernels.segments")


@pytest.fixture(scope="module")
def Tokens(pack):
    return pack("patches.kernels.tokens").VideoTokens


@pytest.fixture(scope="module")
def window_segments(pack):
    return pack("patches.kernels.window").window_segments


def built(kernel, total, *parts):
    return kernel.Segments(tuple(kernel.Segment(start, stop, keys) for start, stop, keys in parts), total)


def hidden(segments):
    """[queries, keys]: 0 where the query sees the key, else -inf."""
    out = torch.full((segments.parts[-1].stop, segments.total), -torch.inf, dtype=torch.float64)
    for part in segments.parts:
        for a, b in part.keys:
            out[part.start : part.stop, a:b] = 0
    return out


# Interior: which segments alike can share a call.


def interior_by_parameters(pack, tokens, window, sinks):
    """(start, frames, per frame, window, shared) as told by the settings of a window, not by its segments."""
    frame_at = {start: frame for frame, start in enumerate(tokens.offsets[:-1])}
    runs = []
    for part in pack("patches.kernels.window").window_segments(tokens, window, sinks).parts:
        frame = frame_at.get(part.start)
        if frame is None or part.stop != tokens.offsets[frame + 1] or frame - window < tokens.anchors:
            continue
        if frame + window >= tokens.frames:
            continue
        near = (tokens.offsets[frame - window], tokens.offsets[frame + window + 1])
        shared = tuple(r for r in part.keys if r != near)
        size = part.stop - part.start
        if len(shared) == len(part.keys) or near[1] - near[0] != (2 * window + 1) * size:
            continue
        if runs:
            start, frames, per_frame, _, last_shared = runs[-1]
            if (start + frames * per_frame, per_frame, last_shared) == (part.start, size, shared):
                runs[-1] = (start, frames + 1, size, window, shared)
                continue
        runs.append((part.start, 1, size, window, shared))
    return max(runs, key=lambda run: run[1], default=None)


@settings(max_examples=400, deadline=None)
@given(
    frames=st.integers(4, 24),
    height=st.integers(1, 2),
    width=st.integers(1, 3),
    guides=st.integers(0, 12),
    anchors=st.integers(0, 4),
    window=st.integers(1, 5),
    sinks=st.integers(0, 8),
)
# Anchors and sinks are one range with a frame in its very middle, and all frames about it see that range.
@example(frames=11, height=1, width=2, guides=0, anchors=1, window=1, sinks=8)
@example(frames=5, height=1, width=2, guides=0, anchors=0, window=1, sinks=0)
def test_a_window_is_found_in_its_segments(pack, frames, height, width, guides, anchors, window, sinks):
    assume(2 * window + 1 < frames - anchors)
    tokens = pack("patches.kernels.tokens").VideoTokens.grid(frames, height, width, guides, anchors)
    found = pack("patches.kernels.window").window_segments(tokens, window, sinks).interior
    if found is not None:
        found = (found.start, found.frames, found.per_frame, found.window, found.shared)
    assert found == interior_by_parameters(pack, tokens, window, sinks)


def test_both_rules_find_and_miss_interiors(pack, Tokens):
    assert interior_by_parameters(pack, Tokens.grid(9, 1, 2, 1, 1), 1, 1) == (8, 3, 2, 1, ((0, 4), (18, 19)))
    assert interior_by_parameters(pack, Tokens.grid(11, 1, 2, 0, 1), 1, 8) is None


def test_of_runs_of_one_length_it_is_the_first_and_a_longer_one_wins(kernel):
    parts = [
        (0, 1, ((0, 2),)),
        (1, 2, ((0, 3),)),
        (2, 3, ((5, 8),)),
        (3, 4, ((2, 5),)),
        (4, 5, ((0, 1), (3, 6))),
        (5, 8, ((0, 8),)),
    ]
    assert built(kernel, 8, *parts).interior == kernel.Interior(1, 1, 1, 1, ())
    parts[4] = (4, 5, ((3, 6),))
    assert built(kernel, 8, *parts).interior == kernel.Interior(3, 2, 1, 1, ())


@pytest.mark.parametrize(
    "near",
    [
        pytest.param((3, 5), id="the segment alone"),
        pytest.param((2, 6), id="half a segment on each side"),
        pytest.param((0, 7), id="a token more before it"),
        pytest.param((1, 8), id="a token more behind it"),
        pytest.param((5, 8), id="elsewhere"),
    ],
)
def test_a_range_that_is_no_window_around_its_segment(kernel, near):
    def parts(near):
        return (0, 3, ((0, 4),)), (3, 5, (near,)), (5, 8, ((4, 8),))

    assert built(kernel, 8, *parts((1, 7))).interior == kernel.Interior(3, 1, 2, 1, ())
    assert built(kernel, 8, *parts(near)).interior is None


# What is computed.


def test_every_frame_but_its_own(kernel):
    frames, size = 6, 3
    total = frames * size
    parts = []
    for start in range(0, total, size):
        keys = tuple(r for r in ((0, start), (start + size, total)) if r[1] > r[0])
        parts.append((start, start + size, keys))
    segments = built(kernel, total, *parts)
    frame_of = torch.arange(total) // size
    blocked = torch.zeros(total, total, dtype=torch.float64)
    blocked[frame_of[:, None] == frame_of] = -torch.inf
    q, k, v = tensors(total, batch=2)
    expected = attend(q, k, v, blocked)
    for path in PATHS:
        out = getattr(kernel, path)(q, k, v, None, range(total), segments, attend)
        torch.testing.assert_close(out, expected)
    assert segments.pairs(range(total)) == total * (total - size)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("mask_rows", ["none", "one", "all"])
@pytest.mark.parametrize("rows", [range(10), range(4), range(2, 9), range(5, 10)])
def test_cross_attention(kernel, rows, mask_rows, path):
    segments = built(kernel, 7, (0, 4, ((0, 2), (5, 7))), (4, 10, ((1, 6),)))
    sees = torch.zeros(10, 7, dtype=torch.float64)
    sees[:4, 2:5] = -torch.inf
    sees[4:, [0, 6]] = -torch.inf
    q, k, v = tensors(10, 7, batch=2)
    generator = torch.Generator().manual_seed(5)
    bias = torch.randn(1, 1, 10 if mask_rows == "all" else 1, 7, generator=generator, dtype=torch.float64)
    if mask_rows == "none":
        bias = torch.zeros_like(bias)
    mask = {"none": None, "one": bias, "all": bias[:, :, rows.start : rows.stop]}[mask_rows]
    expected = attend(q, k, v, bias + sees)[:, rows.start : rows.stop]
    out = getattr(kernel, path)(q[:, rows.start : rows.stop], k, v, mask, rows, segments, attend)
    torch.testing.assert_close(out, expected)


def test_moving_ranges_of_cross_attention_are_batched(kernel):
    """Queries 2 to 8 see three keys about their own number and the last key; there are more keys than queries."""
    ends = (0, 2, ((0, 12),)), (8, 9, ((0, 12),))
    parts = [ends[0], *((n, n + 1, ((n - 1, n + 2), (11, 12))) for n in range(2, 8)), ends[1]]
    segments = built(kernel, 12, *parts)
    assert segments.interior == kernel.Interior(2, 6, 1, 1, ((11, 12),))
    q, k, v = tensors(9, 12)
    calls = []

    def counting(q, k, v, mask):
        calls.append(q.shape)
        return attend(q, k, v, mask)

    out = kernel.attend_batched(q, k, v, None, range(9), segments, counting)
    torch.testing.assert_close(out, attend(q, k, v, hidden(segments)))
    assert len(calls) < len(parts)


# Dense: the call as it was.


def test_dense_segments(kernel):
    dense = kernel.Segments.dense(10, 7)
    assert dense is kernel.Segments.dense(10, 7) and dense != kernel.Segments.dense(7, 10)
    assert dense.is_dense and dense.interior is None
    assert dense.pairs(range(10)) == 70 and dense.pairs(range(3, 5)) == 14
    assert not built(kernel, 7, (0, 3, ((0, 7),)), (3, 10, ((0, 6),))).is_dense


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    "parts",
    [
        pytest.param([(0, 6, ((0, 6),))], id="one"),
        pytest.param([(0, 2, ((0, 3), (3, 6))), (2, 4, ((0, 6),)), (4, 6, ((0, 1), (1, 6)))], id="three"),
    ],
)
def test_where_all_see_all_the_call_stays_as_it_was(kernel, parts, path):
    segments = built(kernel, 6, *parts)
    q, k, v = tensors(6)
    mask, answer, calls = torch.zeros(1, 1, 6, 6), torch.zeros(1), []

    def recording(*call):
        calls.append(call)
        return answer

    run = getattr(kernel, path)
    for rows, given_mask in ((range(6), None), (range(6), mask), (range(1, 4), mask)):
        calls.clear()
        assert run(q, k, v, given_mask, rows, segments, recording) is answer
        assert [[id(x) for x in call] for call in calls] == [[id(x) for x in (q, k, v, given_mask)]]


# The calls, written down: (q, k), each as shape, stride and offset in its storage; v as k.

CALLS = {
    "no sinks": (
        ((8, 1, 2), 1, 0, 1),
        [
            (((1, 4, 4), (64, 4, 1), 0), ((1, 6, 4), (64, 4, 1), 0)),
            (((1, 4, 4), (64, 4, 1), 48), ((1, 6, 4), (64, 4, 1), 40)),
            (((4, 2, 4), (8, 4, 1), 16), ((4, 6, 4), (8, 4, 1), 8)),
        ],
    ),
    "guide, anchor, sink, batch of two": (
        ((9, 1, 2, 1, 1), 1, 1, 2),
        [
            (((2, 2, 4), (76, 4, 1), 0), ((2, 19, 4), (76, 4, 1), 0)),
            (((2, 4, 4), (76, 4, 1), 8), ((2, 9, 4), (36, 4, 1), 0)),
            (((2, 2, 4), (76, 4, 1), 24), ((2, 11, 4), (44, 4, 1), 0)),
            (((2, 4, 4), (76, 4, 1), 56), ((2, 11, 4), (44, 4, 1), 0)),
            (((2, 1, 4), (76, 4, 1), 72), ((2, 19, 4), (76, 4, 1), 0)),
            (((3, 2, 4), (8, 4, 1), 32), ((3, 11, 4), (8, 4, 1), 0)),
            (((3, 2, 4), (8, 4, 1), 108), ((3, 11, 4), (8, 4, 1), 0)),
        ],
    ),
    "more items than interior frames": (
        ((7, 1, 2, 1, 1), 1, 1, 2),
        [
            (((2, 2, 4), (60, 4, 1), 0), ((2, 15, 4), (60, 4, 1), 0)),
            (((2, 4, 4), (60, 4, 1), 8), ((2, 9, 4), (36, 4, 1), 0)),
            (((2, 2, 4), (60, 4, 1), 24), ((2, 11, 4), (44, 4, 1), 0)),
            (((2, 2, 4), (60, 4, 1), 32), ((2, 11, 4), (44, 4, 1), 0)),
            (((2, 4, 4), (60, 4, 1), 40), ((2, 11, 4), (44, 4, 1), 0)),
            (((2, 1, 4), (60, 4, 1), 56), ((2, 15, 4), (60, 4, 1), 0)),
        ],
    ),
    "views in two chunks": (
        ((60, 1, 1), 8, 0, 1),
        [
            (((1, 9, 4), (240, 4, 1), 0), ((1, 17, 4), (240, 4, 1), 0)),
            (((1, 9, 4), (240, 4, 1), 204), ((1, 17, 4), (240, 4, 1), 172)),
            (((21, 1, 4), (4, 4, 1), 36), ((21, 17, 4), (4, 4, 1), 4)),
            (((21, 1, 4), (4, 4, 1), 120), ((21, 17, 4), (4, 4, 1), 88)),
        ],
    ),
    "every third frame": (
        ((16, 1, 1), 1, 1, 1),
        [
            (((1, 2, 4), (64, 4, 1), 0), ((1, 3, 4), (64, 4, 1), 0)),
            (((1, 1, 4), (64, 4, 1), 8), ((1, 4, 4), (64, 4, 1), 0)),
            (((1, 2, 4), (64, 4, 1), 56), ((1, 4, 4), (16, 4, 1), 0)),
            (((4, 1, 4), (12, 4, 1), 12), ((4, 4, 4), (16, 4, 1), 0)),
            (((4, 1, 4), (12, 4, 1), 16), ((4, 4, 4), (16, 4, 1), 4)),
            (((3, 1, 4), (12, 4, 1), 20), ((3, 4, 4), (16, 4, 1), 8)),
        ],
    ),
}


def layout(x):
    return tuple(x.shape), x.stride(), x.storage_offset()


def recorded(kernel, segments, q, k, v, mask=None, rows=None):
    """(q, k) of each call, and each call's mask."""
    calls, masks = [], []

    def recording(q, k, v, mask):
        assert layout(k) == layout(v)
        calls.append((layout(q), layout(k)))
        masks.append(mask)
        return q

    rows = range(q.shape[1]) if rows is None else rows
    kernel.attend_batched(q[:, rows.start : rows.stop], k, v, mask, rows, segments, recording)
    return calls, masks


@pytest.mark.parametrize("name", CALLS)
def test_calls_as_written_down(kernel, Tokens, window_segments, name):
    (grid, window, sinks, batch), expected = CALLS[name]
    tokens = Tokens.grid(*grid)
    q, k, v = tensors(tokens.total, batch=batch, width=4)
    calls, masks = recorded(kernel, window_segments(tokens, window, sinks), q, k, v)
    assert calls == expected
    assert masks == [None] * len(calls)


def test_calls_of_a_slice_and_of_a_mask_as_written_down(kernel, Tokens, window_segments):
    segments = window_segments(Tokens.grid(8, 1, 2, guides=1), 1, 1)
    q, k, v = tensors(17, batch=2, width=4)
    assert recorded(kernel, segments, q, k, v, rows=range(3, 11))[0] == [
        (((2, 1, 4), (68, 4, 1), 12), ((2, 7, 4), (28, 4, 1), 0)),
        (((2, 2, 4), (68, 4, 1), 16), ((2, 9, 4), (36, 4, 1), 0)),
        (((2, 2, 4), (68, 4, 1), 24), ((2, 9, 4), (36, 4, 1), 0)),
        (((2, 2, 4), (68, 4, 1), 32), ((2, 9, 4), (36, 4, 1), 0)),
        (((2, 1, 4), (68, 4, 1), 40), ((2, 9, 4), (36, 4, 1), 0)),
    ]
    calls, masks = recorded(kernel, segments, q, k, v, mask=torch.zeros(1, 1, 17, 17))
    assert calls == [
        (((2, 4, 4), (68, 4, 1), 0), ((2, 7, 4), (28, 4, 1), 0)),
        (((2, 2, 4), (68, 4, 1), 16), ((2, 9, 4), (36, 4, 1), 0)),
        (((2, 2, 4), (68, 4, 1), 24), ((2, 9, 4), (36, 4, 1), 0)),
        (((2, 2, 4), (68, 4, 1), 32), ((2, 9, 4), (36, 4, 1), 0)),
        (((2, 2, 4), (68, 4, 1), 40), ((2, 9, 4), (36, 4, 1), 0)),
        (((2, 4, 4), (68, 4, 1), 48), ((2, 9, 4), (36, 4, 1), 0)),
        (((2, 1, 4), (68, 4, 1), 64), ((2, 17, 4), (68, 4, 1), 0)),
    ]
    assert [layout(mask) for mask in masks] == [
        ((1, 1, 4, 7), (119, 119, 7, 1), 0),
        ((1, 1, 2, 9), (153, 153, 9, 1), 36),
        ((1, 1, 2, 9), (153, 153, 9, 1), 54),
        ((1, 1, 2, 9), (153, 153, 9, 1), 72),
        ((1, 1, 2, 9), (153, 153, 9, 1), 90),
        ((1, 1, 4, 9), (153, 153, 9, 1), 108),
        ((1, 1, 1, 17), (289, 289, 17, 1), 272),
    ]


@pytest.mark.parametrize(
    ("window", "sinks", "guides"), [(1, 1, 0), (1, 8, 4), (4, 2, 0), (8, 0, 0), (8, 3, 2)]
)
def test_memory_of_copies_and_views_is_bounded(kernel, Tokens, window_segments, window, sinks, guides):
    tokens = Tokens.grid(90, 1, 2, guides=guides)
    q, k, v = tensors(tokens.total)
    row = k.shape[-1] * k.element_size()
    period = (2 * window + 1 + sinks) * 2 + guides
    viewed, stored = [], []

    def watching(q, k, v, mask):
        viewed.append(k.shape[0] * k.shape[1])
        stored.append(k.untyped_storage().nbytes() // row)
        return attend(q, k, v, mask)

    segments = window_segments(tokens, window, sinks)
    kernel.attend_batched(q, k, v, None, range(tokens.total), segments, watching)
    assert max(viewed) <= 8 * tokens.total
    assert max(stored) <= max(2 * tokens.total, 2 * period) + period


def test_attention_calls_stay_few(kernel, Tokens, window_segments):
    calls = []

    def counting(q, k, v, mask):
        calls.append(q.shape[0])
        return attend(q, k, v, mask)

    tokens = Tokens.grid(61, 1, 2)
    q, k, v = tensors(tokens.total)
    kernel.attend_batched(q, k, v, None, range(tokens.total), window_segments(tokens, 2, 0), counting)
    assert len(calls) == 3
    calls.clear()
    kernel.attend_batched(q, k, v, None, range(tokens.total), window_segments(tokens, 2, 1), counting)
    assert len(calls) <= 3 + 2 * 5
