"""Self-attention of a clip in which every latent frame sees only frames near it.

Names: B batch, N tokens, C = heads × head width. The key set of a query frame depends on nothing but the
frame, so consecutive frames with the same set form one `Segment`, answered by one ordinary attention call.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from itertools import groupby

import torch

from .tokens import VideoTokens

# Copied keys, and copied values, hold at most so many times the rows of the originals. With two, a block of
# LTX still needs more memory in its feed-forward (hidden layer and activation, four times its input each).
INTERLEAVED_ROWS = 2
# Views cost nothing where the backend reads them in place, as PyTorch's does; others copy what they are given.
VIEWED_ROWS = 8

Attend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None], torch.Tensor]


@dataclass(frozen=True)
class Segment:
    """Query tokens [start, stop) and the token ranges they see, ascending and disjoint."""

    start: int
    stop: int
    keys: tuple[tuple[int, int], ...]

    @property
    def key_count(self) -> int:
        return sum(b - a for a, b in self.keys)


@dataclass(frozen=True)
class Interior:
    """Consecutive one-frame segments that differ only in where their window starts.

    `frames` query frames of `per_frame` tokens, the first one at token `start`; each sees `2·window + 1`
    frames around itself and all of `shared`.
    """

    start: int
    frames: int
    per_frame: int
    window: int
    shared: tuple[tuple[int, int], ...]

    @property
    def stop(self) -> int:
        return self.start + self.frames * self.per_frame


def window_start(frame: int, frames: int, window: int) -> int:
    """First of the 2·window + 1 frames that `frame` sees; at the ends of the clip the window is shifted inwards."""
    return max(0, min(frame - window, frames - 2 * window - 1))


@lru_cache(maxsize=64)
def window_segments(tokens: VideoTokens, window: int, sink_frames: int) -> tuple[Segment, ...]:
    """Who sees what, for all tokens in order. Needs 2·window + 1 < clip length.

    Anchor frames and guide tokens see everything and are seen by everything.
    """
    offsets, anchors = tokens.offsets, tokens.anchors
    clip = tokens.frames - anchors
    everything = ((0, tokens.total),)
    segments = [Segment(0, offsets[anchors], everything)]
    for low, group in groupby(range(clip), key=lambda frame: window_start(frame, clip, window)):
        members = [anchors + frame for frame in group]
        seen = [
            (0, offsets[anchors]),
            (offsets[anchors], offsets[anchors + min(sink_frames, clip)]),
            (offsets[anchors + low], offsets[anchors + low + 2 * window + 1]),
            (offsets[-1], tokens.total),
        ]
        segments.append(Segment(offsets[members[0]], offsets[members[-1] + 1], _union(seen)))
    segments.append(Segment(offsets[-1], tokens.total, everything))
    return tuple(s for s in segments if s.stop > s.start)


@lru_cache(maxsize=64)
def visible_pairs(tokens: VideoTokens, window: int, sink_frames: int, rows: range) -> int:
    """Query-key pairs that are computed for the query tokens `rows`; dense attention has rows × N."""
    segments = window_segments(tokens, window, sink_frames)
    return sum(max(0, min(s.stop, rows.stop) - max(s.start, rows.start)) * s.key_count for s in segments)


def attend_segments(
    q_BNC: torch.Tensor,
    k_BNC: torch.Tensor,
    v_BNC: torch.Tensor,
    mask: torch.Tensor | None,
    rows: range,
    segments: tuple[Segment, ...],
    attend: Attend,
) -> torch.Tensor:
    """One call of `attend(q, k, v, mask)` per segment: right for every layout and mask.

    `rows` says which tokens the rows of `q_BNC` are; `mask` [..., 1 or rows, N] is cut like queries and keys.
    Returns [B, rows, C].
    """
    parts = []
    for segment in segments:
        start, stop = max(segment.start, rows.start), min(segment.stop, rows.stop)
        if start >= stop:
            continue
        cut = None
        if mask is not None:
            cut = take(mask, segment.keys, dim=-1)
            if cut.shape[-2] > 1:
                cut = cut[..., start - rows.start : stop - rows.start, :]
        q = q_BNC[:, start - rows.start : stop - rows.start]
        parts.append(attend(q, take(k_BNC, segment.keys), take(v_BNC, segment.keys), cut))
    return torch.cat(parts, dim=1)


def attend_window(
    q_BNC: torch.Tensor,
    k_BNC: torch.Tensor,
    v_BNC: torch.Tensor,
    mask: torch.Tensor | None,
    rows: range,
    tokens: VideoTokens,
    window: int,
    sink_frames: int,
    attend: Attend,
) -> torch.Tensor:
    """As `attend_segments`, with the interior of the clip in few large calls where that is possible.

    That needs all tokens as queries, no mask, and interior frames of equal size. The large calls are made for
    each batch item, so a batch of more items than interior frames goes segment by segment.
    """
    segments = window_segments(tokens, window, sink_frames)
    interior = find_interior(tokens, window, sink_frames)
    if mask is not None or len(rows) != tokens.total or interior is None or q_BNC.shape[0] > interior.frames:
        return attend_segments(q_BNC, k_BNC, v_BNC, mask, rows, segments, attend)
    out = torch.empty_like(q_BNC)
    for segment in segments:
        if segment.stop <= interior.start or segment.start >= interior.stop:
            q = q_BNC[:, segment.start : segment.stop]
            out[:, segment.start : segment.stop] = attend(
                q, take(k_BNC, segment.keys), take(v_BNC, segment.keys), None
            )
    for item in range(q_BNC.shape[0]):
        _attend_interior(q_BNC[item], k_BNC[item], v_BNC[item], out[item], interior, attend)
    return out


@lru_cache(maxsize=64)
def find_interior(tokens: VideoTokens, window: int, sink_frames: int) -> Interior | None:
    """The longest run of one-frame segments of equal size whose window and shared keys do not touch, if any."""
    frame_at = {start: frame for frame, start in enumerate(tokens.offsets[:-1])}
    runs: list[Interior] = []
    for segment in window_segments(tokens, window, sink_frames):
        frame = frame_at.get(segment.start)
        if frame is None or segment.stop != tokens.offsets[frame + 1] or frame - window < tokens.anchors:
            continue
        if frame + window >= tokens.frames:
            continue
        near = (tokens.offsets[frame - window], tokens.offsets[frame + window + 1])
        shared = tuple(r for r in segment.keys if r != near)
        size = segment.stop - segment.start
        if len(shared) == len(segment.keys) or near[1] - near[0] != (2 * window + 1) * size:
            continue
        last = runs[-1] if runs else None
        if last and (last.stop, last.per_frame, last.shared) == (segment.start, size, shared):
            runs[-1] = Interior(last.start, last.frames + 1, size, window, shared)
        else:
            runs.append(Interior(segment.start, 1, size, window, shared))
    return max(runs, key=lambda run: run.frames, default=None)


def _attend_interior(
    q_NC: torch.Tensor,
    k_NC: torch.Tensor,
    v_NC: torch.Tensor,
    out_NC: torch.Tensor,
    interior: Interior,
    attend: Attend,
) -> None:
    """Fill the interior rows of `out_NC` by batches of frames over overlapping views of the keys.

    Without shared keys the windows of consecutive frames are one strided view of K and V. With shared keys
    they are so too once the shared tokens are put in after every 2·window + 1 frames: any stretch of that
    period then holds each frame of one window once and the shared tokens once, and the order of keys does
    not matter. Both are done for so many frames at a time that copies stay under `INTERLEAVED_ROWS`
    and views under `VIEWED_ROWS`.
    """
    size, window = interior.per_frame, interior.window
    near = (2 * window + 1) * size
    shared = sum(b - a for a, b in interior.shared)
    period = near + shared
    first_key = interior.start - window * size
    if shared:
        periods = max(2, INTERLEAVED_ROWS * k_NC.shape[0] // period)
        most = (periods - 1) * (2 * window + 1) + 1
    else:
        most = VIEWED_ROWS * k_NC.shape[0] // near
    chunks = -(-interior.frames // most)
    chunk = -(-interior.frames // chunks)
    for begin in range(0, interior.frames, chunk):
        frames = min(chunk, interior.frames - begin)
        key_rows = slice(first_key + begin * size, first_key + (begin + frames + 2 * window) * size)
        k, v = k_NC[key_rows], v_NC[key_rows]
        if shared:
            k = interleave(k, take(k_NC[None], interior.shared)[0], near)
            v = interleave(v, take(v_NC[None], interior.shared)[0], near)
        query_rows = slice(interior.start + begin * size, interior.start + (begin + frames) * size)
        q_frames = q_NC[query_rows].view(frames, size, -1)
        out_frames = out_NC[query_rows].view(frames, size, -1)
        for start, stop, step in window_batches(frames, 2 * window + 1, bool(shared)):
            row = start // (2 * window + 1) * period + start % (2 * window + 1) * size
            stride = period if step > 1 else size
            which = slice(start, stop, step)
            count = len(range(start, stop, step))
            out_frames[which] = attend(
                q_frames[which],
                _views(k, row, period, stride, count),
                _views(v, row, period, stride, count),
                None,
            )


def window_batches(frames: int, period: int, interleaved: bool) -> list[tuple[int, int, int]]:
    """Frames (start, stop, step) that one strided view can serve, in as few batches as possible."""
    if not interleaved:
        return [(0, frames, 1)]
    if -(-frames // period) <= period:
        return [(start, min(start + period, frames), 1) for start in range(0, frames, period)]
    return [(start, frames, period) for start in range(period)]


def interleave(x_NC: torch.Tensor, shared_SC: torch.Tensor, near: int) -> torch.Tensor:
    """Put `shared_SC` behind every `near` rows of `x_NC`, also behind an incomplete last stretch."""
    pieces = []
    for piece in x_NC.split(near):
        pieces += [piece, shared_SC]
    return torch.cat(pieces)


def take(x: torch.Tensor, ranges: tuple[tuple[int, int], ...], dim: int = 1) -> torch.Tensor:
    """The given ranges of dimension `dim`: a view if there is one range, else a copy."""
    pieces = [x.narrow(dim, a, b - a) for a, b in ranges]
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=dim)


def _views(x_NC: torch.Tensor, row: int, length: int, stride: int, count: int) -> torch.Tensor:
    """[count, length, C]: `count` overlapping stretches of `length` rows, each `stride` rows after the one before."""
    return x_NC[row : row + (count - 1) * stride + length].unfold(0, length, stride).transpose(1, 2)


def _union(ranges: list[tuple[int, int]]) -> tuple[tuple[int, int], ...]:
    merged: list[tuple[int, int]] = []
    for a, b in sorted(r for r in ranges if r[1] > r[0]):
        if merged and a <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(b, merged[-1][1]))
        else:
            merged.append((a, b))
    return tuple(merged)


def attend_reference(
    q_BNC: torch.Tensor,
    k_BNC: torch.Tensor,
    v_BNC: torch.Tensor,
    heads: int,
    tokens: VideoTokens,
    window: int,
    sink_frames: int,
) -> torch.Tensor:
    """The definition, in float64, one frame of queries after the other and token by token. Returns [B, N, C]."""
    clip = tokens.frames - tokens.anchors
    q, k, v = (x.double().unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q_BNC, k_BNC, v_BNC))
    out = torch.empty_like(q)
    for token in range(tokens.total):
        if token >= tokens.offsets[-1] or token < tokens.offsets[tokens.anchors]:
            seen = list(range(tokens.total))
        else:
            frame = next(t for t in range(tokens.frames) if token < tokens.offsets[t + 1]) - tokens.anchors
            low = min(max(frame - window, 0), clip - 2 * window - 1)
            near = set(range(low, low + 2 * window + 1)) | set(range(min(sink_frames, clip)))
            frames = [tokens.anchors + t for t in sorted(near)] + list(range(tokens.anchors))
            seen = [n for t in frames for n in range(tokens.offsets[t], tokens.offsets[t + 1])]
            seen += range(tokens.offsets[-1], tokens.total)
        logits = q[:, :, token, None] @ k[:, :, seen].transpose(-1, -2) * q.shape[-1] ** -0.5
        out[:, :, token, None] = logits.softmax(dim=-1) @ v[:, :, seen]
    return out.transpose(1, 2).flatten(2)
