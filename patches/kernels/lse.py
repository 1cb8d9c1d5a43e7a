"""Attention in parts: outputs over disjoint keys, and how they are merged.

Two parts of one softmax, each with its output and the logarithm of its sum of exponentials (LSE), give the whole:
out = σ(lse_a − lse_b)·out_a + σ(lse_b − lse_a)·out_b. The same identity carries FlashAttention's blocks (Dao et al.,
arXiv 2205.14135).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from einops import rearrange

Outputs = tuple[torch.Tensor, torch.Tensor]
Operator = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, "float | None"], Outputs]


def attend_with_lse(
    q_BHND: torch.Tensor, k_BHKD: torch.Tensor, v_BHKD: torch.Tensor, scale: float | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Output [B,H,N,D] and LSE [B,H,N] of attention, where `has_lse`."""
    operator = _operator(q_BHND.device.type, q_BHND.dtype, q_BHND.shape[-1])
    assert operator is not None
    return operator(q_BHND, k_BHKD, v_BHKD, scale)


@lru_cache
def has_lse(device_type: str, dtype: torch.dtype, width: int) -> bool:
    """Whether attention with LSE runs here for heads of this width."""
    return _operator(device_type, dtype, width) is not None


def _of_cpu(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float | None) -> Outputs:
    aten: Any = torch.ops.aten
    return aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, scale=scale)[:2]


def _flash(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float | None) -> Outputs:
    aten: Any = torch.ops.aten
    return aten._scaled_dot_product_flash_attention(q, k, v, scale=scale)[:2]


def _efficient(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float | None) -> Outputs:
    aten: Any = torch.ops.aten
    out, lse = aten._scaled_dot_product_efficient_attention(q, k, v, None, True, scale=scale)[:2]
    # The kernel pads its LSE to a multiple of 32 queries.
    return out, lse[..., : q.shape[2]]


@lru_cache
def _operator(device_type: str, dtype: torch.dtype, width: int) -> Operator | None:
    """PyTorch's fastest operator with LSE that runs here: flash attention needs half types and, on NVIDIA, an RTX 30."""
    probe = torch.zeros(1, 1, 8, width, device=device_type, dtype=dtype)
    for operator in (_flash, _efficient) if device_type == "cuda" else (_of_cpu,):
        try:
            out, lse = operator(probe, probe, probe, None)
        except (RuntimeError, AttributeError, NotImplementedError):
            continue
        if out.shape == probe.shape and lse.shape == probe.shape[:3]:
            return operator
    return None


def merge(out_a: torch.Tensor, lse_a: torch.Tensor, out_b: torch.Tensor, lse_b: torch.Tensor) -> torch.Tensor:
    """The whole attention of two parts [B,H,N,D] with LSE [B,H,N] over disjoint keys."""
    share = torch.sigmoid(lse_a - lse_b)[..., None].to(out_a.dtype)
    return torch.lerp(out_b, out_a, share)


def merge_into(out_a: torch.Tensor, lse_a: torch.Tensor, out_b: torch.Tensor, lse_b: torch.Tensor) -> None:
    """The same, written over part a."""
    share = torch.sigmoid(lse_b - lse_a)[..., None].to(out_a.dtype)
    out_a.lerp_(out_b, share)
    torch.logaddexp(lse_a, lse_b, out=lse_a)


def split_heads(x: torch.Tensor, heads: int) -> torch.Tensor:
    return rearrange(x, "b n (h d) -> b h n d", h=heads)
