"""The work that a device has been given: how far it is, how long it took, and waiting for it."""

from __future__ import annotations

import time
from typing import Any

import torch


class DeviceQueue:
    """A device of which only this can be told: that all it was given is done.

    A mark is a point in the work given to it. This one keeps them by the clock of the host, which on a CPU tells all.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def now(self) -> float:
        """The clock of the host, in seconds."""
        return time.perf_counter()

    def sleep(self, seconds: float) -> None:
        time.sleep(seconds)

    def is_captured(self) -> bool:
        """Whether work is not done now, but noted down to be repeated."""
        return False

    def mark(self) -> Any:
        """The point behind all work that was given so far."""
        return self.now()

    def has_passed(self, mark: Any) -> bool:
        """Whether the device is known to have come so far."""
        return self.device.type == "cpu"

    def wait_for(self, mark: Any) -> None:
        """Wait until the device has come so far, if that can be told without waiting for all."""

    def drain(self) -> None:
        """Wait until it has nothing left to do."""
        getattr(torch, self.device.type).synchronize()

    def seconds(self, begin: Any, end: Any) -> float:
        """What the device took from one mark to the other, both passed."""
        return end - begin


class CudaQueue(DeviceQueue):
    """A device that tells by events: marks are kept by its own clock, in the stream that is current."""

    def is_captured(self) -> bool:
        return torch.cuda.is_current_stream_capturing()

    def mark(self) -> torch.cuda.Event:
        # Waiting for a blocking event leaves the processor to others.
        event = torch.cuda.Event(enable_timing=True, blocking=True)
        event.record(torch.cuda.current_stream(self.device))
        return event

    def has_passed(self, mark: torch.cuda.Event) -> bool:
        return mark.query()

    def wait_for(self, mark: torch.cuda.Event) -> None:
        mark.synchronize()

    def drain(self) -> None:
        torch.cuda.synchronize(self.device)

    def seconds(self, begin: torch.cuda.Event, end: torch.cuda.Event) -> float:
        return begin.elapsed_time(end) / 1000


def queue_of(device: torch.device) -> DeviceQueue:
    return (CudaQueue if device.type == "cuda" else DeviceQueue)(device)
