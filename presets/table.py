"""What each preset sets, stage by stage; every row names the measurements that back it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from ..patches.clock import LongSchedule, Schedule
from ..patches.technique import Technique
from ..patches.techniques.keyframe_stride import StretchedTimes
from ..patches.techniques.pacing import GpuPacing
from ..patches.techniques.spatial_freeze import SpatialFreeze
from ..patches.techniques.temporal_window import TemporalWindow

QUALITY, BALANCED, FAST, COOL = "quality", "balanced", "fast", "cool laptop"
SINGLE, FIRST, SECOND = "single", "first", "second"
PRESETS, STAGES = (QUALITY, BALANCED, FAST, COOL), (SINGLE, FIRST, SECOND)
# Below so many steps a frozen one is missed.
MANY_STEPS = 12


@dataclass(frozen=True)
class Evidence:
    """One row of benchmarks/`report`.json, and what it says.

    model, row: where it stands there. cost: FLOPs, of the full run at LTX-2 size for `clip`. distances: by latent frames,
    the Fréchet distance to real clips of all frames, of the full run's. steps: of the schedule that it was measured with.
    first: the stride of the stage before, if there was one.
    """

    report: str
    model: str
    row: str
    clip: str
    cost: float
    distances: Mapping[int, float]
    steps: int
    first: int | None = None

    def words(self) -> str:
        whole = f"sampling with {self.steps} steps" if self.first is None else "the whole two-stage run"
        least, most = min(self.distances.values()), max(self.distances.values())
        span = f"{least:g}" + (f" to {most:g}" if most > least else "")
        return (
            f"{self.cost:.0%} of the computing of {whole} at {self.clip}, and {span} times the full run's distance to real "
            "clips"
        )


@dataclass(frozen=True)
class Recipe:
    """stride: against the full rate. techniques: what goes on the MODEL beside it."""

    stride: int
    techniques: tuple[Technique, ...]
    evidence: tuple[Evidence, ...]

    def evidence_for(self, steps: int | None, first: int) -> Iterator[Evidence]:
        """That of schedules like one of so many steps, all where nobody has told, behind a first stage at this stride."""
        for each in self.evidence:
            is_alike = steps is None or (each.steps >= MANY_STEPS) == (steps >= MANY_STEPS)
            if is_alike and each.first in (None, first):
                yield each


def freezing(start: float) -> SpatialFreeze:
    return SpatialFreeze(refresh_every=2, schedule=LongSchedule(start, 1.0, MANY_STEPS))


def of_eight(row: str, cost: float, distances: Mapping[int, float]) -> Evidence:
    return Evidence("quality", "student", row, "97 f 896×512", cost, distances, 8)


def of_24(row: str, cost: float, distances: Mapping[int, float]) -> Evidence:
    return Evidence("quality", "teacher", row, "97 f 896×512", cost, distances, 24)


def of_two(row: str, cost: float, distances: Mapping[int, float], first: int = 1) -> Evidence:
    return Evidence("two_stage", "refiner", row, "121 f 1280×704", cost, distances, 3, first)


LATE_WINDOW = TemporalWindow(4, 1, schedule=Schedule(0.5, 1.0))
WINDOW = TemporalWindow(4, 1, schedule=Schedule(0.0, 1.0))
OTHER_STEPS = "whole blocks, linear, from 0.2, every 2."
BOTH_AT_2 = of_two("both stages at stride 2, blind", 0.51, {9: 2.98, 17: 2.50}, first=2)
BOTH_AT_3 = of_two("both stages at stride 3, blind", 0.33, {16: 3.28}, first=3)
NEAR_FULL = Recipe(
    1,
    (freezing(0.4), LATE_WINDOW),
    (
        of_eight("±4, 1 sink, from 0.5", 0.99, {13: 1.02, 25: 1.00}),
        of_24("whole blocks, linear, from 0.4, every 2. + ±4, 1 sink, from 0.5", 0.75, {13: 0.96, 25: 0.89}),
    ),
)

TABLE: dict[tuple[str, str], Recipe] = {
    (QUALITY, SINGLE): NEAR_FULL,
    (QUALITY, FIRST): Recipe(1, (LATE_WINDOW,), NEAR_FULL.evidence[:1]),
    (QUALITY, SECOND): Recipe(1, (WINDOW,), (of_two("±4, 1 sink", 0.93, {17: 1.05}),)),
    (BALANCED, SINGLE): Recipe(
        2,
        (freezing(0.2),),
        (
            of_eight("stride 2, motion", 0.49, {13: 1.12, 25: 0.91}),
            of_24(f"stride 2, motion + {OTHER_STEPS}", 0.32, {13: 1.37, 25: 1.02}),
        ),
    ),
    (BALANCED, FIRST): Recipe(2, (), (BOTH_AT_2,)),
    (BALANCED, SECOND): Recipe(2, (), (BOTH_AT_2, of_two("stride 2", 0.69, {9: 2.07, 17: 1.91}))),
    (FAST, SINGLE): Recipe(
        3,
        (freezing(0.2),),
        (
            of_eight("stride 3, motion", 0.33, {13: 1.30, 25: 0.77}),
            of_24(f"stride 3, motion + {OTHER_STEPS}", 0.23, {13: 1.46, 25: 0.79}),
        ),
    ),
    (FAST, FIRST): Recipe(3, (), (BOTH_AT_3,)),
    (FAST, SECOND): Recipe(3, (), (BOTH_AT_3, of_two("stride 3", 0.56, {16: 2.64}))),
}
TABLE |= {
    (COOL, stage): replace(TABLE[FAST, stage], techniques=(*TABLE[FAST, stage].techniques, GpuPacing()))
    for stage in STAGES
}
# What a preset behind another one takes off where it does not set it anew.
SETTABLE = {technique.name for recipe in TABLE.values() for technique in recipe.techniques} | {
    StretchedTimes.name
}
