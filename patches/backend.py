"""ComfyUI's attention functions: which are in force, and what a checkpoint brings itself."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import comfy.ldm.modules.attention as attention
import torch

AttentionFunction = Callable[..., torch.Tensor]


def in_force() -> tuple[AttentionFunction, AttentionFunction]:
    """What models call for attention without and with a mask. Spatio-temporal guidance exchanges it while a block runs."""
    return attention.optimized_attention, attention.optimized_attention_masked


def of_checkpoint(module: Any) -> AttentionFunction | None:
    """The attention that the checkpoint names for this module, where ComfyUI knows of such."""
    own: AttentionFunction | None = getattr(getattr(module, "comfy_attention", None), "function", None)
    return own
