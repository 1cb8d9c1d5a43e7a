"""A test-only node pack: a small SD1.5-shaped image model with random weights, which the pack does not know."""

from __future__ import annotations

from typing import Any

import comfy.model_base
import comfy.model_management
import comfy.model_patcher
import comfy.supported_models
import torch
from comfy_api.latest import ComfyExtension, io

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


class ThriftOddModel(io.ComfyNode):
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
        device = comfy.model_management.unet_offload_device()
        config: Any = comfy.supported_models.SD15({**UNET, "dtype": torch.float32})
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = comfy.model_base.BaseModel(config, device=device)
            for parameter in model.parameters():
                torch.nn.init.normal_(parameter, std=0.05)
            context = torch.randn(1, 4, 16)
        patcher = comfy.model_patcher.ModelPatcher(
            model, load_device=comfy.model_management.get_torch_device(), offload_device=device
        )
        return io.NodeOutput(patcher, [[context, {"pooled_output": None}]])


class OddModelExtension(ComfyExtension):
    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return [ThriftOddModel]


async def comfy_entrypoint() -> OddModelExtension:
    return OddModelExtension()
