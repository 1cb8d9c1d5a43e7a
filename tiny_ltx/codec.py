"""A parameter-free causal codec with LTX's compression: 8 frames x 4 x 4 pixels <-> 128 channels.

An orthonormal DCT of each block, exactly invertible. Clips of 32 or 64 pixels to a side are shown as images of 256 or
512, so that a latent token covers 32 x 32 image pixels as in LTX. No ComfyUI import.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from einops import rearrange, repeat

FRAMES = 8
BLOCK = 4
CHANNELS = FRAMES * BLOCK * BLOCK
ZOOM = 8
MEAN = 0.45
# How many of the strongest channels training keeps, by the pixels to a side of the clip (spread.py tells what they hold).
SIGNAL_CHANNELS = {32: 64, 64: 112}
_POWER = 0.4
# How loud latents are beside noise. Frames of LTX-2 have some hundred tokens, each with 128 channels as loud as noise: at the
# noise level where a second stage begins the picture is still known. These have few tokens, of which few channels are loud.
_LOUDNESS = 2.0

# Root mean square of each DCT coefficient over training clips of both sizes, as spread.py prints it; one row per temporal
# frequency, then y, x.
_SPREAD = """
1.140 0.314 0.112 0.048 0.301 0.125 0.069 0.034 0.108 0.057 0.041 0.023 0.048 0.025 0.019 0.014
0.331 0.145 0.075 0.036 0.138 0.084 0.063 0.034 0.068 0.047 0.039 0.024 0.033 0.023 0.019 0.013
0.172 0.092 0.059 0.031 0.088 0.062 0.054 0.030 0.052 0.039 0.036 0.022 0.029 0.020 0.018 0.013
0.110 0.064 0.046 0.026 0.063 0.046 0.040 0.024 0.042 0.031 0.029 0.018 0.025 0.017 0.015 0.011
0.076 0.048 0.037 0.024 0.049 0.037 0.033 0.020 0.036 0.027 0.025 0.016 0.023 0.016 0.014 0.010
0.059 0.039 0.032 0.021 0.041 0.032 0.031 0.019 0.031 0.025 0.024 0.015 0.021 0.014 0.013 0.009
0.048 0.033 0.027 0.018 0.035 0.028 0.028 0.017 0.028 0.021 0.023 0.014 0.019 0.012 0.012 0.009
0.043 0.030 0.023 0.017 0.034 0.025 0.024 0.016 0.025 0.018 0.018 0.013 0.017 0.012 0.011 0.008
"""


def _dct(n: int) -> torch.Tensor:
    """[n, n] float64 orthonormal DCT-II, one row per frequency."""
    k = torch.arange(n, dtype=torch.float64)[:, None]
    i = torch.arange(n, dtype=torch.float64)[None]
    basis = torch.cos(math.pi * (2 * i + 1) * k / (2 * n)) * math.sqrt(2 / n)
    basis[0] /= math.sqrt(2)
    return basis


class Codec(torch.nn.Module):
    """Pixels [B, 1, F, h, w] in 0..1 <-> latent [B, 128, T, h/4, w/4] with F = 8 (T - 1) + 1.

    The first latent frame holds one video frame, as if it had stood still for eight. A channel's spread is the
    coefficient's own, relative to the strongest, to the power 0.4: strong channels stay the louder ones, but
    weak ones are not lost in the noise.
    """

    analysis: torch.Tensor
    synthesis: torch.Tensor
    gain: torch.Tensor

    def __init__(self, zoom: int = ZOOM) -> None:
        super().__init__()
        self.zoom = zoom
        time, space = _dct(FRAMES), _dct(BLOCK)
        basis = torch.einsum("at,by,cx->abctyx", time, space, space).reshape(CHANNELS, CHANNELS)
        spread = torch.tensor([float(s) for s in _SPREAD.split()], dtype=torch.float64)
        gain = _LOUDNESS * (spread / spread.max()) ** _POWER / spread
        self.register_buffer("gain", gain.float(), persistent=False)
        self.register_buffer("analysis", (basis * gain[:, None]).float(), persistent=False)
        self.register_buffer("synthesis", (basis / gain[:, None]).float(), persistent=False)

    def signal(self, size: int) -> torch.Tensor:
        """[1, 128, 1, 1, 1]: 1 for the channels that training keeps of clips with so many pixels to a side."""
        spread = torch.tensor([float(s) for s in _SPREAD.split()], dtype=torch.float64)
        # Still channels carry the first frame, so they count as signal whatever their rank.
        spread[: BLOCK * BLOCK] = torch.inf
        kept = torch.zeros(CHANNELS, device=self.gain.device)
        kept[spread.argsort(descending=True)[: SIGNAL_CHANNELS[size]].to(kept.device)] = 1
        return kept.view(1, CHANNELS, 1, 1, 1)

    def encode_pixels(self, pixels: torch.Tensor) -> torch.Tensor:
        """Pixels [B, 1, F, h, w] -> latent [B, 128, T, h/4, w/4]; frames beyond 8 (T - 1) + 1 are cut off."""
        frames = (pixels.shape[2] - 1) // FRAMES * FRAMES + 1
        pixels = pixels[:, 0, :frames].to(self.analysis.dtype) - MEAN
        pixels = torch.cat([repeat(pixels[:, :1], "b 1 h w -> b t h w", t=FRAMES - 1), pixels], dim=1)
        blocks = rearrange(pixels, "b (T t) (H y) (W x) -> b T H W (t y x)", t=FRAMES, y=BLOCK, x=BLOCK)
        return rearrange(blocks @ self.analysis.T, "b T H W c -> b c T H W")

    def decode_pixels(self, latent: torch.Tensor) -> torch.Tensor:
        """Latent [B, 128, T, H, W] -> pixels [B, 1, 8 (T - 1) + 1, 4H, 4W], not clamped.

        Of the first block its last frame is kept: so a piece of a latent decodes to exactly the frames that the
        whole decodes to, which tiled decoding relies on.
        """
        blocks = rearrange(latent.to(self.synthesis.dtype), "b c T H W -> b T H W c") @ self.synthesis
        pixels = rearrange(blocks, "b T H W (t y x) -> b (T t) (H y) (W x)", t=FRAMES, y=BLOCK, x=BLOCK)
        return pixels[:, None, FRAMES - 1 :] + MEAN

    def encode(self, images: torch.Tensor) -> torch.Tensor:
        """Images [B, 3, F, 8h, 8w] in 0..1 -> latent [B, 128, T, h/4, w/4]; colours are averaged."""
        grey = images.to(self.analysis.dtype).mean(dim=1, keepdim=True)
        small = rearrange(grey, "b c f (h z) (w y) -> b c f h w (z y)", z=self.zoom, y=self.zoom).mean(dim=-1)
        return self.encode_pixels(small)

    def decode(self, latent: torch.Tensor) -> torch.Tensor:
        """Latent [B, 128, T, H, W] -> images [B, 3, 8 (T - 1) + 1, 32H, 32W]; each pixel becomes zoom x zoom."""
        pixels = self.decode_pixels(latent)
        return repeat(pixels, "b 1 f h w -> b c f (h z) (w y)", c=3, z=self.zoom, y=self.zoom)


def upscaled(codec: Codec, latent: torch.Tensor, factor: int = 2) -> torch.Tensor:
    """The latent [B, 128, T, factor h, factor w] of the same pictures made larger: decoded, resized, encoded."""
    pixels = codec.decode_pixels(latent)
    batch = pixels.shape[0]
    frames = rearrange(pixels, "b 1 f h w -> (b f) 1 h w")
    larger = F.interpolate(frames, scale_factor=factor, mode="bicubic", align_corners=False)
    return codec.encode_pixels(rearrange(larger, "(b f) 1 h w -> b 1 f h w", b=batch))
