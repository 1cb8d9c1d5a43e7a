"""Pictures in between that follow a reference: the same clip at half the size, which shows what happens there.

Keyframes are [B, C, H, W] with even sides, reference pictures [B, C, H / 2, W / 2], all in 0..1. Both keyframes around a
picture are fetched along motion measured on the reference; where they leave something of it, its own correction is added.
Beside that stands the blind picture, made of the keyframes alone: where it fits the reference as well, it is taken. The
result is made to show small what the reference shows, as far as that is known to be right.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from itertools import groupby
from typing import NamedTuple

import torch
import torch.nn.functional as F

from .cuts import Cuts
from .interpolate import PIXELS_AT_ONCE, bad_frames
from .motion import NUMBERS_AT_ONCE, Way, along, box, estimate_motion, refined, resized, warp, way_at

# A step of an 8-bit picture.
STEP = 1 / 255
# A motion of the reference must leave less of the difference than this share, or things stand still. On the full picture
# of the pyramid the search goes so far, which takes little from the result and half of the time.
GAIN = 0.85
REACH = 1
# The upsampler makes 2 × 2 pixels of TAPS × TAPS of the reference; noise of this variance pulls it towards copying. It is
# fitted to so many keyframes.
TAPS = 5
COPYING = 1e-4
FITTED = 8
# How far a reference is off where it matches: this quantile of what is left, a little enlarged; but no more than that, or
# than its errors at both ends differ, lest a picture that matches nowhere pass for noise.
QUIET, ENLARGED, MOST_OFF = 0.3, 1.3, 2 * STEP
# What neither keyframe shows is the reference's own, enlarged, in the colours of the keyframes around it.
UNSEEN = 0.02
FAR = 8
# The blind picture: how much worse it may fit, in which neighbourhood, how hard the choice is, and how much more easily it
# is taken where the picture as a whole speaks for it.
AS_GOOD = 1.15
NEIGHBOURHOOD = 4
HARDNESS = 2.0
TRUST = 3.0
# It is out of the question where it leaves far more than this, beyond what the reference is off itself.
FAILED = 20 * STEP
# Keyframe and reference are laid upon each other on pictures down to a quarter of this size, in wide neighbourhoods. A
# shift counts in full where it leaves less than LEFT - SURE of what differs, and not at all above LEFT.
LEVELS, STEPS, WIDE = 3, 2, 5
LEFT, SURE = 0.8, 0.1
# Fetching and mixing soften: detail above that of grain is brought nearer to what the keyframes have of it. Half of the
# power would bring the finest to it, and what is a little coarser above it.
RAISE = 0.3
LEAST_RAISED, MOST_RAISED = 0.92, 1.3
GRAIN = 2 * STEP
# Errors of the reference in between are taken for so many times those at the keyframes; steps of 8 bits are one, too.
DOUBT = 2.0
ROUNDING = STEP / 3
# What lives at the same time, at most, for every place and channel of a picture, and for every place of the smaller ones.
NUMBERS_PER_CHANNEL = 19
# A reference that leaves more than this share of a keyframe's contrast shows something else.
UNLIKE = 0.5
# Gaps go together up to so many places of their keyframes: one gap of a large clip, several of small clips.
PLACES_AT_ONCE = 3 * 2**19
# One is late, or early, if its pictures up to so many before or after the right ones leave LAG times less of the keyframes,
# in the mean over those, of which each has one vote: no more than a factor of e ** VOTE. Of three or more, one alone decides
# nothing: a second one has to gain half as much at least.
EARLIER = 4
VOTE = 0.7
LAG = 1.15


class Upsampler:
    """Twice as large in the colours of the keyframes: a filter for each item and channel, fitted to pairs of this clip."""

    def __init__(self) -> None:
        self._squares = torch.zeros(TAPS**2 + 1, TAPS**2 + 1, dtype=torch.float64)
        self._products = torch.zeros(4, TAPS**2 + 1, dtype=torch.float64)
        self._seen = 0
        self.weight = torch.empty(0)

    def learn(self, reference: torch.Tensor, picture: torch.Tensor) -> None:
        x = _patches(reference)
        y = F.pixel_unshuffle(picture, 2).unflatten(1, (-1, 4)).flatten(3)
        self._squares = self._squares + (x @ x.mT).cpu()
        self._products = self._products + (y @ x.mT).cpu()
        self._seen += x.shape[-1]

    def fit(self, device: torch.device | None = None) -> None:
        pull = torch.full((TAPS**2 + 1,), COPYING * self._seen, dtype=torch.float64)
        # A shift of all colours costs little.
        pull[-1] /= 100
        copy = torch.zeros(4, TAPS**2 + 1, dtype=torch.float64)
        copy[:, TAPS**2 // 2] = 1.0
        squares, products = self._squares + pull.diag(), self._products + copy * pull
        self.weight = torch.linalg.solve(squares, products.mT).mT.float().to(device)

    def __call__(self, reference: torch.Tensor) -> torch.Tensor:
        """[B, C, h, w] -> [B, C, 2 h, 2 w]"""
        return F.pixel_shuffle(self._filtered(reference, self.weight).flatten(1, 2), 2)

    def levelled(self, reference: torch.Tensor) -> torch.Tensor:
        """The same, made half as large again."""
        return self._filtered(reference, self.weight.mean(dim=2, keepdim=True)).flatten(1, 2)

    def _filtered(self, reference: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        # Several pictures of each item come one after the other.
        weight = weight.repeat(len(reference) // len(weight), 1, 1, 1)
        return (weight @ _patches(reference)).unflatten(3, reference.shape[-2:])


def _patches(reference: torch.Tensor) -> torch.Tensor:
    """[B, C, h, w] -> [B, C, TAPS² + 1, h w]: the neighbourhood of each pixel, and a one."""
    padded = F.pad(reference, (TAPS // 2,) * 4, mode="replicate").flatten(0, 1)[:, None]
    x = F.pad(F.unfold(padded, TAPS), (0, 0, 0, 1), value=1.0)
    return x.unflatten(0, reference.shape[:2])


class Keyframe(NamedTuple):
    """A keyframe with its reference, and the reference laid upon it.

    shift: where the keyframe shows what its reference shows [B, 2, h, w], in the reference's pixels.
    off: what the reference says against the shrunk keyframe even so, in its colours [B, C, h, w].
    low: what they differ in from afar; detail: how much of it the keyframe has [B, 1, ...]; both every FAR pixels.
    unlike: how much of the keyframe's contrast `off` is [B].
    """

    picture: torch.Tensor
    reference: torch.Tensor
    small: torch.Tensor
    shift: torch.Tensor
    aligned: torch.Tensor
    enlarged: torch.Tensor
    off: torch.Tensor
    low: torch.Tensor
    detail: torch.Tensor
    unlike: torch.Tensor

    def split(self, batch: int) -> Iterator[Keyframe]:
        return (Keyframe(*parts) for parts in zip(*(part.split(batch) for part in self), strict=True))


def joined(keyframes: list[Keyframe]) -> Keyframe:
    if len(keyframes) == 1:
        return keyframes[0]
    return Keyframe(*(torch.cat(parts) for parts in zip(*keyframes, strict=True)))


def keyframe(picture: torch.Tensor, reference: torch.Tensor, upsample: Upsampler) -> Keyframe:
    small = F.avg_pool2d(picture, 2)
    level = upsample.levelled(reference)
    shift = shift_between(level, small)
    # Noise, too, can be made a little less by shifts: real ones explain most of what differs.
    before, after = (
        box((shown - small).square().mean(dim=1, keepdim=True), 2 * NEIGHBOURHOOD)
        for shown in (level, warp(level, -shift, "bicubic"))
    )
    shift = shift * ((LEFT - after / (before + (STEP / 4) ** 2)) / SURE).clamp(0, 1)
    aligned = warp(reference, -shift, "bicubic")
    enlarged = upsample(aligned)
    off = F.avg_pool2d(enlarged, 2) - small
    low = _far(picture - enlarged)
    detail = _far(fine(picture).square().mean(dim=1, keepdim=True))
    contrast = small - box(small, FAR)
    unlike = _mean_square(off) / (_mean_square(contrast) + STEP**2)
    return Keyframe(picture, reference, small, shift, aligned, enlarged, off, low, detail, unlike)


def shift_between(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """A smooth flow from a to b, of few pixels."""
    pyramid = [(a, b)]
    while len(pyramid) < LEVELS and min(pyramid[-1][0].shape[-2:]) >= 4 * WIDE:
        pyramid.append(
            (F.avg_pool2d(pyramid[-1][0], 2, ceil_mode=True), F.avg_pool2d(pyramid[-1][1], 2, ceil_mode=True))
        )
    flow = a.new_zeros(len(a), 2, *pyramid[-1][0].shape[-2:])
    for small_a, small_b in reversed(pyramid):
        flow = resized(flow, small_a.shape[-2:])
        for _ in range(STEPS):
            flow = box(refined(small_a, small_b, flow, WIDE), WIDE // 2)
    return flow


def picture_at(
    reference: torch.Tensor,
    share: float,
    ends: tuple[Keyframe, Keyframe],
    flows: tuple[torch.Tensor, torch.Tensor],
    way: Way,
    may_be_blind: torch.Tensor,
    upsample: Upsampler,
) -> torch.Tensor:
    """The picture that `reference` [B, C, h, w] shows small, `share` of the way from one end to the other.

    flows: from the reference to those of both ends; way: how the blind picture is made of them, where there `may_be` one
    [B, 1, 1, 1].
    """
    size = ends[0].picture.shape[-2:]
    near = (1 - share, share)
    # Each end shows things at places of its own; in between they move evenly from the first's to the second's.
    shift_a, shift_b = (warp(end.shift, flow) for end, flow in zip(ends, flows, strict=True))
    reference = warp(reference, -torch.lerp(shift_a, shift_b, share), "bicubic")
    apart = shift_a - shift_b
    flows = (flows[0] + share * apart, flows[1] - (1 - share) * apart)

    fetched = [warp(end.aligned, flow, "bicubic") for end, flow in zip(ends, flows, strict=True)]
    left = [_rest(reference - picture) for picture in fetched]
    offs = [warp(end.off, flow, "bicubic") for end, flow in zip(ends, flows, strict=True)]
    noise = offs[0] - offs[1]
    most_off = _mean_square(noise).sqrt().clamp(min=MOST_OFF).view(-1, 1, 1, 1)
    off = torch.minimum(ENLARGED * _quantile(torch.minimum(*left)), most_off)
    enlarged, levelled = upsample(reference), upsample.levelled(reference)
    weights: list[torch.Tensor] = []
    out, total = torch.zeros_like(enlarged), torch.zeros_like(enlarged[:, :1])
    for end, flow, rest, nearness in zip(ends, flows, left, near, strict=True):
        weight = nearness * ((-(rest**2) / (2 * (3 * (2 * STEP + off)) ** 2)).exp() + 1e-4)
        weights.append(weight)
        correction = rest**3 / (rest**3 + (1.5 * off) ** 3 + 1e-12)
        both = warp(torch.cat((end.picture, end.enlarged), dim=1), resized(flow, size), "bicubic")
        picture, shown = both.chunk(2, dim=1)
        weight, correction = _twice(torch.cat((weight, correction), dim=1)).split(1, dim=1)
        out = out + weight * (picture + correction * (enlarged - shown))
        total = total + weight
    low = torch.lerp(ends[0].low, ends[1].low, share)
    low = F.interpolate(low, size=size, mode="bilinear", align_corners=False)
    out = (out + UNSEEN * (enlarged + low)) / (total + UNSEEN)

    guided = (weights[0] * fetched[0] + weights[1] * fetched[1]) / (weights[0] + weights[1])
    blind = along(ends[0].aligned, ends[1].aligned, way)
    takes = _blind_share(reference - guided, reference - blind, noise)
    # Where both fail alike, since only the reference shows what is there, none is as good.
    known = torch.maximum(*(off.square() for off in offs))
    excess = box(((reference - blind).square() - 4 * known).mean(dim=1, keepdim=True), NEIGHBOURHOOD)
    takes = takes * may_be_blind * (-excess.clamp(min=0) / (2 * FAILED**2)).exp()
    out = torch.lerp(out, along(ends[0].picture, ends[1].picture, way.enlarged(size)), _twice(takes))
    return _sharpened(_laid(out, levelled, offs), ends, flows, weights)


def _blind_share(guided: torch.Tensor, blind: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """How much of the blind picture to take [B, 1, h, w], from what both leave of the reference [B, C, h, w].

    noise: how far the reference's errors at both ends differ. So much is left by a picture that is right; one that leaves
    less follows the reference in what it does wrong.
    """
    left_guided, left_blind, left_noise = (
        box(rest.square().mean(dim=1, keepdim=True), NEIGHBOURHOOD) for rest in (guided, blind, noise)
    )

    def odds(guided: torch.Tensor, blind: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        allowed = torch.maximum(guided * AS_GOOD**2, noise - guided) + (STEP / 2) ** 2
        return (allowed / blind.clamp(min=1e-9)).log()

    here = odds(left_guided, left_blind, left_noise)
    whole = odds(*(left.mean(dim=(1, 2, 3), keepdim=True) for left in (left_guided, left_blind, left_noise)))
    return torch.sigmoid(HARDNESS * (here + TRUST * whole.clamp(min=0)))


def _sharpened(
    picture: torch.Tensor,
    ends: tuple[Keyframe, Keyframe],
    flows: tuple[torch.Tensor, ...],
    weights: list[torch.Tensor],
) -> torch.Tensor:
    """`picture` with as much detail as the ends have where it comes from."""
    coarse = F.avg_pool2d(
        torch.cat((*flows, *weights), dim=1), FAR // 2, ceil_mode=True, count_include_pad=False
    )
    to_a, to_b, weight_a, weight_b = coarse.split((2, 2, 1, 1), dim=1)
    had_a, had_b = (warp(end.detail, flow * (2 / FAR)) for end, flow in zip(ends, (to_a, to_b), strict=True))
    wanted = (weight_a * had_a + weight_b * had_b) / (weight_a + weight_b)
    detail = fine(picture)
    has = _far(detail.square().mean(dim=1, keepdim=True))
    raised = ((wanted + GRAIN**2) / (has + GRAIN**2)) ** RAISE
    raised = box(raised.clamp(LEAST_RAISED, MOST_RAISED), 1)
    raised = F.interpolate(raised, size=picture.shape[-2:], mode="bilinear", align_corners=False)
    return picture + (raised - 1) * detail


def _laid(picture: torch.Tensor, reference: torch.Tensor, offs: list[torch.Tensor]) -> torch.Tensor:
    """`picture`, which shows small what `reference` [B, C, h, w] does, as far as errors of the reference don't explain it.

    offs: what the reference says against both ends. A filter of Wiener's kind: of a difference that is all error nothing
    is taken, of one that dwarfs it all.
    """
    rest = reference - F.avg_pool2d(picture, 2)
    error = torch.maximum(*(off.square() for off in offs))
    left, error = (box(power.mean(dim=1, keepdim=True), NEIGHBOURHOOD) for power in (rest.square(), error))
    rest = rest * (1 - (DOUBT * error + ROUNDING**2) / left.clamp(min=1e-9)).clamp(min=0)
    # The least change that does it: the same for all four pixels.
    return picture + F.interpolate(rest, scale_factor=2)


def fine(picture: torch.Tensor) -> torch.Tensor:
    """What a blur takes away."""
    return picture - box(box(picture, 1), 1)


def _mean_square(values: torch.Tensor) -> torch.Tensor:
    return values.square().mean(dim=(1, 2, 3))


def _rest(difference: torch.Tensor) -> torch.Tensor:
    return box(difference.abs().mean(dim=1, keepdim=True), 1)


def _quantile(values: torch.Tensor) -> torch.Tensor:
    """[B, 1, h, w] -> [B, 1, 1, 1]; of every fourth value or so, which is enough."""
    some = values[..., ::2, ::2].flatten(1)
    # By sorting: some devices can't pick a single value.
    return some.sort(dim=1).values[:, max(1, round(QUIET * some.shape[1])) - 1].view(-1, 1, 1, 1)


def _twice(values: torch.Tensor) -> torch.Tensor:
    return F.interpolate(values, scale_factor=2, mode="bilinear", align_corners=False)


def _far(difference: torch.Tensor) -> torch.Tensor:
    """What of it is still seen from afar [B, C, H / FAR, W / FAR]."""
    return F.avg_pool2d(difference, FAR, ceil_mode=True, count_include_pad=False)


@dataclass
class Reference:
    """Pictures [B, 3, M, h, w] of any size, one every `step` frames of the full rate; the last one stays."""

    pictures: torch.Tensor
    step: int

    def place(self, time: int) -> int:
        return min(time // self.step, self.pictures.shape[2] - 1)

    def at(self, times: list[int], size: tuple[int, int], device: torch.device | None) -> torch.Tensor:
        """[len(times) * B, 3, height / 2, width / 2], time by time, for frames of this even size."""
        some = torch.cat([self.pictures[:, :, self.place(time)].float() for time in times])
        half = (size[0] // 2, size[1] // 2)
        if tuple(some.shape[-2:]) != half:
            some = F.interpolate(some, size=half, mode="bicubic", antialias=True, align_corners=False)
        return some.to(device).contiguous().clamp(0, 1)

    @cached_property
    def bad(self) -> list[int]:
        """The places of pictures in which some value is no number."""
        return bad_frames(self.pictures)

    def is_known(self, time: int) -> bool:
        return self.place(time) not in self.bad


@dataclass
class Comparison:
    """What the reference says against the keyframes: of each by its time the shift in pixels and `unlike`, over a batch."""

    shifts: dict[int, float] = field(default_factory=dict)
    unlike: dict[int, float] = field(default_factory=dict)
    # Pictures of all items together.
    followed: int = 0
    # Items of the batch whose reference is late, by so many frames; the largest `lag` of all.
    late: dict[int, int] = field(default_factory=dict)
    lag: float = 0.0

    def note(self, times: list[int], ends: Keyframe) -> torch.Tensor:
        """`unlike` of the keyframes at these times [len(times), B], on the CPU. Late items are told of elsewhere."""
        shifts = 2 * ends.shift.square().sum(dim=1).mean(dim=(1, 2)).sqrt()
        # One look at the device for all of them.
        shifts, unlike = torch.stack((shifts, ends.unlike)).cpu().unflatten(1, (len(times), -1))
        in_time = [item for item in range(unlike.shape[1]) if item not in self.late]
        self.shifts |= dict(zip(times, shifts[:, in_time].amax(dim=1).tolist(), strict=True))
        self.unlike |= dict(zip(times, unlike[:, in_time].amax(dim=1).tolist(), strict=True))
        return unlike

    @property
    def disagreeing(self) -> list[int]:
        return [time for time, share in self.unlike.items() if share > UNLIKE]


# The place of a keyframe, and the times from there to the next.
Gap = tuple[int, list[int]]
# The pictures at these rising times, made of the keyframes alone, of the items of the batch at these places.
Blind = Callable[[list[int], list[int]], Iterator[torch.Tensor]]


def follow(
    clip: torch.Tensor,
    stride: int,
    reference: Reference,
    wanted: list[int],
    blind: Blind,
    comparison: Comparison,
    device: torch.device | None = None,
) -> Iterator[tuple[int, torch.Tensor]]:
    """Yields (time, picture [B, C, H, W]) for `wanted` times, rising, of a clip [B, C, N, H, W] of every stride-th frame.

    Keyframes are handed on as they are, bit for bit. `blind` makes the pictures of which the reference tells nothing, and
    those beside keyframes that it is unlike; `comparison` is filled as the work goes on.
    """
    (height, width), last = clip.shape[-2:], clip.shape[2] - 1
    size = (height + height % 2, width + width % 2)

    def pictures(places: list[int]) -> torch.Tensor:
        # Frames have their channels last: one by one they are copied in one piece.
        some = torch.cat([clip[:, :, k].to(device=device, dtype=torch.float32) for k in places])
        return F.pad(some.contiguous(), (0, size[1] - width, 0, size[0] - height), mode="replicate")

    def references(times: list[int]) -> torch.Tensor:
        return reference.at(times, size, device)

    def pairs(places: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        a, b = (F.avg_pool2d(pictures([k + offset for k in places]), 2).nan_to_num() for offset in (0, 1))
        return a, b

    bad = bad_frames(clip)
    is_known = [reference.is_known(k * stride) and k not in bad for k in range(last + 1)]
    whole = [k for k in range(last + 1) if is_known[k]]
    upsample = _fitted(whole, pictures, references, stride, device)
    late, lag = _lag(whole, pictures, reference, references, stride, upsample)
    is_late = lag > LAG
    comparison.lag = float(lag.max())
    comparison.late = {item: int(late[item]) for item in is_late.nonzero().flatten().tolist()}
    batch = len(clip)
    together = gaps_at_once(clip.shape)
    cuts = Cuts(pairs, last + 1, together)
    ends: dict[int, Keyframe] = {}
    unlike: dict[int, torch.Tensor] = {}

    def told(gap: Gap) -> tuple[int, ...]:
        """When the reference tells what happens in a gap, counted from its start."""
        place, times = gap
        if is_late.all() or not (is_known[place] and is_known[min(place + 1, last)]):
            return ()
        return tuple(time - place * stride for time in times if time % stride and reference.is_known(time))

    by_gap = (
        (gap, list(times))
        for gap, times in groupby(wanted, lambda time: max(0, min(time // stride, last - 1)))
    )
    for gaps, offsets in _alike(by_gap, told, together):
        places = [place for place, _ in gaps]
        if offsets:
            needed = sorted({place + end for place in places for end in (0, 1)})
            ends = {k: ends[k] for k in needed if k in ends}
            news = [k for k in needed if k not in ends]
            new = keyframe(pictures(news), references([k * stride for k in news]), upsample)
            ends |= dict(zip(news, new.split(batch), strict=True))
            unlike |= dict(zip(news, comparison.note([k * stride for k in news], new), strict=True))
        is_unlike = torch.zeros(len(gaps), batch, dtype=torch.bool)
        if offsets:
            is_unlike = torch.stack([torch.maximum(unlike[k], unlike[k + 1]) > UNLIKE for k in places])
            is_unlike |= is_late
        guided = [k for k, all_unlike in zip(places, is_unlike.all(dim=1), strict=True) if not all_unlike]
        guided = guided if offsets else []
        comparison.followed += len(offsets) * int((~is_unlike).sum())
        some_unlike = dict(zip(places, is_unlike.any(dim=1).tolist(), strict=True))
        blindly = [
            time
            for place, times in gaps
            for time in times
            if time % stride and (time % stride not in offsets or some_unlike[place])
        ]
        items = is_unlike.any(dim=0).nonzero().flatten().tolist()
        if any(time % stride not in offsets for time in blindly):
            items = list(range(batch))
        # Made as they are asked for, in this order.
        made, are_made = iter(blind(blindly, items) if blindly else ()), set(blindly)
        followed: Iterator[tuple[int, torch.Tensor]] = iter(())
        if guided:
            is_cut = torch.cat(cuts.after(guided))
            both = joined([ends[k] for k in guided]), joined([ends[k + 1] for k in guided])
            followed = _in_gaps(both, guided, stride, offsets, references, is_cut, upsample)
        done: dict[int, torch.Tensor] = {}
        # One by one, so that the work can be stopped between them.
        for place, times in gaps:
            for time in times:
                if not time % stride:
                    yield time, clip[:, :, time // stride]
                    continue
                if time % stride not in offsets or place not in guided:
                    yield time, next(made)
                    continue
                while time not in done:
                    offset, pictures_there = next(followed)
                    shown = pictures_there[..., :height, :width].clamp(0, 1)
                    shown = shown.contiguous(memory_format=torch.channels_last).to(clip)
                    done |= {
                        k * stride + offset: one for k, one in zip(guided, shown.split(batch), strict=True)
                    }
                picture = done.pop(time)
                if time in are_made:
                    is_blind = is_unlike[places.index(place)]
                    picture[is_blind.to(picture.device)] = next(made)[is_blind[items].to(picture.device)]
                yield time, picture


def _alike(
    gaps: Iterable[Gap], told: Callable[[Gap], tuple[int, ...]], at_once: int
) -> Iterator[tuple[list[Gap], tuple[int, ...]]]:
    """Gaps that follow each other and of which the same is `told`, so many at once, and what that is."""
    for what, group in groupby(gaps, told):
        alike = list(group)
        yield from ((alike[i : i + at_once], what) for i in range(0, len(alike), at_once))


def _in_gaps(
    ends: tuple[Keyframe, Keyframe],
    gaps: list[int],
    stride: int,
    offsets: tuple[int, ...],
    references: Callable[[list[int]], torch.Tensor],
    is_cut: torch.Tensor,
    upsample: Upsampler,
) -> Iterator[tuple[int, torch.Tensor]]:
    """(offset, pictures of all gaps) between both ends [len(gaps) * B, ...] of each.

    Across a cut [len(gaps) * B] no blind picture is asked for: each shows what one end alone has.
    """
    batch, device = len(is_cut), ends[0].small.device
    forth, back = _blind_flows(ends)
    may_be_blind = ~is_cut.to(device).view(-1, 1, 1, 1)
    together = max(1, PIXELS_AT_ONCE // ends[0].small[:, 0].numel())
    for some in (offsets[i : i + together] for i in range(0, len(offsets), together)):
        shown = references([gap * stride + offset for offset in some for gap in gaps])
        theirs = torch.cat([end.reference.repeat(len(some), 1, 1, 1) for end in ends])
        to_ends = estimate_motion(torch.cat((shown, shown)), theirs, GAIN, REACH).chunk(2)
        rows = zip(some, shown.split(batch), *(flow.split(batch) for flow in to_ends), strict=True)
        for offset, picture, to_first, to_second in rows:
            share = offset / stride
            way = way_at(forth, back, share, 2.0)
            flows = (to_first, to_second)
            yield offset, picture_at(picture, share, ends, flows, way, may_be_blind, upsample)


def _blind_flows(ends: tuple[Keyframe, Keyframe]) -> tuple[torch.Tensor, torch.Tensor]:
    """From each end to the other, of the reference's size: searched there, and refined on the full pictures."""
    smalls, pictures = ([getattr(end, name) for end in ends] for name in ("small", "picture"))
    flows = estimate_motion(torch.cat(smalls), torch.cat(smalls[::-1]), reach=REACH).chunk(2)
    forth, back = (
        resized(refined(a, b, resized(flow, a.shape[-2:])), flow.shape[-2:])
        for a, b, flow in zip(pictures, pictures[::-1], flows, strict=True)
    )
    return forth, back


def _fitted(
    places: list[int],
    pictures: Callable[[list[int]], torch.Tensor],
    references: Callable[[list[int]], torch.Tensor],
    stride: int,
    device: torch.device | None,
) -> Upsampler:
    upsample = Upsampler()
    for k in _some(places):
        upsample.learn(references([k * stride]), pictures([k]))
    if places:
        upsample.fit(device)
    return upsample


def _some(places: list[int]) -> list[int]:
    return places[:: -(-len(places) // FITTED) or 1]


def _lag(
    places: list[int],
    pictures: Callable[[list[int]], torch.Tensor],
    reference: Reference,
    references: Callable[[list[int]], torch.Tensor],
    stride: int,
    upsample: Upsampler,
) -> tuple[torch.Tensor, torch.Tensor]:
    """By how many frames the reference seems late [B], and how many times less of the keyframes it would leave if moved [B].

    A damaged reference still fits best at its own time, and where all stands still it fits as well at any.
    """
    moves = [step * reference.step for step in range(-EARLIER, EARLIER + 1) if step]
    gains, votes, voters, agreeing = (torch.zeros(len(moves), len(reference.pictures)) for _ in range(4))
    end = (reference.pictures.shape[2] - 1) * reference.step
    count = min(len(places), FITTED)
    # From all over the clip, and as many as may be, so that each weighs little.
    for k in (places[i * len(places) // count] for i in range(count)):
        small, time = F.avg_pool2d(pictures([k]), 2), k * stride
        some = [
            i for i, move in enumerate(moves) if 0 <= time + move <= end and reference.is_known(time + move)
        ]
        left = torch.stack(
            [
                _mean_square(upsample.levelled(references([at])) - small)
                for at in (time, *(time + moves[i] for i in some))
            ]
        )
        # One look at the device for each keyframe.
        left = (left.cpu() + (STEP / 4) ** 2).log()
        gain = left[:1] - left[1:]
        gains[some] += gain
        votes[some] += gain.clamp(-VOTE, VOTE)
        voters[some] += 1
        agreeing[some] += (gain > math.log(LAG) / 2).float()
    best = (gains / voters.clamp(min=1)).argmax(dim=0, keepdim=True)
    decides = (agreeing > 1) | (voters < 3)
    lag = (votes / voters.clamp(min=1) * decides).gather(0, best).exp()
    return torch.tensor(moves)[best[0]], lag[0]


def gaps_at_once(shape: tuple[int, ...]) -> int:
    """How many gaps of a clip [B, C, N, H, W] go together: one of a large clip."""
    return max(1, PLACES_AT_ONCE // (shape[0] * shape[-2] * shape[-1]))


def memory_used(shape: tuple[int, ...]) -> int:
    """Bytes on the device for following a reference through a clip [B, C, N, H, W]."""
    batch, channels, frames, height, width = shape
    places = batch * height * width * max(1, min(frames - 1, gaps_at_once(shape)))
    together = max(1, PIXELS_AT_ONCE // max(1, places // 4)) * places / 4
    return round(
        4
        * (
            places * (NUMBERS_PER_CHANNEL * channels + 8)
            + together * (6 * channels + 30)
            + 5 * NUMBERS_AT_ONCE
        )
    )
