"""Times settings against dense at LTX-2 size on one GPU.

    python benchmarks/gpu.py [--out FILE] [--repeats 3] [--clips 2] [--only NAME ...] [--grounds NAME ...]
    python benchmarks/gpu.py --table           # only the table of the rows that are there

LTXAVModel with 48 blocks and random bf16 weights (40 GB), sampled through ComfyUI with the nodes applied.
Per ground (attention backend, where the weights lie), clip and setting: time of a step, time inside video
self-attention (CUDA events around ComfyUI's attention function), peak memory. Every row holds the dense
figures of its own process and ground. Rows that no longer fit into `--seconds` are left out and named; rows
of the output file that were measured on the same kind of GPU, PyTorch and ComfyUI and not again are kept.
"""

from __future__ import annotations

import gc
import importlib
import math
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

from runtime import PACK  # isort: split

import comfy.ldm.modules.attention as comfy_attention
import comfy.model_management as mm
import comfy.model_patcher
import comfy.ops
import lab
import ltx2
import results
import torch
from comfy.patcher_extension import WrappersMP
from gpu_report import in_order, write_tables
from gpu_settings import CARD_GIB, DENSE, FLOOR, GROUNDS, ORDER, SETTINGS, Ground, Setting
from sampling import patch
from torch.nn.attention import SDPBackend


class Stopwatch:
    """CUDA event pairs around pieces of work, read after the fact."""

    def __init__(self) -> None:
        self.pairs: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    @contextmanager
    def __call__(self) -> Iterator[None]:
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        yield
        stop.record()
        self.pairs.append((start, stop))

    def milliseconds(self) -> list[float]:
        torch.cuda.synchronize()
        return [start.elapsed_time(stop) for start, stop in self.pairs]


def measure(model: Any, clip: ltx2.Clip, repeats: int) -> dict[str, Any]:
    """Median milliseconds of a step and of its video self-attention, and peak GiB."""
    frames, height, width = clip.grid
    video_tokens = frames * height * width
    steps, attention = Stopwatch(), Stopwatch()
    stock = comfy_attention.optimized_attention

    def timed_attention(q: Any, k: Any, *args: Any, **kwargs: Any) -> Any:
        if q.shape[1] == k.shape[1] == video_tokens:
            with attention():
                return stock(q, k, *args, **kwargs)
        return stock(q, k, *args, **kwargs)

    def timed_step(executor: Any, *args: Any, **kwargs: Any) -> Any:
        with steps():
            return executor(*args, **kwargs)

    model = model.clone()
    model.add_wrapper_with_key(WrappersMP.APPLY_MODEL, "benchmark", timed_step)
    torch.cuda.reset_peak_memory_stats()
    comfy_attention.optimized_attention = timed_attention
    try:
        ltx2.sample(model, clip, repeats + 1, "cuda")
    finally:
        comfy_attention.optimized_attention = stock
    blocks = len(attention.pairs) // len(steps.pairs)
    calls = attention.milliseconds()
    per_step = [sum(calls[i * blocks : (i + 1) * blocks]) for i in range(repeats + 1)]
    weights = sum(p.nbytes for p in model.model.parameters() if p.is_cuda)
    return {
        "video_tokens": video_tokens,
        "step_ms": statistics.median(steps.milliseconds()[1:]),
        "attention_ms": statistics.median(per_step[1:]),
        "attention_calls_a_step": blocks,
        "weights_on_gpu_gib": weights / 2**30,
        "peak_gib_above_weights": (torch.cuda.max_memory_allocated() - weights) / 2**30,
    }


def prepared(model: Any, clip: ltx2.Clip, setting: Setting) -> tuple[Any, ltx2.Clip]:
    """The model behind the setting's nodes, and the clip that it samples then."""
    if setting == FLOOR:
        return model, ltx2.Clip(1, clip.width, clip.height, sounds_for=clip.frames)
    if setting.stride is None:
        return patch(PACK, model, setting.nodes), clip
    node = importlib.import_module(f"{PACK}.nodes").KeyframeStride
    patched, latent, *_ = node.execute(model, {"samples": ltx2.empty(clip, "cpu")}, setting.stride).args
    strided = clip.strided(setting.stride)
    assert latent["samples"].unbind()[0].shape[2:] == strided.grid
    return patched, strided


def check_kernel() -> float:
    """Largest difference on this GPU between the fast path and the plain one, relative to the largest value."""
    kernel = importlib.import_module(f"{PACK}.patches.kernels.segments")
    window = importlib.import_module(f"{PACK}.patches.kernels.window")
    tokens = importlib.import_module(f"{PACK}.patches.kernels.tokens").VideoTokens.grid(
        16, 22, 40, guides=880
    )
    q, k, v = (torch.randn(2, tokens.total, 1024, device="cuda", dtype=torch.bfloat16) for _ in range(3))

    def attend(q: Any, k: Any, v: Any, mask: Any) -> Any:
        return comfy_attention.optimized_attention(q, k, v, 8, mask=mask)

    worst = 0.0
    for size, sinks in ((1, 0), (1, 1), (4, 2)):
        segments = window.window_segments(tokens, size, sinks)
        plain = kernel.attend_segments(q, k, v, None, range(tokens.total), segments, attend)
        fast = kernel.attend_batched(q, k, v, None, range(tokens.total), segments, attend)
        worst = max(worst, ((fast - plain).abs().max() / plain.abs().max()).item())
    return worst


@contextmanager
def standing_on(ground: Ground, model: Any) -> Iterator[Any]:
    """The model as the ground has it: this attention backend where it can, never math; weights where it says."""
    with mock.patch.object(
        comfy.ops, "SDPA_BACKEND_PRIORITY", [ground.backend, SDPBackend.EFFICIENT_ATTENTION]
    ):
        if not ground.is_streamed:
            yield model
            return
        mm.unload_all_models()
        model.model.to("cpu")
        gc.collect()
        torch.cuda.empty_cache()
        print(f"left on the GPU: {torch.cuda.memory_allocated() / 2**30:.2f} GiB", flush=True)
        limit = int(CARD_GIB * 2**30)
        total = torch.cuda.mem_get_info()[1]
        # The allocator refuses what the small card has not, and ComfyUI is told what is left of it.
        torch.cuda.set_per_process_memory_fraction(limit / total)
        try:
            with mock.patch.object(
                torch.cuda, "mem_get_info", lambda *_: (limit - torch.cuda.memory_reserved(), limit)
            ):
                yield comfy.model_patcher.ModelPatcher(
                    model.model, load_device=model.load_device, offload_device=torch.device("cpu")
                )
                mm.unload_all_models()
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0)
            model.model.to("cuda")


def main() -> None:
    parser = results.asking(__doc__, "gpu", seconds=480, table=True)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument(
        "--clips", type=int, default=len(ltx2.CLIPS), help="so many clips, most telling first"
    )
    parser.add_argument("--only", nargs="+", help="settings by name besides dense, such as '±1, 0 sink'")
    parser.add_argument("--grounds", nargs="+", help="backends and placements by name, such as cuDNN")
    options = parser.parse_args()
    if options.table:
        write_tables(results.read(options.out), options.out)
        return
    begin = time.monotonic()
    report: dict[str, Any] = {
        **lab.machine("cuda"),
        "attention": getattr(comfy_attention.optimized_attention, "__name__", "unknown"),
        "model": "LTXAVModel, 48 blocks, 32×128 heads, random bf16 weights",
        "card_gib": CARD_GIB,
        "fast_against_plain": check_kernel(),
        "rows": [],
        "left_out": [],
    }
    kept = kept_rows(options.out, report)
    model = ltx2.build_ltx2("cuda")
    for ground in GROUNDS:
        if options.grounds and ground.name not in options.grounds:
            continue
        with standing_on(ground, model) as placed:
            for index in [i for i in ORDER if i < ground.clips][: options.clips]:
                clip = ltx2.CLIPS[index]
                dense: dict[str, Any] = {}
                for setting in SETTINGS:
                    if setting.name not in ground.settings:
                        continue
                    if options.only and setting != DENSE and setting.name not in options.only:
                        continue
                    if time.monotonic() - begin > options.seconds:
                        report["left_out"].append(f"{ground.name}, {clip.name}, {setting.name}")
                        continue
                    if ground.is_streamed:
                        # Every setting begins with its weights in the same place.
                        mm.unload_all_models()
                    figures = measure(*prepared(placed, clip, setting), options.repeats)
                    dense = figures if setting == DENSE else dense
                    row: dict[str, Any] = {"ground": ground.name, "clip": clip.name, "grid": clip.grid}
                    row |= {
                        "setting": setting.name,
                        **{k: v for k, v in figures.items() if k != "video_tokens"},
                    }
                    row |= {
                        f"dense_{key}": dense[key]
                        for key in ("step_ms", "attention_ms", "peak_gib_above_weights")
                    }
                    row["step_of_dense"] = row["step_ms"] / dense["step_ms"]
                    row["attention_of_dense"] = row["attention_ms"] / dense["attention_ms"]
                    row["token_share"] = figures["video_tokens"] / math.prod(clip.grid)
                    if setting.window is not None:
                        seen = min(1.0, (2 * setting.window + 1) / clip.grid[0])
                        row["attention_over_key_share"] = row["attention_of_dense"] / seen
                    kept[ground.name, clip.name, setting.name] = row
                    report["rows"] = in_order(kept)
                    print({key: value for key, value in row.items() if key != "grid"}, flush=True)
                    results.save(report, options.out)
    write_tables(report, options.out)


def kept_rows(path: Path, report: dict[str, Any]) -> dict[tuple[str, str, str], dict[str, Any]]:
    """Rows of an earlier run by ground, clip and setting, if it ran on the same kind of machine."""
    earlier = results.read(path, {})
    same = ("gpu", "torch", "comfyui", "attention", "model", "card_gib")
    if any(earlier.get(key) != report[key] for key in same):
        return {}
    return {(row["ground"], row["clip"], row["setting"]): row for row in earlier["rows"]}


if __name__ == "__main__":
    main()
