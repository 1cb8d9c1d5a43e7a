"""A GPU of laptop size: some of the multiprocessors of a large one."""

from __future__ import annotations

import functools
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


@functools.cache
def green_context(multiprocessors: int, device: int) -> Any:
    """One for the whole process: streams that were made within outlive the `with`, and must not outlive the context."""
    from torch.cuda.green_contexts import GreenContext

    return GreenContext.create(num_sms=multiprocessors, device_id=device)


@contextmanager
def throttled(multiprocessors: int | None) -> Iterator[None]:
    """Everything within runs on so many multiprocessors of the current device, None for all of them.

    Eight of an H100 do about 56 TFLOP/s in bf16 matrix products, as laptop cards do. No setting of the card is touched.
    Needs PyTorch 2.11 or newer. Side streams are throttled where they are first made within, which `seen_by_streams` tells.
    """
    if multiprocessors is None:
        yield
        return
    torch.cuda.synchronize()
    context = green_context(multiprocessors, torch.cuda.current_device())
    if hasattr(type(context).set_context, "__deprecated__"):
        with torch.cuda.stream(context.Stream()):
            yield
            torch.cuda.synchronize()
        return
    context.set_context()
    try:
        yield
        torch.cuda.synchronize()
    finally:
        context.pop_context()


def product_ms(stream: Any = None, size: int = 4096, repeats: int = 8) -> float:
    """Milliseconds of a bf16 matrix product on `stream`, the current one if None."""
    factor = torch.randn(size, size, device="cuda", dtype=torch.bfloat16)
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        factor @ factor
        torch.cuda.synchronize()
        begun = time.perf_counter()
        for _ in range(repeats):
            factor @ factor
        torch.cuda.synchronize()
    return 1000 * (time.perf_counter() - begun) / repeats


def seen_by_streams(multiprocessors: int) -> dict[str, float]:
    """Milliseconds of a matrix product on the whole card, and throttled on the current stream and on a fresh one."""
    whole = product_ms()
    with throttled(multiprocessors):
        return {
            "whole_card": whole,
            "current_stream": product_ms(),
            "side_stream": product_ms(torch.cuda.Stream()),
        }
