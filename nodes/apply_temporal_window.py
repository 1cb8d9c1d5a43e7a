"""Node ApplyTemporalWindow: video self-attention over near frames only."""

from typing import Any

from comfy_api.latest import io

from ..patches.clock import Schedule
from ..patches.mount import mount
from ..patches.techniques.temporal_window import TemporalWindow
from .form import field

DEFAULT = TemporalWindow()


class ApplyTemporalWindow(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        settings = TemporalWindow.settings()
        return io.Schema(
            node_id="ApplyTemporalWindow",
            display_name="Apply Temporal Window",
            category="FrameThrift",
            description=(
                "LTX-Video and LTX-2. Each latent frame attends to the frames near it instead of the whole "
                "clip, which cuts the cost of video self-attention. It pays on long or large clips, where "
                "attention is most of a step; at 97 frames and laptop sizes it saves little. Objects may "
                "change identity along the clip (drift): the smaller the window and the earlier it starts, the "
                "more. In our measurements with 24 steps fewer of them at the same cost stayed closer to the full clip, so try "
                "those first. Other models run unchanged."
            ),
            inputs=[
                io.Model.Input("model", tooltip="An LTX-Video or LTX-2 model. It is cloned, not changed."),
                field(
                    settings,
                    "window",
                    (
                        "Latent frames seen on each side (one latent frame is 8 video frames). Smaller is "
                        "cheaper and lets the clip drift more. When 2·window+1 reaches the length of the clip, "
                        "the result is exactly the stock one."
                    ),
                ),
                field(
                    settings,
                    "sink_frames",
                    (
                        "First latent frames that every frame still sees. They hold the clip together; each "
                        "costs as much as one more frame in the window."
                    ),
                ),
                field(
                    settings,
                    "start_percent",
                    (
                        "Where in the schedule the window begins to act (0 = first step). Early steps settle what "
                        "is where: from 0.5 on, drift stays small. Later also saves less."
                    ),
                ),
                field(
                    settings,
                    "end_percent",
                    "Where in the schedule the window stops to act (1 = last step). Earlier saves less.",
                ),
                field(
                    settings,
                    "dense_blocks",
                    (
                        "So many first and so many last transformer blocks keep full attention. More keeps the "
                        "clip closer to the stock one and saves less."
                    ),
                    advanced=True,
                ),
            ],
            outputs=[io.Model.Output()],
        )

    @classmethod
    def execute(
        cls,
        model: Any,
        window: int = DEFAULT.window,
        sink_frames: int = DEFAULT.sink_frames,
        start_percent: float = DEFAULT.schedule.start_percent,
        end_percent: float = DEFAULT.schedule.end_percent,
        dense_blocks: int = DEFAULT.dense_blocks,
    ) -> io.NodeOutput:
        schedule = Schedule(start_percent, end_percent)
        technique = TemporalWindow(window, sink_frames, dense_blocks, schedule=schedule)
        return io.NodeOutput(mount(model, technique))
