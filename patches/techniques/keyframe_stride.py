"""Keyframe stride: a clip sampled with fewer latent frames keeps its seconds."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from ..call import Call, Sampling
from ..layouts.layout import Layout, Unclear
from ..layouts.work import Work
from ..settings import Number, Whole, setting
from ..technique import State, Technique

FULL_LENGTH = "FULL_LENGTH"
OTHER_LENGTH = "OTHER_LENGTH"

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class StretchedTimes(Technique):
    """A clip of `strided_frames` latent frames lasts `stride` times as long; one of `frames` is left alone.

    So one MODEL serves a strided stage and a full-length one. Samplers that make a clip piece by piece show other lengths:
    the sound beside a piece tells its rate, a piece longer than the strided clip is one of the full rate, and of a shorter
    one nobody can tell. frame_rate: the full one as the user told it, 0 if not.
    """

    name: ClassVar[str] = "keyframe stride"
    stage: ClassVar[int] = 5
    expected: ClassVar[frozenset[str]] = frozenset({FULL_LENGTH})
    advice_if_never_needed: ClassVar[str] = (
        "No run with this MODEL was strided so far. If this one was to be, give the sampler the LATENT of Keyframe Stride; "
        "a sampler that makes its own latent needs the strided number of frames."
    )

    frames: int
    strided_frames: int
    stride: int = setting(Whole(2, 1, 8))
    frame_rate: float = setting(Number(0.0, 0.0, 1000.0, 0.01))

    @property
    def is_neutral(self) -> bool:
        return self.stride == 1

    @property
    def neutral_because(self) -> str:
        return "stride is 1"

    def describe(self) -> str:
        return (
            f"{self.strided_frames} instead of {self.frames} latent frames, each {self.stride} times as long"
        )

    def cost(self, work: Work) -> Work:
        """A clip that is strided already costs what it costs."""
        if work.tokens.frames != self.frames:
            return work
        return replace(work, tokens=work.tokens.thinned(self.strided_frames))

    def begin(self, run: Sampling) -> State:
        return Stretching(self, run)


class Stretching(State):
    technique: StretchedTimes

    def call(self, call: Call) -> Mapping[str, Any] | str:
        changes = self._changes(call.layout)
        if not isinstance(changes, str):
            for warning in self._warnings(call.layout):
                if self.run.say_once(warning):
                    logger.warning("FrameThrift: %s", warning)
        return changes

    def _changes(self, layout: Layout) -> Mapping[str, Any] | str:
        """Raises ValueError for a piece of a clip whose rate cannot be told."""
        own = self.technique
        if layout.has_lost_keyframes:
            raise ValueError(
                "model: the latent holds fewer frames than when generated keyframes were added to it, so Keyframe Stride has "
                "thinned them too. Add them after Keyframe Stride, to its LATENT."
            )
        given = layout.clip_frames()
        if isinstance(given, Unclear):
            return given.reason
        if given == own.frames:
            return FULL_LENGTH
        if given != own.strided_frames:
            stretch = self._stretch_of_piece(given, layout)
            if stretch is None:
                raise ValueError(
                    f"model: Keyframe Stride made it for a clip of {own.strided_frames} latent frames at stride "
                    f"{own.stride}, or for the full length of {own.frames}, but a sampler gave it a piece of {given}, and "
                    "nothing tells the rate of that piece. Give the strided MODEL to the stage that samples the strided "
                    "LATENT in one piece, and the MODEL from before Keyframe Stride to samplers that loop, extend or cut. "
                    "Guides and generated keyframes are added after Keyframe Stride."
                )
            if stretch == 1:
                return OTHER_LENGTH
        change = layout.stretched(own.stride)
        return change.reason if isinstance(change, Unclear) else change

    def _stretch_of_piece(self, frames: int, layout: Layout) -> int | None:
        """How many times as long a piece of so many latent frames lasts as it would at the full rate, if it can be told."""
        own = self.technique
        if frames == 1:  # A picture has no rate.
            return 1
        seconds, sound = layout.seconds(frames), layout.sound_seconds()
        if not isinstance(seconds, Unclear) and sound:
            nearest = min((1, own.stride), key=lambda stretch: abs(math.log(sound / (seconds * stretch))))
            # Sound of another length entirely, as one that lasts the whole clip, tells nothing of the piece.
            if abs(math.log(sound / (seconds * nearest))) < math.log(own.stride) / 4:
                return nearest
        return 1 if frames > own.strided_frames else None

    def _warnings(self, layout: Layout) -> Iterator[str]:
        own, rate = self.technique, layout.frame_rate
        if rate and own.frame_rate and abs(rate / own.frame_rate - 1) > 0.01:
            yield (
                f"the model is told {rate:g} frames a second by its conditioning, and Keyframe Stride was told "
                f"{own.frame_rate:g}. Give both the full rate: times are stretched by the stride from what the model is told."
            )
        seconds, longest = layout.seconds(own.strided_frames), layout.longest_seconds
        if isinstance(seconds, Unclear) or isinstance(longest, Unclear):
            return
        if seconds * own.stride > longest:
            yield (
                f"with stride {own.stride} the clip lasts {seconds * own.stride:.1f} s, and this model was made for "
                f"positions up to {longest:g} s: what lies beyond may break. Make the clip shorter, or take "
                "a smaller stride."
            )
