"""What a clip of two stages is judged by besides the probe. Pixels are [B, F, h, w] in 0..1."""

from __future__ import annotations

import importlib
from collections.abc import Iterable

from runtime import PACK  # isort: split

import torch
import torch.nn.functional as F

from tiny_ltx.spread import fine

motion = importlib.import_module(f"{PACK}.latents.motion")

# Pairs of frames in which motion is looked for lie so far apart; one begins every BEGIN frames, so that they fall
# alike on keyframes and on frames in between, whatever the stride.
APART, BEGIN = 4, 3
# Pictures in which motion is looked for at a time.
AT_ONCE = 2048
# Keyframes whose texture is followed: those of every stride up to 8.
GAP = 8
# Contrast is what a mean over so many pixels to each side of the first stage's leaves, as LatentFlowInterpolate has it.
FAR = 8
# A flow that leads back to within so many pixels saw no disocclusion.
RETURNS = 1.0


def detail(pixels: torch.Tensor) -> torch.Tensor:
    """[B, F] mean square of what a blur over three pixels takes away."""
    return fine(pixels).square().mean(dim=(2, 3))


def pulse(energy: torch.Tensor, stride: int) -> float:
    """Detail energy [B, F] of frames in between, relative to that of every `stride`-th one: 1 is even."""
    is_key = torch.arange(energy.shape[1]) % stride == 0
    return float(energy[:, ~is_key].mean() / energy[:, is_key].mean())


def strays(pixels: torch.Tensor, first: torch.Tensor, step: int = 1) -> torch.Tensor:
    """[B] the share of the shrunk clip's contrast that its first stage [B, F', h / 2, w / 2] does not explain.

    Above a half LatentFlowInterpolate takes the first stage for another clip's and does not follow it.
    """
    small = F.avg_pool2d(pixels[:, ::step], 2)
    contrast = small - motion.box(small, FAR)
    return (small - first).square().mean(dim=(1, 2, 3)) / contrast.square().mean(dim=(1, 2, 3))


def moved(pictures: torch.Tensor, by: torch.Tensor) -> torch.Tensor:
    """Pictures [..., h, w] shifted by so many pixels [..., 2], x before y, exactly: what leaves comes in at the other side."""
    height, width = pictures.shape[-2:]
    rows = torch.fft.fftfreq(height, device=pictures.device)[:, None]
    columns = torch.fft.rfftfreq(width, device=pictures.device)
    x, y = by[..., 0, None, None], by[..., 1, None, None]
    turns = -2j * torch.pi * (x * columns + y * rows)
    return torch.fft.irfft2(torch.fft.rfft2(pictures) * turns.exp(), s=(height, width))


def followed(frames: int) -> tuple[list[int], list[int]]:
    """Frames whose texture is held against a keyframe's: those in between, and the keyframes against the one before."""
    times = range(1, frames)
    return [t for t in times if t % GAP], [t for t in times if t % GAP == 0]


def slip(
    pixels: torch.Tensor, places: torch.Tensor, textured: torch.Tensor, times: Iterable[int]
) -> torch.Tensor:
    """[B] how far the texture at `times` is from that of the keyframe before, moved by the true motion.

    places [B, F, 2]: where the shape is. textured [B, F, h, w]: whether the texture lies there. Root of the squared error
    over the keyframe's own: 0 follows it, 1 shows none of it, 1.4 is another texture. No number without a texture.
    """
    times = list(times)
    keys = [(t - 1) // GAP * GAP for t in times]
    details = fine(pixels)
    wanted = moved(details[:, keys], places[:, times] - places[:, keys])
    weight = textured[:, times].to(details)
    error = (weight * (details[:, times] - wanted).square()).sum(dim=(1, 2, 3))
    return (error / (weight * wanted.square()).sum(dim=(1, 2, 3))).sqrt()


def pairs(frames: int, step: int = 1) -> list[tuple[int, int]]:
    """Pairs of frames APART from each other, of those that a clip of every `step`-th frame has."""
    return [(t, t + APART) for t in range(0, frames - APART, BEGIN) if t % step == 0]


def flows(pixels: torch.Tensor, pairs: list[tuple[int, int]], step: int = 1) -> torch.Tensor:
    """[B, P, 2, h, w] motion from the first to the second frame of each pair; pixels hold every `step`-th frame."""
    first, second = (pixels[:, [pair[i] // step for pair in pairs]].flatten(0, 1)[:, None] for i in (0, 1))
    found = [
        motion.estimate_motion(a, b) for a, b in zip(first.split(AT_ONCE), second.split(AT_ONCE), strict=True)
    ]
    return torch.cat(found).unflatten(0, (len(pixels), -1))


class Followed:
    """The motion of a first stage's frames [B, F', h, w], of which there is one every `step` frames of the clip."""

    def __init__(self, frames: torch.Tensor, length: int, step: int, size: tuple[int, int]) -> None:
        self.pairs = pairs(length, step)
        forth, back = (
            motion.resized(flows(frames, asked, step).flatten(0, 1), size)
            for asked in (self.pairs, [pair[::-1] for pair in self.pairs])
        )
        missed = (forth + motion.warp(back, forth)).square().sum(dim=1).sqrt()
        self.is_seen = (missed < RETURNS).unflatten(0, (len(frames), -1))
        self.flow = forth.unflatten(0, (len(frames), -1))

    def error(self, pixels: torch.Tensor, begins: int = 0) -> torch.Tensor:
        """[B] mean distance in pixels of the clip's motion from this one, outside disocclusions, from a frame on."""
        some = [i for i, (first, _) in enumerate(self.pairs) if first >= begins]
        off = (flows(pixels, [self.pairs[i] for i in some]) - self.flow[:, some]).square().sum(dim=2).sqrt()
        seen = self.is_seen[:, some]
        return (off * seen).sum(dim=(1, 2, 3)) / seen.sum(dim=(1, 2, 3)).clamp(min=1)
