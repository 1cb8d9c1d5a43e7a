"""Node LatentFlowInterpolate: a strided clip back at its full frame rate."""

from typing import Any

import comfy.model_management as mm
import torch
from comfy_api.latest import io
from comfy_execution.graph_utils import ExecutionBlocker

from ..latents import pixels
from ..latents.methods import METHODS, MOTION, estimate_for, make_room
from ..latents.reference import reference_for
from ..latents.restore import LONGEST, note_for, restore_frames, restore_latents, restored, show_progress
from ..latents.stride import LARGEST_STRIDE, video_of


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
                "for a preview. Behind it a sampler may refine the clip, from noise level 0.7 or 0.8 on."
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
                    default=MOTION,
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
                    max=LONGEST,
                    optional=True,
                    tooltip="Full length in video frames. 0 = from the latent's note, else as long as stride makes it.",
                    extra_dict={"advanced": True},
                ),
                io.Image.Input(
                    "reference",
                    optional=True,
                    tooltip=(
                        "The same clip at a higher frame rate and full to a quarter of the size: the first stage's decoded "
                        "frames, all of them, or every 2nd or 4th where that stage was strided. Frames in between follow "
                        "it, and method makes those that it does not have. On film that gains much, behind a second stage "
                        "that invents its picture anew less. Needs vae."
                    ),
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
        reference: torch.Tensor | None = None,
    ) -> io.NodeOutput:
        estimate = estimate_for(method, optical_flow)
        video = video_of(latent)
        note = note_for(latent, stride, length, pixels.frames_a_latent(vae, video))
        device = mm.get_torch_device()
        if vae is None and reference is not None:
            raise ValueError(
                "reference: frames can follow it only as decoded ones. Connect vae, or disconnect reference for a preview."
            )
        if vae is None:
            no_images = ExecutionBlocker("Latent Flow Interpolate: connect vae to get images.")
            if note is not None:
                make_room(method, optical_flow, video.shape, device)
                latent = restore_latents(latent, note, method, estimate, device, show_progress())
            return io.NodeOutput(latent, no_images)
        guide = None
        if reference is not None:
            guide = reference_for(reference, note, video.shape[0], pixels.size_of(vae, video))
        frames = pixels.decode(vae, video, None if note is None else note.frames_a_latent)
        restored_latent: Any = latent
        if note is not None:
            make_room(method, optical_flow, frames.movedim(-1, 1).shape, device, guide is not None)
            frames = restore_frames(frames, note, method, estimate, device, show_progress(), guide)
            restored_latent = restored(latent, note, pixels.encode(vae, frames)) if encode else None
        if note is not None and not encode:
            restored_latent = ExecutionBlocker("Latent Flow Interpolate: turn encode on to get a latent.")
        return io.NodeOutput(restored_latent, frames.flatten(0, 1))
