"""Self-attention in blocks: each block of queries sees some blocks of keys exactly and every other through its mean.

Method and kernel are comfy_kitchen's `sol_attn` (arXiv 2607.24027), which takes the tokens in the order they come in.
Here they are put in an order first in which a block is compact in space and time, so that its mean says more of it.
Names: B batch, N tokens, H heads, D head width, C = H·D, P = B·H, n blocks, S tokens of a block.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import permutations

import torch
import torch.nn.functional as F
from einops import rearrange

from .tokens import VideoTokens

# What the kernel is built for.
BLOCK, WIDTH = 64, 128
DTYPES = (torch.float16, torch.bfloat16)

HEAD_WIDTH = "HEAD_WIDTH"
DTYPE = "DTYPE"
NO_KERNEL = "NO_KERNEL"

# Tokens that a latent frame is away from the next, when blocks are shaped: things move. Deeper blocks than this asks for
# lose on activations (benchmarks/routing.md).
FRAME_STEP = 1.5

LOG2_E = math.log2(math.e)
# Bytes of the logits that the reference makes at a time; it needs some times as much.
REFERENCE_BYTES = 2**28

Shape = tuple[int, int, int]


@dataclass(frozen=True, eq=False)
class Packing:
    """The tokens of one forward in blocks of `block`, which are compact in space and time; the last one may be shorter.

    order: the token that each row holds; places: the row that holds each token. Both [N], where `on` has put them.
    exact: the first so many blocks see everything and are seen by everything. shape: frames, rows and columns of the
    other blocks, as far as the grid allows.
    """

    order: torch.Tensor
    places: torch.Tensor
    block: int
    exact: int
    shape: Shape

    def on(self, device: torch.device) -> Packing:
        """The same for tensors of this device. Whoever keeps it keeps 16 bytes a token there."""
        return replace(self, order=self.order.to(device), places=self.places.to(device))

    @property
    def total(self) -> int:
        return len(self.order)

    @property
    def blocks(self) -> int:
        return -(-self.total // self.block)

    @property
    def is_dense(self) -> bool:
        """Whether every block sees every other exactly, whatever is asked for: a block always sees its neighbours."""
        return self.blocks - self.exact <= 2

    def pack(self, x_BNC: torch.Tensor) -> torch.Tensor:
        return x_BNC.index_select(1, self.order)

    def unpack(self, x_BNC: torch.Tensor) -> torch.Tensor:
        return x_BNC.index_select(1, self.places)

    def pairs(self, keep: float) -> int | None:
        return pairs(self.total, self.exact, keep, self.block)


def pairs(total: int, exact: int, keep: float, block: int = BLOCK) -> int | None:
    """Query-key pairs that one head computes for `total` tokens of which the first `exact` blocks are always exact.

    None where a threshold decides (`keep` 0), which only the data know. A block and its neighbours are taken to be among
    those that it keeps, which they nearly always are. Pooled keys cost a pair for two blocks.
    """
    if not keep:
        return None
    blocks, always = -(-total // block), min(total, exact * block)
    kept = min(total - always, block * max(3, kept_blocks(blocks - exact, keep)))
    return always * total + (total - always) * (always + kept) + blocks**2


def exact_blocks(tokens: VideoTokens, sink_frames: int, block: int = BLOCK) -> int:
    """Blocks that hold guides, anchors and the first `sink_frames` frames of the clip."""
    first = min(tokens.anchors + sink_frames, tokens.frames)
    return -(-(tokens.offsets[first] + tokens.guides) // block)


def pack_tokens(
    tokens: VideoTokens, height: int, width: int, sink_frames: int, block: int = BLOCK
) -> Packing:
    """How to put the tokens of frames of `height` × `width` in blocks.

    Guides, anchors and the first `sink_frames` frames of the clip come first, in blocks that are always exact. The
    last of these is filled up with other tokens, so nothing is padded.
    """
    frames, per_frame = tokens.frames, height * width
    first = min(tokens.anchors + sink_frames, frames)
    if any(
        b - a != per_frame for a, b in zip(tokens.offsets[first:], tokens.offsets[first + 1 :], strict=False)
    ):
        raise ValueError(
            f"routed attention: expected {per_frame} tokens in each frame ({height}×{width}), got frames that begin "
            f"at {tokens.offsets}. Leave clips with dropped tokens to dense attention."
        )
    start, stop = tokens.offsets[first], tokens.offsets[-1]
    always = torch.cat([torch.arange(start), torch.arange(stop, tokens.total)])
    exact = exact_blocks(tokens, sink_frames, block)
    order, shape = compact_order((frames - first, height, width), block)
    # From the end, so that what follows begins where blocks and grid meet.
    whole = max(0, len(order) - (exact * block - len(always)))
    order = torch.cat([always, start + order[whole:], start + order[:whole]])
    return Packing(order, order.argsort(), block, exact, shape)


def compact_order(grid: Shape, block: int) -> tuple[torch.Tensor, Shape]:
    """Tokens of a T×h×w grid, `block` of which in a row are as compact as can be, and the shape of those.

    The order runs through tubes, to and fro, so that nothing has to be padded where blocks do not divide the grid and
    blocks that follow each other touch.
    """
    return tube_order(grid, block, *best_tubes(grid, block))


@lru_cache(maxsize=64)
def best_tubes(grid: Shape, block: int, /) -> tuple[tuple[int, ...], int, int]:
    """Axes and size of the tubes whose blocks are the most compact."""
    sides = [2**power for power in range(block.bit_length()) if block % 2**power == 0]
    tubes = [(axes, a, b) for axes in permutations(range(3)) for a in sides for b in sides if a * b <= block]
    return min(tubes, key=lambda tube: spread(tube_order(grid, block, *tube)[0], grid, block))


def tube_order(grid: Shape, block: int, axes: tuple[int, ...], a: int, b: int) -> tuple[torch.Tensor, Shape]:
    """Tubes of `a` × `b` tokens of two axes along the third; layers of the first axis come one after the other."""
    across, beside, along = axes
    at = torch.meshgrid(*(torch.arange(size) for size in grid), indexing="ij")
    beside_count = -(-grid[beside] // b)
    layer, column = at[across] // a, at[beside] // b
    tube = layer * beside_count + torch.where(layer % 2 == 0, column, beside_count - 1 - column)
    place = torch.where(tube % 2 == 0, at[along], grid[along] - 1 - at[along])
    order = (tube * grid[along] + place).flatten().argsort(stable=True)
    sides = dict(zip(axes, (a, b, block // (a * b)), strict=True))
    return order, (sides[0], sides[1], sides[2])


def spread(order: torch.Tensor, grid: Shape, block: int) -> float:
    """Mean squared distance of a token to the middle of its block, in tokens; frames are `FRAME_STEP` apart."""
    at = torch.stack(torch.unravel_index(order, grid), dim=-1).double()
    at[:, 0] *= FRAME_STEP
    whole = len(at) // block * block
    parts = (at[:whole].view(-1, block, 3), at[whole:][None])
    distances = (part - part.mean(1, keepdim=True) for part in parts if part.numel())
    return sum(float(distance.square().sum()) for distance in distances) / max(1, len(at))


def kept_blocks(blocks: int, keep: float) -> int:
    """Of so many blocks those that a block of queries keeps, as the kernel counts them."""
    return max(0, min(blocks - 1, max(1, round(keep * blocks))))


@lru_cache
def why_not(device: torch.device, dtype: torch.dtype, head_width: int) -> str | None:
    """The reason why the kernel cannot serve such tensors here, None if it can."""
    if head_width != WIDTH:
        return HEAD_WIDTH
    if dtype not in DTYPES:
        return DTYPE
    try:
        from comfy_kitchen import sol_attn_is_available
    except ImportError:
        return NO_KERNEL
    return None if sol_attn_is_available(device) else NO_KERNEL


def attend_routed(
    q_BNC: torch.Tensor,
    k_BNC: torch.Tensor,
    v_BNC: torch.Tensor,
    heads: int,
    scale: float | None,
    packing: Packing,
    keep: float,
    threshold: float,
    extra_tokens: int,
) -> torch.Tensor:
    """Attention [B, N, C] where `why_not` gives no reason, of tokens in the order of the model.

    keep: the share of key blocks, below 1, that each block of queries sees exactly; with 0 those whose mean scores
    `threshold` standard deviations above the average. extra_tokens: so many of the other keys, a multiple of 64 up to
    256, are seen exactly as well.
    """
    from comfy_kitchen import sol_attn

    q, k, v = (packing.pack(x).unflatten(-1, (heads, -1)) for x in (q_BNC, k_BNC, v_BNC))
    exact = [0, packing.exact]
    out = sol_attn(
        q,
        k,
        v,
        tau=threshold,
        scale=scale,
        sink_blocks=exact,
        sink_q=exact,
        topk_ratio=keep,
        token_aug=extra_tokens,
    )
    return packing.unpack(out.flatten(2))


def attend_reference(
    q_BNC: torch.Tensor,
    k_BNC: torch.Tensor,
    v_BNC: torch.Tensor,
    heads: int,
    scale: float | None,
    packing: Packing,
    keep: float,
    threshold: float,
    extra_tokens: int = 0,
) -> torch.Tensor:
    """As `attend_routed`, for any device, head width and block, in float32 or better. It knows no extra tokens."""
    wide = torch.promote_types(v_BNC.dtype, torch.float32)
    q, k, v = (rearrange(packing.pack(x), "b n (h d) -> (b h) n d", h=heads) for x in (q_BNC, k_BNC, v_BNC))
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    at_once = max(1, REFERENCE_BYTES // (q.shape[1] ** 2 * wide.itemsize))
    out = torch.cat(
        [
            _attend_heads(q_part.to(wide), k_part.to(wide), v_part.to(wide), scale, packing, keep, threshold)
            for q_part, k_part, v_part in zip(
                q.split(at_once), k.split(at_once), v.split(at_once), strict=True
            )
        ]
    )
    return packing.unpack(rearrange(out.to(v.dtype), "(b h) n d -> b n (h d)", h=heads))


def _attend_heads(
    q_PND: torch.Tensor,
    k_PND: torch.Tensor,
    v_PND: torch.Tensor,
    scale: float,
    packing: Packing,
    keep: float,
    threshold: float,
) -> torch.Tensor:
    score, exact = route(q_PND, k_PND, scale, packing, keep, threshold)
    block, missing = packing.block, packing.blocks * packing.block - packing.total
    q, k, v = (
        rearrange(F.pad(x, (0, 0, 0, missing)), "p (n s) d -> p n s d", s=block)
        for x in (q_PND, k_PND, v_PND)
    )
    sizes = block_sizes(packing, q.device)
    # Pooled keys are scored by the mean of the queries, so what is the same for all keys matters here.
    centred = k - (k.sum(2) / sizes[:, None]).mean(1)[:, None, None]
    near = torch.einsum("pisd,pjtd->pisjt", q, centred) * scale
    near.masked_fill_(~exact[:, :, None, :, None], -torch.inf)
    near[..., -1, block - missing :] = -torch.inf
    # A pooled key stands for all keys of its block.
    far = (score + sizes.log()).masked_fill(exact, -torch.inf)
    logits = torch.cat([near.flatten(-2), far[:, :, None].expand(-1, -1, block, -1)], dim=-1)
    del near
    values = torch.cat([v.flatten(1, 2), v.sum(2) / sizes[:, None]], dim=1)
    return (logits.softmax(-1).flatten(1, 2) @ values)[:, : packing.total]


def route(
    q_PND: torch.Tensor, k_PND: torch.Tensor, scale: float, packing: Packing, keep: float, threshold: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Of packed queries and keys: the score of every pair of blocks, and which are seen exactly. Both [P, n, n]."""
    sizes = block_sizes(packing, q_PND.device)
    missing = packing.blocks * packing.block - packing.total
    mean_q, mean_k = (
        rearrange(F.pad(x, (0, 0, 0, missing)), "p (n s) d -> p n s d", s=packing.block).sum(2)
        / sizes[:, None]
        for x in (q_PND, k_PND)
    )
    mean_k = mean_k - mean_k.mean(1, keepdim=True)
    score = mean_q @ mean_k.mT * scale
    always = packing.exact
    if keep:
        kept = kept_blocks(packing.blocks - always, keep)
        best = score[..., always:].topk(kept, dim=-1).values
        exact = score >= best[..., -1:] if kept else torch.zeros_like(score, dtype=torch.bool)
    else:
        variance = mean_q.square() @ mean_k.square().mean(1)[..., None] * scale**2
        exact = score > threshold * (variance + 1e-6 / LOG2_E**2).sqrt()
    index = torch.arange(packing.blocks, device=score.device)
    exact = exact | ((index[:, None] - index).abs() <= 1)
    exact[:, :, :always] = True
    exact[:, :always] = True
    return score, exact


def block_sizes(packing: Packing, device: torch.device) -> torch.Tensor:
    """Tokens of each block [n]."""
    starts = torch.arange(0, packing.total, packing.block, device=device)
    return (packing.total - starts).clamp(max=packing.block)
