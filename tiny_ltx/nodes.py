"""The nodes of the tiny test model: its loader, and its upscaler between two stages."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import ComfyExtension, io

from .captions import DIRECTIONS, SECOND_SHAPES, SHAPES, SPEEDS, TEXTURES
from .codec import ZOOM, Codec, upscaled
from .model import MODELS, encode_caption, encode_empty, load_model, load_vae


class ThriftTinyLTX(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ThriftTinyLTX",
            display_name="Tiny LTX (test model)",
            category="FrameThrift/test",
            description=(
                "A tiny test model of LTXV architecture (7 M parameters) that draws grey shapes moving over a "
                "panning background. It shows in seconds, also on a CPU, what a technique does to a video model. "
                "Use it at 256 x 256, 17 to 193 frames, 3 to 30 frames per second, with CFG 2; the student in 8 steps "
                "without CFG, and the refiner behind it, upscaled to 512 x 512, in 3."
            ),
            inputs=[
                io.Combo.Input(
                    "shape",
                    options=list(SHAPES),
                    default="ring",
                    tooltip="The bright shape that moves through the clip.",
                ),
                io.Combo.Input(
                    "direction",
                    options=list(DIRECTIONS),
                    default="horizontal",
                    tooltip="The line the shapes move along; they bounce at the borders.",
                ),
                io.Combo.Input(
                    "speed",
                    options=list(SPEEDS),
                    default="medium",
                    tooltip="How fast the shapes move: about 20, 48 or 112 image pixels per second, "
                    "whatever the frame rate.",
                ),
                io.Combo.Input(
                    "second_shape",
                    options=list(SECOND_SHAPES),
                    default="none",
                    tooltip="A dark shape that moves as well; none is the easier clip for the model.",
                ),
                io.Combo.Input(
                    "texture",
                    options=list(TEXTURES),
                    default=TEXTURES[0],
                    optional=True,
                    tooltip="What the bright shape is covered with; shows at 512 x 512 only.",
                ),
                io.Combo.Input(
                    "weights",
                    options=list(MODELS),
                    default="teacher",
                    optional=True,
                    tooltip="teacher: many steps. student: 8 steps at 256 x 256. refiner: the second stage at 512 x 512. "
                    "pessimist: a teacher that saw 20 to 30 frames per second only.",
                ),
                io.Int.Input(
                    "zoom",
                    default=ZOOM,
                    min=1,
                    max=ZOOM,
                    optional=True,
                    tooltip="Image pixels to a side that a pixel of the clip becomes. 8: a token covers 32 x 32, as in LTX. "
                    "1: the clip's own 32 x 32 or 64 x 64 pixels, which is what the lab measures.",
                ),
            ],
            outputs=[
                io.Model.Output(display_name="model"),
                io.Conditioning.Output(display_name="positive"),
                io.Conditioning.Output(display_name="negative"),
                io.Vae.Output(display_name="vae"),
            ],
        )

    @classmethod
    def execute(
        cls,
        shape: str,
        direction: str,
        speed: str,
        second_shape: str,
        texture: str = TEXTURES[0],
        weights: str = "teacher",
        zoom: int = ZOOM,
    ) -> io.NodeOutput:
        positive = encode_caption(shape, direction, speed, second_shape, texture)
        return io.NodeOutput(load_model(weights), positive, encode_empty(), load_vae(zoom))


class ThriftTinyUpscale(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ThriftTinyUpscale",
            display_name="Tiny LTX Upscale (test model)",
            category="FrameThrift/test",
            description=(
                "The latent of the same clip at twice the size: decoded, enlarged, encoded, exactly as the refiner was "
                "trained. In a graph of two stages it stands where a latent upscale model does."
            ),
            inputs=[io.Latent.Input("samples", tooltip="A sampled latent of the tiny model.")],
            outputs=[io.Latent.Output()],
        )

    @classmethod
    def execute(cls, samples: dict[str, Any]) -> io.NodeOutput:
        return io.NodeOutput({**samples, "samples": upscaled(Codec(), samples["samples"].float())})


class TinyLTXExtension(ComfyExtension):
    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return [ThriftTinyLTX, ThriftTinyUpscale]
