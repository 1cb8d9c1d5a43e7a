"""Builds the tiny model as ComfyUI's own LTXV model, and its captions as ComfyUI conditioning."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .captions import CAPTION_CHANNELS, CAPTION_TOKENS, caption_ids, embed_captions
from .codec import ZOOM

HERE = Path(__file__).resolve().parent
WEIGHTS = HERE / "weights"
BASE = "base"
# Every model is the base with these differences of low rank on top, in this order. The base saw 20 to 30 frames a second
# only; the student samples small clips in 8 steps, the refiner large ones in the last 3.
MODELS: dict[str, tuple[str, ...]] = {
    "pessimist": (),
    "teacher": ("low_rates",),
    "student": ("low_rates", "student"),
    "refiner": ("low_rates", "refiner"),
}

# What ComfyUI's LTXVModel is built with; written into the weights file, where ComfyUI's detection reads it.
TRANSFORMER_CONFIG: dict[str, Any] = {
    "num_layers": 12,
    "num_attention_heads": 3,
    "attention_head_dim": 64,
    "cross_attention_dim": 192,
    "caption_channels": CAPTION_CHANNELS,
    "in_channels": 128,
    "causal_temporal_positioning": True,
    "use_middle_indices_grid": True,
}
PREFIX, DOWN, UP = "diffusion_model.", ".lora_A.weight", ".lora_B.weight"
# The schedule shift the model was judged at; ComfyUI's LTXV takes its logarithm.
SHIFT = 6.0


@dataclass(frozen=True)
class Recipe:
    """How a model is meant to be sampled with Euler: sigmas, the last one 0, and the CFG scale."""

    sigmas: tuple[float, ...]
    cfg: float


def shifted_sigmas(steps: int) -> tuple[float, ...]:
    """`steps` + 1 sigmas from 1 to 0, evenly spaced before the shift."""
    line = [1 - i / steps for i in range(steps + 1)]
    return tuple(SHIFT * t / (1 + (SHIFT - 1) * t) for t in line)


TEACHER_RECIPE = Recipe(shifted_sigmas(24), 2.0)
# Guidance of models of many steps where they refine: at 2 they come out with four fifths of the detail.
REFINING_CFG = 4.0
# The published sigmas of LTX-2's distilled weights, run without CFG.
STUDENT_RECIPE = Recipe((1.0, 0.99375, 0.9875, 0.98125, 0.975, 0.909375, 0.725, 0.421875, 0.0), 1.0)

# The second stage, on an upscaled clip: LTX-2's own, that of LTX-2.3 and 2.5, and the makers' shortest.
REFINER_SIGMAS: dict[str, tuple[float, ...]] = {
    "ltx-2": (0.909375, 0.725, 0.421875, 0.0),
    "ltx-2.3": (0.85, 0.725, 0.4219, 0.0),
    "two steps": (0.625, 0.4, 0.0),
}

Conditioning = list[list[Any]]


def file_of(part: str) -> Path:
    return WEIGHTS / f"{part}.safetensors"


def read_weights(name: str = "teacher") -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """State dict, in float32, and transformer config of one of MODELS."""
    from safetensors import safe_open

    if name not in MODELS:
        raise ValueError(f"name must be one of {', '.join(MODELS)}; got {name!r}.")
    paths = [file_of(part) for part in (BASE, *MODELS[name])]
    for path in paths:
        if not path.is_file():
            raise FileNotFoundError(
                f"The tiny model's weights are not there: expected {path}. Train them as tiny_ltx/README.md says."
            )
    with safe_open(str(paths[0]), framework="pt") as file:
        state = {key: file.get_tensor(key).float() for key in file.keys()}
        metadata = file.metadata() or {}
    for path in paths[1:]:
        with safe_open(str(path), framework="pt") as file:
            add_difference(state, {key: file.get_tensor(key).float() for key in file.keys()})
    return state, json.loads(metadata["config"])["transformer"]


def add_difference(state: dict[str, torch.Tensor], difference: dict[str, torch.Tensor]) -> None:
    """Adds a LoRA's low-rank products, keyed as ComfyUI's own LoRA loader reads them, to the weights of `state`."""
    for key, down in difference.items():
        if key.endswith(DOWN):
            name = key.removeprefix(PREFIX).removesuffix(DOWN)
            weight = state[f"{name}.weight"]
            state[f"{name}.weight"] = weight + difference[f"{PREFIX}{name}{UP}"] @ down


def build_patcher(state: dict[str, torch.Tensor], config: dict[str, Any]) -> Any:
    """A ModelPatcher around comfy.model_base.LTXV; float32 on the CPU, bfloat16 where the GPU has it."""
    import comfy.model_management as mm
    import comfy.model_patcher
    import comfy.supported_models

    device = mm.get_torch_device()
    is_cpu = mm.is_device_cpu(device)
    dtype = torch.bfloat16 if not is_cpu and mm.should_use_bf16(device) else torch.float32
    model_config = comfy.supported_models.LTXV({"image_model": "ltxv", **config})
    model_config.sampling_settings = {"shift": math.log(SHIFT)}
    model_config.unet_config["dtype"] = dtype
    model_config.manual_cast_dtype = None
    model = model_config.get_model(state, "", device=mm.unet_offload_device())
    model.diffusion_model.load_state_dict({key: value.to(dtype) for key, value in state.items()})
    model.eval().requires_grad_(False)
    return comfy.model_patcher.ModelPatcher(
        model, load_device=device, offload_device=mm.unet_offload_device()
    )


def load_model(name: str = "teacher") -> Any:
    """One of MODELS as a ComfyUI ModelPatcher (MODEL). Works in-process from ComfyUI 0.9.2 on."""
    patcher = build_patcher(*read_weights(name))
    # From here ComfyUI's multi-GPU nodes load the copies they sample on.
    patcher.cached_patcher_init = (load_model, (name,))
    return patcher


def load_vae(zoom: int = ZOOM) -> Any:
    """The codec as a ComfyUI VAE: latent [B, 128, T, H, W] <-> images [8 (T - 1) + 1, 4 zoom H, 4 zoom W, 3] in 0..1."""
    from .vae import CodecVAE

    return CodecVAE(zoom)


def _conditioning(context: torch.Tensor) -> Conditioning:
    mask = torch.ones(1, CAPTION_TOKENS, dtype=torch.int64)
    return [[context, {"pooled_output": None, "attention_mask": mask}]]


def encode_caption(
    shape: str, direction: str, speed: str, second_shape: str = "none", texture: str = "plain"
) -> Conditioning:
    """CONDITIONING of one caption: context [1, 5, 32] and its attention mask [1, 5]."""
    ids = torch.tensor([caption_ids(shape, direction, speed, second_shape, texture)])
    return _conditioning(embed_captions(ids))


def encode_empty() -> Conditioning:
    """CONDITIONING of the empty caption, the negative for classifier-free guidance."""
    ids = torch.zeros(1, CAPTION_TOKENS, dtype=torch.int64)
    return _conditioning(embed_captions(ids, empty=torch.ones(1, dtype=torch.bool)))
