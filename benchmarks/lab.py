"""The machine that a script measures on, and what the small model needs to try a technique that is built for large ones."""

from __future__ import annotations

import hashlib
import importlib
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from comfyui_version import __version__ as comfyui_version

# Its frames have 8 × 8 tokens, where those of LTX-2 have some hundred.
SMALL_BLOCK = 16


def versions() -> dict[str, str]:
    """What figures were measured with."""
    return {"torch": torch.__version__, "comfyui": comfyui_version}


def machine(device: str | None = None) -> dict[str, str]:
    """The same, and what on; device: where that is not the GPU if there is one."""
    on_gpu = torch.cuda.is_available() if device is None else torch.device(device).type == "cuda"
    return {"gpu": torch.cuda.get_device_name() if on_gpu else "none (CPU)", **versions()}


def digest(files: Iterable[Path]) -> str:
    """Of all that makes a model."""
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:16]


def milliseconds(work: Callable[[], Any], device: str) -> float:
    """What one call takes, on a GPU by its own clock."""
    if torch.device(device).type == "cpu":
        begun = time.perf_counter()
        work()
        return 1000 * (time.perf_counter() - begun)
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    work()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end)


def peak_gib(work: Callable[[], Any], device: str) -> float | None:
    """What a call allocates at most beside what is there; unknown on a CPU."""
    if torch.device(device).type == "cpu":
        work()
        return None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    work()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**30


def attending(model: Any, attention: Callable[..., torch.Tensor]) -> Any:
    """A clone of `model` with `attention` as ComfyUI's override, which is handed the usual one first."""
    clone = model.clone()
    clone.model_options.setdefault("transformer_options", {})["optimized_attention_override"] = attention
    return clone


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
