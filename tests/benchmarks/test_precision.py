"""The tables of attention precision, and what its page says of them."""

from __future__ import annotations

import json


def test_tables_are_those_of_the_json(bench, pack):
    folder = pack.root / "benchmarks"
    report = json.loads((folder / "precision.json").read_text(encoding="utf-8"))
    assert (folder / "precision.md").read_text(encoding="utf-8") == bench("precision").tables(report)


def test_what_page_and_tooltips_say_about_errors(pack):
    report = json.loads((pack.root / "benchmarks" / "precision.json").read_text(encoding="utf-8"))["error"]
    rows = {(row["attention"], row["values_times"], row["setting"]): row for row in report["rows"]}
    for role in ("self", "text"):
        for size in (1.0, 1e5, 1e6):
            fp16, bf16, fp32 = (rows[role, size, name] for name in ("fp16", "bf16", "fp32"))
            assert 7.5 < bf16["median"] / fp16["median"] < 9.5, "an eighth"
            assert fp16["worst"] < 1e-3 and bf16["worst"] < 6e-3 and fp32["worst"] < 1e-6
            unscaled = fp16["finite_without_scaling"] / fp16["calls"]
            assert unscaled == 1 if size == 1 else unscaled < 0.2, "without scaling they overflow"
            assert fp16["median"] < 1.05 * rows[role, 1.0, "fp16"]["median"], "as with small ones"


def test_gpu_part_takes_what_there_is_time_for(bench):
    """On the CPU, with a tiny clip: attention alone in every type, and what is left out by name."""
    precision = bench("precision")
    clip, saved = bench("ltx2").Clip(9, 64, 32), []
    gpu = precision.Gpu("cpu", [clip], 1, 60.0, saved.append)
    gpu.attention(clip, None)
    rows = gpu.report["attention"]
    assert [(row["model"], row["setting"]) for row in rows if row["attention"] == "self"] == [
        ("bf16", "own"),
        ("bf16", "fp16"),
        ("bf16", "fp32"),
        ("fp32", "own"),
        ("fp32", "fp16"),
        ("fp32", "bf16"),
    ]
    assert len(rows) == len(saved) == 12 and all(row["ms"] > 0 for row in rows)
    late = precision.Gpu("cpu", [clip], 1, -1.0, saved.append)
    late.attention(clip, None)
    assert not late.report["attention"] and len(late.report["left_out"]) == 12
