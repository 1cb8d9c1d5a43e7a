"""Node ThriftPaceGPU: pauses that keep a GPU cool, quiet or free for others."""

from typing import Any

from comfy_api.latest import io

from ..patches.mount import mount
from ..patches.techniques.pacing import GpuPacing
from .form import field

DEFAULT = GpuPacing()


class ThriftPaceGPU(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        settings = GpuPacing.settings()
        return io.Schema(
            node_id="ThriftPaceGPU",
            display_name="Thrift Pace GPU",
            category="FrameThrift",
            description=(
                "LTX-Video and LTX-2. Pauses between model calls, and within long ones, so that the GPU stays below a "
                "temperature or is busy for a share of the time only. For laptops that get loud, throttle, freeze the "
                "desktop or shut down. It makes nothing cheaper: runs take longer by the pauses. The result is the same, "
                "bit for bit. Decoding and other models are not paced."
            ),
            inputs=[
                io.Model.Input("model", tooltip="An LTX-Video or LTX-2 model. It is cloned, not changed."),
                field(
                    settings,
                    "target_temperature",
                    (
                        "°C. When the GPU is this hot, sampling waits until it has cooled down. Lower keeps it cooler and "
                        "takes longer; below what it has when idle it waits in vain, for max_pause in every step. 0 ignores "
                        "the temperature. The sensor is NVIDIA's driver, or AMD's with the package amdsmi; without any only "
                        "max_duty works."
                    ),
                ),
                field(
                    settings,
                    "resume_below",
                    (
                        "So many degrees below target_temperature sampling goes on. More means fewer and longer pauses, and "
                        "a cooler GPU."
                    ),
                ),
                field(
                    settings,
                    "max_duty",
                    (
                        "Share of the time for which the GPU may compute, with or without a sensor. 0.7 keeps it about 70% "
                        "busy, and sampling takes 1/0.7 times as long. Lower keeps the machine cooler and quieter and the "
                        "desktop usable. 1 never pauses for this."
                    ),
                ),
                field(
                    settings,
                    "max_pause",
                    (
                        "Seconds. All pauses of one step together are no longer, so that a hot room never hangs a run. When "
                        "they reach it, sampling goes on hotter or busier than asked, and the log says so."
                    ),
                ),
            ],
            outputs=[io.Model.Output()],
        )

    @classmethod
    def execute(
        cls,
        model: Any,
        target_temperature: int = DEFAULT.target_temperature,
        resume_below: int = DEFAULT.resume_below,
        max_duty: float = DEFAULT.max_duty,
        max_pause: float = DEFAULT.max_pause,
    ) -> io.NodeOutput:
        return io.NodeOutput(mount(model, GpuPacing(target_temperature, resume_below, max_duty, max_pause)))
