"""A graph in ComfyUI's API format: the tiny model between stock nodes, with or without our node."""

from __future__ import annotations

from typing import Any

WINDOW = "window"
SAMPLER = "sample"
VIDEO = "save"


def build_graph(
    window: dict[str, Any] | None = None,
    *,
    frames: int = 97,
    size: int = 256,
    steps: int = 16,
    seed: int = 7,
    cfg: float = 2.0,
    frame_rate: float = 24.0,
    caption: dict[str, str] | None = None,
    name: str = "clip",
) -> dict[str, dict[str, Any]]:
    """A clip of `frames` video frames of `size` × `size` pixels.

    Args:
        window: Inputs of ApplyTemporalWindow, or None for the stock graph.
        caption: Inputs of the tiny model's loader.
        name: What the video file is called.
    """
    caption = caption or {
        "shape": "ring",
        "direction": "horizontal",
        "speed": "medium",
        "second_shape": "none",
    }
    graph = {
        "tiny": _node("ThriftTinyLTX", **caption),
        "conditioning": _node(
            "LTXVConditioning", positive=["tiny", 1], negative=["tiny", 2], frame_rate=frame_rate
        ),
        "latent": _node("EmptyLTXVLatentVideo", width=size, height=size, length=frames, batch_size=1),
        "sigmas": _node(
            "LTXVScheduler",
            steps=steps,
            max_shift=2.05,
            base_shift=0.95,
            stretch=True,
            terminal=0.1,
            latent=["latent", 0],
        ),
        "solver": _node("KSamplerSelect", sampler_name="euler"),
        "noise": _node("RandomNoise", noise_seed=seed),
        "guider": _node(
            "CFGGuider",
            model=["tiny", 0],
            positive=["conditioning", 0],
            negative=["conditioning", 1],
            cfg=cfg,
        ),
        SAMPLER: _node(
            "SamplerCustomAdvanced",
            noise=["noise", 0],
            guider=["guider", 0],
            sampler=["solver", 0],
            sigmas=["sigmas", 0],
            latent_image=["latent", 0],
        ),
        "decode": _node("VAEDecode", samples=[SAMPLER, 0], vae=["tiny", 3]),
        "video": _node("CreateVideo", images=["decode", 0], fps=frame_rate),
        VIDEO: _node("SaveVideo", video=["video", 0], filename_prefix=name, format="mp4", codec="h264"),
    }
    if window is not None:
        graph[WINDOW] = _node("ApplyTemporalWindow", model=["tiny", 0], **window)
        graph["guider"]["inputs"]["model"] = [WINDOW, 0]
    return graph


def _node(kind: str, **inputs: Any) -> dict[str, Any]:
    return {"class_type": kind, "inputs": inputs}
