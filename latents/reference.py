"""A reference for the frames in between: what was connected, held against the clip, and what it told."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import torch

from .guided import UNLIKE, Comparison, Reference, follow
from .interpolate import Estimate, frame_times, in_between
from .stride import StrideNote, strided_length, video_frames

# A reference may be so much out of shape, as sizes that have to be multiples of 32 bring along.
LEAST_STRETCH = 0.94

logger = logging.getLogger(__name__)


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
    # The slowest rate first: of a clip shorter than its stride several have as many frames.
    step = next((step for step in reversed(counts) if len(image) == batch * counts[step]), None)
    if step is None:
        told = ", ".join(
            f"{count} (every {_nth(step)} frame)" for step, count in counts.items() if 1 < step < note.stride
        )
        raise ValueError(
            f"reference: expected the same clip's {counts[1]} frames{clips}{', or ' + told if told else ''}, got "
            f"{len(image)} frames. Connect all frames of the first stage, decoded before its latent was thinned: output "
            f"frames of Keyframe Stride. If the whole clip does not have {counts[1]} frames, set length. Or disconnect reference."
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


def followed(
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

    def blind(some: list[int], items: list[int]) -> Iterator[torch.Tensor]:
        # With two gaps beside: cuts are told by the first, and slopes by the cuts there.
        around = slice(max(0, some[0] // stride - 2), some[-1] // stride + 4)
        part = clip[:, :, around] if len(items) == len(clip) else clip[items, :, around]
        at = torch.tensor(some, dtype=torch.float64)
        for _, picture in in_between(part, times[around], at, method, estimate, device):
            yield picture

    bad = reference.bad
    if bad:
        logger.warning(
            "FrameThrift: Latent Flow Interpolate: reference: frame%s %s hold%s values that are no numbers (NaN or infinite). "
            "Frames there, and in between keyframes there, are made without it.",
            "s"[: len(bad) > 1],
            ", ".join(map(str, bad)),
            "s"[: len(bad) == 1],
        )
    comparison = Comparison()
    yield from (
        (time // reference.step, picture)
        for time, picture in follow(clip, stride, reference, wanted, blind, comparison, device)
    )
    _tell(comparison, len(clip), sum(time % stride > 0 for time in wanted))


def _tell(comparison: Comparison, clips: int, missing: int) -> None:
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
            clips * missing,
        )
    for item, late in comparison.late.items():
        logger.warning(
            "FrameThrift: Latent Flow Interpolate: %sthe keyframes fit what the reference shows about %d frame%s %s better than "
            "what it shows at their own times. Frames in between are made without it. Connect all frames of the first "
            "stage from its first one on, decoded before its latent was thinned.",
            f"clip {item + 1} of {clips}: " if clips > 1 else "",
            abs(late),
            "s"[: abs(late) > 1],
            "later" if late > 0 else "earlier",
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
