"""Attention without any part of the pack, for kernels that are given an attention function."""

from __future__ import annotations

import torch

HEADS, WIDTH = 2, 8


def attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None = None
) -> torch.Tensor:
    """Plain attention in the dtype of its inputs, [B, N, C]."""
    heads = [x.unflatten(-1, (HEADS, -1)).transpose(1, 2) for x in (q, k, v)]
    out = torch.nn.functional.scaled_dot_product_attention(*heads, attn_mask=mask)
    return out.transpose(1, 2).flatten(2)


def tensors(
    queries: int,
    keys: int | None = None,
    batch: int = 1,
    width: int = HEADS * WIDTH,
    dtype: torch.dtype = torch.float64,
) -> list[torch.Tensor]:
    """Random q, k and v, always the same ones for the same sizes; as many keys as queries unless said."""
    generator = torch.Generator().manual_seed(0)
    tokens = (queries, keys or queries, keys or queries)
    return [torch.randn(batch, n, width, generator=generator, dtype=torch.float64).to(dtype) for n in tokens]
