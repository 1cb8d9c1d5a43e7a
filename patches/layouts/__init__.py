"""The only place that knows model families. A new one is a file here and a line in `FAMILIES`."""

from collections.abc import Mapping
from typing import Any

import torch

from . import ltx
from .layout import Layout, Stream, Unclear
from .work import Work

# Each has `read`, and what else it can tell: `stream_of`, `frames_a_latent`, `flops`; None for models that it does not know.
FAMILIES: tuple[Any, ...] = (ltx,)

UNKNOWN_MODEL = "UNKNOWN_MODEL"


def read_layout(
    diffusion_model: torch.nn.Module, x: torch.Tensor, options: Mapping[str, Any], conds: Mapping[str, Any]
) -> Layout | Unclear:
    """Read one forward of `diffusion_model` on latent `x`, by the first family that knows the model."""
    layout: Layout | Unclear | None = _told("read", diffusion_model, x, options, conds)
    return layout or Unclear(UNKNOWN_MODEL)


def stream_of(diffusion_model: torch.nn.Module | None, noise_shape: tuple[int, ...]) -> Stream | None:
    """The video tokens that sampling this noise takes; None if the model is unknown."""
    stream: Stream | None = _told("stream_of", diffusion_model, noise_shape)
    return stream


def frames_a_latent(diffusion_model: torch.nn.Module | None) -> int | None:
    """Video frames that a latent frame of this model holds, except its first; None if the model is unknown."""
    frames: int | None = _told("frames_a_latent", diffusion_model)
    return frames


def flops(diffusion_model: torch.nn.Module | None, work: Work) -> float | Unclear:
    """FLOPs of the transformer blocks of one forward for one cond: 2 a multiply-add, as PyTorch's counter has it."""
    total: float | None = _told("flops", diffusion_model, work)
    return Unclear(UNKNOWN_MODEL) if total is None else total


def require(model: Any, remedy: str) -> torch.nn.Module:
    """The diffusion model of a MODEL. Raises ValueError, ending in `remedy`, for one of another family."""
    inner = getattr(model, "model", None)
    diffusion_model: torch.nn.Module | None = getattr(inner, "diffusion_model", None)
    if diffusion_model is None or stream_of(diffusion_model, (1, 1, 1, 1, 1)) is None:
        raise ValueError(f"model: expected LTX-Video or LTX-2, got {type(inner).__name__}. {remedy}")
    return diffusion_model


def _told(question: str, diffusion_model: torch.nn.Module | None, *given: Any) -> Any:
    """What the first family that knows the model answers; None if nobody does."""
    model = getattr(diffusion_model, "_orig_mod", diffusion_model)
    for family in FAMILIES:
        answer = getattr(family, question, None)
        told = None if answer is None else answer(model, *given)
        if told is not None:
            return told
    return None
