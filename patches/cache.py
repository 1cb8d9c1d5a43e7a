"""Where reused tensors lie between two steps: on the GPU while there is room, else in host memory."""

from __future__ import annotations

import threading
from collections import Counter
from dataclasses import dataclass, field

import torch

GPU, HOST = "gpu", "cpu"
AUTO = "auto"
PLACEMENTS = (AUTO, GPU, HOST)
GIB = 2**30


@dataclass
class Shelf:
    """Room for copies of tensors, and a count of what is taken.

    placement: GPU, HOST or AUTO (GPU first). gpu_room, host_room: bytes that may be taken there; limit: bytes in
    all, 0 for none. Copies to and from pinned host memory run on a stream of their own.
    """

    placement: str = AUTO
    limit: int = 0
    gpu_room: int = 2**62
    host_room: int = 2**62
    taken: Counter[str] = field(default_factory=Counter)
    most: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        self._lock = threading.Lock()
        self._streams: dict[torch.device, torch.cuda.Stream] = {}

    def keep(self, tensor: torch.Tensor) -> Kept | None:
        """A copy of `tensor` where there is room, or None."""
        place = self._reserve(tensor.nbytes)
        if place is None:
            return None
        is_far = place == HOST and tensor.device.type != "cpu"
        try:
            buffer = torch.empty_like(
                tensor,
                device="cpu" if is_far else None,
                pin_memory=is_far,
                memory_format=torch.contiguous_format,
            )
        except RuntimeError:
            # Out of memory, or of memory that can be pinned: somebody else was faster than our count.
            with self._lock:
                self.taken[place] -= tensor.nbytes
            return None
        kept = Kept(self, place, buffer, tensor.device)
        kept.overwrite(tensor)
        return kept

    def release(self, kept: Kept) -> None:
        with self._lock:
            self.taken[kept.place] -= kept.buffer.nbytes

    def stream(self, device: torch.device) -> torch.cuda.Stream:
        with self._lock:
            if device not in self._streams:
                self._streams[device] = torch.cuda.Stream(device)
            return self._streams[device]

    def _reserve(self, size: int) -> str | None:
        rooms = {GPU: self.gpu_room, HOST: self.host_room}
        with self._lock:
            if self.limit and self.taken.total() + size > self.limit:
                return None
            for place in (GPU, HOST) if self.placement == AUTO else (self.placement,):
                if self.taken[place] + size <= rooms[place]:
                    self.taken[place] += size
                    self.most[place] = max(self.most[place], self.taken[place])
                    return place
        return None


class Kept:
    """One kept tensor, and its way back to the device that it came from."""

    def __init__(self, shelf: Shelf, place: str, buffer: torch.Tensor, device: torch.device) -> None:
        self.shelf, self.place, self.buffer, self.device = shelf, place, buffer, device
        self._event: torch.cuda.Event | None = None
        self._ahead: torch.Tensor | None = None

    @property
    def is_far(self) -> bool:
        return self.buffer.device != self.device

    def overwrite(self, tensor: torch.Tensor) -> None:
        """Copy `tensor` (same shape and dtype) into the buffer."""
        self._ahead = None
        if not self.is_far:
            self.buffer.copy_(tensor)
            return
        stream = self.shelf.stream(self.device)
        stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(stream):
            self.buffer.copy_(tensor, non_blocking=True)
        tensor.record_stream(stream)
        self._event = stream.record_event()

    def fetch(self) -> None:
        """Start the way back, if there is one to go."""
        if not self.is_far or self._ahead is not None:
            return
        stream = self.shelf.stream(self.device)
        # Not earlier than what is computed now: else every copy of a forward would be on the GPU at once.
        stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(stream):
            self._ahead = self.buffer.to(self.device, non_blocking=True)
        self._event = stream.record_event()

    def tensor(self) -> torch.Tensor:
        """The kept tensor on its device; not to be written to."""
        if not self.is_far:
            return self.buffer
        self.fetch()
        ahead, self._ahead = self._ahead, None
        assert ahead is not None and self._event is not None
        current = torch.cuda.current_stream(self.device)
        current.wait_event(self._event)
        ahead.record_stream(current)
        return ahead
