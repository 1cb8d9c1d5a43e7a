"""Temporal window: video self-attention over near latent frames only."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from ..call import AttentionCall, Call, Sampling
from ..clock import Schedule
from ..kernels.segments import Segments
from ..kernels.tokens import VideoTokens
from ..kernels.window import window_segments
from ..layouts.layout import Unclear
from ..layouts.role import Role
from ..layouts.work import Work
from ..settings import Whole, setting
from ..technique import DENSE_BLOCK, GUIDE_QUERIES, State, Technique

WINDOW_COVERS_CLIP = "WINDOW_COVERS_CLIP"


@dataclass(frozen=True)
class TemporalWindow(Technique):
    """Frame t of T sees the 2·window + 1 frames nearest to it and the first `sink_frames`.

    dense_blocks: so many first and last blocks see everything.
    """

    name: ClassVar[str] = "temporal window"
    stage: ClassVar[int] = 20

    window: int = setting(Whole(4, 1, 32))
    sink_frames: int = setting(Whole(1, 0, 8))
    dense_blocks: int = setting(Whole(0, 0, 16))
    schedule: Schedule = field(default=Schedule(0.5, 1.0), kw_only=True)

    @property
    def roles(self) -> frozenset[Role]:
        return frozenset({Role.VIDEO_SELF})

    def describe(self) -> str:
        dense = f", {self.dense_blocks} dense blocks at each end" if self.dense_blocks else ""
        return f"±{self.window} latent frames, {self.sink_frames} sink{dense}"

    def is_any_use(self, frames: int) -> bool:
        return max(2 * self.window + 1, self.sink_frames) < frames

    def covers(self, tokens: VideoTokens) -> bool:
        """Whether every frame sees the whole clip."""
        return not self.is_any_use(tokens.frames - tokens.anchors)

    def cost(self, work: Work) -> Work:
        if self.covers(work.tokens):
            return work
        segments = window_segments(work.tokens, self.window, self.sink_frames)
        for block in range(self.dense_blocks, work.blocks - self.dense_blocks):
            work = work.with_segments(Role.VIDEO_SELF, block, segments)
        return work

    def begin(self, run: Sampling) -> State:
        return Windowing(self, run)


class Windowing(State):
    technique: TemporalWindow

    def call(self, call: Call) -> Mapping[str, Any] | str:
        reply, tokens = super().call(call), call.tokens
        if isinstance(reply, str) or isinstance(tokens, Unclear):
            return reply
        return WINDOW_COVERS_CLIP if self.technique.covers(tokens) else reply

    def see(self, segments: Segments, attention: AttentionCall) -> Segments | str:
        own, tokens, site = self.technique, attention.tokens, attention.site
        if not own.dense_blocks <= site.block < site.blocks - own.dense_blocks:
            return DENSE_BLOCK
        if own.covers(tokens):
            return WINDOW_COVERS_CLIP
        if attention.rows.start >= tokens.offsets[-1]:
            return GUIDE_QUERIES
        return segments.narrowed(window_segments(tokens, own.window, own.sink_frames))
