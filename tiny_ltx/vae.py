"""The codec as a ComfyUI VAE, so that core's decode, tiled decode, encode and guide nodes run around it."""

from __future__ import annotations

import logging
import math
from typing import Any

import comfy.model_management as mm
import comfy.model_patcher
import comfy.sd
import torch

from .codec import BLOCK, ZOOM, Codec


class _Statistics(torch.nn.Module):
    """What core's latent upsampler asks a VAE for; the codec's latents are scaled already."""

    def un_normalize(self, latent: torch.Tensor) -> torch.Tensor:
        return latent

    normalize = un_normalize


class _CodecStage(torch.nn.Module):
    """What comfy.sd.VAE calls: encode [B, 3, F, h, w] -> latent, decode latent -> [B, 3, F, h, w]."""

    def __init__(self, zoom: int) -> None:
        super().__init__()
        self.codec = Codec(zoom)
        self.per_channel_statistics = _Statistics()

    def encode(self, images: torch.Tensor, **_: Any) -> torch.Tensor:
        return self.codec.encode(images)

    def decode(self, latent: torch.Tensor, **_: Any) -> torch.Tensor:
        return self.codec.decode(latent)


def _without_notice(record: logging.LogRecord) -> bool:
    return "No VAE weights detected" not in record.getMessage()


class CodecVAE(comfy.sd.VAE):
    """comfy.sd.VAE around the parameter-free codec; at zoom 8 its compression is LTX's (8 in time, 32 in space)."""

    def __init__(self, zoom: int = ZOOM) -> None:
        # An empty state dict makes the base class set every attribute its release knows, and stop; its notice
        # that there are no weights is true of this codec and would only alarm.
        root = logging.getLogger()
        root.addFilter(_without_notice)
        try:
            super().__init__(sd={})
        finally:
            root.removeFilter(_without_notice)
        self.first_stage_model = _CodecStage(zoom).eval()
        self.latent_channels = 128
        self.latent_dim = 3
        self.output_channels = 3
        space = BLOCK * zoom
        self.upscale_ratio = (lambda a: max(0, a * 8 - 7), space, space)
        self.upscale_index_formula = (8, space, space)
        self.downscale_ratio = (lambda a: max(0, math.floor((a + 7) / 8)), space, space)
        self.downscale_index_formula = (8, space, space)
        self.memory_used_encode = lambda shape, dtype: 16 * shape[2] * shape[3] * shape[4] * 4
        self.memory_used_decode = lambda shape, dtype: 16 * shape[2] * shape[3] * shape[4] * (8 * 32 * 32) * 4
        self.process_input = lambda image: image
        self.process_output = lambda image: image.clamp_(0.0, 1.0)
        self.working_dtypes = [torch.float32]
        self.vae_dtype = torch.float32
        self.device = mm.vae_device()
        self.output_device = mm.intermediate_device()
        self.patcher = comfy.model_patcher.ModelPatcher(
            self.first_stage_model, load_device=self.device, offload_device=mm.vae_offload_device()
        )
        self.size = mm.module_size(self.first_stage_model)
