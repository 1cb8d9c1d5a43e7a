"""How the video tokens of one forward are ordered."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from itertools import accumulate

Ranges = tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class VideoTokens:
    """How the video tokens of one forward are ordered.

    Frames come first, latent frame t holding tokens `offsets[t]` to `offsets[t + 1]`; whatever follows up
    to `total` are guide and reference tokens. The first `anchors` frames stand outside the clip (a context
    window repeats them from before its own start). `size` is the height and width of every frame, in tokens; None
    where tokens were dropped from any.
    """

    offsets: tuple[int, ...]
    total: int
    anchors: int = 0
    size: tuple[int, int] | None = None

    @property
    def frames(self) -> int:
        return len(self.offsets) - 1

    @property
    def guides(self) -> int:
        return self.total - self.offsets[-1]

    def only(self, frames: Iterable[int]) -> tuple[VideoTokens, Ranges]:
        """The order of the tokens of these frames and of all that are no frame's, and where they lie in this order."""
        chosen = sorted(set(frames))
        offsets = tuple(accumulate((self.offsets[t + 1] - self.offsets[t] for t in chosen), initial=0))
        rows = [(self.offsets[t], self.offsets[t + 1]) for t in chosen] + [(self.offsets[-1], self.total)]
        anchors = sum(t < self.anchors for t in chosen)
        return VideoTokens(offsets, offsets[-1] + self.guides, anchors, self.size), merged(rows)

    def thinned(self, frames: int) -> VideoTokens:
        """The order of the first so many frames, and of as much behind them as there is."""
        return replace(self, offsets=self.offsets[: frames + 1], total=self.offsets[frames] + self.guides)

    @staticmethod
    def grid(frames: int, height: int, width: int, guides: int = 0, anchors: int = 0) -> VideoTokens:
        """The order of a full T×h×w grid with `guides` tokens behind it."""
        per_frame = height * width
        offsets = tuple(range(0, frames * per_frame + 1, per_frame))
        return VideoTokens(offsets, frames * per_frame + guides, anchors, (height, width))


def merged(ranges: Iterable[tuple[int, int]]) -> Ranges:
    """The same tokens in ascending ranges that neither touch nor hold nothing."""
    out: list[tuple[int, int]] = []
    for start, stop in sorted(r for r in ranges if r[1] > r[0]):
        if out and start <= out[-1][1]:
            out[-1] = (out[-1][0], max(stop, out[-1][1]))
        else:
            out.append((start, stop))
    return tuple(out)
