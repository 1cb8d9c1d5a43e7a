"""Node ThriftLowRankAttention: far frames seen through fewer keys."""

from typing import Any

from comfy_api.latest import io

from ..patches.clock import Schedule
from ..patches.mount import mount
from ..patches.techniques.low_rank import LowRankAttention
from .form import field

DEFAULT = LowRankAttention()


class ThriftLowRankAttention(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        settings = LowRankAttention.settings()
        return io.Schema(
            node_id="ThriftLowRankAttention",
            display_name="Thrift Low-Rank Attention",
            category="FrameThrift",
            description=(
                "LTX-Video and LTX-2. Near frames are seen exactly, far ones in a compressed form, which cuts the cost of "
                "video self-attention. Unlike a temporal window it never loses sight of the rest of the clip. It pays on "
                "long or large clips, where attention is most of a step. The clip may blur a little. In our measurements "
                "fewer steps at the same cost stayed closer to the full clip with 24 steps, and with 8 but for the mildest "
                "settings, so try those first. In the second stage of two it stayed near the full clip. Other models "
                "run unchanged."
            ),
            inputs=[
                io.Model.Input("model", tooltip="An LTX-Video or LTX-2 model. It is cloned, not changed."),
                field(
                    settings,
                    "far",
                    (
                        "How far frames are seen. pooled: groups of their tokens through one averaged key each, on any "
                        "card. routed: each block of queries sees its best blocks of keys exactly and the others through "
                        "one key each; it ignores near_frames, pool and spatial_pool, and needs the kernel that newer ComfyUI "
                        "brings (comfy-kitchen 0.2.40, NVIDIA RTX 30 or newer, fp16 or bf16). Where that is missing nothing "
                        "changes and the log says so. On our small model it drifted more than pooled."
                    ),
                ),
                field(
                    settings,
                    "near_frames",
                    (
                        "pooled: latent frames seen exactly on each side (one latent frame is 8 video frames). More is "
                        "closer to the stock clip and saves less. When they cover the clip the result is the stock one."
                    ),
                ),
                field(
                    settings,
                    "pool",
                    (
                        "pooled: so many far latent frames are seen as one. More saves more and blurs more. 1 leaves time "
                        "as it is."
                    ),
                ),
                field(
                    settings,
                    "spatial_pool",
                    (
                        "pooled: so many rows and so many columns of far tokens are seen as one. 2 saves much, blurs and "
                        "lets the clip drift. 1 leaves space as it is."
                    ),
                ),
                field(
                    settings,
                    "sink_frames",
                    "First latent frames that every frame sees exactly. They hold the clip together.",
                ),
                field(
                    settings,
                    "keep",
                    (
                        "routed: share of key blocks that each block of queries sees exactly. More is closer to the stock "
                        "clip and slower. 0: by threshold instead."
                    ),
                ),
                field(
                    settings,
                    "threshold",
                    (
                        "routed, where keep is 0: how far above the average a block of keys must score to be seen exactly. "
                        "Higher is faster and farther from the stock clip."
                    ),
                ),
                field(
                    settings,
                    "start_percent",
                    (
                        "Where in the schedule it begins to act (0 = first step). Early steps settle what is where; later "
                        "is closer to the stock clip and saves less."
                    ),
                ),
                field(
                    settings,
                    "end_percent",
                    "Where in the schedule it stops to act (1 = last step). Earlier saves less.",
                ),
                field(
                    settings,
                    "dense_blocks",
                    (
                        "So many first and so many last transformer blocks see everything exactly. More keeps the clip "
                        "closer to the stock one and saves less."
                    ),
                ),
                field(
                    settings,
                    "extra_tokens",
                    (
                        "routed: so many single tokens outside the chosen blocks are seen exactly as well, those that "
                        "matter most. More is slower; what it does for quality was not measured."
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
        far: str = DEFAULT.far,
        near_frames: int = DEFAULT.near_frames,
        pool: int = DEFAULT.pool,
        spatial_pool: int = DEFAULT.spatial_pool,
        sink_frames: int = DEFAULT.sink_frames,
        keep: float = DEFAULT.keep,
        threshold: float = DEFAULT.threshold,
        start_percent: float = DEFAULT.schedule.start_percent,
        end_percent: float = DEFAULT.schedule.end_percent,
        dense_blocks: int = DEFAULT.dense_blocks,
        extra_tokens: int = DEFAULT.extra_tokens,
    ) -> io.NodeOutput:
        technique = LowRankAttention(
            far,
            near_frames,
            pool,
            spatial_pool,
            sink_frames,
            keep,
            threshold,
            extra_tokens,
            dense_blocks,
            schedule=Schedule(start_percent, end_percent),
        )
        return io.NodeOutput(mount(model, technique))
