"""A contact sheet: below every caption a line of pictures for each way to make the clip."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torchvision.transforms.functional import to_pil_image
from torchvision.utils import make_grid

# Pixels of a line of text, and between pictures.
LINE, GAP = 16, 2


def contact_sheet(blocks: dict[str, dict[str, torch.Tensor]], cell: int, label: int) -> Image.Image:
    """blocks: by caption and by the words beside a line its pictures [N, h, w] in 0..1, each as wide as `cell`.

    label: room for those words.
    """
    columns = max(len(pictures) for lines in blocks.values() for pictures in lines.values())
    height = sum(LINE + len(lines) * (cell + GAP) for lines in blocks.values())
    sheet = Image.new("L", (label + columns * (cell + GAP), height), 255)
    pen, top = ImageDraw.Draw(sheet), 0
    for caption, lines in blocks.items():
        pen.text((4, top + 2), caption, fill=0)
        top += LINE
        for words, pictures in lines.items():
            parts = words.split("\n")
            for i, part in enumerate(parts):
                pen.text((4, top + cell // 2 - 6 * len(parts) + 14 * i), part, fill=0)
            shown = F.interpolate((pictures[:, None] * 255).round().byte(), size=(cell, cell))
            grid = make_grid(shown, nrow=columns, padding=GAP, pad_value=255)
            # Its own margin is white, too.
            sheet.paste(to_pil_image(grid), (label - GAP, top - GAP))
            top += cell + GAP
    return sheet
