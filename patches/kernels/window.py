"""Self-attention of a clip in which every latent frame sees only frames near it.

Names: B batch, N tokens, C = heads × head width. The key set of a query frame depends on nothing but the
frame, so consecutive frames with the same set form one `Segment`.
"""

from __future__ import annotations

from functools import lru_cache
from itertools import groupby

import torch

from .segments import Segment, Segments
from .tokens import VideoTokens


def window_start(frame: int, frames: int, window: int) -> int:
    """First of the 2·window + 1 frames that `frame` sees; at the ends of the clip the window is shifted inwards."""
    return max(0, min(frame - window, frames - 2 * window - 1))


@lru_cache(maxsize=64)
def window_segments(tokens: VideoTokens, window: int, sink_frames: int, /) -> Segments:
    """Who sees what, for all tokens in order; the same settings give the same object.

    Needs 2·window + 1 < clip length. Anchor frames and guide tokens see everything and are seen by everything.
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
    return Segments(tuple(s for s in segments if s.stop > s.start), tokens.total)


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
