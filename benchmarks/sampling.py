"""Samples rows of the quality table with the tiny model, the way a graph would: model, nodes, guider, sampler."""

from __future__ import annotations

import importlib
from collections.abc import Hashable, Iterable
from typing import Any

import comfy.model_management as mm
import comfy.sample
import comfy.samplers
import torch
from lab import small_blocks
from rows import Row, Striding
from variants import VARIANTS

from tiny_ltx.captions import CAPTION_TOKENS, embed_captions
from tiny_ltx.codec import Codec
from tiny_ltx.model import SHIFT, Recipe
from tiny_ltx.vae import CodecVAE

CORE_NODES = {"EasyCache": ("comfy_extras.nodes_easycache", "EasyCacheNode")}
FPS = 24.0
GRID = (8, 8)

# The two latents of a sampler node (output, denoised_output), and what was executed and covered.
Stage = tuple[torch.Tensor, torch.Tensor, dict[str, Any]]


def patch(pack: str, model: Any, nodes: Iterable[tuple[str, dict[str, Any]]]) -> Any:
    """`model` behind the given nodes; `pack` is the name under which the pack was loaded."""
    for name, inputs in nodes:
        model = node_class(pack, name).execute(model=model, **inputs).args[0]
    return model


def node_class(pack: str, name: str) -> Any:
    """A node of this pack, a variant of one, or a node of core, by its id."""
    if name in VARIANTS:
        return VARIANTS[name](pack)
    if name in CORE_NODES:
        module, kind = CORE_NODES[name]
        return getattr(importlib.import_module(module), kind)
    ours = importlib.import_module(f"{pack}.nodes").NODES
    return next(node for node in ours if node.define_schema().node_id == name)


def covered_steps(
    pack: str, model: Any, patched: Any, nodes: Iterable[tuple[str, dict[str, Any]]]
) -> dict[str, list[int]]:
    """For each node of this pack between `model` and `patched` the steps of the last run that it covered."""
    mount = importlib.import_module(f"{pack}.patches.mount")
    journal = mount.journal_of(patched)
    techniques = journal.records()[-1]["techniques"] if journal is not None else {}
    covered = {}
    for node in nodes:
        for technique in mount.plan_of(patch(pack, model, [node])):
            covered[node[0]] = techniques[technique.name]["steps"]
    return covered


class ExecutedSteps:
    """Which steps of a schedule really ran transformer blocks, whatever skipped the others."""

    def __init__(self, model: Any, sigmas: tuple[float, ...]) -> None:
        self.block = model.model.diffusion_model.transformer_blocks[0]
        self.sigmas = sigmas
        self.steps: set[int] = set()

    def __enter__(self) -> ExecutedSteps:
        self.handle = self.block.register_forward_pre_hook(self.note, with_kwargs=True)
        return self

    def note(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        sigma = float(kwargs["transformer_options"]["sigmas"][0])
        self.steps.add(min(range(len(self.sigmas) - 1), key=lambda i: abs(self.sigmas[i] - sigma)))

    def __exit__(self, *_: object) -> None:
        self.handle.remove()


def conditioning(ids: torch.Tensor) -> tuple[Any, Any]:
    """(positive, negative) CONDITIONING of captions ids [B, 5]."""
    count = ids.shape[0]
    mask = torch.ones(count, CAPTION_TOKENS, dtype=torch.int64)
    values = {"pooled_output": None, "attention_mask": mask, "frame_rate": FPS}
    nothing = torch.ones(count, dtype=torch.bool)
    return [[embed_captions(ids), dict(values)]], [[embed_captions(ids, nothing), dict(values)]]


def draw_noise(clips: int, latent_frames: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(clips, 128, latent_frames, *GRID, generator=generator, dtype=torch.float32)


def sample_stage(
    pack: str,
    model: Any,
    recipe: Recipe,
    nodes: Iterable[tuple[str, dict[str, Any]]],
    ids: torch.Tensor,
    sigmas: tuple[float, ...],
    noise: torch.Tensor,
    start: torch.Tensor,
    seed: int,
) -> Stage:
    """One sampler node."""
    positive, negative = conditioning(ids)
    patched = patch(pack, model, nodes)
    clean: list[torch.Tensor] = [start]

    def note(step: int, denoised: torch.Tensor, *_: Any) -> None:
        clean[0] = denoised

    with ExecutedSteps(patched, sigmas) as executed, small_blocks(pack), torch.inference_mode():
        latents = comfy.sample.sample_custom(
            patched,
            noise,
            recipe.cfg,
            comfy.samplers.sampler_object("euler"),
            torch.tensor(sigmas),
            positive,
            negative,
            start,
            callback=note,
            disable_pbar=True,
            seed=seed,
        )
        denoised = patched.model.process_latent_out(clean[0].to(latents))
    covered = covered_steps(pack, model, patched, nodes)
    return latents, denoised, {"executed": sorted(executed.steps), "covered": covered}


def sample_clips(
    pack: str,
    model: Any,
    recipe: Recipe,
    row: Row,
    ids: torch.Tensor,
    latent_frames: int,
    seed: int,
    strided_stages: dict[Hashable, Stage] | None = None,
) -> tuple[torch.Tensor, dict[str, Any]]:
    """Pixels [B, F, 32, 32] of captions ids [B, 5], and what of the schedule was executed and covered.

    strided_stages: what strided samplers of this model gave before, for rows that only fill in otherwise.
    """
    noise = draw_noise(ids.shape[0], latent_frames, seed)
    sigmas = row.schedule(recipe.sigmas, SHIFT)
    if row.striding is not None:
        stages = {} if strided_stages is None else strided_stages
        return sample_strided(pack, model, recipe, row, row.striding, ids, noise, sigmas, seed, stages)
    latents, _, run = sample_stage(
        pack, model, recipe, row.nodes, ids, sigmas, noise, torch.zeros_like(noise), seed
    )
    with torch.inference_mode():
        return decode(latents.to(mm.get_torch_device())), run


def sample_strided(
    pack: str,
    model: Any,
    recipe: Recipe,
    row: Row,
    striding: Striding,
    ids: torch.Tensor,
    noise: torch.Tensor,
    sigmas: tuple[float, ...],
    seed: int,
    strided_stages: dict[Hashable, Stage],
) -> tuple[torch.Tensor, dict[str, Any]]:
    """KeyframeStride, a sampler, LatentFlowInterpolate, and a second sampler at full length if there is one."""
    stretched, latent, *_ = (
        node_class(pack, "KeyframeStride")
        .execute(model, {"samples": torch.zeros_like(noise)}, striding.stride)
        .args
    )
    if not striding.is_stretched:
        stretched = model
    short = latent["samples"].shape[2]
    ends = nearest_step(sigmas, striding.until) if striding.until is not None else len(sigmas) - 1
    first = sigmas[: ends + 1]
    key = (str(row.nodes), first, striding.stride, striding.is_stretched, noise.shape, seed)
    if key not in strided_stages:
        strided_stages[key] = sample_stage(
            pack, stretched, recipe, row.nodes, ids, first, noise[:, :, :short], latent["samples"], seed
        )
    latents, denoised, executed = strided_stages[key]
    run = dict(executed)
    with torch.inference_mode():
        filled, images = (
            node_class(pack, "LatentFlowInterpolate")
            .execute(
                {**latent, "samples": latents if striding.until is None else denoised},
                striding.method,
                vae=CodecVAE(zoom=1) if striding.has_vae else None,
                optical_flow=load_flow() if striding.method == "optical_flow" else None,
                encode=striding.has_second_stage,
            )
            .args
        )
        if not striding.has_second_stage and striding.has_vae:
            frames = images.view(ids.shape[0], -1, *images.shape[1:])[..., 0]
            return frames.to(mm.get_torch_device()), run
    final = filled["samples"]
    if striding.has_second_stage:
        begins = ends if striding.until is not None else nearest_step(sigmas, striding.again_from or 0.0)
        fresh = draw_noise(*final.shape[:3:2], seed + 100)
        final, _, second = sample_stage(
            pack, stretched, recipe, striding.nodes, ids, sigmas[begins:], fresh, final, seed
        )
        run["second"] = second
    with torch.inference_mode():
        return decode(final.to(mm.get_torch_device())), run


def nearest_step(sigmas: tuple[float, ...], level: float) -> int:
    """The step of a schedule that starts nearest to the sigma `level`."""
    return min(range(len(sigmas) - 1), key=lambda i: abs(sigmas[i] - level))


def load_flow() -> Any:
    """The small RAFT that stands in for torchvision's weights, as the loader node gives it."""
    flow = importlib.import_module("tiny_ltx.flow")
    return flow.load_flow()


def decode(latents: torch.Tensor) -> torch.Tensor:
    """Latents [B, 128, T, 8, 8] -> pixels [B, F, 32, 32]; the tiny model's VAE without its eightfold zoom."""
    return Codec().to(latents.device).decode_pixels(latents.float())[:, 0].clamp(0, 1)
