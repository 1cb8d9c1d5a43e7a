"""What one forward computes for one cond: sizes only, without a tensor."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from ..kernels.segments import Segments
from ..kernels.tokens import VideoTokens
from .role import Role

# Parts of a block: everything it computes for the video tokens, and those of its sub-modules that treat each alone.
VIDEO, PER_FRAME = "video", "per-frame work"


@dataclass(frozen=True)
class Work:
    """Stock computation to begin with; each technique returns a copy in which less is computed.

    text_tokens: as the blocks see them, of the video and of the audio text alike. segments: who sees whom in the
    attention of a role in a block, where that is not everyone everyone. pairs: how many query-key pairs that is, where
    it follows no geometry. left_out: (block, part) that is not computed, a part being VIDEO or PER_FRAME.
    """

    tokens: VideoTokens
    blocks: int
    text_tokens: int
    audio_tokens: int = 0
    segments: Mapping[tuple[Role, int], Segments] = field(default_factory=dict)
    pairs: Mapping[tuple[Role, int], int] = field(default_factory=dict)
    left_out: frozenset[tuple[int, str]] = frozenset()

    def with_pairs(self, role: Role, block: int, pairs: int) -> Work:
        return replace(self, pairs={**self.pairs, (role, block): pairs})

    def segments_of(self, role: Role, block: int, queries: int, keys: int) -> Segments:
        return self.segments.get((role, block)) or Segments.dense(queries, keys)

    def pairs_of(self, role: Role, block: int, queries: int, keys: int) -> int:
        """Query-key pairs of one attention call."""
        known = self.pairs.get((role, block))
        return self.segments_of(role, block, queries, keys).pairs(range(queries)) if known is None else known

    def with_segments(self, role: Role, block: int, segments: Segments) -> Work:
        return replace(self, segments={**self.segments, (role, block): segments})

    def without(self, block: int, part: str) -> Work:
        return replace(self, left_out=self.left_out | {(block, part)})
