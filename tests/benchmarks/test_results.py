"""How reports and tables are written."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch


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


def test_a_sheet_shows_every_picture_in_its_place(bench):
    pictures = torch.linspace(0, 1, 12)[:, None, None].expand(-1, 4, 4)
    blocks = {
        "one": {"a": pictures[:3], "b\nc": pictures[3:6]},
        "two": {"a": pictures[6:9], "d": pictures[9:]},
    }
    sheet = np.asarray(bench("sheet").contact_sheet(blocks, cell=8, label=40))
    assert sheet.shape == (2 * (16 + 2 * 10), 40 + 3 * 10)
    tops = [16, 26, 16 + 36, 26 + 36]
    shown = [sheet[top : top + 8, left : left + 8] for top in tops for left in (40, 50, 60)]
    for cell, picture in zip(shown, pictures, strict=True):
        assert (cell == round(255 * float(picture[0, 0]))).all()
    assert (sheet[:, 38:40] == 255).all() and (sheet[:, 48:50] == 255).all()
    assert (sheet[16:36, :30] < 128).any(), "the words beside a line"
