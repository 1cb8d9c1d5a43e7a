"""FLOPs of one forward at LTX-2 size: priced by what the techniques say they cost, or counted on the meta device."""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Sequence
from functools import cache, reduce
from typing import Any
from unittest import mock

import comfy.model_management as mm
import ltx2
import torch
from comfy.ldm.lightricks.vae.causal_video_autoencoder import VideoVAE
from sampling import patch
from torch.utils.flop_counter import FlopCounterMode

# Inputs that say when a node acts, not what a step in which it does costs.
ACTING = {"start_percent": 0.0, "end_percent": 1.0, "refresh_every": 2, "forecast": "hold"}

Nodes = Sequence[tuple[str, dict[str, Any]]]


def priced(model: Any, clip: ltx2.Clip, plan: Iterable[Any], pack: str) -> tuple[float, float]:
    """(all, attention) FLOPs of one forward in which every technique of `plan` acts, without computing it."""
    kernels, layouts = (importlib.import_module(f"{pack}.patches.{room}") for room in ("kernels", "layouts"))
    module = model.model.diffusion_model
    blocks = len(module.transformer_blocks)
    tokens = kernels.tokens.VideoTokens.grid(*clip.grid)
    dense = layouts.work.Work(tokens, blocks, ltx2.TEXT_TOKENS, clip.audio_frames)
    work = reduce(lambda work, technique: technique.cost(work), plan, dense)
    inside = layouts.flops(module, work)
    # Where nobody sees anybody, linear layers are all that is left.
    nobody = kernels.segments.Segments((kernels.segments.Segment(0, tokens.total, ()),), tokens.total)
    for block in range(blocks):
        for role in layouts.layout.Role:
            work = work.with_segments(role, block, nobody)
    return beside_blocks(clip, pack) + inside, inside - layouts.flops(module, work)


@cache
def beside_blocks(clip: ltx2.Clip, pack: str) -> float:
    """FLOPs of one forward outside the transformer blocks."""
    return count(ltx2.build_ltx2("meta", blocks=0), clip, pack)[0]


def flops_of_split(q: torch.Size, k: torch.Size, *_: Any, **__: Any) -> int:
    """Both products of attention with LSE, from the shapes of its inputs."""
    batch, heads, rows, width = q
    return 4 * batch * heads * rows * k[2] * width


def count(model: Any, clip: ltx2.Clip, pack: str) -> tuple[float, float]:
    """(all, attention) FLOPs of one forward; with a plan, of one that comes after a full step."""
    latent = ltx2.noise(clip, "meta").unbind()
    packed = torch.cat([part.flatten(1) for part in latent], dim=1)[:, None]
    options = {**model.model_options.get("transformer_options", {}), "wrappers": model.wrappers}
    wrappers = importlib.import_module(f"{pack}.patches.wrappers")
    plan, run = wrappers.plan_in(options), None
    if plan:
        # A schedule whose second step may reuse what the first left.
        run = wrappers.Run(plan, (1.0, 0.75, 0.5, 0.25, 0.0), lambda percent: 1 - percent)
        options[wrappers.RUN] = run

    def forward(sigma: float) -> None:
        if run is not None:
            run.begin_step(torch.full((1,), sigma))
        model.model.apply_model(
            packed,
            torch.ones(1, device="meta"),
            c_crossattn=torch.empty(1, ltx2.TEXT_TOKENS, 2 * 3840, device="meta"),
            transformer_options={**options, "sigmas": torch.full((1,), sigma)},
            frame_rate=24.0,
            latent_shapes=[part.shape for part in latent],
        )

    aten = torch.ops.aten
    split = aten._scaled_dot_product_flash_attention_for_cpu
    with torch.no_grad():
        if run is not None:
            forward(1.0)
        with FlopCounterMode(display=False, custom_mapping={split: flops_of_split}) as counter:
            forward(0.75)
    by_op = counter.get_flop_counts()["Global"]
    # On the meta device attention falls apart into batched products, and nothing else in the model uses those.
    attention = by_op.get(aten.bmm, 0) + by_op.get(split, 0)
    return counter.get_total_flops(), attention


class PriceList:
    """Prices forwards and remembers them in `known`: clip name, then the nodes that act, to FLOPs.

    Blocks at the edges cost something else than blocks in the middle, so the model is as deep as the tiny one,
    and its blocks count `ltx2.BLOCKS` / `blocks` times: one dense block of 12 stands for 4 of 48.
    """

    def __init__(self, pack: str, blocks: int, known: dict[str, dict[str, float]]) -> None:
        self.pack, self.blocks, self.known = pack, blocks, known

    def vae(self, clip: ltx2.Clip, work: str) -> float:
        """FLOPs to "decode" or "encode" this clip; audio is not part of it."""
        prices = self.known.setdefault(f"VAE {clip.frames} f {clip.width}×{clip.height}", {})
        if work not in prices:
            prices.update(count_vae(clip))
        return prices[work]

    def forward(self, clip: ltx2.Clip, nodes: Nodes) -> float:
        """FLOPs of one forward in which all of `nodes` act, whatever part of the schedule they are set to."""
        acting = [
            (name, {**inputs, **{k: v for k, v in ACTING.items() if k in inputs}}) for name, inputs in nodes
        ]
        key = " + ".join(f"{name} {shown(inputs)}" for name, inputs in acting) or "dense"
        prices = self.known.setdefault(clip.name, {})
        if key not in prices:
            model = patch(self.pack, ltx2.build_ltx2("meta", blocks=self.blocks), acting)
            plan = importlib.import_module(f"{self.pack}.patches.mount").plan_of(model)
            whole, _ = priced(model, clip, plan, self.pack)
            beside = beside_blocks(clip, self.pack)
            prices[key] = beside + (whole - beside) * ltx2.BLOCKS / self.blocks
        return prices[key]


def count_vae(clip: ltx2.Clip) -> dict[str, float]:
    """FLOPs of decoding and of encoding a clip with LTX's video VAE (0.9.5, whose layout ComfyUI knows)."""
    shape = (1, 128, *clip.grid)
    with (
        # Both cut their work by the memory that is there, which the meta device does not know.
        mock.patch.object(mm, "get_total_memory", lambda *_, **__: 2**50),
        torch.device("meta"),
        torch.no_grad(),
    ):
        vae = VideoVAE(version=2)
        with FlopCounterMode(display=False) as decoding:
            vae.decode(torch.empty(shape), output_buffer=torch.empty(vae.decoder.decode_output_shape(shape)))
        with FlopCounterMode(display=False) as encoding:
            vae.encode(torch.empty(1, 3, clip.frames, clip.height, clip.width))
    return {"decode": decoding.get_total_flops(), "encode": encoding.get_total_flops()}


def shown(inputs: dict[str, Any]) -> str:
    """Inputs as a key, without the part of the schedule."""
    shown = (f"{k}={v:g}" if isinstance(v, (int, float)) else f"{k}={v}" for k, v in sorted(inputs.items()))
    return ", ".join(entry for entry in shown if "_percent=" not in entry)
