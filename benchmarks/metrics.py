"""What a clip is judged by besides the probe. Pixels are [B, F, h, w] in 0..1; each figure is one per clip."""

from __future__ import annotations

import torch

# Video frames in every latent frame but the first.
LATENT_FRAME = 8


def psnr(pixels: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """[B] peak signal-to-noise ratio in dB."""
    error = (pixels - reference).square().mean(dim=(1, 2, 3))
    return -10 * error.clamp(min=1e-10).log10()


def drift(pixels: torch.Tensor) -> torch.Tensor:
    """[B] Wasserstein distance of the grey values of the first frame and the last latent frame (8 frames).

    Shapes that move keep their grey values; shapes that come, go or change do not.
    """
    first = pixels[:, :1].flatten(2).sort(dim=2).values
    last = pixels[:, -LATENT_FRAME:].flatten(2).sort(dim=2).values
    return (last - first).abs().mean(dim=(1, 2))


def acceleration(pixels: torch.Tensor) -> torch.Tensor:
    """[B] mean absolute second difference along time: jitter raises it, smoothing lowers it."""
    return (pixels[:, 2:] - 2 * pixels[:, 1:-1] + pixels[:, :-2]).abs().mean(dim=(1, 2, 3))
