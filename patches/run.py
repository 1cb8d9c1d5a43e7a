"""One sampling run: where in the schedule it is, what was taken and declined, and what is said at its end."""

from __future__ import annotations

import copy
import math
import threading
from collections import Counter, deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from .technique import AttentionTechnique, Technique

OUTSIDE_RANGE = "OUTSIDE_RANGE"


@dataclass(frozen=True)
class SigmaClock:
    """The schedule of a run. Positions come from sigma, so samplers may evaluate a sigma as often as they like."""

    sigmas: tuple[float, ...]
    percent_to_sigma: Callable[[float], float]

    @property
    def steps(self) -> int:
        return max(len(self.sigmas) - 1, 0)

    def is_within(self, sigma: float, start_percent: float, end_percent: float) -> bool:
        """Whether `sigma` lies in a part of the schedule given in ComfyUI's percent."""
        high = math.inf if start_percent <= 0 else self.percent_to_sigma(start_percent)
        low = -math.inf if end_percent >= 1 else self.percent_to_sigma(end_percent)
        return low * (1 - 1e-5) <= sigma <= high * (1 + 1e-5)

    def steps_within(self, start_percent: float, end_percent: float) -> list[int]:
        steps = range(self.steps)
        return [i for i in steps if self.is_within(self.sigmas[i], start_percent, end_percent)]

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

    def nearest_range(self, start_percent: float, end_percent: float) -> str:
        """The setting nearest to a range without any step that would cover one."""
        candidates = []
        for sigma in self.sigmas[: self.steps]:
            percent = self.percent(sigma)
            if percent < start_percent:
                candidates.append(
                    (start_percent - percent, f"start_percent {math.floor(percent * 100) / 100:.2f}")
                )
            else:
                candidates.append(
                    (percent - end_percent, f"end_percent {math.ceil(percent * 100) / 100:.2f}")
                )
        return min(candidates)[1] if candidates else "a schedule with steps"


@dataclass
class Tally:
    """What became of one technique in one run, in its unit (forwards where no attention call could be read)."""

    taken: int = 0
    declined: Counter[str] = field(default_factory=Counter)


class Run:
    """Everything of one sampling run that changes. Lives in transformer_options from its start to its end.

    Forwards of one run may come from several threads, one a device: counts are locked, the rest is frozen.
    """

    def __init__(self, plan: Sequence[Technique], clock: SigmaClock):
        self.plan = tuple(plan)
        self.clock = clock
        self._lock = threading.Lock()
        self._tallies = {technique.name: Tally() for technique in self.plan}
        self._evaluations = 0
        self._forwards = 0
        self._dense_pairs = 0.0
        self._computed_pairs = 0.0
        self._said: set[str] = set()

    def __deepcopy__(self, memo: dict[int, Any]) -> Run:
        return self

    def count_evaluation(self) -> None:
        with self._lock:
            self._evaluations += 1

    def count_forward(self) -> None:
        with self._lock:
            self._forwards += 1

    def count(self, technique: Technique, reason: str | None) -> None:
        """What became of one technique once: the reason why it declined, or None."""
        with self._lock:
            self._count(technique, reason)

    def count_attention(
        self, outcomes: Iterable[tuple[Technique, str | None]], pairs: float, share: float
    ) -> None:
        """One attention call: what became of each technique, its query-key pairs and the computed share."""
        with self._lock:
            for technique, reason in outcomes:
                self._count(technique, reason)
            self._dense_pairs += pairs
            self._computed_pairs += pairs * share

    def _count(self, technique: Technique, reason: str | None) -> None:
        tally = self._tallies[technique.name]
        if reason is None:
            tally.taken += 1
        else:
            tally.declined[reason] += 1

    def say_once(self, warning: str) -> bool:
        """Whether this was not said in this run before."""
        with self._lock:
            is_new = warning not in self._said
            self._said.add(warning)
            return is_new

    def warn_before(self) -> list[str]:
        """What is wrong with the plan before any step is computed."""
        warnings = []
        for technique in self.plan:
            start, end = technique.percents
            if self.clock.steps and not self.clock.steps_within(start, end):
                warnings.append(
                    f"FrameThrift: {technique.name} covers none of the {self.clock.steps} steps "
                    f"(start_percent {start:g}, end_percent {end:g}); nearest that does: "
                    f"{self.clock.nearest_range(start, end)}."
                )
        return warnings

    def record(self) -> dict[str, Any]:
        """The run in numbers and names, without tensors."""
        with self._lock:
            share = self._computed_pairs / self._dense_pairs if self._dense_pairs else 1.0
            return {
                "steps": self.clock.steps,
                "evaluations": self._evaluations,
                "forwards": self._forwards,
                "attention_share": share,
                "techniques": {
                    technique.name: {
                        "settings": technique.describe(),
                        "unit": technique.unit,
                        "steps": self.clock.steps_within(*technique.percents),
                        "taken": self._tallies[technique.name].taken,
                        "declined": dict(self._tallies[technique.name].declined),
                        "is_expected": technique.expected >= self._tallies[technique.name].declined.keys(),
                    }
                    for technique in self.plan
                },
            }


def summarise(record: dict[str, Any], suspects: Sequence[str] = ()) -> list[tuple[bool, str]]:
    """The closing lines of a run, each with whether it is a warning.

    `suspects` are object patches of other packs that may have kept us from the attention calls.
    """
    lines = []
    for name, entry in record["techniques"].items():
        head = f"FrameThrift: {name} ({entry['settings']}): {_steps(entry['steps'], record['steps'])}; "
        declined = ", ".join(f"{reason} ×{count}" for reason, count in sorted(entry["declined"].items()))
        total = sum(entry["declined"].values())
        if entry["taken"]:
            text = f"{head}{entry['taken']} {entry['unit']} taken, {total} declined{f' ({declined})' if declined else ''}"
            if entry["unit"] == AttentionTechnique.unit:
                text += f"; video self-attention work {record['attention_share']:.0%} of dense"
            lines.append((False, f"{text}."))
        elif total and entry["is_expected"]:
            lines.append((False, f"{head}not needed here ({declined}); the result is stock."))
        elif total:
            # A range without steps was warned about before the run.
            is_news = bool(entry["steps"])
            lines.append(
                (is_news, f"{head}no effect, all {total} calls declined ({declined}); the result is stock.")
            )
        elif record["forwards"]:
            cause = f" Object patches that may be why: {', '.join(suspects)}." if suspects else ""
            lines.append((True, f"{head}no effect, its attention calls were never reached.{cause}"))
        else:
            lines.append((True, f"{head}no effect, the model was never called."))
    return lines


def _steps(steps: Sequence[int], total: int) -> str:
    if not steps:
        return f"no step of {total}"
    first, last = steps[0] + 1, steps[-1] + 1
    return f"step {first} of {total}" if first == last else f"steps {first}–{last} of {total}"


class Journal:
    """Records of the last runs of a MODEL and all its clones, newest last."""

    def __init__(self, length: int = 16):
        self._lock = threading.Lock()
        self._records: deque[dict[str, Any]] = deque(maxlen=length)

    def add(self, record: dict[str, Any]) -> None:
        with self._lock:
            self._records.append(copy.deepcopy(record))

    def records(self) -> list[dict[str, Any]]:
        with self._lock:
            return copy.deepcopy(list(self._records))

    def __deepcopy__(self, memo: dict[int, Any]) -> Journal:
        return self
