"""Pinned host memory: a GPU copies to and from it at full speed."""

from __future__ import annotations

import threading
from collections import defaultdict, deque
from concurrent.futures import Future, ThreadPoolExecutor

import comfy.model_management as mm
import torch

CHUNK = 2**28
PAGE = 4096
ALIGNMENT = 512


class PinnedMemory:
    """Pieces cut from chunks that are page-locked out of ComfyUI's share, and let go by `close`.

    A chunk is cut into pieces of one size, so that nothing of it is left over. Getting memory from the system takes
    much longer than locking it: `grow` early, it leaves that to a thread. Locking stays with the callers' thread, for
    ComfyUI's books are not made for several. What ComfyUI does not lock (switched off, or its share is used up) serves
    as well, only slower. `grow` and `take` raise RuntimeError where there is no memory.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._chunks: list[torch.Tensor] = []
        self._coming: deque[Future[torch.Tensor]] = deque()
        self._locked: list[torch.Tensor] = []
        self._may_lock = True
        self._free: defaultdict[int, list[torch.Tensor]] = defaultdict(list)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="frame-thrift-host")

    @property
    def size(self) -> int:
        return sum(chunk.nbytes for chunk in self._chunks)

    def grow(self, size: int, piece: int) -> None:
        """Begin to have `size` bytes in all ready, in pieces of `piece` bytes."""
        with self._lock:
            self._lock_pages(self._arrived())
            while self.size < size:
                self._add(aligned(piece))

    def take(self, size: int) -> torch.Tensor:
        """uint8, of `size` bytes or a few more."""
        size = aligned(size)
        with self._lock:
            if not self._free[size]:
                self._add(size)
            self._lock_pages(len(self._coming))
            return self._free[size].pop()

    def give_back(self, taken: torch.Tensor) -> None:
        with self._lock:
            self._free[taken.nbytes].append(taken)

    def close(self) -> None:
        """Unlock and forget everything. No copy may be under way, and nothing may be asked for after it."""
        self._thread.shutdown(cancel_futures=True)
        with self._lock:
            for chunk in self._locked:
                mm.unpin_memory(chunk)
            self._chunks, self._locked = [], []
            self._coming.clear()
            self._free.clear()

    def _add(self, piece: int) -> None:
        chunk = torch.empty(piece * max(1, CHUNK // piece), dtype=torch.uint8)
        self._chunks.append(chunk)
        self._coming.append(self._thread.submit(touched, chunk))
        self._free[piece] += chunk.split(piece)

    def _arrived(self) -> int:
        return next((n for n, chunk in enumerate(self._coming) if not chunk.done()), len(self._coming))

    def _lock_pages(self, count: int) -> None:
        """Of the first `count` chunks that come, waiting for them."""
        for _ in range(count):
            chunk = self._coming.popleft().result()
            # Refused once, refused for this run: ComfyUI warns every time.
            self._may_lock = self._may_lock and mm.pin_memory(chunk)
            if self._may_lock:
                self._locked.append(chunk)


@torch.inference_mode()
def touched(chunk: torch.Tensor) -> torch.Tensor:
    """The uint8 `chunk`, with something written to every page, which is when the system provides it.

    ComfyUI samples in inference mode, which a thread does not inherit and without which nobody may write to its tensors.
    """
    chunk[::PAGE] = 0
    return chunk


def aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT
