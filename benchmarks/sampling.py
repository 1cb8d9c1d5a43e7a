"""Samples rows of the quality table with the tiny model, the way a graph would: model, nodes, guider, sampler."""

from __future__ import annotations

import importlib
from collections.abc import Iterable
from typing import Any

import comfy.model_management as mm
import comfy.sample
import comfy.samplers
import torch
from rows import Row

from tiny_ltx.captions import CAPTION_TOKENS, embed_captions
from tiny_ltx.codec import Codec
from tiny_ltx.model import SHIFT, Recipe

CORE_NODES = {"EasyCache": ("comfy_extras.nodes_easycache", "EasyCacheNode")}
FPS = 24.0
GRID = (8, 8)


def patch(pack: str, model: Any, nodes: Iterable[tuple[str, dict[str, Any]]]) -> Any:
    """`model` behind the given nodes; `pack` is the name under which the pack was loaded."""
    for name, inputs in nodes:
        model = node_class(pack, name).execute(model=model, **inputs).args[0]
    return model


def node_class(pack: str, name: str) -> Any:
    """A node of this pack or of core, by its id."""
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


def sample_clips(
    pack: str, model: Any, recipe: Recipe, row: Row, ids: torch.Tensor, latent_frames: int, seed: int
) -> tuple[torch.Tensor, dict[str, Any]]:
    """Pixels [B, F, 32, 32] of captions ids [B, 4], and what of the schedule was executed and covered."""
    count = ids.shape[0]
    noise = torch.randn(
        count, 128, latent_frames, *GRID, generator=torch.Generator().manual_seed(seed), dtype=torch.float32
    )
    mask = torch.ones(count, CAPTION_TOKENS, dtype=torch.int64)
    values = {"pooled_output": None, "attention_mask": mask, "frame_rate": FPS}
    nothing = torch.ones(count, dtype=torch.bool)
    positive = [[embed_captions(ids), dict(values)]]
    negative = [[embed_captions(ids, nothing), dict(values)]]
    sigmas = row.schedule(recipe.sigmas, SHIFT)
    patched = patch(pack, model, row.nodes)
    with ExecutedSteps(patched, sigmas) as executed, torch.inference_mode():
        latents = comfy.sample.sample_custom(
            patched,
            noise,
            recipe.cfg,
            comfy.samplers.sampler_object("euler"),
            torch.tensor(sigmas),
            positive,
            negative,
            torch.zeros_like(noise),
            disable_pbar=True,
            seed=seed,
        )
        pixels = decode(latents.to(mm.get_torch_device()))
    covered = covered_steps(pack, model, patched, row.nodes)
    return pixels, {"executed": sorted(executed.steps), "covered": covered}


def decode(latents: torch.Tensor) -> torch.Tensor:
    """Latents [B, 128, T, 8, 8] -> pixels [B, F, 32, 32]; the tiny model's VAE without its eightfold zoom."""
    return Codec().to(latents.device).decode_pixels(latents.float())[:, 0].clamp(0, 1)
