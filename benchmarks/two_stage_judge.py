"""Judges whole two-stage runs at full size: by the probe, by real clips of the same captions, and by their own first stage."""

from __future__ import annotations

import statistics
from dataclasses import dataclass, field
from typing import Any

import metrics
import torch
from quality import REAL_DRAWS, SEEDS, VIEWS, distances, pooled
from sampling import FPS
from two_stage_figures import GAP, Followed, detail, followed, pulse, slip, strays
from two_stage_rows import HARD, ROWS, Row
from two_stage_runs import Made, Runs

from tiny_ltx.clips import FULL, SMALL, draw_clips, draw_ids, video_frames
from tiny_ltx.codec import Codec
from tiny_ltx.probe import FULL_PROBE, frechet_distance, load_probe, read_clips

SIZE = (FULL, FULL)
# The last second of a clip whose end no stride meets, and the one before.
SECOND = round(FPS)
# Texture moves the pixel by more than this where it lies.
SEEN = 0.01
# Kept of real clips for each length and seed.
Dense = dict[tuple[str, str, int, int], torch.Tensor]


@dataclass(frozen=True)
class Film:
    """Real clips as a first stage, and what a second stage should make of them.

    small: latents [B, 128, T, 8, 8]. large: pixels [B, F, 64, 64] with some texture of the captions. places [B, F, 2]: of the
    shape, at full size. textured [B, F, 64, 64]: where its texture lies.
    """

    small: torch.Tensor
    large: torch.Tensor
    places: torch.Tensor
    textured: torch.Tensor


@dataclass
class Judge:
    clips: int
    device: torch.device
    dense: Dense = field(default_factory=dict)
    _real: dict[tuple[int, int], dict[str, Any]] = field(default_factory=dict)
    _films: dict[tuple[int, int], Film] = field(default_factory=dict)
    _followed: dict[tuple[int, int, int, bool], Followed] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.probe = load_probe(FULL_PROBE, self.device)
        self.codec = Codec(zoom=1).to(self.device)
        self.ids = {
            seed: draw_ids(self.clips, torch.Generator(self.device).manual_seed(1000 + seed)).cpu()
            for seed in SEEDS
        }

    def drawn(self, generator: torch.Generator, latent_frames: int, ids: torch.Tensor, size: int) -> Any:
        """Real clips of these captions, as the codec's signal channels show them: latents, pixels and places."""
        fps = torch.full((self.clips,), FPS, device=self.device)
        clips = draw_clips(self.clips, latent_frames, generator, ids=ids.to(self.device), fps=fps, size=size)
        latents = self.codec.encode_pixels(clips.pixels[:, None]) * self.codec.signal(size)
        return latents, self.codec.decode_pixels(latents)[:, 0].clamp(0, 1), clips

    def film(self, latent_frames: int, seed: int) -> Film:
        key = latent_frames, seed
        if key not in self._films:
            generator = torch.Generator(self.device).manual_seed(3000 + seed)
            state, ids = generator.get_state(), self.ids[seed]
            plain = ids.clone()
            plain[:, 4] = 0
            small = self.drawn(generator, latent_frames, ids, SMALL)[0]
            generator.set_state(state)
            _, large, clips = self.drawn(generator, latent_frames, ids, FULL)
            generator.set_state(state)
            without = self.drawn(generator, latent_frames, plain, FULL)[2]
            # A texture has zeros within: it lies where it shows nearby.
            shows = (clips.pixels - without.pixels).abs() > SEEN
            textured = torch.nn.functional.max_pool2d(shows.half(), 3, stride=1, padding=1) > 0
            self._films[key] = Film(small, large, clips.places, textured)
        return self._films[key]

    def read(self, pixels: torch.Tensor, ids: torch.Tensor) -> dict[str, Any]:
        """What the probe makes of clips, with their features [views, B, 128], and their energies [B, F]."""
        fps = pixels.new_full((len(pixels),), FPS)
        views = [read_clips(self.probe, pixels[:, first:], fps) for first in range(max(VIEWS.values()))]
        right = views[0][0].cpu() == ids
        return {
            "features": torch.stack([features for _, features in views]).cpu(),
            "energy": detail(pixels),
            "drift": metrics.drift(pixels).mean().item(),
            "caption": right[:, :3].all(dim=1).float().mean().item(),
            "speed": right[:, 3].float().mean().item(),
            "texture": right[:, 4].float().mean().item(),
        }

    def part(self, pixels: torch.Tensor) -> torch.Tensor:
        """Features [B, 128] of a second of clips."""
        return read_clips(self.probe, pixels, pixels.new_full((len(pixels),), FPS))[1].cpu()

    def real(self, latent_frames: int, seed: int) -> dict[str, Any]:
        """Figures and features of real clips; the last drawing is judged as a row is."""
        key = latent_frames, seed
        if key not in self._real:
            generator = torch.Generator(self.device).manual_seed(2000 + seed)
            ids, reads, parts = self.ids[seed], [], []
            for _ in range(REAL_DRAWS + 1):
                pixels = self.drawn(generator, latent_frames, ids, FULL)[1]
                reads.append(self.read(pixels, ids))
                if latent_frames == HARD:
                    parts.append({name: self.part(pixels[:, where]) for name, where in seconds().items()})
            names = ("drift", "caption", "speed", "texture")
            energy = torch.stack([read["energy"].mean(dim=0) for read in reads]).mean(dim=0)
            self._real[key] = {
                **{name: statistics.mean(read[name] for read in reads) for name in names},
                "reference": torch.cat([read["features"] for read in reads[:REAL_DRAWS]], dim=1),
                "features": reads[-1]["features"],
                "energy": energy,
                "parts": {
                    name: torch.cat([part[name] for part in parts[:REAL_DRAWS]])
                    for name in (seconds() if parts else ())
                },
            }
        return self._real[key]

    def real_figures(self, latent_frames: int) -> dict[str, Any]:
        """Those of real clips, the films' for what is measured on films: the best that a row could do."""
        figures, reals = [], [self.real(latent_frames, seed) for seed in SEEDS]
        for seed, real in zip(SEEDS, reals, strict=True):
            film = self.film(latent_frames, seed)
            first = self.codec.decode_pixels(film.small)[:, 0].clamp(0, 1)
            figures.append(
                {
                    **{name: real[name] for name in ("drift", "caption", "speed", "texture")},
                    "detail": 1.0,
                    "pulse": pulse(real["energy"][None], GAP),
                    "motion": self.follow(first, latent_frames, 1, seed, True)
                    .error(film.large)
                    .mean()
                    .item(),
                    "strays": strays(film.large, first).mean().item(),
                    **slips(film, film.large),
                    **distances(real["features"], real["reference"]),
                }
            )
        return pooled(figures, [real["features"] for real in reals], [real["reference"] for real in reals])

    def follow(
        self, first: torch.Tensor, latent_frames: int, stride: int, seed: int, is_real: bool
    ) -> Followed:
        key = (latent_frames, stride, seed, is_real)
        if key not in self._followed:
            self._followed[key] = Followed(first, video_frames(latent_frames), stride, SIZE)
        return self._followed[key]

    def dense_of(self, row: Row, base: str, latent_frames: int, seed: int, runs: Runs) -> torch.Tensor:
        key = base, row.schedule, latent_frames, seed
        if key not in self.dense:
            dense = next(other for other in ROWS if other.is_dense and other.schedule == row.schedule)
            self.dense[key] = runs.make(dense, base, latent_frames, seed).pixels
        return self.dense[key]

    def measure(self, row: Row, base: str, latent_frames: int, runs: Runs) -> dict[str, Any]:
        """Figures of a row over all seeds, and what its samplers did."""
        figures, features, references, stages, parts = [], [], [], [], []
        for seed in SEEDS:
            made, real = runs.make(row, base, latent_frames, seed), self.real(latent_frames, seed)
            if row.is_dense:
                self.dense[base, row.schedule, latent_frames, seed] = made.pixels
            read = self.read(made.pixels, self.ids[seed])
            features.append(read.pop("features"))
            references.append(real["reference"])
            energy = read.pop("energy")
            motion = self.follow(made.first, latent_frames, row.first, seed, False)
            figures.append(
                {
                    **read,
                    "detail": float(energy.mean() / real["energy"].mean()),
                    "pulse": pulse(energy, row.second if row.second > 1 else GAP),
                    "motion": motion.error(made.pixels).mean().item(),
                    "strays": strays(made.pixels, made.first, row.first).mean().item(),
                    **distances(features[-1], references[-1]),
                    **self.on_film(row, base, latent_frames, seed, runs),
                }
            )
            # Of another first stage comes another clip.
            dense = None
            if row.first == 1 and not row.is_dense:
                dense = self.dense_of(row, base, latent_frames, seed, runs)
                figures[-1]["psnr"] = metrics.psnr(made.pixels, dense).mean().item()
            if latent_frames == HARD:
                parts.append(self.seconds_of(made, real["energy"], dense))
            stages.append(made.stages)
        out = pooled(figures, features, references)
        if parts:
            out["seconds"] = {
                name: self.over_seeds(name, [part[name] for part in parts], latent_frames)
                for name in seconds()
            }
        return {**out, "runs": stages}

    def on_film(self, row: Row, base: str, latent_frames: int, seed: int, runs: Runs) -> dict[str, float]:
        film = self.film(latent_frames, seed)
        made = runs.make(row, base, latent_frames, seed, is_real=True)
        energy = detail(made.pixels).mean() / self.real(latent_frames, seed)["energy"].mean()
        return {**slips(film, made.pixels), "detail_on_film": float(energy)}

    def seconds_of(
        self, made: Made, energy: torch.Tensor, dense: torch.Tensor | None
    ) -> dict[str, dict[str, Any]]:
        """Figures of the last second and the one before, with features [B, 128]."""
        out = {}
        for name, where in seconds().items():
            pixels = made.pixels[:, where]
            out[name] = {
                "features": self.part(pixels),
                "detail": float(detail(pixels).mean() / energy[where].mean()),
            }
            if dense is not None:
                out[name]["psnr"] = metrics.psnr(pixels, dense[:, where]).mean().item()
        return out

    def over_seeds(self, name: str, parts: list[dict[str, Any]], latent_frames: int) -> dict[str, float]:
        reference = torch.cat([self.real(latent_frames, seed)["parts"][name] for seed in SEEDS])
        features = torch.cat([part.pop("features") for part in parts])
        means = {key: statistics.mean(part[key] for part in parts) for key in parts[0]}
        return {**means, "frechet": frechet_distance(features, reference)}


def seconds() -> dict[str, slice]:
    return {"before": slice(-2 * SECOND, -SECOND), "last": slice(-SECOND, None)}


def slips(film: Film, pixels: torch.Tensor) -> dict[str, float]:
    """Means over clips that have a texture: of frames in between, and of keyframes against the keyframe before."""
    between, keys = followed(pixels.shape[1])
    return {
        name: slip(pixels, film.places, film.textured, times).nanmean().item()
        for name, times in (("slip", between), ("slip_of_keyframes", keys))
    }
