"""What a windowed model should compute, written down without any part of the pack, and stand-ins' tools."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

SLOT = "optimized_attention_override"


def equal(a: Sequence[torch.Tensor], b: Sequence[torch.Tensor]) -> bool:
    """Whether two samples agree bit for bit."""
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def close(a: Sequence[torch.Tensor], b: Sequence[torch.Tensor], tolerance: float = 1e-3) -> bool:
    """Whether two samples agree up to a share of the largest value."""
    return all((x - y).abs().max() < tolerance * y.abs().max() for x, y in zip(a, b, strict=True))


def visible(
    frames: int, per_frame: int, window: int, sinks: int, guides: int = 0, anchors: int = 0
) -> torch.Tensor:
    """[N, N] bool written down from the semantics, with no code of the pack."""
    clip = frames - anchors
    sees = torch.zeros(frames, frames, dtype=torch.bool)
    for frame in range(clip):
        low = min(max(frame - window, 0), clip - 2 * window - 1)
        sees[anchors + frame, anchors + low : anchors + low + 2 * window + 1] = True
        sees[anchors + frame, anchors : anchors + sinks] = True
    sees[:anchors] = True
    sees[:, :anchors] = True
    tokens = sees.repeat_interleave(per_frame, 0).repeat_interleave(per_frame, 1)
    everything = torch.ones(tokens.shape[0] + guides, tokens.shape[0] + guides, dtype=torch.bool)
    everything[: tokens.shape[0], : tokens.shape[1]] = tokens
    return everything


def masked_model(
    model: Any, sees: torch.Tensor, active: Callable[[float, int], bool] = lambda sigma, block: True
) -> Any:
    """A clone whose video self-attention is masked by `sees` in float64, without any part of the pack.

    `active(sigma, block)` says where; query slices and masks already given are respected.
    """
    clone = model.clone()

    def override(
        func: Any, q: Any, k: Any, v: Any, heads: int, mask: Any = None, **kwargs: Any
    ) -> torch.Tensor:
        block = kwargs["transformer_options"].get("reference_block")
        sigma = float(kwargs["transformer_options"]["sigmas"][0])
        if block is None or not active(sigma, block):
            return func(q, k, v, heads, mask=mask, **kwargs)
        rows = sees
        if q.shape[1] != k.shape[1]:
            # Query slices of guide strengths: the noisy tokens first, then the guides.
            rows = sees[: q.shape[1]] if mask is not None and mask.shape[-2] == 1 else sees[-q.shape[1] :]
        bias = torch.zeros(rows.shape, dtype=torch.float64).masked_fill(~rows, -torch.inf)
        if mask is not None:
            bias = bias + mask.double()
        split = [x.double().unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v)]
        logits = split[0] @ split[1].transpose(-1, -2) * split[0].shape[-1] ** -0.5 + bias
        return (logits.softmax(-1) @ split[2]).transpose(1, 2).flatten(2).to(q.dtype)

    clone.model_options.setdefault("transformer_options", {})[SLOT] = override
    for index, block in enumerate(model.model.diffusion_model.transformer_blocks):
        clone.add_object_patch(
            f"diffusion_model.transformer_blocks.{index}.attn1.forward", marking(block.attn1.forward, index)
        )
    return clone


def marking(forward: Callable[..., Any], index: int) -> Callable[..., Any]:
    def marked(*args: Any, **kwargs: Any) -> Any:
        options = {**kwargs["transformer_options"], "reference_block": index}
        return forward(*args, **{**kwargs, "transformer_options": options})

    return marked


def set_slot(model: Any, override: Callable[..., Any]) -> Any:
    """A clone whose override slot another pack has filled without looking."""
    clone = model.clone()
    clone.model_options.setdefault("transformer_options", {})[SLOT] = override
    return clone
