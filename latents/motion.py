"""Motion between two pictures without any weights, and pictures in between.

Pictures are [B, C, H, W] of any channels, flows [B, 2, H, W] in pixels, x before y: a(p) is found again at b(p + flow).
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch
import torch.nn.functional as F

# Above this many pixels motion is estimated on a smaller picture.
WORKING_PIXELS = 512 * 512
# So many numbers are matched at a time, all changes, pictures and channels together.
NUMBERS_AT_ONCE = 3 * 2**21
# Shorter side of the coarsest picture of the pyramid.
COARSEST = 8
# Whole-pixel search around the coarser level's motion, and refinements after it.
RADIUS = 2
REFINEMENTS = 2
# The pull towards standing still, as a share of the picture's contrast.
STILLNESS = 0.01
# A motion must leave less of the difference between two blocks than this share, or they stand still.
GAIN = 0.7


def warp(picture: torch.Tensor, flow: torch.Tensor, mode: str = "bilinear") -> torch.Tensor:
    """picture(p + flow), edges repeated."""
    x, y = _grid(flow)
    height, width = flow.shape[-2:]
    if not _has_grid_sample(picture.device.type, mode):
        return sampled(picture, x + flow[:, 0], y + flow[:, 1], mode)
    grid = torch.stack(
        ((x + flow[:, 0]) * (2 / max(width - 1, 1)) - 1, (y + flow[:, 1]) * (2 / max(height - 1, 1)) - 1), -1
    )
    return F.grid_sample(picture, grid, mode=mode, padding_mode="border", align_corners=True)


@cache
def _has_grid_sample(device: str, mode: str) -> bool:
    """Whether this kind of device can do what `warp` asks of it: on Macs it depends on the release of PyTorch."""
    picture, grid = torch.zeros(1, 1, 2, 2, device=device), torch.zeros(1, 1, 1, 2, device=device)
    try:
        F.grid_sample(picture, grid, mode=mode, padding_mode="border", align_corners=True)
    except RuntimeError:
        return False
    return True


def sampled(picture: torch.Tensor, x: torch.Tensor, y: torch.Tensor, mode: str) -> torch.Tensor:
    """`picture` [B, C, H, W] at places x, y [B, h, w] in pixels, edges repeated: what F.grid_sample makes of it, by gathering."""
    batch, channels, height, width = picture.shape
    # Two pixels outside nothing but the edge is left to see.
    x, y = x.clamp(-2, width + 1), y.clamp(-2, height + 1)
    left, top = x.floor(), y.floor()
    out = picture.new_zeros(batch, channels, *x.shape[1:])
    for down, share_y in _taps(y - top, mode):
        row = (top + down).long().clamp(0, height - 1) * width
        for right, share_x in _taps(x - left, mode):
            index = (row + (left + right).long().clamp(0, width - 1)).flatten(1)
            values = picture.flatten(2).gather(2, index[:, None].expand(-1, channels, -1))
            out += values.view_as(out) * (share_x * share_y)[:, None]
    return out


def _taps(t: torch.Tensor, mode: str) -> list[tuple[int, torch.Tensor]]:
    """Pixels beside a place that lies t behind one of them, with their shares; bicubic as PyTorch, with a = -0.75."""
    if mode == "bilinear":
        return [(0, 1 - t), (1, t)]

    def near(d: torch.Tensor) -> torch.Tensor:
        return (1.25 * d - 2.25) * d * d + 1

    def far(d: torch.Tensor) -> torch.Tensor:
        return -0.75 * (((d - 5) * d + 8) * d - 4)

    return [(-1, far(t + 1)), (0, near(t)), (1, near(1 - t)), (2, far(2 - t))]


def _grid(flow: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    height, width = flow.shape[-2:]
    x = torch.arange(width, device=flow.device, dtype=flow.dtype)
    y = torch.arange(height, device=flow.device, dtype=flow.dtype)
    return x.expand(height, width), y[:, None].expand(height, width)


def estimate_motion(
    a: torch.Tensor, b: torch.Tensor, gain: float = GAIN, reach: int = RADIUS
) -> torch.Tensor:
    """Flow from a to b: overlapping blocks are matched from coarse to fine, then refined by their gradients.

    Where nothing tells of a motion, the answer is to stand still: a motion must leave less than `gain` of the difference.
    """
    height, width = a.shape[-2:]
    a, b = a.float(), b.float()
    a, b = reduced(a), reduced(b)
    pyramid = [(a, b)]
    while min(pyramid[-1][0].shape[-2:]) >= 2 * COARSEST:
        a, b = (F.avg_pool2d(p, 2, ceil_mode=True) for p in (a, b))
        pyramid.append((a, b))
    flow = a.new_zeros(a.shape[0], 2, *a.shape[-2:])
    for small_a, small_b in reversed(pyramid):
        flow = resized(flow, small_a.shape[-2:])
        radius = reach if small_a is pyramid[0][0] else RADIUS
        flow = _median(_matched(small_a, small_b, flow, radius))
        for _ in range(REFINEMENTS):
            flow = refined(small_a, small_b, flow)
        flow = _median(flow)
    still, moved = (box(_difference(small_a, end)) for end in (small_b, warp(small_b, flow, "bicubic")))
    return resized(flow * (moved < gain * still), (height, width))


def reduced(picture: torch.Tensor) -> torch.Tensor:
    """The same picture with no more than about WORKING_PIXELS."""
    scale = _reduction(*picture.shape[-2:])
    return F.avg_pool2d(picture, scale, ceil_mode=True) if scale > 1 else picture


def reduced_size(height: int, width: int) -> tuple[int, int]:
    scale = _reduction(height, width)
    return -(-height // scale), -(-width // scale)


def _reduction(height: int, width: int) -> int:
    scale = 1
    while height * width // scale**2 > WORKING_PIXELS:
        scale *= 2
    return scale


def resized(flow: torch.Tensor, size: tuple[int, int] | torch.Size) -> torch.Tensor:
    """The same motion on a picture of another size."""
    if tuple(flow.shape[-2:]) == tuple(size):
        return flow
    # By numbers, for which the device need not wait as it must for a tensor from the host.
    down, right = size[0] / flow.shape[-2], size[1] / flow.shape[-1]
    x, y = F.interpolate(flow, size=tuple(size), mode="bilinear", align_corners=False).split(1, dim=1)
    return torch.cat((x * right, y * down), dim=1)


def box(values: torch.Tensor, radius: int = 2) -> torch.Tensor:
    padded = F.pad(values, (radius,) * 4, mode="replicate")
    return F.avg_pool2d(padded, 2 * radius + 1, stride=1)


def _contrast(picture: torch.Tensor) -> torch.Tensor:
    return picture.flatten(1).std(dim=1).view(-1, 1, 1, 1)


def _difference(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Mean absolute difference over channels [B, 1, H, W]."""
    return (a - b).abs().mean(dim=1, keepdim=True)


def _length(flow: torch.Tensor) -> torch.Tensor:
    return flow.square().sum(dim=1, keepdim=True).sqrt()


def _matched(a: torch.Tensor, b: torch.Tensor, flow: torch.Tensor, radius: int) -> torch.Tensor:
    """The best of all whole-pixel changes up to `radius` around `flow`."""
    along = torch.arange(-radius, radius + 1, device=flow.device, dtype=flow.dtype)
    shifts = torch.cartesian_prod(along, along).flip(1)
    # Dearer with distance, so that an empty block stays where it is.
    pull = STILLNESS * _contrast(a)
    costs = []
    for some in shifts.split(max(1, NUMBERS_AT_ONCE // a.numel())):
        moved = (flow[:, None] + some.view(1, -1, 2, 1, 1)).flatten(0, 1)
        ends, begins, pulls = (part.repeat_interleave(len(some), 0) for part in (b, a, pull))
        cost = box(_difference(begins, warp(ends, moved))) + pulls * (1 + _length(moved)).log()
        costs.append(cost.view(len(flow), len(some), *flow.shape[-2:]))
    best = torch.cat(costs, dim=1).argmin(dim=1)
    return flow + shifts[best].movedim(-1, 1)


def refined(a: torch.Tensor, b: torch.Tensor, flow: torch.Tensor, radius: int = 2) -> torch.Tensor:
    """One Gauss-Newton step of every block (Lucas and Kanade, 1981), pulled towards standing still."""
    moved = warp(b, flow, "bicubic")
    mean = (a + moved) / 2
    padded = F.pad(mean, (1, 1, 1, 1), mode="replicate")
    gx = (padded[:, :, 1:-1, 2:] - padded[:, :, 1:-1, :-2]) / 2
    gy = (padded[:, :, 2:, 1:-1] - padded[:, :, :-2, 1:-1]) / 2
    rest = a - moved
    xx, xy, yy, xr, yr = (
        box((p * q).mean(dim=1, keepdim=True), radius)
        for p, q in ((gx, gx), (gx, gy), (gy, gy), (gx, rest), (gy, rest))
    )
    pull = (STILLNESS * _contrast(a)).square()
    xx, yy = xx + pull, yy + pull
    xr, yr = xr - pull * flow[:, :1], yr - pull * flow[:, 1:]
    determinant = xx * yy - xy * xy + 1e-20
    step = torch.cat(((yy * xr - xy * yr) / determinant, (xx * yr - xy * xr) / determinant), dim=1)
    return flow + step.clamp(-1, 1)


def _median(flow: torch.Tensor) -> torch.Tensor:
    """Of each value and its eight neighbours, by ordering them in columns (Paeth, 1990): quicker than a sort of all."""
    height, width = flow.shape[-2:]
    padded = F.pad(flow, (1, 1, 1, 1), mode="replicate")
    rows = [padded[..., y : y + height, :] for y in range(3)]
    low, middle, high = _ordered(*rows)
    lows, middles, highs = ([part[..., x : x + width] for x in range(3)] for part in (low, middle, high))
    lowest = torch.maximum(torch.maximum(lows[0], lows[1]), lows[2])
    highest = torch.minimum(torch.minimum(highs[0], highs[1]), highs[2])
    return _ordered(lowest, _ordered(*middles)[1], highest)[1]


def _ordered(a: torch.Tensor, b: torch.Tensor, c: torch.Tensor) -> tuple[torch.Tensor, ...]:
    a, b = torch.minimum(a, b), torch.maximum(a, b)
    b, c = torch.minimum(b, c), torch.maximum(b, c)
    return torch.minimum(a, b), torch.maximum(a, b), c


class Way(NamedTuple):
    """How the picture at one time between two ends is made of them; all [B, 1, H, W] but for the flows.

    Two layers: what stands still is a plain mixture of both ends, without those places of an end that moved
    away; over it lies what moves, fetched from both ends along the motion that passes there at that time.
    """

    stays_a: torch.Tensor
    stays_b: torch.Tensor
    to_a: torch.Tensor
    to_b: torch.Tensor
    from_a: torch.Tensor
    from_b: torch.Tensor
    cover: torch.Tensor

    def enlarged(self, size: tuple[int, int] | torch.Size) -> Way:
        """The same for pictures of another size."""
        shares = torch.cat((self.stays_a, self.stays_b, self.from_a, self.from_b, self.cover), dim=1)
        shares = F.interpolate(shares, size=tuple(size), mode="bilinear", align_corners=False)
        stays_a, stays_b, from_a, from_b, cover = shares.split(1, dim=1)
        return Way(
            stays_a, stays_b, resized(self.to_a, size), resized(self.to_b, size), from_a, from_b, cover
        )


def blend(
    a: torch.Tensor, b: torch.Tensor, forth: torch.Tensor, back: torch.Tensor, t: float
) -> torch.Tensor:
    """The picture at time t in (0, 1) between a (0) and b (1), given the flows from a to b and from b to a."""
    return along(a, b, way_at(forth, back, t))


def way_at(forth: torch.Tensor, back: torch.Tensor, t: float, scale: float = 1.0) -> Way:
    """scale: how much larger the pictures are than these flows."""
    moves_a, moves_b = _is_moving(scale * forth), _is_moving(scale * back)
    # Where both ends moved away nothing is known of what lies behind; the plain mixture has to do.
    stays_a, stays_b = (1 - t) * (1 - moves_a + 1e-3), t * (1 - moves_b + 1e-3)
    landed = splat(torch.cat((moves_a, moves_a * forth), dim=1), forth * t) * (1 - t)
    landed = landed + splat(torch.cat((moves_b, moves_b * -back), dim=1), back * (1 - t)) * t
    passing = landed[:, 1:] / landed[:, :1].clamp(min=1e-6)
    to_a, to_b = -t * passing, (1 - t) * passing
    # What the other end cannot confirm is hidden there, so that this end alone knows it.
    from_a = (1 - t) * (warp(moves_a, to_a) * warp(_is_confirmed(back, forth), to_b) + 2e-2)
    from_b = t * (warp(moves_b, to_b) * warp(_is_confirmed(forth, back), to_a) + 2e-2)
    return Way(stays_a, stays_b, to_a, to_b, from_a, from_b, landed[:, :1].clamp(max=1))


def along(a: torch.Tensor, b: torch.Tensor, way: Way) -> torch.Tensor:
    still = (way.stays_a * a + way.stays_b * b) / (way.stays_a + way.stays_b)
    moving = (way.from_a * warp(a, way.to_a, "bicubic") + way.from_b * warp(b, way.to_b, "bicubic")) / (
        way.from_a + way.from_b
    )
    return way.cover * moving + (1 - way.cover) * still


def _is_moving(flow: torch.Tensor) -> torch.Tensor:
    """0 to 1 [B, 1, H, W]: for less than a pixel a plain mixture of both ends is the better in-between."""
    return (_length(flow) * 2 - 1).clamp(0, 1)


def _is_confirmed(there: torch.Tensor, back: torch.Tensor) -> torch.Tensor:
    """0 to 1 [B, 1, H, W]: whether following one flow there and the other back leads to where one was."""
    missed = _length(there + warp(back, there))
    return (1.5 - missed / (4 + 0.5 * _length(there))).clamp(0, 1)


def splat(values: torch.Tensor, flow: torch.Tensor) -> torch.Tensor:
    """Sums of `values` [B, C, H, W] carried along `flow`, each shared among the four pixels around its end."""
    batch, channels, height, width = values.shape
    x, y = _grid(flow)
    end_x, end_y = x + flow[:, 0], y + flow[:, 1]
    left, top = end_x.floor(), end_y.floor()
    out = values.new_zeros(batch, channels, height * width)
    for dx in (0, 1):
        for dy in (0, 1):
            px, py = left + dx, top + dy
            share = (1 - (end_x - px).abs()) * (1 - (end_y - py).abs())
            is_inside = (px >= 0) & (px < width) & (py >= 0) & (py < height)
            index = (py.clamp(0, height - 1) * width + px.clamp(0, width - 1)).long().view(batch, 1, -1)
            out.scatter_add_(
                2, index.expand(-1, channels, -1), (values * (share * is_inside)[:, None]).flatten(2)
            )
    return out.view(batch, channels, height, width)
