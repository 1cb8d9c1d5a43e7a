"""Where the values of a feature cache lie between two steps, and in which precision."""

from __future__ import annotations

import math
import threading
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from .pinned import PinnedMemory
from .recorder import outliving_blocks

GPU, HOST = "gpu", "cpu"
AUTO = "auto"
PLACEMENTS = (AUTO, GPU, HOST)
DEFAULT, FP8 = "default", "fp8_e4m3fn"
PRECISIONS = (DEFAULT, FP8)
GIB = 2**30

Parts = tuple[torch.Tensor, ...]


@dataclass
class Store:
    """Room for copies of tensors, and a count of what is taken.

    placement: GPU, HOST or AUTO (GPU first). rooms: bytes that may be taken of each; limit: bytes in all, 0 for
    none. expected: bytes that host memory will have to hold. precision: FP8 packs what is stored. Copies to and from host
    memory run on a stream of their own.
    """

    placement: str = AUTO
    limit: int = 0
    precision: str = DEFAULT
    rooms: dict[str, int] = field(default_factory=lambda: {GPU: 2**62, HOST: 2**62})
    expected: int = 0
    taken: Counter[str] = field(default_factory=Counter)
    most: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        self._lock = threading.Lock()
        self._pinned = PinnedMemory()
        self._streams: dict[torch.device, torch.cuda.Stream] = {}

    def store(self, tensor: torch.Tensor, is_exact: bool = False) -> StoredTensor | None:
        """A copy of `tensor` where there is room, or None. is_exact: not packed."""
        size = self.size_of(tensor, is_exact)
        for place in (GPU, HOST) if self.placement == AUTO else (self.placement,):
            if not self._reserve(place, size):
                continue
            try:
                stored = StoredTensor(self, tensor, place, self._packs(tensor.device, is_exact))
            except RuntimeError:
                # Out of memory: somebody else was faster than our count, and will be the next time.
                with self._lock:
                    self.taken[place] -= size
                    self.rooms[place] = self.taken[place]
                continue
            with self._lock:
                self.most[place] = max(self.most[place], self.taken[place])
            return stored
        return None

    def size_of(self, tensor: torch.Tensor, is_exact: bool = False) -> int:
        """Bytes that a copy of it takes."""
        return self._size(tensor.shape, tensor.itemsize, self._packs(tensor.device, is_exact))

    def size_of_such(self, shape: Sequence[int], itemsize: int, device: torch.device) -> int:
        """The same for a tensor that is not there yet, of numbers of `itemsize` bytes."""
        return self._size(shape, itemsize, self._packs(device))

    def _size(self, shape: Sequence[int], itemsize: int, is_packed: bool) -> int:
        numbers = math.prod(shape)
        return numbers + numbers // shape[-1] * itemsize if is_packed else numbers * itemsize

    def make_ready(self, share: float, piece: int) -> None:
        """Have this share of the expected host memory ready before it is needed, for copies of so many bytes each."""
        try:
            self._pinned.grow(int(self.expected * share), piece)
        except RuntimeError:
            self.expected = 0

    def host_buffer(self, size: int) -> torch.Tensor:
        return self._pinned.take(size)

    def release(self, stored: StoredTensor) -> None:
        stored.wait()
        with self._lock:
            self.taken[stored.place] -= stored.nbytes
        if stored.taken is not None:
            self._pinned.give_back(stored.taken)

    def close(self) -> None:
        """Wait for copies, and let go of host memory. Nothing stored may be used after it."""
        try:
            for stream in self._streams.values():
                stream.synchronize()
        finally:
            self._pinned.close()

    def stream(self, device: torch.device) -> torch.cuda.Stream:
        with self._lock:
            if device not in self._streams:
                self._streams[device] = torch.cuda.Stream(device)
            return self._streams[device]

    def _packs(self, device: torch.device, is_exact: bool = False) -> bool:
        return self.precision == FP8 and not is_exact and has_fp8(device)

    def _reserve(self, place: str, size: int) -> bool:
        with self._lock:
            has_room = self.taken[place] + size <= self.rooms[place]
            is_allowed = not self.limit or self.taken.total() + size <= self.limit
            if has_room and is_allowed:
                self.taken[place] += size
            return has_room and is_allowed


class StoredTensor:
    """One stored tensor, and its way back to the device that it came from. Raises RuntimeError without memory."""

    def __init__(self, store: Store, tensor: torch.Tensor, place: str, is_packed: bool) -> None:
        self.store, self.place, self.is_packed = store, place, is_packed
        self.shape, self.dtype, self.device = tensor.shape, tensor.dtype, tensor.device
        self.is_far = place == HOST and not shares_host_memory(self.device)
        self.taken: torch.Tensor | None = None
        self._event: torch.cuda.Event | None = None
        self._ahead: Parts | None = None
        with outliving_blocks():
            parts = self._parts(tensor)
            if self.is_far:
                self.taken = store.host_buffer(sum(part.nbytes for part in parts))
                self.buffers = carved(self.taken, parts)
            else:
                self.buffers = tuple(
                    torch.empty_like(part, memory_format=torch.contiguous_format) for part in parts
                )
            self._write(parts)

    @property
    def nbytes(self) -> int:
        return sum(buffer.nbytes for buffer in self.buffers)

    def fits(self, tensor: torch.Tensor) -> bool:
        return (self.shape, self.dtype, self.device) == (tensor.shape, tensor.dtype, tensor.device)

    def overwrite(self, tensor: torch.Tensor) -> None:
        """Store `tensor`, which fits, instead."""
        with outliving_blocks():
            self._write(self._parts(tensor))

    def _parts(self, tensor: torch.Tensor) -> Parts:
        if self.is_packed:
            return pack(tensor)
        # What another stream reads must not be the memory of a block.
        return (torch.clone(tensor) if self._has_stream else tensor,)

    def _write(self, parts: Parts) -> None:
        """Copy `parts` into the buffers."""
        self._ahead = None
        if not self._has_stream:
            for buffer, part in zip(self.buffers, parts, strict=True):
                buffer.copy_(part)
            return
        stream = self.store.stream(self.device)
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
        stream = self.store.stream(self.device)
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
        """The stored tensor on its device; not to be written to."""
        parts = self._here()
        return unpack(parts) if self.is_packed else parts[0]

    @property
    def _has_stream(self) -> bool:
        return self.is_far and has_streams(self.device)

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


def carved(memory: torch.Tensor, parts: Parts) -> Parts:
    """Buffers of the shapes and dtypes of `parts`, one behind the other in uint8 `memory`; widest dtype first."""
    sizes = [part.nbytes for part in parts]
    pieces = memory[: sum(sizes)].split(sizes)
    return tuple(piece.view(part.dtype).view(part.shape) for piece, part in zip(pieces, parts, strict=True))


def pack(tensor: torch.Tensor) -> Parts:
    """The scale of each vector of the last dimension [..., 1], and the vectors in it as float8_e4m3fn."""
    largest = tensor.abs().amax(dim=-1, keepdim=True)
    # The smallest one is a normal number in every dtype: nothing is divided by zero.
    scale = (largest / torch.finfo(torch.float8_e4m3fn).max).clamp_min(2**-14)
    return scale, (tensor / scale).to(torch.float8_e4m3fn)


def unpack(parts: Parts) -> torch.Tensor:
    scale, values = parts
    return values.to(scale.dtype).mul_(scale)


def shares_host_memory(device: torch.device) -> bool:
    return device.type == "cpu"


def has_streams(device: torch.device) -> bool:
    """Whether copies can run beside what is computed there."""
    return device.type == "cuda"


def has_fp8(device: torch.device) -> bool:
    """Whether a device can hold it; some cannot."""
    return device.type in ("cpu", "cuda", "xpu")
