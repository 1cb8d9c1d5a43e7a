"""The entries of one run, and which forward may use them."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from functools import cached_property

import torch

from .entry import Entry
from .store import Store, StoredTensor

OUTSIDE_RANGE = "OUTSIDE_RANGE"
FULL_STEP = "FULL_STEP"
LAST_STEP = "LAST_STEP"
NO_SCHEDULE = "NO_SCHEDULE"
CONTEXT_MOVED = "CONTEXT_MOVED"
SIGMA_ROSE = "SIGMA_ROSE"
SIGMA_FELL = "SIGMA_FELL"
CACHE_FULL = "CACHE_FULL"
OUT_OF_MEMORY = "OUT_OF_MEMORY"
NOT_REACHED = "NOT_REACHED"
ATTENTION_EXCHANGED = "ATTENTION_EXCHANGED"

Place = tuple[int, str]


@dataclass(frozen=True)
class Key:
    """By what a forward finds the entries of an earlier one.

    conds: everything that has to be the same: ids of the conds, shapes, and by what a guider tells one pass over the same
    conds from another. context_frames: those of a context window, None without. nth: how many forwards of these conds
    came before it in the same evaluation.
    """

    conds: Hashable
    context_frames: tuple[int, ...] | None
    device: torch.device
    nth: int = 0


@dataclass
class Pass:
    """The entries of one key, by place. step: that of the last full forward, -1 for none; sigma, turn: when it was last seen.

    let_go: how many others had been let go by then.
    """

    step: int = -1
    sigma: float = float("inf")
    turn: int = 0
    let_go: int = 0
    entries: dict[Place, Entry] = field(default_factory=dict)


@dataclass(frozen=True)
class Rhythm:
    """When entries may be used. steps: of the schedule; within: those of them that may use any.

    refresh_every: a value is used in so many steps less one. has_forecast: two values are stored instead of one.
    places_a_block: tensors that one block stores. is_earlier: whether one sigma comes before another in the schedule;
    is_rising: whether it goes from clean to noise.
    """

    steps: int
    within: tuple[int, ...]
    refresh_every: int
    has_forecast: bool
    places_a_block: int
    is_earlier: Callable[[float, float], bool]
    is_rising: bool = False

    def reason(self, step: int, full: int) -> str | None:
        """Why a step is computed in full if the last full one was `full` (-1 for none), or None."""
        if step not in self.within:
            return OUTSIDE_RANGE
        if step == self.steps - 1:
            return LAST_STEP
        is_fresh = full >= self.within[0] and 0 < step - full < self.refresh_every
        return None if is_fresh else FULL_STEP

    @cached_property
    def frozen(self) -> tuple[int, ...]:
        """The steps that use entries if every step runs."""
        full, frozen = -1, []
        for step in self.within:
            if self.reason(step, full) is None:
                frozen.append(step)
            else:
                full = step
        return tuple(frozen)

    @cached_property
    def first_stored(self) -> int:
        """The first step that is worth storing: a forecast may begin with the one before the range."""
        return self.within[0] - (1 if self.has_forecast else 0) if self.frozen else -1

    def is_worth_storing(self, step: int) -> bool:
        return step >= self.first_stored and any(later > step for later in self.frozen)


class Cache:
    """Entries of one run. Forwards of several devices may come at the same time; each has its own keys."""

    def __init__(self, rhythm: Rhythm, store: Store) -> None:
        self.rhythm, self.store = rhythm, store
        self._passes: dict[Key, Pass] = {}
        self._seen: Counter[Key] = Counter()
        self._evaluation: float = -1
        self._turn = self._let_go = 0
        self._is_given_up = False
        self.exchanged_blocks: set[int] = set()
        self._lock = threading.Lock()

    def look_up(self, key: Key, step: int, sigma: float, evaluation: int) -> Lookup:
        """What the coming forward may do. evaluation: how many times the sampler has called for noise so far."""
        if not self.rhythm.steps:
            return Lookup(self, Pass(), sigma, -1, NO_SCHEDULE, False)
        with self._lock:
            # By sigma where a guider keeps the sampler's evaluations from being counted.
            if (evaluation or sigma) != self._evaluation:
                self._evaluation = evaluation or sigma
                self._turn += 1
                self._seen.clear()
                for useless in [k for k, entry in self._passes.items() if not self._may_serve(entry, step)]:
                    self._drop(useless)
            nth = Key(key.conds, key.context_frames, key.device, self._seen[key])
            self._seen[key] += 1
            if self._is_given_up:
                for given_up in [k for k in self._passes if k.device == key.device]:
                    self._drop(given_up)
                return Lookup(self, Pass(), sigma, step, OUT_OF_MEMORY, False)
            reason = self._reason(nth, step, sigma)
            is_stored = reason is not None and self.rhythm.is_worth_storing(step)
            found = self._passes.get(nth, Pass())
            found.turn, found.let_go = self._turn, self._let_go
            if is_stored:
                self._passes[nth] = found
            elif reason is not None and not any(later > step for later in self.rhythm.frozen):
                self._drop(nth)
        return Lookup(self, found, sigma, step, reason, is_stored)

    def stored(self, value: torch.Tensor, is_exact: bool) -> StoredTensor | None:
        """A copy of `value`, for which passes that the sampler has left out make room, longest unseen first."""
        while (stored := self.store.store(value, is_exact)) is None:
            with self._lock:
                unseen = self._left_out()
                if not unseen:
                    return None
                self._drop(min(unseen, key=lambda key: self._passes[key].turn))
        return stored

    def _left_out(self) -> list[Key]:
        """Passes that did not come in the last evaluation, nor in this one so far, and have stored something."""
        return [key for key, found in self._passes.items() if found.entries and found.turn < self._turn - 1]

    def make_ready(self, step: int, piece: int) -> None:
        """After a forward of `step`: prepare a part of the room that the coming steps will need, in such pieces."""
        first = self.rhythm.first_stored
        if piece and 0 <= step < first:
            self.store.make_ready((step + 1) / first, piece)

    @property
    def is_in_use(self) -> bool:
        """Whether anything was stored, and more may be."""
        return not self._is_given_up and self.store.most.total() > 0

    def give_up(self, device: torch.device) -> None:
        """Memory ran out there: let go of everything, and store nothing more in this run.

        What forwards of other devices are using goes with their next one.
        """
        with self._lock:
            self._is_given_up = True
            for key in [key for key in self._passes if key.device == device]:
                self._drop(key)

    def close(self) -> None:
        try:
            with self._lock:
                for key in list(self._passes):
                    self._drop(key)
        finally:
            self.store.close()

    def drop(self, found: Pass) -> None:
        """Forget what a forward that did not come to its end may have left half written."""
        with self._lock:
            for key in [key for key, other in self._passes.items() if other is found]:
                self._drop(key)

    def release(self, entry: Entry) -> None:
        for stored in entry.stored():
            self.store.release(stored)

    def _reason(self, key: Key, step: int, sigma: float) -> str | None:
        """Why the forward is computed in full, or None."""
        rhythm, found = self.rhythm, self._passes.get(key)
        if found is not None and rhythm.is_earlier(sigma, found.sigma):
            self._drop(key)
            return SIGMA_FELL if rhythm.is_rising else SIGMA_ROSE
        if found is not None:
            found.sigma = sigma
        reason = rhythm.reason(step, -1 if found is None else found.step)
        if reason not in (None, FULL_STEP):
            return reason
        if found is None:
            return CONTEXT_MOVED if self._has_moved(key) else FULL_STEP
        if not found.entries and (self._left_out() or found.let_go != self._let_go):
            # It found no room, and there is some now.
            return FULL_STEP
        return reason

    def _may_serve(self, found: Pass, step: int) -> bool:
        """Whether what is stored can still be reused, or be one end of the line that a forecast follows.

        Passes may be left out for some evaluations and come back.
        """
        reach = self.rhythm.refresh_every * (2 if self.rhythm.has_forecast else 1)
        return found.step < 0 or abs(step - found.step) <= reach

    def _has_moved(self, key: Key) -> bool:
        """Whether the same conds were there with another context window; what that left is let go."""
        if key.context_frames is None:
            return False
        gone = [
            other
            for other, found in self._passes.items()
            if other.conds == key.conds and other.nth == key.nth and found.turn < self._turn
        ]
        for old in gone:
            self._drop(old)
        return bool(gone)

    def _drop(self, key: Key) -> None:
        found = self._passes.pop(key, None)
        self._let_go += 1
        try:
            for entry in found.entries.values() if found else ():
                self.release(entry)
        finally:
            # Whoever still has the pass, as the traceback of an error does, shall not keep its tensors alive.
            if found is not None:
                found.entries.clear()


@dataclass
class Lookup:
    """One forward: a hit, in which entries are reused (`reason` is None), or a full one, and then perhaps one to store.

    obstacle: why a hit had to compute something, if not for want of room.
    backend: ComfyUI's attention functions when the forward began.
    """

    cache: Cache
    found: Pass
    sigma: float
    step: int
    reason: str | None
    is_stored: bool
    reused: int = 0
    computed: int = 0
    stored: int = 0
    refused: int = 0
    obstacle: str = CACHE_FULL
    backend: object = None
    exchanged: int = 0

    @property
    def is_hit(self) -> bool:
        return self.reason is None

    def is_exchanged(self, block: int, backend: object) -> bool:
        """Whether somebody exchanges attention in this block, to perturb it: nothing is reused or stored there, in any pass.

        Who does so counts the calls, and a call that we leave out would be another one's perturbation. Passes over the same
        conds are subtracted from each other: what is fresh in one is fresh in all, so that only the perturbation is left.
        """
        if backend != self.backend:
            self.cache.exchanged_blocks.add(block)
        is_exchanged = block in self.cache.exchanged_blocks
        self.exchanged += is_exchanged
        return is_exchanged

    def has(self, place: Place, like: torch.Tensor | None = None) -> bool:
        """Whether this forward may reuse the entry of `place`, and that is such a tensor as `like`."""
        entry = self.found.entries.get(place) if self.is_hit else None
        if entry is None:
            return False
        return like is None or entry.newest.fits(like)

    def value(self, place: Place) -> torch.Tensor:
        """The entry of `place`, or its forecast; not to be written to."""
        value = self.found.entries[place].at(self.sigma)
        self._fetch_next(place)
        self.reused += 1
        return value

    def store(self, place: Place, value: torch.Tensor, is_exact: bool = False) -> None:
        """Store a copy of a full value of this forward. is_exact: whatever precision the store has."""
        entry = self.found.entries.get(place)
        if entry is not None and not entry.newest.fits(value):
            self.cache.release(self.found.entries.pop(place))
            entry = None
        if entry is None:
            stored = self.cache.stored(value, is_exact)
            if stored is not None:
                self.found.entries[place] = Entry(stored, self.sigma)
        elif not self.cache.rhythm.has_forecast or self.found.step == self.step:
            # Samplers may evaluate a step more than once, at sigmas too near for a line through both.
            entry.newest.overwrite(value)
            entry.sigma = self.sigma
            stored = entry.newest
        else:
            stored = entry.older
            if stored is None:
                stored = self.cache.stored(value, is_exact)
            else:
                stored.overwrite(value)
            if stored is not None:
                entry.older, entry.older_sigma = entry.newest, entry.sigma
                entry.newest, entry.sigma = stored, self.sigma
            else:
                # No room for a second one: hold.
                entry.newest.overwrite(value)
                entry.sigma = self.sigma
        self.stored += 1
        self.refused += stored is None

    def finish(self) -> list[str | None]:
        """Close a forward that came to its end: its outcomes, None for a hit."""
        if not self.reused + self.computed:
            return [NOT_REACHED]
        if not self.is_hit:
            if self.stored:
                self.found.step, self.found.sigma = self.step, self.sigma
            return [self.reason, *([CACHE_FULL] if self.refused else [])]
        if not self.reused:
            return [ATTENTION_EXCHANGED if self.exchanged else self.obstacle]
        return [None, *([ATTENTION_EXCHANGED] if self.exchanged else [])]

    def _fetch_next(self, place: Place) -> None:
        """Start the way back of what the next block needs."""
        places = list(self.found.entries)
        after = places.index(place) + 1
        for following in places[after : after + self.cache.rhythm.places_a_block]:
            for stored in self.found.entries[following].stored():
                stored.fetch()
