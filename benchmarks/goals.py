"""What the combined recipes were to reach and what they reach: goals.md, from the reports beside it.

    python benchmarks/goals.py

A bound holds where the mean of the seeds' paired differences (row - bound x dense) plus their standard deviation is not
above 0. Time is that of recipes.json on eight multiprocessors; where a recipe was not timed as a whole, its FLOPs stand.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from results import read, table

HERE = Path(__file__).resolve().parent
GROUND = "8 multiprocessors"
DISTANCE, DRIFT, DETAIL = "frechet_all", "drift", "detail"
TWO, SINGLE = "two_stage", "quality"


@dataclass(frozen=True)
class Goal:
    """time: at most that share of the dense run's. bounds: at most so many times dense's; of detail at least."""

    name: str
    clip: str
    time: float
    bounds: Mapping[str, float]


@dataclass(frozen=True)
class Candidate:
    """A recipe for a goal. rows: (report, model, latent frames, row); timed: (part of recipes.json, recipe), if it was."""

    goals: Sequence[Goal]
    rows: Sequence[tuple[str, str, int, str]]
    timed: tuple[str, str] | None = None


SHORT, LONG, GUIDED = "121 f 1280×704", "241 f 1280×704", "97 f 896×512"
TENTH = {DISTANCE: 1.1, DRIFT: 1.1, DETAIL: 0.95}
THIRD = {DISTANCE: 1.3, DRIFT: 1.3, DETAIL: 0.9}
BALANCED_TWO = Goal("balanced, two stages 8 + 3", SHORT, 0.58, TENTH)
FAST_TWO = Goal("fast, two stages 8 + 3", SHORT, 0.40, THIRD)
FAST_LONG = Goal("fast, two stages 8 + 3", LONG, 0.30, THIRD)
BALANCED_ONE = Goal("balanced, 24 steps and CFG", GUIDED, 0.40, {DISTANCE: 1.0})
FAST_ONE = Goal("fast, 24 steps and CFG", GUIDED, 0.20, {DISTANCE: 1.3, DRIFT: 1.3})
FROZEN = "whole blocks, linear, from 0.2, every 2."
REFINED = "stride 3, motion, 12 steps, refined from σ 0.8"


def refining(frames: int, row: str) -> tuple[str, str, int, str]:
    return TWO, "refiner", frames, row


def guided(row: str) -> tuple[tuple[str, str, int, str], ...]:
    return tuple((SINGLE, "teacher", frames, row) for frames in (13, 25))


BOTH_2, BOTH_3 = "both stages at stride 2, blind", "both stages at stride 3, blind"
CANDIDATES = (
    Candidate([BALANCED_TWO], [refining(17, BOTH_2)], (TWO, BOTH_2)),
    Candidate([BALANCED_TWO], [refining(17, "stride 4")], (TWO, "stride 4")),
    Candidate([BALANCED_TWO], [refining(17, "stride 2")], (TWO, "stride 2")),
    Candidate([BALANCED_TWO], [refining(17, "4 + 2 steps from σ 0.909375")]),
    Candidate([FAST_TWO, FAST_LONG], [refining(16, BOTH_3)], (TWO, BOTH_3)),
    Candidate(
        [FAST_TWO], [refining(17, "stride 8, first stage at 2")], (TWO, "first stage at stride 2, then 8")
    ),
    Candidate(
        [FAST_LONG], [refining(17, "stride 4, first stage at 2")], (TWO, "first stage at stride 2, then 4")
    ),
    Candidate([FAST_TWO], [refining(16, "4 + 1 step from σ 0.909375")]),
    Candidate([BALANCED_ONE], guided(f"{REFINED} + {FROZEN}")),
    Candidate([BALANCED_ONE], guided(REFINED), ("guided", REFINED)),
    Candidate(
        [BALANCED_ONE], guided(f"stride 2, motion + {FROZEN}"), ("guided", "stride 2, frozen from 0.2 on")
    ),
    Candidate([BALANCED_ONE], guided("10 steps, larger at the end")),
    Candidate([FAST_ONE], guided("stride 3, motion, 12 steps")),
    Candidate([FAST_ONE], guided(f"stride 3, motion + {FROZEN}"), ("guided", "stride 3, frozen from 0.2 on")),
    Candidate([FAST_ONE], guided("stride 3, motion, 8 steps, refined from σ 0.8")),
    Candidate([FAST_ONE], guided("4 steps")),
)


class Reports:
    def __init__(self) -> None:
        self.known = {name: read(HERE / f"{name}.json") for name in (TWO, SINGLE, "recipes")}

    def row(self, report: str, model: str, frames: int, row: str) -> dict[str, Any]:
        whose = "base" if report == TWO else "model"
        found: dict[str, Any] = next(
            each
            for each in self.known[report]["rows"]
            if (each[whose], each["frames"], each["row"]) == (model, frames, row)
        )
        return found

    def timed(self, part: str, recipe: str, clip: str) -> dict[str, Any] | None:
        for each in self.known["recipes"][part]:
            if (each["ground"], each["clip"], each["recipe"]) == (GROUND, clip, recipe):
                return dict(each)
        return None


def verdict(row: dict[str, Any], dense: dict[str, Any], figure: str, bound: float) -> str:
    """Of a row held against dense, both with one entry a seed."""
    sign = -1 if figure == DETAIL else 1
    apart = [
        sign * (own[figure] - bound * full[figure])
        for own, full in zip(row["seeds"], dense["seeds"], strict=True)
    ]
    mean = statistics.mean(apart)
    if mean + statistics.stdev(apart) <= 0:
        return "holds"
    return "in the mean only" if mean <= 0 else "missed"


def lines(reports: Reports) -> list[list[str]]:
    """Cells of the table, a line for each goal, candidate and length."""
    out = []
    for candidate in CANDIDATES:
        for goal in candidate.goals:
            timed = reports.timed(*candidate.timed, goal.clip) if candidate.timed else None
            for place in candidate.rows:
                row, dense = reports.row(*place), reports.row(*place[:3], "dense")
                # Reports name clips by their frames, or by frames and size.
                cost = next(share for clip, share in row["cost"].items() if goal.clip.startswith(clip))
                share = cost if timed is None else timed["of_dense"]
                figures, full = row["figures"], dense["figures"]
                cells = [f"{goal.name}, {goal.clip}", f"{place[3]}, judged at {place[2]} latent frames"]
                cells.append(f"{share:.0%} of {'FLOPs' if timed is None else 'time'} (≤ {goal.time:.0%})")
                for figure in (DISTANCE, DRIFT, DETAIL):
                    if figure not in figures:
                        cells.append("–")
                        continue
                    shown = f"{figures[figure] / full[figure]:.2f}"
                    if figure in goal.bounds:
                        bound = goal.bounds[figure]
                        limit = "≥" if figure == DETAIL else "≤"
                        shown += f" ({limit} {bound:g}: {verdict(row, dense, figure, bound)})"
                    cells.append(shown)
                peak = timed and timed["peak_gib"] and timed["dense_peak_gib"]
                cells.append(f"{timed['peak_gib'] / timed['dense_peak_gib']:.2f}" if peak and timed else "–")
                out.append(cells)
    return out


def easy_cache(reports: Reports) -> list[list[str]]:
    """EasyCache on top of a stride, beside what it does to the full run; FLOPs and distance, times those without it."""
    out = []
    for base in ("dense", "stride 2, motion", "stride 3, motion"):
        for frames in (13, 25):
            cached = "EasyCache 0.024" if base == "dense" else f"{base} + EasyCache 0.024"
            rows = [reports.row(SINGLE, "teacher", frames, name) for name in (base, cached)]
            costs = [next(iter(row["cost"].values())) for row in rows]
            distances = [row["figures"][DISTANCE] for row in rows]
            out.append(
                [base, str(frames), f"{costs[0] / costs[1]:.2f}", f"{distances[1] / distances[0]:.2f}"]
            )
    return out


def main() -> None:
    reports = Reports()
    head = ["goal", "recipe", "cost, of dense", "distance", "drift", "detail", "peak memory, of dense"]
    parts = [table(head, lines(reports)), "With core's EasyCache on top:"]
    parts.append(
        table(["of", "latent frames", "times faster by FLOPs", "times the distance"], easy_cache(reports))
    )
    text = "\n\n".join(parts) + "\n"
    (HERE / "goals.md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
