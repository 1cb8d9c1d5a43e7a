"""Variants of nodes that are no part of the pack: what was tried and how it did stands in the quality table."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

GROWING_POOL = "GrowingPool"


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


VARIANTS = {GROWING_POOL: growing_pool}
