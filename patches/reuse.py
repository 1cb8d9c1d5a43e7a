"""What one run keeps from full steps for later ones, and which forward may use it."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Hashable
from dataclasses import dataclass, field

import torch

from .cache import Kept, Shelf
from .clock import SigmaClock
from .kernels.half import saturated

OUTSIDE_RANGE = "OUTSIDE_RANGE"
FULL_STEP = "FULL_STEP"
LAST_STEP = "LAST_STEP"
NO_SCHEDULE = "NO_SCHEDULE"
WINDOW_MOVED = "WINDOW_MOVED"
SIGMA_ROSE = "SIGMA_ROSE"
SIGMA_FELL = "SIGMA_FELL"
CACHE_FULL = "CACHE_FULL"
OUT_OF_MEMORY = "OUT_OF_MEMORY"
NOT_REACHED = "NOT_REACHED"
ATTENTION_EXCHANGED = "ATTENTION_EXCHANGED"

Place = tuple[int, str]


@dataclass(frozen=True)
class Subject:
    """What a forward computes, as far as another forward's results may stand in for it.

    conds: everything that has to be the same: ids of the conds, shapes, and by what a guider tells one pass over the same
    conds from another. window: the frames of a context window, None without.
    """

    conds: Hashable
    window: tuple[int, ...] | None
    device: torch.device


@dataclass
class Held:
    """The newest full value of one place, and the one before it where a forecast asks for two."""

    newest: Kept
    sigma: float
    older: Kept | None = None
    older_sigma: float = 0.0

    def kept(self) -> list[Kept]:
        return [self.newest] if self.older is None else [self.newest, self.older]

    def at(self, sigma: float) -> torch.Tensor:
        """The value to expect at `sigma`; not to be written to."""
        newest = self.newest.tensor()
        if self.older is None:
            return newest
        # Never further than the two values lie apart: beyond that the line leads anywhere.
        ahead = min((sigma - self.sigma) / (self.sigma - self.older_sigma), 1.0)
        return saturated(torch.lerp(self.older.tensor(), newest, 1 + ahead))


@dataclass
class Slot:
    """What is kept for one subject. step: that of the last full forward, -1 for none; sigma, turn: when it was last seen.

    let_go: how many others had been let go by then.
    """

    step: int = -1
    sigma: float = float("inf")
    turn: int = 0
    let_go: int = 0
    held: dict[Place, Held] = field(default_factory=dict)


@dataclass(frozen=True)
class Rhythm:
    """When what is kept may be used. within: the steps that may; frozen: those of them that do if every step runs.

    refresh_every: a value is used in so many steps less one. has_forecast: two values are kept instead of one.
    places_a_block: tensors that one block keeps.
    """

    within: tuple[int, ...]
    frozen: tuple[int, ...]
    refresh_every: int
    has_forecast: bool
    places_a_block: int


class Reuse:
    """Kept values of one run. Forwards of several devices may come at the same time; each has its own subjects."""

    def __init__(self, rhythm: Rhythm, clock: SigmaClock, shelf: Shelf) -> None:
        self.rhythm, self.clock, self.shelf = rhythm, clock, shelf
        self._slots: dict[tuple[Subject, int], Slot] = {}
        self._seen: Counter[Subject] = Counter()
        self._evaluation: float = -1
        self._turn = self._let_go = 0
        self._is_given_up = False
        self.exchanged_blocks: set[int] = set()
        self._lock = threading.Lock()

    def begin(self, subject: Subject, sigma: float, evaluation: int) -> Moment:
        """What the coming forward may do. evaluation: how many times the sampler has called for noise so far."""
        if not self.clock.steps:
            return Moment(self, Slot(), sigma, -1, NO_SCHEDULE, False)
        step = self.clock.step_at(sigma)
        with self._lock:
            # By sigma where a guider keeps the sampler's evaluations from being counted.
            if (evaluation or sigma) != self._evaluation:
                self._evaluation = evaluation or sigma
                self._turn += 1
                self._seen.clear()
                for useless in [key for key, slot in self._slots.items() if not self._may_serve(slot, step)]:
                    self._drop(useless)
            key = subject, self._seen[subject]
            self._seen[subject] += 1
            if self._is_given_up:
                for given_up in [key for key in self._slots if key[0].device == subject.device]:
                    self._drop(given_up)
                return Moment(self, Slot(), sigma, step, OUT_OF_MEMORY, False)
            reason = self._reason(key, step, sigma)
            is_stored = reason is not None and self._is_worth_storing(step)
            slot = self._slots.get(key, Slot())
            slot.turn, slot.let_go = self._turn, self._let_go
            if is_stored:
                self._slots[key] = slot
            elif reason is not None and not any(later > step for later in self.rhythm.frozen):
                self._drop(key)
        return Moment(self, slot, sigma, step, reason, is_stored)

    def keep(self, value: torch.Tensor, is_exact: bool) -> Kept | None:
        """A copy of `value`, for which passes that the sampler has left out make room, longest unseen first."""
        while (kept := self.shelf.keep(value, is_exact)) is None:
            with self._lock:
                unseen = self._left_out()
                if not unseen:
                    return None
                self._drop(min(unseen, key=lambda key: self._slots[key].turn))
        return kept

    def _left_out(self) -> list[tuple[Subject, int]]:
        """Passes that did not come in the last evaluation, nor in this one so far, and have kept something."""
        return [key for key, slot in self._slots.items() if slot.held and slot.turn < self._turn - 1]

    def make_ready(self, step: int, piece: int) -> None:
        """After a forward of `step`: prepare a part of the room that the coming steps will need, in such pieces."""
        first = self._first_stored
        if piece and 0 <= step < first:
            self.shelf.make_ready((step + 1) / first, piece)

    @property
    def is_in_use(self) -> bool:
        """Whether anything was kept, and more may be."""
        return not self._is_given_up and self.shelf.most.total() > 0

    def give_up(self, device: torch.device) -> None:
        """Memory ran out there: let go of everything, and keep nothing more in this run.

        What forwards of other devices are using goes with their next one.
        """
        with self._lock:
            self._is_given_up = True
            for key in [key for key in self._slots if key[0].device == device]:
                self._drop(key)

    def close(self) -> None:
        try:
            with self._lock:
                for key in list(self._slots):
                    self._drop(key)
        finally:
            self.shelf.close()

    def drop(self, slot: Slot) -> None:
        """Forget what a forward that did not come to its end may have left half written."""
        with self._lock:
            for key in [key for key, other in self._slots.items() if other is slot]:
                self._drop(key)

    def release(self, held: Held) -> None:
        for kept in held.kept():
            self.shelf.release(kept)

    def _reason(self, key: tuple[Subject, int], step: int, sigma: float) -> str | None:
        """Why the forward is computed in full, or None."""
        slot = self._slots.get(key)
        if slot is not None and self.clock.is_earlier(sigma, slot.sigma):
            self._drop(key)
            return SIGMA_FELL if self.clock.is_rising else SIGMA_ROSE
        if slot is not None:
            slot.sigma = sigma
        if step not in self.rhythm.within:
            return OUTSIDE_RANGE
        if step == self.clock.steps - 1:
            return LAST_STEP
        if slot is None:
            return WINDOW_MOVED if self._has_moved(key) else FULL_STEP
        if not slot.held and (self._left_out() or slot.let_go != self._let_go):
            # It found no room, and there is some now.
            return FULL_STEP
        is_fresh = slot.step >= self.rhythm.within[0] and 0 < step - slot.step < self.rhythm.refresh_every
        return None if is_fresh else FULL_STEP

    def _may_serve(self, slot: Slot, step: int) -> bool:
        """Whether what is kept can still be reused, or be one end of the line that a forecast follows.

        Passes may be left out for some evaluations and come back.
        """
        reach = self.rhythm.refresh_every * (2 if self.rhythm.has_forecast else 1)
        return slot.step < 0 or abs(step - slot.step) <= reach

    def _has_moved(self, key: tuple[Subject, int]) -> bool:
        """Whether the same conds were there with another window; what that left is let go."""
        subject, nth = key
        if subject.window is None:
            return False
        gone = [
            (other, n)
            for (other, n), slot in self._slots.items()
            if other.conds == subject.conds and n == nth and slot.turn < self._turn
        ]
        for old in gone:
            self._drop(old)
        return bool(gone)

    def _is_worth_storing(self, step: int) -> bool:
        return step >= self._first_stored and any(later > step for later in self.rhythm.frozen)

    @property
    def _first_stored(self) -> int:
        """The first step that is worth keeping: a forecast may begin with the one before the range."""
        return self.rhythm.within[0] - (1 if self.rhythm.has_forecast else 0) if self.rhythm.frozen else -1

    def _drop(self, key: tuple[Subject, int]) -> None:
        slot = self._slots.pop(key, None)
        self._let_go += 1
        try:
            for held in slot.held.values() if slot else ():
                self.release(held)
        finally:
            # Whoever still has the slot, as the traceback of an error does, shall not keep its tensors alive.
            if slot is not None:
                slot.held.clear()


@dataclass
class Moment:
    """One forward: frozen (`reason` is None), or full, and then perhaps one to keep from.

    piece: bytes of one kept value. obstacle: why a frozen forward had to compute something, if not for want of room.
    backend: ComfyUI's attention functions when the forward began.
    """

    reuse: Reuse
    slot: Slot
    sigma: float
    step: int
    reason: str | None
    is_stored: bool
    reused: int = 0
    computed: int = 0
    stored: int = 0
    refused: int = 0
    piece: int = 0
    obstacle: str = CACHE_FULL
    backend: object = None
    exchanged: int = 0

    @property
    def is_frozen(self) -> bool:
        return self.reason is None

    def is_exchanged(self, block: int, backend: object) -> bool:
        """Whether somebody exchanges attention in this block, to perturb it: nothing is reused or kept there, in any pass.

        Who does so counts the calls, and a call that we leave out would be another one's perturbation. Passes over the same
        conds are subtracted from each other: what is fresh in one is fresh in all, so that only the perturbation is left.
        """
        if backend != self.backend:
            self.reuse.exchanged_blocks.add(block)
        is_exchanged = block in self.reuse.exchanged_blocks
        self.exchanged += is_exchanged
        return is_exchanged

    def expect(self, like: torch.Tensor) -> None:
        """What is to be kept will be such tensors."""
        self.piece = self.reuse.shelf.size_of(like)

    def has(self, place: Place, like: torch.Tensor | None = None) -> bool:
        """Whether this forward may reuse what was kept for `place`, and it is such a tensor as `like`."""
        if like is not None:
            self.expect(like)
        held = self.slot.held.get(place) if self.is_frozen else None
        if held is None:
            return False
        return like is None or held.newest.fits(like)

    def value(self, place: Place) -> torch.Tensor:
        """What was kept for `place`, or its forecast; not to be written to."""
        value = self.slot.held[place].at(self.sigma)
        self._fetch_next(place)
        self.reused += 1
        return value

    def store(self, place: Place, value: torch.Tensor, is_exact: bool = False) -> None:
        """Keep a copy of a full value of this forward. is_exact: whatever precision the cache has."""
        held = self.slot.held.get(place)
        if held is not None and not held.newest.fits(value):
            self.reuse.release(self.slot.held.pop(place))
            held = None
        if held is None:
            kept = self.reuse.keep(value, is_exact)
            if kept is not None:
                self.slot.held[place] = Held(kept, self.sigma)
        elif not self.reuse.rhythm.has_forecast or self.slot.step == self.step:
            # Samplers may evaluate a step more than once, at sigmas too near for a line through both.
            held.newest.overwrite(value)
            held.sigma = self.sigma
            kept = held.newest
        else:
            kept = held.older
            if kept is None:
                kept = self.reuse.keep(value, is_exact)
            else:
                kept.overwrite(value)
            if kept is not None:
                held.older, held.older_sigma = held.newest, held.sigma
                held.newest, held.sigma = kept, self.sigma
            else:
                # No room for a second one: hold.
                held.newest.overwrite(value)
                held.sigma = self.sigma
        self.stored += 1
        self.refused += kept is None

    def finish(self) -> list[str | None]:
        """Close a forward that came to its end: its outcomes, None for frozen."""
        self.reuse.make_ready(self.step, self.piece)
        if not self.reused + self.computed:
            return [NOT_REACHED]
        if not self.is_frozen:
            if self.stored:
                self.slot.step, self.slot.sigma = self.step, self.sigma
            return [self.reason, *([CACHE_FULL] if self.refused else [])]
        if not self.reused:
            return [ATTENTION_EXCHANGED if self.exchanged else self.obstacle]
        return [None, *([ATTENTION_EXCHANGED] if self.exchanged else [])]

    def _fetch_next(self, place: Place) -> None:
        """Start the way back of what the next block needs."""
        places = list(self.slot.held)
        after = places.index(place) + 1
        for following in places[after : after + self.reuse.rhythm.places_a_block]:
            for kept in self.slot.held[following].kept():
                kept.fetch()
