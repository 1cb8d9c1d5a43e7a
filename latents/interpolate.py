"""Pictures in between: from a clip at some times to the same clip at others.

Clips are [B, C, N, H, W]; times count video frames of the full rate.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch

from .cuts import MOST, Cuts, Pairs
from .motion import NUMBERS_AT_ONCE, blend, reduced_size
from .stride import FRAMES_A_LATENT

Estimate = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
LINEAR, SMOOTH = "linear", "smooth"
PIXELS_AT_ONCE = 1280 * 720
# What lives at the same time, at most, for every place of a segment's pictures and of the smaller ones motion is found on.
NUMBERS_PER_CHANNEL = 12
NUMBERS_PER_PLACE = 21


def frame_times(frames: int, stride: int = 1) -> torch.Tensor:
    """When the video frames of a clip are shown [F], one of `stride` full-rate frames each."""
    return torch.arange(frames, dtype=torch.float64) * stride


def latent_times(frames: int, stride: int = 1, frames_a_latent: int = FRAMES_A_LATENT) -> torch.Tensor:
    """The middle of each latent frame's video frames [T]; the first holds one, the others `frames_a_latent`."""
    last = torch.arange(frames, dtype=torch.float64) * frames_a_latent
    return (last - (frames_a_latent - 1) / 2).clamp(min=0) * stride


def in_between(
    clip: torch.Tensor,
    times: torch.Tensor,
    wanted: torch.Tensor,
    method: str,
    estimate: Estimate | None = None,
    device: torch.device | None = None,
    most: float = MOST,
) -> Iterator[tuple[int, torch.Tensor]]:
    """Yields (place in `wanted`, picture [B, C, H, W]) segment by segment; wanted times must not fall.

    method: "linear" or "smooth", else `estimate(a, b)` tells the flow from a to b [B, 2, H, W] and pictures follow
    it. Times outside the clip repeat its ends. Pictures that are there are handed on as they are, bit for bit. Across a
    cut (`most` as Cuts takes it) nothing is mixed: the nearer picture is repeated. A value that is no number is taken
    from the picture at the other end.
    """
    last = clip.shape[2] - 1
    segments = (torch.searchsorted(times, wanted, right=True) - 1).clamp(0, max(last - 1, 0)).tolist()
    at = times.tolist()
    shares = [
        (time - at[k]) / (at[k + 1] - at[k]) if last else 0.0
        for k, time in zip(segments, wanted.tolist(), strict=True)
    ]

    def pairs(places: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        a, b = (_pictures(clip, [k + offset for k in places], device) for offset in (0, 1))
        is_whole = bad.isdisjoint(k + offset for k in places for offset in (0, 1))
        return (a, b) if is_whole else (_filled(a, b), _filled(b, a))

    bad = set(bad_frames(clip))
    together = pictures_at_once(clip.shape)
    cuts = Cuts(pairs, clip.shape[2], together, most)
    done = 0
    while done < len(segments):
        first = segments[done]
        end = next((i for i in range(done, len(segments)) if segments[i] >= first + together), len(segments))
        places = range(done, end)
        pictures = {i: clip[:, :, segments[i] + (shares[i] >= 1)] for i in places if not 0 < shares[i] < 1}
        missing = [i for i in places if i not in pictures]
        if missing and method == SMOOTH:
            for i in missing:
                pictures[i] = _cubic(pairs, cuts, times, segments[i], shares[i]).to(clip)
        elif missing:
            made = _mixed(
                [segments[i] for i in missing], [shares[i] for i in missing], clip, pairs, method, estimate
            )
            pictures |= dict(zip(missing, made, strict=True))
        for i, is_cut in zip(missing, cuts.after([segments[i] for i in missing]), strict=True):
            ends = [clip[:, :, segments[i]], clip[:, :, segments[i] + 1]]
            if is_cut.any():
                near, far = ends if shares[i] <= 0.5 else ends[::-1]
                where = is_cut.to(clip.device)
                pictures[i][where] = _filled(near[where], far[where])
            if bad.issuperset((segments[i], segments[i] + 1)):
                is_known = ends[0].isfinite() | ends[1].isfinite()
                pictures[i] = torch.where(is_known, pictures[i], torch.nan)
        yield from ((i, pictures[i]) for i in places)
        done = end


def pictures_at_once(shape: tuple[int, ...]) -> int:
    """How many segments of a clip [B, C, N, H, W] go together: as much work at once as one of a large clip."""
    return max(1, PIXELS_AT_ONCE // (shape[0] * shape[-2] * shape[-1]))


def memory_used(shape: tuple[int, ...]) -> int:
    """Bytes on the device for in-betweening a clip [B, C, N, H, W], with motion, the largest; without what RAFT takes."""
    batch, channels, frames, height, width = shape
    segments = batch * max(1, min(frames - 1, pictures_at_once(shape)))
    places = height * width + math.prod(reduced_size(height, width))
    return 4 * (
        segments * places * (NUMBERS_PER_CHANNEL * channels + NUMBERS_PER_PLACE) + 5 * NUMBERS_AT_ONCE
    )


def bad_frames(clip: torch.Tensor) -> list[int]:
    """The frames of [B, C, N, H, W] in which some value is no number."""
    is_whole = torch.stack([clip[:, :, k].isfinite().all() for k in range(clip.shape[2])])
    return (~is_whole).nonzero().flatten().tolist()


def _pictures(clip: torch.Tensor, places: list[int], device: torch.device | None) -> torch.Tensor:
    """[len(places) * B, C, H, W], place by place."""
    return clip[:, :, places].to(device=device, dtype=torch.float32).movedim(2, 0).flatten(0, 1)


def _filled(picture: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """`picture` with the values of `other` where it has none."""
    return torch.where(picture.isfinite(), picture, torch.where(other.isfinite(), other, 0))


def _mixed(
    segments: list[int],
    shares: list[float],
    clip: torch.Tensor,
    pairs: Pairs,
    method: str,
    estimate: Estimate | None,
) -> list[torch.Tensor]:
    """Pictures at these shares of these segments, each between the segment's ends alone."""
    batch, own = clip.shape[0], sorted(set(segments))
    a, b = pairs(own)
    forth = back = None
    if method != LINEAR and estimate is not None:
        forth, back = estimate(torch.cat((a, b)), torch.cat((b, a))).chunk(2)
    out: list[torch.Tensor] = [clip[:, :, 0]] * len(segments)
    for share in sorted(set(shares)):
        asked = [i for i, other in enumerate(shares) if other == share]
        rows = torch.cat(
            [torch.arange(batch, device=a.device) + batch * own.index(segments[i]) for i in asked]
        )
        if forth is None or back is None:
            made = a[rows].lerp(b[rows], share)
        else:
            made = blend(a[rows], b[rows], forth[rows], back[rows], share)
        # Frames have their channels last: arranged here, they are copied in one piece.
        made = made.contiguous(memory_format=torch.channels_last)
        for i, picture in zip(asked, made.split(batch), strict=True):
            out[i] = picture.to(device=clip.device, dtype=clip.dtype)
    return out


def _cubic(pairs: Pairs, cuts: Cuts, times: torch.Tensor, segment: int, share: float) -> torch.Tensor:
    """Monotone cubic Hermite (Fritsch and Carlson, 1980): continuous slope, and never beyond both ends."""
    a, b = pairs([segment])
    length = float(times[segment + 1] - times[segment])
    rise = (b - a) / length

    def slope(other: int) -> torch.Tensor:
        """Where this segment meets the other one beside it; a turn is flat, and no slope looks across a cut."""
        if not 0 <= other < len(times) - 1:
            return rise
        here = float(times[other + 1] - times[other])
        before, after = pairs([other])
        beside = (after - before) / here
        is_turn = rise * beside <= 0
        weights = ((here + 2 * length) * rise + (2 * here + length) * beside) / 3
        mean = (length + here) * rise * beside / torch.where(is_turn, 1.0, weights)
        is_cut = cuts.after([other])[0].view(-1, 1, 1, 1).to(rise.device)
        return torch.where(is_cut, rise, torch.where(is_turn, torch.zeros_like(rise), mean))

    s = share
    return (
        (2 * s**3 - 3 * s**2 + 1) * a
        + (s**3 - 2 * s**2 + s) * length * slope(segment - 1)
        + (3 * s**2 - 2 * s**3) * b
        + (s**3 - s**2) * length * slope(segment + 1)
    )
