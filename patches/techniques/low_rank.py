"""Low-rank attention: far frames are seen through fewer keys."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch

from .. import backend
from ..call import Attend, AttentionCall, Call, Sampling
from ..clock import Schedule
from ..kernels.coarse import coarsened
from ..kernels.lse import has_lse
from ..kernels.routed import (
    DTYPE,
    HEAD_WIDTH,
    NO_KERNEL,
    WIDTH,
    Packing,
    attend_routed,
    exact_blocks,
    pack_tokens,
    pairs,
    why_not,
)
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
    NO_LSE,
    State,
    Technique,
)

POOLED, ROUTED = "pooled", "routed"

DROPPED_TOKENS = "DROPPED_TOKENS"
NOTHING_FAR = "NOTHING_FAR"
OTHER_TECHNIQUE = "OTHER_TECHNIQUE"


@dataclass(frozen=True)
class LowRankAttention(Technique):
    """Some keys are seen exactly, all others through fewer.

    POOLED: a frame sees those within `near_frames` exactly, far ones through keys and values that stand for groups of
    `pool` frames × `spatial_pool`² tokens. ROUTED (arXiv 2607.24027): a block of 64 queries sees a share `keep` of the
    blocks of keys exactly, or with `keep` 0 those whose mean scores `threshold` standard deviations above the average,
    and beside these `extra_tokens` keys; each other block through its mean.
    sink_frames: so many first frames are exact to all, as are guides and anchors. dense_blocks: so many first and last
    blocks of the model see everything exactly.
    """

    name: ClassVar[str] = "low-rank attention"
    stage: ClassVar[int] = 30
    explained: ClassVar[Mapping[str, str]] = {
        NO_KERNEL: "Routed attention needs comfy-kitchen 0.2.40 or newer and an NVIDIA card of the RTX 30 series or newer.",
        HEAD_WIDTH: "Routed attention needs heads 128 wide, as LTX-2 has.",
        DTYPE: "Routed attention needs a model that computes in fp16 or bf16.",
        OTHER_TECHNIQUE: "Routed attention acts where every frame sees the whole clip: not beside a temporal window.",
    }

    far: str = setting(Choice(POOLED, (POOLED, ROUTED)))
    near_frames: int = setting(Whole(2, 0, 32))
    pool: int = setting(Whole(2, 1, 8))
    spatial_pool: int = setting(Whole(1, 1, 4))
    sink_frames: int = setting(Whole(1, 0, 8))
    keep: float = setting(Number(0.5, 0.0, 1.0, 0.01))
    threshold: float = setting(Number(1.0, 0.0, 4.0, 0.05))
    extra_tokens: int = setting(Whole(0, 0, 256, 64))
    dense_blocks: int = setting(Whole(1, 0, 16))
    schedule: Schedule = field(default=Schedule(0.25, 1.0), kw_only=True)

    @property
    def roles(self) -> frozenset[Role]:
        return frozenset({Role.VIDEO_SELF})

    @property
    def is_exact(self) -> bool:
        """Whether these settings see every key as it is."""
        return self.keep == 1 if self.far == ROUTED else self.pool == self.spatial_pool == 1

    @property
    def is_neutral(self) -> bool:
        return self.is_exact or super().is_neutral

    @property
    def neutral_because(self) -> str:
        if not self.is_exact:
            return super().neutral_because
        return "keep is 1" if self.far == ROUTED else "pool and spatial_pool are both 1"

    def describe(self) -> str:
        dense = f", {self.dense_blocks} dense blocks at each end" if self.dense_blocks else ""
        if self.far == ROUTED:
            by = (
                f"{self.keep:.0%} of the blocks"
                if self.keep
                else f"blocks above threshold {self.threshold:g}"
            )
            extra = f", {self.extra_tokens} tokens more" if self.extra_tokens else ""
            return f"{by}{extra} and {self.sink_frames} sink exact, the others routed{dense}"
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
        """By threshold the data decide how many blocks are seen exactly: priced as stock then, which is too much."""
        tokens, role = work.tokens, Role.VIDEO_SELF
        if tokens.size is None:
            return work
        for block in self.blocks(work.blocks):
            before = work.segments_of(role, block, tokens.total, tokens.total)
            if self.far == POOLED:
                work = work.with_segments(role, block, self.seen(before, tokens))
            elif self.keep and before.is_dense:
                work = work.with_pairs(role, block, self.pairs(tokens) or before.pairs(range(tokens.total)))
        return work

    def pairs(self, tokens: VideoTokens) -> int | None:
        """Query-key pairs of a routed attention call, None where the data decide."""
        return pairs(tokens.total, exact_blocks(tokens, self.sink_frames), self.keep)

    def begin(self, run: Sampling) -> State:
        return Pooling(self, run) if self.far == POOLED else Routing(self, run)


class LowRank(State):
    """What both ways have in common: where they have nothing to say."""

    technique: LowRankAttention

    def call(self, call: Call) -> Mapping[str, Any] | str:
        reply, tokens = super().call(call), call.tokens
        if isinstance(reply, str) or isinstance(tokens, Unclear):
            return reply
        if tokens.size is None:
            return DROPPED_TOKENS
        if call.is_foreign:
            return FOREIGN_OVERRIDE
        call[self] = backend.in_force()
        return self.prepare(tokens, call.device) or reply

    def prepare(self, tokens: VideoTokens, device: torch.device) -> str | None:
        """Before the first block: make what such tokens need, or tell the reason to decline."""
        return None

    def obstacle(self, attention: AttentionCall) -> str | None:
        """Why every key of this call has to be seen as it is, or None."""
        tokens, site = attention.tokens, attention.site
        if site.block not in self.technique.blocks(site.blocks):
            return DENSE_BLOCK
        if attention.rows.start >= tokens.offsets[-1]:
            return GUIDE_QUERIES
        if attention.foreign is not None:
            return attention.foreign
        if backend.in_force() != attention.call[self]:
            return ATTENTION_EXCHANGED
        return None if attention.mask is None else MASKED


class Pooling(LowRank):
    def prepare(self, tokens: VideoTokens, device: torch.device) -> str | None:
        dense = Segments.dense(tokens.total, tokens.total)
        return NOTHING_FAR if self.technique.seen(dense, tokens) is dense else None

    def see(self, segments: Segments, attention: AttentionCall) -> Segments | str:
        reason = self.obstacle(attention)
        if reason is not None:
            return reason
        q = attention.q
        if not has_lse(q.device.type, q.dtype, q.shape[-1] // attention.heads) and not backend.takes_masks():
            return NO_LSE
        seen = self.technique.seen(segments, attention.tokens)
        return NOTHING_FAR if seen is segments else seen


class Routing(LowRank):
    """Packings are made outside of transformer blocks, once a run and device."""

    def __init__(self, technique: LowRankAttention, run: Sampling) -> None:
        super().__init__(technique, run)
        self._lock = threading.Lock()
        self._packings: dict[tuple[VideoTokens, torch.device], Packing] = {}

    def prepare(self, tokens: VideoTokens, device: torch.device) -> str | None:
        # No card that has the kernel lacks bf16.
        reason = why_not(device, torch.bfloat16, WIDTH)
        if reason is not None:
            return reason
        assert tokens.size is not None
        with self._lock:
            packing = self._packings.get((tokens, device))
            if packing is None:
                packing = pack_tokens(tokens, *tokens.size, self.technique.sink_frames).on(device)
                self._packings[tokens, device] = packing
        return NOTHING_FAR if packing.is_dense else None

    def attend(self, attention: AttentionCall, inner: Attend) -> torch.Tensor | str:
        own, q, heads = self.technique, attention.q, attention.heads
        reason = self.obstacle(attention) or why_not(q.device, q.dtype, q.shape[-1] // heads)
        if reason is not None:
            return reason
        packing = self._packings.get((attention.tokens, q.device))
        if packing is None or not attention.segments.is_dense or len(attention.rows) != packing.total:
            return OTHER_TECHNIQUE
        attention.count_pairs(own.pairs(attention.tokens) or packing.total**2)
        return attend_routed(
            q,
            attention.k,
            attention.v,
            heads,
            attention.scale,
            packing,
            own.keep,
            own.threshold,
            own.extra_tokens,
        )

    def close(self) -> None:
        self._packings.clear()
