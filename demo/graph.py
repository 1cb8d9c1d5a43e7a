"""The demo's graph in ComfyUI's API format: the tiny model in two stages, with or without our nodes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

# LTX-2's own: 8 distilled steps at half the size, and 3 that refine at full size.
FIRST_SIGMAS = (1.0, 0.99375, 0.9875, 0.98125, 0.975, 0.909375, 0.725, 0.421875, 0.0)
# The same curve in half as many steps.
HALF_FIRST_SIGMAS = (1.0, 0.9875, 0.975, 0.725, 0.0)
REFINING_SIGMAS = (0.909375, 0.725, 0.421875, 0.0)

FRAMES_IMAGES = "save"
# What the nodes that take time belong to, in the order in which they run. All others load and save.
PARTS = {
    "first": "first stage",
    "thin": "upscale, encode, decode",
    "upscale": "upscale, encode, decode",
    "decode": "upscale, encode, decode",
    "second": "second stage",
    "fill": "in-betweening",
}


@dataclass(frozen=True)
class Setting:
    """One way to make the clip.

    first, second: one frame in so many is diffused in either stage. first_sigmas, sigmas: of both.
    """

    name: str
    first: int = 1
    second: int = 1
    first_sigmas: tuple[float, ...] = FIRST_SIGMAS
    sigmas: tuple[float, ...] = REFINING_SIGMAS

    @property
    def is_guided(self) -> bool:
        """Whether frames in between follow the first stage, which then has more of them than the second."""
        return self.second > self.first


def build_graph(
    setting: Setting,
    caption: dict[str, str],
    *,
    frames: int = 129,
    seed: int = 0,
    frame_rate: float = 24.0,
    zoom: int = 1,
) -> dict[str, dict[str, Any]]:
    """A clip of 64 × 64 pixels, at `zoom` as large, behind a first stage of half the size.

    Args:
        caption: Inputs of the tiny model's loader.
        zoom: 1 as in the lab, whose figures stand beside the demo's.
    """
    graph = {
        "student": _node("ThriftTinyLTX", **caption, weights="student", zoom=zoom),
        "refiner": _node("ThriftTinyLTX", **caption, weights="refiner", zoom=zoom),
        "conditioning": _node(
            "LTXVConditioning", positive=["student", 1], negative=["student", 2], frame_rate=frame_rate
        ),
        # A token stands for 32 × 32 image pixels here.
        "empty": _node("EmptyLTXVLatentVideo", width=256, height=256, length=frames, batch_size=1),
        "solver": _node("KSamplerSelect", sampler_name="euler"),
    }
    model, latent = ["student", 0], ["empty", 0]
    if setting.first > 1:
        graph["thin empty"] = _node("KeyframeStride", model=model, latent=latent, stride=setting.first)
        model, latent = ["thin empty", 0], ["thin empty", 1]
    graph |= _stage("first", model, latent, setting.first_sigmas, seed)

    model, latent = ["refiner", 0], ["first", 0]
    if setting.second > 1:
        graph["thin"] = _node(
            "KeyframeStride", model=model, latent=latent, stride=setting.second, vae=["student", 3]
        )
        model, latent = ["thin", 0], ["thin", 1]
    graph["upscale"] = _node("ThriftTinyUpscale", samples=latent)
    graph |= _stage("second", model, ["upscale", 0], setting.sigmas, seed + 1)

    if setting.second > 1:
        fill = _node(
            "LatentFlowInterpolate", latent=["second", 0], method="motion", vae=["student", 3], encode=False
        )
        if setting.is_guided:
            fill["inputs"]["reference"] = ["thin", 3]
        graph["fill"], images = fill, ["fill", 1]
    else:
        graph["decode"], images = _node("VAEDecode", samples=["second", 0], vae=["student", 3]), ["decode", 0]
    # Pictures, not a video: that would lose what is to be compared.
    graph[FRAMES_IMAGES] = _node("SaveImage", images=images, filename_prefix="clip")
    return graph


def _stage(
    name: str, model: list[Any], latent: list[Any], sigmas: tuple[float, ...], seed: int
) -> dict[str, dict[str, Any]]:
    return {
        f"{name} guider": _node("BasicGuider", model=model, conditioning=["conditioning", 0]),
        f"{name} sigmas": _node("ManualSigmas", sigmas=", ".join(map(str, sigmas))),
        f"{name} noise": _node("RandomNoise", noise_seed=seed),
        name: _node(
            "SamplerCustomAdvanced",
            noise=[f"{name} noise", 0],
            guider=[f"{name} guider", 0],
            sampler=["solver", 0],
            sigmas=[f"{name} sigmas", 0],
            latent_image=latent,
        ),
    }


def _node(kind: str, **inputs: Any) -> dict[str, Any]:
    return {"class_type": kind, "inputs": inputs}
