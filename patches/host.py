"""Host memory that a GPU copies to and from at full speed."""

from __future__ import annotations

import threading
from collections import defaultdict

import comfy.model_management as mm
import torch

CHUNK = 2**28
ALIGNMENT = 512


class HostRoom:
    """Pieces cut from chunks that are page-locked out of ComfyUI's share, and let go by `close`.

    A chunk is cut into pieces of one size, so that nothing of it is left over. Locking a GiB takes the CPU about
    half a second: `grow` early, while the GPU is at work. What ComfyUI does not lock (switched off, or its share is
    used up) serves as well, only slower. `grow` and `take` raise RuntimeError where there is no memory.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._chunks: list[torch.Tensor] = []
        self._locked: list[torch.Tensor] = []
        self._may_lock = True
        self._free: defaultdict[int, list[torch.Tensor]] = defaultdict(list)

    @property
    def size(self) -> int:
        return sum(chunk.nbytes for chunk in self._chunks)

    def grow(self, size: int, piece: int) -> None:
        """Have `size` bytes in all ready, in pieces of `piece` bytes."""
        with self._lock:
            while self.size < size:
                self._add(aligned(piece))

    def take(self, size: int) -> torch.Tensor:
        """uint8, of `size` bytes or a few more."""
        size = aligned(size)
        with self._lock:
            if not self._free[size]:
                self._add(size)
            return self._free[size].pop()

    def give_back(self, taken: torch.Tensor) -> None:
        with self._lock:
            self._free[taken.nbytes].append(taken)

    def close(self) -> None:
        """Unlock and forget everything. No copy may be under way."""
        with self._lock:
            for chunk in self._locked:
                mm.unpin_memory(chunk)
            self._chunks, self._locked = [], []
            self._free.clear()

    def _add(self, piece: int) -> None:
        chunk = torch.empty(piece * max(1, CHUNK // piece), dtype=torch.uint8)
        self._chunks.append(chunk)
        # Refused once, refused for this run: ComfyUI warns every time.
        self._may_lock = self._may_lock and mm.pin_memory(chunk)
        if self._may_lock:
            self._locked.append(chunk)
        self._free[piece] += chunk.split(piece)


def aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT
