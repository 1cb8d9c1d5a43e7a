"""LTX-2 at its full size with random weights, and the clips that the benchmarks speak of."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import comfy.model_base
import comfy.model_patcher
import comfy.nested_tensor
import comfy.sample
import comfy.samplers
import comfy.supported_models
import torch

BLOCKS = 48
TEXT_TOKENS = 128


@dataclass(frozen=True)
class Clip:
    """A clip by its video frames and pixels; `sounds_for` video frames if its audio is longer than that."""

    frames: int
    width: int
    height: int
    sounds_for: int = 0

    @property
    def name(self) -> str:
        sound = f" with audio of {self.sounds_for} f" if self.sounds_for else ""
        return f"{self.frames} f {self.width}×{self.height}{sound}"

    @property
    def grid(self) -> tuple[int, int, int]:
        """(T, h, w) of the latent."""
        return (self.frames - 1) // 8 + 1, self.height // 32, self.width // 32

    @property
    def audio_frames(self) -> int:
        """Latent audio frames at 25 a second and 24 video frames a second."""
        return round((self.sounds_for or self.frames) / 24 * 25)

    def strided(self, stride: int) -> Clip:
        """The clip that KeyframeStride makes of this one."""
        frames = 8 * -(-(self.grid[0] - 1) // stride) + 1
        return Clip(frames, self.width, self.height, sounds_for=self.frames)


CLIPS = (
    Clip(97, 896, 512),
    Clip(121, 1280, 704),
    Clip(241, 1280, 704),
    Clip(481, 1280, 704),
    Clip(121, 1920, 1088),
)


def size_of(grid: Sequence[int]) -> str:
    """Latent frames and the tokens of each."""
    frames, height, width = grid
    return f"{frames}×{height * width}"


def build_ltx2(device: str, dtype: torch.dtype = torch.bfloat16, blocks: int = BLOCKS) -> Any:
    """A ModelPatcher around LTXAVModel of LTX-2's size; on `meta` it holds no weights."""
    config = {
        "image_model": "ltxav",
        "num_layers": blocks,
        "num_attention_heads": 32,
        "attention_head_dim": 128,
        "cross_attention_dim": 4096,
        "caption_channels": 3840,
        "in_channels": 128,
        "audio_in_channels": 128,
        "audio_num_attention_heads": 32,
        "audio_attention_head_dim": 64,
        "audio_cross_attention_dim": 2048,
        "connector_num_layers": 1,
    }
    settings = comfy.supported_models.LTXAV(config)
    settings.set_inference_dtype(dtype, None)
    place = torch.device(device)
    model = comfy.model_base.LTXAV(settings, device=place)
    if place.type != "meta":
        with torch.no_grad():
            for parameter in model.diffusion_model.parameters():
                parameter.normal_(std=0.02)
    return comfy.model_patcher.ModelPatcher(model, load_device=place, offload_device=place)


def conditioning(device: str) -> list[list[Any]]:
    """CONDITIONING of 128 random text tokens at 24 frames a second."""
    return [[torch.randn(1, TEXT_TOKENS, 2 * 3840, device=device), {"frame_rate": 24.0}]]


def noise(clip: Clip, device: str) -> Any:
    """Nested video and audio noise."""
    video = torch.randn(1, 128, *clip.grid, device=device)
    audio = torch.randn(1, 8, clip.audio_frames, 16, device=device)
    return comfy.nested_tensor.NestedTensor((video, audio))


def empty(clip: Clip, device: str) -> Any:
    """The empty audio-video latent of a clip."""
    return comfy.nested_tensor.NestedTensor([torch.zeros_like(part) for part in noise(clip, device).unbind()])


def sigmas(steps: int) -> torch.Tensor:
    """A schedule that stops half way: what a step costs does not depend on where it is."""
    return torch.linspace(1, 0.5, steps + 1)


def sample(model: Any, clip: Clip, steps: int, device: str, callback: Any = None) -> Any:
    """The samples of so many Euler steps without CFG: one forward each."""
    return comfy.sample.sample_custom(
        model,
        noise(clip, device),
        1.0,
        comfy.samplers.sampler_object("euler"),
        sigmas(steps),
        conditioning(device),
        conditioning(device),
        empty(clip, device),
        callback=callback,
        disable_pbar=True,
        seed=0,
    )
