"""From a strided LATENT back to one of full length."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator
from typing import Any

import comfy.model_management as mm
import comfy.utils
import torch

from .cuts import MOST_OF_LATENTS
from .guided import Reference
from .interpolate import Estimate, bad_frames, frame_times, in_between, latent_times
from .reference import followed
from .stride import (
    FRAMES_A_LATENT,
    LARGEST_STRIDE,
    NOTE,
    StrideNote,
    has_guides,
    is_marked_full,
    latent_frames,
    mask_of,
    strided_length,
    video_frames,
    video_of,
    with_video,
)

logger = logging.getLogger(__name__)

# The longest clip, in video frames, that is asked for by hand.
LONGEST = 16384
# Called after every picture with how many are done and how many there will be.
OnPicture = Callable[[int, int], None]


def show_progress() -> OnPicture:
    """ComfyUI's progress bar over the pictures. It also stops the work when the user interrupts."""
    bar = comfy.utils.ProgressBar(1)

    def on_picture(done: int, total: int) -> None:
        mm.throw_exception_if_processing_interrupted()
        bar.update_absolute(done, total)

    return on_picture


def note_for(
    latent: dict[str, Any], stride: int = 0, length: int = 0, frames_a_latent: int | None = None
) -> StrideNote | None:
    """How to restore `latent`: from its note, or as given (length in video frames); None if it has its full length.

    frames_a_latent: as the VAE tells, where one is there; a note of this clip knows better.
    Raises ValueError, naming the input, for a latent of which nothing tells, and for a length or stride that does not go
    with the latent's note or its length.
    """
    strided = video_of(latent).shape[2]
    found, note = StrideNote.found(latent), StrideNote.read(latent)
    per_latent = note.frames_a_latent if note is not None else frames_a_latent or FRAMES_A_LATENT
    if note is not None and stride not in (0, note.stride):
        raise ValueError(
            f"stride: {stride} is set, but the latent was strided by {note.stride}: {note.frames} latent frames became "
            f"{note.strided_frames}. Set 0 or {note.stride}."
        )
    is_longer = found is not None and strided > found.strided_frames and strided != found.frames
    if found is not None and is_longer and not length and stride in (0, found.stride):
        raise ValueError(
            f"latent: its note tells of {found.strided_frames} latent frames, and it has {strided}. If the others are guides "
            "or generated keyframes, crop or separate them before this node; if the note is another clip's, which "
            "sound may bring along, set length."
        )
    if not stride and not length:
        if note is not None:
            stride, frames = note.stride, note.frames
        elif is_marked_full(latent) or (found is not None and strided == found.frames):
            stride, frames = 1, strided
        else:
            raise ValueError(
                "stride: the latent has no note of this clip from Keyframe Stride, so that its full length cannot be told. "
                "If a node in between dropped it, as those do that put images in place or crop guides, set stride and "
                "length as they were; if the clip was never strided, set 1."
            )
    elif strided == 1 and stride != 1:
        raise ValueError("latent: it has a single latent frame, so there is nothing in between.")
    else:
        if length:
            frames = latent_frames(length, per_latent)
        else:
            frames = note.frames if note is not None else stride * (strided - 1) + 1
        if not stride:
            stride = note.stride if note is not None else math.ceil((frames - 1) / (strided - 1))
    if note is None and not length and stride != 1 and has_guides(mask_of(latent)):
        raise ValueError(
            "latent: its last frames are held, as added guides are, so that its full length cannot be told. Put the node "
            "that crops guides before this one, or set length."
        )
    if stride > LARGEST_STRIDE:
        raise ValueError(
            f"length: {video_frames(frames, per_latent)} video frames from {strided} latent frames would be a stride of "
            f"{stride}; {LARGEST_STRIDE} is the largest. Set stride too, or a shorter length."
        )
    if frames == strided:
        logger.info("FrameThrift: Latent Flow Interpolate: the latent has its full length already.")
        return None
    if strided_length(frames, stride) != strided:
        full, least, most = (
            video_frames(length, per_latent)
            for length in (frames, stride * (strided - 2) + 2, stride * (strided - 1) + 1)
        )
        raise ValueError(
            f"length: {full} video frames at stride {stride} make {strided_length(frames, stride)} latent frames, but the "
            f"latent has {strided}. With this stride set length between {least} and {most}."
        )
    return StrideNote(stride, frames, strided, frames_a_latent=per_latent)


def restore_latents(
    latent: dict[str, Any],
    note: StrideNote,
    method: str,
    estimate: Estimate | None,
    device: torch.device,
    on_picture: OnPicture,
) -> dict[str, Any]:
    """`latent` at its full length, its latent frames in between mixed as they are: a preview."""
    video = video_of(latent)
    _warn_of(bad_frames(video), "latent frame")
    times = latent_times(note.strided_frames, note.stride, note.frames_a_latent)
    wanted = latent_times(note.frames, frames_a_latent=note.frames_a_latent)
    out = video.new_empty(*video.shape[:2], note.frames, *video.shape[3:])
    for place, picture in in_between(video, times, wanted, method, estimate, device, MOST_OF_LATENTS):
        out[:, :, place] = picture
        on_picture(place + 1, note.frames)
    return restored(latent, note, out)


def restore_frames(
    frames: torch.Tensor,
    note: StrideNote,
    method: str,
    estimate: Estimate | None,
    device: torch.device,
    on_picture: OnPicture,
    reference: Reference | None = None,
) -> torch.Tensor:
    """Low-rate frames [B, F', H, W, 3] -> frames [B, F, H, W, 3] at the full rate, along a reference where there is one."""
    total = video_frames(note.frames, note.frames_a_latent)
    times, wanted = frame_times(frames.shape[1], note.stride), frame_times(total)
    out = frames.new_empty(frames.shape[0], total, *frames.shape[2:])
    clip = frames.movedim(-1, 1)
    _warn_of([k * note.stride for k in bad_frames(clip)], "video frame")
    before = 0
    if reference is None:
        pictures = in_between(clip, times, wanted, method, estimate, device)
    else:
        pictures = followed(clip, note.stride, total, reference, method, estimate, device)
        if reference.step > 1:
            before = -(-(total - 1) // reference.step) + 1
            clip = _gathered(pictures, clip, before, total, on_picture)
            times = frame_times(clip.shape[2], reference.step)
            pictures = in_between(clip, times, wanted, method, estimate, device)
    for place, picture in pictures:
        out[:, place] = picture.movedim(1, -1)
        if place % note.stride:
            out[:, place].clamp_(0, 1)
        on_picture(before + place + 1, before + total)
    return out


def _gathered(
    pictures: Iterator[tuple[int, torch.Tensor]],
    clip: torch.Tensor,
    count: int,
    total: int,
    on_picture: OnPicture,
) -> torch.Tensor:
    """All `count` pictures as one clip, made before the `total` frames are."""
    out = clip.new_empty(*clip.shape[:2], count, *clip.shape[3:])
    for place, picture in pictures:
        out[:, :, place] = picture
        on_picture(place + 1, count + total)
    return out


def _warn_of(bad: list[int], kind: str) -> None:
    if bad:
        logger.warning(
            "FrameThrift: Latent Flow Interpolate: %s%s %s hold%s values that are no numbers (NaN or infinite). They stay as "
            "they are; frames in between take those values from their other side. The cause lies before this node: try "
            "the VAE or the model in a wider dtype.",
            kind,
            "s"[: len(bad) > 1],
            ", ".join(map(str, bad)),
            "s"[: len(bad) == 1],
        )


def restored(latent: dict[str, Any], note: StrideNote, video: torch.Tensor) -> dict[str, Any]:
    """`latent` with the full-length `video`, its first frame and that frame's mask kept, and no note."""
    strided, mask = video_of(latent), mask_of(latent)
    video = torch.cat((strided[:, :, :1], video[:, :, 1:].to(strided)), dim=2)
    if mask is not None:
        # A frame in between takes the mask of the one after it: the first frame's is its own.
        after = (torch.arange(note.frames) / note.stride).ceil().long()
        mask = mask[:, :, after]
    out = with_video(latent, video, mask)
    out.pop(NOTE, None)
    return out
