"""Replaced `forward`s of modules, for as long as one call lasts."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch


@contextmanager
def shadowed(replacements: Iterable[tuple[torch.nn.Module, Callable[..., Any]]]) -> Iterator[None]:
    """Bind `replacement(original, *args, **kwargs)` over each module's forward; restore what was there.

    The module is shadowed, not its class, and whatever another pack put there is the `original`.
    """
    before = []
    try:
        for module, replacement in replacements:
            before.append((module, vars(module).get("forward")))
            module.forward = partial(replacement, module.forward)
        yield
    finally:
        for module, foreign in reversed(before):
            if foreign is None:
                vars(module).pop("forward", None)
            else:
                module.forward = foreign
