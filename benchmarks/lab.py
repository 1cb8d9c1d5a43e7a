"""What the small model needs to try a technique that is built for large ones."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

# Its frames have 8 × 8 tokens, where those of LTX-2 have some hundred.
SMALL_BLOCK = 16


@contextmanager
def small_blocks(pack: str) -> Iterator[None]:
    """Routed attention by its reference, in blocks of 16 tokens: the kernel knows only heads of 128 and blocks of 64."""
    technique, kernel = (
        importlib.import_module(f"{pack}.patches.{name}")
        for name in ("techniques.low_rank", "kernels.routed")
    )

    def pack_small(*given: Any) -> Any:
        return kernel.pack_tokens(*given, SMALL_BLOCK)

    with mock.patch.multiple(
        technique, attend_routed=kernel.attend_reference, why_not=lambda *_: None, pack_tokens=pack_small
    ):
        yield
