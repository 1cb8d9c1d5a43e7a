"""Where in the schedule a forward is."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from .settings import Number, check, setting


@dataclass(frozen=True)
class Schedule:
    """A part of the schedule in ComfyUI's percent. Raises ValueError, naming the setting, for values outside 0 to 1."""

    start_percent: float = setting(Number(0.0, 0.0, 1.0, 0.01))
    end_percent: float = setting(Number(1.0, 0.0, 1.0, 0.01))

    def __post_init__(self) -> None:
        check(self)

    @property
    def is_empty(self) -> bool:
        return self.start_percent >= self.end_percent

    def is_part_of(self, steps: int) -> bool:
        """Whether a schedule of so many steps has such a part."""
        return True


@dataclass(frozen=True)
class LongSchedule(Schedule):
    """A part that schedules of fewer than `least_steps` do not have."""

    least_steps: int = 0

    def is_part_of(self, steps: int) -> bool:
        return steps >= self.least_steps


@dataclass(frozen=True)
class SigmaClock:
    """The schedule of a run. Positions come from sigma, so samplers may evaluate a sigma as often as they like."""

    sigmas: tuple[float, ...]
    percent_to_sigma: Callable[[float], float]

    @property
    def steps(self) -> int:
        return max(len(self.sigmas) - 1, 0)

    @property
    def is_rising(self) -> bool:
        """Whether the schedule goes from clean to noise, as inversion samplers do."""
        return self.steps > 0 and self.sigmas[-1] > self.sigmas[0]

    def is_earlier(self, sigma: float, other: float) -> bool:
        """Whether `sigma` comes before `other` in such a schedule."""
        return sigma * (1 + 1e-5) < other if self.is_rising else sigma > other * (1 + 1e-5)

    def step_at(self, sigma: float) -> int:
        """The step that `sigma` belongs to: its own, or that during which a sampler evaluates between two."""
        reached = [i for i in range(self.steps) if not self.is_earlier(sigma, self.sigmas[i])]
        return max(reached, default=0)

    def is_within(self, sigma: float, part: Schedule) -> bool:
        if not part.is_part_of(self.steps):
            return False
        high = math.inf if part.start_percent <= 0 else self.percent_to_sigma(part.start_percent)
        low = -math.inf if part.end_percent >= 1 else self.percent_to_sigma(part.end_percent)
        return low * (1 - 1e-5) <= sigma <= high * (1 + 1e-5)

    def steps_within(self, part: Schedule) -> list[int]:
        return [i for i in range(self.steps) if self.is_within(self.sigmas[i], part)]

    def percent(self, sigma: float) -> float:
        """The percent at which the schedule passes `sigma`; percent_to_sigma falls, so bisection finds it."""
        low, high = 0.0, 1.0
        for _ in range(40):
            middle = (low + high) / 2
            if self.percent_to_sigma(middle) > sigma:
                low = middle
            else:
                high = middle
        return high

    def other_parts(self, part: Schedule) -> Iterator[tuple[str, Schedule]]:
        """(changed setting, part) in which an end of `part` is moved onto a step, nearest first."""
        candidates = []
        for sigma in self.sigmas[: self.steps]:
            percent = self.percent(sigma)
            if percent < part.start_percent:
                value = math.floor(percent * 100) / 100
                candidates.append((part.start_percent - percent, "start_percent", value))
            elif percent > part.end_percent:
                candidates.append((percent - part.end_percent, "end_percent", math.ceil(percent * 100) / 100))
        for _, name, value in sorted(candidates):
            moved: dict[str, Any] = {name: value}
            yield name, replace(part, **moved)
