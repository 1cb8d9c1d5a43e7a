"""What the pack costs where it does nothing: steps with every technique mounted and none acting, beside stock ones.

    python benchmarks/overhead.py [--out FILE] [--pack PATH ...] [--rounds 3] [--steps 96] [--seconds 480]
    python benchmarks/overhead.py --device cpu --blocks 2 --steps 8 --rounds 1    # for a look

LTXAVModel with 48 blocks and random bf16 weights, and a clip of one latent frame, where a GPU waits for Python. Euler
without CFG, sampled through ComfyUI. In one and the same run every other step is stock: a wrapper around ours hands it options
without us. So both see the same machine at the same time, which others use, too. Times of a step lie between two of the
sampler's callbacks; a ratio is that of the lower quartiles, for others only make a step longer, and its interval comes from
drawing the pairs of neighbouring steps again (2.5 to 97.5 %). A run of stock alone, split the same way, tells how far that
can be trusted. `--pack`: checkouts to measure instead of this one, of any commit; all in one process.

`hooks_ms` is what of our steps passes within the pack's own wrappers, by the clock of Python's thread and without what they
wrap. It holds what they wait for the GPU, and not what they put over modules.
"""

from __future__ import annotations

import importlib
import itertools
import logging
import random
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent

import runtime  # isort: split

import lab
import ltx2
import results
import torch
from comfy.patcher_extension import WrappersMP
from sampling import patch

import comfyui_tree

# Sampling ends at a noise level of 0.5, long before that.
LATE = {"start_percent": 0.99, "end_percent": 1.0}
WINDOW = {"window": 1, "sink_frames": 0, "dense_blocks": 0}
# No GPU gets as hot as that.
COOL = {"target_temperature": 100}
OURS = "frame_thrift"
STOCK, OUTSIDE, COVERED = "stock", "every technique, none acting", "window that covers the clip"
PACED = "pacing with nothing to do"
NEWER: dict[str, dict[str, Any]] = {
    "ThriftLowRankAttention": LATE,
    "ThriftAttentionPrecision": {"self_attention": "bf16", "text_attention": "bf16"},
    "ThriftPaceGPU": COOL,
}


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
        late: list[tuple[str, dict[str, Any]]] = [
            ("ApplyTemporalWindow", {**WINDOW, **LATE}),
            ("ScheduleSpatialFreeze", LATE),
        ]
        nodes = importlib.import_module(f"{module}.nodes")
        # Older commits lack some of these.
        late += [(name, inputs) for name, inputs in NEWER.items() if hasattr(nodes, name)]
        node = nodes.KeyframeStride
        return node.execute(patch(module, model, late), {"samples": ltx2.empty(full, "cpu")}, 2).args[0]

    def covered(model: Any) -> Any:
        window = {**WINDOW, "window": max(1, clip.grid[0] // 2), "start_percent": 0.0, "end_percent": 1.0}
        return patch(module, model, [("ApplyTemporalWindow", window)])

    settings = [Setting(pack, OUTSIDE, outside), Setting(pack, COVERED, covered)]
    if hasattr(importlib.import_module(f"{module}.nodes"), "ThriftPaceGPU"):
        settings.append(Setting(pack, PACED, lambda model: patch(module, model, [("ThriftPaceGPU", COOL)])))
    return settings


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

    def milliseconds(self) -> list[float]:
        """From each to the next."""
        if self.is_cuda:
            torch.cuda.synchronize()
        pairs = zip(self.all, self.all[1:], strict=False)
        return [a.elapsed_time(b) if self.is_cuda else (b - a) * 1000 for a, b in pairs]


def alternating(model: Any) -> Any:
    """A clone whose every other step, from the first on, is stock."""
    clone, count = model.clone(), itertools.count()

    def wrapper(
        executor: Any, x: Any, timestep: Any, model_options: dict[str, Any], *args: Any, **kwargs: Any
    ) -> Any:
        if next(count) % 2 == 0:
            options = {
                k: v for k, v in model_options["transformer_options"].items() if not k.startswith(OURS)
            }
            wrappers = options.get("wrappers", {})
            options["wrappers"] = {
                kind: {key: each for key, each in keyed.items() if key != OURS}
                for kind, keyed in wrappers.items()
            }
            model_options = {**model_options, "transformer_options": options}
        return executor(x, timestep, model_options, *args, **kwargs)

    clone.add_wrapper_with_key(WrappersMP.PREDICT_NOISE, "alternating", wrapper)
    mine = clone.wrappers[WrappersMP.PREDICT_NOISE]
    clone.wrappers[WrappersMP.PREDICT_NOISE] = {"alternating": mine.pop("alternating"), **mine}
    return clone


def pairs_of(model: Any, clip: ltx2.Clip, steps: int, device: str) -> list[tuple[float, float]]:
    """Milliseconds of neighbouring steps (stock, ours), without the first of the run, whose times are its own."""
    ticks = Ticks(device)
    torch.manual_seed(0)
    ltx2.sample(alternating(model), clip, steps, device, ticks)
    times = ticks.milliseconds()[1:]
    return list(zip(times[::2], times[1::2], strict=False))


def hooks_ms(setting: Setting, model: Any, clip: ltx2.Clip, steps: int, device: str) -> float:
    """Mean of a step between wrappers right outside of the pack's and wrappers right inside of them."""
    spent = 0.0

    def timed(sign: int) -> Callable[..., Any]:
        def wrapper(executor: Any, *args: Any, **kwargs: Any) -> Any:
            nonlocal spent
            begun = time.thread_time()
            try:
                return executor(*args, **kwargs)
            finally:
                spent += sign * (time.thread_time() - begun)

        return wrapper

    kinds = (WrappersMP.PREDICT_NOISE, WrappersMP.APPLY_MODEL, WrappersMP.DIFFUSION_MODEL)
    outer = model.clone()
    for kind in kinds:
        outer.add_wrapper_with_key(kind, "outside", timed(1))
    inner = setting.mounted(outer).clone()
    for kind in kinds:
        inner.add_wrapper_with_key(kind, "inside", timed(-1))
    ltx2.sample(inner, clip, steps, device)
    return spent / steps * 1000


def main() -> None:
    parser = results.asking(__doc__, "overhead", seconds=480, device="cuda")
    parser.add_argument("--pack", type=Path, nargs="+", default=[HERE.parent], help="checkouts of the pack")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=96)
    parser.add_argument("--frames", type=int, default=1, help="video frames of the clip")
    parser.add_argument("--size", type=int, nargs=2, default=(896, 512), metavar=("WIDTH", "HEIGHT"))
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
        **lab.machine(device),
        "blocks": options.blocks,
        "clip": clip.name,
        "steps": steps,
    }
    rows: list[dict[str, Any]] = [
        {"pack": setting.pack, "setting": setting.name, "pairs": []} for setting in settings
    ]
    with torch.inference_mode():
        stock = ltx2.build_ltx2(device, blocks=options.blocks)
        models = [setting.mounted(stock) for setting in settings]
        for row, setting in zip(rows, settings, strict=True):
            row["hooks_ms"] = hooks_ms(setting, stock, clip, min(steps, 24), device)
        for number in range(options.rounds):
            round_begin = time.monotonic()
            for row, model in zip(rows, models, strict=True):
                row["pairs"] += pairs_of(model, clip, steps, device)
                row |= summed_up(row["pairs"])
            report["rows"], report["rounds"] = rows, number + 1
            results.save(report, options.out)
            if 2 * time.monotonic() - round_begin > begin + options.seconds:
                break
    print(table(report))


def summed_up(pairs: list[tuple[float, float]]) -> dict[str, float]:
    """The lower quartiles of both, their ratio, and the interval of it."""
    generator = random.Random(0)
    again = (quartiles(generator.choices(pairs, k=len(pairs))) for _ in range(1000))
    drawn = sorted(ours / stock for stock, ours in again)
    stock, ours = quartiles(pairs)
    return {"stock_ms": stock, "ours_ms": ours, "ratio": ours / stock, "low": drawn[25], "high": drawn[974]}


def quartiles(pairs: list[tuple[float, float]]) -> tuple[float, ...]:
    return tuple(statistics.quantiles(side, n=4)[0] for side in zip(*pairs, strict=True))


def table(report: dict[str, Any]) -> str:
    """Markdown, one row per pack and setting."""
    lines = []
    for row in report["rows"]:
        cells = [row["pack"], row["setting"], str(len(row["pairs"])), f"{row['stock_ms']:.1f} ms"]
        cells += [
            f"{row['ratio']:.2%}",
            f"{row['low']:.2%} to {row['high']:.2%}",
            f"{row['hooks_ms']:.2f} ms",
        ]
        lines.append(cells)
    head = ["pack", "setting", "pairs", "stock step", "step of stock", "interval", "own wrappers"]
    return results.table(head, lines) + "\n"


if __name__ == "__main__":
    main()
