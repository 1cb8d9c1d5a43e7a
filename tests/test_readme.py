"""Figures in the README are those that the benchmark scripts wrote."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import re


def test_tables_are_the_measured_ones(pack):
    readme = (pack.root / "README.md").read_text(encoding="utf-8")
    for name in ("gpu_short.md", "gpu_strides.md", "flops.md", "quality_short.md", "quality_strides.md"):
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
