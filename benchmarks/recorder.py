"""What our nodes cost ComfyUI's recorder of allocations, which releases from about 0.35 on have: breaks and rogues a prompt.

    COMFYUI_PATH=<such a release> python benchmarks/recorder.py [--out FILE]

LTXAVModel with 8 blocks of LTX-2's width and random bf16 weights on one GPU, 6 Euler steps, with comfy_aimdo's own recorder. A
break is a pattern of allocations that was not met before; a rogue is memory of a block that outlives it. Every prompt is
sampled three times; the samples with the recorder are compared with those without it, bit for bit.
"""

from __future__ import annotations

import os
from typing import Any

os.environ.setdefault("PYTORCH_ALLOC_CONF", "backend:cudaMallocAsync")

import comfy_aimdo.control

# It replaces what PyTorch takes memory with, so it comes before PyTorch.
comfy_aimdo.control.init()

from runtime import PACK  # isort: split

import importlib
import logging
import re

import comfy.cli_args
import comfy.memory_management
import comfy.model_prefetch
import comfy.samplers
import lab
import ltx2
import results
import torch

CLIP, STEPS, BLOCKS = ltx2.Clip(49, 640, 352), 6, 8
SCOPES = ("whole blocks", "per-frame work", "spatial attention")


class Counts(logging.Handler):
    """The breaks and rogues that ComfyUI logs at the end of a prompt."""

    def __init__(self) -> None:
        super().__init__()
        self.last: tuple[int, int] | None = None

    def emit(self, record: logging.LogRecord) -> None:
        found = re.search(r"graph breaks: (\d+), rogues: (\d+)", record.getMessage())
        if found:
            self.last = int(found[1]), int(found[2])


class Perturbed(comfy.samplers.CFGGuider):
    """A second pass over the same cond without audio to video, as guidance nodes make it."""

    def predict_noise(self, x: Any, timestep: Any, model_options: Any, seed: Any = None) -> Any:
        calc, conds = comfy.samplers.calc_cond_batch, [self.conds["positive"]]
        plain = calc(self.inner_model, conds, x, timestep, model_options)[0]
        options = {**model_options, "transformer_options": {**model_options["transformer_options"]}}
        options["transformer_options"] |= {"a2v_cross_attn": False, "v2a_cross_attn": False}
        other = calc(self.inner_model, conds, x, timestep, options)[0]
        return plain + 0.5 * (plain - other)


def prompts(model: Any) -> dict[str, Any]:
    """The MODELs to sample, by what they are."""
    nodes = importlib.import_module(f"{PACK}.nodes")

    def frozen(**settings: Any) -> Any:
        given = {"start_percent": 0.0, "end_percent": 1.0, "refresh_every": 2, **settings}
        return nodes.ScheduleSpatialFreeze.execute(model, **given).args[0]

    def windowed(patcher: Any) -> Any:
        return nodes.ApplyTemporalWindow.execute(
            patcher, window=1, sink_frames=1, start_percent=0.0, end_percent=1.0, dense_blocks=0
        ).args[0]

    rows: dict[str, Any] = {"stock": model, "window": windowed(model)}
    for scope in SCOPES:
        for forecast in ("hold", "linear"):
            for place in ("gpu", "cpu"):
                for dtype in ("default", "fp8_e4m3fn"):
                    settings = {
                        "scope": scope,
                        "forecast": forecast,
                        "cache_device": place,
                        "cache_dtype": dtype,
                    }
                    rows[", ".join(settings.values())] = frozen(**settings)
    rows["whole blocks, linear, cpu + window"] = windowed(frozen(scope=SCOPES[0], cache_device="cpu"))
    return rows


def sampled(model: Any, guider_class: Any) -> list[torch.Tensor]:
    with torch.inference_mode():
        guider = guider_class(model)
        generator = torch.Generator().manual_seed(0)
        text = torch.randn(1, ltx2.TEXT_TOKENS, 2 * 3840, generator=generator).cuda()
        cond = [[text, {"frame_rate": 24.0}]]
        guider.set_conds(cond, cond)
        guider.set_cfg(1.0)
        empty = ltx2.empty(CLIP, "cpu")
        noise = type(empty)([torch.randn(part.shape, generator=generator) for part in empty.unbind()])
        out = guider.sample(
            noise,
            empty,
            comfy.samplers.sampler_object("euler"),
            torch.linspace(1, 0, STEPS + 1),
            disable_pbar=True,
            seed=0,
        )
        return [part.cpu() for part in out.unbind()]


def main() -> None:
    out = results.asking(__doc__, "recorder").parse_args().out
    counts = Counts()
    logging.getLogger().addHandler(counts)
    logging.getLogger().setLevel(logging.INFO)
    comfy_aimdo.control.init_device(0)
    torch.empty(1, device="cuda")
    model = ltx2.build_ltx2("cuda", blocks=BLOCKS)
    # The first run of a process may take other kernels than all later ones.
    sampled(model, comfy.samplers.CFGGuider)
    rows = []
    for guider in (comfy.samplers.CFGGuider, Perturbed):
        for name, patched in prompts(model).items():
            comfy.memory_management.aimdo_enabled = False
            expected = sampled(patched, guider)
            comfy.memory_management.aimdo_enabled = True
            row: dict[str, Any] = {
                "passes": 1 + (guider is Perturbed),
                "nodes": name,
                "breaks": [],
                "rogues": [],
            }
            for _ in range(3):
                result = sampled(patched, guider)
                comfy.model_prefetch.cleanup_prefetch_queues()
                if counts.last is None:
                    raise RuntimeError(
                        "ComfyUI recorded nothing: it needs CUDA and a release from about 0.35 on."
                    )
                row["breaks"].append(counts.last[0])
                row["rogues"].append(counts.last[1])
                row["same"] = all(torch.equal(a, b) for a, b in zip(result, expected, strict=True))
            rows.append(row)
            results.save({**lab.machine("cuda"), "rows": rows}, out)
    head = ("passes", "nodes", "breaks", "rogues", "same bits")
    print(results.table(head, [list(map(str, row.values())) for row in rows]))


if __name__ == "__main__":
    main()
