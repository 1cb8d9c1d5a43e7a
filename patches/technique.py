"""What every technique is: a frozen configuration that knows where it applies and what it costs."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch

from .kernels.tokens import VideoTokens
from .layouts.layout import Role, Site

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


@dataclass(frozen=True)
class Technique(ABC):
    """`name` is its place in the plan (one entry each), `stage` its fixed order inside an attention call."""

    name: ClassVar[str]
    stage: ClassVar[int]
    role: ClassVar[Role]

    start_percent: float
    end_percent: float

    def __post_init__(self) -> None:
        for setting in ("start_percent", "end_percent"):
            value = getattr(self, setting)
            if not isinstance(value, (int, float)) or not 0 <= value <= 1:
                raise ValueError(f"{setting} is {value!r}; it takes numbers from 0 to 1.")

    @property
    def is_neutral(self) -> bool:
        """Whether these settings ask for nothing, so that the entry is removed from the plan."""
        return self.start_percent >= self.end_percent

    @property
    def neutral_because(self) -> str:
        """What makes these settings neutral, for the log."""
        return f"start_percent {self.start_percent:g} is not below end_percent {self.end_percent:g}"

    @abstractmethod
    def describe(self) -> str:
        """The settings in a few words, for the log."""

    @abstractmethod
    def reason_to_decline(self, tokens: VideoTokens, rows: range, site: Site) -> str | None:
        """Why stock attention has to run here, or None."""

    @abstractmethod
    def attend(self, call: AttentionCall, inner: Attend) -> torch.Tensor:
        """The attention output [B, rows, C], computed by calls of `inner(q, k, v, mask)`."""

    @abstractmethod
    def cost(self, tokens: VideoTokens, rows: range) -> float:
        """Executed query-key pairs of one call with these query rows, as a share of dense attention."""
