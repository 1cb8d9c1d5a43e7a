"""Every row of the preset table is what its evidence measured, and the measurement is good enough."""

from __future__ import annotations

import json
from dataclasses import asdict

import pytest

FREEZE, WINDOW, STRIDE = "ScheduleSpatialFreeze", "ApplyTemporalWindow", "KeyframeStride"
# By the techniques' names: how reports call their nodes.
NODES = {"spatial freeze": FREEZE, "temporal window": WINDOW}


@pytest.fixture(scope="module")
def table(pack):
    return pack("presets.table")


@pytest.fixture(scope="module")
def reports(pack):
    known = {}

    def row_of(evidence):
        path = pack.root / "benchmarks" / f"{evidence.report}.json"
        rows = known.setdefault(evidence.report, json.loads(path.read_text(encoding="utf-8"))["rows"])
        whose = "base" if evidence.report == "two_stage" else "model"
        alike = [row for row in rows if (row[whose], row["frames"]) == (evidence.model, evidence.frames)]
        of = {row["row"]: row for row in alike}
        return of[evidence.row], of["dense"]

    return row_of


def entries(table):
    return [(key, recipe, evidence) for key, recipe in table.TABLE.items() for evidence in recipe.evidence]


def test_every_preset_has_every_stage(table):
    assert table.TABLE.keys() == {(preset, stage) for preset in table.PRESETS for stage in table.STAGES}
    assert all(recipe.evidence for recipe in table.TABLE.values())


def test_evidence_says_what_its_row_measured(table, reports):
    for key, _, evidence in entries(table):
        row, dense = reports(evidence)
        assert evidence.cost == round(row["cost"][evidence.at], 2), key
        distances = (row["figures"]["frechet_all"], dense["figures"]["frechet_all"])
        assert evidence.distance == round(distances[0] / distances[1], 2), key


def test_evidence_was_measured_with_the_settings_of_its_preset(table, reports):
    """What acts in a schedule of that many steps is mounted in the row, and nothing else."""
    for key, recipe, evidence in entries(table):
        definition = reports(evidence)[0]["definition"]
        if evidence.report == "two_stage":
            strides = {definition["first"], definition["second"]}
            assert recipe.stride == max(strides) and strides <= {1, recipe.stride}, key
        else:
            assert recipe.stride == (definition.get("striding") or {"stride": 1})["stride"], key
        mounted = dict(definition["nodes"])
        acting = {
            NODES[technique.name]: technique
            for technique in recipe.techniques
            if technique.name in NODES and technique.schedule.least_steps <= evidence.steps
        }
        assert mounted.keys() == acting.keys(), key
        for node, technique in acting.items():
            settings = {**asdict(technique), **asdict(technique.schedule)}
            # Limits and places of what is kept change no picture.
            shared = {n: v for n, v in mounted[node].items() if not n.startswith("cache_")}
            assert {name: settings[name] for name in shared} == shared, key


def test_bounds_hold_at_every_length_that_was_measured(table, pack):
    """Nothing broken: at most about what the second stage's rival at that price loses, and most of the detail there."""
    checked = 0
    for key, _, evidence in entries(table):
        rows = json.loads((pack.root / "benchmarks" / f"{evidence.report}.json").read_text(encoding="utf-8"))[
            "rows"
        ]
        whose = "base" if evidence.report == "two_stage" else "model"
        for row in rows:
            if (row["row"], row[whose]) != (evidence.row, evidence.model):
                continue
            dense = next(
                (
                    other["figures"]
                    for other in rows
                    if (other["row"], other[whose], other["frames"])
                    == ("dense", evidence.model, row["frames"])
                ),
                None,
            )
            if dense is None:
                continue
            figures = row["figures"]
            most = 3.3 if evidence.report == "two_stage" else 1.5
            assert figures["frechet_all"] <= most * dense["frechet_all"], (key, row["frames"])
            assert figures["drift"] <= 1.25 * dense["drift"], (key, row["frames"])
            assert figures["caption"] >= dense["caption"] - 0.03, (key, row["frames"])
            assert figures.get("detail", 1.0) >= 0.88 * dense.get("detail", 1.0), (key, row["frames"])
            checked += 1
    assert checked > 20
