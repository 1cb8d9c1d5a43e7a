"""Samples a trained model and lets the probe judge it, in figures and on a contact sheet."""

from __future__ import annotations

from typing import Any

import torch

from .captions import caption_text, embed_captions
from .clips import draw_clips, draw_ids
from .codec import CHANNELS, Codec
from .model import Recipe
from .probe import HEADS, Probe, frechet_distance, read_clips
from .trainer import GRID


@torch.no_grad()
def sample_latents(
    model: Any,
    ids: torch.Tensor,
    latent_frames: int,
    fps: float,
    generator: torch.Generator,
    recipe: Recipe,
    batch: int = 64,
) -> torch.Tensor:
    """Latents [B, 128, T, 8, 8] of captions ids [B, 4]: Euler through the stock forward."""
    device = generator.device
    copies = 1 if recipe.cfg == 1 else 2
    out = []
    for part in ids.split(batch):
        n = part.shape[0]
        x = torch.randn(n, CHANNELS, latent_frames, *GRID, generator=generator, device=device)
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


def _right(words: torch.Tensor, ids: torch.Tensor) -> dict[str, float]:
    share = (words == ids).float().mean(dim=0).tolist()
    single = ids[:, 1] == 0
    right = {name: round(value, 4) for name, value in zip(HEADS, share, strict=True)}
    right["shape_of_single"] = round(float((words[single, 0] == ids[single, 0]).float().mean()), 4)
    return right


@torch.no_grad()
def judge(
    model: Any, probe: Probe, clips: int, device: torch.device, seed: int, recipe: Recipe
) -> dict[str, Any]:
    """The probe's reading of real and sampled clips, and their Frechet distance, by length and frame rate."""
    codec = Codec().to(device)
    generator = torch.Generator(device).manual_seed(seed + 77)
    rows: dict[str, Any] = {}
    for latent_frames, fps in ((13, 24.0), (25, 24.0), (13, 8.0)):
        rate = torch.full((clips,), fps, device=device)
        ids = draw_ids(clips, generator)
        # Real clips of the same captions, as the codec's signal channels show them: the best a sample could look.
        words_real, features_real = [], []
        for _ in range(5):
            drawn = draw_clips(clips, latent_frames, generator, ids=ids, fps=rate)
            latent = codec.encode_pixels(drawn.pixels[:, None]) * codec.signal
            words, features = read_clips(probe, codec.decode_pixels(latent)[:, 0], rate)
            words_real.append(words)
            features_real.append(features)
        latents = sample_latents(model, ids, latent_frames, fps, generator, recipe)
        words, features = read_clips(probe, codec.decode_pixels(latents)[:, 0], rate)
        on_real, on_samples = _right(torch.cat(words_real), ids.repeat(5, 1)), _right(words, ids)
        reference = torch.cat(features_real[:4])
        rows[f"{latent_frames} latent frames, {fps:g} fps"] = {
            "clips": clips,
            "real": on_real,
            "sampled": on_samples,
            "sampled_over_real": {k: round(on_samples[k] / max(on_real[k], 1e-6), 4) for k in on_real},
            "frechet": round(frechet_distance(features, reference), 3),
            "frechet_real_to_real": round(frechet_distance(features_real[4], reference), 3),
        }
    return rows


def draw_sheet(model: Any, latent_frames: int, device: torch.device, seed: int, recipe: Recipe) -> Any:
    """A contact sheet: one captioned row per clip, twelve frames spread over it."""
    from PIL import Image, ImageDraw

    captions = [(s, 0, s % 3, (s + 1) % 3) for s in range(4)] + [(s, 0, (s + 2) % 3, s % 3) for s in range(4)]
    captions += [(1, 1, 0, 0), (2, 4, 1, 1)]
    ids = torch.tensor(captions, device=device)
    generator = torch.Generator(device).manual_seed(seed)
    latents = sample_latents(model, ids, latent_frames, 24.0, generator, recipe)
    pixels = Codec().to(device).decode_pixels(latents)[:, 0].clamp(0, 1).cpu()
    shown = torch.linspace(0, pixels.shape[1] - 1, 12).round().long()
    cell, label = 64, 210
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
