"""Fewer latent frames for the same seconds: lengths, the note that travels in a LATENT, thinning.

Latent videos are [B, C, T, h, w]; the first latent frame holds one video frame, every other eight.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch

VIDEO_FRAMES = 8
NOTE = "frame_thrift_stride"
LARGEST_STRIDE = 8


@dataclass(frozen=True)
class StrideNote:
    """How a LATENT was thinned: `frames` latent frames became `strided_frames`."""

    stride: int
    frames: int
    strided_frames: int

    @classmethod
    def read(cls, latent: dict[str, Any]) -> StrideNote | None:
        """The note in `latent`, if there is one and it tells of a video of this length."""
        value = latent.get(NOTE)
        if not isinstance(value, dict) or value.keys() != cls.__dataclass_fields__.keys():
            return None
        note = cls(**value)
        return note if video_of(latent).shape[2] == note.strided_frames else None

    def write(self, latent: dict[str, Any]) -> dict[str, Any]:
        return {**latent, NOTE: asdict(self)}


def strided_length(frames: int, stride: int) -> int:
    """Latent frames that cover `frames` when each lasts `stride` times as long."""
    return math.ceil((frames - 1) / stride) + 1


def video_frames(latent_frames: int) -> int:
    return VIDEO_FRAMES * (latent_frames - 1) + 1


def video_of(latent: dict[str, Any]) -> torch.Tensor:
    """The video [B, C, T, h, w] of a video or audio-video LATENT. Raises ValueError for anything else."""
    samples = latent["samples"]
    video: torch.Tensor = samples.unbind()[0] if samples.is_nested else samples
    if video.ndim != 5:
        raise ValueError(
            f"latent: expected a video latent [batch, channels, frames, height, width], got {tuple(video.shape)}. "
            "Connect an empty LTX-Video latent, an encoded video, or an audio-video latent."
        )
    return video


def with_video(
    latent: dict[str, Any], video: torch.Tensor, video_mask: torch.Tensor | None
) -> dict[str, Any]:
    """`latent` with another video and video mask; audio and its mask stay as they are."""
    out = {**latent, "samples": _replaced(latent["samples"], video)}
    if video_mask is not None:
        out["noise_mask"] = _replaced(latent["noise_mask"], video_mask)
    return out


def mask_of(latent: dict[str, Any]) -> torch.Tensor | None:
    """The video's noise mask if it has one value or more per latent frame [B, 1, T, ...]; else it is core's."""
    mask = latent.get("noise_mask")
    if mask is None:
        return None
    mask = mask.unbind()[0] if mask.is_nested else mask
    return mask if mask.ndim == 5 and mask.shape[2] == video_of(latent).shape[2] else None


def _replaced(samples: Any, video: torch.Tensor) -> Any:
    return type(samples)([video, *samples.unbind()[1:]]) if samples.is_nested else video


def thin(
    latent: dict[str, Any],
    stride: int,
    reencode: Callable[[torch.Tensor, Callable[[torch.Tensor], torch.Tensor]], torch.Tensor] | None = None,
) -> dict[str, Any]:
    """`latent` with every `stride`-th frame's worth of time, and the note of it. The input is not changed.

    An empty video stays empty; its first frame may hold an image and keeps it, with its mask. Other content has
    full-rate frames inside its latent frames: `reencode(video, thin_frames)` decodes it, lets `thin_frames` pick
    from the frames [B, F, H, W, 3], and encodes the rest. Raises ValueError where that is not given, for guides,
    and for strides that leave no clip.
    """
    video, mask = video_of(latent), mask_of(latent)
    frames = video.shape[2]
    if frames == 1:
        raise ValueError(
            "latent: it has a single latent frame, so there is nothing to skip. Set a length of 9 video frames or more."
        )
    if stride > frames - 1:
        raise ValueError(
            f"stride: {stride} is too large for {frames} latent frames ({video_frames(frames)} video frames). "
            f"Set it to {frames - 1} or less, or make the clip longer."
        )
    if StrideNote.read(latent) is not None:
        raise ValueError(
            "latent: it is strided already. Connect the full-length latent, and set the whole stride in one node."
        )
    short = strided_length(frames, stride)
    kept = (torch.arange(short) * stride).clamp(max=frames - 1)
    filled = video[:, :, 1:].flatten(3).any(dim=3).any(dim=1).any(dim=0)
    if not filled.any():
        thinned = video[:, :, kept]
    elif has_guides(mask):
        raise ValueError(
            "latent: its last frames are held, as added guides are. Connect the latent without them and add guides after "
            "KeyframeStride."
        )
    elif not filled.all():
        raise ValueError(
            "latent: some latent frames after the first hold content and others do not, as guides or images put in "
            "place do. Connect the latent without them and add guides after KeyframeStride."
        )
    elif reencode is None:
        raise ValueError(
            "latent: it holds a video, and eight full-rate frames inside each latent frame cannot be thinned as they "
            "are. Connect vae, so that it is decoded, thinned and encoded again, or connect an empty latent."
        )
    else:
        picked = (torch.arange(video_frames(short)) * stride).clamp(max=video_frames(frames) - 1)
        thinned = reencode(video, lambda pixels: pixels[:, picked.to(pixels.device)])
        if thinned.shape[2] != short:
            raise ValueError(
                f"vae: expected {short} latent frames from {video_frames(short)} video frames, got {thinned.shape[2]}. "
                "Connect the VAE that belongs to the model."
            )
        thinned = torch.cat((video[:, :, :1], thinned[:, :, 1:].to(video)), dim=2)
    out = with_video(latent, thinned, None if mask is None else mask[:, :, kept])
    return StrideNote(stride, frames, short).write(out)


def has_guides(mask: torch.Tensor | None) -> bool:
    """Whether a mask [B, 1, T, ...] holds the last frames while ones before them are free, as for appended guides."""
    if mask is None:
        return False
    free = (mask >= 1).flatten(3).all(dim=3).all(dim=1).all(dim=0)
    return bool(not free[-1] and free[1:].any())
