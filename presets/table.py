"""What each preset sets, stage by stage; every row names the measurements that back it."""

from __future__ import annotations

from dataclasses import dataclass, replace

from ..patches.clock import Schedule
from ..patches.technique import Technique
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

    model, frames, row: where it stands there. cost: FLOPs, of the full run at LTX-2 size for the clip `at`. distance:
    Fréchet distance to real clips of all frames, of the full run's. steps: of the schedule that it was measured with.
    """

    report: str
    model: str
    frames: int
    row: str
    at: str
    cost: float
    distance: float
    steps: int

    def words(self) -> str:
        whole = (
            "the whole two-stage run" if self.report == "two_stage" else f"sampling with {self.steps} steps"
        )
        return (
            f"{self.cost:.0%} of the computing of {whole} at {self.at}, distance to real clips {self.distance:g} × that of "
            "the full run"
        )


@dataclass(frozen=True)
class Recipe:
    """stride: against the full rate. techniques: what goes on the MODEL beside it."""

    stride: int
    techniques: tuple[Technique, ...]
    evidence: tuple[Evidence, ...]

    def evidence_for(self, steps: int | None) -> tuple[Evidence, ...]:
        """That of schedules like one of so many steps; all where nobody has told."""
        alike = (
            each
            for each in self.evidence
            if steps is None or (each.steps >= MANY_STEPS) == (steps >= MANY_STEPS)
        )
        return tuple(alike) or self.evidence


def freezing(start: float) -> SpatialFreeze:
    return SpatialFreeze(refresh_every=2, schedule=Schedule(start, 1.0, least_steps=MANY_STEPS))


def of_eight(row: str, cost: float, distance: float) -> Evidence:
    return Evidence("quality", "student", 25, row, "97 f 896×512", cost, distance, 8)


def of_24(row: str, cost: float, distance: float) -> Evidence:
    return Evidence("quality", "teacher", 25, row, "97 f 896×512", cost, distance, 24)


def of_both(row: str, cost: float, distance: float, frames: int = 17) -> Evidence:
    return Evidence("two_stage", "refiner", frames, row, "121 f", cost, distance, 3)


LATE_WINDOW = TemporalWindow(4, 1, schedule=Schedule(0.5, 1.0))
OTHER_STEPS = "whole blocks, linear, from 0.2, every 2."
NEAR_FULL = Recipe(
    1,
    (freezing(0.4), LATE_WINDOW),
    (
        of_eight("±4, 1 sink, from 0.5", 0.99, 1.00),
        of_24("whole blocks, linear, from 0.4, every 2. + ±4, 1 sink, from 0.5", 0.75, 0.89),
    ),
)
FAST_SECOND = Recipe(
    3, (), (of_both("both stages at stride 3, blind", 0.33, 3.28, 16), of_both("stride 3", 0.56, 2.64, 16))
)

TABLE: dict[tuple[str, str], Recipe] = {
    (QUALITY, SINGLE): NEAR_FULL,
    (QUALITY, FIRST): NEAR_FULL,
    (QUALITY, SECOND): Recipe(
        1, (TemporalWindow(4, 1, schedule=Schedule(0.0, 1.0)),), (of_both("±4, 1 sink", 0.93, 1.05),)
    ),
    (BALANCED, SINGLE): Recipe(
        2,
        (freezing(0.2),),
        (of_eight("stride 2, motion", 0.49, 0.91), of_24(f"stride 2, motion + {OTHER_STEPS}", 0.32, 1.02)),
    ),
    (BALANCED, FIRST): Recipe(2, (freezing(0.2),), (of_both("both stages at stride 2, blind", 0.51, 2.5),)),
    (BALANCED, SECOND): Recipe(
        2, (), (of_both("both stages at stride 2, blind", 0.51, 2.5), of_both("stride 2", 0.69, 1.91))
    ),
    (FAST, SINGLE): Recipe(
        3,
        (freezing(0.2),),
        (of_eight("stride 3, motion", 0.33, 0.77), of_24(f"stride 3, motion + {OTHER_STEPS}", 0.23, 0.79)),
    ),
    (FAST, FIRST): Recipe(3, (freezing(0.2),), FAST_SECOND.evidence[:1]),
    (FAST, SECOND): FAST_SECOND,
}
TABLE |= {
    (COOL, stage): replace(TABLE[FAST, stage], techniques=(*TABLE[FAST, stage].techniques, GpuPacing()))
    for stage in STAGES
}
