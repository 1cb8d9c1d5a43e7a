"""A test-only node pack: models with random weights, in place of files that nobody wants to download for a test."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any

import comfy.ldm.lightricks.latent_upsampler
import comfy.model_base
import comfy.model_management
import comfy.model_patcher
import comfy.ops
import comfy.supported_models
import torch
from comfy_api.latest import ComfyExtension, io
from comfy_extras.frame_interpolation_models.ifnet import IFNet

sys.path.append(str(Path(__file__).resolve().parent.parent.parent / "support"))
import tiny_models

UNET = {
    "image_size": 32,
    "in_channels": 4,
    "out_channels": 4,
    "model_channels": 32,
    "num_res_blocks": [1, 1],
    "channel_mult": [1, 2],
    "transformer_depth": [1, 1],
    "transformer_depth_output": [1, 1, 1, 1],
    "transformer_depth_middle": 1,
    "num_heads": 2,
    "context_dim": 16,
    "use_spatial_transformer": True,
    "use_linear_in_transformer": False,
    "legacy": False,
    "adm_in_channels": None,
    "use_temporal_attention": False,
}


def patcher_of(model: Any) -> Any:
    """`model` with small random weights, as a loader gives it."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.05)
    return comfy.model_patcher.ModelPatcher(
        model.eval(),
        load_device=comfy.model_management.get_torch_device(),
        offload_device=comfy.model_management.unet_offload_device(),
    )


class ThriftOddModel(io.ComfyNode):
    """A small SD1.5-shaped image model, which the pack does not know."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ThriftOddModel",
            display_name="Odd model (test)",
            category="FrameThrift/test",
            outputs=[io.Model.Output(), io.Conditioning.Output()],
        )

    @classmethod
    def execute(cls) -> io.NodeOutput:
        config: Any = comfy.supported_models.SD15({**UNET, "dtype": torch.float32})
        device = comfy.model_management.unet_offload_device()
        context = torch.randn(1, 4, 16, generator=torch.Generator().manual_seed(0))
        patcher = patcher_of(comfy.model_base.BaseModel(config, device=device))
        return io.NodeOutput(patcher, [[context, {"pooled_output": None}]])


class ThriftOddSound(io.ComfyNode):
    """A tiny audio-video model with its conditionings, and an empty audio latent."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ThriftOddSound",
            category="FrameThrift/test",
            inputs=[io.String.Input("form")],
            outputs=[
                io.Model.Output(),
                io.Conditioning.Output(),
                io.Conditioning.Output(),
                io.Latent.Output(),
            ],
        )

    @classmethod
    def execute(cls, form: str) -> io.NodeOutput:
        # Releases that do not know LTX-2.5's settings would ignore them.
        form = form if form in tiny_models.FORMS else "ltx-2.3"
        text = [tiny_models.conditioning(form, seed=seed) for seed in (1, 7)]
        return io.NodeOutput(tiny_models.build_model(form), *text, {"samples": torch.zeros(1, 8, 101, 16)})


class SoundVAE:
    """What core's nodes ask of LTX-2's audio VAE, with its rates: 25 latent frames a second, 24 kHz."""

    latent_channels = 8
    latent_frequency_bins = 16
    output_sample_rate = 24000

    @property
    def first_stage_model(self) -> SoundVAE:
        return self

    def num_of_latents_from_frames(self, frames: int, frame_rate: float) -> int:
        return math.ceil(frames / frame_rate * 25)

    def decode(self, latent: torch.Tensor) -> torch.Tensor:
        """[B, 8, T, 16] -> [B, samples, 2]: its mean, as loud as it goes."""
        loudness = latent.mean(dim=(1, 3)).tanh().repeat_interleave(self.output_sample_rate // 25, dim=1)
        return loudness[..., None].expand(-1, -1, 2)


class ThriftOddSoundVAE(io.ComfyNode):
    """In place of LTX-2's audio VAE."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(node_id="ThriftOddSoundVAE", category="FrameThrift/test", outputs=[io.Vae.Output()])

    @classmethod
    def execute(cls) -> io.NodeOutput:
        return io.NodeOutput(SoundVAE())


class ThriftOddUpscaler(io.ComfyNode):
    """The makers' latent upsampler, in space or in time."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ThriftOddUpscaler",
            category="FrameThrift/test",
            inputs=[io.Boolean.Input("is_temporal")],
            outputs=[io.LatentUpscaleModel.Output()],
        )

    @classmethod
    def execute(cls, is_temporal: bool) -> io.NodeOutput:
        model = comfy.ldm.lightricks.latent_upsampler.LatentUpsampler.from_config(
            {
                "in_channels": 128,
                "dims": 3,
                "mid_channels": 32,
                "num_blocks_per_stage": 1,
                "spatial_upsample": not is_temporal,
                "temporal_upsample": is_temporal,
            },
            operations=comfy.ops.disable_weight_init,
        )
        return io.NodeOutput(patcher_of(model))


class ThriftOddInterpolator(io.ComfyNode):
    """RIFE for core's FrameInterpolate."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ThriftOddInterpolator",
            category="FrameThrift/test",
            outputs=[io.Custom("INTERP_MODEL").Output()],
        )

    @classmethod
    def execute(cls) -> io.NodeOutput:
        return io.NodeOutput(patcher_of(IFNet(channels=(32, 32, 16, 16, 16))))


class OddModelExtension(ComfyExtension):
    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return [ThriftOddModel, ThriftOddSound, ThriftOddSoundVAE, ThriftOddUpscaler, ThriftOddInterpolator]


async def comfy_entrypoint() -> OddModelExtension:
    return OddModelExtension()
