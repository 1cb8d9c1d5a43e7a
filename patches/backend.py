"""ComfyUI's attention functions: which are in force, in which types they compute, and what a checkpoint brings itself."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import comfy.ldm.modules.attention as attention
import comfy.model_management as mm
import torch

AttentionFunction = Callable[..., torch.Tensor]

# Kernels that take half types only: ComfyUI logs an error or a warning at every call with another, and computes it elsewise.
HALF_ONLY = ("attention_sage", "attention_flash")
# Those that heed masks of any kind.
MASKING = (
    "attention_pytorch",
    "attention_basic",
    "attention_sub_quad",
    "attention_split",
    "attention_xformers",
)
# Those that heed a request to compute logits in float32.
UPCASTING = ("attention_basic", "attention_sub_quad", "attention_split")


def in_force() -> tuple[AttentionFunction, AttentionFunction]:
    """What models call for attention without and with a mask. Spatio-temporal guidance exchanges it while a block runs."""
    return attention.optimized_attention, attention.optimized_attention_masked


def of_checkpoint(module: Any) -> AttentionFunction | None:
    """The attention that the checkpoint names for this module, where ComfyUI knows of such."""
    own: AttentionFunction | None = getattr(getattr(module, "comfy_attention", None), "function", None)
    return own


def takes_float32() -> bool:
    """Whether ComfyUI's attention in force computes float32 in float32."""
    return _name() not in HALF_ONLY


def takes_masks() -> bool:
    """Whether ComfyUI's attention in force is known to heed masks: builds of others may drop them without a word."""
    return _name(masked=True) in MASKING


def _name(masked: bool = False) -> str:
    return getattr(in_force()[masked], "__name__", "")


def upcasts(dtype: torch.dtype) -> bool:
    """Whether ComfyUI's attention in force is told to compute the logits of this type in float32, as on some Macs."""
    is_told = dtype != torch.float32 and attention.get_attn_precision(None, dtype) == torch.float32
    return is_told and _name() in UPCASTING


def fast_dtype(device: torch.device, own: torch.dtype) -> torch.dtype:
    """The type in which this device is fast at attention, by ComfyUI's own judgement; `own` where nothing is faster.

    A half type that the device does fast stays: the other one would change numbers and save nothing. bfloat16 before
    float16, for its range.
    """
    if device.type == "cpu":
        return own
    fast = [
        dtype
        for dtype, is_fast in ((torch.bfloat16, mm.should_use_bf16), (torch.float16, mm.should_use_fp16))
        if is_fast(device)
    ]
    fast = [dtype for dtype in fast if not upcasts(dtype)]
    return own if own in fast else next(iter(fast), torch.float32)
