"""Node ScheduleSpatialFreeze: steps that reuse what an earlier one computed."""

from typing import Any

from comfy_api.latest import io

from ..patches.cache import DEFAULT, PLACEMENTS, PRECISIONS
from ..patches.freeze import ATTENTION, BLOCKS, FORECASTS, LINEAR, SCOPES, Freeze, FrozenAttention
from ..patches.mount import mount


class ScheduleSpatialFreeze(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ScheduleSpatialFreeze",
            display_name="Schedule Spatial Freeze",
            category="FrameThrift",
            description=(
                "LTX-Video and LTX-2. In a part of the schedule only every n-th step is computed in full; the others "
                "reuse what it left. The first step of that part and the last of the schedule are always full. In our "
                "measurements with 24 Euler steps, whole blocks with a linear forecast came closer to the full result than "
                "fewer steps at the same cost, and than EasyCache; the other scopes and hold hardly did. On 8-step "
                "distilled schedules it lost: leave out early steps there. Other models run unchanged."
            ),
            inputs=[
                io.Model.Input("model", tooltip="An LTX-Video or LTX-2 model. It is cloned, not changed."),
                io.Float.Input(
                    "start_percent",
                    default=0.6,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip=(
                        "Where in the schedule steps may begin to freeze (0 = first step). Earlier saves more: with "
                        "every 3. step full 0.4 saved about a quarter of the time, 0.2 a third."
                    ),
                ),
                io.Float.Input(
                    "end_percent",
                    default=1.0,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="Where in the schedule freezing ends (1 = last step). The last step is full in any case.",
                ),
                io.Int.Input(
                    "refresh_every",
                    default=3,
                    min=1,
                    max=16,
                    tooltip=(
                        "Every so many steps one is computed in full. Larger saves more and departs further from the "
                        "full result; 2 and 3 stayed near it. 1 changes nothing."
                    ),
                ),
                io.Combo.Input(
                    "scope",
                    options=list(SCOPES),
                    default=BLOCKS,
                    tooltip=(
                        "whole blocks: frozen steps compute no video at all (audio goes on). per-frame work: "
                        "feed-forward and text cross-attention are reused, self-attention stays fresh; saves little and "
                        "takes twice the memory. spatial attention: only the share of self-attention within a frame is reused; for the "
                        "record, it is slower than full steps and changes as much as whole blocks."
                    ),
                ),
                io.Combo.Input(
                    "forecast",
                    options=list(FORECASTS),
                    default="linear",
                    tooltip=(
                        "linear: go on from the last two full values; needs twice the memory and is what makes freezing "
                        "worth it. hold: reuse the last one; fewer steps did better."
                    ),
                    extra_dict={"advanced": True},
                ),
                io.Int.Input(
                    "blocks_kept",
                    default=0,
                    min=0,
                    max=64,
                    tooltip="So many first and so many last transformer blocks are always computed.",
                    extra_dict={"advanced": True},
                ),
                io.Combo.Input(
                    "cache_device",
                    options=list(PLACEMENTS),
                    default="auto",
                    tooltip=(
                        "Where values are kept between steps. auto: on the GPU while there is room beside the model, "
                        "else in host memory, which on a fast GPU eats up to half of the saving, less with fp8. The log says how much."
                    ),
                    extra_dict={"advanced": True},
                ),
                io.Float.Input(
                    "cache_limit_gb",
                    default=0.0,
                    min=0.0,
                    max=1024.0,
                    step=0.1,
                    tooltip="At most so many GB are kept; blocks beyond that are computed. 0 = as much as there is room.",
                    extra_dict={"advanced": True},
                ),
                io.Combo.Input(
                    "cache_dtype",
                    options=list(PRECISIONS),
                    default=DEFAULT,
                    tooltip=(
                        "fp8_e4m3fn: half the memory and half the transfer, for less than a decibel in our "
                        "measurement; take it when memory is short."
                    ),
                    optional=True,
                    extra_dict={"advanced": True},
                ),
            ],
            outputs=[io.Model.Output()],
        )

    @classmethod
    def execute(
        cls, model: Any, scope: str = BLOCKS, forecast: str = LINEAR, **settings: Any
    ) -> io.NodeOutput:
        kind = FrozenAttention if scope == ATTENTION else Freeze
        return io.NodeOutput(mount(model, kind(scope=scope, forecast=forecast, **settings)))
