"""A laptop's GPU by arithmetic: what it was given to do, how hot it is, and a clock that goes on only when told.

Its die follows `ambient + rise · busy` with a time constant (first order). Work is given to it by the transformer blocks
of a model, which compute on the CPU in no time of this clock.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch


class Laptop:
    """As techniques see it: a queue of work and its sensors.

    lead: seconds that the host needs to give one block of work away; None: it waits for each. resolution: degrees.
    """

    def __init__(
        self,
        ambient: float = 30.0,
        rise: float = 70.0,
        constant: float = 25.0,
        start: float | None = None,
        lead: float | None = None,
        resolution: float = 1.0,
    ) -> None:
        self.device = torch.device("cpu")
        self.ambient, self.rise, self.constant = ambient, rise, constant
        self.lead, self.resolution = lead, resolution
        self.clock = self.busy_until = self.busy = 0.0
        self.temperature = ambient if start is None else start
        self.trace: list[tuple[float, float, bool]] = []
        self.drained = 0

    # What is done to it.

    def work(self, seconds: float) -> None:
        """The host gives it so much to do."""
        self.busy_until = max(self.busy_until, self.clock) + seconds
        self._go_on_to(self.busy_until if self.lead is None else self.clock + self.lead)

    def heat(self, model: Any, seconds: float | Callable[[], float]) -> Any:
        """Every block of the model takes so long from now on."""
        for block in model.model.diffusion_model.transformer_blocks:
            block.register_forward_pre_hook(lambda *_: self.work(seconds() if callable(seconds) else seconds))
        return model

    def _go_on_to(self, time: float) -> None:
        if self.busy_until > self.clock:
            self._pass(min(time, self.busy_until), True)
        self._pass(time, False)

    def _pass(self, time: float, is_busy: bool) -> None:
        span = time - self.clock
        if span <= 0:
            return
        end = self.ambient + self.rise * is_busy
        self.temperature = end + (self.temperature - end) * math.exp(-span / self.constant)
        self.clock = time
        self.busy += span * is_busy
        self.trace.append((time, self.temperature, is_busy))

    # As a queue.

    def now(self) -> float:
        return self.clock

    def sleep(self, seconds: float) -> None:
        self._go_on_to(self.clock + seconds)

    def is_captured(self) -> bool:
        return False

    def mark(self) -> float:
        # The device has to come to it, too.
        self.busy_until = max(self.clock, self.busy_until) + 1e-9
        return self.busy_until

    def has_passed(self, mark: float) -> bool:
        return self.clock >= mark

    def wait_for(self, mark: float) -> None:
        self._go_on_to(max(mark, self.clock))

    def drain(self) -> None:
        self.drained += 1
        self.wait_for(self.busy_until)

    def seconds(self, begin: float, end: float) -> float:
        assert begin <= end <= self.clock, "a device cannot tell of what it has not done"
        return end - begin

    # As sensors.

    def reading(self) -> float:
        return round(self.temperature / self.resolution) * self.resolution

    def sensors(self, sensor: Callable[..., Any], *others: Callable[[], float]) -> Iterator[Any]:
        """Ones that read `others`, then a right one; made by the pack's own class."""
        for number, read in enumerate([*others, self.reading]):
            yield sensor(f"sensor {number + 1}", read)
