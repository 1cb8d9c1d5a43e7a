"""What the GPU table compares: settings, and the grounds they are compared on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import ltx2
from torch.nn.attention import SDPBackend

# What an 8 GB card leaves to ComfyUI beside the desktop and CUDA itself.
CARD_GIB = 7.2


@dataclass(frozen=True)
class Setting:
    """Nodes between loader and sampler; how far a query of theirs sees; KeyframeStride's stride."""

    name: str
    nodes: tuple[tuple[str, dict[str, Any]], ...] = ()
    window: int | None = None
    stride: int | None = None


@dataclass(frozen=True)
class Ground:
    """What a comparison stands on: the backend of PyTorch's attention, and whether weights are streamed."""

    name: str
    backend: SDPBackend
    settings: tuple[str, ...]
    is_streamed: bool = False
    clips: int = len(ltx2.CLIPS)


def windowed(window: int, sink: int) -> Setting:
    inputs = {"window": window, "sink_frames": sink, "start_percent": 0.0, "end_percent": 1.0}
    name = f"±{window}, {sink} sink"
    return Setting(name, (("ApplyTemporalWindow", {**inputs, "dense_blocks": 0}),), window)


DENSE = Setting("dense")
WINDOWS = tuple(windowed(window, sink) for sink in (0, 1) for window in (1, 2, 4))
# What is left of a step when hardly any video is: a clip of one latent frame, with the whole audio.
FLOOR = Setting("1 latent frame", stride=0)
STRIDES = (Setting("stride 2", stride=2), Setting("stride 4", stride=4), FLOOR)
SETTINGS = (DENSE, *WINDOWS, *STRIDES)
DEFAULT = "±4, 1 sink"
GROUNDS = (
    Ground("flash", SDPBackend.FLASH_ATTENTION, ("dense", *(setting.name for setting in WINDOWS))),
    Ground("cuDNN", SDPBackend.CUDNN_ATTENTION, ("dense", DEFAULT)),
    Ground("flash, strides", SDPBackend.FLASH_ATTENTION, ("dense", *(s.name for s in STRIDES)), clips=2),
    Ground("flash, streamed", SDPBackend.FLASH_ATTENTION, ("dense", DEFAULT), is_streamed=True, clips=3),
)
ORDER = (1, 3, 0, 2, 4)
