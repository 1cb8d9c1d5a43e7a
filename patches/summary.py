"""What is said of a run before it begins and at its end: sentences, from its plan and its record."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

from .clock import SigmaClock
from .journal import Record, pieces_before
from .layouts.layout import NO_OPTIONS, NO_VIDEO
from .layouts.role import Role
from .technique import Technique

# What the name of a reason cannot tell.
EXPLANATIONS = {
    NO_VIDEO: "The model is told to compute sound only.",
    NO_OPTIONS: "Another node has rewritten the model so that its parts are not handed the options by name.",
}


def announce(
    plan: Sequence[Technique], clock: SigmaClock, earlier: Sequence[Record] = ()
) -> list[tuple[bool, str]]:
    """What is to be said of the plan before any step is computed, each with whether it is a warning.

    earlier: records of the MODEL's runs before. Samplers that take a schedule in pieces begin a run with each, and a
    technique has its say in some of them only: that is news only where it had none in all.
    """
    if not clock.steps:
        return []
    before = pieces_before(clock.sigmas[0], earlier)
    goes_on = not clock.is_rising and clock.sigmas[-1] > 0
    lines = []
    for technique in plan:
        warning = technique.warn_about(clock)
        if warning is None:
            continue
        has_acted = any(record["techniques"].get(technique.name, {}).get("steps") for record in before)
        if goes_on or has_acted:
            lines.append((False, f"{warning} This run is a piece of a schedule, with a rhythm of its own."))
        else:
            lines.append((True, warning))
    return lines


def summarise(
    record: Record, plan: Sequence[Technique], suspects: Sequence[str] = (), earlier: Sequence[Record] = ()
) -> list[tuple[bool, str]]:
    """The closing lines of a run, each with whether it is a warning.

    suspects: object patches of other packs that may have kept us from the attention calls. earlier: the records of runs
    before.
    """
    lines = []
    for technique in plan:
        entry = record["techniques"][technique.name]
        head = f"FrameThrift: {technique.name} ({entry['described']}): {_steps(entry['steps'], record['steps'])}; "
        declined = ", ".join(f"{reason} ×{count}" for reason, count in sorted(entry["declined"].items()))
        if entry["taken"]:
            text = f"{head}{entry['taken']} {entry['unit']} taken, declined: {declined or 'none'}"
            if Role.VIDEO_SELF in technique.roles:
                text += f"; video self-attention work {record['attention_share']:.0%} of dense"
            lines.append((technique.has_failed(entry), f"{text}{technique.words_for(entry)}."))
        elif not entry["is_reached"] and record["forwards"]:
            lines.append(
                (True, f"{head}no effect, its attention calls were never reached.{_cause(suspects)}")
            )
        elif declined and entry["is_expected"]:
            line = f"{head}not needed here ({declined}); the result is stock."
            has_acted = any(old["techniques"].get(technique.name, {}).get("taken") for old in earlier)
            lines.append(
                (False, line if has_acted else f"{line} {technique.advice_if_never_needed}".rstrip())
            )
        elif declined:
            # A range without steps was warned about before the run.
            is_news = bool(entry["steps"])
            explanations = {**EXPLANATIONS, **technique.explained}
            explained = "".join(
                f" {explanations[reason]}" for reason in entry["declined"] if reason in explanations
            )
            lines.append((is_news, f"{head}no effect, declined: {declined}; the result is stock.{explained}"))
        elif not record["forwards"]:
            lines.append((True, f"{head}no effect, the model was never called."))
        else:
            lines.append((False, f"{head}it counts nothing."))
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
