"""What the pack costs where it does nothing: a step with every technique mounted and none acting, against stock.

    python benchmarks/overhead.py [--out FILE] [--pack PATH ...] [--rounds 5] [--seconds 480]
    python benchmarks/overhead.py --device cpu --blocks 2 --steps 4 --rounds 2    # for a look

LTXAVModel with 48 blocks and random bf16 weights, and a clip of one latent frame, where a GPU waits for Python. 24 Euler
steps without CFG, sampled through ComfyUI: stock, the first setting, stock, the second one, and so on. A setting's time is
compared with the mean of the two stock runs around it, so that drift cancels; stock itself is one of the settings and tells
how far such a comparison can be trusted. Times of a step lie between two of the sampler's callbacks; of those of a run the
lower quartile counts. `--pack`: checkouts to measure instead of this one, of any commit; all in one process.

`hooks_ms` is what of a step passes within the pack's own wrappers, by Python's clock and without what they wrap, in a run
of its own. It holds whatever they wait for the GPU, and not what they put over modules.
"""

from __future__ import annotations

import argparse
import importlib
import json
import logging
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent

import runtime  # isort: split

import ltx2
import torch
from comfy.patcher_extension import WrappersMP
from comfyui_version import __version__ as comfyui_version
from sampling import patch

import comfyui_tree

# Sampling ends at a noise level of 0.5, long before that.
LATE = {"start_percent": 0.99, "end_percent": 1.0}
WINDOW = {"window": 1, "sink_frames": 0, "dense_blocks": 0}
STOCK, OUTSIDE, COVERED = "stock", "all three outside their range", "window that covers the clip"


@dataclass(frozen=True)
class Setting:
    """mounted(model): the model behind the nodes of one pack."""

    pack: str
    name: str
    mounted: Callable[[Any], Any]


def settings_of(pack: str, module: str, clip: ltx2.Clip) -> list[Setting]:
    """Those of the pack that was loaded under the name `module`; only its nodes are called."""
    # One latent frame cannot be thinned; a MODEL that was made for a longer clip leaves it alone.
    full = clip if clip.grid[0] > 1 else ltx2.Clip(97, clip.width, clip.height)

    def outside(model: Any) -> Any:
        late = [("ApplyTemporalWindow", {**WINDOW, **LATE}), ("ScheduleSpatialFreeze", LATE)]
        node = importlib.import_module(f"{module}.nodes").KeyframeStride
        return node.execute(patch(module, model, late), {"samples": ltx2.empty(full, "cpu")}, 2).args[0]

    def covered(model: Any) -> Any:
        window = {**WINDOW, "window": max(1, clip.grid[0] // 2), "start_percent": 0.0, "end_percent": 1.0}
        return patch(module, model, [("ApplyTemporalWindow", window)])

    return [Setting(pack, OUTSIDE, outside), Setting(pack, COVERED, covered)]


class Ticks:
    """A callback of the sampler that notes when the device comes to it."""

    def __init__(self, device: str) -> None:
        self.is_cuda, self.all = device == "cuda", []

    def __call__(self, *_: Any) -> None:
        if not self.is_cuda:
            self.all.append(time.perf_counter())
            return
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        self.all.append(event)

    def milliseconds(self) -> float:
        """The time from one to the next that three of four exceed: what others do on the machine comes on top of it."""
        pairs = list(zip(self.all, self.all[1:], strict=False))
        if self.is_cuda:
            torch.cuda.synchronize()
        times = [a.elapsed_time(b) if self.is_cuda else (b - a) * 1000 for a, b in pairs]
        return statistics.quantiles(times, n=4)[0] if len(times) > 1 else times[0]


def step_ms(model: Any, clip: ltx2.Clip, steps: int, device: str) -> tuple[float, Any]:
    """Milliseconds of a step after the first, and the samples."""
    ticks = Ticks(device)
    torch.manual_seed(0)
    samples = ltx2.sample(model, clip, steps, device, ticks)
    return ticks.milliseconds(), samples


def hooks_ms(setting: Setting, model: Any, clip: ltx2.Clip, steps: int, device: str) -> float:
    """Mean milliseconds of a step between wrappers right outside of the pack's and wrappers right inside of them."""
    spent = 0.0

    def timed(sign: int) -> Callable[..., Any]:
        def wrapper(executor: Any, *args: Any, **kwargs: Any) -> Any:
            nonlocal spent
            begun = time.perf_counter()
            try:
                return executor(*args, **kwargs)
            finally:
                spent += sign * (time.perf_counter() - begun)

        return wrapper

    kinds = (WrappersMP.PREDICT_NOISE, WrappersMP.APPLY_MODEL, WrappersMP.DIFFUSION_MODEL)
    outer = model.clone()
    for kind in kinds:
        outer.add_wrapper_with_key(kind, "outside", timed(1))
    inner = setting.mounted(outer).clone()
    for kind in kinds:
        inner.add_wrapper_with_key(kind, "inside", timed(-1))
    step_ms(inner, clip, steps, device)
    return spent / steps * 1000


def is_same(one: Any, other: Any) -> bool:
    """Random weights of 48 blocks may lead anywhere: a NaN is as good as another."""
    pairs = zip(one.unbind(), other.unbind(), strict=True)
    return all(torch.equal(a.nan_to_num(7.0), b.nan_to_num(7.0)) for a, b in pairs)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=HERE / "overhead.json")
    parser.add_argument("--pack", type=Path, nargs="+", default=[HERE.parent], help="checkouts of the pack")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--frames", type=int, default=1, help="video frames of the clip")
    parser.add_argument("--size", type=int, nargs=2, default=(896, 512), metavar=("WIDTH", "HEIGHT"))
    parser.add_argument("--seconds", type=float, default=480, help="start no round that would end later")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--blocks", type=int, default=ltx2.BLOCKS, help="fewer for a look on a CPU")
    options = parser.parse_args()
    begin = time.monotonic()
    # Every run says that nothing was in range.
    logging.disable(logging.WARNING)
    device, steps = options.device, options.steps
    clip = ltx2.Clip(options.frames, *options.size, sounds_for=max(97, options.frames))
    settings = [Setting("", STOCK, lambda model: model)]
    for number, path in enumerate(folder.resolve() for folder in options.pack):
        module = runtime.PACK
        if path != HERE.parent:
            # Folders of one name are packs of their own.
            module = comfyui_tree.load_pack(f"custom_nodes pack {number}", path).__name__
        settings += settings_of(path.name, module, clip)
    report: dict[str, Any] = {
        "gpu": torch.cuda.get_device_name() if device == "cuda" else "none (CPU)",
        "torch": torch.__version__,
        "comfyui": comfyui_version,
        "blocks": options.blocks,
        "clip": clip.name,
        "steps": steps,
    }
    with torch.inference_mode():
        stock = ltx2.build_ltx2(device, blocks=options.blocks)
        models = [setting.mounted(stock) for setting in settings]
        _, expected = step_ms(stock, clip, steps, device)
        rows: list[dict[str, Any]] = []
        for setting, model in zip(settings, models, strict=True):
            _, samples = step_ms(model, clip, 2, device)
            rows.append({"pack": setting.pack, "setting": setting.name, "stock_ms": [], "ours_ms": []})
            rows[-1]["hooks_ms"] = hooks_ms(setting, stock, clip, steps, device)
        for _ in range(options.rounds):
            round_begin = time.monotonic()
            before, _ = step_ms(stock, clip, steps, device)
            for row, model in zip(rows, models, strict=True):
                ours, samples = step_ms(model, clip, steps, device)
                after, _ = step_ms(stock, clip, steps, device)
                row["stock_ms"].append((before + after) / 2)
                row["ours_ms"].append(ours)
                row["same_bits"] = row.get("same_bits", True) and is_same(samples, expected)
                before = after
            report["rows"] = [summed_up(row) for row in rows]
            options.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
            if 2 * time.monotonic() - round_begin > begin + options.seconds:
                break
    print(table(report))


def summed_up(row: dict[str, Any]) -> dict[str, Any]:
    """The row with its ratios, one a round, and the middle and the ends of them."""
    ratios = [ours / stock for ours, stock in zip(row["ours_ms"], row["stock_ms"], strict=True)]
    ends = {"median": statistics.median(ratios), "lowest": min(ratios), "highest": max(ratios)}
    return {**row, "ratios": ratios, **ends}


def table(report: dict[str, Any]) -> str:
    """Markdown, one row per pack and setting."""
    out = ["| pack | setting | stock | step of stock | lowest to highest | own hooks | same bits |"]
    out.append("|---" * 7 + "|")
    for row in report["rows"]:
        cells = [row["pack"], row["setting"], f"{statistics.median(row['stock_ms']):.1f} ms"]
        cells += [f"{row['median']:.2%}", f"{row['lowest']:.2%} to {row['highest']:.2%}"]
        cells += [f"{row['hooks_ms']:.2f} ms", str(row["same_bits"])]
        out.append("| " + " | ".join(cells) + " |")
    return "\n".join(out) + "\n"


if __name__ == "__main__":
    main()
