"""The picture of the quality table: drift and distance against FLOPs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from report import PRICED_AS, groups

MARKS = {
    "window": ("o", "tab:blue"),
    "low rank": ("*", "tab:green"),
    "cache": ("s", "tab:orange"),
    "cache + window": ("D", "tab:purple"),
    "freeze: whole blocks, linear": ("P", "tab:pink"),
    "freeze: other": ("x", "plum"),
    "freeze + window": ("X", "tab:olive"),
    "precision": ("P", "tab:cyan"),
    "stride": ("^", "tab:red"),
    "stride: on latents, or times not stretched": ("1", "tab:gray"),
    "stride + full length": ("v", "tab:brown"),
}


def mark_of(row: dict[str, Any]) -> str:
    """What the picture tells apart."""
    kind: str = row["definition"]["kind"]
    striding = row["definition"].get("striding")
    if kind == "freeze":
        is_best = row["row"].startswith("whole blocks, linear")
        return "freeze: whole blocks, linear" if is_best else "freeze: other"
    if striding and not (striding["has_vae"] and striding["is_stretched"]):
        return "stride: on latents, or times not stretched"
    return kind


FIGURES = (
    ("psnr", "PSNR to dense, dB"),
    ("frechet", "Fréchet distance"),
    ("frechet_all", "Fréchet distance, all frames"),
    ("drift", "drift"),
)


def draw_chart(report: dict[str, Any], path: Path) -> None:
    # A model with nothing but dense has nothing to show yet; the pessimist is there for the strides' table only.
    found = [group for group in groups(report) if len(group[2]) > 1 and group[0] != "pessimist"]
    figure, axes = plt.subplots(
        len(FIGURES), len(found), figsize=(5.2 * len(found), 3.6 * len(FIGURES)), squeeze=False
    )
    for column, (model, frames, rows) in enumerate(found):
        for axis, (name, label) in zip(axes[:, column], FIGURES, strict=True):
            draw_panel(axis, rows, frames, name, label)
        axes[0, column].set_title(f"{model}, {frames} latent frames")
        axes[-1, column].set_xlabel(f"FLOPs, % of dense at {PRICED_AS[frames]}")
    handles = {
        label: h for axis in axes.flat for h, label in zip(*axis.get_legend_handles_labels(), strict=True)
    }
    figure.legend(
        handles.values(), handles.keys(), loc="upper center", ncols=(len(handles) + 1) // 2, fontsize=8
    )
    figure.tight_layout(rect=(0, 0, 1, 0.95))
    figure.savefig(path, dpi=80)
    plt.close(figure)


def draw_panel(axis: Any, rows: list[dict[str, Any]], frames: int, name: str, label: str) -> None:
    def cost(row: dict[str, Any]) -> float:
        return 100 * row["cost"][PRICED_AS[frames]]

    for merged, style in (("uniform", "-"), ("tail", "--"), ("head", ":")):
        line = sorted(
            (cost(row), row["figures"][name])
            for row in rows
            if row["definition"]["kind"] == "fewer steps"
            and row["definition"]["merged"] == merged
            and row["definition"]["sigmas"] is None
            and cost(row) < 100
            and name in row["figures"]
        )
        if line:
            axis.plot(*zip(*line, strict=True), style, color="black", lw=1, label=f"fewer steps, {merged}")
    for kind, (mark, colour) in MARKS.items():
        if name in ("psnr", "frechet", "frechet_all") and kind.startswith("stride") != (
            name == "frechet_all"
        ):
            # A strided clip is another one than dense, by design, and all of its frames have to be judged.
            continue
        points = [row for row in rows if mark_of(row) == kind and name in row["figures"]]
        if points:
            axis.errorbar(
                [cost(row) for row in points],
                [row["figures"][name] for row in points],
                [row["spread"][name] for row in points],
                fmt=mark,
                ms=4,
                lw=0.8,
                color=colour,
                label=kind,
            )
    for row in rows:
        if row["row"] == "dense":
            axis.axhline(row["figures"].get(name, float("nan")), color="tab:green", lw=1, label="dense")
    if name.startswith("frechet"):
        # What lies above is no longer a clip of that kind; the rest is where the choice is.
        dense = next((row["figures"][name] for row in rows if row["row"] == "dense"), None)
        axis.set_ylim(0, None if dense is None else 4 * dense)
    if name == "psnr":
        # Beyond 60 dB nothing is left to see.
        axis.set_ylim(10, 60)
    axis.set_ylabel(label)
    axis.grid(alpha=0.3)
