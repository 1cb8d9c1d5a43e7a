"""Self-attention in which far frames are seen through pooled keys and values.

Names: B batch, N tokens, C = heads × head width. The pooled key and value of a group of n tokens are the means of theirs;
it stands for n keys, so ln n is added to its logit. Where the keys of each group are equal, that is dense attention.
Near and far parts of one softmax are merged by their log-sum-exp (LSE), as in `split_softmax`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from functools import lru_cache
from itertools import groupby

import torch

from .pooling import Coarse, Grid, Piece
from .segments import Attend, Segment, Segments
from .split_softmax import attend_with_lse, merge_into, split_heads
from .tokens import Ranges, VideoTokens, merged


@lru_cache(maxsize=64)
def coarsened(
    segments: Segments, tokens: VideoTokens, near: int, sink_frames: int, pool: int, spatial: int, /
) -> Segments:
    """`segments` with groups of frames that are far from the query's frame seen as pooled.

    Frame t of the clip sees frames t − near to t + near and the first `sink_frames` as before. All others form groups of
    `pool` frames on a fixed grid that begins behind the sinks; a group with a frame that is near, or that is not seen
    as a whole, is seen as before. Anchor frames and guide tokens see, and are seen, as before. Where nothing becomes
    coarse, `segments` itself comes back. Needs `tokens.size`.
    """
    assert tokens.size is not None
    offsets, first = tokens.offsets, tokens.anchors + sink_frames
    if first >= tokens.frames:
        return segments
    grid = Grid(offsets[first], tokens.frames - first, *tokens.size, pool, spatial)
    parts = []
    for part in segments.parts:
        for start, stop, far in _far_groups(part, tokens, near, first, grid):
            seen = _without(part.keys, [grid.tokens_of(*groups) for groups in far])
            coarse = tuple(Coarse(grid, *groups) for groups in far)
            parts.append(replace(part, start=start, stop=stop, keys=seen, coarse=part.coarse + coarse))
    return Segments(tuple(parts), segments.total) if any(part.coarse for part in parts) else segments


def _far_groups(
    part: Segment, tokens: VideoTokens, near: int, first: int, grid: Grid
) -> Iterator[tuple[int, int, Ranges]]:
    """Query tokens (start, stop) of a part, and the groups that are far from all of them, in ranges."""
    seen = []
    for group in range(grid.groups):
        start, stop = grid.tokens_of(group, group + 1)
        is_seen = any(a <= start and stop <= b for a, b in part.keys)
        if is_seen and grid.keys_a_group < stop - start:
            seen.append(group)
    offsets = tokens.offsets
    cuts: list[tuple[int, int, int | None]] = [
        (offsets[t], offsets[t + 1], t - first) for t in range(tokens.anchors, tokens.frames)
    ]
    # Anchors in front of the clip and guides behind it see everything as before.
    cuts = [(0, offsets[tokens.anchors], None), *cuts, (offsets[-1], tokens.total, None)]

    def far_from(frame: int | None) -> Ranges:
        if frame is None:
            return ()
        return merged(
            (group, group + 1)
            for group in seen
            if frame + near < grid.frames_of(group)[0] or grid.frames_of(group)[-1] < frame - near
        )

    queries = [(max(start, part.start), min(stop, part.stop), frame) for start, stop, frame in cuts]
    queries = [query for query in queries if query[0] < query[1]]
    for far, run in groupby(queries, key=lambda query: far_from(query[2])):
        stretch = list(run)
        yield stretch[0][0], stretch[-1][1], far


def _without(ranges: Ranges, others: list[tuple[int, int]]) -> Ranges:
    """Tokens of ascending `ranges` that are in none of the ascending `others`."""
    out = []
    for start, stop in ranges:
        for a, b in others:
            if start < b and a < stop:
                out.append((start, a))
                start = b
        out.append((start, stop))
    return merged(out)


class Pooled:
    """The pooled keys and values of one attention call, each grid pooled once."""

    def __init__(self, k_BNC: torch.Tensor, v_BNC: torch.Tensor, segments: Segments) -> None:
        self._plain = k_BNC, v_BNC
        grids = {coarse.grid for part in segments.parts for coarse in part.coarse}
        self._of = {grid: (grid.pooled(k_BNC), grid.pooled(v_BNC)) for grid in grids}

    def views(self, piece: Piece) -> tuple[torch.Tensor, torch.Tensor]:
        """Its keys and values [B, n, C]."""
        if piece.grid is None:
            k, v = self._plain
        else:
            k, v = (of[piece.cells] for of in self._of[piece.grid])
        return k[:, piece.start : piece.stop], v[:, piece.start : piece.stop]


def pieces_of(part: Segment) -> list[Piece]:
    """All that a segment sees, the longest range of plain keys first."""
    plain = sorted((Piece(*keys) for keys in part.keys), key=lambda piece: piece.start - piece.stop)
    return plain + [piece for coarse in part.coarse for piece in coarse.pieces()]


def attend_masked(
    q_BNC: torch.Tensor,
    k_BNC: torch.Tensor,
    v_BNC: torch.Tensor,
    rows: range,
    segments: Segments,
    attend: Attend,
) -> torch.Tensor:
    """Coarse attention by one masked call a segment: right with every backend that takes masks. Returns [B, rows, C]."""
    pooled, out = Pooled(k_BNC, v_BNC, segments), []
    for part in _parts_within(segments, rows):
        pieces = pieces_of(part)
        views = [pooled.views(piece) for piece in pieces]
        keys, values = (torch.cat(parts, dim=1) for parts in zip(*views, strict=True))
        q = q_BNC[:, part.start - rows.start : part.stop - rows.start]
        mask = None
        if part.coarse:
            bias = [q.new_full((piece.stop - piece.start,), math.log(piece.keys)) for piece in pieces]
            mask = torch.cat(bias).expand(1, 1, q.shape[1], -1)
        out.append(attend(q, keys, values, mask))
    return torch.cat(out, dim=1)


def attend_merged(
    q_BNC: torch.Tensor,
    k_BNC: torch.Tensor,
    v_BNC: torch.Tensor,
    heads: int,
    scale: float | None,
    rows: range,
    segments: Segments,
) -> torch.Tensor:
    """The same without a mask and without a copy: near and pooled keys one after the other, merged by their LSE.

    What neighbouring segments share is attended by all their queries in one call. Returns [B, rows, C].
    """
    pooled, out_BNC = Pooled(k_BNC, v_BNC, segments), torch.empty_like(q_BNC)
    q, out = (split_heads(x, heads) for x in (q_BNC, out_BNC))
    lse = q.new_empty(q.shape[:3], dtype=torch.promote_types(q.dtype, torch.float32))
    for start, stop, piece, is_first in _calls(segments, rows):
        at = slice(start - rows.start, stop - rows.start)
        k, v = (split_heads(x, heads) for x in pooled.views(piece))
        more, more_lse = attend_with_lse(q[:, :, at], k, v, scale)
        more_lse = more_lse + math.log(piece.keys)
        if is_first:
            out[:, :, at], lse[:, :, at] = more, more_lse
        else:
            merge_into(out[:, :, at], lse[:, :, at], more, more_lse)
    return out_BNC


@lru_cache(maxsize=64)
def _calls(segments: Segments, rows: range) -> list[tuple[int, int, Piece, bool]]:
    """Query tokens (start, stop), what they see in one call, and whether it is the first for them."""
    parts = [(part, pieces_of(part)) for part in _parts_within(segments, rows)]
    calls = []
    for piece, run in groupby(parts, key=lambda each: each[1][0]):
        stretch = list(run)
        calls.append((stretch[0][0].start, stretch[-1][0].stop, piece, True))
    for piece in dict.fromkeys(piece for _, pieces in parts for piece in pieces[1:]):
        for sees, run in groupby(parts, key=lambda each: piece in each[1][1:]):
            stretch = list(run)
            if sees:
                calls.append((stretch[0][0].start, stretch[-1][0].stop, piece, False))
    return calls


def _parts_within(segments: Segments, rows: range) -> list[Segment]:
    cut = (
        replace(part, start=max(part.start, rows.start), stop=min(part.stop, rows.stop))
        for part in segments.parts
    )
    return [part for part in cut if part.start < part.stop]
