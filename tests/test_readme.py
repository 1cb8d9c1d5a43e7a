"""Figures in the README are those that the benchmark scripts wrote."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import re


def test_tables_are_the_measured_ones(pack):
    readme = (pack.root / "README.md").read_text(encoding="utf-8")
    names = (
        "gpu_short",
        "gpu_strides",
        "flops",
        "quality_short",
        "quality_strides",
        "quality_freeze",
        "freeze",
        "recipes",
    )
    for name in (f"{name}.md" for name in names):
        assert (pack.root / "benchmarks" / name).read_text(encoding="utf-8").strip() in readme, name


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
    spec = importlib.util.spec_from_file_location("quality_report", folder / "report.py")
    report = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(report)
    content = json.loads((folder / "quality.json").read_text(encoding="utf-8"))
    assert (folder / "quality.md").read_text(encoding="utf-8") == report.tables(content)
    assert (folder / "quality_short.md").read_text(encoding="utf-8") == report.short_tables(content)
    assert (folder / "quality_strides.md").read_text(encoding="utf-8") == report.stride_tables(content)
    assert (folder / "quality_freeze.md").read_text(encoding="utf-8") == report.freeze_tables(content)
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
        (row["clip"], row["steps"], row["start_percent"], row["refresh_every"]): row["of_dense"]
        for row in freeze
        if row["scope"] == "whole blocks" and row["cache_device"] == "gpu" and row["cache_dtype"] == "default"
    }
    large, small = "121 f 1280×704", "97 f 896×512"
    assert [f"{of_dense[large, 24, 0.2, every]:.0%}" for every in (3, 2)] == ["68%", "75%"], (
        "README: 32 %, a quarter"
    )
    assert all(0.775 < share < 0.8 for (clip, *_), share in of_dense.items() if clip == small), (
        "README: a fifth"
    )
    eight = {row["start_percent"]: row["frozen_steps"] for row in freeze if row["steps"] == 8}
    assert eight == {0.0: 3, 0.2: 1} and f"{of_dense[large, 8, 0.0, 2]:.0%}" == "66%", "README: a third"
    around = report["gib_around_an_interrupt"]
    assert all(found["before"] == found["after"] for found in around.values())
    assert around["gpu"]["within"] > around["gpu"]["before"] + 4
    in_host = [row for row in freeze if row["cache_device"] == "cpu"]
    two_blocks = 4 * 14080 * 4096 * 2 / 2**30
    assert in_host and all(row["peak_gib"] <= row["dense_peak_gib"] + two_blocks for row in in_host)


def test_what_the_readme_says_about_frozen_steps(pack):
    """With a linear forecast whole blocks beat fewer steps at each start, refreshed every 2nd or 3rd step; hold does not."""
    folder = pack.root / "benchmarks"
    spec = importlib.util.spec_from_file_location("quality_report", folder / "report.py")
    report = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(report)
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
    packed = [key for key in figures if key[0].endswith(", kept as fp8_e4m3fn")]
    lost = {
        key: figures[key[0].removesuffix(", kept as fp8_e4m3fn"), key[1]] - figures[key] for key in packed
    }
    assert len(lost) >= 4 and all(
        f"{loss:.1f}" <= ("0.2" if name.startswith("whole blocks") else "0.6")
        for (name, _), loss in lost.items()
    ), "README: 0.2 and 0.6 dB"
