"""Which row of the table a graph gets, and what it says about it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from ..latents.stride import StrideNote
from .table import SECOND, SINGLE, Recipe

# Sigmas below which a sampler goes on from a clip instead of making one.
FULL_NOISE = 0.999


def stage_of(chosen: str | None, is_clip: bool, sigmas: Sequence[float]) -> str:
    """The stage that was chosen, or that a latent shows. Raises ValueError where both cannot be true."""
    if not is_clip and (chosen == SECOND or (sigmas and sigmas[0] < FULL_NOISE)):
        seen = (
            "stage is second"
            if chosen == SECOND
            else f"sigmas: they start at {sigmas[0]:g}, as a second stage's do"
        )
        raise ValueError(
            f"{seen}, but the latent is empty. For a second stage connect the first one's result, before the upscaler. For a "
            "single or first stage connect the sigmas of that sampler, which start at 1."
        )
    return chosen or (SECOND if is_clip else SINGLE)


def stride_for(recipe: Recipe, note: StrideNote | None, frames: int, is_fixed: bool) -> tuple[int, str]:
    """(stride, why it is another one than the recipe's). is_fixed: a clip of so many latent frames that cannot be thinned."""
    if note is not None and note.stride > 1:
        return note.stride, "" if note.stride == recipe.stride else ", as the latent is strided already"
    if recipe.stride > 1 and is_fixed:
        return 1, ": the latent holds a clip, and without vae it cannot be strided. Connect vae to save more"
    # With fewer than three strided frames after the first the small model's clips drift.
    stride = min(recipe.stride, max(1, (frames - 1) // 3))
    return stride, "" if stride == recipe.stride else ", as the clip is short"


def describe(
    preset: str, stage: str, recipe: Recipe, striding: tuple[int, int, int], because: str, steps: int
) -> str:
    """striding: (stride, latent frames before, after). steps: of the schedule, below 1 where it is not known."""
    return "\n".join(
        line[0].upper() + line[1:] + "." for line in _lines(preset, stage, recipe, striding, because, steps)
    )


def _lines(
    preset: str, stage: str, recipe: Recipe, striding: tuple[int, int, int], because: str, steps: int
) -> Iterator[str]:
    stride, before, after = striding
    yield f"{preset}, {stage} stage"
    yield (
        f"keyframe stride {stride}: {after} latent frames" if stride > 1 else "no keyframe stride"
    ) + because
    for technique in recipe.techniques:
        part = technique.schedule
        start = f", from {part.start_percent:g} of the schedule on" if part and part.start_percent else ""
        least = f", where it has {part.least_steps} steps or more" if part and part.least_steps else ""
        yield f"{technique.name}: {technique.describe()}{start}{least}"
    if stride != recipe.stride:
        yield "the preset as a whole was measured with another stride, so that it saves something else here"
        return
    for evidence in recipe.evidence_for(steps if steps > 0 else None):
        yield f"measured on a small model: {evidence.words()}"
