"""Which tokens are pooled into one.

Tokens of a clip lie on a grid of time × rows × columns; a group is a box of it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from einops import reduce


class Piece(NamedTuple):
    """Keys that lie side by side, [start, stop) of all keys or of those that `grid` has pooled for one kind of its cells.

    Each stands for `keys` keys.
    """

    start: int
    stop: int
    keys: int = 1
    grid: Grid | None = None
    cells: int = 0


@dataclass(frozen=True)
class Cells:
    """Tokens of a frame, rows [top, bottom) and columns [left, right), in cells of `height` × `width` tokens."""

    top: int
    bottom: int
    height: int
    left: int
    right: int
    width: int

    @property
    def count(self) -> int:
        return (self.bottom - self.top) // self.height * ((self.right - self.left) // self.width)


@dataclass(frozen=True)
class Grid:
    """`frames` whole frames of `height` × `width` tokens, from token `start` on, in groups.

    A group holds `pool` frames × `spatial`² tokens, fewer at the end of the clip and at the lower and right edges.
    """

    start: int
    frames: int
    height: int
    width: int
    pool: int
    spatial: int

    @property
    def groups(self) -> int:
        """Groups along time."""
        return -(-self.frames // self.pool)

    @property
    def keys_a_group(self) -> int:
        """Pooled keys of one group along time."""
        return -(-self.height // self.spatial) * -(-self.width // self.spatial)

    def frames_of(self, group: int) -> range:
        """Its frames, counted from the first of the grid."""
        return range(group * self.pool, min((group + 1) * self.pool, self.frames))

    def tokens_of(self, first: int, last: int) -> tuple[int, int]:
        """The tokens of groups [first, last) along time."""
        a_frame = self.height * self.width
        start, stop = (self.start + min(at * self.pool, self.frames) * a_frame for at in (first, last))
        return start, stop

    @cached_property
    def cells(self) -> tuple[Cells, ...]:
        """Where in a frame cells are equally large: the middle, and the edges that do not divide."""

        def parts(length: int) -> list[tuple[int, int, int]]:
            whole = length // self.spatial * self.spatial
            return [
                (a, b, size)
                for a, b, size in ((0, whole, self.spatial), (whole, length, length - whole))
                if b > a
            ]

        return tuple(Cells(*rows, *columns) for rows in parts(self.height) for columns in parts(self.width))

    def pooled(self, x_BNC: torch.Tensor) -> list[torch.Tensor]:
        """Means of all groups: for each kind of `cells`, [B, groups · cells, C], a shorter last group behind the others."""
        a_frame, whole = self.height * self.width, self.frames // self.pool * self.pool
        clip = x_BNC[:, self.start : self.start + self.frames * a_frame]
        clip = clip.unflatten(1, (self.frames, self.height, self.width))
        out = []
        for cells in self.cells:
            part = clip[:, :, cells.top : cells.bottom, cells.left : cells.right]
            pieces = [(part[:, :whole], self.pool), (part[:, whole:], self.frames - whole)]
            means = [
                reduce(
                    piece,
                    "b (t p) (r y) (c x) ch -> b (t r c) ch",
                    "mean",
                    p=frames,
                    y=cells.height,
                    x=cells.width,
                )
                for piece, frames in pieces
                if piece.shape[1]
            ]
            out.append(means[0] if len(means) == 1 else torch.cat(means, dim=1))
        return out

    def pieces(self, first: int, last: int) -> Iterator[Piece]:
        """Groups [first, last) along time, in pieces whose pooled keys stand for equally many."""
        whole = self.frames // self.pool
        for kind, cells in enumerate(self.cells):
            for a, b, frames in (
                (first, min(last, whole), self.pool),
                (max(first, whole), last, self.frames - whole * self.pool),
            ):
                if a < b:
                    keys = frames * cells.height * cells.width
                    yield Piece(a * cells.count, b * cells.count, keys, self, kind)


@dataclass(frozen=True)
class Coarse:
    """Groups [first, last) along time of a grid, seen through their pooled keys."""

    grid: Grid
    first: int
    last: int

    @property
    def key_count(self) -> int:
        return (self.last - self.first) * self.grid.keys_a_group

    def pieces(self) -> Iterator[Piece]:
        return self.grid.pieces(self.first, self.last)
