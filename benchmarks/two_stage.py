"""What each whole two-stage run costs in quality, held against the full one.

    python benchmarks/two_stage.py --part gate                # is the second stage fit to be measured?
    python benchmarks/two_stage.py [--clips 384] [--only NAME ...] [--bases refiner] [--lengths 17 9 16]
                                   [--shard 1/4] [--seconds 540] [--out FILE]
    python benchmarks/two_stage.py --merge A.json B.json ... [--out FILE]      # one report of all, with prices
    python benchmarks/two_stage.py --part sheet               # the contact sheet
    python benchmarks/two_stage.py --clips 6 --lengths 9 --only dense "stride 2" --out DIR/two_stage.json      # on a CPU

Samples tiny_ltx through ComfyUI with the rows of two_stage_rows.py. Rows already in the JSON are kept, as long as they
were made by the same definition, weights and number of clips. Several processes may share the work by --shard or --only.
"""

from __future__ import annotations

import argparse
import logging
import time
from pathlib import Path
from typing import Any

from runtime import PACK  # isort: split

import comfy.cli_args
import comfy.model_management as mm
import lab
import results
import torch
from quality import SEEDS
from two_stage_judge import Judge
from two_stage_price import price_rows
from two_stage_report import GATE, gate, short_table, tables
from two_stage_rows import HARD, PESSIMIST, REFINER, ROWS, SHORT, TEACHER, USUAL, Row
from two_stage_runs import Runs
from two_stage_sheet import draw_sheet

from tiny_ltx.model import BASE, MODELS, file_of
from tiny_ltx.probe import FULL_PROBE

Job = tuple[Row, str, int]
# What tells rows apart.
PLACE = ("base", "row", "frames")


def weights_of(base: str) -> str:
    """One digest of both stages' weights and the probe's."""
    parts = dict.fromkeys((BASE, *MODELS["student"], *MODELS[base]))
    return lab.digest((*map(file_of, parts), FULL_PROBE))


def jobs_of(options: argparse.Namespace) -> list[Job]:
    """(row, model of the second stage, latent frames) that are asked for, dense first."""
    out = [
        (row, base, frames)
        for base in options.bases
        for frames in options.lengths
        for row in ROWS
        if base in row.bases and frames in row.lengths and (not options.only or row.name in options.only)
    ]
    share, shares = (int(part) for part in options.shard.split("/"))
    return out[share - 1 :: shares]


def run_rows(options: argparse.Namespace, report: dict[str, Any]) -> None:
    """Samples what is asked for and not there yet; saves after every row."""
    begin = time.monotonic()
    # Many threads get in each other's way at the small matrices of Frechet distances.
    torch.set_num_threads(min(4, torch.get_num_threads()))
    per_seed = max(2, options.clips // len(SEEDS))
    judge = Judge(per_seed, mm.get_torch_device())
    runs = Runs(PACK, judge.ids, real=lambda frames, seed: judge.film(frames, seed).small)
    digests = {base: weights_of(base) for base in options.bases}
    real_of = (digests[options.bases[0]], per_seed * len(SEEDS))
    for row, base, frames in jobs_of(options):
        entry: dict[str, Any] = {
            "base": base,
            "row": row.name,
            "frames": frames,
            "definition": row.definition,
            "weights": digests[base],
            "clips": per_seed * len(SEEDS),
        }
        if any(all(old.get(k) == v for k, v in entry.items()) for old in report["rows"]):
            continue
        if time.monotonic() - begin > options.seconds:
            print(f"no time left for {base} {frames} {row.name}", flush=True)
            continue
        started, name = time.monotonic(), f"{base} {frames} {row.name}"
        report["failed"].pop(name, None)
        try:
            entry |= judge.measure(row, base, frames, runs)
        except Exception as error:
            # One row that fails, such as one whose node has no effect, leaves the others their turn.
            report["failed"][name] = f"{type(error).__name__}: {error}"
            print(f"{name}: {report['failed'][name]}", flush=True)
            results.save(report, options.out)
            continue
        entry |= {**lab.machine(), "seconds_taken": time.monotonic() - started}
        report["rows"] = results.latest([*report["rows"], entry], *PLACE)
        made_with = list(real_of)
        if report["real"].get(str(frames), {}).get("made_with") != made_with:
            report["real"][str(frames)] = {"made_with": made_with, **judge.real_figures(frames)}
        results.save(report, options.out)
        shown = {name: round(value, 4) for name, value in entry["figures"].items()}
        print(f"{name}: {shown} {entry['seconds_taken']:.1f} s", flush=True)


def key_of(entry: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(entry[name] for name in PLACE)


def merged(reports: list[dict[str, Any]]) -> dict[str, Any]:
    """One report of several; of a row that several have, the last one's."""
    out = new_report()
    for report in reports:
        out["real"] |= report["real"]
        for clip, prices in report["flops_of_a_forward"].items():
            out["flops_of_a_forward"].setdefault(clip, {}).update(prices)
        out["rows"] = results.latest([*out["rows"], *report["rows"]], *PLACE)
        out["failed"] |= report["failed"]
    clips = {entry["clips"] for entry in out["rows"]}
    if len(clips) > 1:
        raise SystemExit(f"expected rows of one number of clips, got {sorted(clips)}. Measure them alike.")
    for base, row, frames in map(key_of, out["rows"]):
        out["failed"].pop(f"{base} {frames} {row}", None)
    return out


def new_report() -> dict[str, Any]:
    return {"real": {}, "flops_of_a_forward": {}, "left_out": [], "failed": {}, "rows": []}


def missing(report: dict[str, Any]) -> list[str]:
    """Rows that are defined and not measured yet."""
    present = {key_of(entry) for entry in report["rows"]}
    wanted = [(base, row.name, frames) for row in ROWS for base in row.bases for frames in row.lengths]
    return [
        f"{base}, {row}, {frames} frames"
        for base, row, frames in wanted
        if (base, row, frames) not in present
    ]


def write_report(report: dict[str, Any], out: Path) -> None:
    price_rows(PACK, report)
    report["left_out"] = missing(report)
    results.save(report, out)
    results.write_tables(out, {"": tables(report), "_short": short_table(report)})
    print(short_table(report))


def main() -> None:
    parser = results.asking(__doc__, "two_stage", seconds=1e9, merge=True)
    parser.add_argument("--part", default="rows", choices=["rows", "gate", "sheet"])
    parser.add_argument("--clips", type=int, default=384, help="sampled clips a row, over all seeds")
    parser.add_argument("--lengths", type=int, nargs="+", default=(USUAL, SHORT, HARD))
    parser.add_argument(
        "--bases", nargs="+", choices=(REFINER, TEACHER, PESSIMIST), default=(REFINER, TEACHER, PESSIMIST)
    )
    parser.add_argument("--only", nargs="+", help="rows by name")
    parser.add_argument(
        "--shard", default="1/1", help="every so manyth of them: 2/4 is the second of four shares"
    )
    parser.add_argument(
        "--gpu-only", action="store_true", help="as ComfyUI's: latents and frames stay on the GPU"
    )
    parser.add_argument("--no-table", action="store_true", help="only sample: no prices, no tables")
    options = parser.parse_args()
    comfy.cli_args.args.gpu_only = options.gpu_only
    if options.part == "sheet":
        draw_sheet(PACK, options.out.with_suffix(".png"))
        return
    paths = options.merge or ([options.out] if options.out.is_file() else [])
    report = merged(list(map(results.read, paths)))
    if options.part == "gate":
        options.only, options.bases, options.lengths = list({row for _, row, *_ in GATE}), [REFINER], [USUAL]
    if not options.merge:
        run_rows(options, report)
    if options.part == "gate":
        print("\n".join(gate(report)))
    elif not options.no_table:
        write_report(report, options.out)
    results.save(report, options.out)


if __name__ == "__main__":
    # Of references that clips stray from the figures tell, and of tails their own rows.
    logging.disable(logging.WARNING)
    main()
