"""Optical flow by torchvision's RAFT (Teed and Deng, 2020, https://arxiv.org/abs/2003.12039)."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange

from .motion import reduced, resized

# RAFT's pyramid needs feature maps of 16 at an eighth of the picture.
SMALLEST = 128
STEP = 8
PIXELS_AT_ONCE = 1280 * 720


def build_raft(state: dict[str, torch.Tensor]) -> torch.nn.Module:
    """raft_small or raft_large with these weights. Raises ValueError for weights of anything else."""
    from torchvision.models.optical_flow import raft_large, raft_small

    first = state.get("feature_encoder.convnormrelu.0.weight")
    if first is None or not any(key.startswith("update_block.") for key in state):
        raise ValueError(
            "model_name: expected the state dict of torchvision's raft_small or raft_large, got a file without "
            "'feature_encoder.' and 'update_block.' weights."
        )
    build = raft_large if first.shape[0] == 64 else raft_small
    model = build(weights=None, progress=False)
    model.load_state_dict(state)
    return model.eval().float()


def working_size(height: int, width: int) -> tuple[int, tuple[int, int]]:
    """By how much RAFT's input is enlarged, and to what size."""
    zoom = max(1, -(-SMALLEST // min(height, width)))
    return zoom, (height * zoom, width * zoom)


def memory_used(height: int, width: int) -> int:
    """Bytes that RAFT takes for pictures of this size: above all, every place of one compared with every of the other."""
    picture = reduced(torch.empty(1, 1, height, width, device="meta"))
    _, size = working_size(*picture.shape[-2:])
    places = math.prod(size) // STEP**2
    return 4 * 4 * places**2 + 2**28


class Raft:
    """Callable (a, b) -> flow [B, 2, H, W] between pictures [B, C, H, W] of any channels.

    Pictures of other than three channels are shown by their three strongest principal components.
    """

    def __init__(self, model: Any) -> None:
        self.model = model

    @torch.no_grad()
    def __call__(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        whole = a.shape[-2:]
        if a.shape[1] != 3:
            a, b = three_components(a, b)
        a, b = reduced(a), reduced(b)
        zoom, size = working_size(*a.shape[-2:])
        # RAFT compares all places with all: pictures one by one, unless they are small.
        together = max(1, PIXELS_AT_ONCE // (size[0] * size[1]))
        flow = torch.cat(
            [
                self._flow(some_a, some_b, zoom)
                for some_a, some_b in zip(a.split(together), b.split(together), strict=True)
            ]
        )
        return resized(F.avg_pool2d(flow, zoom) / zoom if zoom > 1 else flow, whole)

    def _flow(self, a: torch.Tensor, b: torch.Tensor, zoom: int) -> torch.Tensor:
        size = (a.shape[-2] * zoom, a.shape[-1] * zoom)
        pads = (0, -size[1] % STEP, 0, -size[0] % STEP)
        shown = []
        for picture in (a, b):
            if zoom > 1:
                picture = F.interpolate(picture, size=size, mode="bicubic", align_corners=False)
            shown.append(F.pad(picture.clamp(0, 1) * 2 - 1, pads, mode="replicate"))
        flow: torch.Tensor = self.model(*shown)[-1]
        return flow[:, :, : size[0], : size[1]]


def three_components(a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Both pictures as three channels in 0..1: the principal components that each pair has in common."""
    both = rearrange([a, b], "two b c h w -> b c (two h w)")
    both = both - both.mean(dim=2, keepdim=True)
    # On the CPU: some devices have no eigenvectors, and none is faster for so few numbers.
    _, vectors = torch.linalg.eigh((both @ both.mT).cpu())
    shown = vectors[..., -3:].mT.to(both) @ both
    low, high = shown.amin(dim=2, keepdim=True), shown.amax(dim=2, keepdim=True)
    shown = (shown - low) / (high - low).clamp(min=1e-6)
    pair = rearrange(shown, "b c (two h w) -> two b c h w", two=2, h=a.shape[-2])
    return pair[0], pair[1]
