"""Node KeyframeStride: the same seconds with fewer latent frames."""

from typing import Any

from comfy_api.latest import io
from comfy_execution.graph_utils import ExecutionBlocker

from ..latents import pixels
from ..latents.stride import (
    StrideNote,
    low_rate,
    refuse_strided,
    thin,
    video_of,
    warn_of_low_rate,
    warn_of_tail,
)
from ..patches import layouts
from ..patches.mount import mount, plan_of
from ..patches.techniques.keyframe_stride import StretchedTimes
from .form import field


class KeyframeStride(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        settings = StretchedTimes.settings()
        return io.Schema(
            node_id="KeyframeStride",
            display_name="Keyframe Stride",
            category="FrameThrift",
            description=(
                "LTX-Video and LTX-2. Diffuses fewer latent frames for the same seconds: the clip comes out at the "
                "frame rate divided by stride, and everything in a step gets cheaper by about that factor. It is "
                "exactly the stock graph with a shorter latent and a lower frame rate. In-between frames come from "
                "Latent Flow Interpolate or a frame interpolation model. Behind a finished first stage, with vae, it leaves the "
                "second every stride-th frame to refine. In our measurements of one stage stride 2 was as close to real "
                "clips as fewer steps at the same cost on short clips, and closer on long ones and with few-step weights; "
                "stride 3 came closer than 4 for hardly more. Between two stages stride 2 was about as good as fewer "
                "steps in both; to save more, the same stride in both stages came closer than a longer one in the second "
                "alone. It is another clip than the full one, not a preview of it, and depends on how well the weights "
                "know low frame rates; fast motion suffers most."
            ),
            inputs=[
                io.Model.Input("model", tooltip="An LTX-Video or LTX-2 model. It is cloned, not changed."),
                io.Latent.Input(
                    "latent",
                    tooltip=(
                        "The full-length video or audio-video latent, or one that this node has strided before. Audio keeps "
                        "its length. Add guides and generated keyframes after this node, with frame numbers of the low frame "
                        "rate. A sampler that makes its own latent is given the low length by hand."
                    ),
                ),
                field(
                    settings,
                    "stride",
                    (
                        "One frame in so many is diffused. 2 halves the cost; larger saves more and leaves more of "
                        "the motion to the in-betweening, 3 much less than 4. 1 changes nothing. It counts from the full length: on a latent "
                        "of stride 2, 4 leaves every other frame."
                    ),
                ),
                field(
                    settings,
                    "frame_rate",
                    (
                        "The full frame rate, the same as in the conditioning, to hand on the low one. 0 = not given."
                    ),
                    optional=True,
                ),
                io.Vae.Input(
                    "vae",
                    optional=True,
                    tooltip="Needed only when the latent holds a video: it is decoded, thinned and encoded again.",
                ),
            ],
            outputs=[
                io.Model.Output(),
                io.Latent.Output(),
                io.Float.Output(
                    display_name="frame_rate",
                    tooltip=(
                        "The low frame rate, for a clip that is shown without in-betweening; only with frame_rate set. Not "
                        "for the conditioning, which keeps the full rate."
                    ),
                ),
                io.Image.Output(
                    display_name="frames",
                    tooltip=(
                        "The video that was decoded, all its frames from before thinning: between two stages the reference of "
                        "Latent Flow Interpolate. Nothing for an empty latent and at stride 1; a reference then counts as "
                        "not connected."
                    ),
                ),
            ],
        )

    @classmethod
    def execute(
        cls, model: Any, latent: dict[str, Any], stride: int, frame_rate: float = 0.0, vae: Any = None
    ) -> io.NodeOutput:
        low = low_rate(frame_rate, stride)
        shown: Any = low or ExecutionBlocker("Keyframe Stride: set frame_rate to get the low one.")
        if stride == 1:
            refuse_strided(latent)
            if any(isinstance(entry, StretchedTimes) for entry in plan_of(model)):
                model = mount(model, StretchedTimes(0, 0, stride=1))
            return io.NodeOutput(model, latent, shown, None)
        diffusion_model = layouts.require(
            model, "The frame times of others cannot be stretched: connect one of those, or set stride to 1."
        )
        told = layouts.frames_a_latent(diffusion_model)
        frames_a_latent = told or pixels.frames_a_latent(vae, video_of(latent))

        frames: Any = None

        def reencode(video: Any, thin_frames: Any) -> Any:
            nonlocal frames
            frames = pixels.decode(vae, video, frames_a_latent)
            return pixels.encode(vae, thin_frames(frames))

        channels = getattr(getattr(model.model, "latent_format", None), "latent_channels", None)
        thinned = thin(latent, stride, None if vae is None else reencode, channels, frames_a_latent)
        note = StrideNote.read(thinned)
        assert note is not None
        warn_of_low_rate(low, stride)
        warn_of_tail(note)
        patched = mount(model, StretchedTimes(note.frames, note.strided_frames, stride, frame_rate))
        return io.NodeOutput(patched, thinned, shown, None if frames is None else frames.flatten(0, 1))
