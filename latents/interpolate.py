"""Pictures in between: from a clip at some times to the same clip at others.

Clips are [B, C, N, H, W]; times count video frames of the full rate.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from .motion import blend
from .stride import VIDEO_FRAMES

Estimate = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
LINEAR, SMOOTH = "linear", "smooth"


def frame_times(frames: int, stride: int = 1) -> torch.Tensor:
    """When the video frames of a clip are shown [F], one of `stride` full-rate frames each."""
    return torch.arange(frames, dtype=torch.float64) * stride


def latent_times(frames: int, stride: int = 1) -> torch.Tensor:
    """The middle of each latent frame's video frames [T]; the first holds one, the others eight."""
    return ((torch.arange(frames, dtype=torch.float64) * VIDEO_FRAMES - 3.5).clamp(min=0)) * stride


def in_between(
    clip: torch.Tensor,
    times: torch.Tensor,
    wanted: torch.Tensor,
    method: str,
    estimate: Estimate | None = None,
    device: torch.device | None = None,
) -> Iterator[tuple[int, torch.Tensor]]:
    """Yields (place in `wanted`, picture [B, C, H, W]) segment by segment; wanted times must not fall.

    method: "linear" or "smooth", else `estimate(a, b)` tells the flow from a to b [B, 2, H, W] and pictures follow
    it. Times outside the clip repeat its ends. Pictures that are there are handed on as they are, bit for bit.
    """
    last = clip.shape[2] - 1
    after = torch.searchsorted(times, wanted, right=True)
    segments = (after - 1).clamp(0, max(last - 1, 0)).tolist()
    known, flows = -1, None
    for place, (segment, time) in enumerate(zip(segments, wanted.tolist(), strict=True)):
        begin, end = float(times[segment]), float(times[min(segment + 1, last)])
        share = (time - begin) / (end - begin) if end > begin else 0.0
        if share <= 0 or share >= 1:
            yield place, clip[:, :, segment if share <= 0 else segment + 1]
            continue

        def picture(index: int) -> torch.Tensor:
            return clip[:, :, index].to(device=device, dtype=torch.float32)

        a, b = picture(segment), picture(segment + 1)
        if method == LINEAR:
            out = a.lerp(b, share)
        elif method == SMOOTH:
            out = _cubic(picture, times, segment, last, share)
        else:
            assert estimate is not None
            if known != segment:
                known, flows = segment, (estimate(a, b), estimate(b, a))
            assert flows is not None
            out = blend(a, b, *flows, share)
        yield place, out.to(device=clip.device, dtype=clip.dtype)


def _cubic(
    picture: Callable[[int], torch.Tensor], times: torch.Tensor, segment: int, last: int, share: float
) -> torch.Tensor:
    """Monotone cubic Hermite (Fritsch and Carlson, 1980): continuous slope, and never beyond both ends."""
    a, b = picture(segment), picture(segment + 1)
    length = float(times[segment + 1] - times[segment])
    rise = (b - a) / length

    def slope(index: int) -> torch.Tensor:
        """At the picture of this index, from the rises on both sides; a turn is flat."""
        if not 0 < index < last:
            return rise
        other = index - 1 if index == segment else index
        here = float(times[other + 1] - times[other])
        beside = (picture(other + 1) - picture(other)) / here
        mean = (length + here) * rise * beside
        weights = ((here + 2 * length) * rise + (2 * here + length) * beside) / 3
        is_turn = rise * beside <= 0
        return torch.where(is_turn, torch.zeros_like(rise), mean / torch.where(is_turn, 1.0, weights))

    s = share
    return (
        (2 * s**3 - 3 * s**2 + 1) * a
        + (s**3 - 2 * s**2 + s) * length * slope(segment)
        + (3 * s**2 - 2 * s**3) * b
        + (s**3 - s**2) * length * slope(segment + 1)
    )
