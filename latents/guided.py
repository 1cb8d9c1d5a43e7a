"""Pictures in between that follow a reference: the same clip at half the size, which shows what happens there.

Keyframes are [B, C, H, W] with even sides, reference pictures [B, C, H / 2, W / 2], all in 0..1. Both keyframes around a
picture are fetched along motion measured on the reference; where they leave something of it, its own correction is added.
Beside that stands the blind picture, made of the keyframes alone: where it fits the reference as well, it is taken.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import groupby

import torch
import torch.nn.functional as F

from .cuts import Cuts
from .interpolate import PIXELS_AT_ONCE
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
# Keyframe and reference are laid upon each other on pictures down to a quarter of this size, in wide neighbourhoods. A
# shift counts in full where it leaves less than LEFT - SURE of what differs, and not at all above LEFT.
LEVELS, STEPS, WIDE = 3, 2, 5
LEFT, SURE = 0.8, 0.1
# Fetching and mixing soften: detail above that of grain is brought nearer to what the keyframes have of it. Half of the
# power would bring the finest to it, and what is a little coarser above it.
RAISE = 0.3
LEAST_RAISED, MOST_RAISED = 0.92, 1.3
GRAIN = 2 * STEP
# What lives at the same time, at most, for every place and channel of a picture, and for every place of the smaller ones.
NUMBERS_PER_CHANNEL = 16
# A reference that leaves more than this share of a keyframe's contrast shows something else.
UNLIKE = 0.5


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

    def fit(self) -> None:
        pull = torch.full((TAPS**2 + 1,), COPYING * self._seen, dtype=torch.float64)
        # A shift of all colours costs little.
        pull[-1] /= 100
        copy = torch.zeros(4, TAPS**2 + 1, dtype=torch.float64)
        copy[:, TAPS**2 // 2] = 1.0
        squares, products = self._squares + pull.diag(), self._products + copy * pull
        self.weight = torch.linalg.solve(squares, products.mT).mT.float()

    def __call__(self, reference: torch.Tensor) -> torch.Tensor:
        """[B, C, h, w] -> [B, C, 2 h, 2 w]"""
        return F.pixel_shuffle(self._filtered(reference, self.weight).flatten(1, 2), 2)

    def levelled(self, reference: torch.Tensor) -> torch.Tensor:
        """The same, made half as large again."""
        return self._filtered(reference, self.weight.mean(dim=2, keepdim=True)).flatten(1, 2)

    def _filtered(self, reference: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        # Several pictures of each item come one after the other.
        weight = weight.to(reference.device).repeat(len(reference) // len(weight), 1, 1, 1)
        return (weight @ _patches(reference)).unflatten(3, reference.shape[-2:])


def _patches(reference: torch.Tensor) -> torch.Tensor:
    """[B, C, h, w] -> [B, C, TAPS² + 1, h w]: the neighbourhood of each pixel, and a one."""
    padded = F.pad(reference, (TAPS // 2,) * 4, mode="replicate").flatten(0, 1)[:, None]
    x = F.pad(F.unfold(padded, TAPS), (0, 0, 0, 1), value=1.0)
    return x.unflatten(0, reference.shape[:2])


@dataclass
class Keyframe:
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
    off: torch.Tensor = field(init=False)
    low: torch.Tensor = field(init=False)
    detail: torch.Tensor = field(init=False)
    unlike: torch.Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.off = F.avg_pool2d(self.enlarged, 2) - self.small
        self.low = _far(self.picture - self.enlarged)
        self.detail = _far(fine(self.picture).square().mean(dim=1, keepdim=True))
        contrast = self.small - box(self.small, FAR)
        self.unlike = _mean_square(self.off) / (_mean_square(contrast) + STEP**2)


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
    return Keyframe(picture, reference, small, shift, aligned, upsample(aligned))


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
    enlarged = upsample(reference)
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
    takes = takes * may_be_blind
    out = torch.lerp(out, along(ends[0].picture, ends[1].picture, way.enlarged(size)), _twice(takes))
    return _sharpened(out, ends, flows, weights)


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

    def is_known(self, times: list[int]) -> bool:
        return bool(self.pictures[:, :, [self.place(time) for time in times]].isfinite().all())


@dataclass
class Comparison:
    """What the reference says against the keyframes: of each by its time the shift in pixels and `unlike`, over a batch."""

    shifts: dict[int, float] = field(default_factory=dict)
    unlike: dict[int, float] = field(default_factory=dict)
    # Pictures of all items together.
    followed: int = 0

    def note(self, time: int, end: Keyframe) -> None:
        self.shifts[time] = float(2 * end.shift.square().sum(dim=1).mean(dim=(1, 2)).sqrt().max())
        self.unlike[time] = float(end.unlike.max())

    @property
    def disagreeing(self) -> list[int]:
        return [time for time, share in self.unlike.items() if share > UNLIKE]


# The pictures at these times, all within one gap, made of the keyframes alone [B, C, H, W].
Blind = Callable[[list[int]], dict[int, torch.Tensor]]


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

    is_known = [
        reference.is_known([k * stride]) and bool(clip[:, :, k].isfinite().all()) for k in range(last + 1)
    ]
    upsample = _fitted([k for k in range(last + 1) if is_known[k]], pictures, references, stride)
    cuts = Cuts(pairs, last + 1, 1)
    ends: dict[int, Keyframe] = {}
    for gap, group in groupby(wanted, key=lambda time: min(time // stride, last - 1)):
        times, start = list(group), gap * stride
        missing = [time for time in times if start < time < start + stride]
        known = [time for time in missing if reference.is_known([time])]
        is_unlike = torch.tensor(True)
        if known and is_known[gap] and is_known[gap + 1]:
            ends = {k: ends[k] for k in ends if k >= gap}
            for k in {gap, gap + 1} - ends.keys():
                ends[k] = keyframe(pictures([k]), references([k * stride]), upsample)
                comparison.note(k * stride, ends[k])
            is_unlike = torch.maximum(ends[gap].unlike, ends[gap + 1].unlike).cpu() > UNLIKE
        guided = [] if is_unlike.all() else known
        comparison.followed += len(guided) * int((~is_unlike).sum())
        blindly = missing if is_unlike.any() else [time for time in missing if time not in guided]
        made = blind(blindly) if blindly else {}
        followed: Iterator[tuple[int, torch.Tensor]] = iter(())
        if guided:
            is_cut = cuts.after([gap])[0]
            followed = _in_gap(
                (ends[gap], ends[gap + 1]), start, stride, guided, references, is_cut, upsample
            )
        # One by one, so that the work can be stopped between them.
        for time in times:
            if time not in missing:
                yield time, clip[:, :, time // stride]
                continue
            if time in guided:
                picture = next(followed)[1][..., :height, :width].clamp(0, 1)
                picture = picture.contiguous(memory_format=torch.channels_last).to(clip)
                where = is_unlike.view(-1, 1, 1, 1).to(picture.device)
                made[time] = torch.where(where, made[time], picture) if time in made else picture
            yield time, made.pop(time)


def _in_gap(
    ends: tuple[Keyframe, Keyframe],
    start: int,
    stride: int,
    times: list[int],
    references: Callable[[list[int]], torch.Tensor],
    is_cut: torch.Tensor,
    upsample: Upsampler,
) -> Iterator[tuple[int, torch.Tensor]]:
    """(time, picture) between both ends. Across a cut [B] no blind picture is asked for: each shows what one end alone has."""
    batch, device = len(is_cut), ends[0].small.device
    smalls = [end.small for end in ends]
    forth, back = estimate_motion(torch.cat(smalls), torch.cat(smalls[::-1]), reach=REACH).chunk(2)
    may_be_blind = ~is_cut.to(device).view(-1, 1, 1, 1)
    together = max(1, PIXELS_AT_ONCE // smalls[0][:, 0].numel())
    for some in (times[i : i + together] for i in range(0, len(times), together)):
        shown = references(some)
        theirs = torch.cat([end.reference.repeat(len(some), 1, 1, 1) for end in ends])
        to_ends = estimate_motion(torch.cat((shown, shown)), theirs, GAIN, REACH).chunk(2)
        rows = zip(some, shown.split(batch), *(flow.split(batch) for flow in to_ends), strict=True)
        for time, picture, to_first, to_second in rows:
            share = (time - start) / stride
            way = way_at(forth, back, share, 2.0)
            flows = (to_first, to_second)
            yield time, picture_at(picture, share, ends, flows, way, may_be_blind, upsample)


def _fitted(
    places: list[int],
    pictures: Callable[[list[int]], torch.Tensor],
    references: Callable[[list[int]], torch.Tensor],
    stride: int,
) -> Upsampler:
    upsample = Upsampler()
    for k in places[:: -(-len(places) // FITTED) or 1]:
        upsample.learn(references([k * stride]), pictures([k]))
    if places:
        upsample.fit()
    return upsample


def memory_used(shape: tuple[int, ...]) -> int:
    """Bytes on the device for following a reference through a clip [B, C, N, H, W]."""
    batch, channels, _, height, width = shape
    places = batch * height * width
    together = max(1, PIXELS_AT_ONCE // max(1, places // 4)) * places / 4
    return round(
        4
        * (
            places * (NUMBERS_PER_CHANNEL * channels + 8)
            + together * (6 * channels + 30)
            + 5 * NUMBERS_AT_ONCE
        )
    )
