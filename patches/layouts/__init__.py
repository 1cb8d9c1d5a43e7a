"""The only place that knows model families. A new one is a file here and a line in `FAMILIES`."""

from collections.abc import Mapping
from typing import Any

import torch

from . import ltx
from .layout import Layout, Stream, Unclear
from .work import Work

FAMILIES = (ltx.read,)
STREAMS = (ltx.stream_of,)
FLOPS = (ltx.flops,)

UNKNOWN_MODEL = "UNKNOWN_MODEL"


def read_layout(
    diffusion_model: torch.nn.Module, x: torch.Tensor, options: Mapping[str, Any], conds: Mapping[str, Any]
) -> Layout | Unclear:
    """Read one forward of `diffusion_model` on latent `x`, by the first family that knows the model."""
    model = getattr(diffusion_model, "_orig_mod", diffusion_model)
    for read in FAMILIES:
        layout = read(model, x, options, conds)
        if layout is not None:
            return layout
    return Unclear(UNKNOWN_MODEL)


def stream_of(diffusion_model: torch.nn.Module | None, noise_shape: tuple[int, ...]) -> Stream | None:
    """The video tokens that sampling this noise takes; None if the model is unknown."""
    model = getattr(diffusion_model, "_orig_mod", diffusion_model)
    return next((stream for read in STREAMS if (stream := read(model, noise_shape)) is not None), None)


def flops(diffusion_model: torch.nn.Module | None, work: Work) -> float | Unclear:
    """FLOPs of the transformer blocks of one forward for one cond: 2 a multiply-add, as PyTorch's counter has it."""
    model = getattr(diffusion_model, "_orig_mod", diffusion_model)
    counts = (total for count in FLOPS if (total := count(model, work)) is not None)
    return next(counts, Unclear(UNKNOWN_MODEL))


def knows(diffusion_model: torch.nn.Module | None) -> bool:
    """Whether the model is of a family that has a file here."""
    return stream_of(diffusion_model, (1, 1, 1, 1, 1)) is not None
