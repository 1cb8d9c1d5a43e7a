"""Makes whole two-stage runs the way a graph would: sampler, KeyframeStride, upscaler, sampler, LatentFlowInterpolate."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import comfy.model_management as mm
import torch
from low_rank import check_it_acts
from rows import resampled
from sampling import Stage, covered_steps, nearest_step, node_class, patch, sample_stage
from two_stage_rows import REFINER, Row

from tiny_ltx.clips import FULL, SMALL
from tiny_ltx.codec import CHANNELS, Codec, upscaled
from tiny_ltx.model import REFINING_CFG, SHIFT, STUDENT_RECIPE, TEACHER_RECIPE, Recipe, load_model
from tiny_ltx.trainer import grid_of
from tiny_ltx.vae import CodecVAE

# Seeds of other noise than a run's own: of another second stage, and of a second pass.
OTHER, AGAIN = 1000, 2000


@dataclass(frozen=True)
class Made:
    """A whole run: pixels [B, F, 64, 64] in 0..1, those of its first stage [B, F', 32, 32], and what each sampler did."""

    pixels: torch.Tensor
    first: torch.Tensor
    stages: dict[str, dict[str, Any]]


def recipe_of(base: str, sigmas: tuple[float, ...]) -> Recipe:
    """How this model refines; one of many steps takes those of its own that begin nearest to `sigmas`."""
    if base == REFINER or not sigmas:
        return Recipe(sigmas, 1.0)
    own = TEACHER_RECIPE.sigmas
    return Recipe(own[nearest_step(own, sigmas[0]) :], REFINING_CFG)


def draw_noise(clips: int, latent_frames: int, size: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    shape = (clips, CHANNELS, latent_frames, *grid_of(size))
    return torch.randn(shape, generator=generator).to(mm.get_torch_device())


@dataclass
class Runs:
    """Runs of the same captions. What several rows share is made once: first stages, noise.

    ids: of a seed [B, 5]. real: latents [B, 128, T, 8, 8] of real small clips, by length and seed, in place of the first
    sampler's.
    """

    pack: str
    ids: dict[int, torch.Tensor]
    real: Callable[[int, int], torch.Tensor]
    models: dict[str, Any] = field(default_factory=dict)
    _first: dict[tuple[Any, ...], tuple[dict[str, Any], dict[str, Any]]] = field(default_factory=dict)
    _noise: dict[tuple[int, ...], torch.Tensor] = field(default_factory=dict)
    _thinned: dict[tuple[Any, ...], tuple[Any, dict[str, Any], Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.vae = CodecVAE(zoom=1)
        self.codec = Codec(zoom=1).to(mm.get_torch_device())

    def model(self, name: str) -> Any:
        if name not in self.models:
            self.models[name] = load_model(name)
        return self.models[name]

    def noise(self, latent_frames: int, size: int, seed: int) -> torch.Tensor:
        """By the seed of the captions, or that and OTHER or AGAIN."""
        key = (latent_frames, size, seed)
        if key not in self._noise:
            self._noise[key] = draw_noise(len(self.ids[seed % OTHER]), latent_frames, size, seed)
        return self._noise[key]

    def thinned(self, model: Any, latent: dict[str, Any], stride: int) -> tuple[Any, dict[str, Any], Any]:
        """(MODEL, LATENT, frames) of KeyframeStride."""
        patched, thin, _, frames = (
            node_class(self.pack, "KeyframeStride").execute(model, latent, stride, vae=self.vae).args
        )
        return patched, thin, frames

    def first_stage(
        self, latent_frames: int, stride: int, seed: int, is_real: bool, steps: int | None = None
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """(LATENT, what the sampler did)"""
        key = (latent_frames, stride, seed, is_real, steps)
        if key not in self._first:
            noise, model = self.noise(latent_frames, SMALL, seed), self.model("student")
            begun = self.real(latent_frames, seed) if is_real else torch.zeros_like(noise)
            patched, latent, _ = self.thinned(model, {"samples": begun}, stride)
            done: dict[str, Any] = {"executed": [], "covered": {}}
            if not is_real:
                start, recipe = latent["samples"], STUDENT_RECIPE
                if steps is not None:
                    recipe = replace(recipe, sigmas=resampled(recipe.sigmas, steps, SHIFT))
                noise = kept(noise, start.shape[2], stride)
                sampled, _, done = self.sample(patched, recipe, (), seed, noise, start)
                latent = {**latent, "samples": sampled}
            self._first[key] = latent, done
        return self._first[key]

    def sample(
        self,
        model: Any,
        recipe: Recipe,
        nodes: tuple[tuple[str, dict[str, Any]], ...],
        seed: int,
        noise: torch.Tensor,
        start: torch.Tensor,
    ) -> Stage:
        """Raises RuntimeError where a node declined everything: the row would be stock's."""
        patched, ids = patch(self.pack, model, nodes), self.ids[seed]
        latents, clean, done = sample_stage(
            self.pack, patched, recipe, (), ids, recipe.sigmas, noise, start, seed
        )
        check_it_acts("second stage", patched)
        return latents, clean, {**done, "covered": covered_steps(self.pack, model, patched, nodes)}

    @torch.inference_mode()
    def make(self, row: Row, base: str, latent_frames: int, seed: int, is_real: bool = False) -> Made:
        """One seed's clips. is_real: their first stage is real small clips."""
        model, device = self.model(base), mm.get_torch_device()
        latent, done = self.first_stage(latent_frames, row.first, seed, is_real, row.first_steps)
        stages = {"first": done}
        first = self.decoded(latent["samples"])
        # The VAE encodes clip by clip: once for all rows that thin the same first stage alike.
        key = (base, latent_frames, row.first, row.first_steps, row.second, seed, is_real)
        if key not in self._thinned:
            self._thinned[key] = self.thinned(model, latent, row.second)
        patched, latent, frames = self._thinned[key]
        video = upscaled(self.codec, latent["samples"].to(device).float())
        recipe = recipe_of(base, row.sigmas)
        if row.sigmas:
            noise = self.noise(latent_frames, FULL, seed + OTHER * row.has_other_noise)
            noise = kept(noise, video.shape[2], row.second)
            video, clean, stages["second"] = self.sample(patched, recipe, row.nodes, seed, noise, video)
            # A stage that stops on its way hands on what it expects at the end.
            video = clean if row.sigmas[-1] else video
        pixels = None
        if row.second > 1:
            filled, images = (
                node_class(self.pack, "LatentFlowInterpolate")
                .execute(
                    {**latent, "samples": video},
                    "motion",
                    vae=self.vae,
                    encode=bool(row.again),
                    reference=frames if row.is_guided else None,
                )
                .args
            )
            pixels = images[..., 0].unflatten(0, (len(video), -1))
            video = filled["samples"] if row.again else video
        if row.again:
            noise = self.noise(latent_frames, FULL, seed + AGAIN)
            again = recipe_of(base, row.again)
            video, _, stages["again"] = self.sample(model, again, (), seed, noise, video)
        if pixels is None or row.again:
            pixels = self.decoded(video)
        return Made(pixels.to(device), first, stages)

    def decoded(self, video: torch.Tensor) -> torch.Tensor:
        """[B, F, h, w]; the VAE without its three channels."""
        video = video.to(mm.get_torch_device()).float()
        return self.codec.decode_pixels(video)[:, 0].clamp(0, 1)


def kept(noise: torch.Tensor, frames: int, stride: int) -> torch.Tensor:
    """The noise of the latent frames that a stride keeps; one that lies behind the end has the last one's."""
    places = (torch.arange(frames) * stride).clamp(max=noise.shape[2] - 1)
    return noise[:, :, places.to(noise.device)]
