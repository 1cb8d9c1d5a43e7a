"""Node ThriftPreset: the other nodes' settings, chosen by measurements."""

from typing import Any

from comfy_api.latest import io

from ..latents.stride import StrideNote, holds_clip, marked_full, refuse_extended, video_of
from ..patches import layouts
from ..patches.mount import mount, unmount
from ..patches.node_text import NodeText
from ..presets.choice import describe, first_stride, stage_of, stride_for, title_of
from ..presets.table import BALANCED, PRESETS, SETTABLE, STAGES, TABLE
from .keyframe_stride import KeyframeStride

AUTO = "auto"


class ThriftPreset(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ThriftPreset",
            display_name="Thrift Preset",
            category="FrameThrift",
            description=(
                "LTX-Video and LTX-2. Makes sampling cheaper with settings that measurements chose: it strides the latent, "
                "and sets freezing, window and pacing on the model, as the other nodes of this pack would. Put it before "
                "the sampler, and Latent Flow Interpolate behind the last one. Its text says what was set, what that "
                "saved in measurements on a small model, and what it cost there. Nodes behind it override it, another preset too."
            ),
            inputs=[
                io.Model.Input("model", tooltip="An LTX-Video or LTX-2 model. It is cloned, not changed."),
                io.Latent.Input(
                    "latent",
                    tooltip=(
                        "The full-length video or audio-video latent of this stage; between two stages the first one's result, "
                        "before the upscaler. A scheduler that reads the latent takes the one from before this node. Add "
                        "guides and generated keyframes after it."
                    ),
                ),
                io.Combo.Input(
                    "preset",
                    options=list(PRESETS),
                    default=BALANCED,
                    tooltip=(
                        "quality: as near to real clips as the full run in measurements, if not the same clip; saves a quarter with 24 steps, "
                        "else little. balanced: half the frames are "
                        "diffused. fast: a third of them; fast motion suffers first. cool laptop: fast, with pauses that keep "
                        "the GPU below 75 °C. In a single stage of 12 steps or more every other step is "
                        "frozen too."
                    ),
                ),
                io.Combo.Input(
                    "stage",
                    options=[AUTO, *STAGES],
                    default=AUTO,
                    tooltip=(
                        "auto: second for a latent that holds a clip, single for an empty one. Set first by hand for the first "
                        "of two stages."
                    ),
                ),
                io.Vae.Input(
                    "vae",
                    optional=True,
                    tooltip="Needed to stride a latent that holds a clip, which is decoded for it. Without it such a clip keeps all frames.",
                ),
                io.Sigmas.Input(
                    "sigmas",
                    optional=True,
                    tooltip=(
                        "Those of this stage's sampler, for the text and as a check: sigmas of a second stage do not go with an "
                        "empty latent."
                    ),
                ),
            ],
            outputs=[
                io.Model.Output(),
                io.Latent.Output(tooltip="Strided where the preset strides."),
                io.Image.Output(
                    display_name="frames",
                    tooltip=(
                        "The video that was decoded, all its frames: the reference of Latent Flow Interpolate. Nothing where "
                        "nothing was decoded; a reference then counts as not connected."
                    ),
                ),
                io.String.Output(
                    display_name="summary", tooltip="What was set, and what it saved in measurements."
                ),
            ],
        )

    @classmethod
    def execute(
        cls,
        model: Any,
        latent: dict[str, Any],
        preset: str = BALANCED,
        stage: str = AUTO,
        vae: Any = None,
        sigmas: Any = None,
    ) -> io.NodeOutput:
        layouts.require(model, "Connect one of those, or leave Thrift Preset out.")
        refuse_extended(latent)
        is_clip, note, frames = holds_clip(latent), StrideNote.read(latent), video_of(latent).shape[2]
        schedule = [] if sigmas is None else sigmas.tolist()
        stage = stage_of(None if stage == AUTO else stage, is_clip, schedule)
        recipe = TABLE[preset, stage]
        stride, because = stride_for(recipe, note, frames, is_clip and vae is None)
        title, first = title_of(preset, stage, note, frames), first_stride(stage, recipe, note)
        model = unmount(model, SETTABLE)
        shown = None
        if stride > 1:
            model, latent, _, shown = KeyframeStride.execute(model, latent, stride, vae=vae).args
        else:
            latent = marked_full(latent)
        kept = video_of(latent).shape[2]
        acting = [technique for technique in recipe.techniques if technique.is_any_use(kept)]
        for technique in acting:
            model = mount(model, technique)
        striding = (
            f"keyframe stride {stride}: {kept} latent frames" if stride > 1 else "no keyframe stride"
        ) + because
        is_as_measured = stride == recipe.stride and len(acting) == len(recipe.techniques)
        text = describe(title, striding, acting, recipe, is_as_measured, len(schedule) - 1, first)
        NodeText().show(text)
        return io.NodeOutput(model, latent, shown, text)
