"""Self-attention whose softmax is split into keys of the query's own frame and all others, and merged exactly."""

from __future__ import annotations

from functools import lru_cache

import torch
from einops import rearrange

from .lse import attend_with_lse, merge, split_heads
from .segments import Segment, Segments
from .tokens import VideoTokens, merged


def own_frame(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, heads: int, tokens: VideoTokens, scale: float | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Every frame's tokens over their own frame: output [B,H,M,D] and LSE [B,H,M] of the M tokens in frames."""
    q, k, v = (split_heads(x, heads) for x in (q, k, v))
    parts = [attend_with_lse(q[:, :, f], k[:, :, f], v[:, :, f], scale) for f in frames(tokens)]
    return torch.cat([out for out, _ in parts], dim=2), torch.cat([lse for _, lse in parts], dim=2)


def attend_anew(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    heads: int,
    tokens: VideoTokens,
    own: tuple[torch.Tensor, torch.Tensor],
    scale: float | None,
) -> torch.Tensor:
    """Attention [B,N,C] with the own-frame part given; guide tokens behind the frames see everything afresh."""
    q, k, v = (split_heads(x, heads) for x in (q, k, v))
    out_own, lse_own = own
    rows = []
    for f in frames(tokens):
        other_k, other_v = (torch.cat([x[:, :, : f.start], x[:, :, f.stop :]], dim=2) for x in (k, v))
        fresh = attend_with_lse(q[:, :, f], other_k, other_v, scale)
        rows.append(merge(out_own[:, :, f], lse_own[:, :, f], *fresh))
    if tokens.guides:
        rows.append(attend_with_lse(q[:, :, tokens.offsets[-1] :], k, v, scale)[0])
    return rearrange(torch.cat(rows, dim=2), "b h n d -> b n (h d)")


@lru_cache(maxsize=64)
def all_but_own_frame(tokens: VideoTokens) -> Segments:
    """Who still sees whom where the own-frame part is given."""
    parts = [Segment(f.start, f.stop, merged([(0, f.start), (f.stop, tokens.total)])) for f in frames(tokens)]
    if tokens.guides:
        parts.append(Segment(tokens.offsets[-1], tokens.total, ((0, tokens.total),)))
    return Segments(tuple(parts), tokens.total)


def frames(tokens: VideoTokens) -> list[slice]:
    bounds = zip(tokens.offsets, tokens.offsets[1:], strict=False)
    return [slice(start, stop) for start, stop in bounds if stop > start]
