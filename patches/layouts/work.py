"""What one forward computes for one cond: sizes only, without a tensor."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from ..kernels.segments import Segments
from ..kernels.tokens import VideoTokens
from .layout import Role

# The part of a block that stands for everything it computes for the video tokens.
VIDEO = "video"


@dataclass(frozen=True)
class Work:
    """Stock computation to begin with; each technique returns a copy in which less is computed.

    text_tokens: as the blocks see them, of the video and of the audio text alike. segments: who sees whom in the
    attention of a role in a block, where that is not everyone everyone. left_out: (block, part) that is not
    computed, a part being VIDEO or a sub-module by the name that the layout gives it.
    """

    tokens: VideoTokens
    blocks: int
    text_tokens: int
    audio_tokens: int = 0
    segments: Mapping[tuple[Role, int], Segments] = field(default_factory=dict)
    left_out: frozenset[tuple[int, str]] = frozenset()

    def with_segments(self, role: Role, block: int, segments: Segments) -> Work:
        return replace(self, segments={**self.segments, (role, block): segments})

    def without(self, block: int, part: str) -> Work:
        return replace(self, left_out=self.left_out | {(block, part)})
