"""What every technique is: a frozen configuration, and the state of one run that its hooks belong to."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch

from .call import Attend, AttentionCall, Call, Load, Room, Sampling, Step
from .clock import Schedule, SigmaClock
from .kernels.segments import Segments
from .layouts.role import Role
from .layouts.work import Work
from .settings import Setting, check, settings_of

FORWARDS, ATTENTION_CALLS, STEPS = "forwards", "attention calls", "steps"
# Reasons to decline that several have.
OUTSIDE_RANGE = "OUTSIDE_RANGE"
CHECKPOINT_ATTENTION = "CHECKPOINT_ATTENTION"
DENSE_BLOCK = "DENSE_BLOCK"
FOREIGN_OVERRIDE = "FOREIGN_OVERRIDE"
GUIDE_QUERIES = "GUIDE_QUERIES"
MASKED = "MASKED"
NO_LSE = "NO_LSE"

Replacement = Callable[..., Any]


@dataclass(frozen=True)
class Technique:
    """What the user set. `name` is its place in the plan (one entry each), `stage` its fixed order among the others.

    Raises ValueError, naming the setting, for values outside their range.
    roles: the attention that it acts on. schedule: the part of the schedule in which it acts; None for all of it.
    does: what it does to the steps of that part, as a verb.
    expected: reasons to decline that are part of its normal use and no news. explained: what the names of others cannot tell. advice_if_never_needed: what to do if it was
    declined for such reasons in every run so far.
    """

    name: ClassVar[str]
    stage: ClassVar[int]
    does: ClassVar[str] = "covers"
    expected: ClassVar[frozenset[str]] = frozenset()
    explained: ClassVar[Mapping[str, str]] = {}
    advice_if_never_needed: ClassVar[str] = ""

    schedule: Schedule | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        check(self)

    @classmethod
    def settings(cls) -> Mapping[str, Setting]:
        """What the user may set, by name, with ranges and defaults."""
        given = cls.__dataclass_fields__["schedule"].default
        part = (
            {}
            if given is None
            else {n: replace(s, default=getattr(given, n)) for n, s in settings_of(Schedule).items()}
        )
        return {**settings_of(cls), **part}

    @property
    def roles(self) -> frozenset[Role]:
        return frozenset()

    @property
    def unit(self) -> str:
        """What its counts count."""
        return ATTENTION_CALLS if self.roles else FORWARDS

    @property
    def is_neutral(self) -> bool:
        """Whether these settings ask for nothing, so that the entry is removed from the plan."""
        return self.schedule is not None and self.schedule.is_empty

    @property
    def neutral_because(self) -> str:
        """What makes these settings neutral, for the log."""
        part = self.schedule
        assert part is not None
        return f"start_percent {part.start_percent:g} is not below end_percent {part.end_percent:g}"

    def is_any_use(self, frames: int) -> bool:
        """Whether it can make a clip of so many latent frames cheaper or different."""
        return True

    def describe(self) -> str:
        """The settings in a few words, for the log."""
        return ", ".join(f"{name} {getattr(self, name)}" for name in settings_of(self))

    def acting_steps(self, clock: SigmaClock) -> list[int]:
        """The steps of a schedule in which it acts."""
        return list(range(clock.steps)) if self.schedule is None else clock.steps_within(self.schedule)

    def warn_about(self, clock: SigmaClock) -> str | None:
        """What is wrong with these settings for a schedule, before any step of it is computed."""
        part = self.schedule
        if part is None or not part.is_part_of(clock.steps) or self.acting_steps(clock):
            return None
        nearest = next(
            (
                f"nearest that does: {name} {getattr(other, name):.2f}"
                for name, other in clock.other_parts(part)
                if replace(self, schedule=other).acting_steps(clock)
            ),
            "no other range would either; take more steps",
        )
        return (
            f"FrameThrift: {self.name} {self.does} none of the {clock.steps} steps (start_percent {part.start_percent:g}, "
            f"end_percent {part.end_percent:g}); {nearest}."
        )

    def cost(self, work: Work) -> Work:
        """What is left of the work of one forward in which it acts."""
        return work

    def words_for(self, part: Mapping[str, Any]) -> str:
        """What `State.record` gave, in words for the closing line of a run."""
        return ""

    def has_failed(self, part: Mapping[str, Any]) -> bool:
        """Whether what `State.record` gave makes the closing line a warning."""
        return False

    def begin(self, run: Sampling) -> State:
        """Its state for one run."""
        return State(self, run)


class State:
    """A technique in one run. What it does is which of these hooks it overrides; each of them does nothing.

    Hooks of one State may run on several threads, one a device: what belongs to one forward lies on the call
    (`call[self] = …`), never on the State.
    """

    def __init__(self, technique: Any, run: Sampling) -> None:
        self.technique, self.run = technique, run

    def __deepcopy__(self, memo: dict[int, Any]) -> State:
        return self

    def wants(self, load: Load) -> int:
        """Bytes to ask for beside the model, before it is loaded."""
        return 0

    def granted(self, room: Room) -> None:
        """After the model is loaded: what there is."""

    def step(self, step: Step) -> None:
        """Before an evaluation by the sampler, whether or not the model is called for it."""

    def stepped(self, step: Step) -> None:
        """After it, unless it ended with an error."""

    def call(self, call: Call) -> Mapping[str, Any] | str:
        """Before a forward: its named arguments that change, which counts as taken, or the reason to decline all of it.

        Without changed arguments other hooks have their say.
        """
        schedule = self.technique.schedule
        return {} if schedule is None or call.is_within(schedule) else OUTSIDE_RANGE

    def forward(self, call: Call) -> Mapping[str, Any]:
        """Options of the diffusion model that change, after ComfyUI's own last changes."""
        return {}

    def modules(self, call: Call) -> Iterable[tuple[torch.nn.Module, Replacement]]:
        """Modules to shadow during this forward, each with `replacement(original, *args, **kwargs)`."""
        return ()

    def see(self, segments: Segments, attention: AttentionCall) -> Segments | str:
        """Who sees whom: `segments`, as the stage before left them, changed; or the reason to decline."""
        return segments

    def attend(self, attention: AttentionCall, inner: Attend) -> torch.Tensor | str:
        """The attention output [B, rows, C], around the executor of all segments; or the reason to decline."""
        return inner(attention)

    def backend(self, attention: AttentionCall, inner: Attend) -> torch.Tensor | str:
        """The output of one segment's attention [B, n, C]; or the reason to decline. Key positions are no longer known."""
        return inner(attention)

    def called(self, call: Call, error: BaseException | None) -> Iterable[str | None]:
        """After a forward: outcomes to count, each the reason to decline or None. On an error: let go; nothing is counted."""
        return [None] if call.has_shadowed(self) else []

    def relieve(self, call: Call) -> bool:
        """Memory ran out in a forward (`call.error`): let go of what can be, and tell whether that was anything."""
        return False

    def record(self) -> Mapping[str, Any]:
        """Its own part of the record of the run: numbers and names."""
        return {}

    def close(self) -> None:
        """The run is over: let every tensor go."""


def overrides(state: State, hook: str) -> bool:
    return getattr(type(state), hook) is not getattr(State, hook)
