"""How reports and tables are written."""

from __future__ import annotations

import json

import pytest


@pytest.fixture(scope="module")
def results(bench):
    return bench("results")


def test_a_row_is_a_line(results):
    rows = [{"name": "4×4", "definition": {"nodes": [["a", {"b": 1}]]}}, {"name": "±2"}]
    report = {"torch": "2", "rows": rows, "by_name": {"a": {"x": 1}, "b": {"x": 2}}, "part": {"rows": rows}}
    report |= {"sigmas": [1.0, 0.8171875], "left_out": []}
    lines = results.text_of(report).splitlines()
    assert json.loads("\n".join(lines)) == report
    line = '{"name": "4×4", "definition": {"nodes": [["a", {"b": 1}]]}},'
    assert [each.strip() for each in lines].count(line) == 2
    assert ' "sigmas": [1.0, 0.8171875],' in lines and '  "b": {"x": 2}' in lines
    assert len(lines) == 19


def test_every_report_is_written_like_that(results, pack):
    found = sorted((pack.root / "benchmarks").glob("*.json"))
    assert len(found) > 10
    for path in found:
        assert path.read_text(encoding="utf-8") == results.text_of(results.read(path)), path.name


def test_of_rows_that_are_alike_the_last_one_stays(results):
    rows = [{"a": 1, "b": 1, "c": 0}, {"a": 1, "b": 2, "c": 0}, {"a": 1, "b": 1, "c": 1}]
    assert results.latest(rows, "a", "b") == [rows[2], rows[1]]


def test_a_table_has_its_cells_as_they_are(results):
    rows = [["±4, 1 sink", "1.50"], ["", "1e5"]]
    assert results.table(["setting", "PSNR"], rows) == (
        "| setting | PSNR |\n|---|---|\n| ±4, 1 sink | 1.50 |\n|  | 1e5 |"
    )
