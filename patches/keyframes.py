"""Keyframe times: a clip sampled with fewer latent frames keeps its seconds."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from .layouts.layout import Layout, Unclear
from .technique import CallTechnique

FULL_LENGTH = "FULL_LENGTH"
OTHER_LENGTH = "OTHER_LENGTH"


@dataclass(frozen=True)
class KeyframeTimes(CallTechnique):
    """A clip of `strided_frames` latent frames lasts `stride` times as long; one of `frames` is left alone.

    So one MODEL serves a strided stage and a full-length one. frame_rate: the full one as the user told it, 0 if not.
    """

    name: ClassVar[str] = "keyframe stride"
    stage: ClassVar[int] = 5
    expected: ClassVar[frozenset[str]] = frozenset({FULL_LENGTH})

    stride: int
    frames: int
    strided_frames: int
    frame_rate: float = 0.0

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

    def adapt(self, layout: Layout) -> Mapping[str, Any] | str:
        given = layout.clip_frames()
        if isinstance(given, Unclear):
            return given.reason
        if given != self.strided_frames:
            return FULL_LENGTH if given == self.frames else OTHER_LENGTH
        change = layout.stretched(self.stride)
        return change.reason if isinstance(change, Unclear) else change

    def warnings(self, layout: Layout) -> Iterator[str]:
        rate = layout.frame_rate
        if rate and self.frame_rate and abs(rate / self.frame_rate - 1) > 0.01:
            yield (
                f"the model is told {rate:g} frames a second by its conditioning, and Keyframe Stride was told "
                f"{self.frame_rate:g}. Give both the full rate: times are stretched by the stride from what the model is told."
            )
        seconds = layout.seconds(self.strided_frames)
        if not isinstance(seconds, Unclear) and seconds * self.stride > layout.longest_seconds:
            yield (
                f"with stride {self.stride} the clip lasts {seconds * self.stride:.1f} s, and this model was made for "
                f"positions up to {layout.longest_seconds:g} s: what lies beyond may break. Make the clip shorter, or take "
                "a smaller stride."
            )
