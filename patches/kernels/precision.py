"""Attention computed in another type than its inputs have. Attention functions take q [B,N,C], k, v [B,M,C] and a mask."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

# Kernels add up weighted values before they divide by the sum of weights: not all of float16's range is theirs.
HEADROOM = 4
# Below its smallest normal number float16 loses digits: channels whose largest value is less than this are scaled up to it.
SMALL = 2.0**-10

Attend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None], torch.Tensor]


def attend_in(
    dtype: torch.dtype,
    attend: Attend,
    q_BNC: torch.Tensor,
    k_BMC: torch.Tensor,
    v_BMC: torch.Tensor,
    mask: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The output of `attend` on inputs cast to `dtype`, in the type of `q`; and whether that broke it, a bool on the device.

    Every output number lies between the smallest and the largest value of its channel. So values too large or too small for
    float16 are divided by a number a channel, and the output is multiplied by it; where they fit, that number is 1. Nothing
    waits for the device.
    """
    peak_B1C = torch.linalg.vector_norm(v_BMC, math.inf, dim=1, keepdim=True)
    was_finite = peak_B1C.isfinite().all() & peak(q_BNC).isfinite()
    if dtype != torch.float16:
        out = attend(q_BNC.to(dtype), k_BMC.to(dtype), v_BMC.to(dtype), cast_mask(mask, dtype))
        return out.to(q_BNC.dtype), was_finite & ~peak(out).isfinite()
    large, small = peak_B1C / (torch.finfo(dtype).max / HEADROOM), peak_B1C / SMALL
    # A channel of zeros stays one.
    scale = torch.where(peak_B1C > 0, large.clamp(min=1) * small.clamp(max=1), 1)
    # The values first, whose quotient needs memory for a moment.
    v = (v_BMC / scale).to(dtype)
    out = attend(q_BNC.to(dtype), k_BMC.to(dtype), v, cast_mask(mask, dtype))
    return out.to(q_BNC.dtype).mul_(scale), was_finite & ~peak(out).isfinite()


def peak(x: torch.Tensor) -> torch.Tensor:
    """The largest magnitude, on the device: one pass, no copy; not finite if any number is not."""
    return torch.linalg.vector_norm(x, math.inf)


def cast_mask(mask: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor | None:
    """A floating mask in `dtype`; one of bool as it is.

    A number too large for it, which stands for «unseen», comes as half of the largest: as an infinity it would make a row
    in which all keys have it NaN, and what is added to it needs room. Infinities stay.
    """
    if mask is None or not mask.is_floating_point():
        return mask
    limit = torch.finfo(dtype).max / 2
    if torch.finfo(mask.dtype).max < limit:
        return mask.to(dtype)
    return torch.where(mask.isinf(), mask, mask.clamp(-limit, limit)).to(dtype)


def attend_in_float64(
    q_BNC: torch.Tensor,
    k_BMC: torch.Tensor,
    v_BMC: torch.Tensor,
    mask: torch.Tensor | None,
    heads: int,
    scale: float | None = None,
) -> torch.Tensor:
    """The reference: attention written down in float64."""
    q, k, v = (x.double().unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q_BNC, k_BMC, v_BMC))
    logits = q @ k.transpose(-1, -2) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if mask is not None:
        bias = (
            mask.double() if mask.is_floating_point() else (~mask).double() * -torch.finfo(torch.float32).max
        )
        logits = logits + bias
    return (logits.softmax(-1) @ v).transpose(1, 2).flatten(2)
