"""Node ThriftAttentionPrecision: video attention in another type than the model computes in."""

from typing import Any

from comfy_api.latest import io

from ..patches.mount import mount
from ..patches.techniques.attention_precision import AttentionPrecision
from .form import field

DEFAULT = AttentionPrecision()


class ThriftAttentionPrecision(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        settings = AttentionPrecision.settings()
        return io.Schema(
            node_id="ThriftAttentionPrecision",
            display_name="Thrift Attention Precision",
            category="FrameThrift",
            description=(
                "LTX-Video and LTX-2. Computes video attention in a type of its own; everything else stays as it is. "
                "For models that compute in fp32, as LTX does on RTX 20 cards: there fp16 is what the card does fast, and it "
                "changes the clip little. Useless for a bf16 model on a card that has bf16 (RTX 30 and newer): "
                "that is what ComfyUI runs LTX as by default, and auto then changes nothing. Other models run unchanged."
            ),
            inputs=[
                io.Model.Input("model", tooltip="An LTX-Video or LTX-2 model. It is cloned, not changed."),
                field(
                    settings,
                    "self_attention",
                    (
                        "The type for attention of the video to itself, which grows with the square of its tokens. auto "
                        "takes what the card does fast: bf16, else fp16, else fp32; a bf16 or fp16 model stays as it is "
                        "where that is fast. fp16 is closer than bf16 at the same cost. fp32 is slower and exacter."
                    ),
                ),
                field(
                    settings,
                    "text_attention",
                    (
                        "The type for attention of the video to the text, a small part of a step. The same choices. Sage "
                        "attention and the like take no fp32: there fp32 changes nothing."
                    ),
                ),
            ],
            outputs=[io.Model.Output()],
        )

    @classmethod
    def execute(
        cls,
        model: Any,
        self_attention: str = DEFAULT.self_attention,
        text_attention: str = DEFAULT.text_attention,
    ) -> io.NodeOutput:
        return io.NodeOutput(mount(model, AttentionPrecision(self_attention, text_attention)))
