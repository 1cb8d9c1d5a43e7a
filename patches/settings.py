"""What a user may set: one table a technique, from which come the form of its node and the check of what it is given."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

SETTING = "setting"


@dataclass(frozen=True)
class Whole:
    """Whole numbers from `low` to `high` in steps of `step`."""

    default: int
    low: int
    high: int
    step: int = 1

    def complaint(self, value: Any) -> str | None:
        """What it takes, if `value` is nothing of it."""
        if type(value) is int and value in range(self.low, self.high + 1, self.step):
            return None
        steps = f" in steps of {self.step}" if self.step > 1 else ""
        return f"whole numbers from {self.low} to {self.high}{steps}"


@dataclass(frozen=True)
class Number:
    """Numbers from `low` to `high`, in a form in steps of `step`."""

    default: float
    low: float
    high: float
    step: float

    def complaint(self, value: Any) -> str | None:
        if isinstance(value, (int, float)) and self.low <= value <= self.high:
            return None
        return f"numbers from {self.low:g} to {self.high:g}"


@dataclass(frozen=True)
class Choice:
    """One of `options`."""

    default: str
    options: tuple[str, ...]

    def complaint(self, value: Any) -> str | None:
        return None if value in self.options else f"one of {', '.join(self.options)}"


Setting = Whole | Number | Choice


def setting(kind: Setting) -> Any:
    """A field of a dataclass that the user sets."""
    return field(default=kind.default, metadata={SETTING: kind})


def settings_of(kind: Any) -> Mapping[str, Setting]:
    """The settings of a dataclass, by name."""
    return {each.name: each.metadata[SETTING] for each in fields(kind) if SETTING in each.metadata}


def check(given: Any) -> None:
    """Raises ValueError, naming the setting, for a value of the dataclass `given` that is none of its settings'."""
    for name, kind in settings_of(given).items():
        takes = kind.complaint(getattr(given, name))
        if takes is not None:
            raise ValueError(f"{name} is {getattr(given, name)!r}; it takes {takes}.")
