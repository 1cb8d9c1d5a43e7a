"""Every row of the preset table is what its evidence measured, and the measurement is good enough."""

from __future__ import annotations

import json
from dataclasses import asdict

import pytest

FREEZE, WINDOW = "ScheduleSpatialFreeze", "ApplyTemporalWindow"
# By the techniques' names: how reports call their nodes.
NODES = {"spatial freeze": FREEZE, "temporal window": WINDOW}


@pytest.fixture(scope="module")
def table(pack):
    return pack("presets.table")


@pytest.fixture(scope="module")
def rows_of(pack):
    """The measured rows of an evidence and dense's, by latent frames."""
    known = {}

    def rows_of(evidence):
        path = pack.root / "benchmarks" / f"{evidence.report}.json"
        if evidence.report not in known:
            known[evidence.report] = json.loads(path.read_text(encoding="utf-8"))["rows"]
        whose = "base" if evidence.report == "two_stage" else "model"
        of_model = [row for row in known[evidence.report] if row[whose] == evidence.model]
        own, dense = (
            {row["frames"]: row for row in of_model if row["row"] == name} for name in (evidence.row, "dense")
        )
        return {frames: (row, dense[frames]) for frames, row in own.items()}

    return rows_of


def entries(table):
    return [(key, recipe, evidence) for key, recipe in table.TABLE.items() for evidence in recipe.evidence]


def test_every_preset_has_every_stage(table):
    assert table.TABLE.keys() == {(preset, stage) for preset in table.PRESETS for stage in table.STAGES}
    assert all(recipe.evidence for recipe in table.TABLE.values())


def test_evidence_says_what_its_row_measured_at_all_lengths(table, rows_of):
    for key, _, evidence in entries(table):
        measured = {
            frames: round(row["figures"]["frechet_all"] / dense["figures"]["frechet_all"], 2)
            for frames, (row, dense) in rows_of(evidence).items()
        }
        assert measured == evidence.distances, key
        (row, _), *_ = rows_of(evidence).values()
        # Reports name clips by their frames, or by frames and size.
        cost = next(share for clip, share in row["cost"].items() if evidence.clip.startswith(clip))
        assert evidence.cost == round(cost, 2), key


def test_evidence_was_measured_with_the_settings_of_its_preset(table, rows_of):
    """What acts in a schedule of that many steps is mounted in the row, and nothing else."""
    for key, recipe, evidence in entries(table):
        (row, _), *_ = rows_of(evidence).values()
        definition = row["definition"]
        if evidence.report == "two_stage":
            assert (definition["first"], definition["second"]) == (evidence.first, recipe.stride), key
        else:
            assert recipe.stride == (definition.get("striding") or {"stride": 1})["stride"], key
            assert evidence.first is None
        mounted = dict(definition["nodes"])
        acting = {
            NODES[technique.name]: technique
            for technique in recipe.techniques
            if technique.name in NODES and technique.schedule.is_part_of(evidence.steps)
        }
        assert mounted.keys() == acting.keys(), key
        for node, technique in acting.items():
            settings = {**asdict(technique), **asdict(technique.schedule)}
            # Limits and places of what is kept change no picture.
            shared = {n: v for n, v in mounted[node].items() if not n.startswith("cache_")}
            assert {name: settings[name] for name in shared} == shared, key


def test_bounds_hold_at_every_length_that_was_measured(table, rows_of):
    """Nothing broken: at most what a run of fewer steps loses at that price, and most of the detail is there."""
    checked = 0
    for key, _, evidence in entries(table):
        for frames, (row, dense) in rows_of(evidence).items():
            figures, full = row["figures"], dense["figures"]
            most = 1.5 if evidence.first is None else 3.3
            assert figures["frechet_all"] <= most * full["frechet_all"], (key, frames)
            assert figures["drift"] <= 1.25 * full["drift"], (key, frames)
            assert figures["caption"] >= full["caption"] - 0.03, (key, frames)
            assert figures.get("detail", 1.0) >= 0.88 * full.get("detail", 1.0), (key, frames)
            checked += 1
    assert checked > 20
