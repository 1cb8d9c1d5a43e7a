"""Shows what drift looks like: dense, window 4 and window 1 on the same noise. A CPU is enough.

python benchmarks/drift_sheet.py        # writes drift_sheet.png beside this file
"""

from __future__ import annotations

from pathlib import Path

HERE = Path(__file__).resolve().parent

from runtime import PACK  # isort: split

import metrics
import torch
from rows import DENSE, window
from sampling import sample_clips
from sheet import contact_sheet

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
    blocks: dict[str, dict[str, torch.Tensor]] = {}
    for i, caption in enumerate(CAPTIONS):
        lines = blocks.setdefault(caption_text(caption), {})
        for name, pixels in clips.items():
            shown = torch.linspace(0, pixels.shape[1] - 1, COLUMNS).round().long()
            lines[f"{name}\ndrift {metrics.drift(pixels[i : i + 1]).item():.3f}"] = pixels[i, shown]
    contact_sheet(blocks, CELL, LABEL).save(HERE / "drift_sheet.png", optimize=True)


if __name__ == "__main__":
    main()
