"""What the last runs of a MODEL were, as numbers and names, without tensors."""

from __future__ import annotations

import copy
import hashlib
import threading
from collections import deque
from collections.abc import Iterable, Sequence
from typing import Any

import torch

JOURNAL = "frame_thrift_journal"

Record = dict[str, Any]


class Journal:
    """Records of the last runs of a MODEL and all its clones, newest last."""

    def __init__(self, length: int = 16):
        self._lock = threading.Lock()
        self._records: deque[Record] = deque(maxlen=length)

    def add(self, record: Record) -> None:
        with self._lock:
            self._records.append(copy.deepcopy(record))

    def records(self) -> list[Record]:
        with self._lock:
            return copy.deepcopy(list(self._records))

    def __deepcopy__(self, memo: dict[int, Any]) -> Journal:
        return self


def journal_of(model: Any) -> Journal | None:
    """The journal that `model` shares with its clones; None if nothing was ever mounted."""
    journal: Journal | None = model.get_attachment(JOURNAL)
    return journal


def pieces_before(sigma: float, earlier: Sequence[Record]) -> list[Record]:
    """The runs right before that lead, one ending where the next begins, to a run that begins at `sigma`."""
    pieces = []
    for record in reversed(earlier):
        if len(record["sigmas"]) < 2 or abs(record["sigmas"][1] - sigma) > 1e-5 * sigma or sigma <= 0:
            break
        pieces.append(record)
        sigma = record["sigmas"][0]
    return pieces


def fingerprints(parts: Iterable[torch.Tensor]) -> list[str]:
    """One for each part of a LATENT (video, audio): the same for the same bits, on whatever device."""
    return [fingerprint(part) for part in parts]


def fingerprint(tensor: torch.Tensor) -> str:
    data = tensor.detach().cpu().contiguous()
    head = f"{tuple(data.shape)} {data.dtype} ".encode()
    return hashlib.blake2b(
        head + data.flatten().view(torch.uint8).numpy().tobytes(), digest_size=16
    ).hexdigest()
