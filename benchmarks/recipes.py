"""Times whole recipes at LTX-2 size on one GPU: sampling, decoding and what lies between them.

    python benchmarks/recipes.py [--out FILE] [--clips 2]

LTXAVModel with 48 blocks and a video VAE of LTX's layout, both with random bf16 weights, 8 steps on LTX-2's
distilled sigmas without CFG. Every recipe ends with frames at the full rate and runs twice; the second counts.
"""

from __future__ import annotations

import argparse
import importlib
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent

from runtime import PACK  # isort: split

import comfy.model_management as mm
import comfy.model_patcher
import comfy.sample
import comfy.samplers
import comfy.sd
import ltx2
import torch
from comfy.ldm.lightricks.vae.causal_video_autoencoder import VideoVAE
from comfyui_version import __version__ as comfyui_version

from tiny_ltx.model import STUDENT_RECIPE

SIGMAS = STUDENT_RECIPE.sigmas
# The first stage of coarse to fine stops before the step from 0.725.
SWITCH = 6


def build_vae() -> Any:
    """comfy.sd.VAE of LTX's layout (0.9.5) with random weights."""
    with torch.device(mm.get_torch_device()):
        state = {key: value.to(torch.bfloat16) for key, value in VideoVAE(version=2).state_dict().items()}
    return comfy.sd.VAE(sd=state)


def build_flow() -> Any:
    from torchvision.models.optical_flow import raft_large

    device = mm.get_torch_device()
    model = raft_large(weights=None, progress=False).eval().to(device)
    return comfy.model_patcher.ModelPatcher(model, load_device=device, offload_device=device)


class Recipes:
    """Each recipe is a method that takes a clip and leaves frames; `spent` holds the seconds of its parts."""

    def __init__(self) -> None:
        self.model, self.vae, self.flow = ltx2.build_ltx2("cuda"), build_vae(), build_flow()
        nodes = importlib.import_module(f"{PACK}.nodes")
        self.stride, self.fill = nodes.KeyframeStride.execute, nodes.LatentFlowInterpolate.execute
        self.spent: dict[str, float] = {}

    def timed(self, part: str, work: Callable[[], Any]) -> Any:
        torch.cuda.synchronize()
        begun = time.perf_counter()
        out = work()
        torch.cuda.synchronize()
        self.spent[part] = self.spent.get(part, 0.0) + time.perf_counter() - begun
        return out

    def sample(self, model: Any, latent: Any, sigmas: tuple[float, ...]) -> Any:
        def work() -> Any:
            return comfy.sample.sample_custom(
                model,
                comfy.sample.prepare_noise(latent, 0),
                1.0,
                comfy.samplers.sampler_object("euler"),
                torch.tensor(sigmas),
                ltx2.conditioning("cuda"),
                ltx2.conditioning("cuda"),
                latent,
                disable_pbar=True,
                seed=0,
            )

        return self.timed("sampling", work)

    def decode(self, latent: Any) -> Any:
        return self.timed("decoding", lambda: self.vae.decode(latent.unbind()[0]))

    def dense(self, clip: ltx2.Clip) -> Any:
        return self.decode(self.sample(self.model, ltx2.empty(clip, "cpu"), SIGMAS))

    def strided(self, clip: ltx2.Clip, stride: int, method: str) -> Any:
        model, latent, *_ = self.stride(self.model, {"samples": ltx2.empty(clip, "cpu")}, stride).args
        latent = {**latent, "samples": self.sample(model, latent["samples"], SIGMAS)}
        fill = {"vae": self.vae, "optical_flow": self.flow, "encode": False}
        return self.timed("decoding and in-betweening", lambda: self.fill(latent, method, **fill).args[1])

    def coarse_to_fine(self, clip: ltx2.Clip) -> Any:
        model, latent, *_ = self.stride(self.model, {"samples": ltx2.empty(clip, "cpu")}, 2).args
        latent = {**latent, "samples": self.sample(model, latent["samples"], SIGMAS[: SWITCH + 1])}
        fill = self.timed(
            "decoding, in-betweening and encoding", lambda: self.fill(latent, "motion", vae=self.vae).args[0]
        )
        return self.decode(self.sample(model, fill["samples"], SIGMAS[SWITCH:]))


RECIPES: dict[str, Callable[[Recipes, ltx2.Clip], Any]] = {
    "dense": Recipes.dense,
    "stride 2, motion": lambda recipes, clip: recipes.strided(clip, 2, "motion"),
    "stride 2, RAFT large": lambda recipes, clip: recipes.strided(clip, 2, "optical_flow"),
    "stride 4, motion": lambda recipes, clip: recipes.strided(clip, 4, "motion"),
    "stride 2, full length from σ 0.725": Recipes.coarse_to_fine,
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=HERE / "recipes.json")
    parser.add_argument("--clips", type=int, default=2, help="so many of the clips in ltx2.py")
    options = parser.parse_args()
    report: dict[str, Any] = {
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "comfyui": comfyui_version,
        "sigmas": SIGMAS,
        "rows": [],
    }
    with torch.inference_mode():
        recipes = Recipes()
        for clip in ltx2.CLIPS[: options.clips]:
            for name, run in RECIPES.items():
                for _ in range(2):
                    recipes.spent = {}
                    frames = run(recipes, clip)
                assert frames.shape[-4] == clip.frames, f"{name}: {tuple(frames.shape)}"
                total = sum(recipes.spent.values())
                dense = total if name == "dense" else report["rows"][-1]["dense_seconds"]
                row = {"clip": clip.name, "recipe": name, "seconds": total, "parts": recipes.spent}
                report["rows"].append({**row, "dense_seconds": dense, "of_dense": total / dense})
                print(report["rows"][-1], flush=True)
                options.out.write_text(json.dumps(report, indent=1) + "\n")
    options.out.with_suffix(".md").write_text(table(report))
    print(table(report))


def table(report: dict[str, Any]) -> str:
    """Markdown, one row per recipe and clip."""
    out = ["| clip | recipe | seconds | of dense | sampling | rest |", "|---" * 6 + "|"]
    for row in report["rows"]:
        sampling = row["parts"]["sampling"]
        cells = [row["clip"], row["recipe"], f"{row['seconds']:.1f}", f"{row['of_dense']:.0%}"]
        cells += [f"{sampling:.1f}", f"{row['seconds'] - sampling:.1f}"]
        out.append("| " + " | ".join(cells) + " |")
    return "\n".join(out) + "\n"


if __name__ == "__main__":
    main()
