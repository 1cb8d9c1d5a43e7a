"""The methods of in-betweening by name: what tells their motion, and the room they take."""

from __future__ import annotations

from typing import Any

import comfy.model_management as mm
import torch

from . import guided, interpolate, raft
from .interpolate import LINEAR, SMOOTH, Estimate
from .motion import estimate_motion

MOTION, OPTICAL_FLOW = "motion", "optical_flow"
METHODS = (LINEAR, SMOOTH, MOTION, OPTICAL_FLOW)


def estimate_for(method: str, optical_flow: Any = None) -> Estimate | None:
    """What tells the motion for `method`, None if it looks for none. optical_flow: a ModelPatcher around RAFT.

    Raises ValueError where RAFT is needed and is not there.
    """
    if method != OPTICAL_FLOW:
        return estimate_motion if method == MOTION else None
    if optical_flow is None:
        raise ValueError(
            "optical_flow: method optical_flow needs a model here. Connect core's Load Optical Flow Model, or Thrift "
            "Load Optical Flow on releases without it, with torchvision's raft_large or raft_small weights in "
            "models/optical_flow/ (raft_large_C_T_SKHT_V2-ff5fadd5.pth is the usual file); or choose method motion, "
            "which needs no model."
        )
    if not hasattr(getattr(optical_flow, "model", None), "update_block"):
        raise ValueError(
            "optical_flow: expected torchvision's RAFT from an optical flow loader, got "
            f"{type(getattr(optical_flow, 'model', optical_flow)).__name__}."
        )
    return raft.Raft(optical_flow.model)


def make_room(
    method: str, optical_flow: Any, shape: tuple[int, ...], device: torch.device, is_guided: bool = False
) -> None:
    """Asks ComfyUI for what in-betweening a clip [B, C, N, H, W] of this shape takes on the device, or by a reference."""
    needed = max(interpolate.memory_used(shape), guided.memory_used(shape) if is_guided else 0)
    if method == OPTICAL_FLOW:
        mm.load_models_gpu([optical_flow], memory_required=needed + raft.memory_used(*shape[-2:]))
    else:
        mm.free_memory(needed + mm.extra_reserved_memory(), device)
