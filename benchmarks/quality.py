"""What each setting costs in quality, beside the same budget spent as fewer steps.

    python benchmarks/quality.py [--clips 384] [--only NAME ...] [--models teacher student] [--seconds 540]
    python benchmarks/quality.py --table       # prices, table and picture of the rows that are there
    python benchmarks/quality.py --clips 6 --out DIR/quality.json     # a CPU is enough for a look

Samples tiny_ltx through ComfyUI with the rows of rows.py and judges the clips by an independent probe. Rows
already in the JSON are kept, as long as they were made by the same definition, weights and number of clips.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Hashable
from pathlib import Path
from typing import Any

from runtime import PACK  # isort: split

import comfy.model_management as mm
import lab
import ltx2
import metrics
import results
import torch
from price import PriceList
from report import freeze_tables, low_rank_tables, precision_tables, short_tables, stride_tables, tables
from rows import DENSE, PESSIMIST, ROWS, STUDENT, TEACHER, Row
from sampling import FPS, Stage, decode, sample_clips

from tiny_ltx.captions import SPEEDS
from tiny_ltx.clips import SMALL, draw_clips, draw_ids
from tiny_ltx.codec import Codec
from tiny_ltx.model import (
    BASE,
    STUDENT_RECIPE,
    TEACHER_RECIPE,
    TRANSFORMER_CONFIG,
    file_of,
    load_model,
)
from tiny_ltx.model import MODELS as PARTS
from tiny_ltx.probe import frechet_distance, load_probe, read_clips

MODELS = {TEACHER: TEACHER_RECIPE, STUDENT: STUDENT_RECIPE, PESSIMIST: TEACHER_RECIPE}
LENGTHS = (13, 25)
SEEDS = (0, 1, 2)
# What tells rows apart.
PLACE = ("model", "row", "frames")
# The sizes at which a row's FLOPs are counted.
PRICED = (ltx2.CLIPS[0], ltx2.CLIPS[1], ltx2.CLIPS[3])
REAL_DRAWS = 4
# At 24 frames a second the probe looks at every sixth frame. Begun at each of six frames it sees them all, those in
# between too; how many of these views a figure rests on:
VIEWS = {"frechet": 1, "frechet_all": 6}
# Clips of one speed that its Frechet distance has to rest on, about.
FEWEST = 80


class Judge:
    """Knows the real clips of the captions of every length and seed, and measures sampled ones against them."""

    def __init__(self, clips: int, device: torch.device) -> None:
        self.clips, self.device = clips, device
        self.probe = load_probe(device=device)
        self.ids = {
            seed: draw_ids(clips, torch.Generator(device).manual_seed(1000 + seed)).cpu() for seed in SEEDS
        }
        self._real: dict[tuple[int, int], dict[str, Any]] = {}

    def read(self, pixels: torch.Tensor, ids: torch.Tensor) -> dict[str, Any]:
        """Figures of clips of captions ids [B, 5], and their features [views, B, 128]."""
        pixels = pixels.to(self.device)
        fps = pixels.new_full((pixels.shape[0],), FPS)
        views = [read_clips(self.probe, pixels[:, first:], fps) for first in range(max(VIEWS.values()))]
        words = views[0][0].cpu()
        right = words == ids[:, : words.shape[1]]
        return {
            "features": torch.stack([features for _, features in views]).cpu(),
            "drift": metrics.drift(pixels).mean().item(),
            "acceleration": metrics.acceleration(pixels).mean().item(),
            "caption": right[:, :3].all(dim=1).float().mean().item(),
            "speed": right[:, 3].float().mean().item(),
        }

    def real(self, latent_frames: int, seed: int) -> dict[str, Any]:
        """The same of real clips, as the codec's signal channels show them: the best a sample could look."""
        key = latent_frames, seed
        if key not in self._real:
            generator = torch.Generator(self.device).manual_seed(2000 + seed)
            codec = Codec().to(self.device)
            ids = self.ids[seed]
            fps = torch.full((self.clips,), FPS, device=self.device)
            reads = []
            for _ in range(REAL_DRAWS + 1):
                drawn = draw_clips(
                    self.clips, latent_frames, generator, ids=ids.to(self.device), fps=fps
                ).pixels
                reads.append(
                    self.read(decode(codec.encode_pixels(drawn[:, None]) * codec.signal(SMALL)), ids)
                )
            figures = {
                name: statistics.mean(read[name] for read in reads)
                for name in ("drift", "acceleration", "caption", "speed")
            }
            reference = torch.cat([read["features"] for read in reads[:REAL_DRAWS]], dim=1)
            self._real[key] = {**figures, "reference": reference, "features": reads[-1]["features"]}
        return self._real[key]

    def real_figures(self, latent_frames: int) -> dict[str, Any]:
        reals = [self.real(latent_frames, seed) for seed in SEEDS]
        figures = [
            {
                **{name: real[name] for name in ("drift", "caption", "speed")},
                "acceleration": real["acceleration"] / reals[0]["acceleration"],
                **distances(real["features"], real["reference"]),
            }
            for real in reals
        ]
        return pooled(figures, [real["features"] for real in reals], [real["reference"] for real in reals])

    def measure(
        self, clips: list[torch.Tensor], dense: list[torch.Tensor] | None, frames: int
    ) -> dict[str, Any]:
        """Figures of one row: clips of every seed, beside the dense ones of the same noise."""
        figures, features, references = [], [], []
        for i, seed in enumerate(SEEDS):
            real, read = self.real(frames, seed), self.read(clips[i], self.ids[seed])
            features.append(read.pop("features"))
            references.append(real["reference"])
            read["acceleration"] /= real["acceleration"]
            read |= distances(features[-1], references[-1])
            if dense is not None:
                read["psnr"] = metrics.psnr(clips[i], dense[i]).mean().item()
            figures.append(read)
        out = pooled(figures, features, references)
        if self.clips * len(SEEDS) >= len(SPEEDS) * FEWEST:
            out["by_speed"] = {word: self._of_speed(i, features, references) for i, word in enumerate(SPEEDS)}
        return out

    def _of_speed(
        self, speed: int, features: list[torch.Tensor], references: list[torch.Tensor]
    ) -> dict[str, float]:
        """Frechet distances of the clips prompted at one speed to real ones of that speed."""
        is_chosen = [self.ids[seed][:, 3] == speed for seed in SEEDS]
        chosen = [found[:, is_one] for found, is_one in zip(features, is_chosen, strict=True)]
        real = [
            found[:, is_one.repeat(REAL_DRAWS)] for found, is_one in zip(references, is_chosen, strict=True)
        ]
        return {
            "clips": sum(int(is_one.sum()) for is_one in is_chosen),
            **distances(torch.cat(chosen, 1), torch.cat(real, 1)),
        }


def distances(features: torch.Tensor, reference: torch.Tensor) -> dict[str, float]:
    """Frechet distances of features [views, B, 128] to real ones, by the name of the figure."""
    return {
        name: frechet_distance(features[:views].flatten(0, 1), reference[:views].flatten(0, 1))
        for name, views in VIEWS.items()
    }


def pooled(
    figures: list[dict[str, float]], features: list[torch.Tensor], references: list[torch.Tensor]
) -> dict[str, Any]:
    """Means over seeds and their standard deviation; the Frechet distances are those of all clips together."""
    names = figures[0].keys()
    means = {name: statistics.mean(f[name] for f in figures) for name in names}
    means |= distances(torch.cat(features, 1), torch.cat(references, 1))
    spread = {name: statistics.stdev(f[name] for f in figures) for name in names}
    return {"figures": means, "spread": spread, "seeds": figures}


def is_complete(entry: dict[str, Any]) -> bool:
    """Whether it has every figure: frames in between have to be judged where strided rows are, or are held against."""
    kind = entry["definition"]["kind"]
    needs_all = kind in ("dense", "fewer steps", "schedule") or kind.startswith("stride")
    return "frechet_all" in entry["figures"] or not needs_all


def run_rows(options: argparse.Namespace, report: dict[str, Any]) -> None:
    """Samples what is asked for and not there yet; saves after every row."""
    begin = time.monotonic()
    # Many threads get in each other's way at the small matrices of Frechet distances.
    torch.set_num_threads(min(4, torch.get_num_threads()))
    device = mm.get_torch_device()
    per_seed = max(2, options.clips // len(SEEDS))
    judge = Judge(per_seed, device)
    real: dict[int, dict[str, Any]] = {}
    for name in options.models:
        recipe, model, weights_digest = (
            MODELS[name],
            load_model(name),
            lab.digest(map(file_of, (BASE, *PARTS[name]))),
        )
        dense: dict[int, list[torch.Tensor]] = {}
        stages: dict[Hashable, Stage] = {}
        for row in ROWS:
            if name not in row.models or (options.only and row.name not in options.only):
                continue
            for frames in options.frames:
                entry = {
                    "model": name,
                    "row": row.name,
                    "frames": frames,
                    "definition": row.definition,
                    "weights": weights_digest,
                    "clips": per_seed * len(SEEDS),
                }
                same = (old for old in report["rows"] if all(old.get(k) == v for k, v in entry.items()))
                if any(map(is_complete, same)):
                    continue
                if time.monotonic() - begin > options.seconds:
                    continue
                started = time.monotonic()
                clips, runs = sample(model, recipe, row, judge, frames, stages)
                if row == DENSE:
                    dense[frames] = clips
                elif frames not in dense:
                    dense[frames] = sample(model, recipe, DENSE, judge, frames, stages)[0]
                entry |= judge.measure(clips, None if row == DENSE else dense[frames], frames)
                entry |= {
                    "runs": runs,
                    **lab.machine(),
                }
                report["rows"] = results.latest([*report["rows"], entry], *PLACE)
                if frames not in real:
                    real[frames] = judge.real_figures(frames)
                report["real"][str(frames)] = real[frames]
                results.save(report, options.out)
                shown = {k: round(v, 4) for k, v in entry["figures"].items()}
                print(f"{name} {frames} {row.name}: {shown} {time.monotonic() - started:.1f} s", flush=True)


def sample(
    model: Any, recipe: Any, row: Row, judge: Judge, frames: int, stages: dict[Hashable, Stage]
) -> tuple[list[torch.Tensor], list[dict[str, Any]]]:
    """Pixels and executed steps of every seed."""
    out = [sample_clips(PACK, model, recipe, row, judge.ids[seed], frames, seed, stages) for seed in SEEDS]
    return [pixels for pixels, _ in out], [run for _, run in out]


def write_report(report: dict[str, Any], out: Path) -> None:
    """Tables and picture beside the JSON."""
    parts = {
        "": tables,
        "_short": short_tables,
        "_strides": stride_tables,
        "_freeze": freeze_tables,
        "_low_rank": low_rank_tables,
        "_precision": precision_tables,
    }
    results.write_tables(out, {ending: table(report) for ending, table in parts.items()})
    try:
        from chart import draw_chart
    except ImportError as error:
        print(f"no picture: {error}")
        return
    draw_chart(report, out.with_suffix(".png"))


def price_rows(report: dict[str, Any]) -> None:
    """FLOPs of every row at LTX-2 size, as a share of sampling dense.

    Steps and blocks that ran; for strided rows also what their decoding and encoding takes more (or less) than
    decoding the dense clip once.
    """
    prices = PriceList(PACK, TRANSFORMER_CONFIG["num_layers"], report["flops_of_a_forward"])
    for entry in report["rows"]:
        definition, recipe = entry["definition"], MODELS[entry["model"]]
        passes = 1 if recipe.cfg == 1 else 2
        striding = definition.get("striding")
        entry["cost"] = {}
        for clip in PRICED:
            first = clip if striding is None else clip.strided(striding["stride"])
            totals = [
                passes * price_stage(prices, first, definition["nodes"], run)
                + (
                    passes * price_stage(prices, clip, striding["nodes"], run["second"])
                    if "second" in run
                    else 0
                )
                for run in entry["runs"]
            ]
            total = statistics.mean(totals)
            if striding is not None and striding["has_vae"]:
                total += prices.vae(first, "decode")
                total += (
                    prices.vae(clip, "encode")
                    if "second" in entry["runs"][0]
                    else -prices.vae(clip, "decode")
                )
            entry["cost"][clip.name] = total / (passes * (len(recipe.sigmas) - 1) * prices.forward(clip, ()))


def price_stage(prices: PriceList, clip: ltx2.Clip, nodes: list[Any], run: dict[str, Any]) -> float:
    """FLOPs of the steps of one sampler, one forward each."""
    return sum(
        prices.forward(clip, [tuple(node) for node in nodes if step in run["covered"].get(node[0], ())])
        for step in run["executed"]
    )


def missing(report: dict[str, Any]) -> list[str]:
    """Rows that are defined and not measured yet."""
    present = {
        (entry["model"], entry["row"], entry["frames"]) for entry in report["rows"] if is_complete(entry)
    }
    wanted = [(model, row.name, frames) for row in ROWS for model in row.models for frames in LENGTHS]
    return [
        f"{model}, {row}, {frames} frames"
        for model, row, frames in wanted
        if (model, row, frames) not in present
    ]


def main() -> None:
    parser = results.asking(__doc__, "quality", seconds=1e9, table=True)
    parser.add_argument("--clips", type=int, default=384, help="sampled clips a row, over all seeds")
    parser.add_argument("--frames", type=int, nargs="+", choices=LENGTHS, default=LENGTHS)
    parser.add_argument("--models", nargs="+", choices=sorted(MODELS), default=sorted(MODELS))
    parser.add_argument("--only", nargs="+", help="rows by name")
    parser.add_argument("--no-table", action="store_true", help="only sample")
    options = parser.parse_args()
    report: dict[str, Any] = {"real": {}, "flops_of_a_forward": {}, "left_out": [], "rows": []}
    report |= results.read(options.out, {})
    if not options.table:
        run_rows(options, report)
    if not options.no_table:
        price_rows(report)
        report["left_out"] = missing(report)
        write_report(report, options.out)
    results.save(report, options.out)


if __name__ == "__main__":
    main()
