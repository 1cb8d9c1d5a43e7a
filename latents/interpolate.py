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
PIXELS_AT_ONCE = 1280 * 720


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
    segments = (torch.searchsorted(times, wanted, right=True) - 1).clamp(0, max(last - 1, 0)).tolist()
    begins, ends = times[:-1].tolist(), times[1:].tolist()
    shares = [
        (time - begins[k]) / (ends[k] - begins[k]) if last else 0.0
        for k, time in zip(segments, wanted.tolist(), strict=True)
    ]
    # Small pictures go together: as much work at once as one segment of a large clip.
    together = max(1, PIXELS_AT_ONCE // (clip.shape[0] * clip.shape[-2] * clip.shape[-1]))
    done = 0
    while done < len(segments):
        first = segments[done]
        end = next((i for i in range(done, len(segments)) if segments[i] >= first + together), len(segments))
        places = range(done, end)
        pictures = {i: clip[:, :, segments[i] + (shares[i] >= 1)] for i in places if not 0 < shares[i] < 1}
        missing = [i for i in places if i not in pictures]
        if missing and method == SMOOTH:
            for i in missing:
                pictures[i] = _cubic(clip, times, segments[i], shares[i], device).to(clip)
        elif missing:
            made = _mixed(
                [segments[i] for i in missing], [shares[i] for i in missing], clip, method, estimate, device
            )
            pictures |= dict(zip(missing, made, strict=True))
        yield from ((i, pictures[i]) for i in places)
        done = end


def _mixed(
    segments: list[int],
    shares: list[float],
    clip: torch.Tensor,
    method: str,
    estimate: Estimate | None,
    device: torch.device | None,
) -> list[torch.Tensor]:
    """Pictures at these shares of these segments, each between the segment's ends alone."""
    batch, own = clip.shape[0], sorted(set(segments))

    def pictures(offset: int) -> torch.Tensor:
        chosen = clip[:, :, [k + offset for k in own]].to(device=device, dtype=torch.float32)
        return chosen.movedim(2, 0).flatten(0, 1)

    a, b = pictures(0), pictures(1)
    forth = back = None
    if method != LINEAR and estimate is not None:
        forth, back = estimate(torch.cat((a, b)), torch.cat((b, a))).chunk(2)
    out: list[torch.Tensor] = [clip[:, :, 0]] * len(segments)
    for share in sorted(set(shares)):
        asked = [i for i, other in enumerate(shares) if other == share]
        rows = torch.cat([torch.arange(batch) + batch * own.index(segments[i]) for i in asked]).to(a.device)
        if forth is None or back is None:
            made = a[rows].lerp(b[rows], share)
        else:
            made = blend(a[rows], b[rows], forth[rows], back[rows], share)
        # Frames have their channels last: arranged here, they are copied in one piece.
        made = made.contiguous(memory_format=torch.channels_last)
        for i, picture in zip(asked, made.split(batch), strict=True):
            out[i] = picture.to(device=clip.device, dtype=clip.dtype)
    return out


def _cubic(
    clip: torch.Tensor, times: torch.Tensor, segment: int, share: float, device: torch.device | None
) -> torch.Tensor:
    """Monotone cubic Hermite (Fritsch and Carlson, 1980): continuous slope, and never beyond both ends."""

    def picture(index: int) -> torch.Tensor:
        return clip[:, :, index].to(device=device, dtype=torch.float32)

    a, b = picture(segment), picture(segment + 1)
    length = float(times[segment + 1] - times[segment])
    rise = (b - a) / length

    def slope(index: int) -> torch.Tensor:
        """At the picture of this index, from the rises on both sides; a turn is flat."""
        if not 0 < index < clip.shape[2] - 1:
            return rise
        other = index - 1 if index == segment else index
        here = float(times[other + 1] - times[other])
        beside = (picture(other + 1) - picture(other)) / here
        is_turn = rise * beside <= 0
        weights = ((here + 2 * length) * rise + (2 * here + length) * beside) / 3
        mean = (length + here) * rise * beside / torch.where(is_turn, 1.0, weights)
        return torch.where(is_turn, torch.zeros_like(rise), mean)

    s = share
    return (
        (2 * s**3 - 3 * s**2 + 1) * a
        + (s**3 - 2 * s**2 + s) * length * slope(segment)
        + (3 * s**2 - 2 * s**3) * b
        + (s**3 - s**2) * length * slope(segment + 1)
    )
