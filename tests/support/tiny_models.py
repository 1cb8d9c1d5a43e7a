"""Tiny LTXV and LTXAV models with random weights in real ModelPatchers, and one way to sample them."""

from __future__ import annotations

import inspect
from typing import Any

import comfy.context_windows
import comfy.ldm.lightricks.av_model
import comfy.model_base
import comfy.model_patcher
import comfy.model_sampling
import comfy.nested_tensor
import comfy.sample
import comfy.samplers
import comfy.supported_models
import torch

TEXT_TOKENS = 5
HEADS, HEAD_WIDTH, AUDIO_HEAD_WIDTH = 2, 64, 32
FAMILIES = ("ltxv", "ltxav")

# What the checkpoints after LTX-2 say of themselves on top of it.
LTX_2_3 = {
    "apply_gated_attention": True,
    "cross_attention_adaln": True,
    "caption_proj_before_connector": True,
    "caption_projection_first_linear": False,
}
LTX_2_5 = LTX_2_3 | {
    "ff_bias": False,
    "audio_ff_bias": False,
    "use_keyframes_abs_pos_embedding": True,
}


def _is_known(settings: dict[str, Any]) -> bool:
    """Whether this release's model takes all of these settings; it ignores those that it does not know."""
    known: set[str] = set()
    for kind in comfy.ldm.lightricks.av_model.LTXAVModel.__mro__:
        known |= inspect.signature(kind.__init__).parameters.keys()
    return settings.keys() <= known


LATER = {
    name: settings
    for name, settings in {"ltx-2.3": LTX_2_3, "ltx-2.5": LTX_2_5}.items()
    if _is_known(settings)
}
FORMS = (*FAMILIES, *LATER)


def build_model(
    family: str = "ltxv",
    blocks: int = 3,
    head_width: int = HEAD_WIDTH,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> Any:
    """A ModelPatcher on the CPU around the real model class, two heads wide; family: one of FORMS."""
    width = HEADS * head_width
    image_model = "ltxv" if family == "ltxv" else "ltxav"
    config: dict[str, Any] = {
        "image_model": image_model,
        "num_layers": blocks,
        "num_attention_heads": HEADS,
        "attention_head_dim": head_width,
        "cross_attention_dim": width,
        "caption_channels": 16,
        "in_channels": 128,
    }
    if image_model == "ltxav":
        config |= {
            "audio_in_channels": 128,
            "audio_num_attention_heads": HEADS,
            "audio_attention_head_dim": AUDIO_HEAD_WIDTH,
            "audio_cross_attention_dim": HEADS * AUDIO_HEAD_WIDTH,
            "connector_num_layers": 1,
            "connector_attention_head_dim": 8,
            "connector_num_attention_heads": 2,
            **LATER.get(family, {}),
        }
    kind = image_model.upper()
    settings = getattr(comfy.supported_models, kind)(config)
    settings.set_inference_dtype(dtype, None)
    model = getattr(comfy.model_base, kind)(settings, device=torch.device("cpu"))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.diffusion_model.parameters():
            scale = 0.5 if parameter.ndim < 2 else parameter.shape[-1] ** -0.5
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)
    model.diffusion_model.eval()
    cpu = torch.device("cpu")
    return comfy.model_patcher.ModelPatcher(model, load_device=cpu, offload_device=cpu)


def conditioning(family: str = "ltxv", seed: int = 1, batch: int = 1, **values: Any) -> list[list[Any]]:
    """CONDITIONING with random text of 5 tokens."""
    generator = torch.Generator().manual_seed(seed)
    # Video and audio text side by side; later checkpoints get both as wide as the streams.
    channels = {"ltxv": 16, "ltxav": 32}.get(family, HEADS * (HEAD_WIDTH + AUDIO_HEAD_WIDTH))
    text = torch.randn(batch, TEXT_TOKENS, channels, generator=generator)
    mask = {"attention_mask": torch.ones(batch, TEXT_TOKENS, dtype=torch.long)} if family == "ltxv" else {}
    return [[text, {**mask, "frame_rate": 24.0, **values}]]


def noise_like(
    family: str = "ltxv", shape: tuple[int, ...] = (9, 2, 3), batch: int = 1, seed: int = 2
) -> Any:
    """Video noise [B,128,T,h,w], with sound nested with audio of T frames, so that lengths coincide."""
    generator = torch.Generator().manual_seed(seed)
    video = torch.randn(batch, 128, *shape, generator=generator)
    if family == "ltxv":
        return video
    audio = torch.randn(batch, 8, shape[0] * shape[1] * shape[2], 16, generator=generator)
    return comfy.nested_tensor.NestedTensor((video, audio))


def zeros_like(noise: Any) -> Any:
    if noise.is_nested:
        return comfy.nested_tensor.NestedTensor([torch.zeros_like(part) for part in noise.unbind()])
    return torch.zeros_like(noise)


def guides(
    strength: float = 1.0, frames: int = 9, grid: tuple[int, int] = (2, 3)
) -> tuple[torch.Tensor, torch.Tensor, dict[str, Any]]:
    """One guide frame behind `frames` frames: noise, noise mask and conditioning values as LTXVAddGuide makes them."""
    height, width = grid
    noise = noise_like(shape=(frames + 1, height, width))
    mask = torch.ones(1, 1, frames + 1, 1, 1)
    mask[:, :, -1] = 0.0
    y, x = torch.meshgrid(torch.arange(height) * 32.0, torch.arange(width) * 32.0, indexing="ij")
    starts = torch.stack([torch.full_like(y, 16.0), y, x]).flatten(1)
    coordinates = torch.stack([starts, starts + torch.tensor([[8.0], [32.0], [32.0]])], dim=-1)[None]
    entry = {
        "pre_filter_count": height * width,
        "strength": strength,
        "pixel_mask": None,
        "latent_shape": [1, height, width],
    }
    values = {"keyframe_idxs": coordinates, "guide_attention_entries": [entry]}
    conds = {"positive": conditioning(**values), "negative": conditioning(seed=7, **values)}
    return noise, mask, conds


def sample(
    model: Any,
    family: str = "ltxv",
    noise: Any = None,
    steps: int = 3,
    cfg: float = 2.0,
    sampler: str = "euler",
    sigmas: torch.Tensor | None = None,
    positive: Any = None,
    negative: Any = None,
    noise_mask: torch.Tensor | None = None,
    **options: Any,
) -> list[torch.Tensor]:
    """Sample through comfy.sample as SamplerCustom does. Returns [video] or [video, audio]."""
    noise = noise_like(family) if noise is None else noise
    if sigmas is None:
        sigmas = torch.linspace(1, 0, steps + 1)
    out = comfy.sample.sample_custom(
        model,
        noise,
        cfg,
        comfy.samplers.sampler_object(sampler),
        sigmas,
        positive if positive is not None else conditioning(family),
        negative if negative is not None else conditioning(family, seed=7),
        zeros_like(noise),
        noise_mask=noise_mask,
        disable_pbar=True,
        seed=3,
        **options,
    )
    return list(out.unbind()) if out.is_nested else [out]


def sample_with(
    guider: Any, family: str = "ltxv", cfg: float = 2.0, sigmas: torch.Tensor | None = None
) -> list[torch.Tensor]:
    """Euler steps (three) with a guider, as SamplerCustomAdvanced takes them. Returns [video] or [video, audio]."""
    guider.set_conds(conditioning(family), conditioning(family, seed=7))
    guider.set_cfg(cfg)
    noise, sampler = noise_like(family), comfy.samplers.sampler_object("euler")
    sigmas = torch.linspace(1, 0, 4) if sigmas is None else sigmas
    out = guider.sample(noise, zeros_like(noise), sampler, sigmas, disable_pbar=True, seed=3)
    return list(out.unbind()) if out.is_nested else [out]


def context_windows(patcher: Any, length: int = 7, overlap: int = 3) -> Any:
    """A clone that samples 15 latent frames in windows that stay where they are."""
    clone = patcher.clone()
    windows = comfy.context_windows
    clone.model_options["context_handler"] = windows.IndexListContextHandler(
        context_schedule=windows.get_matching_context_schedule(windows.ContextSchedules.STATIC_STANDARD),
        fuse_method=windows.get_matching_fuse_method(windows.ContextFuseMethods.PYRAMID),
        context_length=length,
        context_overlap=overlap,
        dim=2,
    )
    windows.create_prepare_sampling_wrapper(clone)
    return clone


# Older releases cut only plain video latents into windows.
CUT = FORMS if hasattr(comfy.context_windows.IndexListContextHandler, "_get_latent_shapes") else ("ltxv",)
