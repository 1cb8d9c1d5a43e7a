"""Host memory that a GPU copies to and from at full speed."""

from __future__ import annotations

import threading
from collections import defaultdict

import comfy.model_management as mm
import torch

CHUNK = 2**28
ALIGNMENT = 512


class HostRoom:
    """Buffers cut from chunks that are page-locked out of ComfyUI's share, and let go by `close`.

    Locking a GiB takes the CPU about half a second: `grow` early, while the GPU is at work. What ComfyUI does not
    lock (switched off, or its share is used up) serves as well, only slower. `grow` and `take` raise RuntimeError
    where there is no memory.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._chunks: list[torch.Tensor] = []
        self._locked: list[torch.Tensor] = []
        self._may_lock = True
        # Everything before this place was taken at least once.
        self._chunk = self._offset = 0
        self._given_back: defaultdict[int, list[torch.Tensor]] = defaultdict(list)

    @property
    def size(self) -> int:
        return sum(chunk.nbytes for chunk in self._chunks)

    def grow(self, size: int) -> None:
        """Have `size` bytes in all ready."""
        with self._lock:
            while self.size < size:
                self._add(CHUNK)

    def take(self, size: int) -> torch.Tensor:
        """uint8, of `size` bytes or a few more."""
        size = -(-size // ALIGNMENT) * ALIGNMENT
        with self._lock:
            if self._given_back[size]:
                return self._given_back[size].pop()
            while self._chunk < len(self._chunks) and self._left < size:
                self._chunk, self._offset = self._chunk + 1, 0
            if self._chunk == len(self._chunks):
                self._add(max(CHUNK, size))
            start, self._offset = self._offset, self._offset + size
            return self._chunks[self._chunk][start : start + size]

    def give_back(self, taken: torch.Tensor) -> None:
        with self._lock:
            self._given_back[taken.nbytes].append(taken)

    def close(self) -> None:
        """Unlock and forget everything. No copy may be under way."""
        with self._lock:
            for chunk in self._locked:
                mm.unpin_memory(chunk)
            self._chunks, self._locked = [], []
            self._chunk = self._offset = 0
            self._given_back.clear()

    @property
    def _left(self) -> int:
        return self._chunks[self._chunk].nbytes - self._offset

    def _add(self, size: int) -> None:
        chunk = torch.empty(size, dtype=torch.uint8)
        self._chunks.append(chunk)
        # Refused once, refused for this run: ComfyUI warns every time.
        self._may_lock = self._may_lock and mm.pin_memory(chunk)
        if self._may_lock:
            self._locked.append(chunk)
