"""Frames and latents through a VAE: the whole clip, and in pieces where memory runs out."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import comfy.model_management as mm
import torch

from .stride import VIDEO_FRAMES, video_frames

# Pieces of the last resort, in pixels and video frames.
TILE, OVERLAP = 256, 64
TILE_FRAMES, OVERLAP_FRAMES = 64, 8

logger = logging.getLogger(__name__)


def decode(vae: Any, video: torch.Tensor) -> torch.Tensor:
    """Latent video [B, C, T, h, w] -> frames [B, F, H, W, 3] in 0..1. Raises ValueError for another family's VAE."""
    refuse_another_family(vae, video)
    space, time = vae.spacial_compression_decode(), vae.temporal_compression_decode()

    def in_pieces() -> torch.Tensor:
        tiles = {"tile_x": TILE // space, "tile_y": TILE // space, "overlap": OVERLAP // space}
        times = {"tile_t": max(2, TILE_FRAMES // time), "overlap_t": max(1, OVERLAP_FRAMES // time)}
        return torch.cat([vae.decode_tiled(item, **tiles, **times) for item in video.split(1)])

    frames = _unless_memory_runs_out(lambda: vae.decode(video), in_pieces)
    if frames.shape[1] != video_frames(video.shape[2]):
        raise ValueError(
            f"vae: expected {video_frames(video.shape[2])} video frames from {video.shape[2]} latent frames, got "
            f"{frames.shape[1]}. Connect the VAE that belongs to the model."
        )
    return frames


def encode(vae: Any, frames: torch.Tensor) -> torch.Tensor:
    """Frames [B, F, H, W, 3] -> latent video [B, C, T, h, w]."""

    def encoded(item: torch.Tensor) -> torch.Tensor:
        tiles = {"tile_x": TILE, "tile_y": TILE, "overlap": OVERLAP}
        times = {"tile_t": TILE_FRAMES, "overlap_t": OVERLAP_FRAMES}
        return _unless_memory_runs_out(
            lambda: vae.encode(item), lambda: vae.encode_tiled(item, **tiles, **times)
        )

    return torch.cat([encoded(item[..., :3]) for item in frames])


def refuse_another_family(vae: Any, video: torch.Tensor) -> None:
    """Raises ValueError unless `vae` makes latents like `video`, each after the first from eight video frames."""
    channels, times = getattr(vae, "latent_channels", None), vae.temporal_compression_decode()
    if channels != video.shape[1] or times != VIDEO_FRAMES:
        raise ValueError(
            f"vae: expected one that makes {video.shape[1]} channels and one latent frame of {VIDEO_FRAMES} video frames, got "
            f"{channels} channels and {times or 'no'} video frames. Connect the VAE that belongs to the model."
        )


def _unless_memory_runs_out(
    whole: Callable[[], torch.Tensor], in_pieces: Callable[[], torch.Tensor]
) -> torch.Tensor:
    """`whole()`, for which ComfyUI itself falls back to tiles in space; pieces in time, which show, come last."""
    try:
        return whole()
    except Exception as error:
        if not _is_out_of_memory(error):
            raise
    # Outside of the handler, whose traceback holds on to what the failed attempt had made.
    mm.soft_empty_cache()
    logger.warning(
        "FrameThrift: memory ran out with tiles in space too. The clip goes through the VAE in pieces of %d video frames; "
        "where they meet, a seam may show.",
        TILE_FRAMES,
    )
    return in_pieces()


def _is_out_of_memory(error: Exception) -> bool:
    # Newer releases know that some of them come as errors of the accelerator.
    is_oom = getattr(mm, "is_oom", None)
    return bool(is_oom(error)) if is_oom is not None else isinstance(error, mm.OOM_EXCEPTION)
