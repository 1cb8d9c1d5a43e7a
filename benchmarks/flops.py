"""Counts what a temporal window saves at LTX-2 size. Needs no GPU and no weights.

    python benchmarks/flops.py [--out FILE]

Prices one forward of the real LTXAVModel by what the technique behind the node says it costs, and checks that by
running it on the meta device, on a real ModelPatcher, under PyTorch's FLOP counter. Writes flops.json and flops.md
beside this file.
"""

from __future__ import annotations

import importlib
from typing import Any

from runtime import PACK  # isort: split

import lab
import ltx2
import results
from price import count, priced

WINDOWS = [(window, sink) for window in (1, 2, 4) for sink in (0, 1)]


def count_whole(shallow: Any, deep: Any, clip: ltx2.Clip) -> tuple[float, float]:
    """(all, attention) FLOPs with all 48 blocks, from models of one and of two: blocks cost the same each."""
    one, two = count(shallow, clip, PACK), count(deep, clip, PACK)
    return tuple(a + (ltx2.BLOCKS - 1) * (b - a) for a, b in zip(one, two, strict=True))


def main() -> None:
    options = results.asking(__doc__, "flops").parse_args()
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
    results.save({**lab.versions(), "rows": rows}, options.out)
    results.write_tables(options.out, {"": table(rows)})
    print(table(rows))
    print(f"Priced and counted figures deviate by {max(deviations):.1e} at most.")


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: FLOPs of a whole step, and of its attention in brackets, as a share of dense."""
    head = ["clip", "T×tokens", "dense TFLOP a step", "attention"]
    head += [f"±{window}, {sink} sink" for window, sink in WINDOWS]
    lines = []
    for row in rows:
        cells = [row["clip"], ltx2.size_of(row["grid"]), f"{row['dense_tflop']:.0f}"]
        cells.append(f"{row['attention_share']:.0%}")
        for window, sink in WINDOWS:
            share = row[f"window {window} sink {sink}"]
            cells.append(f"{share['step']:.0%} ({share['attention']:.0%})")
        lines.append(cells)
    return results.table(head, lines) + "\n"


if __name__ == "__main__":
    main()
