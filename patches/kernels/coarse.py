"""Self-attention in which far frames are seen through pooled keys and values.

Names: B batch, N tokens, C = heads × head width. The pooled key and value of a group of n tokens are the means of theirs;
it stands for n keys, so ln n is added to its logit. Where the keys of each group are equal, that is dense attention.
Near and far parts of one softmax are merged by their log-sum-exp (LSE), as in `lse`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import replace
from functools import lru_cache
from itertools import groupby
from typing import NamedTuple

import torch
from einops import rearrange

from .lse import attend_with_lse, merge_into, split_heads
from .pooling import Coarse, Grid, Piece, pieces
from .segments import Attend, Segment, Segments
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


def pieces_of(part: Segment) -> list[Piece]:
    """All that a segment sees, the longest range of plain keys first."""
    plain = sorted((Piece(*keys) for keys in part.keys), key=lambda piece: piece.start - piece.stop)
    return [*plain, *pieces(part.coarse)]


class Pooled:
    """Keys and values of one attention call, and what each grid has pooled of them, once."""

    def __init__(self, k_BNC: torch.Tensor, v_BNC: torch.Tensor, seen: Iterable[Piece]) -> None:
        self._plain = k_BNC, v_BNC
        self._of: dict[Grid, list[list[torch.Tensor]]] = {}
        for piece in seen:
            grid = piece.grid
            if grid is None:
                continue
            if grid not in self._of:
                self._of[grid] = [grid.pooled(k_BNC), grid.pooled(v_BNC)]
            if piece.stop > grid.sizes[piece.size].count == self._of[grid][0][piece.size].shape[1]:
                for of in self._of[grid]:
                    of[piece.size] = torch.cat([of[piece.size]] * 2, dim=1)

    def views(self, piece: Piece) -> tuple[torch.Tensor, torch.Tensor]:
        """Its keys and values [B, n, C]."""
        k, v = self._plain if piece.grid is None else (of[piece.size] for of in self._of[piece.grid])
        return k[:, piece.start : piece.stop], v[:, piece.start : piece.stop]


def attend_masked(
    q_BNC: torch.Tensor,
    k_BNC: torch.Tensor,
    v_BNC: torch.Tensor,
    rows: range,
    segments: Segments,
    attend: Attend,
) -> torch.Tensor:
    """Coarse attention by one masked call a segment: right with every backend that takes masks. Returns [B, rows, C]."""
    parts = [(part, pieces_of(part)) for part in _parts_within(segments, rows)]
    pooled = Pooled(k_BNC, v_BNC, (piece for _, seen in parts for piece in seen))
    out = []
    for part, seen in parts:
        keys, values = (torch.cat(x, dim=1) for x in zip(*map(pooled.views, seen), strict=True))
        q = q_BNC[:, part.start - rows.start : part.stop - rows.start]
        mask = None
        if part.coarse:
            bias = [q.new_full((piece.stop - piece.start,), math.log(piece.keys)) for piece in seen]
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
    """The same without a mask: views of near and of pooled keys one after the other, merged by their LSE.

    What neighbouring segments share is attended by all their queries in one call. Returns [B, rows, C].
    """
    layers = _layers(segments, rows)
    pooled = Pooled(k_BNC, v_BNC, (call.piece for layer in layers for call in layer))
    q = split_heads(q_BNC, heads)

    def attend(call: _Call) -> tuple[torch.Tensor, torch.Tensor]:
        k, v = (split_heads(x, heads) for x in pooled.views(call.piece))
        out, lse = attend_with_lse(q[:, :, call.start : call.stop], k, v, scale)
        return out, lse + math.log(call.piece.keys)

    def attend_layer(layer: list[_Call]) -> tuple[torch.Tensor, torch.Tensor]:
        if len(layer) == 1:
            return attend(layer[0])
        start, stop = layer[0].start, layer[-1].stop
        is_whole = sum(call.stop - call.start for call in layer) == stop - start
        # Queries in between that have no call weigh nothing when it is merged.
        out_BNC = (torch.empty_like if is_whole else torch.zeros_like)(q_BNC[:, start:stop])
        out = split_heads(out_BNC, heads)
        lse = q.new_full(out.shape[:3], -torch.inf, dtype=torch.promote_types(q.dtype, torch.float32))
        for call in layer:
            at = slice(call.start - start, call.stop - start)
            out[:, :, at], lse[:, :, at] = attend(call)
        return out, lse

    out, lse = attend_layer(layers[0])
    for layer in layers[1:]:
        at = slice(layer[0].start, layer[-1].stop)
        merge_into(out[:, :, at], lse[:, :, at], *attend_layer(layer))
    return rearrange(out, "b h n d -> b n (h d)")


class _Call(NamedTuple):
    """Rows of queries and what they see in one attention call."""

    start: int
    stop: int
    piece: Piece


@lru_cache(maxsize=64)
def _layers(segments: Segments, rows: range) -> list[list[_Call]]:
    """Every call, in layers in which no query stands twice; all of them stand in the first."""
    parts = [(part, pieces_of(part)) for part in _parts_within(segments, rows)]

    def calls(piece: Piece, places: Iterable[bool]) -> Iterator[_Call]:
        for sees, run in groupby(zip(parts, places, strict=True), key=lambda each: each[1]):
            stretch = [part for (part, _), _ in run]
            if sees:
                yield _Call(stretch[0].start - rows.start, stretch[-1].stop - rows.start, piece)

    firsts = dict.fromkeys(seen[0] for _, seen in parts)
    others = dict.fromkeys(piece for _, seen in parts for piece in seen[1:])
    layers = [[call for piece in firsts for call in calls(piece, (seen[0] == piece for _, seen in parts))]]
    for piece in others:
        for call in calls(piece, (piece in seen[1:] for _, seen in parts)):
            fitting = (
                layer
                for layer in layers[1:]
                if all(call.stop <= other.start or other.stop <= call.start for other in layer)
            )
            layer = next(fitting, None)
            if layer is None:
                layers.append([call])
            else:
                layer.append(call)
    return [sorted(layer) for layer in layers]


def _parts_within(segments: Segments, rows: range) -> list[Segment]:
    cut = (
        replace(part, start=max(part.start, rows.start), stop=min(part.stop, rows.stop))
        for part in segments.parts
    )
    return [part for part in cut if part.start < part.stop]
