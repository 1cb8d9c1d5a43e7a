"""What a transformer block may leave behind where ComfyUI records the block's allocations and replays them.

Newer releases do so on CUDA (comfy.model_prefetch): memory that a block takes and has not given back at its end breaks
the recording, and memory of a block that is freed where the recorder does not see it, as `record_stream` may, ends the
process. Memory taken under the pause is ordinary memory.
"""

from __future__ import annotations

import threading
from contextlib import AbstractContextManager, nullcontext

import torch

try:
    import comfy.model_prefetch as model_prefetch
except ImportError:  # Older releases neither stream weights ahead nor record.
    model_prefetch = None


def outliving_blocks() -> AbstractContextManager[None]:
    """Tensors made under this may be kept past the end of the block that they are made in."""
    pause = getattr(model_prefetch, "pause_malloc_graph", None)
    return nullcontext() if pause is None else pause()


def is_recording(device: torch.device) -> bool:
    """Whether allocations on `device` are being recorded here and now."""
    graphs = getattr(model_prefetch, "MALLOC_GRAPHS", None)
    if graphs is not None:
        graph = graphs.get(threading.get_ident())
        return graph is not None and graph._comfy_active
    # A release that does not say where.
    is_enabled = getattr(model_prefetch, "malloc_graph_enabled", None)
    return is_enabled is not None and is_enabled(device)
