"""The plan on a MODEL: its techniques, frozen, in the order of their stages."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from .technique import Technique

PLAN = "frame_thrift_plan"

Plan = tuple[Technique, ...]


def plan_in(options: Mapping[str, Any]) -> Plan:
    """The plan in transformer_options."""
    plan: Plan = options.get(PLAN, ())
    return plan


def in_order(techniques: Iterable[Technique]) -> Plan:
    return tuple(sorted(techniques, key=lambda technique: technique.stage))


def without(plan: Plan, name: str) -> Plan:
    return tuple(technique for technique in plan if technique.name != name)
