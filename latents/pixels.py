"""Frames and latents through a VAE, in tiles where they are large."""

from __future__ import annotations

from typing import Any

import comfy.model_management as mm
import torch

TILE, OVERLAP = 512, 64
TILE_FRAMES, OVERLAP_FRAMES = 64, 8


def decode(vae: Any, video: torch.Tensor) -> torch.Tensor:
    """Latent video [B, C, T, h, w] -> frames [B, F, H, W, 3] in 0..1."""
    needed = vae.memory_used_decode((1, *video.shape[1:]), vae.vae_dtype)
    if needed <= mm.get_total_memory(vae.device) * 0.8:
        frames: torch.Tensor = vae.decode(video)
        return frames
    space, time = vae.spacial_compression_decode(), vae.temporal_compression_decode() or 1
    return torch.cat(
        [
            vae.decode_tiled(
                item,
                tile_x=TILE // space,
                tile_y=TILE // space,
                overlap=OVERLAP // space,
                tile_t=max(2, TILE_FRAMES // time),
                overlap_t=max(1, OVERLAP_FRAMES // time),
            )
            for item in video.split(1)
        ]
    )


def encode(vae: Any, frames: torch.Tensor) -> torch.Tensor:
    """Frames [B, F, H, W, 3] -> latent video [B, C, T, h, w]; core's encode falls back to tiles by itself."""
    return torch.cat([vae.encode(item[..., :3]) for item in frames])
