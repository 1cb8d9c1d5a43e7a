"""Times windows against dense attention at LTX-2 size on one GPU.

    python benchmarks/gpu.py [--out FILE] [--repeats 3] [--clips 2] [--only NAME ...] [--seconds 480] [--table]

LTXAVModel with 48 blocks and random bf16 weights (40 GB), sampled through ComfyUI with the node applied.
Per setting and clip: time of a step, time inside video self-attention (CUDA events around ComfyUI's
attention function), peak memory. Rows that no longer fit into `--seconds` are left out and named. Rows of
the output file that were measured on the same kind of GPU, PyTorch and ComfyUI and not again are kept; each
row holds the dense times of its own process.
"""

from __future__ import annotations

import argparse
import importlib
import json
import statistics
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

import comfyui_tree

comfyui_tree.use_comfyui()
PACK = comfyui_tree.load_pack().__name__

import comfy.ldm.modules.attention as comfy_attention
import ltx2
import torch
from comfy.patcher_extension import WrappersMP
from comfyui_version import __version__ as comfyui_version

SETTINGS = [None] + [{"window": window, "sink_frames": sink} for sink in (0, 1) for window in (1, 2, 4)]
ORDER = (1, 3, 0, 2, 4)
REST = {"start_percent": 0.0, "end_percent": 1.0, "dense_blocks": 0}


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
    """Median milliseconds of a step and of its video self-attention, and peak GiB above the weights."""
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
    weights = torch.cuda.memory_allocated()
    comfy_attention.optimized_attention = timed_attention
    try:
        ltx2.sample(model, clip, repeats + 1, "cuda")
    finally:
        comfy_attention.optimized_attention = stock
    blocks = len(attention.pairs) // len(steps.pairs)
    calls = attention.milliseconds()
    per_step = [sum(calls[i * blocks : (i + 1) * blocks]) for i in range(repeats + 1)]
    return {
        "step_ms": statistics.median(steps.milliseconds()[1:]),
        "attention_ms": statistics.median(per_step[1:]),
        "attention_calls_a_step": blocks,
        "peak_gib_above_weights": (torch.cuda.max_memory_allocated() - weights) / 2**30,
    }


def check_kernel() -> float:
    """Largest difference on this GPU between the fast path and the plain one, relative to the largest value."""
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
        plain = window.attend_segments(q, k, v, None, range(tokens.total), segments, attend)
        fast = window.attend_window(q, k, v, None, range(tokens.total), tokens, size, sinks, attend)
        worst = max(worst, ((fast - plain).abs().max() / plain.abs().max()).item())
    return worst


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=HERE / "gpu.json")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument(
        "--clips", type=int, default=len(ltx2.CLIPS), help="so many clips, most telling first"
    )
    parser.add_argument("--only", nargs="+", help="settings by name besides dense, such as 'window 1 sink 0'")
    parser.add_argument(
        "--seconds", type=float, default=480, help="leave out what would start later than that"
    )
    parser.add_argument(
        "--table", action="store_true", help="only write the table of the rows that are there"
    )
    options = parser.parse_args()
    if options.table:
        options.out.with_suffix(".md").write_text(table(json.loads(options.out.read_text())))
        return
    begin = time.monotonic()

    node = importlib.import_module(f"{PACK}.nodes").ApplyTemporalWindow
    report: dict[str, Any] = {
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "comfyui": comfyui_version,
        "attention_backend": getattr(comfy_attention.optimized_attention, "__name__", "unknown"),
        "model": "LTXAVModel, 48 blocks, 32×128 heads, random bf16 weights",
        "fast_against_plain": check_kernel(),
        "rows": [],
        "left_out": [],
    }
    kept = kept_rows(options.out, report)
    model = ltx2.build_ltx2("cuda")
    for index in ORDER[: options.clips]:
        clip = ltx2.CLIPS[index]
        dense: dict[str, Any] = {}
        for setting in SETTINGS:
            name = name_of(setting)
            if options.only and setting is not None and name not in options.only:
                continue
            if time.monotonic() - begin > options.seconds:
                report["left_out"].append(f"{clip.name}, {name}")
                continue
            patched = model if setting is None else node.execute(model, **setting, **REST).args[0]
            row = {
                "clip": clip.name,
                "grid": clip.grid,
                "setting": name,
                **measure(patched, clip, options.repeats),
            }
            dense = row if setting is None else dense
            row["dense_step_ms"], row["dense_attention_ms"] = dense["step_ms"], dense["attention_ms"]
            row["step_of_dense"] = row["step_ms"] / dense["step_ms"]
            row["attention_of_dense"] = row["attention_ms"] / dense["attention_ms"]
            if setting is not None:
                seen = min(1.0, (2 * setting["window"] + 1) / clip.grid[0])
                row["attention_over_key_share"] = row["attention_of_dense"] / seen
            kept[clip.name, name] = row
            report["rows"] = in_order(kept)
            print({key: value for key, value in row.items() if key not in ("grid",)}, flush=True)
            options.out.write_text(json.dumps(report, indent=1) + "\n")
    options.out.with_suffix(".md").write_text(table(report))
    print(table(report))


def name_of(setting: dict[str, int] | None) -> str:
    return "dense" if setting is None else f"window {setting['window']} sink {setting['sink_frames']}"


def kept_rows(path: Path, report: dict[str, Any]) -> dict[tuple[str, str], dict[str, Any]]:
    """Rows of an earlier run by clip and setting, if it ran on the same ground."""
    if not path.exists():
        return {}
    earlier = json.loads(path.read_text())
    if any(earlier[key] != report[key] for key in ("gpu", "torch", "comfyui", "attention_backend", "model")):
        return {}
    return {(row["clip"], row["setting"]): row for row in earlier["rows"]}


def in_order(rows: dict[tuple[str, str], dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows by clip as listed in ltx2, then by setting: dense, without sink, with sink."""
    clips = [clip.name for clip in ltx2.CLIPS]

    def place(row: dict[str, Any]) -> tuple[Any, ...]:
        return clips.index(row["clip"]), row["setting"] != "dense", row["setting"].split()[::-2]

    return sorted(rows.values(), key=place)


def table(report: dict[str, Any]) -> str:
    """Markdown, one row per clip: times as shares of dense, and attention time over the share of keys seen."""
    rows = {(row["clip"], row["setting"]): row for row in report["rows"]}
    names = [name_of(setting) for setting in SETTINGS[1:]]
    heads = [f"±{setting['window']}, {setting['sink_frames']} sink" for setting in SETTINGS[1:]]
    shares = ["| clip | T×tokens | dense step | " + " | ".join(heads) + " |", "|---" * (3 + len(names)) + "|"]
    over = ["| clip | T×tokens | " + " | ".join(heads) + " |", "|---" * (2 + len(names)) + "|"]
    for clip in ltx2.CLIPS:
        if (clip.name, "dense") not in rows:
            continue
        frames, height, width = clip.grid
        head = f"| {clip.name} | {frames}×{height * width} "
        done = [rows.get((clip.name, name)) for name in names]
        cells = [
            f"{row['step_of_dense']:.0%} ({row['attention_of_dense']:.0%})" if row else "" for row in done
        ]
        shares.append(head + f"| {rows[clip.name, 'dense']['step_ms']:.0f} ms | " + " | ".join(cells) + " |")
        cells = [f"{row['attention_over_key_share']:.2f}" if row else "" for row in done]
        over.append(head + "| " + " | ".join(cells) + " |")
    return (
        "Time of a step, and of its video self-attention in brackets, as a share of dense:\n\n"
        + "\n".join(shares)
        + "\n\nAttention time as a share of dense, divided by (2·window+1)/T:\n\n"
        + "\n".join(over)
        + "\n"
    )


if __name__ == "__main__":
    main()
