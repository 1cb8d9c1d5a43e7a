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
    """Keys that lie side by side, [start, stop) of all keys, or of those that `grid` has pooled from groups of one size.

    Each stands for `keys` keys. Pooled keys lie in a ring: behind their last comes their first again.
    """

    start: int
    stop: int
    keys: int = 1
    grid: Grid | None = None
    size: int = 0


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

    @cached_property
    def sizes(self) -> tuple[Size, ...]:
        """Groups that are equally large: for each kind of `cells`, those of `pool` frames, and a shorter last one."""
        whole = self.frames // self.pool
        spans = [(0, whole, self.pool), (whole, self.groups, self.frames - whole * self.pool)]
        return tuple(Size(*span, cells) for span in spans if span[0] < span[1] for cells in self.cells)

    def pooled(self, x_BNC: torch.Tensor) -> list[torch.Tensor]:
        """Means of all groups, [B, groups · cells, C] for each of `sizes`."""
        a_frame = self.height * self.width
        clip = x_BNC[:, self.start : self.start + self.frames * a_frame]
        clip = clip.unflatten(1, (self.frames, self.height, self.width))
        out = []
        for size in self.sizes:
            cells, begin = size.cells, size.first * self.pool
            frames = clip[:, begin : begin + (size.last - size.first) * size.frames]
            out.append(
                reduce(
                    frames[:, :, cells.top : cells.bottom, cells.left : cells.right],
                    "b (t p) (r y) (c x) ch -> b (t r c) ch",
                    "mean",
                    p=size.frames,
                    y=cells.height,
                    x=cells.width,
                )
            )
        return out


@dataclass(frozen=True)
class Size:
    """Groups [first, last) along time of `frames` frames each, at some cells of a frame."""

    first: int
    last: int
    frames: int
    cells: Cells

    @property
    def count(self) -> int:
        """Pooled keys."""
        return (self.last - self.first) * self.cells.count

    @property
    def keys(self) -> int:
        """What each of them stands for."""
        return self.frames * self.cells.height * self.cells.width


@dataclass(frozen=True)
class Coarse:
    """Groups [first, last) along time of a grid, seen through their pooled keys."""

    grid: Grid
    first: int
    last: int

    @property
    def key_count(self) -> int:
        return (self.last - self.first) * self.grid.keys_a_group


def pieces(ranges: tuple[Coarse, ...]) -> Iterator[Piece]:
    """Ascending ranges of groups, in as few pieces as possible."""
    for grid in dict.fromkeys(coarse.grid for coarse in ranges):
        for index, size in enumerate(grid.sizes):
            cells = size.cells.count
            cut = [
                (
                    (max(c.first, size.first) - size.first) * cells,
                    (min(c.last, size.last) - size.first) * cells,
                )
                for c in ranges
                if c.grid == grid
            ]
            seen = [(start, stop) for start, stop in cut if start < stop]
            if len(seen) > 1 and seen[0][0] == 0 and seen[-1][1] == size.count:
                # What lies before and behind the near frames, in one piece around the ring.
                seen[-1] = seen[-1][0], size.count + seen.pop(0)[1]
            for start, stop in seen:
                yield Piece(start, stop, size.keys, grid, index)
