"""Attention with pooled far frames, written down from its definition, with nothing of the pack."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from reference import in_marked_blocks


def groups_seen(
    frame: int | None,
    frames: int,
    height: int,
    width: int,
    near: int,
    sinks: int,
    pool: int,
    spatial: int,
    guides: int = 0,
    anchors: int = 0,
    sees: set[int] | None = None,
) -> list[list[int]]:
    """What a query of a clip's frame (None: anchor or guide) sees: lists of tokens, each seen as their mean.

    sees: the frames of the clip that are seen at all, all if None.
    """
    clip, a_frame = frames - anchors, height * width
    total = frames * a_frame + guides
    if frame is None:
        return [[n] for n in range(total)]
    sees = set(range(clip)) if sees is None else sees

    def token(t: int, y: int, x: int) -> int:
        return (anchors + t) * a_frame + y * width + x

    groups, exact = [], {t for t in range(min(sinks, clip)) if t in sees}
    for start in range(sinks, clip, pool):
        times = range(start, min(start + pool, clip))
        if any(abs(t - frame) <= near for t in times) or not set(times) <= sees:
            exact |= set(times) & sees
            continue
        for top in range(0, height, spatial):
            for left in range(0, width, spatial):
                rows = range(top, min(top + spatial, height))
                columns = range(left, min(left + spatial, width))
                groups.append([token(t, y, x) for t in times for y in rows for x in columns])
    groups += [[token(t, y, x)] for t in exact for y in range(height) for x in range(width)]
    return groups + [[n] for n in [*range(anchors * a_frame), *range(frames * a_frame, total)]]


def attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, heads: int, seen: Callable[[int], list[list[int]]]
) -> torch.Tensor:
    """[B, N, C] in float64; `seen(token)` says what a query token sees."""
    q, k, v = (x.double().unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v))
    out = torch.empty_like(q)
    for token in range(q.shape[2]):
        groups = seen(token)
        keys, values = (torch.stack([x[:, :, g].mean(2) for g in groups], dim=2) for x in (k, v))
        sizes = torch.tensor([len(g) for g in groups], dtype=torch.float64)
        logits = q[:, :, token, None] @ keys.transpose(-1, -2) * q.shape[-1] ** -0.5 + sizes.log()
        out[:, :, token, None] = logits.softmax(-1) @ values
    return out.transpose(1, 2).flatten(2)


def pooled_model(
    model: Any,
    seen: Callable[[int], list[list[int]]],
    active: Callable[[float, int], bool] = lambda sigma, block: True,
) -> Any:
    """A clone whose video self-attention is `attend`, where `active(sigma, block)`."""
    matrices: dict[int, tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = {}

    def pooling(tokens: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Means [G, N] of all groups of any query, ln n [G], and who sees which [N, G]."""
        if tokens not in matrices:
            each = [[tuple(g) for g in seen(token)] for token in range(tokens)]
            groups = sorted({g for groups in each for g in groups})
            means, sees = (
                torch.zeros(len(groups), tokens, dtype=torch.float64),
                torch.zeros(tokens, len(groups)),
            )
            for i, group in enumerate(groups):
                means[i, list(group)] = 1 / len(group)
            for token, own in enumerate(each):
                sees[token, [groups.index(g) for g in own]] = 1
            sizes = torch.tensor([len(g) for g in groups], dtype=torch.float64).log()
            matrices[tokens] = means, sizes, sees.bool()
        return matrices[tokens]

    def override(
        func: Any, q: Any, k: Any, v: Any, heads: int, mask: Any = None, **kwargs: Any
    ) -> torch.Tensor:
        block = kwargs["transformer_options"].get("reference_block")
        if block is None or not active(float(kwargs["transformer_options"]["sigmas"][0]), block):
            return func(q, k, v, heads, mask=mask, **kwargs)
        means, sizes, sees = pooling(q.shape[1])
        split = [x.double() for x in (q, means @ k.double(), means @ v.double())]
        split = [x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in split]
        bias = sizes.masked_fill(~sees, -torch.inf)
        logits = split[0] @ split[1].transpose(-1, -2) * split[0].shape[-1] ** -0.5 + bias
        return (logits.softmax(-1) @ split[2]).transpose(1, 2).flatten(2).to(q.dtype)

    return in_marked_blocks(model, override)
