"""A contact sheet of whole two-stage runs: what the second stage adds, and what is left of it in between."""

from __future__ import annotations

from pathlib import Path

import torch
from PIL import Image
from sheet import contact_sheet
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
CELL, LABEL = 128, 110


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
    words = f"video frames {', '.join(map(str, shown))}"
    blocks = {
        f"{caption_text(CAPTIONS[i])}; {words}": {name: pixels[i, shown] for name, pixels in clips.items()}
        for i in captions
    }
    return contact_sheet(blocks, CELL, LABEL)
