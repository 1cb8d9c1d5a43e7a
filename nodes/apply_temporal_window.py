"""Node ApplyTemporalWindow: video self-attention over near frames only."""

from typing import Any

from comfy_api.latest import io

from ..patches.mount import mount
from ..patches.window import TemporalWindow


class ApplyTemporalWindow(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ApplyTemporalWindow",
            display_name="Apply Temporal Window",
            category="FrameThrift",
            description=(
                "LTX-Video and LTX-2. Each latent frame attends to the frames near it instead of the whole "
                "clip, which cuts the cost of video self-attention. It pays on long or large clips, where "
                "attention is most of a step; at 97 frames and laptop sizes it saves little. Objects may "
                "change identity along the clip (drift): the smaller the window and the earlier it starts, the "
                "more. In our measurements fewer steps at the same cost stayed closer to the full clip, so try "
                "those first. Other models run unchanged."
            ),
            inputs=[
                io.Model.Input("model", tooltip="An LTX-Video or LTX-2 model. It is cloned, not changed."),
                io.Int.Input(
                    "window",
                    default=4,
                    min=1,
                    max=32,
                    tooltip=(
                        "Latent frames seen on each side (one latent frame is 8 video frames). Smaller is "
                        "cheaper and lets the clip drift more. When 2·window+1 reaches the length of the clip, "
                        "the result is exactly the stock one."
                    ),
                ),
                io.Int.Input(
                    "sink_frames",
                    default=1,
                    min=0,
                    max=8,
                    tooltip=(
                        "First latent frames that every frame still sees. They hold the clip together; each "
                        "costs as much as one more frame in the window."
                    ),
                ),
                io.Float.Input(
                    "start_percent",
                    default=0.5,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip=(
                        "Where in the schedule the window begins to act (0 = first step). Early steps settle what "
                        "is where: from 0.5 on, drift stays small. Later also saves less."
                    ),
                ),
                io.Float.Input(
                    "end_percent",
                    default=1.0,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="Where in the schedule the window stops to act (1 = last step). Earlier saves less.",
                ),
                io.Int.Input(
                    "dense_blocks",
                    default=0,
                    min=0,
                    max=16,
                    tooltip=(
                        "So many first and so many last transformer blocks keep full attention. More keeps the "
                        "clip closer to the stock one and saves less."
                    ),
                    extra_dict={"advanced": True},
                ),
            ],
            outputs=[io.Model.Output()],
        )

    @classmethod
    def execute(cls, model: Any, **settings: Any) -> io.NodeOutput:
        return io.NodeOutput(mount(model, TemporalWindow(**settings)))
