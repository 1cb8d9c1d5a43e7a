"""The quality table in Markdown, with the rival of every row. Reads the JSON's content only."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Mapping
from typing import Any

import results

# What the pages show of each model, at the LTX-2 size whose FLOPs stand for the tiny clip's length.
TEACHER, STUDENT, PESSIMIST = "teacher", "student", "pessimist"
WINDOWS = (
    "±2, 1 sink",
    "±4, 1 sink",
    "±4, 1 sink, dense edge",
    "±4, 1 sink, from 0.25",
    "±4, 1 sink, from 0.5",
)
SHORT = {TEACHER: WINDOWS, STUDENT: WINDOWS}
SHORT_STRIDES = {
    TEACHER: (
        "stride 2, motion",
        "stride 2, linear",
        "stride 2, optical_flow",
        "stride 3, motion",
        "stride 4, motion",
        "stride 4, linear",
        "stride 4, optical_flow",
        "stride 2, motion, 12 steps",
        "stride 2, motion, 16 steps, full length from σ 0.75",
        "stride 2, motion, full length from σ 0.75",
        "stride 3, motion, 12 steps, full length from σ 0.75",
        "stride 4, motion, 8 steps, full length from σ 0.75",
        "stride 2, motion, refined from σ 0.7",
        "stride 2, motion, 12 steps, refined from σ 0.7",
        "stride 2, motion, 8 steps, refined from σ 0.8",
        "stride 3, motion, 8 steps, refined from σ 0.8",
        "stride 4, motion, 8 steps, refined from σ 0.8",
        "stride 4, motion, 8 steps, refined from σ 0.7",
        "stride 2, motion on latents",
        "stride 2, motion, times not stretched",
    ),
    STUDENT: (
        "stride 2, motion",
        "stride 3, motion",
        "stride 4, motion",
        "stride 2, motion, full length from σ 0.75",
        "stride 2, motion, refined from σ 0.7",
    ),
    PESSIMIST: (
        "stride 2, motion",
        "stride 4, motion",
        "stride 2, motion, full length from σ 0.9",
        "stride 2, motion, full length from σ 0.75",
    ),
}
SHORT_FREEZE = {
    TEACHER: (
        "whole blocks, linear, from 0.2, every 2.",
        "whole blocks, linear, from 0.2, every 3.",
        "whole blocks, linear, from 0.4, every 2.",
        "whole blocks, linear, from 0.4, every 3.",
        "whole blocks, linear, from 0.4, every 3., kept as fp8_e4m3fn",
        "whole blocks, linear, from 0.6, every 3.",
        "whole blocks, linear, from 0.4, never refreshed",
        "whole blocks, hold, from 0.4, every 3.",
        "per-frame work, linear, from 0.4, every 3.",
        "spatial attention, hold, from 0.4, every 3.",
        "whole blocks, linear, from 0.4, every 2. + ±4, 1 sink, from 0.5",
        "EasyCache 0.024",
        "EasyCache 0.05",
    ),
    STUDENT: (
        "whole blocks, linear, from 0, every 2.",
        "whole blocks, linear, from 0.2, every 2.",
        "whole blocks, hold, from 0.2, every 2.",
        "per-frame work, linear, from 0.2, every 2.",
        "EasyCache 0.05",
    ),
}
LOW_RANK = (
    "pooled 2, ±1",
    "pooled 2, ±1, dense edge",
    "pooled 2, ±1, dense edge, from 0.25",
    "pooled 2, ±2, dense edge, from 0.25",
    "pooled 2×2², ±1, dense edge, from 0.25",
    "pooled 4, ±1, dense edge, from 0.25",
    "pooled 2, ±1, dense edge, from 0.4",
    "routed 10%, dense edge, from 0.25",
    "routed 30%, dense edge, from 0.25",
    "routed 50%, dense edge, from 0.25",
)
SHORT_LOW_RANK = {TEACHER: LOW_RANK, STUDENT: LOW_RANK}
PRECISIONS = (
    "self-attention in fp16",
    "text attention in fp16",
    "attention in fp16",
    "attention in bf16",
)
SHORT_PRECISION = {TEACHER: PRECISIONS, STUDENT: PRECISIONS}
PRICED_AS = {13: "121 f 1280×704", 25: "481 f 1280×704"}
OF_SOME = ("of all frames", "of slow clips", "of fast clips")
SIZES = {"97 f 896×512": "13×448", "121 f 1280×704": "16×880", "481 f 1280×704": "61×880"}


class Rival:
    """Dense with fewer steps at any cost: between two measured step counts, figures are interpolated linearly."""

    def __init__(self, rows: list[dict[str, Any]]) -> None:
        """rows: dense and fewer-steps entries of one model and length."""
        self.lines: dict[str, list[tuple[float, dict[str, float]]]] = {}
        for row in rows:
            definition = row["definition"]
            if definition["kind"] == "fewer steps" and definition["sigmas"] is None and share(row) < 1:
                self.lines.setdefault(definition["merged"], []).append((share(row), figures_of(row)))
        for line in self.lines.values():
            line.sort(key=lambda point: point[0])

    def at(self, cost: float, by: str = "psnr") -> dict[str, float] | None:
        """Figures of the schedule that is better by one of them at this share of dense FLOPs.

        None below the shortest. Above the longest measured schedule that one stands in; it costs less than the row
        it is compared with.
        """
        lines = [[point for point in line if by in point[1]] for line in self.lines.values()]
        found = [figures for line in lines if line and (figures := between(line, cost)) is not None]
        return max(found, key=lambda figures: figures[by] * (1 if by == "psnr" else -1), default=None)

    def of(self, row: dict[str, Any], cost: float) -> dict[str, float]:
        """Figures beside those of a row of this cost.

        Other lengths and schedules make another clip than dense, so that PSNR cannot choose.
        """
        definition = row["definition"]
        is_other = definition.get("striding") or definition["kind"] == "schedule"
        return self.at(cost, "frechet_all" if is_other else "psnr") or {}


def figures_of(row: dict[str, Any]) -> dict[str, float]:
    """The row's figures, with the Frechet distances of all frames of slow and of fast clips, where they were taken."""
    by_speed = row.get("by_speed", {})
    found = {word: by_speed.get(word, {}).get("frechet_all") for word in ("slow", "fast")}
    return {**row["figures"], **{word: value for word, value in found.items() if value is not None}}


def share(row: dict[str, Any]) -> float:
    """Cost of a row without nodes: the same at every size."""
    return next(iter(row["cost"].values()))


def between(line: list[tuple[float, dict[str, float]]], cost: float) -> dict[str, float] | None:
    places = [place for place, _ in line]
    i = bisect_left(places, cost - 1e-9)
    if i == len(line):
        return line[-1][1]
    if places[i] <= cost + 1e-9:
        return line[i][1]
    if i == 0:
        return None
    part = (cost - places[i - 1]) / (places[i] - places[i - 1])
    left, right = line[i - 1][1], line[i][1]
    return {name: left[name] + part * (right[name] - left[name]) for name in left if name in right}


def groups(report: dict[str, Any]) -> list[tuple[str, int, list[dict[str, Any]]]]:
    """(model, latent frames, rows) of everything measured."""
    keys = sorted(
        {(row["model"], row["frames"]) for row in report["rows"]}, key=lambda k: (k[0] != "teacher", k)
    )
    return [
        (model, frames, [r for r in report["rows"] if (r["model"], r["frames"]) == (model, frames)])
        for model, frames in keys
    ]


def tables(report: dict[str, Any]) -> str:
    """One Markdown table for each model and length."""
    out = []
    for model, frames, rows in groups(report):
        dense = next((row for row in rows if row["row"] == "dense"), None)
        steps = f"{len(dense['runs'][0]['executed'])} steps, " if dense else ""
        real, rival = report["real"][str(frames)]["figures"], Rival(rows)
        out += [
            f"### {model}, {steps}{frames} latent frames",
            "",
            f"Real clips: Fréchet {real['frechet']:.2f}, drift {real['drift']:.4f}, caption {real['caption']:.3f}, "
            f"speed {real['speed']:.3f}.",
            "",
            results.table(
                ["setting", f"FLOPs % at {' / '.join(SIZES.values())}", "PSNR dB", "Fréchet", *OF_SOME]
                + ["drift", "acceleration", "caption", "speed"]
                + ["fewer steps at these FLOPs: PSNR", "Fréchet", *OF_SOME, "drift"],
                [line(row, rival) for row in sorted(rows, key=order)],
            ),
            "",
        ]
    return "\n".join(out)


def short_tables(report: dict[str, Any]) -> str:
    """For the pages: a few windows."""
    columns = (("psnr", "PSNR dB", 1), ("drift", "drift", 4), ("frechet", "Fréchet", 1))
    return chosen_tables(report, "window", SHORT, columns)


def freeze_tables(report: dict[str, Any]) -> str:
    """For the pages: frozen steps, and core's own cache."""
    columns = (
        ("psnr", "PSNR dB", 1),
        ("frechet", "Fréchet", 1),
        ("drift", "drift", 4),
        ("acceleration", "acceleration", 2),
    )
    return chosen_tables(report, "freeze", SHORT_FREEZE, columns)


def precision_tables(report: dict[str, Any]) -> str:
    """For the pages: attention in half types, as many FLOPs as dense."""
    columns = (("psnr", "PSNR dB", 1), ("frechet", "Fréchet", 1), ("drift", "drift", 4))
    return chosen_tables(report, "precision", SHORT_PRECISION, columns)


def stride_tables(report: dict[str, Any]) -> str:
    """For the pages: strides. They make another clip than dense, so that PSNR says nothing."""
    columns = (
        ("frechet_all", "Fréchet", 1),
        ("slow", "of slow clips", 1),
        ("fast", "of fast clips", 1),
        ("drift", "drift", 4),
        ("acceleration", "acceleration", 2),
    )
    return chosen_tables(report, "stride and in-betweening", SHORT_STRIDES, columns)


def low_rank_tables(report: dict[str, Any]) -> str:
    """For the pages: far frames through fewer keys, beside the window of the nearest FLOPs, too."""
    columns = (("psnr", "PSNR dB", 1), ("frechet", "Fréchet", 1), ("drift", "drift", 4))
    return chosen_tables(report, "low rank", SHORT_LOW_RANK, columns, with_window=True)


def nearest_window(rows: list[dict[str, Any]], size: str, cost: float) -> dict[str, float]:
    """Figures of the window whose FLOPs at this size are nearest; of several as near, that of the best PSNR."""
    windows = [row for row in rows if row["definition"]["kind"] == "window" and "psnr" in row["figures"]]
    return figures_of(
        min(windows, key=lambda row: (round(abs(row["cost"][size] - cost), 2), -row["figures"]["psnr"]))
    )


def chosen_tables(
    report: dict[str, Any],
    title: str,
    names: Mapping[str, Iterable[str]],
    columns: tuple[tuple[str, str, int], ...],
    with_window: bool = False,
) -> str:
    """These rows of each model at each length, every figure with that of fewer steps at the same FLOPs in brackets.

    with_window: and behind it that of the window of the nearest FLOPs.
    """
    out = []
    beside = "fewer steps, window" if with_window else "fewer steps"
    distance = next(name for name, *_ in columns if name.startswith("frechet"))
    for model, frames, rows in groups(report):
        by_name = {row["row"]: row for row in rows}
        found = (by_name[name] for name in names.get(model, ()) if name in by_name)
        shown = [row for row in found if distance in row["figures"]]
        if not shown or "dense" not in by_name:
            continue
        size, rival = PRICED_AS[frames], Rival(rows)
        dense, real = figures_of(by_name["dense"]), report["real"][str(frames)]["figures"]
        of_dense = ", ".join(
            f"{label} {dense[name]:.{digits}f}" for name, label, digits in columns if name in dense
        )
        out += [
            f"{model.capitalize()}, {frames} latent frames, FLOPs at {SIZES[size]}; dense: {of_dense}; real clips: "
            f"Fréchet {real[distance]:.1f}, drift {real['drift']:.4f}",
            "",
        ]
        lines = []
        for row in shown:
            cost, own = row["cost"][size], figures_of(row)
            others = [rival.of(row, cost)]
            others += [nearest_window(rows, size, cost)] if with_window else []
            cells = [row["row"], f"{cost:.0%}"]
            for name, _, digits in columns:
                shown_beside = ", ".join(f"{o[name]:.{digits}f}" if name in o else "–" for o in others)
                cells.append(f"{own[name]:.{digits}f} ({shown_beside})" if name in own else "–")
            lines.append(cells)
        head = [title, "FLOPs", *(f"{label} ({beside})" for _, label, _ in columns)]
        out += [results.table(head, lines), ""]
    return "\n".join(out)


def order(row: dict[str, Any]) -> int:
    kinds = [
        "dense",
        "fewer steps",
        "schedule",
        "window",
        "low rank",
        "cache",
        "cache + window",
        "freeze",
        "freeze + window",
        "precision",
        "stride",
        "stride + full length",
    ]
    kind = row["definition"]["kind"]
    return kinds.index(kind) if kind in kinds else len(kinds)


def line(row: dict[str, Any], rival: Rival) -> list[str]:
    f, s = figures_of(row), row["spread"]

    def cell(name: str, digits: int) -> str:
        spread = f" ± {s[name]:.{digits}f}" if name in s else ""
        return f"{f[name]:.{digits}f}{spread}" if name in f else "–"

    costs = list(row["cost"].values())
    others = [rival.of(row, cost) for cost in costs]
    is_own_rival = row["definition"]["kind"] in ("dense", "fewer steps")
    cells = [row["row"], percents(costs)]
    cells += [cell("psnr", 1), cell("frechet", 2), cell("frechet_all", 2), cell("slow", 1), cell("fast", 1)]
    cells += [cell("drift", 4), cell("acceleration", 2), cell("caption", 3), cell("speed", 3)]
    rivals = (("psnr", 1), ("frechet", 2), ("frechet_all", 2), ("slow", 1), ("fast", 1), ("drift", 4))
    for name, digits in rivals:
        if is_own_rival:
            cells.append("")
        else:
            shown = [f"{other[name]:.{digits}f}" if name in other else "–" for other in others]
            cells.append(shown[0] if len(set(shown)) == 1 else " / ".join(shown))
    return cells


def percents(costs: list[float]) -> str:
    shown = [f"{100 * cost:.0f}" for cost in costs]
    return shown[0] if len(set(shown)) == 1 else " / ".join(shown)
