"""Low-rank attention: far frames are seen through fewer keys."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from .. import backend
from ..call import AttentionCall, Call
from ..clock import Schedule
from ..kernels.coarse import coarsened
from ..kernels.segments import Segments
from ..kernels.tokens import VideoTokens
from ..layouts.layout import Unclear
from ..layouts.role import Role
from ..layouts.work import Work
from ..reuse.cache import ATTENTION_EXCHANGED
from ..settings import Choice, Number, Whole, setting
from ..technique import (
    DENSE_BLOCK,
    FOREIGN_OVERRIDE,
    GUIDE_QUERIES,
    MASKED,
    State,
    Technique,
)

POOLED, ROUTED = "pooled", "routed"

DROPPED_TOKENS = "DROPPED_TOKENS"
NOTHING_FAR = "NOTHING_FAR"


@dataclass(frozen=True)
class LowRankAttention(Technique):
    """Near frames are seen exactly, far ones (POOLED) through keys and values that stand for groups of `pool` frames ×
    `spatial_pool`² tokens.

    near_frames: on each side. sink_frames: so many first frames are near to all. dense_blocks: so many first and last blocks
    see everything exactly.
    """

    name: ClassVar[str] = "low-rank attention"
    stage: ClassVar[int] = 30

    far: str = setting(Choice(POOLED, (POOLED, ROUTED)))
    near_frames: int = setting(Whole(1, 0, 32))
    pool: int = setting(Whole(2, 1, 8))
    spatial_pool: int = setting(Whole(1, 1, 4))
    sink_frames: int = setting(Whole(1, 0, 8))
    keep: float = setting(Number(0.0, 0.0, 1.0, 0.01))
    threshold: float = setting(Number(1.0, 0.0, 8.0, 0.05))
    extra_tokens: int = setting(Whole(256, 0, 4096))
    dense_blocks: int = setting(Whole(1, 0, 16))
    schedule: Schedule = field(default=Schedule(0.25, 1.0), kw_only=True)

    @property
    def roles(self) -> frozenset[Role]:
        return frozenset({Role.VIDEO_SELF})

    @property
    def _pools_nothing(self) -> bool:
        return self.far == POOLED and self.pool == self.spatial_pool == 1

    @property
    def is_neutral(self) -> bool:
        return self._pools_nothing or super().is_neutral

    @property
    def neutral_because(self) -> str:
        return "pool and spatial_pool are both 1" if self._pools_nothing else super().neutral_because

    def describe(self) -> str:
        dense = f", {self.dense_blocks} dense blocks at each end" if self.dense_blocks else ""
        by = f"{self.pool}× in time" + (
            f" and {self.spatial_pool}²× in space" if self.spatial_pool > 1 else ""
        )
        return f"±{self.near_frames} latent frames and {self.sink_frames} sink exact, far ones pooled {by}{dense}"

    def blocks(self, count: int) -> range:
        """Those of so many blocks that see less."""
        return range(self.dense_blocks, count - self.dense_blocks)

    def seen(self, segments: Segments, tokens: VideoTokens) -> Segments:
        """`segments` with far frames as pooled; itself if there are none."""
        return coarsened(segments, tokens, self.near_frames, self.sink_frames, self.pool, self.spatial_pool)

    def cost(self, work: Work) -> Work:
        tokens = work.tokens
        if tokens.size is None:
            return work
        for block in self.blocks(work.blocks):
            before = work.segments.get((Role.VIDEO_SELF, block), Segments.dense(tokens.total, tokens.total))
            work = work.with_segments(Role.VIDEO_SELF, block, self.seen(before, tokens))
        return work

    def begin(self, run: Any) -> State:
        return Pooling(self, run)


class Pooling(State):
    technique: LowRankAttention

    def call(self, call: Call) -> Mapping[str, Any] | str:
        reply, tokens = super().call(call), call.tokens
        if isinstance(reply, str) or isinstance(tokens, Unclear):
            return reply
        if tokens.size is None:
            return DROPPED_TOKENS
        dense = Segments.dense(tokens.total, tokens.total)
        if self.technique.seen(dense, tokens) is dense:
            return NOTHING_FAR
        call[self] = backend.in_force()
        return FOREIGN_OVERRIDE if call.is_foreign else reply

    def see(self, segments: Segments, attention: AttentionCall) -> Segments | str:
        own, tokens, site = self.technique, attention.tokens, attention.site
        if site.block not in own.blocks(site.blocks):
            return DENSE_BLOCK
        if attention.rows.start >= tokens.offsets[-1]:
            return GUIDE_QUERIES
        if attention.is_foreign:
            return FOREIGN_OVERRIDE
        if backend.in_force() != attention.call[self]:
            return ATTENTION_EXCHANGED
        if attention.mask is not None:
            return MASKED
        seen = own.seen(segments, tokens)
        return NOTHING_FAR if seen is segments else seen
