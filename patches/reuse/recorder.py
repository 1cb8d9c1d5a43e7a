"""What a transformer block may leave behind where ComfyUI records the block's allocations and replays them.

Newer releases do so on CUDA (comfy.model_prefetch): memory that a block takes and has not given back at its end breaks
the recording, and memory of a block that is freed where the recorder does not see it, as `record_stream` may, ends the
process. Memory taken under the pause is ordinary memory.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

try:
    import comfy.model_prefetch as model_prefetch
except ImportError:  # Older releases neither stream weights ahead nor record.
    model_prefetch = None


def outliving_blocks() -> AbstractContextManager[None]:
    """Tensors made under this may be kept past the end of the block that they are made in."""
    pause = getattr(model_prefetch, "pause_malloc_graph", None)
    return nullcontext() if pause is None else pause()
