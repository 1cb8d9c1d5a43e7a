"""Puts a technique on a MODEL, and takes it off."""

from __future__ import annotations

import logging
from collections.abc import Collection
from typing import Any

from comfy.patcher_extension import WrappersMP

from .journal import JOURNAL, Journal, journal_of
from .plan import PLAN, Plan, in_order, plan_in, without
from .technique import Technique
from .wrappers import WRAPPERS

__all__ = ["journal_of", "mount", "plan_of", "unmount"]

KEY = "frame_thrift"

logger = logging.getLogger(__name__)


def mount(model: Any, technique: Technique) -> Any:
    """A clone of `model` (ModelPatcher) whose plan holds `technique` instead of any earlier one of its name.

    A neutral technique removes the entry; without an entry to remove, `model` itself comes back.
    """
    plan = plan_of(model)
    rest = without(plan, technique.name)
    if technique.is_neutral:
        logger.warning("FrameThrift: %s is not mounted: %s.", technique.name, technique.neutral_because)
        if len(rest) == len(plan):
            return model
    else:
        rest = (*rest, technique)
    clone = model.clone()
    _set_plan(clone, in_order(rest))
    return clone


def unmount(model: Any, names: Collection[str]) -> Any:
    """A clone of `model` without these techniques; without any of them, `model` itself."""
    plan = plan_of(model)
    rest = tuple(technique for technique in plan if technique.name not in names)
    if len(rest) == len(plan):
        return model
    clone = model.clone()
    _set_plan(clone, rest)
    return clone


def plan_of(model: Any) -> Plan:
    """The techniques mounted on `model`, in the order of their stages."""
    return plan_in(model.model_options.get("transformer_options", {}))


def _set_plan(model: Any, plan: Plan) -> None:
    options = model.model_options.setdefault("transformer_options", {})
    for kind in WRAPPERS:
        model.remove_wrappers_with_key(kind, KEY)
    if not plan:
        options.pop(PLAN, None)
        return
    for kind, wrapper in WRAPPERS.items():
        model.add_wrapper_with_key(kind, KEY, wrapper)
    # Others sample a schedule in pieces: around ours these would be runs of their own, inside ours they are one.
    runs = model.wrappers[WrappersMP.OUTER_SAMPLE]
    model.wrappers[WrappersMP.OUTER_SAMPLE] = {KEY: runs.pop(KEY), **runs}
    options[PLAN] = plan
    if journal_of(model) is None:
        model.set_attachments(JOURNAL, Journal())
