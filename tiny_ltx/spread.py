"""Measures how far each channel of the codec spreads over training clips, and what is left of pictures with some of them.

    python -m tiny_ltx.spread

prints the table of codec.py and, for each size, how many channels keep how much. No ComfyUI import.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from .clips import FPS_RANGE, FULL, SMALL, draw_clips
from .codec import BLOCK, CHANNELS, FRAMES, MEAN, Codec

CLIPS, LATENT_FRAMES = 256, 5


def fine(pixels: torch.Tensor) -> torch.Tensor:
    """What a blur over three pixels takes from pictures [..., h, w]."""
    flat = pixels.flatten(0, -3)[:, None]
    blurred = F.avg_pool2d(F.pad(flat, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
    return (flat - blurred).view_as(pixels)


def main() -> None:
    codec = Codec(zoom=1)
    squares = []
    for size in (SMALL, FULL):
        pixels = draw_clips(
            CLIPS, LATENT_FRAMES, torch.Generator().manual_seed(3), FPS_RANGE, size=size
        ).pixels
        latent = codec.encode_pixels(pixels[:, None])
        # The gain is taken off again; still first frames would count eightfold.
        plain = latent[:, :, 1:] / codec.gain.view(1, -1, 1, 1, 1)
        square = plain.square().mean(dim=(0, 2, 3, 4))
        squares.append(square)
        is_still = torch.arange(CHANNELS) < BLOCK * BLOCK
        rank = torch.where(is_still, torch.inf, square).argsort(descending=True)
        for kept in (32, 48, 64, 80, 96, 112, 128):
            mask = torch.zeros(CHANNELS)
            mask[rank[:kept]] = 1
            shown = codec.decode_pixels(latent * mask.view(1, -1, 1, 1, 1))[:, 0]
            energy = 1 - (shown - pixels).square().mean() / (pixels - MEAN).square().mean()
            detail = fine(shown).square().mean() / fine(pixels).square().mean()
            print(f"{size} px, {kept} channels: energy {energy:.4f}, detail {detail:.4f}")
    spread = torch.stack(squares).mean(dim=0).sqrt().view(FRAMES, CHANNELS // FRAMES)
    print("\n".join(" ".join(f"{value:.3f}" for value in row) for row in spread.tolist()))


if __name__ == "__main__":
    main()
