"""Node LatentFlowInterpolate: a strided clip back at its full frame rate."""

from typing import Any

import comfy.model_management as mm
import comfy.utils
from comfy_api.latest import io
from comfy_execution.graph_utils import ExecutionBlocker

from ..latents import interpolate, pixels, raft
from ..latents.interpolate import LINEAR, SMOOTH, Estimate
from ..latents.motion import estimate_motion
from ..latents.restore import note_for, restore_frames, restore_latents, restored
from ..latents.stride import LARGEST_STRIDE, video_of

MOTION, OPTICAL_FLOW = "motion", "optical_flow"
METHODS = (LINEAR, SMOOTH, MOTION, OPTICAL_FLOW)


class LatentFlowInterpolate(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LatentFlowInterpolate",
            display_name="Latent Flow Interpolate",
            category="FrameThrift",
            description=(
                "Brings a latent from Keyframe Stride back to its full length. With vae the frames in between are made "
                "on decoded frames, which is right about the eight frames inside a latent frame; it costs a decode and, "
                "unless encode is off, an encode. Without vae the latents themselves are mixed: quick, and only good "
                "for a preview. Behind it a sampler may refine the clip: in our measurements best from noise level 0.7 or 0.8."
            ),
            inputs=[
                io.Latent.Input(
                    "latent",
                    tooltip=(
                        "A sampled latent that went through Keyframe Stride, without guides and generated keyframes. Audio is "
                        "kept as it is."
                    ),
                ),
                io.Combo.Input(
                    "method",
                    options=list(METHODS),
                    default="motion",
                    tooltip=(
                        "linear: mixes both neighbours; cheapest, ghosts where things move. smooth: the same with an "
                        "even flow of change. motion: moves things along, no model needed; still parts stay still; "
                        "alike at stride 2, the best for fast motion. optical_flow: the same with the connected RAFT "
                        "model; in our measurements slower than motion and no better."
                    ),
                ),
                io.Vae.Input(
                    "vae", optional=True, tooltip="Connect it for good frames. Without it: a preview."
                ),
                io.Custom("OPTICAL_FLOW").Input(
                    "optical_flow",
                    optional=True,
                    tooltip="Only for method optical_flow: from Load Optical Flow Model.",
                ),
                io.Boolean.Input(
                    "encode",
                    default=True,
                    optional=True,
                    tooltip="Off: only the images are made, and encoding is saved. The latent output then stays empty.",
                ),
                io.Int.Input(
                    "stride",
                    default=0,
                    min=0,
                    max=LARGEST_STRIDE,
                    optional=True,
                    tooltip=(
                        "0 = from the latent's note. Set it where another node has dropped the note; 1 for a clip that was "
                        "never strided, which is handed on."
                    ),
                    extra_dict={"advanced": True},
                ),
                io.Int.Input(
                    "length",
                    default=0,
                    min=0,
                    max=16384,
                    optional=True,
                    tooltip="Full length in video frames. 0 = from the latent's note, else as long as stride makes it.",
                    extra_dict={"advanced": True},
                ),
            ],
            outputs=[
                io.Latent.Output(tooltip="At the full length, for a refining sampler or for decoding."),
                io.Image.Output(tooltip="The frames at the full rate; only with vae connected."),
            ],
        )

    @classmethod
    def execute(
        cls,
        latent: dict[str, Any],
        method: str,
        vae: Any = None,
        optical_flow: Any = None,
        encode: bool = True,
        stride: int = 0,
        length: int = 0,
    ) -> io.NodeOutput:
        estimate = _estimator(method, optical_flow)
        video = video_of(latent)
        note = note_for(latent, stride, length, pixels.frames_a_latent(vae, video))
        device = mm.get_torch_device()
        if vae is None:
            no_images = ExecutionBlocker("Latent Flow Interpolate: connect vae to get images.")
            if note is not None:
                _make_room(optical_flow, method, video.shape, device)
                latent = restore_latents(latent, note, method, estimate, device, _progress())
            return io.NodeOutput(latent, no_images)
        frames = pixels.decode(vae, video, None if note is None else note.frames_a_latent)
        restored_latent: Any = latent
        if note is not None:
            _make_room(optical_flow, method, frames.movedim(-1, 1).shape, device)
            frames = restore_frames(frames, note, method, estimate, device, _progress())
            restored_latent = restored(latent, note, pixels.encode(vae, frames)) if encode else None
        if note is not None and not encode:
            restored_latent = ExecutionBlocker("Latent Flow Interpolate: turn encode on to get a latent.")
        return io.NodeOutput(restored_latent, frames.flatten(0, 1))


def _estimator(method: str, optical_flow: Any) -> Estimate | None:
    """What tells the motion for `method`; raises before anything is computed if it is not there."""
    if method != OPTICAL_FLOW:
        return estimate_motion if method == MOTION else None
    if optical_flow is None:
        raise ValueError(
            "optical_flow: method optical_flow needs a model here. Connect core's Load Optical Flow Model, or Thrift "
            "Load Optical Flow on releases without it, with torchvision's raft_large or raft_small weights in "
            "models/optical_flow/ (raft_large_C_T_SKHT_V2-ff5fadd5.pth is the usual file); or choose method motion, "
            "which needs no model."
        )
    if not hasattr(getattr(optical_flow, "model", None), "update_block"):
        raise ValueError(
            "optical_flow: expected torchvision's RAFT from an optical flow loader, got "
            f"{type(getattr(optical_flow, 'model', optical_flow)).__name__}."
        )
    return raft.Raft(optical_flow.model)


def _make_room(optical_flow: Any, method: str, shape: tuple[int, ...], device: Any) -> None:
    """Asks ComfyUI for what in-betweening a clip of this shape takes on the device."""
    needed = interpolate.memory_used(shape)
    if method == OPTICAL_FLOW:
        mm.load_models_gpu([optical_flow], memory_required=needed + raft.memory_used(*shape[-2:]))
    else:
        mm.free_memory(needed + mm.extra_reserved_memory(), device)


def _progress() -> Any:
    """A progress bar over pictures that also stops when the user interrupts."""
    bar = comfy.utils.ProgressBar(1)

    def on_picture(done: int, total: int) -> None:
        mm.throw_exception_if_processing_interrupted()
        bar.update_absolute(done, total)

    return on_picture
