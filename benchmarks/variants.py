"""Variants of nodes that are no part of the pack: what was tried and how it did stands in the quality table."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import Any

GROWING_POOL, INTERLEAVED = "GrowingPool", "InterleavedFrames"


def growing_pool(pack: str) -> Any:
    """Low-rank attention whose far groups grow with distance: behind `beyond` frames they are twice as long."""
    low_rank = importlib.import_module(f"{pack}.patches.techniques.low_rank")
    coarse = importlib.import_module(f"{pack}.patches.kernels.coarse")
    clock, mount = (importlib.import_module(f"{pack}.patches.{room}") for room in ("clock", "mount"))

    @dataclass(frozen=True)
    class GrowingPool(low_rank.LowRankAttention):
        beyond: int = 4

        def seen(self, segments: Any, tokens: Any) -> Any:
            farthest = coarse.coarsened(
                segments, tokens, self.beyond, self.sink_frames, 2 * self.pool, self.spatial_pool
            )
            return super().seen(farthest, tokens)

    def execute(model: Any, start_percent: float, end_percent: float, **settings: Any) -> Any:
        schedule = clock.Schedule(start_percent, end_percent)
        return SimpleNamespace(args=[mount.mount(model, GrowingPool(**settings, schedule=schedule))])

    return SimpleNamespace(execute=execute)


def interleaved_frames(pack: str) -> Any:
    """Blocks between the edges compute every `every`-th latent frame, the next block the ones beside them.

    The others pass by such a block unchanged. After FIS-DiT's frames that take turns.
    """
    technique, clock, mount = (
        importlib.import_module(f"{pack}.patches.{room}") for room in ("technique", "clock", "mount")
    )
    layouts = importlib.import_module(f"{pack}.patches.layouts")
    video, role = layouts.work.VIDEO, layouts.role.Role.VIDEO_SELF

    class TakingTurns(technique.State):
        def modules(self, call: Any) -> Any:
            own = self.technique
            for block in own.blocks(len(call.layout.blocks)):
                frames = range(block % own.every, call.tokens.frames, own.every)
                yield call.layout.blocks[block], partial(call.on_frames, self, frames)

    @dataclass(frozen=True)
    class InterleavedFrames(technique.Technique):
        every: int = 2
        edge: int = 1

        def blocks(self, depth: int) -> range:
            return range(self.edge, depth - self.edge)

        def begin(self, run: Any) -> Any:
            return TakingTurns(self, run)

        def cost(self, work: Any) -> Any:
            """Of `every` blocks one at full length, its attention as large as those of all of them together."""
            pairs = work.tokens.total**2 // self.every
            for block in self.blocks(work.blocks):
                if block % self.every:
                    work = work.without(block, video)
                else:
                    work = work.with_pairs(role, block, pairs)
            return work

    InterleavedFrames.name, InterleavedFrames.stage, InterleavedFrames.roles = (
        "interleaved frames",
        12,
        frozenset(),
    )

    def execute(model: Any, start_percent: float, end_percent: float, **settings: Any) -> Any:
        schedule = clock.Schedule(start_percent, end_percent)
        return SimpleNamespace(args=[mount.mount(model, InterleavedFrames(**settings, schedule=schedule))])

    return SimpleNamespace(execute=execute)


VARIANTS = {GROWING_POOL: growing_pool, INTERLEAVED: interleaved_frames}
