"""Node ScheduleSpatialFreeze: steps that reuse what an earlier one computed."""

from typing import Any

from comfy_api.latest import io

from ..patches.clock import Schedule
from ..patches.mount import mount
from ..patches.techniques.spatial_freeze import SpatialFreeze
from .form import field

DEFAULT = SpatialFreeze()


class ScheduleSpatialFreeze(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        settings = SpatialFreeze.settings()
        return io.Schema(
            node_id="ScheduleSpatialFreeze",
            display_name="Schedule Spatial Freeze",
            category="FrameThrift",
            description=(
                "LTX-Video and LTX-2. In a part of the schedule only every n-th step is computed in full; the others "
                "reuse what it left. The first step of that part and the last of the schedule are always full. In our "
                "measurements with 24 Euler steps, whole blocks with a linear forecast came closer to the full result than "
                "fewer steps at the same cost, and than EasyCache; the other scopes and hold did not. So it was with 16 and "
                "12 steps, and on top of Keyframe Stride it cost next to nothing. On 8-step distilled schedules little can "
                "freeze, and one step less came closer. Other models run unchanged."
            ),
            inputs=[
                io.Model.Input("model", tooltip="An LTX-Video or LTX-2 model. It is cloned, not changed."),
                field(
                    settings,
                    "start_percent",
                    (
                        "Where in the schedule steps may begin to freeze (0 = first step). Earlier saves more: with "
                        "every 3. step full 0.4 saved about a quarter of the time, 0.2 a third."
                    ),
                ),
                field(
                    settings,
                    "end_percent",
                    "Where in the schedule freezing ends (1 = last step). The last step is full in any case.",
                ),
                field(
                    settings,
                    "refresh_every",
                    (
                        "Every so many steps one is computed in full. Larger saves more and departs further from the "
                        "full result; 2 and 3 stayed near it. 1 changes nothing."
                    ),
                ),
                field(
                    settings,
                    "scope",
                    (
                        "whole blocks: frozen steps compute no video at all (audio goes on). per-frame work: "
                        "feed-forward and text cross-attention are reused, self-attention stays fresh; saves little and "
                        "takes twice the memory. spatial attention: only the share of self-attention within a frame is reused; for the "
                        "record, it is slower than full steps and changes as much as whole blocks."
                    ),
                ),
                field(
                    settings,
                    "forecast",
                    (
                        "linear: go on from the last two full values; needs twice the memory and is what makes freezing "
                        "worth it. hold: reuse the last one; fewer steps did better."
                    ),
                    advanced=True,
                ),
                field(
                    settings,
                    "blocks_kept",
                    "So many first and so many last transformer blocks are always computed.",
                    advanced=True,
                ),
                field(
                    settings,
                    "cache_device",
                    (
                        "Where values are kept between steps. auto: on the GPU while there is room beside the model, "
                        "else in host memory, which on a fast GPU eats up to half of the saving, less with fp8. The log says how much."
                    ),
                    advanced=True,
                ),
                field(
                    settings,
                    "cache_limit_gb",
                    "At most so many GB are kept; blocks beyond that are computed. 0 = as much as there is room.",
                    advanced=True,
                ),
                field(
                    settings,
                    "cache_dtype",
                    (
                        "fp8_e4m3fn: half the memory and half the transfer, for less than a tenth of a decibel in "
                        "our measurement; take it when memory is short."
                    ),
                    advanced=True,
                    optional=True,
                ),
            ],
            outputs=[io.Model.Output()],
        )

    @classmethod
    def execute(
        cls,
        model: Any,
        start_percent: float = DEFAULT.schedule.start_percent,
        end_percent: float = DEFAULT.schedule.end_percent,
        refresh_every: int = DEFAULT.refresh_every,
        scope: str = DEFAULT.scope,
        forecast: str = DEFAULT.forecast,
        blocks_kept: int = DEFAULT.blocks_kept,
        cache_device: str = DEFAULT.cache_device,
        cache_limit_gb: float = DEFAULT.cache_limit_gb,
        cache_dtype: str = DEFAULT.cache_dtype,
    ) -> io.NodeOutput:
        technique = SpatialFreeze(
            refresh_every,
            scope,
            forecast,
            blocks_kept,
            cache_device,
            cache_limit_gb,
            cache_dtype,
            schedule=Schedule(start_percent, end_percent),
        )
        return io.NodeOutput(mount(model, technique))
