"""The recipe tables, and how reports of several processes become one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import results

# What must be the same in reports that stand in one table.
SAME = ("gpu", "torch", "comfyui", "device", "sigmas", "second_sigmas")
SINGLE, GUIDED, TWO = "rows", "guided", "two_stage"
PARTS = SINGLE, GUIDED, TWO
# What tells rows apart.
KEY = ("ground", "clip", "recipe")
BASE = "dense"
THROTTLED, STREAMED, WHOLE = "8 multiprocessors", "streamed", "the whole card"


def merged(reports: list[dict[str, Any]]) -> dict[str, Any]:
    """One report of all rows; of a row measured twice the later report's. Raises ValueError for unlike machines."""
    first = reports[0]
    out: dict[str, Any] = {key: first[key] for key in SAME}
    for other in reports[1:]:
        unlike = [key for key in SAME if other[key] != first[key]]
        if unlike:
            raise ValueError(
                f"{unlike[0]}: expected the same in every report, got {first[unlike[0]]!r} and {other[unlike[0]]!r}. Merge "
                "reports of one kind of machine."
            )
    out["processes"] = [process for report in reports for process in report["processes"]]
    for part in PARTS:
        rows = results.latest((row for report in reports for row in report.get(part, [])), *KEY)
        out[part] = sorted(rows, key=lambda row: place_of(row, rows))
    measured = {", ".join(key_of(row)) for part in PARTS for row in out[part]}
    left = dict.fromkeys(name for report in reports for name in report["left_out"])
    # A name may be followed by what went wrong.
    out["left_out"] = [name for name in left if name.split(": ")[0] not in measured]
    return compared(out)


def key_of(row: dict[str, Any]) -> tuple[str, ...]:
    return tuple(row[name] for name in KEY)


def place_of(row: dict[str, Any], rows: list[dict[str, Any]]) -> tuple[int, int, int]:
    grounds, clips = ([r[name] for r in rows] for name in ("ground", "clip"))
    order = (THROTTLED, STREAMED, WHOLE)
    by_frames = sorted(set(clips), key=lambda name: (int(name.split()[0]), name))
    assert set(grounds) <= set(order)
    return order.index(row["ground"]), by_frames.index(row["clip"]), row["order"]


def compared(report: dict[str, Any]) -> dict[str, Any]:
    """`report` with every row held against dense of the same ground and clip, where that was measured."""
    for part in PARTS:
        dense = {key_of(row)[:2]: row for row in report[part] if row["recipe"] == BASE}
        for row in report[part]:
            base = dense.get(key_of(row)[:2])
            row["dense_seconds"] = base and base["seconds"]
            row["of_dense"] = row["seconds"] / base["seconds"] if base else None
            row["dense_peak_gib"] = base and base["peak_gib"]
    return report


def write_tables(report: dict[str, Any], path: Path) -> str:
    """Writes the tables beside the JSON at `path`; returns them."""
    out = []
    for part, name in ((SINGLE, ""), (GUIDED, "_guided"), (TWO, "_two_stage")):
        if not report[part]:
            continue
        text = two_stage_table(report) if part == TWO else single_table(report, part)
        results.write_tables(path, {name: text})
        out.append(text)
    return "\n".join(out)


def single_table(report: dict[str, Any], part: str) -> str:
    """Markdown, one row per recipe and clip."""
    lines = []
    for row in report[part]:
        sampling = row["parts"]["sampling"]
        cells = [clip_of(row, report[part]), recipe_of(row), f"{row['seconds']:.1f}", share(row)]
        cells += [f"{sampling:.1f}", f"{row['seconds'] - sampling:.1f}"]
        lines.append(cells)
    return results.table(["clip", "recipe", "seconds", "of dense", "sampling", "rest"], lines) + "\n"


def two_stage_table(report: dict[str, Any]) -> str:
    """Markdown, one row per recipe and clip, its parts in seconds."""
    parts = ("stage 1", "decode small", "encode", "upscale", "stage 2", "decode", "in-betweening")
    head = ["clip", "recipe", "seconds", "of dense", *parts, "peak above dense"]
    lines = []
    for row in report[TWO]:
        cells = [clip_of(row, report[TWO]), recipe_of(row), f"{row['seconds']:.1f}", share(row)]
        cells += [f"{row['parts'][part]:.1f}" if part in row["parts"] else "–" for part in parts]
        lines.append([*cells, peak(row)])
    return results.table(head, lines) + "\n"


def clip_of(row: dict[str, Any], rows: list[dict[str, Any]]) -> str:
    """With its ground, where the table has several."""
    is_alone = all(other["ground"] == row["ground"] for other in rows)
    return row["clip"] if is_alone else f"{row['clip']}, {row['ground']}"


def recipe_of(row: dict[str, Any]) -> str:
    """With a star where not all steps of the first sampler ran and its time is that of those that did, scaled."""
    return row["recipe"] + "\\*" * (row["steps_timed"] is not None)


def share(row: dict[str, Any]) -> str:
    return "–" if row["of_dense"] is None else f"{row['of_dense']:.0%}"


def peak(row: dict[str, Any]) -> str:
    base = row["dense_peak_gib"]
    return "–" if base is None or row["peak_gib"] is None else f"{row['peak_gib'] - base:+.1f} GiB"
