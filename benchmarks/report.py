"""The quality table in Markdown and as a picture, with the rival of every row. Reads the JSON's content only."""

from __future__ import annotations

from bisect import bisect_left
from pathlib import Path
from typing import Any

# What the README shows, at the LTX-2 size whose FLOPs stand for the tiny clip's length.
SHORT = (
    "±1, 0 sink",
    "±1, 1 sink",
    "±2, 1 sink",
    "±4, 1 sink",
    "±4, 1 sink, from 0.25",
    "±4, 1 sink, dense edge",
    "±4, 1 sink, from 0.25, dense edge",
    "±4, 1 sink, from 0.5",
)
PRICED_AS = {13: "121 f 1280×704", 25: "481 f 1280×704"}
SIZES = {"97 f 896×512": "13×448", "121 f 1280×704": "16×880", "481 f 1280×704": "61×880"}


class Rival:
    """Dense with fewer steps at any cost: between two measured step counts, figures are interpolated linearly."""

    def __init__(self, rows: list[dict[str, Any]]) -> None:
        """rows: dense and fewer-steps entries of one model and length."""
        self.lines: dict[str, list[tuple[float, dict[str, float]]]] = {}
        for row in rows:
            definition = row["definition"]
            if definition["kind"] == "fewer steps" and definition["sigmas"] is None and share(row) < 1:
                self.lines.setdefault(definition["merged"], []).append((share(row), row["figures"]))
        for line in self.lines.values():
            line.sort(key=lambda point: point[0])

    def at(self, cost: float) -> dict[str, float] | None:
        """Figures of the better schedule (by PSNR) at this share of dense FLOPs; None below the shortest.

        Above the longest measured schedule that one stands in; it costs less than the row it is compared with.
        """
        found = [figures for line in self.lines.values() if (figures := between(line, cost)) is not None]
        return max(found, key=lambda figures: figures["psnr"], default=None)


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


def write_report(report: dict[str, Any], out: Path) -> None:
    out.with_suffix(".md").write_text(tables(report))
    out.with_name(f"{out.stem}_short.md").write_text(short_tables(report))
    try:
        from chart import draw_chart
    except ImportError as error:
        print(f"no picture: {error}")
        return
    draw_chart(report, out.with_suffix(".png"))


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
        real = report["real"][str(frames)]["figures"]
        out += [
            f"### {model}, {steps}{frames} latent frames",
            "",
            f"Real clips: Fréchet {real['frechet']:.2f}, drift {real['drift']:.4f}, caption {real['caption']:.3f}, "
            f"speed {real['speed']:.3f}.",
            "",
            f"| setting | FLOPs % at {' / '.join(SIZES.values())} | PSNR dB | Fréchet | drift | acceleration | caption "
            "| speed | fewer steps at these FLOPs: PSNR | Fréchet | drift |",
            "|---" * 11 + "|",
        ]
        rival = Rival(rows)
        out += [line(row, rival) for row in sorted(rows, key=order)]
        out.append("")
    return "\n".join(out)


def short_tables(report: dict[str, Any]) -> str:
    """For the README: a few windows, every figure with that of fewer steps at the same FLOPs in brackets."""
    out = []
    for model, frames, rows in groups(report):
        by_name = {row["row"]: row for row in rows}
        shown = [by_name[name] for name in SHORT if name in by_name]
        if not shown or "dense" not in by_name:
            continue
        size, rival = PRICED_AS[frames], Rival(rows)
        dense, real = by_name["dense"]["figures"], report["real"][str(frames)]["figures"]
        out += [
            f"{model.capitalize()}, {frames} latent frames, FLOPs at {SIZES[size]}; dense: drift "
            f"{dense['drift']:.4f}, Fréchet {dense['frechet']:.1f}; real clips: {real['drift']:.4f}, "
            f"{real['frechet']:.1f}",
            "",
            "| window | FLOPs | PSNR dB (fewer steps) | drift (fewer steps) | Fréchet (fewer steps) |",
            "|---" * 5 + "|",
        ]
        for row in shown:
            other = rival.at(row["cost"][size])
            cells = [row["row"], f"{row['cost'][size]:.0%}"]
            for name, digits in (("psnr", 1), ("drift", 4), ("frechet", 1)):
                beside = f"{other[name]:.{digits}f}" if other else "–"
                cells.append(f"{row['figures'][name]:.{digits}f} ({beside})")
            out.append("| " + " | ".join(cells) + " |")
        out.append("")
    return "\n".join(out)


def order(row: dict[str, Any]) -> int:
    kinds = ["dense", "fewer steps", "window", "cache", "cache + window"]
    kind = row["definition"]["kind"]
    return kinds.index(kind) if kind in kinds else len(kinds)


def line(row: dict[str, Any], rival: Rival) -> str:
    f, s = row["figures"], row["spread"]

    def cell(name: str, digits: int) -> str:
        return f"{f[name]:.{digits}f} ± {s[name]:.{digits}f}" if name in f else "–"

    costs = list(row["cost"].values())
    others = [rival.at(cost) for cost in costs]
    is_own_rival = row["definition"]["kind"] in ("dense", "fewer steps")
    cells = [row["row"], percents(costs)]
    cells += [cell("psnr", 1), cell("frechet", 2), cell("drift", 4), cell("acceleration", 2)]
    cells += [cell("caption", 3), cell("speed", 3)]
    for name, digits in (("psnr", 1), ("frechet", 2), ("drift", 4)):
        if is_own_rival:
            cells.append("")
        else:
            shown = [f"{other[name]:.{digits}f}" if other else "–" for other in others]
            cells.append(shown[0] if len(set(shown)) == 1 else " / ".join(shown))
    return "| " + " | ".join(cells) + " |"


def percents(costs: list[float]) -> str:
    shown = [f"{100 * cost:.0f}" for cost in costs]
    return shown[0] if len(set(shown)) == 1 else " / ".join(shown)
