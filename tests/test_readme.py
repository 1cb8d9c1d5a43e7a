"""Figures in the README are those that the benchmark scripts wrote."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import re

import pytest


def test_tables_are_the_measured_ones(pack):
    readme = (pack.root / "README.md").read_text(encoding="utf-8")
    names = (
        "gpu_short",
        "gpu_strides",
        "flops",
        "quality_short",
        "quality_strides",
        "quality_freeze",
        "quality_low_rank",
        "low_rank",
        "pooling_error",
        "pacing",
        "quality_precision",
        "precision",
        "freeze",
        "recipes",
    )
    for name in (f"{name}.md" for name in names):
        assert (pack.root / "benchmarks" / name).read_text(encoding="utf-8").strip() in readme, name


def test_what_the_readme_says_about_low_rank_attention(pack):
    folder = pack.root / "benchmarks"
    report, rows = (
        report_module(folder),
        json.loads((folder / "quality.json").read_text(encoding="utf-8"))["rows"],
    )
    within = set()
    for model, frames, own in report.groups({"rows": rows}):
        rival, size = report.Rival(own), report.PRICED_AS[frames]
        dense = next(row for row in own if row["row"] == "dense")["figures"]
        for row in own:
            if row["definition"]["kind"] != "low rank":
                continue
            figures = row["figures"]
            assert figures["psnr"] < rival.of(row, row["cost"][size])["psnr"], row["row"]
            if row["row"].startswith("pooled") and "²" not in row["row"]:
                assert figures["drift"] < 1.1 * dense["drift"], row["row"]
            if figures["psnr"] >= 30 and figures["drift"] <= 1.05 * dense["drift"]:
                within.add((model, frames, row["row"]))
    settings = {
        "pool 4": "pooled 4, ±1, dense edge, from 0.25",
        "pool 2": "pooled 2, ±2, dense edge, from 0.25",
    }
    assert {("student", n, settings["pool 4"]) for n in (13, 25)} <= within
    assert ("teacher", 13, settings["pool 2"]) in within
    assert not any("routed" in name for *_, name in within)
    steps = json.loads((folder / "low_rank.json").read_text(encoding="utf-8"))["steps"]
    taken = {
        (row["grid"], row["setting"]): f"{row['of_dense']:.0%}"
        for row in steps
        if row["multiprocessors"] == 8
    }
    assert taken["16×880", "pooled 4, ±1"] == "85%" and taken["31×880", "pooled 4, ±1"] == "69%"
    assert taken["16×880", "pooled 2, ±2"] == "92%" and taken["16×880", "routed by threshold 0.5"] == "69%"


def test_what_the_readme_says_about_pacing(pack):
    content = json.loads((pack.root / "benchmarks" / "pacing.json").read_text(encoding="utf-8"))
    for row in content["rows"][:3]:
        assert abs(row["duty"] - float(row["row"].removeprefix("max_duty "))) < 0.011
    assert all(row["ratio"] < 1.001 for row in content["overhead"])


def test_gpu_tables_match_their_json(pack):
    folder = pack.root / "benchmarks"
    text = (folder / "gpu.md").read_text(encoding="utf-8")
    for name in ("gpu_short.md", "gpu_strides.md"):
        parts = (folder / name).read_text(encoding="utf-8").strip().split("\n\n")
        assert len(parts) >= 2 and all(part in text for part in parts)
    every = json.loads((folder / "gpu.json").read_text(encoding="utf-8"))["rows"]
    rows = [row for row in every if row["ground"] == "flash"]
    windows, strides = text.split("Time of a step with KeyframeStride")
    cells = {tuple(f"{row[key]:.0%}" for key in ("step_of_dense", "attention_of_dense")) for row in rows}
    shown = re.findall(r"(\d+%) \((\d+%)\)", windows)
    assert len(shown) == 30 and set(shown) <= cells
    ratios = {f"{row['attention_over_key_share']:.2f}" for row in rows if row["setting"] != "dense"}
    assert set(re.findall(r"\b\d\.\d\d\b", windows)) == ratios
    assert all(
        row["peak_gib_above_weights"] <= row["dense_peak_gib_above_weights"] + 1e-3 for row in every
    ), "README: peak memory"
    for step, share, peak in re.findall(r"(\d+) ms, (\d+%), ([\d.]+) GiB", windows):
        assert any(
            f"{row['dense_step_ms']:.0f}" == step
            and f"{row['step_of_dense']:.0%}" == share
            and f"{row['peak_gib_above_weights'] + row['weights_on_gpu_gib']:.1f}" == peak
            for row in every
        )
    found = re.findall(r"(\d+%) \((\d+%), (\d\.\d\d)\)", strides)
    assert len(found) == 4
    for share, tokens, over in found:
        row = next(r for r in every if f"{r['step_of_dense']:.0%}" == share and r["token_share"] < 1)
        assert tokens == f"{row['token_share']:.0%}" and float(over) < 1.1, (
            "README: within the share of tokens"
        )


def test_flop_table_matches_its_json(pack):
    text = (pack.root / "benchmarks" / "flops.md").read_text(encoding="utf-8")
    rows = json.loads((pack.root / "benchmarks" / "flops.json").read_text(encoding="utf-8"))["rows"]
    entries = [entry for row in rows for entry in row.values() if isinstance(entry, dict)]
    cells = {(f"{entry['step']:.0%}", f"{entry['attention']:.0%}") for entry in entries}
    shown = re.findall(r"(\d+%) \((\d+%)\)", text)
    assert len(shown) == len(entries) == 30 and set(shown) == cells


def test_quality_tables_come_from_their_json(pack):
    folder = pack.root / "benchmarks"
    report = report_module(folder)
    content = json.loads((folder / "quality.json").read_text(encoding="utf-8"))
    assert (folder / "quality.md").read_text(encoding="utf-8") == report.tables(content)
    assert (folder / "quality_short.md").read_text(encoding="utf-8") == report.short_tables(content)
    assert (folder / "quality_strides.md").read_text(encoding="utf-8") == report.stride_tables(content)
    assert (folder / "quality_low_rank.md").read_text(encoding="utf-8") == report.low_rank_tables(content)
    assert (folder / "quality_freeze.md").read_text(encoding="utf-8") == report.freeze_tables(content)
    assert (folder / "quality_precision.md").read_text(encoding="utf-8") == report.precision_tables(content)
    assert all(row["clips"] >= 256 and len(row["seeds"]) >= 3 for row in content["rows"])
    # The nets whose rows these are, and no others, lie in the repository.
    weights = {
        "teacher": "tiny_ltx/weights.safetensors",
        "student": "tiny_ltx/student/weights.safetensors",
        "pessimist": "tiny_ltx/pessimist/weights.safetensors",
    }
    for model, path in weights.items():
        found = {row["weights"] for row in content["rows"] if row["model"] == model}
        assert found == {hashlib.sha256((pack.root / path).read_bytes()).hexdigest()[:16]}


def test_whole_runs_match_their_json(pack):
    folder = pack.root / "benchmarks"
    for name, label in (("freeze", "time of dense"), ("recipes", "of dense")):
        rows = json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))["rows"]
        header, _, *lines = (folder / f"{name}.md").read_text(encoding="utf-8").strip().splitlines()
        column = [cell.strip() for cell in header.split("|")].index(label)
        shown = [line.split("|")[column].split()[0] for line in lines]
        assert shown == [f"{row['of_dense']:.0%}" for row in rows]
    report = json.loads((folder / "freeze.json").read_text(encoding="utf-8"))
    freeze = report["rows"]
    of_dense = {
        place: {
            (row["clip"], row["steps"], row["start_percent"], row["refresh_every"], row["cache_dtype"]): row[
                "of_dense"
            ]
            for row in freeze
            if row["scope"] == "whole blocks" and row["cache_device"] == place
        }
        for place in ("gpu", "cpu")
    }
    large, small = "121 f 1280×704", "97 f 896×512"
    for clip in (large, small):
        third, *quarters = (of_dense["gpu"][(clip, 24, *when, "default")] for when in ((0.2, 3), (0.2, 2), (0.4, 3)))  # fmt: skip
        assert 0.65 < third < 0.71 and all(0.7 < share < 0.785 for share in quarters), clip
    eight = {row["start_percent"]: row["frozen_steps"] for row in freeze if row["steps"] == 8}
    assert eight == {0.0: 3, 0.2: 1}
    for clip in (large, small):
        assert 0.66 < of_dense["gpu"][clip, 8, 0.0, 2, "default"] <= 0.81, "a fifth to a third"
        assert of_dense["cpu"][clip, 8, 0.0, 2, "default"] > 1, "slower than dense"
    in_host = {setting: share for setting, share in of_dense["cpu"].items() if setting[1] == 24}
    assert len(in_host) == 6 and f"{in_host[large, 24, 0.2, 3, 'default']:.0%}" == "75%"
    for setting, share in in_host.items():
        left = (1 - share) / (1 - of_dense["gpu"][(*setting[:4], "default")])
        is_packed = setting[-1] != "default"
        assert (0.83 if is_packed else 0.4 if setting[0] == small else 0.75) < left < 1.1, setting
    hidden = [line.split("|")[8].strip() for line in lines_of(folder / "freeze.md") if "in host" in line and line.startswith("| 121 f 1280×704, 24")]  # fmt: skip
    assert len(hidden) == 4 and all(int(share.rstrip("%")) >= 50 for share in hidden), "most transfers hide"
    assert all(row["of_dense"] > 1.04 for row in freeze if row["scope"] == "spatial attention")
    around = report["gib_around_an_interrupt"]
    assert all(found["before"] == found["after"] for found in around.values())
    assert around["gpu"]["within"] > around["gpu"]["before"] + 4
    two_blocks = 4 * 14080 * 4096 * 2 / 2**30
    far = [row for row in freeze if row["cache_device"] == "cpu"]
    assert far and all(row["peak_gib"] <= row["dense_peak_gib"] + two_blocks for row in far)


def lines_of(path):
    return path.read_text(encoding="utf-8").splitlines()


def report_module(folder):
    spec = importlib.util.spec_from_file_location("quality_report", folder / "report.py")
    report = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(report)
    return report


@pytest.fixture(scope="module")
def strides(pack):
    """(model, latent frames) -> row -> (share of dense's FLOPs, figures as shares of dense's, fewer steps' likewise)."""
    folder = pack.root / "benchmarks"
    report = report_module(folder)
    rows = json.loads((folder / "quality.json").read_text(encoding="utf-8"))["rows"]
    out = {}
    for model, frames in {(row["model"], row["frames"]) for row in rows}:
        mine = [row for row in rows if (row["model"], row["frames"]) == (model, frames)]
        dense = report.figures_of(next(row for row in mine if row["row"] == "dense"))
        rival = report.Rival(mine)
        out[model, frames] = {
            row["row"]: (
                row["cost"][report.PRICED_AS[frames]],
                shares(report.figures_of(row), dense),
                shares(rival.of(row, row["cost"][report.PRICED_AS[frames]]), dense),
            )
            for row in mine
        }
    return out


def shares(figures, dense):
    return {name: figures[name] / dense[name] for name in figures if dense.get(name)}


HANDED_OVER = "stride 2, motion, 16 steps, full length from σ 0.75"
NEAREST = "stride 2, motion, refined from σ 0.7"


def refined(stride, sigma=0.8):
    return f"stride {stride}, motion, 8 steps, refined from σ {sigma}"


def test_what_the_readme_says_about_strides_of_the_teacher(strides):
    short, long = strides["teacher", 13], strides["teacher", 25]
    for rows in (short, long):
        _, figures, rival = rows[refined(2)]
        assert figures["frechet_all"] < 0.85 < rival["frechet_all"] and figures["slow"] < 1
        assert all(abs(figures[name] - 1) < 0.06 for name in ("drift", "acceleration"))
        cost, figures, _ = rows[HANDED_OVER]
        assert cost < 0.52 and figures["frechet_all"] < 0.9 and figures["slow"] < 1 and figures["fast"] < 1.06
        assert rows["stride 2, motion"][1]["frechet_all"] < 1.1
        assert 0.7 < rows["stride 2, motion"][1]["acceleration"] < 0.8
        for stride in (3, 4):
            _, figures, rival = rows[f"stride {stride}, motion"]
            assert figures["frechet_all"] < rival["frechet_all"], "beats fewer steps"
            assert rows[refined(stride)][1]["fast"] < 1.75, "mends most"
        methods = {m: [rows[f"stride {s}, {m}"][1]["fast"] for s in (2, 3, 4)] for m in ("motion", "linear", "smooth", "optical_flow")}  # fmt: skip
        assert methods["motion"] == [min(values) for values in zip(*methods.values(), strict=True)]
    assert [f"{rows[refined(2)][1]['fast']:.2f}" for rows in (short, long)] == ["1.13", "1.27"]
    assert [f"{rows[NEAREST][0]:.0%}" for rows in (short, long)] == ["96%", "82%"]
    nearest = [
        min(
            (row for row, (_, figures, _) in rows.items() if "frechet_all" in figures),
            key=lambda row: rows[row][1]["frechet_all"],
        )
        for rows in (short, long)
    ]
    assert nearest == [NEAREST, f"{NEAREST} with a window"]
    windowed = [rows[f"{NEAREST} with a window"] for rows in (short, long)]
    assert [f"{cost:.0%}" for cost, _, _ in windowed] == ["92%", "64%"]
    for rows, (_, figures, _) in zip((short, long), windowed, strict=True):
        assert abs(figures["frechet_all"] / rows[NEAREST][1]["frechet_all"] - 1) < 0.05
    taking_over = "stride 2, motion, full length from σ 0.75"
    costs = [f"{long[name][0]:.0%}" for name in (taking_over, f"{taking_over} with a window")]
    assert costs == ["69%", "49%"] and long[f"{taking_over} with a window"][1]["frechet_all"] < 0.73
    assert f"{short['stride 2, motion'][1]['drift']:.3f}" == "1.128", "an eighth"
    assert long["stride 3, motion"][1]["frechet_all"] < 1 and 4 < short["stride 4, motion"][1]["fast"] < 4.5


def test_the_goals_of_striding(strides):
    short, long = strides["teacher", 13], strides["teacher", 25]
    reached = {
        stride: [f"{rows[name][1]['frechet_all']:.2f} × {rows[name][0]:.0%}" for rows, name in of_both]
        for stride, of_both in {
            2: ((short, refined(2)), (long, refined(2))),
            3: ((short, refined(3)), (long, refined(3))),
            4: ((short, refined(4, 0.7)), (long, refined(4))),
        }.items()
    }
    assert reached == {
        2: ["0.77 × 39%", "0.82 × 34%"],
        3: ["0.99 × 33%", "0.96 × 29%"],
        4: ["1.20 × 26%", "0.95 × 26%"],
    }
    assert all(abs(rows[refined(4, s)][1]["drift"] - 1) < 0.04 for rows, s in ((short, 0.7), (long, 0.8)))


def test_what_the_readme_says_about_strides_of_the_others(strides):
    for frames in (13, 25):
        rows = strides["student", frames]
        _, figures, rival = rows["stride 2, motion"]
        assert figures["frechet_all"] < 0.5 * rival["frechet_all"]
        assert rows["stride 2, motion, refined from σ 0.7"][1]["frechet_all"] < 0.8
        assert rows["stride 2, motion, full length from σ 0.75"][1]["frechet_all"] > figures["frechet_all"]
        rows = strides["pessimist", frames]
        assert all(rows[f"stride {stride}, motion"][1]["frechet_all"] > 4 for stride in (2, 3, 4))
        assert rows["stride 2, motion, full length from σ 0.9"][1]["frechet_all"] < 1.1


def test_the_template_stride_refine_undistilled_starts_where_it_is_best(strides):
    for frames in (13, 25):
        rows = strides["teacher", frames]
        found = {sigma: rows[refined(2, sigma)][1]["frechet_all"] for sigma in (0.8, 0.7, 0.5)}
        assert min(found, key=found.get) == 0.8


def test_the_template_coarse_to_fine_has_the_best_switch(strides):
    for frames in (13, 25):
        rows = strides["teacher", frames]
        schedule = "stride 2, motion, LTXVScheduler for 16×880"
        found = {
            s: rows[f"{schedule}, full length from σ {s}"][1]["frechet_all"] for s in ("0.9", "0.75", "0.5")
        }
        assert min(found, key=found.get) == "0.75"
        assert rows[f"{schedule}, refined from σ 0.7"][1]["frechet_all"] < found["0.75"]
        own, full = (rows[f"stride 2, motion, LTXVScheduler for {t}×880"][1]["frechet_all"] for t in (9, 16))
        assert own < full, "connect the latent of Keyframe Stride"


def test_what_the_readme_says_about_frozen_steps(pack):
    """With a linear forecast whole blocks beat fewer steps at each start, refreshed every 2nd or 3rd step; hold does not."""
    folder = pack.root / "benchmarks"
    report = report_module(folder)
    rows = json.loads((folder / "quality.json").read_text(encoding="utf-8"))["rows"]
    checked = 0
    for frames, size in report.PRICED_AS.items():
        mine = [row for row in rows if row["model"] == "teacher" and row["frames"] == frames]
        dense = next(row["figures"] for row in mine if row["row"] == "dense")
        rival = report.Rival(mine)
        for row in mine:
            figures, name = row["figures"], row["row"]
            if (
                row["definition"]["kind"] != "freeze"
                or not name.endswith(("every 2.", "every 3."))
                or " to " in name
            ):
                continue
            other = rival.at(row["cost"][size])
            if name.startswith("whole blocks, linear"):
                assert figures["psnr"] > other["psnr"] and figures["psnr"] > 30, name
                assert all(abs(figures[key] / dense[key] - 1) < 0.05 for key in ("drift", "acceleration")), (
                    name
                )
            elif row["cost"][size] < 0.83:
                assert figures["psnr"] < other["psnr"] + 1, name
            checked += 1
    assert checked > 30
    figures = {
        (row["row"], row["frames"]): row["figures"]["psnr"]
        for row in rows
        if row["model"] == "teacher" and "psnr" in row["figures"]
    }
    costs = {
        row["row"]: row["cost"][report.PRICED_AS[row["frames"]]] for row in rows if row["model"] == "teacher"
    }
    for start in ("0.2", "0.4", "0.6", "0.75"):
        name = f"linear, from {start}, every 3."
        assert costs[f"spatial attention, {name}"] > 0.99, "1 % or less"
        for frames in report.PRICED_AS:
            literal, whole = (
                figures[f"{scope}, {name}", frames] for scope in ("spatial attention", "whole blocks")
            )
            assert literal < whole + 1, "as much as whole blocks"
    packed = [key for key in figures if key[0].endswith(", kept as fp8_e4m3fn")]
    lost = {
        key: figures[key[0].removesuffix(", kept as fp8_e4m3fn"), key[1]] - figures[key] for key in packed
    }
    assert len(lost) >= 4 and all(
        f"{loss:.1f}" <= ("0.6" if name.startswith("whole blocks") else "0.8")
        for (name, _), loss in lost.items()
    ), "README: 0.6 and 0.8 dB"


def test_what_the_readme_says_about_overhead(pack):
    folder = pack.root / "benchmarks"
    text = " ".join((folder / "README.md").read_text(encoding="utf-8").split())
    stock, *ours = json.loads((folder / "overhead.json").read_text())["rows"]
    now, before = ([f"{row['hooks_ms']:.1f}" for row in rows] for rows in (ours[:2], ours[2:]))
    spread = f"{stock['ratio']:.1%} ({stock['low'] * 100:.1f} to {stock['high'] * 100:.1f})".replace(
        "%", " %", 1
    )
    assert f"stock against itself came out at {spread}" in text
    assert f"{now[0]} and {now[1]} ms of a step of {stock['stock_ms']:.0f} ms" in text
    assert f"the commit before took {before[0]} and {before[1]} ms" in text
