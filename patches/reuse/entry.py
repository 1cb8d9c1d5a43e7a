"""What is stored of one value over the steps, and what it will be at the next."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..kernels.half import saturated
from .store import StoredTensor


@dataclass
class Entry:
    """The newest full value of one place, and the one before it where a forecast asks for two, each with its sigma."""

    newest: StoredTensor
    sigma: float
    older: StoredTensor | None = None
    older_sigma: float = 0.0

    def stored(self) -> list[StoredTensor]:
        return [self.newest] if self.older is None else [self.newest, self.older]

    def at(self, sigma: float) -> torch.Tensor:
        """The value at `sigma`: the newest, or on the line through both; not to be written to."""
        if self.older is None:
            return self.newest.tensor()
        newest = self.newest.tensor()
        return forecast(self.older.tensor(), newest, self.older_sigma, self.sigma, sigma)


def forecast(
    older: torch.Tensor, newest: torch.Tensor, older_sigma: float, newest_sigma: float, sigma: float
) -> torch.Tensor:
    """First-order Taylor forecast (TaylorSeer, arXiv 2503.06923): the line through two values, followed to `sigma`.

    Never further than the two values lie apart: beyond that the line leads anywhere.
    """
    ahead = min((sigma - newest_sigma) / (newest_sigma - older_sigma), 1.0)
    return saturated(torch.lerp(older, newest, 1 + ahead))
