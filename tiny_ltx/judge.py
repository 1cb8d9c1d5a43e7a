"""Samples trained models and lets the probes judge them, in figures and on contact sheets."""

from __future__ import annotations

from typing import Any

import torch

from .captions import caption_text, embed_captions
from .clips import FULL, SMALL, draw_clips, draw_ids
from .codec import CHANNELS, Codec, upscaled
from .model import REFINER_SIGMAS, REFINING_CFG, Recipe
from .probe import HEADS, Probe, frechet_distance, read_clips
from .spread import fine
from .trainer import grid_of

# (latent frames, frames a second) of the rows of a report.
SMALL_ROWS = ((13, 24.0), (25, 24.0), (13, 8.0))
FULL_ROWS = ((17, 24.0), (9, 12.0), (5, 6.0), (3, 3.0))


@torch.no_grad()
def sample_latents(
    model: Any,
    ids: torch.Tensor,
    fps: float,
    recipe: Recipe,
    start: torch.Tensor,
    generator: torch.Generator,
    batch: int = 64,
) -> torch.Tensor:
    """Latents [B, 128, T, h, w] of captions ids [B, 5]: Euler through the stock forward, from `start` and noise."""
    device = generator.device
    copies = 1 if recipe.cfg == 1 else 2
    out = []
    for part, begun in zip(ids.split(batch), start.split(batch), strict=True):
        n = part.shape[0]
        noise = torch.randn(begun.shape, generator=generator, device=device)
        x = begun + recipe.sigmas[0] * (noise - begun)
        context = embed_captions(part.repeat(copies, 1), torch.arange(copies * n, device=device) >= n)
        for now, after in zip(recipe.sigmas[:-1], recipe.sigmas[1:], strict=True):
            with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                velocity = model(
                    x.repeat(copies, 1, 1, 1, 1),
                    x.new_full((copies * n,), now),
                    context,
                    None,
                    frame_rate=fps,
                ).float()
            given, empty = velocity[:n], velocity[-n:]
            x = x + (after - now) * (empty + recipe.cfg * (given - empty))
        out.append(x)
    return torch.cat(out)


def empty(clips: int, latent_frames: int, size: int, device: torch.device) -> torch.Tensor:
    return torch.zeros(clips, CHANNELS, latent_frames, *grid_of(size), device=device)


def _right(words: torch.Tensor, ids: torch.Tensor) -> dict[str, float]:
    share = (words == ids[:, : words.shape[1]]).float().mean(dim=0).tolist()
    return {name: round(value, 4) for name, value in zip(HEADS, share, strict=False)}


def detail(pixels: torch.Tensor) -> float:
    """Mean square of what is finer than three pixels."""
    return float(fine(pixels).square().mean())


@torch.no_grad()
def judge(
    model: Any, probe: Probe, clips: int, device: torch.device, seed: int, recipe: Recipe
) -> dict[str, Any]:
    """The probe's reading of real and sampled clips, and their Frechet distance, by length and frame rate.

    Small clips are sampled from noise, large ones from real small ones made larger.
    """
    codec, size = Codec().to(device), probe.size
    generator = torch.Generator(device).manual_seed(seed + 77)
    rows: dict[str, Any] = {}
    for latent_frames, fps in SMALL_ROWS if size == SMALL else FULL_ROWS:
        rate = torch.full((clips,), fps, device=device)
        ids = draw_ids(clips, generator)
        # Real clips of the same captions, as the codec's signal channels show them: the best a sample could look.
        words_real, features_real, fine_real = [], [], []
        for _ in range(5):
            begun = generator.get_state()
            drawn = draw_clips(clips, latent_frames, generator, ids=ids, fps=rate, size=size)
            latent = codec.encode_pixels(drawn.pixels[:, None]) * codec.signal(size)
            pixels = codec.decode_pixels(latent)[:, 0]
            words, features = read_clips(probe, pixels, rate)
            words_real.append(words)
            features_real.append(features)
            fine_real.append(detail(pixels))
        start = empty(clips, latent_frames, size, device)
        if size == FULL:
            # The last of the real ones, as a first stage would have made it.
            again = torch.Generator(device)
            again.set_state(begun)
            small = draw_clips(clips, latent_frames, again, ids=ids, fps=rate, size=SMALL)
            start = upscaled(codec, codec.encode_pixels(small.pixels[:, None]) * codec.signal(SMALL))
        latents = sample_latents(model, ids, fps, recipe, start, generator)
        pixels = codec.decode_pixels(latents)[:, 0]
        words, features = read_clips(probe, pixels, rate)
        on_real, on_samples = _right(torch.cat(words_real), ids.repeat(5, 1)), _right(words, ids)
        reference = torch.cat(features_real[:4])
        real_detail = sum(fine_real) / len(fine_real)
        row = {
            "clips": clips,
            "real": on_real,
            "sampled": on_samples,
            "frechet": round(frechet_distance(features, reference), 3),
            "frechet_real_to_real": round(frechet_distance(features_real[4], reference), 3),
            "detail_of_real": round(detail(pixels) / real_detail, 3),
        }
        if size == FULL:
            row["detail_of_real_upscaled_only"] = round(
                detail(codec.decode_pixels(start)[:, 0]) / real_detail, 3
            )
        rows[f"{latent_frames} latent frames, {fps:g} fps"] = row
    return rows


def draw_sheet(
    model: Any, size: int, latent_frames: int, device: torch.device, seed: int, recipe: Recipe
) -> Any:
    """A contact sheet: one captioned row per clip, twelve frames spread over it."""
    from PIL import Image, ImageDraw

    captions = [(s, 0, s % 3, (s + 1) % 3, s) for s in range(4)]
    captions += [(s, 0, (s + 2) % 3, s % 3, (s + 1) % 4) for s in range(4)]
    captions += [(1, 1, 0, 0, 1), (2, 4, 1, 1, 3)]
    ids = torch.tensor(captions, device=device)
    generator = torch.Generator(device).manual_seed(seed)
    codec = Codec().to(device)
    start = empty(len(ids), latent_frames, size, device)
    if size == FULL:
        rate = torch.full((len(ids),), 24.0, device=device)
        small = draw_clips(len(ids), latent_frames, generator, ids=ids, fps=rate)
        start = upscaled(codec, codec.encode_pixels(small.pixels[:, None]) * codec.signal(SMALL))
    latents = sample_latents(model, ids, 24.0, recipe, start, generator)
    pixels = codec.decode_pixels(latents)[:, 0].clamp(0, 1).cpu()
    shown = torch.linspace(0, pixels.shape[1] - 1, 12).round().long()
    cell, label = 64 if size == SMALL else 128, 270
    sheet = Image.new("L", (label + 12 * (cell + 2), 20 + len(captions) * (cell + 2)), 255)
    pen = ImageDraw.Draw(sheet)
    pen.text((4, 4), f"{latent_frames} latent frames at 24 fps; video frames {shown.tolist()}", fill=0)
    for r, (clip, caption) in enumerate(zip(pixels, captions, strict=True)):
        top = 20 + r * (cell + 2)
        pen.text((4, top + cell // 2 - 6), caption_text(caption), fill=0)
        for c, frame in enumerate(shown.tolist()):
            tile = Image.fromarray((clip[frame] * 255).round().byte().numpy()).resize(
                (cell, cell), Image.Resampling.NEAREST
            )
            sheet.paste(tile, (label + c * (cell + 2), top))
    return sheet


def below(recipe: Recipe, level: float) -> Recipe:
    """The end of a schedule, entered at `level`: how a model of many steps refines."""
    return Recipe((level, *(s for s in recipe.sigmas if s < level - 1e-6)), REFINING_CFG)


REFINING_FROM = REFINER_SIGMAS["ltx-2"][0]
