"""Captions: five words, one context vector each. No ComfyUI import."""

from __future__ import annotations

import torch

SHAPES = ("disc", "ring", "cross", "triangle")
SECOND_SHAPES = ("none", *SHAPES)
DIRECTIONS = ("horizontal", "vertical", "diagonal")
SPEEDS = ("slow", "medium", "fast")
# Of the bright shape; only the large picture size shows it.
TEXTURES = ("plain", "stripes", "dots", "checks")

CAPTION_CHANNELS = 32
CAPTION_TOKENS = 5

# Word numbers: 0 is the empty caption, then one block per slot.
_SLOT_START = (1, 5, 10, 13, 16)
# Keeps the first projection of a one-hot word near unit size.
_WORD_SCALE = 4.0


def caption_ids(
    shape: str, direction: str, speed: str, second_shape: str = "none", texture: str = "plain"
) -> tuple[int, ...]:
    """Index of each word in its own list, in slot order (shape, second shape, direction, speed, texture)."""
    slots: list[tuple[str, str, tuple[str, ...]]] = [
        ("shape", shape, SHAPES),
        ("second_shape", second_shape, SECOND_SHAPES),
        ("direction", direction, DIRECTIONS),
        ("speed", speed, SPEEDS),
        ("texture", texture, TEXTURES),
    ]
    for name, word, words in slots:
        if word not in words:
            raise ValueError(f"{name} must be one of {', '.join(words)}; got {word!r}.")
    return tuple(words.index(word) for _, word, words in slots)


def embed_captions(ids: torch.Tensor, empty: torch.Tensor | None = None) -> torch.Tensor:
    """Context vectors of captions.

    ids: [B, 5] int64, as `caption_ids` orders them. empty: [B] bool, True where the caption is left out.
    Returns [B, 5, 32] float32.
    """
    words = torch.stack(
        [slot + start for slot, start in zip(ids.unbind(dim=1), _SLOT_START, strict=True)], dim=1
    )
    if empty is not None:
        words = words.masked_fill(empty[:, None], 0)
    numbers = torch.arange(CAPTION_CHANNELS, device=ids.device)
    return (words[..., None] == numbers).float() * _WORD_SCALE


def caption_text(ids: torch.Tensor | tuple[int, ...]) -> str:
    """A caption as a person reads it, e.g. "dots on fast horizontal ring + dark disc"."""
    shape, second, direction, speed, texture = (int(i) for i in ids)
    look = "" if texture == 0 else f"{TEXTURES[texture]} on "
    text = f"{look}{SPEEDS[speed]} {DIRECTIONS[direction]} {SHAPES[shape]}"
    return text if second == 0 else f"{text} + dark {SECOND_SHAPES[second]}"
