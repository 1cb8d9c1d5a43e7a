"""Which row of the table a graph gets, and what it says about it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from ..latents.stride import StrideNote, video_frames
from ..patches.clock import LongSchedule
from ..patches.technique import Technique
from .table import FIRST, SECOND, SINGLE, Recipe

# A sampler that begins below this noise level goes on from a clip instead of making one; schedulers may begin short of 1.
FULL_NOISE = 0.98


def stage_of(chosen: str | None, is_clip: bool, sigmas: Sequence[float]) -> str:
    """The stage that was chosen, or that a latent shows. Raises ValueError where both cannot be true."""
    is_late = len(sigmas) > 1 and sigmas[-1] < sigmas[0] < FULL_NOISE
    if not is_clip and (chosen == SECOND or is_late):
        seen = (
            "stage is second"
            if chosen == SECOND
            else f"sigmas: they start at {sigmas[0]:g}, as a second stage's do"
        )
        raise ValueError(
            f"{seen}, but the latent is empty, or holds no more than some images. For a second stage connect the first one's "
            "result, before the upscaler. For a single or first stage connect the sigmas of that sampler, which start at 1."
        )
    return chosen or (SECOND if is_clip else SINGLE)


def stride_for(recipe: Recipe, note: StrideNote | None, frames: int, is_fixed: bool) -> tuple[int, str]:
    """(stride, why it is another one than the recipe's). is_fixed: a clip of so many latent frames that cannot be thinned."""
    if note is not None:
        return note.stride, "" if note.stride == recipe.stride else ", as the latent is strided already"
    # With fewer than three strided frames after the first clips of the small model drifted by half as much again.
    stride = min(recipe.stride, max(1, (frames - 1) // 3))
    if stride > 1 and is_fixed:
        return 1, ": the latent holds a clip, and without vae it cannot be strided. Connect vae to save more"
    return stride, "" if stride == recipe.stride else ", as the clip is short"


def describe(
    title: str,
    striding: str,
    mounted: Sequence[Technique],
    recipe: Recipe,
    is_as_measured: bool,
    steps: int,
    first: int,
) -> str:
    """The node's text. steps: of the schedule, below 1 where it is not known. first: the stride of the stage before."""
    lines = _lines(title, striding, mounted, recipe, is_as_measured, steps if steps > 0 else None, first)
    return "\n".join(line[0].upper() + line[1:] + "." for line in lines)


def title_of(preset: str, stage: str, note: StrideNote | None, frames: int) -> str:
    """A second stage that is taken for unstrided says so, as nodes in between may have dropped the note."""
    if stage != SECOND or note is not None:
        return f"{preset}, {stage} stage"
    return f"{preset}, {stage} stage; the latent counts as a clip of {video_frames(frames)} frames that was not strided before"


def _lines(
    title: str,
    striding: str,
    mounted: Sequence[Technique],
    recipe: Recipe,
    is_as_measured: bool,
    steps: int | None,
    first: int,
) -> Iterator[str]:
    yield title
    yield striding
    for technique in mounted:
        part = technique.schedule
        start = f", from {part.start_percent:g} of the schedule on" if part and part.start_percent else ""
        least = f", where it has {part.least_steps} steps or more" if isinstance(part, LongSchedule) else ""
        yield f"{technique.name}: {technique.describe()}{start}{least}"
    evidence = list(recipe.evidence_for(steps, first)) if is_as_measured else []
    for each in evidence:
        yield f"measured on a small model: {each.words()}"
    if not evidence:
        yield "what this saves and costs was not measured: the clip, its stage or its steps differ from what was"
    elif recipe.stride > 1:
        yield "weights that do not know the low frame rate lose far more: compare one clip with and without"


def first_stride(stage: str, recipe: Recipe, note: StrideNote | None) -> int:
    """The stride that the stage before had; of a first stage the one that the next will keep."""
    if note is not None:
        return note.stride
    return recipe.stride if stage == FIRST else 1
