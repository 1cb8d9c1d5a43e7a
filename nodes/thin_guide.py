"""Node ThriftThinGuide: a guide video at the low frame rate of a strided clip."""

from typing import Any

from comfy_api.latest import io

from ..latents.stride import DEFAULT_STRIDE, LARGEST_STRIDE, guide_frames


class ThriftThinGuide(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ThriftThinGuide",
            display_name="Thrift Thin Guide",
            category="FrameThrift",
            description=(
                "For guides that are videos: keeps one frame in so many, from the first on, as Keyframe Stride does with "
                "the clip, and repeats the last where the strided clip is a little longer. Put it before the node that adds the guide, whose frame numbers are those of the low rate then."
            ),
            inputs=[
                io.Image.Input("image", tooltip="The frames of the guide, at the full frame rate."),
                io.Int.Input(
                    "stride",
                    default=DEFAULT_STRIDE,
                    min=1,
                    max=LARGEST_STRIDE,
                    tooltip="The stride of Keyframe Stride. 1 changes nothing.",
                ),
            ],
            outputs=[io.Image.Output()],
        )

    @classmethod
    def execute(cls, image: Any, stride: int) -> io.NodeOutput:
        return io.NodeOutput(image if stride == 1 else image[guide_frames(len(image), stride)])
