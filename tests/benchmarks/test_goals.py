"""The table of goals says what the reports say."""

from __future__ import annotations

import pytest


@pytest.fixture
def goals(bench):
    return bench("goals")


def seeds(*values, figure="drift"):
    return {"seeds": [{figure: value} for value in values]}


@pytest.mark.parametrize(
    ("values", "bound", "said"),
    [
        ((1.0, 1.0, 1.0), 1.0, "holds"),
        ((1.05, 1.04, 1.06), 1.1, "holds"),
        ((1.0, 1.09, 1.12), 1.1, "in the mean only"),
        ((1.2, 1.1, 1.3), 1.1, "missed"),
    ],
)
def test_a_bound_holds_with_the_spread_of_the_seeds(goals, values, bound, said):
    assert goals.verdict(seeds(*values), seeds(1.0, 1.0, 1.0), "drift", bound) == said


def test_seeds_are_paired(goals):
    """What all runs of a seed share is no spread."""
    assert goals.verdict(seeds(1.0, 2.0, 3.0), seeds(1.0, 2.0, 3.0), "drift", 1.0) == "holds"


def test_of_detail_more_is_better(goals):
    dense = seeds(1.0, 1.0, 1.0, figure="detail")
    assert goals.verdict(seeds(0.96, 0.97, 0.95, figure="detail"), dense, "detail", 0.9) == "holds"
    assert goals.verdict(seeds(0.8, 0.8, 0.8, figure="detail"), dense, "detail", 0.9) == "missed"


def test_the_table_is_that_of_the_reports(goals, pack, tmp_path, monkeypatch):
    committed = (pack.root / "benchmarks/goals.md").read_text(encoding="utf-8")
    written = tmp_path / "goals.md"
    for name in ("two_stage", "quality", "recipes"):
        (tmp_path / f"{name}.json").symlink_to(pack.root / f"benchmarks/{name}.json")
    monkeypatch.setattr(goals, "HERE", tmp_path)
    goals.main()
    assert written.read_text(encoding="utf-8") == committed
