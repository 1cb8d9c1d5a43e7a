"""Frames and latents through a VAE: the whole clip, and in pieces where memory runs out."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import comfy.model_management as mm
import torch

from .stride import FRAMES_A_LATENT, video_frames

# Pieces of the last resort, in pixels and video frames.
TILE, OVERLAP = 256, 64
TILE_FRAMES, OVERLAP_FRAMES = 64, 8

logger = logging.getLogger(__name__)


def frames_a_latent(vae: Any, video: torch.Tensor) -> int | None:
    """Video frames that a latent frame of `vae` holds; None if it makes images, or none of the channels of `video`."""
    fits = getattr(vae, "latent_channels", None) == video.shape[1]
    return vae.temporal_compression_decode() if fits else None


def size_of(vae: Any, video: torch.Tensor) -> tuple[int, int] | None:
    """Height and width of the frames that `vae` makes of a latent video; None where it is another family's."""
    if frames_a_latent(vae, video) is None:
        return None
    space = vae.spacial_compression_decode()
    return video.shape[3] * space, video.shape[4] * space


def decode(vae: Any, video: torch.Tensor, expected: int | None = None) -> torch.Tensor:
    """Latent video [B, C, T, h, w] -> frames [B, F, H, W, 3] in 0..1.

    expected: video frames a latent frame, None where only the VAE tells. Raises ValueError for another family's VAE.
    """
    time = frames_a_latent(vae, video)
    if not time or time != (expected or time):
        raise ValueError(
            f"vae: expected one that makes {video.shape[1]} channels and one latent frame of {expected or FRAMES_A_LATENT} "
            f"video frames, got {getattr(vae, 'latent_channels', None)} channels and "
            f"{vae.temporal_compression_decode() or 'no'} video frames. Connect the VAE that belongs to the model."
        )
    space = vae.spacial_compression_decode()

    def in_pieces() -> torch.Tensor:
        tiles = {"tile_x": TILE // space, "tile_y": TILE // space, "overlap": OVERLAP // space}
        times = {"tile_t": max(2, TILE_FRAMES // time), "overlap_t": max(1, OVERLAP_FRAMES // time)}
        return torch.cat([vae.decode_tiled(item, **tiles, **times) for item in video.split(1)])

    frames = _unless_memory_runs_out(lambda: vae.decode(video), in_pieces)
    full = video_frames(video.shape[2], time)
    if frames.shape[1] != full:
        raise ValueError(
            f"vae: expected {full} video frames from {video.shape[2]} latent frames, got {frames.shape[1]}. Connect the VAE "
            "that belongs to the model."
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
