"""A contact sheet of whole two-stage runs: what the second stage adds, and what is left of it in between."""

from __future__ import annotations

from pathlib import Path

import torch
from PIL import Image, ImageDraw
from two_stage_rows import DENSE, REFINER, UPSCALED, USUAL, blind, ours
from two_stage_runs import Runs

from tiny_ltx.captions import caption_ids, caption_text

CAPTIONS = (
    caption_ids("disc", "diagonal", "fast", texture="stripes"),
    caption_ids("triangle", "horizontal", "medium", texture="checks"),
    caption_ids("disc", "vertical", "slow", texture="dots"),
    caption_ids("ring", "horizontal", "fast", "disc", "stripes"),
)
ROWS = (UPSCALED, DENSE, ours(2), ours(4), ours(8), blind(4))
# None of them is a keyframe at any stride.
FRAMES = (5, 29, 53, 77, 101, 125)
CELL, LABEL, LINE = 128, 110, 16


# What the README shows of it: something fast, something slow.
SHORT_CAPTIONS, SHORT_ROWS = (0, 2), (UPSCALED, DENSE, ours(2))


def draw_sheet(pack: str, path: Path, latent_frames: int = USUAL) -> None:
    """Writes the sheet, and a short one beside it."""
    runs = Runs(pack, {0: torch.tensor(CAPTIONS)}, real=lambda *_: torch.empty(0))
    clips = {row.name: runs.make(row, REFINER, latent_frames, 0).pixels.cpu() for row in ROWS}
    tiled(clips, tuple(range(len(CAPTIONS)))).save(path, optimize=True)
    short = {row.name: clips[row.name] for row in SHORT_ROWS}
    tiled(short, SHORT_CAPTIONS).save(path.with_stem(f"{path.stem}_short"), optimize=True)


def tiled(clips: dict[str, torch.Tensor], captions: tuple[int, ...]) -> Image.Image:
    shown = [frame for frame in FRAMES if frame < next(iter(clips.values())).shape[1]]
    height = len(captions) * (LINE + len(clips) * (CELL + 2))
    sheet = Image.new("L", (LABEL + len(shown) * (CELL + 2), height), 255)
    pen, top = ImageDraw.Draw(sheet), 0
    for i in captions:
        words = caption_text(CAPTIONS[i])
        pen.text((4, top + 2), f"{words}; video frames {', '.join(map(str, shown))}", fill=0)
        top += LINE
        for name, pixels in clips.items():
            pen.text((4, top + CELL // 2 - 6), name, fill=0)
            for column, frame in enumerate(shown):
                tile = Image.fromarray((pixels[i, frame] * 255).round().byte().numpy())
                tile = tile.resize((CELL, CELL), Image.Resampling.NEAREST)
                sheet.paste(tile, (LABEL + column * (CELL + 2), top))
            top += CELL + 2
    return sheet
