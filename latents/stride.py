"""Fewer latent frames for the same seconds: lengths, rates, the note that travels in a LATENT, thinning.

Latent videos are [B, C, T, h, w]; the first latent frame holds one video frame, every other `frames_a_latent`.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any

import torch

# What a LATENT is taken for while no note, VAE or MODEL says otherwise: all of LTX have made eight so far.
FRAMES_A_LATENT = 8
NOTE, FULL = "frame_thrift_stride", "frame_thrift_full"
DEFAULT_STRIDE, LARGEST_STRIDE = 2, 8
# Frames a second below which weights differ.
SAFE_RATE = 20.0

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class StrideNote:
    """How a LATENT was thinned: `frames` latent frames became `strided_frames`.

    Sound hands the note on to whatever video joins it. So beside sound the note tells, too, how long that was and how
    high and wide the video; 0 where there was none. Only what is not as the defaults say is written.
    """

    stride: int
    frames: int
    strided_frames: int
    audio_frames: int = 0
    height: int = 0
    width: int = 0
    frames_a_latent: int = FRAMES_A_LATENT

    @classmethod
    def found(cls, latent: dict[str, Any]) -> StrideNote | None:
        """The note in `latent`, whether or not it tells of this video."""
        value = latent.get(NOTE)
        needed = {"stride", "frames", "strided_frames"}
        if not isinstance(value, dict) or not needed <= value.keys() <= cls.__dataclass_fields__.keys():
            return None
        return cls(**value)

    @classmethod
    def read(cls, latent: dict[str, Any]) -> StrideNote | None:
        """The note in `latent`, if there is one and it can be true of this video and sound."""
        note = cls.found(latent)
        return note if note is not None and note.is_true_of(latent) else None

    def is_true_of(self, latent: dict[str, Any]) -> bool:
        frames, height, width = video_of(latent).shape[2:]
        if frames != self.strided_frames:
            return False
        audio = audio_frames(latent)
        if audio and self.audio_frames and audio != self.audio_frames:
            return False
        # Made larger since, a video keeps its shape, up to a crop.
        return not self.width or 0.8 < height * self.width / (self.height * width) < 1.25

    def write(self, latent: dict[str, Any]) -> dict[str, Any]:
        note, audio = self, audio_frames(latent)
        if audio:
            height, width = video_of(latent).shape[3:]
            note = replace(self, audio_frames=audio, height=height, width=width)
        told = [field.name for field in fields(note) if getattr(note, field.name) != field.default]
        return {**latent, NOTE: {name: getattr(note, name) for name in told}}


def strided_length(frames: int, stride: int) -> int:
    """Latent frames that cover `frames` when each lasts `stride` times as long."""
    return math.ceil((frames - 1) / stride) + 1


def guide_frames(frames: int, stride: int, frames_a_latent: int = FRAMES_A_LATENT) -> torch.Tensor:
    """Which of a guide's `frames` video frames go with a strided clip: as many as the clip's part under it needs.

    A guide of T latent frames becomes one of strided_length(T), its last frame repeated where the stride overshoots.
    """
    strided = strided_length(latent_frames(frames, frames_a_latent), stride)
    needed = video_frames(strided, frames_a_latent)
    return (torch.arange(max(needed, math.ceil(frames / stride))) * stride).clamp(max=frames - 1)


def video_frames(frames: int, frames_a_latent: int = FRAMES_A_LATENT) -> int:
    """Video frames that so many latent frames hold."""
    return frames_a_latent * (frames - 1) + 1


def latent_frames(frames: int, frames_a_latent: int = FRAMES_A_LATENT) -> int:
    """Latent frames of so many video frames; what fills no latent frame is cut off."""
    return (frames - 1) // frames_a_latent + 1


def low_rate(frame_rate: float, stride: int) -> float:
    """The rate of a strided clip. Raises ValueError for what is no rate; 0 stands for one that was not given."""
    if not math.isfinite(frame_rate) or frame_rate < 0:
        raise ValueError(
            f"frame_rate: expected the full frames a second, or 0 for not given, got {frame_rate:g}. Connect the rate that "
            "the conditioning gets."
        )
    return frame_rate / stride


def warn_of_low_rate(rate: float, stride: int) -> None:
    """`rate`: of the strided clip, 0 if it was not given."""
    if 0 < rate < SAFE_RATE:
        logger.warning(
            "FrameThrift: keyframe stride %d makes %g frames a second. LTX-2 is made for 24 to 50; 48 or 50 down to "
            "24 or 25 is safe, lower depends on the weights: compare one clip of the same seed and prompt with and "
            "without stride before you rely on it.",
            stride,
            rate,
        )


def warn_of_tail(note: StrideNote) -> None:
    """One line where the stride does not divide the clip, so that its last strided latent frame ends behind it."""
    after_first = note.frames - 1
    past = -after_first % note.stride
    if past:
        fewer = after_first - after_first % note.stride
        lengths = [video_frames(frames + 1, note.frames_a_latent) for frames in (fewer, fewer + note.stride)]
        logger.warning(
            "FrameThrift: keyframe stride %d does not divide the %d latent frames after the first: the strided clip ends "
            "%d video frames past the full one and any sound. What is thinned from a video may repeat its last frame there; "
            "Latent Flow Interpolate cuts that end off. The nearest lengths without it: %d and %d.",
            note.stride,
            after_first,
            past * note.frames_a_latent,
            *lengths,
        )


def audio_frames(latent: dict[str, Any]) -> int:
    """How long the sound beside the video is, in its latent frames; 0 without sound."""
    samples = latent["samples"]
    parts = samples.unbind() if samples.is_nested else [samples]
    return int(parts[1].shape[2]) if len(parts) > 1 else 0


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


def filled_frames(video: torch.Tensor) -> torch.Tensor:
    """Which latent frames [T] hold something, in any clip of the batch."""
    return video.flatten(3).any(dim=3).any(dim=1).any(dim=0)


def holds_clip(latent: dict[str, Any]) -> bool:
    """Whether every latent frame holds something; an empty video may have an image in its first, and guides elsewhere."""
    return bool(filled_frames(video_of(latent)).all())


def refuse_extended(latent: dict[str, Any]) -> None:
    """Raises ValueError for a strided latent that something has made longer since: it is neither strided nor full."""
    note, frames = StrideNote.found(latent), video_of(latent).shape[2]
    if note is None or not note.strided_frames < frames != note.frames:
        return
    # Sound may bring along the note of another clip.
    if replace(note, strided_frames=frames).is_true_of(latent):
        raise ValueError(
            f"latent: it was strided to {note.strided_frames} latent frames and has {frames} now, as with added guides or "
            "generated keyframes. Crop or separate them first, and add them behind this node."
        )


def marked_full(latent: dict[str, Any]) -> dict[str, Any]:
    """`latent`, told to be of the full length, where nothing else tells: how long it is now."""
    return {**latent, FULL: video_of(latent).shape[2]}


def is_marked_full(latent: dict[str, Any]) -> bool:
    return bool(latent.get(FULL) == video_of(latent).shape[2])


def refuse_strided(latent: dict[str, Any]) -> None:
    """Raises ValueError if stride 1, which keeps the latent, meets one that was thinned: it would stay short."""
    refuse_extended(latent)
    note = StrideNote.read(latent)
    if note is not None:
        raise ValueError(
            f"stride: 1 is the full length, but the latent is strided already: {note.strided_frames} latent frames instead of "
            f"{note.frames}. Connect the full-length latent, or leave this node out and keep the MODEL of the node that "
            "strided it."
        )


def thin(
    latent: dict[str, Any],
    stride: int,
    reencode: Callable[[torch.Tensor, Callable[[torch.Tensor], torch.Tensor]], torch.Tensor] | None = None,
    channels: int | None = None,
    frames_a_latent: int | None = None,
) -> dict[str, Any]:
    """`latent` with every `stride`-th frame's worth of time, and the note of it. The input is not changed.

    An empty video stays empty; its first frame may hold an image and keeps it, with its mask. Other content has
    full-rate frames inside its latent frames: `reencode(video, thin_frames)` decodes it, lets `thin_frames` pick
    from the frames [B, F, H, W, 3], and encodes the rest. A latent that was strided already is thinned by what is left
    of `stride`, which always counts from the full length. Raises ValueError where `reencode` is not given, for guides,
    for strides that leave no clip or do not go with the one there, and for latents of other channels than the model's.
    None is for what nobody tells.
    """
    video, mask, earlier = video_of(latent), mask_of(latent), StrideNote.read(latent)
    if channels is not None and video.shape[1] != channels:
        raise ValueError(
            f"latent: expected {channels} channels, as this model's latents have, got {video.shape[1]}. Connect the empty "
            "latent, or the VAE Encode, of the model's family."
        )
    per_latent = frames_a_latent or FRAMES_A_LATENT
    given = video.shape[2]
    frames, further = (given, stride) if earlier is None else (earlier.frames, stride // earlier.stride)
    if frames == 1:
        raise ValueError(
            "latent: it has a single latent frame, so there is nothing to skip. With this stride set a length of "
            f"{video_frames(stride + 1, per_latent)} video frames or more."
        )
    if stride > frames - 1:
        raise ValueError(
            f"stride: {stride} is too large for {frames} latent frames ({video_frames(frames, per_latent)} video "
            f"frames). Set it to {frames - 1} or less, or make the clip longer: {video_frames(stride + 1, per_latent)} video "
            "frames."
        )
    if earlier is not None and stride % earlier.stride:
        raise ValueError(
            f"stride: {stride} is set, but the latent was strided by {earlier.stride} already: {frames} latent frames became "
            f"{given}. Set a multiple of {earlier.stride}, which is the whole stride against the full length, or connect the "
            "full-length latent."
        )
    short = strided_length(frames, stride)
    kept = (torch.arange(short) * further).clamp(max=given - 1)
    filled = filled_frames(video)[1:]
    if further == 1:
        thinned = video
    elif not filled.any():
        thinned = video[:, :, kept]
    elif has_guides(mask):
        raise ValueError(
            "latent: its last frames are held, as added guides are. Connect the latent without them and add guides after "
            "KeyframeStride or Thrift Preset."
        )
    elif not filled.all():
        raise ValueError(
            "latent: some latent frames after the first hold content and others do not, as guides, generated keyframes or "
            "images put in place do. Connect the latent without them and add them after KeyframeStride or Thrift Preset."
        )
    elif reencode is None:
        raise ValueError(
            "latent: it holds a video, and the full-rate frames inside each latent frame cannot be thinned as they are. "
            "Connect vae, so that it is decoded, thinned and encoded again, or connect an empty latent."
        )
    else:
        low, full = (video_frames(length, per_latent) for length in (short, given))
        picked = (torch.arange(low) * further).clamp(max=full - 1)
        thinned = reencode(video, lambda pixels: pixels[:, picked.to(pixels.device)])
        if thinned.shape[2] != short:
            raise ValueError(
                f"vae: expected {short} latent frames from {low} video frames, got {thinned.shape[2]}. "
                "Connect the VAE that belongs to the model."
            )
        thinned = torch.cat((video[:, :, :1], thinned[:, :, 1:].to(video)), dim=2)
    out = with_video(latent, thinned, None if mask is None else mask[:, :, kept])
    return StrideNote(stride, frames, short, frames_a_latent=per_latent).write(out)


def has_guides(mask: torch.Tensor | None) -> bool:
    """Whether a mask [B, 1, T, ...] holds the last frames while ones before them are free, as for appended guides."""
    if mask is None:
        return False
    free = (mask >= 1).flatten(3).all(dim=3).all(dim=1).all(dim=0)
    return bool(not free[-1] and free[1:].any())
