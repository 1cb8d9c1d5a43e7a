"""The GPU table in Markdown."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ltx2
import results
from gpu_settings import DEFAULT, FLOOR, GROUNDS, SETTINGS, STRIDES, WINDOWS


def in_order(rows: dict[tuple[str, str, str], dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows by ground, clip and setting as they are listed."""
    order = [
        (ground.name, clip.name, setting.name)
        for ground in GROUNDS
        for clip in ltx2.CLIPS
        for setting in SETTINGS
    ]
    return [rows[key] for key in sorted(rows, key=order.index)]


def tables(report: dict[str, Any]) -> dict[str, str]:
    """Markdown by file ending: everything, and what the pages show of windows and of strides."""
    rows = {(row["ground"], row["clip"], row["setting"]): row for row in report["rows"]}
    names = [setting.name for setting in WINDOWS]
    # Strides are another comparison than attention backends.
    grounds_of_window = [ground for ground in GROUNDS if DEFAULT in ground.settings]

    def by_setting(head: str, of_dense: Any, cell: Any) -> str:
        lines = []
        for clip in ltx2.CLIPS:
            dense, *others = (rows.get((GROUNDS[0].name, clip.name, name)) for name in ("dense", *names))
            if dense is not None:
                cells = [clip.name, ltx2.size_of(clip.grid), of_dense(dense)]
                lines.append([*cells, *(cell(row) if row else "" for row in others)])
        return results.table(["clip", "T×tokens", head, *names], lines)

    def by_ground() -> str:
        heads = [f"{ground.name}: dense, {DEFAULT}, peak" for ground in grounds_of_window]
        lines = []
        for clip in ltx2.CLIPS:
            cells = [clip.name]
            for ground in grounds_of_window:
                row = rows.get((ground.name, clip.name, DEFAULT))
                peak = row["peak_gib_above_weights"] + row["weights_on_gpu_gib"] if row else 0
                cells.append(
                    f"{row['dense_step_ms']:.0f} ms, {row['step_of_dense']:.0%}, {peak:.1f} GiB"
                    if row
                    else ""
                )
            lines.append(cells)
        return results.table(["clip", *heads], lines)

    def by_stride() -> str:
        lines = []
        for clip in ltx2.CLIPS:
            floor, *others = (rows.get(("flash, strides", clip.name, s.name)) for s in (FLOOR, *STRIDES[:2]))
            if floor is None:
                continue
            dense, least = floor["dense_step_ms"], floor["step_ms"]
            cells = [clip.name, f"{dense:.0f} ms", f"{least:.0f} ms"]
            for row in others:
                expected = least + (dense - least) * row["token_share"]
                over = row["step_ms"] / expected
                cells.append(f"{row['step_of_dense']:.0%} ({row['token_share']:.0%}, {over:.2f})")
            lines.append(cells)
        return results.table(["clip", "dense step", FLOOR.name, "stride 2", "stride 4"], lines)

    strides = (
        "Time of a step with KeyframeStride as a share of dense; in brackets the share of video tokens, and the "
        "time over what that share and the floor (a clip of one latent frame, with the whole audio) let "
        "expect:\n\n"
    ) + by_stride()
    steps = (
        "Time of a step, and of its video self-attention in brackets, as a share of dense:\n\n"
        + by_setting(
            "dense step",
            lambda dense: f"{dense['step_ms']:.0f} ms",
            lambda row: f"{row['step_of_dense']:.0%} ({row['attention_of_dense']:.0%})",
        )
    )
    grounds = (
        "Other attention backends, and weights streamed from host memory within "
        f"{report['card_gib']} GiB, as an 8 GB card has to: dense step, the window's share of it, and its peak with "
        "weights:\n\n"
    ) + by_ground()
    over = "Attention time as a share of dense, divided by (2·window+1)/T:\n\n" + by_setting(
        "dense attention",
        lambda dense: f"{dense['attention_ms']:.0f} ms",
        lambda row: f"{row['attention_over_key_share']:.2f}",
    )
    peaks = "Peak memory above the weights:\n\n" + by_setting(
        "dense",
        lambda dense: f"{dense['peak_gib_above_weights']:.1f} GiB",
        lambda row: f"{row['peak_gib_above_weights']:.1f} GiB",
    )
    parts = {
        "": (steps, over, peaks, grounds, strides),
        "_short": (steps, grounds),
        "_strides": (strides,),
    }
    return {ending: "\n\n".join(shown) + "\n" for ending, shown in parts.items()}


def write_tables(report: dict[str, Any], path: Path) -> None:
    results.write_tables(path, tables(report))
    print(tables(report)[""])
