"""One sampling run: where in the schedule it is, what was taken and declined, and what is said at its end."""

from __future__ import annotations

import copy
import re
import threading
from collections import Counter, deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from .cache import GIB, GPU, Shelf
from .clock import SigmaClock
from .freeze import Freeze
from .layouts.layout import NO_VIDEO
from .reuse import Reuse
from .technique import NO_OPTIONS, AttentionTechnique, Technique

# What the name of a reason cannot tell.
EXPLANATIONS = {
    NO_VIDEO: "The model is told to compute sound only.",
    NO_OPTIONS: "Another node has rewritten the model so that its parts are not handed the options by name.",
}


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

    def warn_before(self, earlier: Sequence[dict[str, Any]] = ()) -> list[tuple[bool, str]]:
        """What is to be said of the plan before any step is computed, each with whether it is a warning.

        earlier: records of the MODEL's runs before. Samplers that take a schedule in pieces begin a run with each, and a
        technique has its say in some of them only: that is news only where it had none in all.
        """
        if not self.clock.steps:
            return []
        before = pieces_before(self.clock.sigmas[0], earlier)
        goes_on = not self.clock.is_rising and self.clock.sigmas[-1] > 0
        lines = []
        for technique in self.plan:
            warning = technique.warn_about(self.clock)
            if warning is None:
                continue
            has_acted = any(record["techniques"].get(technique.name, {}).get("steps") for record in before)
            if goes_on or has_acted:
                lines.append(
                    (False, f"{warning} This run is a piece of a schedule, with a rhythm of its own.")
                )
            else:
                lines.append((True, warning))
        return lines

    def record(self) -> dict[str, Any]:
        """The run in numbers and names, without tensors."""
        with self._lock:
            share = self._computed_pairs / self._dense_pairs if self._dense_pairs else 1.0
            return {
                "steps": self.clock.steps,
                "sigmas": self.clock.sigmas[:1] + self.clock.sigmas[-1:],
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


def pieces_before(sigma: float, earlier: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The runs right before that lead, one ending where the next begins, to a run that begins at `sigma`."""
    pieces = []
    for record in reversed(earlier):
        if len(record["sigmas"]) < 2 or abs(record["sigmas"][1] - sigma) > 1e-5 * sigma or sigma <= 0:
            break
        pieces.append(record)
        sigma = record["sigmas"][0]
    return pieces


def summarise(
    record: dict[str, Any],
    suspects: Sequence[str] = (),
    earlier: Sequence[dict[str, Any]] = (),
    advice: Mapping[str, str] = MappingProxyType({}),
) -> list[tuple[bool, str]]:
    """The closing lines of a run, each with whether it is a warning.

    `suspects` are object patches of other packs that may have kept us from the attention calls; `earlier` the records
    of runs before; `advice`, by technique, is for those that no run has needed.
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
            line = f"{head}not needed here ({declined}); the result is stock."
            has_acted = any(old["techniques"].get(name, {}).get("taken") for old in earlier)
            lines.append((False, line if has_acted else f"{line} {advice.get(name, '')}".rstrip()))
        elif declined:
            # A range without steps was warned about before the run.
            is_news = bool(entry["steps"])
            explained = "".join(
                f" {EXPLANATIONS[reason]}" for reason in entry["declined"] if reason in EXPLANATIONS
            )
            lines.append((is_news, f"{head}no effect, declined: {declined}; the result is stock.{explained}"))
        elif record["forwards"]:
            lines.append(
                (True, f"{head}no effect, its attention calls were never reached.{_cause(suspects)}")
            )
        else:
            lines.append((True, f"{head}no effect, the model was never called."))
    return lines


def _cause(suspects: Sequence[str]) -> str:
    """Which patches of other packs may be why, alike ones as one, and what to use instead."""
    places = Counter(re.sub(r"\.\d+\.", ".*.", name) for name in suspects if "attn" in name)
    if not places:
        return (
            " Another node has rewritten the model so that it calls attention without telling ComfyUI; leave that node out, "
            "or this one."
        )
    named = ", ".join(f"{place} (×{count})" if count > 1 else place for place, count in places.items())
    return (
        f" Another node has put a function of its own at {named}, which calls an attention kernel past ComfyUI. Use one "
        "that chooses the kernel through ComfyUI instead, such as KJNodes' Patch Sage Attention KJ, or start ComfyUI with "
        "--use-sage-attention."
    )


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
