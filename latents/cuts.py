"""Where a clip was cut: between two frames that no motion connects.

Mirror images of the second frame have its contrast and its grain but show another scene: if the frame itself resembles
the first hardly more than they do, and far less than the frames beside resemble each other, it shows another scene, too.
Changes of light, faint pictures and things that move over a background are no cut.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
import torch.nn.functional as F

from .motion import box, estimate_motion, warp

# Frames are compared as pictures whose shorter side is at least this long, and less than twice as long.
WORKING_SIDE = 64
# A pan of everything, where parts of the picture tell of nothing: up to this share of the shorter side.
PAN = 1 / 8
# Neighbourhoods, in pixels to each side: of places that are compared, and of those that move alike.
PLACE = 8
STIFFNESS = 4
# As shares of black to white: contrast that nobody sees twice, and the strongest grain that is no texture.
FAINT = 0.01
GRAIN = 0.05
# A cut leaves more than this share of the picture unexplained, however calm the clip; more than OF_BESIDE times what the
# pairs of frames before and after leave, unless it is MOST anyway; and more than OF_MIRRORED of what a mirror image leaves.
LEAST = 0.15
MOST = 0.35
OF_BESIDE = 2.0
# Latents change all over while things move: there a cut is known by the frames beside alone.
MOST_OF_LATENTS = 1.0
OF_MIRRORED = 0.5
MIRRORS = ((-1,), (-2,), (-1, -2))

# Pairs of frames by the places of the first: two pictures [len(places) * B, C, H, W], place by place.
Pairs = Callable[[list[int]], tuple[torch.Tensor, torch.Tensor]]
# Both pictures small and moved onto each other, as far as both show the same part.
Align = Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]


class Cuts:
    """Remembers what it has seen of a clip of `frames` frames, so that every pair is compared once.

    A pair that leaves more than `most` unexplained is a cut whatever lies beside it; `at_once` pairs are compared together.
    """

    def __init__(self, pairs: Pairs, frames: int, at_once: int, most: float = MOST) -> None:
        self._pairs = pairs
        self._at_once = at_once
        self._count = frames - 1
        self._most = most
        self._left: dict[int, torch.Tensor] = {}
        self._cuts: dict[int, torch.Tensor] = {}

    def after(self, places: list[int]) -> list[torch.Tensor]:
        """For each place whether the clip is cut between that frame and the next one [B], on the CPU."""
        around = sorted({k + d for k in places for d in (-1, 0, 1) if 0 <= k + d < self._count})
        news = [k for k in around if k not in self._left]
        for some in self._pieces(news):
            left = unexplained(*self._pairs(some))
            self._left |= dict(zip(some, left.view(len(some), -1), strict=True))
        undecided = sorted({k for k in places if k not in self._cuts})
        if undecided:
            self._cuts |= dict(zip(undecided, self._are_cuts(undecided), strict=True))
        return [self._cuts[k] for k in places]

    def _pieces(self, places: list[int]) -> Iterator[list[int]]:
        return (places[i : i + self._at_once] for i in range(0, len(places), self._at_once))

    def _are_cuts(self, places: list[int]) -> torch.Tensor:
        """[len(places), B]"""
        left = torch.stack([self._left[k] for k in places])
        usual = torch.stack([self._usual(k) for k in places])
        # One look at the device for all of them.
        found = (left > (OF_BESIDE * usual).clamp(LEAST, self._most)).cpu()
        rows = dict(zip(places, range(len(places)), strict=True))
        for some in self._pieces([k for k in places if found[rows[k]].any()]):
            where = [rows[k] for k in some]
            asked = found[where].flatten().nonzero().flatten().to(left.device)
            a, b = (pictures[asked] for pictures in self._pairs(some))
            # Stripes and other fine textures tell of a pan only as a whole.
            is_cut = _is_another(a, b, unexplained, left[where].flatten()[asked])
            if is_cut.any():
                a, b = a[is_cut], b[is_cut]
                by_pan_too = _is_another(a, b, unexplained_by_pan, unexplained_by_pan(a, b))
                is_cut = is_cut.masked_scatter(is_cut, by_pan_too)
            found[where] = found[where].masked_scatter(found[where], is_cut.cpu())
        return found

    def _usual(self, place: int) -> torch.Tensor:
        """What the pairs beside leave unexplained [B]."""
        beside = [self._left[k] for k in (place - 1, place + 1) if k in self._left]
        return torch.stack(beside).amax(dim=0) if beside else torch.full_like(self._left[place], MOST)


def unexplained(a: torch.Tensor, b: torch.Tensor, align: Align | None = None) -> torch.Tensor:
    """The share of the picture [B] in which b [B, C, H, W] does not resemble a, wherever things moved."""
    if a[0, 0].numel() == 1:
        return a.new_zeros(len(a))
    # Grain averages out where pictures are made smaller.
    grain = (GRAIN / _scale(a)) ** 2
    a, b = (align or by_motion)(a, b)
    grain_a, grain_b = (_grain(p).clamp(max=grain) for p in (a, b))
    mean_a, mean_b = box(a, PLACE), box(b, PLACE)
    variance_a = _mean(box(a * a, PLACE) - mean_a * mean_a)
    variance_b = _mean(box(b * b, PLACE) - mean_b * mean_b)
    common = _mean(box(a * b, PLACE) - mean_a * mean_b)
    # A step of an 8-bit picture: below it contrast is chance.
    step = 1 / 255**2
    resemblance = (
        common
        / (((variance_a - grain_a).clamp(min=0) + step) * ((variance_b - grain_b).clamp(min=0) + step)).sqrt()
    )
    is_seen = torch.maximum(variance_a - 1.5 * grain_a, variance_b - 1.5 * grain_b) > FAINT**2
    return ((1 - resemblance.clamp(0, 1)) * is_seen).mean(dim=(1, 2, 3))


def unexplained_by_pan(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """The same with the whole picture gone one way."""
    ways = pans(a, b)
    out = a.new_zeros(len(a))
    for way in set(ways):
        rows = [i for i, other in enumerate(ways) if other == way]
        out[rows] = unexplained(a[rows], b[rows], partial(by_pan, way=way))
    return out


def _is_another(
    a: torch.Tensor,
    b: torch.Tensor,
    left_of: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    left: torch.Tensor,
) -> torch.Tensor:
    """Whether b, which leaves so much of a unexplained, does not do far better than one of its mirror images [B]."""
    is_open, found = left > LEAST, torch.zeros_like(left, dtype=torch.bool)
    for way in MIRRORS:
        rows = is_open.nonzero().flatten()
        if len(rows):
            found[rows] = left[rows] > OF_MIRRORED * left_of(a[rows], b[rows].flip(way))
            is_open &= ~found
    return found


def by_motion(a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Parts of the picture go their own ways, those beside each other nearly the same."""
    a, b = _small(a), _small(b)
    return a, warp(b, box(estimate_motion(_levelled(a), _levelled(b)), STIFFNESS), "bicubic")


def pans(a: torch.Tensor, b: torch.Tensor) -> list[tuple[int, int]]:
    """For each pair the way, down and right, that its whole picture goes: most of its middle is found again there."""
    height, width = a.shape[-2:]
    reach = int(min(height, width) * PAN)
    middle = a[..., reach : height - reach, reach : width - reach]
    # On the CPU: some devices have no transform.
    middle, other = ((p - p.mean(dim=(2, 3), keepdim=True)).cpu() for p in (middle, b))
    spectrum = torch.fft.rfft2(middle, s=(height, width)).conj() * torch.fft.rfft2(other)
    ways = slice(2 * reach + 1)
    alike = torch.fft.irfft2(spectrum.sum(dim=1), s=(height, width))[:, ways, ways]
    sums = F.pad(other.square().sum(dim=1), (1, 0, 1, 0)).double().cumsum(1).cumsum(2)
    rows, columns = middle.shape[-2:]
    energy = (
        sums[:, rows:, columns:]
        - sums[:, :-rows, columns:]
        - sums[:, rows:, :-columns]
        + sums[:, :-rows, :-columns]
    )
    best = (alike / energy.clamp(min=1e-9).sqrt()).flatten(1).argmax(dim=1).tolist()
    return [(place // (2 * reach + 1) - reach, place % (2 * reach + 1) - reach) for place in best]


def by_pan(a: torch.Tensor, b: torch.Tensor, way: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
    """What both show of the whole picture, which goes so far down and right."""
    (height, width), (down, right) = a.shape[-2:], way
    a = a[..., max(0, -down) : height - max(0, down), max(0, -right) : width - max(0, right)]
    b = b[..., max(0, down) : height - max(0, -down), max(0, right) : width - max(0, -right)]
    return _small(a), _small(b)


def _scale(picture: torch.Tensor) -> int:
    return max(1, min(picture.shape[-2:]) // WORKING_SIDE)


def _small(picture: torch.Tensor) -> torch.Tensor:
    scale = _scale(picture)
    return F.avg_pool2d(picture, scale) if scale > 1 else picture


def _levelled(picture: torch.Tensor) -> torch.Tensor:
    """Without its brightness and contrast, so that a fade is no change."""
    rest = picture - picture.mean(dim=(2, 3), keepdim=True)
    return rest / (rest.square().mean(dim=(1, 2, 3), keepdim=True) + FAINT**2).sqrt()


def _grain(picture: torch.Tensor) -> torch.Tensor:
    """The variance of noise [B, 1, 1, 1] if all that sets pixels apart from their four neighbours were noise."""
    padded = F.pad(picture, (1,) * 4, mode="replicate")
    beside = padded[..., 1:-1, 2:] + padded[..., 1:-1, :-2] + padded[..., 2:, 1:-1] + padded[..., :-2, 1:-1]
    return (picture - beside / 4).square().mean(dim=(1, 2, 3), keepdim=True) / 1.25


def _mean(values: torch.Tensor) -> torch.Tensor:
    return values.mean(dim=1, keepdim=True)
