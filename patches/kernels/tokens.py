"""How the video tokens of one forward are ordered."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class VideoTokens:
    """How the video tokens of one forward are ordered.

    Frames come first, latent frame t holding tokens `offsets[t]` to `offsets[t + 1]`; whatever follows up
    to `total` are guide and reference tokens. The first `anchors` frames stand outside the clip (a context
    window repeats them from before its own start).
    """

    offsets: tuple[int, ...]
    total: int
    anchors: int = 0

    @property
    def frames(self) -> int:
        return len(self.offsets) - 1

    @property
    def guides(self) -> int:
        return self.total - self.offsets[-1]

    @staticmethod
    def grid(frames: int, height: int, width: int, guides: int = 0, anchors: int = 0) -> VideoTokens:
        """The order of a full T×h×w grid with `guides` tokens behind it."""
        per_frame = height * width
        offsets = tuple(range(0, frames * per_frame + 1, per_frame))
        return VideoTokens(offsets, frames * per_frame + guides, anchors)
