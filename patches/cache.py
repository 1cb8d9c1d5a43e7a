"""Where reused tensors lie between two steps, and in which precision."""

from __future__ import annotations

import threading
from collections import Counter
from dataclasses import dataclass, field

import torch

from .host import HostRoom

GPU, HOST = "gpu", "cpu"
AUTO = "auto"
PLACEMENTS = (AUTO, GPU, HOST)
DEFAULT, FP8 = "default", "fp8_e4m3fn"
PRECISIONS = (DEFAULT, FP8)
GIB = 2**30

Parts = tuple[torch.Tensor, ...]


@dataclass
class Shelf:
    """Room for copies of tensors, and a count of what is taken.

    placement: GPU, HOST or AUTO (GPU first). gpu_room, host_room: bytes that may be taken there; limit: bytes in
    all, 0 for none. expected: bytes that host memory will have to hold. precision: FP8 packs what is kept. Copies to
    and from host memory run on a stream of their own.
    """

    placement: str = AUTO
    limit: int = 0
    precision: str = DEFAULT
    gpu_room: int = 2**62
    host_room: int = 2**62
    expected: int = 0
    taken: Counter[str] = field(default_factory=Counter)
    most: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        self._lock = threading.Lock()
        self._host = HostRoom()
        self._streams: dict[torch.device, torch.cuda.Stream] = {}

    def keep(self, tensor: torch.Tensor, is_exact: bool = False) -> Kept | None:
        """A copy of `tensor` where there is room, or None. is_exact: not packed."""
        is_packed = self.precision == FP8 and not is_exact and has_fp8(tensor.device)
        size = packed_size(tensor) if is_packed else tensor.nbytes
        place = self._reserve(size)
        if place is None:
            return None
        try:
            parts = pack(tensor) if is_packed else (tensor,)
            kept = Kept(self, tensor, parts, place, is_packed)
        except RuntimeError:
            # Out of memory: somebody else was faster than our count.
            with self._lock:
                self.taken[place] -= size
            return None
        kept.write(parts)
        return kept

    def make_ready(self, share: float) -> None:
        """Have this share of the expected host memory ready before it is needed."""
        try:
            self._host.grow(int(self.expected * share))
        except RuntimeError:
            self.expected = 0

    def host_buffer(self, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """A buffer of its shape and dtype, and the memory below it."""
        taken = self._host.take(like.nbytes)
        return taken[: like.nbytes].view(like.dtype).view(like.shape), taken

    def release(self, kept: Kept) -> None:
        kept.wait()
        with self._lock:
            self.taken[kept.place] -= kept.nbytes
        for taken in kept.taken:
            self._host.give_back(taken)

    def close(self) -> None:
        """Wait for copies, and let go of host memory. Nothing kept may be used after it."""
        for stream in self._streams.values():
            stream.synchronize()
        self._host.close()

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
    """One kept tensor, and its way back to the device that it came from. Raises RuntimeError without memory."""

    def __init__(self, shelf: Shelf, tensor: torch.Tensor, parts: Parts, place: str, is_packed: bool) -> None:
        self.shelf, self.place, self.is_packed = shelf, place, is_packed
        self.shape, self.dtype, self.device = tensor.shape, tensor.dtype, tensor.device
        self.is_far = place == HOST and self.device.type != "cpu"
        if self.is_far:
            made = [shelf.host_buffer(part) for part in parts]
            self.buffers = tuple(buffer for buffer, _ in made)
            self.taken = tuple(taken for _, taken in made)
        else:
            self.buffers = tuple(
                torch.empty_like(part, memory_format=torch.contiguous_format) for part in parts
            )
            self.taken = ()
        self._event: torch.cuda.Event | None = None
        self._ahead: Parts | None = None

    @property
    def nbytes(self) -> int:
        return sum(buffer.nbytes for buffer in self.buffers)

    def fits(self, tensor: torch.Tensor) -> bool:
        return (self.shape, self.dtype, self.device) == (tensor.shape, tensor.dtype, tensor.device)

    def overwrite(self, tensor: torch.Tensor) -> None:
        """Keep `tensor`, which fits, instead."""
        self.write(pack(tensor) if self.is_packed else (tensor,))

    def write(self, parts: Parts) -> None:
        """Copy `parts` into the buffers."""
        self._ahead = None
        if not self._has_stream:
            for buffer, part in zip(self.buffers, parts, strict=True):
                buffer.copy_(part)
            return
        stream = self.shelf.stream(self.device)
        stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(stream):
            for buffer, part in zip(self.buffers, parts, strict=True):
                buffer.copy_(part, non_blocking=True)
                part.record_stream(stream)
        self._event = stream.record_event()

    def fetch(self) -> None:
        """Start the way back, if there is one to go."""
        if not self._has_stream or self._ahead is not None:
            return
        stream = self.shelf.stream(self.device)
        # Not earlier than what is computed now: else every copy of a forward would be on the GPU at once.
        stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(stream):
            self._ahead = tuple(buffer.to(self.device, non_blocking=True) for buffer in self.buffers)
        self._event = stream.record_event()

    def wait(self) -> None:
        """Until no copy touches the buffers, so that others may have their memory."""
        if self._event is not None:
            self._event.synchronize()

    def tensor(self) -> torch.Tensor:
        """The kept tensor on its device; not to be written to."""
        parts = self._here()
        return unpack(parts) if self.is_packed else parts[0]

    @property
    def _has_stream(self) -> bool:
        return self.is_far and self.device.type == "cuda"

    def _here(self) -> Parts:
        if not self.is_far:
            return self.buffers
        if not self._has_stream:
            return tuple(buffer.to(self.device) for buffer in self.buffers)
        self.fetch()
        ahead, self._ahead = self._ahead, None
        assert ahead is not None and self._event is not None
        current = torch.cuda.current_stream(self.device)
        current.wait_event(self._event)
        for part in ahead:
            part.record_stream(current)
        return ahead


def pack(tensor: torch.Tensor) -> Parts:
    """float8_e4m3fn and its scale, one for each vector of the last dimension [..., 1]."""
    largest = tensor.abs().amax(dim=-1, keepdim=True)
    # The smallest one is a normal number in every dtype: nothing is divided by zero.
    scale = (largest / torch.finfo(torch.float8_e4m3fn).max).clamp_min(2**-14)
    return (tensor / scale).to(torch.float8_e4m3fn), scale


def packed_size(tensor: torch.Tensor) -> int:
    """Bytes that `pack` makes of it."""
    return tensor.numel() + tensor.nbytes // tensor.shape[-1]


def unpack(parts: Parts) -> torch.Tensor:
    values, scale = parts
    return values.to(scale.dtype).mul_(scale)


def has_fp8(device: torch.device) -> bool:
    """Whether a device can hold it; some cannot."""
    return device.type in ("cpu", "cuda", "xpu")
