"""Spatial freeze: some steps reuse what a full step before them has computed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from . import backend
from .cache import DEFAULT, PLACEMENTS, PRECISIONS
from .clock import SigmaClock
from .kernels.split_softmax import attend_anew, has_lse, own_frame
from .layouts.layout import Role, Stream
from .reuse import ATTENTION_EXCHANGED, CACHE_FULL, Rhythm
from .technique import Attend, AttentionCall, AttentionTechnique, ScheduledTechnique

ATTENTION, WORK, BLOCKS = "spatial attention", "per-frame work", "whole blocks"
SCOPES = (ATTENTION, WORK, BLOCKS)
HOLD, LINEAR = "hold", "linear"
FORECASTS = (HOLD, LINEAR)

NO_LSE = "NO_LSE"
FOREIGN_OVERRIDE = "FOREIGN_OVERRIDE"
MASKED = "MASKED"
ONE_FRAME = "ONE_FRAME"
KEPT_BLOCK = "KEPT_BLOCK"
OTHER_TECHNIQUE = "OTHER_TECHNIQUE"

# What is kept of an attention call's own-frame share.
PARTS = ("out", "lse")


@dataclass(frozen=True)
class Freeze(ScheduledTechnique):
    """Within a part of the schedule every `refresh_every`-th step is full; the others reuse, per `scope`.

    WORK: the outputs of feed-forward and text cross-attention. BLOCKS: what blocks add to the video stream. The
    subclass FrozenAttention: the share of self-attention within a frame. The first step in the range and the last
    of the schedule are full. forecast: the last full value (HOLD), or the line through the last two, followed no
    further than they lie apart (LINEAR, a first-order Taylor forecast: TaylorSeer, arXiv 2503.06923). blocks_kept: so many first and last blocks are
    always computed. Raises ValueError, naming the setting, for values outside their range.
    """

    name: ClassVar[str] = "spatial freeze"
    stage: ClassVar[int] = 10
    unit: ClassVar[str] = "forwards"
    does: ClassVar[str] = "freezes"

    refresh_every: int = 3
    scope: str = BLOCKS
    forecast: str = LINEAR
    blocks_kept: int = 0
    cache_device: str = "auto"
    cache_limit_gb: float = 0.0
    cache_dtype: str = DEFAULT

    def __post_init__(self) -> None:
        super().__post_init__()
        for setting, low, high in (("refresh_every", 1, 16), ("blocks_kept", 0, 64)):
            value = getattr(self, setting)
            if type(value) is not int or not low <= value <= high:
                raise ValueError(f"{setting} is {value!r}; it takes whole numbers from {low} to {high}.")
        choices = (
            ("scope", SCOPES),
            ("forecast", FORECASTS),
            ("cache_device", PLACEMENTS),
            ("cache_dtype", PRECISIONS),
        )
        for setting, allowed in choices:
            if getattr(self, setting) not in allowed:
                raise ValueError(
                    f"{setting} is {getattr(self, setting)!r}; it takes one of {', '.join(allowed)}."
                )
        if not isinstance(self.cache_limit_gb, (int, float)) or not 0 <= self.cache_limit_gb < 1e6:
            raise ValueError(f"cache_limit_gb is {self.cache_limit_gb!r}; it takes numbers from 0.")

    @property
    def is_neutral(self) -> bool:
        return self.refresh_every == 1 or super().is_neutral

    @property
    def neutral_because(self) -> str:
        return "refresh_every is 1" if self.refresh_every == 1 else super().neutral_because

    @property
    def has_forecast(self) -> bool:
        return self.forecast == LINEAR

    @property
    def places_a_block(self) -> int:
        """Tensors that one block keeps."""
        return 1 if self.scope == BLOCKS else 2

    def values_kept(self, stream: Stream) -> int:
        """How many tensors of the stream's size are kept for each cond."""
        blocks = max(0, stream.blocks - 2 * self.blocks_kept)
        # The log-sum-exp of a softmax share is next to nothing beside its output.
        places = min(blocks, 1) if self.scope == BLOCKS and stream.is_alone else blocks
        places *= 2 if self.scope == WORK else 1
        return places * (2 if self.has_forecast else 1)

    def rhythm(self, clock: SigmaClock) -> Rhythm:
        return Rhythm(
            within=tuple(clock.steps_within(*self.percents)),
            frozen=tuple(self.acting_steps(clock)),
            refresh_every=self.refresh_every,
            has_forecast=self.has_forecast,
            places_a_block=self.places_a_block,
        )

    def describe(self) -> str:
        kept = f", {self.blocks_kept} blocks kept at each end" if self.blocks_kept else ""
        packed = "" if self.cache_dtype == DEFAULT else f", kept as {self.cache_dtype}"
        return f"{self.scope}, every {self.refresh_every}. step full, {self.forecast}{kept}{packed}"

    def acting_steps(self, clock: SigmaClock) -> list[int]:
        """The steps that are frozen, if every step before them runs."""
        within = clock.steps_within(*self.percents)
        return [step for i, step in enumerate(within) if i % self.refresh_every and step != clock.steps - 1]


@dataclass(frozen=True)
class FrozenAttention(Freeze, AttentionTechnique):
    """Scope ATTENTION: a query's softmax over its own frame is reused, that over other frames is fresh."""

    unit: ClassVar[str] = AttentionTechnique.unit
    role: ClassVar[Role] = Role.VIDEO_SELF

    def reason_to_decline(self, call: AttentionCall) -> str | None:
        assert call.moment is not None
        reason = self._obstacle(call) or call.moment.reason
        if reason is None and not all(call.moment.has((call.site.block, part)) for part in PARTS):
            return CACHE_FULL
        return reason

    def observe(self, call: AttentionCall) -> None:
        moment = call.moment
        assert moment is not None
        moment.computed += 1
        moment.expect(call.q)
        if moment.is_stored and self._obstacle(call) is None:
            own = own_frame(call.q, call.k, call.v, call.heads, call.tokens, call.scale)
            for part, value in zip(PARTS, own, strict=True):
                moment.store((call.site.block, part), value.detach(), is_exact=part == "lse")

    def attend(self, call: AttentionCall, inner: Attend) -> torch.Tensor:
        assert call.moment is not None
        out, lse = (call.moment.value((call.site.block, part)) for part in PARTS)
        return attend_anew(call.q, call.k, call.v, call.heads, call.tokens, (out, lse), call.scale)

    def cost(self, call: AttentionCall) -> float:
        offsets = call.tokens.offsets
        own = sum((stop - start) ** 2 for start, stop in zip(offsets, offsets[1:], strict=False))
        return 1 - own / call.tokens.total**2

    def _obstacle(self, call: AttentionCall) -> str | None:
        """Why this call can be split at no step, or None."""
        if not self.blocks_kept <= call.site.block < call.site.blocks - self.blocks_kept:
            return KEPT_BLOCK
        if call.moment is not None and call.moment.is_exchanged(call.site.block, backend.in_force()):
            return ATTENTION_EXCHANGED
        if call.is_foreign:
            return FOREIGN_OVERRIDE
        if call.is_covered:
            return OTHER_TECHNIQUE
        if call.mask is not None or len(call.rows) != call.tokens.total:
            return MASKED
        if call.tokens.frames < 2:
            return ONE_FRAME
        if not has_lse(call.q.device.type, call.q.dtype, call.q.shape[-1] // call.heads):
            return NO_LSE
        return None
