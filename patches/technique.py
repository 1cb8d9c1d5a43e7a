"""What every technique is: a frozen configuration that knows where it applies and what it costs."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch

from .clock import SigmaClock
from .kernels.tokens import VideoTokens
from .layouts.layout import Layout, Role, Site
from .reuse import Moment

NO_OPTIONS = "NO_OPTIONS"

Attend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None], torch.Tensor]


@dataclass(frozen=True)
class AttentionCall:
    """One attention call as techniques see it: q [B, rows, C], k and v [B, N, C], mask [..., 1 or rows, N].

    is_foreign: another pack computes attention here. is_covered: a later technique of the plan acts, too. moment: what
    the run has kept from earlier steps, if the plan keeps anything.
    """

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    mask: torch.Tensor | None
    rows: range
    tokens: VideoTokens
    site: Site
    heads: int
    scale: float | None
    is_foreign: bool
    moment: Moment | None
    is_covered: bool = False


class Technique(ABC):
    """`name` is its place in the plan (one entry each), `stage` its fixed order among the others.

    unit: what its counts count. expected: reasons to decline that are part of its normal use and no news.
    advice_if_never_needed: what to do if it was declined for such reasons in every run so far.
    """

    name: ClassVar[str]
    stage: ClassVar[int]
    unit: ClassVar[str]
    expected: ClassVar[frozenset[str]] = frozenset()
    advice_if_never_needed: ClassVar[str] = ""

    @property
    def percents(self) -> tuple[float, float]:
        """Start and end of the part of the schedule in which it may act, in ComfyUI's percent."""
        return 0.0, 1.0

    def acting_steps(self, clock: SigmaClock) -> list[int]:
        """The steps of a schedule in which it may act."""
        return clock.steps_within(*self.percents)

    def warn_about(self, clock: SigmaClock) -> str | None:
        """What is wrong with these settings for a schedule, before any step of it is computed."""
        return None

    @property
    @abstractmethod
    def is_neutral(self) -> bool:
        """Whether these settings ask for nothing, so that the entry is removed from the plan."""

    @property
    @abstractmethod
    def neutral_because(self) -> str:
        """What makes these settings neutral, for the log."""

    @abstractmethod
    def describe(self) -> str:
        """The settings in a few words, for the log."""


@dataclass(frozen=True)
class ScheduledTechnique(Technique):
    """Acts in a part of the schedule that the user sets."""

    does: ClassVar[str] = "covers"

    start_percent: float
    end_percent: float

    def __post_init__(self) -> None:
        for setting in ("start_percent", "end_percent"):
            value = getattr(self, setting)
            if not isinstance(value, (int, float)) or not 0 <= value <= 1:
                raise ValueError(f"{setting} is {value!r}; it takes numbers from 0 to 1.")

    @property
    def percents(self) -> tuple[float, float]:
        return self.start_percent, self.end_percent

    @property
    def is_neutral(self) -> bool:
        return self.start_percent >= self.end_percent

    @property
    def neutral_because(self) -> str:
        return f"start_percent {self.start_percent:g} is not below end_percent {self.end_percent:g}"

    def warn_about(self, clock: SigmaClock) -> str | None:
        if self.acting_steps(clock):
            return None
        nearest = next(
            (
                f"nearest that does: {setting} {value:.2f}"
                for setting, value in clock.other_ranges(self.start_percent, self.end_percent)
                if replace(self, **{setting: value}).acting_steps(clock)
            ),
            "no other range would either; take more steps",
        )
        return (
            f"FrameThrift: {self.name} {self.does} none of the {clock.steps} steps (start_percent {self.start_percent:g}, "
            f"end_percent {self.end_percent:g}); {nearest}."
        )


class AttentionTechnique(ScheduledTechnique):
    """Changes what attention calls of one role compute, in a part of the schedule."""

    unit: ClassVar[str] = "attention calls"
    role: ClassVar[Role]

    @abstractmethod
    def reason_to_decline(self, call: AttentionCall) -> str | None:
        """Why stock attention has to run here, or None."""

    def observe(self, call: AttentionCall) -> None:
        """Look at a call that it has declined."""

    @abstractmethod
    def attend(self, call: AttentionCall, inner: Attend) -> torch.Tensor:
        """The attention output [B, rows, C], computed by calls of `inner(q, k, v, mask)`."""

    @abstractmethod
    def cost(self, call: AttentionCall) -> float:
        """Executed query-key pairs of this call as a share of dense attention."""


class CallTechnique(Technique):
    """Changes what one forward is told, before anything in it is computed."""

    unit: ClassVar[str] = "forwards"

    @abstractmethod
    def adapt(self, layout: Layout) -> Mapping[str, Any] | str:
        """The named arguments of the call that change, or the reason to leave it alone."""

    def warnings(self, layout: Layout) -> Iterator[str]:
        """What the user should know about this forward; each is said once a run."""
        yield from ()
