"""A GPU of laptop size: some of the multiprocessors of a large one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def throttled(multiprocessors: int | None) -> Iterator[None]:
    """Everything within runs on so many multiprocessors of the current device, None for all of them.

    Eight of an H100 do about 56 TFLOP/s in bf16 matrix products, as laptop cards do. No setting of the card is touched.
    Needs PyTorch 2.11 or newer.
    """
    if multiprocessors is None:
        yield
        return
    from torch.cuda.green_contexts import GreenContext

    torch.cuda.synchronize()
    context = GreenContext.create(num_sms=multiprocessors, device_id=torch.cuda.current_device())
    context.set_context()
    try:
        yield
        torch.cuda.synchronize()
    finally:
        context.pop_context()
