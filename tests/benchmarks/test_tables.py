"""Tables beside their JSON, for those whose scripts need ComfyUI."""

from __future__ import annotations

import json

import pytest


@pytest.mark.parametrize(
    ("name", "function"),
    [
        ("inbetween", "tables"),
        ("low_rank", "table"),
        ("pacing", "table"),
        ("pooling_error", "table"),
        ("routing", "tables"),
    ],
)
def test_table_is_that_of_its_json(name, function, bench, pack):
    folder = pack.root / "benchmarks"
    content = json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))
    assert getattr(bench(name), function)(content) == (folder / f"{name}.md").read_text(encoding="utf-8")
