"""Sums of large numbers in half precision."""

from __future__ import annotations

import torch


def saturated(values: torch.Tensor) -> torch.Tensor:
    """`values`, in place, with infinities of float16 replaced by its largest numbers; other types have the range."""
    if values.dtype == torch.float16:
        limit = torch.finfo(torch.float16).max
        values.clamp_(-limit, limit)
    return values
