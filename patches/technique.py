"""What every technique is: a frozen configuration that knows where it applies and what it costs."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from .kernels.tokens import VideoTokens
from .layouts.layout import Layout, Role, Site

Attend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None], torch.Tensor]


@dataclass(frozen=True)
class AttentionCall:
    """One attention call as techniques see it: q [B, rows, C], k and v [B, N, C], mask [..., 1 or rows, N]."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    mask: torch.Tensor | None
    rows: range
    tokens: VideoTokens
    site: Site


class Technique(ABC):
    """`name` is its place in the plan (one entry each), `stage` its fixed order among the others.

    unit: what its counts count. expected: reasons to decline that are part of its normal use and no news.
    """

    name: ClassVar[str]
    stage: ClassVar[int]
    unit: ClassVar[str]
    expected: ClassVar[frozenset[str]] = frozenset()

    @property
    def percents(self) -> tuple[float, float]:
        """Start and end of the part of the schedule in which it may act, in ComfyUI's percent."""
        return 0.0, 1.0

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
class AttentionTechnique(Technique):
    """Changes what attention calls of one role compute, in a part of the schedule."""

    unit: ClassVar[str] = "attention calls"
    role: ClassVar[Role]

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

    @abstractmethod
    def reason_to_decline(self, tokens: VideoTokens, rows: range, site: Site) -> str | None:
        """Why stock attention has to run here, or None."""

    @abstractmethod
    def attend(self, call: AttentionCall, inner: Attend) -> torch.Tensor:
        """The attention output [B, rows, C], computed by calls of `inner(q, k, v, mask)`."""

    @abstractmethod
    def cost(self, tokens: VideoTokens, rows: range) -> float:
        """Executed query-key pairs of one call with these query rows, as a share of dense attention."""


class CallTechnique(Technique):
    """Changes what one forward is told, before anything in it is computed."""

    unit: ClassVar[str] = "forwards"

    @abstractmethod
    def adapt(self, layout: Layout) -> Mapping[str, Any] | str:
        """The named arguments of the call that change, or the reason to leave it alone."""

    def warn(self, layout: Layout) -> str | None:
        """What the user should know about this forward; said once a run."""
        return None
