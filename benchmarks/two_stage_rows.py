"""The whole two-stage runs that are compared. A new one is one line in ROWS. No ComfyUI import."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from typing import Any

from rows import pooled, routed, window

from tiny_ltx.model import REFINER_SIGMAS

REFINER, TEACHER, PESSIMIST = "refiner", "teacher", "pessimist"
USUAL, HARD, SHORT = 17, 16, 9
STANDARD = "ltx-2"
# A round of the DFR kind makes four steps at full length: the standard three with the first one halved.
ROUND = (0.909375, 0.8171875, 0.725, 0.421875, 0.0)


@dataclass(frozen=True)
class Row:
    """One setting of the whole run.

    schedule: whose dense run it is held against. sigmas: of the second stage, none where pictures are only made larger.
    first, second: strides of both stages against the full rate. is_guided: frames in between follow the first stage's.
    again: sigmas of a second pass at full length, behind the in-betweening. nodes: (node id, inputs) of the second stage.
    has_other_noise: the second stage's. first_steps: of the first stage, none means its own schedule. bases: models of the second stage; lengths: in latent frames.
    """

    name: str
    kind: str
    schedule: str = STANDARD
    sigmas: tuple[float, ...] = REFINER_SIGMAS[STANDARD]
    first: int = 1
    second: int = 1
    is_guided: bool = True
    again: tuple[float, ...] = ()
    nodes: tuple[tuple[str, dict[str, Any]], ...] = ()
    has_other_noise: bool = False
    first_steps: int | None = None
    bases: tuple[str, ...] = (REFINER,)
    lengths: tuple[int, ...] = (USUAL,)

    @property
    def definition(self) -> dict[str, Any]:
        """What has to be the same for a measured row to be kept, as JSON has it."""
        out = asdict(self)
        del out["bases"], out["lengths"]
        if self.first_steps is None:
            del out["first_steps"]
        return json.loads(json.dumps(out))

    @property
    def is_dense(self) -> bool:
        return self.kind == "dense"


def at(schedule: str) -> str:
    """How names tell of a second stage that begins elsewhere than the standard one."""
    return "" if schedule == STANDARD else f" from σ {REFINER_SIGMAS[schedule][0]:g}"


def dense(schedule: str, **more: Any) -> Row:
    return Row(f"dense{at(schedule)}", "dense", schedule, REFINER_SIGMAS[schedule], **more)


def ceiling(schedule: str, **more: Any) -> Row:
    sigmas = REFINER_SIGMAS[schedule]
    return Row(
        f"dense{at(schedule)}, another seed", "ceiling", schedule, sigmas, has_other_noise=True, **more
    )


def ours(stride: int, schedule: str = STANDARD, first: int = 1, **more: Any) -> Row:
    name = f"stride {stride}{at(schedule)}" + (f", first stage at {first}" if first > 1 else "")
    return Row(name, "ours", schedule, REFINER_SIGMAS[schedule], first, stride, **more)


def blind(stride: int) -> Row:
    return Row(f"stride {stride}, blind", "blind", second=stride, is_guided=False)


def both(stride: int, **more: Any) -> Row:
    """No stage sees the full rate, so that no frame shows what happens in between."""
    name = f"both stages at stride {stride}, blind"
    return Row(name, "blind", first=stride, second=stride, is_guided=False, **more)


def fewer(sigmas: tuple[float, ...], row: Row | None = None, first: int | None = None, **more: Any) -> Row:
    """The second stage in so many steps, and the first one too where `first` is given; of `row` where that is."""
    steps = len(sigmas) - 1
    name = f"{steps} step{'s' * (steps > 1)} from σ {sigmas[0]:g}"
    if first is not None:
        name = f"{first} + {name}"
    if row is not None:
        return replace(row, name=f"{row.name}, {name}", kind="fewer steps + ours", sigmas=sigmas)
    return Row(name, "fewer steps", sigmas=sigmas, first_steps=first, **more)


def under(nodes: tuple[tuple[str, dict[str, Any]], ...], name: str, stride: int = 1) -> Row:
    """The second stage behind nodes that thin its attention."""
    name += f", stride {stride}" if stride > 1 else ""
    return Row(name, "attention" if stride == 1 else "attention + ours", second=stride, nodes=nodes)


def handed_over(stride: int, first: int = 1) -> Row:
    """The last step of the second stage at full length, on frames filled in before it."""
    name = f"stride {stride}, last step at full length" + (f", first stage at {first}" if first > 1 else "")
    sigmas = REFINER_SIGMAS[STANDARD]
    return Row(
        name, "ours + full length", STANDARD, sigmas[:-1], first, stride, stride > first, again=sigmas[-2:]
    )


ROUTED, BY_THRESHOLD = routed(0.3), routed(threshold=1.0)
STRIDES = (2, 4, 8)
TWO_STEPS, ONE_STEP = (0.909375, 0.421875, 0.0), (0.909375, 0.0)
LENGTHS = (USUAL, SHORT)
BARE = (TEACHER, PESSIMIST)
DENSE = dense(STANDARD, bases=(REFINER, *BARE), lengths=(USUAL, HARD, SHORT))
UPSCALED = Row("upscaled only", "no second stage", sigmas=(), lengths=LENGTHS)


def held_against(schedules: Iterable[str]) -> list[Row]:
    return [
        row for name in schedules for row in (dense(name, lengths=LENGTHS), ceiling(name, lengths=LENGTHS))
    ]


OTHERS = tuple(name for name in REFINER_SIGMAS if name != STANDARD)
ROWS: tuple[Row, ...] = (
    DENSE,
    UPSCALED,
    ceiling(STANDARD, bases=(REFINER, *BARE), lengths=(USUAL, HARD, SHORT)),
    ours(2, bases=(REFINER, *BARE), lengths=(USUAL, HARD, SHORT)),
    ours(4, bases=(REFINER, *BARE), lengths=(USUAL, HARD, SHORT)),
    ours(8, bases=(REFINER, *BARE), lengths=LENGTHS),
    *(ours(stride, first=2, lengths=LENGTHS) for stride in (4, 8)),
    both(2, lengths=LENGTHS),
    both(3, lengths=(HARD,)),
    ours(3, lengths=(HARD,)),
    *(blind(stride) for stride in STRIDES),
    *(handed_over(*strides) for strides in ((2,), (4,), (2, 2), (4, 2))),
    Row("DFR-like round", "round", sigmas=(), first=2, second=2, is_guided=False, again=ROUND),
    Row("DFR-like round behind a second stage", "round", first=2, second=2, is_guided=False, again=ROUND),
    *held_against(OTHERS),
    *(
        ours(stride, name, first)
        for name in OTHERS
        for first in (1, 2)
        for stride in STRIDES
        if stride > first
    ),
    fewer(TWO_STEPS, lengths=(USUAL, HARD)),
    *(fewer(sigmas) for sigmas in ((0.725, 0.421875, 0.0), ONE_STEP, (0.421875, 0.0))),
    *(fewer(TWO_STEPS, row) for row in (ours(2), both(2), both(3, lengths=(HARD,)))),
    *(
        fewer(sigmas, first=steps, lengths=(USUAL, HARD))
        for steps, sigmas in ((6, TWO_STEPS), (4, TWO_STEPS), (4, ONE_STEP))
    ),
    under(ROUTED.nodes, ROUTED.name),
    under(routed(0.1).nodes, routed(0.1).name),
    under(BY_THRESHOLD.nodes, BY_THRESHOLD.name),
    *(under(ROUTED.nodes, ROUTED.name, stride) for stride in (2, 4)),
    *(under(window(size, 1).nodes, window(size, 1).name) for size in (2, 4)),
    *(under(pooled(*far).nodes, pooled(*far).name) for far in ((1, 2), (2, 2), (1, 4), (1, 2, 2))),
)
