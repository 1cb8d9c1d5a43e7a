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
from .guided import UNLIKE, Comparison, Reference, follow
from .interpolate import Estimate, bad_frames, frame_times, in_between, latent_times
from .stride import (
    FRAMES_A_LATENT,
    LARGEST_STRIDE,
    NOTE,
    StrideNote,
    has_guides,
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
# A reference may be so much out of shape, as sizes that have to be multiples of 32 bring along.
LEAST_STRETCH = 0.94
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
        elif found is not None and strided == found.frames:
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
    if reference is None:
        pictures = in_between(clip, times, wanted, method, estimate, device)
    else:
        pictures = _followed(clip, note.stride, total, reference, method, estimate, device)
        if reference.step > 1:
            clip = _gathered(pictures, clip, -(-(total - 1) // reference.step) + 1, total, on_picture)
            times = frame_times(clip.shape[2], reference.step)
            pictures = in_between(clip, times, wanted, method, estimate, device)
    for place, picture in pictures:
        out[:, place] = picture.movedim(1, -1)
        if place % note.stride:
            out[:, place].clamp_(0, 1)
        on_picture(place + 1, total)
    return out


def reference_for(
    image: torch.Tensor, note: StrideNote | None, batch: int, size: tuple[int, int] | None
) -> Reference | None:
    """IMAGE as a reference for frames of so many clips and this size, if that is known; None if there is nothing to follow.

    Raises ValueError, naming the input, for other numbers of frames or another shape than the clip's.
    """
    if note is None:
        logger.info(
            "FrameThrift: Latent Flow Interpolate: the latent has its full length, so that no frames are made and the "
            "reference is not used."
        )
        return None
    counts = {
        step: video_frames(strided_length(note.frames, step), note.frames_a_latent)
        for step in range(1, note.stride + 1)
        if note.stride % step == 0
    }
    clips = "" if batch == 1 else f" for each of the {batch} clips, one after the other"
    step = next((step for step, count in counts.items() if len(image) == batch * count), None)
    if step is None:
        told = ", ".join(
            f"{count} (every {_nth(step)} frame)" for step, count in counts.items() if 1 < step < note.stride
        )
        raise ValueError(
            f"reference: expected the same clip's {counts[1]} frames{clips}{', or ' + told if told else ''}, got "
            f"{len(image)} frames. Connect all frames of the first stage, decoded before its latent was thinned: output "
            "frames of Keyframe Stride; or disconnect it."
        )
    if step == note.stride:
        logger.info(
            "FrameThrift: Latent Flow Interpolate: the reference has the latent's own frames and none in between, so that "
            "it is not used."
        )
        return None
    (height, width), (own_height, own_width) = size or image.shape[1:3], image.shape[1:3]
    stretch = own_height * width / (own_width * height)
    if not LEAST_STRETCH <= stretch <= 1 / LEAST_STRETCH or not 0.24 < own_height / height < 1.04:
        raise ValueError(
            f"reference: expected the same picture at full to a quarter of the size of the frames, {width} × {height}, got "
            f"{own_width} × {own_height}. Connect the first stage's frames as they were decoded, uncropped."
        )
    pictures = image[..., :3] if image.shape[-1] >= 3 else image[..., :1].expand(-1, -1, -1, 3)
    return Reference(pictures.unflatten(0, (batch, -1)).movedim(-1, 1), step)


def _nth(step: int) -> str:
    return {2: "2nd", 3: "3rd"}.get(step, f"{step}th")


def _followed(
    clip: torch.Tensor,
    stride: int,
    total: int,
    reference: Reference,
    method: str,
    estimate: Estimate | None,
    device: torch.device,
) -> Iterator[tuple[int, torch.Tensor]]:
    """(place, picture) at the reference's times that `total` frames need, of a clip [B, C, N, H, W] of every stride-th."""
    wanted = list(range(0, total + reference.step - 1, reference.step))
    times = frame_times(clip.shape[2], stride)

    def blind(some: list[int]) -> dict[int, torch.Tensor]:
        # With the gaps beside: a cut is told by them, too.
        around = slice(max(0, some[0] // stride - 1), some[0] // stride + 3)
        at = torch.tensor(some, dtype=torch.float64)
        made = in_between(clip[:, :, around], times[around], at, method, estimate, device)
        return {some[place]: picture for place, picture in made}

    comparison = Comparison()
    yield from (
        (time // reference.step, picture)
        for time, picture in follow(clip, stride, reference, wanted, blind, comparison, device)
    )
    _tell(comparison, sum(time % stride > 0 for time in wanted))


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


def _tell(comparison: Comparison, missing: int) -> None:
    shifts, unlike = list(comparison.shifts.values()), list(comparison.unlike.values())
    if unlike:
        logger.info(
            "FrameThrift: Latent Flow Interpolate: at %d keyframes the reference is shifted by %.1f pixels (%.1f at most) and "
            "leaves %.0f %% of their contrast unexplained (%.0f %% at most); %d of %d frames follow it.",
            len(unlike),
            sum(shifts) / len(shifts),
            max(shifts),
            100 * sum(unlike) / len(unlike),
            100 * max(unlike),
            comparison.followed,
            missing,
        )
    if comparison.disagreeing:
        far = comparison.disagreeing
        logger.warning(
            "FrameThrift: Latent Flow Interpolate: at keyframe%s %s the reference leaves %.0f %% of the contrast unexplained, "
            "more than %.0f %%: it shows something else there. Frames beside are made without it. Connect frames of the very "
            "clip, at the same times and uncropped, or start the second stage from a lower sigma.",
            "s"[: len(far) > 1],
            ", ".join(map(str, far)),
            100 * max(comparison.unlike.values()),
            100 * UNLIKE,
        )


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
