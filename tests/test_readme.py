"""Figures in the README are those that the benchmark scripts wrote."""

from __future__ import annotations

import json
import re


def test_tables_are_the_measured_ones(pack):
    readme = (pack.root / "README.md").read_text(encoding="utf-8")
    for name in ("gpu.md", "flops.md"):
        assert (pack.root / "benchmarks" / name).read_text(encoding="utf-8").strip() in readme, name


def test_gpu_table_matches_its_json(pack):
    text = (pack.root / "benchmarks" / "gpu.md").read_text(encoding="utf-8")
    rows = json.loads((pack.root / "benchmarks" / "gpu.json").read_text(encoding="utf-8"))["rows"]
    cells = {tuple(f"{row[key]:.0%}" for key in ("step_of_dense", "attention_of_dense")) for row in rows}
    shown = re.findall(r"(\d+%) \((\d+%)\)", text)
    assert len(shown) == 30 and set(shown) <= cells
    ratios = {f"{row['attention_over_key_share']:.2f}" for row in rows if row["setting"] != "dense"}
    assert set(re.findall(r"\b\d\.\d\d\b", text)) == ratios
    dense = {row["clip"]: row["peak_gib_above_weights"] for row in rows if row["setting"] == "dense"}
    assert all(row["peak_gib_above_weights"] <= dense[row["clip"]] + 1e-3 for row in rows), (
        "README: peak memory"
    )


def test_flop_table_matches_its_json(pack):
    text = (pack.root / "benchmarks" / "flops.md").read_text(encoding="utf-8")
    rows = json.loads((pack.root / "benchmarks" / "flops.json").read_text(encoding="utf-8"))["rows"]
    entries = [entry for row in rows for entry in row.values() if isinstance(entry, dict)]
    cells = {(f"{entry['step']:.0%}", f"{entry['attention']:.0%}") for entry in entries}
    shown = re.findall(r"(\d+%) \((\d+%)\)", text)
    assert len(shown) == len(entries) == 30 and set(shown) == cells
