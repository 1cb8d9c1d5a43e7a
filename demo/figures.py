"""What is known of the demo's runs: their own times and likeness, and the lab's figures of many clips."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from graph import FIRST_SIGMAS, PARTS, Setting
from tabulate import tabulate

# Of the lab's rows: the distilled refiner, 17 latent frames.
MODEL, LATENT_FRAMES = "refiner", 17
PRICED_AS = "121 f"


@dataclass(frozen=True)
class Clip:
    """One run: frames [F, 64, 64] as uint8, seconds of each part."""

    frames: np.ndarray
    seconds: dict[str, float]


def seconds_of_parts(node_seconds: dict[str, float]) -> dict[str, float]:
    """By part, all of them, in the order in which they run."""
    parts = dict.fromkeys(PARTS.values(), 0.0)
    for node, part in PARTS.items():
        parts[part] += node_seconds.get(node, 0.0)
    return parts


def usual_seconds(clips: Sequence[Clip]) -> dict[str, float]:
    """Each part's median, which a busy moment of the machine does not move."""
    return {part: float(np.median([clip.seconds[part] for clip in clips])) for part in clips[0].seconds}


def psnr(reference: np.ndarray, other: np.ndarray) -> float:
    """In dB, of pictures of 0 to 255."""
    error = np.mean((reference.astype(np.float64) - other.astype(np.float64)) ** 2)
    return float("inf") if error == 0 else float(10 * np.log10(255**2 / error))


def lab_row(report: dict[str, Any], setting: Setting, of_other_noise: bool = False) -> dict[str, Any]:
    """The row of two_stage.json that was made as `setting` is."""
    wanted = {
        "first": setting.first,
        "second": setting.second,
        "sigmas": list(setting.sigmas),
        "again": [],
        "nodes": [],
        "has_other_noise": of_other_noise,
    }
    first_steps = None if setting.first_sigmas == FIRST_SIGMAS else len(setting.first_sigmas) - 1
    if setting.second > 1:
        wanted["is_guided"] = setting.is_guided
    rows = [row for row in report["rows"] if (row["base"], row["frames"]) == (MODEL, LATENT_FRAMES)]
    for row in rows:
        definition = row["definition"]
        if definition.get("first_steps") == first_steps and all(
            definition[k] == v for k, v in wanted.items()
        ):
            return row
    known = sorted({(row["definition"]["first"], row["definition"]["second"]) for row in rows})
    raise LookupError(
        f"two_stage.json has no row with strides {setting.first} and {setting.second} and sigmas {setting.sigmas}; "
        f"measured strides are {known}. Choose one of them in demo/run.py."
    )


def table(
    settings: Sequence[Setting], clips: dict[str, list[Clip]], report: dict[str, Any], release: str
) -> str:
    """In Markdown that reads as text as well. `clips`: by the names of the settings, the first of which is dense."""
    dense = clips[settings[0].name]
    rows = [
        ["run", "time", "PSNR to dense", "FLOPs at LTX-2's size", "distance", "drift", "detail"],
        ["", "here", "here", "lab", "lab", "lab", "lab"],
    ]
    for setting in settings:
        own, row = clips[setting.name], lab_row(report, setting)
        likeness = np.mean([psnr(a.frames, b.frames) for a, b in zip(dense, own, strict=True)])
        rows.append(
            [
                setting.name,
                f"{sum(usual_seconds(own).values()):.1f} s",
                "–" if own is dense else f"{likeness:.1f} dB",
                f"{row['cost'][PRICED_AS]:.0%}",
                f"{row['figures']['frechet_all']:.1f}",
                f"{row['figures']['drift']:.4f}",
                f"{row['figures']['detail']:.2f}",
            ]
        )
    other = lab_row(report, settings[0], of_other_noise=True)
    notes = [
        f"here: these {len(dense)} clips ({len(dense[0].frames)} frames of 64 × 64 pixels, a first stage of 32 × 32), "
        f"ComfyUI {release} on this CPU. Time is the sum of each part's median, without loading and saving; PSNR is their mean.",
        f"lab: benchmarks/two_stage.json, over {other['clips']} clips of the same small model. FLOPs are counted at LTX-2's size, "
        f"{PRICED_AS.removesuffix(' f')} frames of 1280 × 704, decoding and encoding with them. Distance (Fréchet, all frames) and "
        "drift are better when lower. Detail is that of real clips = 1.",
        "Fewer steps: half of the first stage's and one less of the second's, the cheapest run of that kind that still draws its "
        "textures; mind the FLOPs.",
        "PSNR says how near a run is to the dense one, not how good. Ours draws other noise, as its latent is shorter; dense with "
        "another seed of the second stage has "
        f"{other['figures']['psnr']:.1f} dB and a distance of {other['figures']['frechet_all']:.1f} in the lab.",
    ]
    # Its columns stand below each other in the terminal, too.
    aligned = tabulate(rows[1:], rows[0], "github", disable_numparse=True)
    return "\n".join([aligned, "", *notes]) + "\n"
