"""One sampling run: where in the schedule it is, what was taken and declined, and what is said at its end."""

from __future__ import annotations

import copy
import threading
from collections import Counter, deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from .cache import GIB, GPU, Shelf
from .clock import SigmaClock
from .freeze import Freeze
from .reuse import Reuse
from .technique import AttentionTechnique, Technique


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
        self.has_guidance = True
        self._lock = threading.Lock()
        self._tallies = {technique.name: Tally() for technique in self.plan}
        self._evaluations = 0
        self._forwards = 0
        self._dense_pairs = 0.0
        self._computed_pairs = 0.0
        self._said: set[str] = set()
        self.freeze = next((entry for entry in self.plan if isinstance(entry, Freeze)), None)
        self.reuse: Reuse | None = None
        if self.freeze is not None:
            shelf = Shelf(
                self.freeze.cache_device, int(self.freeze.cache_limit_gb * GIB), self.freeze.cache_dtype
            )
            self.reuse = Reuse(self.freeze.rhythm(clock), clock, shelf)

    def close(self) -> None:
        """Let go of every tensor."""
        if self.reuse is not None:
            self.reuse.close()

    @property
    def evaluations(self) -> int:
        return self._evaluations

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
        return [
            warning
            for technique in self.plan
            if self.clock.steps and (warning := technique.warn_about(self.clock)) is not None
        ]

    def record(self) -> dict[str, Any]:
        """The run in numbers and names, without tensors."""
        with self._lock:
            share = self._computed_pairs / self._dense_pairs if self._dense_pairs else 1.0
            return {
                "steps": self.clock.steps,
                "evaluations": self._evaluations,
                "forwards": self._forwards,
                "attention_share": share,
                "cache_gib": {place: size / GIB for place, size in self.reuse.shelf.most.items()}
                if self.reuse is not None
                else {},
                "techniques": {
                    technique.name: {
                        "settings": technique.describe(),
                        "unit": technique.unit,
                        "steps": technique.acting_steps(self.clock),
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
        if entry["taken"]:
            text = f"{head}{entry['taken']} {entry['unit']} taken, declined: {declined or 'none'}"
            if entry["unit"] == AttentionTechnique.unit:
                text += f"; video self-attention work {record['attention_share']:.0%} of dense"
            if name == Freeze.name:
                text += "".join(
                    f"; {size:.2g} GiB kept {'beside the model' if place == GPU else 'in host memory'}"
                    for place, size in record["cache_gib"].items()
                )
            lines.append((False, f"{text}."))
        elif declined and entry["is_expected"]:
            lines.append((False, f"{head}not needed here ({declined}); the result is stock."))
        elif declined:
            # A range without steps was warned about before the run.
            is_news = bool(entry["steps"])
            lines.append((is_news, f"{head}no effect, declined: {declined}; the result is stock."))
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
    if first == last:
        return f"step {first} of {total}"
    if len(steps) == last - first + 1:
        return f"steps {first}–{last} of {total}"
    return f"{len(steps)} of steps {first}–{last} of {total}"


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
