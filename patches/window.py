"""Temporal window: video self-attention over near latent frames only."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from .kernels.segments import attend_batched
from .kernels.window import window_segments
from .layouts.layout import Role
from .technique import Attend, AttentionCall, AttentionTechnique

DENSE_BLOCK = "DENSE_BLOCK"
GUIDE_QUERIES = "GUIDE_QUERIES"
WINDOW_COVERS_CLIP = "WINDOW_COVERS_CLIP"


@dataclass(frozen=True)
class TemporalWindow(AttentionTechnique):
    """Frame t of T sees the 2·window + 1 frames nearest to it and the first `sink_frames`.

    Raises ValueError, naming the setting, for values outside their range.
    """

    name: ClassVar[str] = "temporal window"
    stage: ClassVar[int] = 20
    role: ClassVar[Role] = Role.VIDEO_SELF

    window: int = 4
    sink_frames: int = 1
    dense_blocks: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        for setting, low, high in (("window", 1, 32), ("sink_frames", 0, 8), ("dense_blocks", 0, 16)):
            value = getattr(self, setting)
            if type(value) is not int or not low <= value <= high:
                raise ValueError(f"{setting} is {value!r}; it takes whole numbers from {low} to {high}.")

    def describe(self) -> str:
        dense = f", {self.dense_blocks} dense blocks at each end" if self.dense_blocks else ""
        return f"±{self.window} latent frames, {self.sink_frames} sink{dense}"

    def reason_to_decline(self, call: AttentionCall) -> str | None:
        tokens, site = call.tokens, call.site
        if not self.dense_blocks <= site.block < site.blocks - self.dense_blocks:
            return DENSE_BLOCK
        if 2 * self.window + 1 >= tokens.frames - tokens.anchors:
            return WINDOW_COVERS_CLIP
        if call.rows.start >= tokens.offsets[-1]:
            return GUIDE_QUERIES
        return None

    def attend(self, call: AttentionCall, inner: Attend) -> torch.Tensor:
        segments = window_segments(call.tokens, self.window, self.sink_frames)
        return attend_batched(call.q, call.k, call.v, call.mask, call.rows, segments, inner)

    def cost(self, call: AttentionCall) -> float:
        segments = window_segments(call.tokens, self.window, self.sink_frames)
        return segments.pairs(call.rows) / (len(call.rows) * call.tokens.total)
