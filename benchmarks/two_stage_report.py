"""The table of whole two-stage runs in Markdown, its verdict first. Reads the JSON's content only."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import results
from two_stage_rows import HARD, REFINER, ROWS, USUAL

# What the second stage has to do before any other row means something: figure, row, limit, whether that is the most.
GATE = (
    ("detail", "upscaled only", 0.6, True),
    ("detail", "dense", 0.9, False),
    ("texture", "dense", 0.9, False),
)
# Of the full two-stage run: most distance, least detail.
GOALS = {"stride 2": (1.1, 0.95), "stride 4": (1.2, 0.92)}
RIVAL = "DFR-like round"
DECIDING = (
    "dense",
    "dense, another seed",
    "stride 2",
    "stride 4",
    "stride 8",
    "stride 4, first stage at 2",
    "stride 8, first stage at 2",
    "stride 4, blind",
    "both stages at stride 2, blind",
    "upscaled only",
    "2 steps from σ 0.909375",
    "1 step from σ 0.421875",
    "routed 30%",
    "routed 30%, stride 2",
    "±4, 1 sink",
    "pooled 2, ±2",
    RIVAL,
)
COLUMNS = (
    ("detail", "detail", 2),
    ("pulse", "pulse", 2),
    ("slip", "texture slip", 2),
    ("slip_of_keyframes", "of keyframes", 2),
    ("motion", "motion error px", 2),
    ("strays", "strays", 2),
    ("psnr", "PSNR dB", 1),
    ("drift", "drift", 4),
    ("caption", "caption", 3),
    ("texture", "texture", 3),
)


def groups(report: dict[str, Any]) -> list[tuple[str, int, dict[str, dict[str, Any]]]]:
    """(second stage's model, latent frames, rows by name) of everything measured, in the order of ROWS."""
    order = {row.name: place for place, row in enumerate(ROWS)}
    keys = {(row["base"], row["frames"]) for row in report["rows"]}
    out = []
    for base, frames in sorted(keys, key=lambda key: (key[0] != REFINER, key[1] != USUAL, key)):
        rows = [row for row in report["rows"] if (row["base"], row["frames"]) == (base, frames)]
        rows.sort(key=lambda row: order.get(row["row"], len(order)))
        out.append((base, frames, {row["row"]: row for row in rows}))
    return out


def gate(report: dict[str, Any]) -> list[str]:
    """One line for each limit of the gate that was measured."""
    rows = next((rows for *key, rows in groups(report) if key == [REFINER, USUAL]), {})
    out = []
    for name, row, limit, is_most in GATE:
        if row in rows:
            value = rows[row]["figures"][name]
            passes = value <= limit if is_most else value >= limit
            sign = "≤" if is_most else "≥"
            out.append(
                f"gate: {name} of {row} {value:.3f} ({sign} {limit:g}): {'pass' if passes else 'FAIL'}"
            )
    return out


def baseline(row: dict[str, Any], rows: dict[str, dict[str, Any]]) -> dict[str, Any] | None:
    """The dense row of the same schedule."""
    schedule = row["definition"]["schedule"]
    found = (
        other
        for other in rows.values()
        if other["definition"]["kind"] == "dense" and other["definition"]["schedule"] == schedule
    )
    return next(found, None)


def verdict(report: dict[str, Any]) -> list[str]:
    """Goals and what was reached, one line each."""
    rows = next((rows for *key, rows in groups(report) if key == [REFINER, USUAL]), {})
    out = gate(report)

    def told(name: str, what: str, value: float, limit: float, sign: str) -> str:
        reached = value <= limit if sign == "≤" else value >= limit
        return f"{name}: {what} {value:.2f}, goal {sign} {limit:.2f}: {'reached' if reached else 'missed'}"

    for name in ("stride 2", "stride 4", "stride 8"):
        if name not in rows or "dense" not in rows:
            continue
        own, full = rows[name]["figures"], rows["dense"]["figures"]
        if name in GOALS:
            most, least = GOALS[name]
            out.append(told(name, "distance of dense", own["frechet_all"] / full["frechet_all"], most, "≤"))
            out.append(told(name, "detail of dense", own["detail"] / full["detail"], least, "≥"))
        if RIVAL in rows:
            rival = rows[RIVAL]["figures"]
            out.append(told(name, "texture slip", own["slip"], rival["slip"], "≤"))
            out.append(told(name, "motion error", own["motion"], rival["motion"], "≤"))
    return out


def short_table(report: dict[str, Any]) -> str:
    """For the pages: the rows that decide."""
    rows = next((rows for *key, rows in groups(report) if key == [REFINER, USUAL]), {})
    lines = [f"- {line}" for line in verdict(report)]
    return "\n".join([*lines, "", table(rows, DECIDING)]) + "\n"


def tables(report: dict[str, Any]) -> str:
    """One table for each model of the second stage and length."""
    out = [short_table(report)]
    for base, frames, rows in groups(report):
        out += [f"### {base} as the second stage, {frames} latent frames", "", real_line(report, frames), ""]
        out.append(table(rows, rows))
        if frames == HARD:
            out += ["", "The last second, in brackets the one before:", "", seconds_table(rows)]
        out.append("")
    return "\n".join(out)


def real_line(report: dict[str, Any], frames: int) -> str:
    figures = report["real"][str(frames)]["figures"]
    shown = ", ".join(f"{label} {figures[n]:.{digits}f}" for n, label, digits in COLUMNS if n in figures)
    return f"Real clips: Fréchet {figures['frechet_all']:.2f}, {shown}."


def table(rows: dict[str, dict[str, Any]], names: Iterable[str]) -> str:
    shown = [rows[name] for name in names if name in rows]
    if not shown:
        return "Nothing measured yet."
    costs = list(next(iter(shown)).get("cost", {}))
    head = ["setting", f"FLOPs % at {' / '.join(costs) or '–'}", "Fréchet (of dense)"]
    head += [label for _, label, _ in COLUMNS]
    return results.table(head, [line(row, baseline(row, rows)) for row in shown])


def line(row: dict[str, Any], full: dict[str, Any] | None) -> list[str]:
    figures = row["figures"]
    cost = " / ".join(f"{share:.0%}".rstrip("%") for share in row.get("cost", {}).values()) or "–"
    distance = f"{figures['frechet_all']:.2f}"
    if full is not None and full is not row:
        distance += f" ({figures['frechet_all'] / full['figures']['frechet_all']:.2f})"
    cells = [f"{figures[name]:.{digits}f}" if name in figures else "–" for name, _, digits in COLUMNS]
    return [row["row"], cost, distance, *cells]


def seconds_table(rows: dict[str, dict[str, Any]]) -> str:
    lines = []
    for name, row in rows.items():
        last, before = row["seconds"]["last"], row["seconds"]["before"]
        cells = [
            f"{last[figure]:.{digits}f} ({before[figure]:.{digits}f})" if figure in last else "–"
            for figure, digits in (("frechet", 2), ("detail", 2), ("psnr", 1))
        ]
        lines.append([name, *cells])
    return results.table(["setting", "Fréchet", "detail", "PSNR dB"], lines)
