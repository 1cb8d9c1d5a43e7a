"""Counts what a temporal window saves at LTX-2 size. Needs no GPU and no weights.

    python benchmarks/flops.py

Prices one forward of the real LTXAVModel by what the technique behind the node says it costs, and checks that by
running it on the meta device, on a real ModelPatcher, under PyTorch's FLOP counter. Writes flops.json and flops.md
beside this file.
"""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent

from runtime import PACK  # isort: split

import ltx2
import torch
from comfyui_version import __version__ as comfyui_version
from price import count, priced

WINDOWS = [(window, sink) for window in (1, 2, 4) for sink in (0, 1)]


def count_whole(shallow: Any, deep: Any, clip: ltx2.Clip) -> tuple[float, float]:
    """(all, attention) FLOPs with all 48 blocks, from models of one and of two: blocks cost the same each."""
    one, two = count(shallow, clip, PACK), count(deep, clip, PACK)
    return tuple(a + (ltx2.BLOCKS - 1) * (b - a) for a, b in zip(one, two, strict=True))


def main() -> None:
    node = importlib.import_module(f"{PACK}.nodes").ApplyTemporalWindow
    plan_of = importlib.import_module(f"{PACK}.patches.mount").plan_of
    settings = {"start_percent": 0.0, "end_percent": 1.0, "dense_blocks": 0}
    shallow, deep, whole = (ltx2.build_ltx2("meta", blocks=blocks) for blocks in (1, 2, ltx2.BLOCKS))
    rows, deviations = [], []

    def price(clip: ltx2.Clip, **inputs: int) -> tuple[float, float]:
        one, two, all_blocks = (
            node.execute(model, **inputs, **settings).args[0] if inputs else model
            for model in (shallow, deep, whole)
        )
        ours = priced(all_blocks, clip, plan_of(all_blocks), PACK)
        counted = count_whole(one, two, clip)
        deviations.extend(abs(a / b - 1) for a, b in zip(ours, counted, strict=True))
        return ours

    for clip in ltx2.CLIPS:
        total, attention = price(clip)
        row: dict[str, Any] = {"clip": clip.name, "grid": clip.grid, "dense_tflop": total / 1e12}
        row["attention_share"] = attention / total
        for window, sink in WINDOWS:
            ours, ours_attention = price(clip, window=window, sink_frames=sink)
            row[f"window {window} sink {sink}"] = {
                "step": ours / total,
                "attention": ours_attention / attention,
            }
        rows.append(row)
        print(f"{clip.name}: {total / 1e12:.1f} TFLOP", flush=True)
    report = {"comfyui": comfyui_version, "torch": torch.__version__, "rows": rows}
    (HERE / "flops.json").write_text(json.dumps(report, indent=1) + "\n")
    (HERE / "flops.md").write_text(table(rows))
    print(table(rows))
    print(f"Priced and counted figures deviate by {max(deviations):.1e} at most.")


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: FLOPs of a whole step, and of its attention in brackets, as a share of dense."""
    names = [f"window {window} sink {sink}" for window, sink in WINDOWS]
    lines = [
        "| clip | T×tokens | dense TFLOP a step | attention | "
        + " | ".join(f"±{window}, {sink} sink" for window, sink in WINDOWS)
        + " |",
        "|---" * (4 + len(names)) + "|",
    ]
    for row in rows:
        frames, height, width = row["grid"]
        cells = [f"{row[name]['step']:.0%} ({row[name]['attention']:.0%})" for name in names]
        lines.append(
            f"| {row['clip']} | {frames}×{height * width} | {row['dense_tflop']:.0f} "
            f"| {row['attention_share']:.0%} | " + " | ".join(cells) + " |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
