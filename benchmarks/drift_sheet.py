"""Shows what drift looks like: dense, window 4 and window 1 on the same noise. A CPU is enough.

python benchmarks/drift_sheet.py        # writes drift_sheet.png beside this file
"""

from __future__ import annotations

from pathlib import Path

HERE = Path(__file__).resolve().parent

from runtime import PACK  # isort: split

import metrics
import torch
from PIL import Image, ImageDraw
from rows import DENSE, window
from sampling import sample_clips

from tiny_ltx.captions import caption_ids, caption_text
from tiny_ltx.model import TEACHER_RECIPE, load_model

CAPTIONS = (
    caption_ids("ring", "diagonal", "fast"),
    caption_ids("triangle", "horizontal", "medium"),
    caption_ids("cross", "vertical", "slow"),
)
LATENT_FRAMES, COLUMNS, CELL, LABEL = 25, 12, 64, 150


def main() -> None:
    model = load_model()
    rows = {
        "dense": DENSE,
        "window 4, sink 0": window(4, 0),
        "window 1, sink 1": window(1, 1),
        "window 1, sink 0": window(1, 0),
    }
    ids = torch.tensor(CAPTIONS)
    clips = {
        name: sample_clips(PACK, model, TEACHER_RECIPE, row, ids, LATENT_FRAMES, seed=0)[0].cpu()
        for name, row in rows.items()
    }
    height = len(CAPTIONS) * (16 + len(rows) * (CELL + 2))
    sheet = Image.new("L", (LABEL + COLUMNS * (CELL + 2), height), 255)
    pen = ImageDraw.Draw(sheet)
    top = 0
    for i, caption in enumerate(CAPTIONS):
        pen.text((4, top + 2), caption_text(caption), fill=0)
        top += 16
        for name, pixels in clips.items():
            clip = pixels[i]
            pen.text((4, top + CELL // 2 - 12), name, fill=0)
            pen.text((4, top + CELL // 2 + 2), f"drift {metrics.drift(clip[None]).item():.3f}", fill=0)
            shown = torch.linspace(0, clip.shape[0] - 1, COLUMNS).round().long().tolist()
            for column, frame in enumerate(shown):
                tile = Image.fromarray((clip[frame] * 255).round().byte().numpy())
                tile = tile.resize((CELL, CELL), Image.Resampling.NEAREST)
                sheet.paste(tile, (LABEL + column * (CELL + 2), top))
            top += CELL + 2
    sheet.save(HERE / "drift_sheet.png", optimize=True)


if __name__ == "__main__":
    main()
