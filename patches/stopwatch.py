"""How long pieces of work take on their device, without waiting for it while they run."""

from __future__ import annotations

import time

import torch


class Stopwatch:
    """From its creation to `stop`."""

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.current_stream(device) if device.type == "cuda" else None
        self._begin = self._now()
        self._end: float | torch.cuda.Event | None = None

    def stop(self) -> None:
        self._end = self._now()

    def seconds(self) -> float | None:
        """None if it was never stopped. Waits until the device has come that far."""
        begin, end = self._begin, self._end
        if isinstance(begin, float) and isinstance(end, float):
            return end - begin
        if isinstance(begin, float) or isinstance(end, float) or end is None:
            return None
        end.synchronize()
        return begin.elapsed_time(end) / 1000

    def _now(self) -> float | torch.cuda.Event:
        if self._stream is None:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(self._stream)
        return event


class PeakMemory:
    """The most that PyTorch has had allocated on a device since this was made, as far as that can be told.

    PyTorch's own peak is not reset, for others may be reading it: a run that stays below an earlier one gets a bound.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._before = self._peak()

    def record(self) -> dict[str, int | bool]:
        """peak_bytes, and whether the true peak may be lower; nothing where PyTorch does not count."""
        peak = self._peak()
        return {} if not peak else {"peak_bytes": peak, "is_upper_bound": peak == self._before}

    def _peak(self) -> int:
        return torch.cuda.max_memory_allocated(self._device) if self._device.type == "cuda" else 0
