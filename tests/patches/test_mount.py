"""The plan on a MODEL: replaced, removed, ordered, shared; the schedule clock and the settings' ranges."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import ClassVar

import pytest
from tiny_models import build_model

FULL = {"start_percent": 0.0, "end_percent": 1.0}


@pytest.fixture
def window(pack):
    technique, schedule = (
        pack("patches.techniques.temporal_window").TemporalWindow,
        pack("patches.clock").Schedule,
    )

    def make(**settings):
        part = {name: settings.pop(name) for name in FULL if name in settings}
        return technique(**settings, schedule=schedule(**part))

    return make


@pytest.fixture
def mounting(pack):
    return pack("patches.mount")


@pytest.fixture
def other(pack):
    """A second technique, as the next one will be."""
    base = pack("patches.techniques.temporal_window").TemporalWindow

    @dataclass(frozen=True)
    class Other(base):
        name: ClassVar[str] = "other"
        stage: ClassVar[int] = 10

    return Other(schedule=pack("patches.clock").Schedule())


def wrappers(model):
    return {kind: len(keys.get("frame_thrift", [])) for kind, keys in model.wrappers.items()}


def test_mounting_clones_and_leaves_the_model_alone(mounting, window):
    model = build_model()
    patched = mounting.mount(model, window())
    assert patched is not model and patched.model is model.model
    assert mounting.plan_of(model) == () and not any(wrappers(model).values())
    assert mounting.plan_of(patched) == (window(),)


def test_the_later_of_two_wins_and_wrappers_do_not_pile_up(mounting, window):
    model = build_model()
    for size in (1, 2, 3):
        model = mounting.mount(model, window(window=size))
    assert mounting.plan_of(model) == (window(window=3),)
    assert set(wrappers(model).values()) == {1}


def test_neutral_removes_and_otherwise_returns_the_same_model(mounting, window, caplog):
    model, neutral = build_model(), window(start_percent=0.5, end_percent=0.5)
    assert mounting.mount(model, neutral) is model
    assert "is not mounted: start_percent 0.5 is not below end_percent 0.5" in caplog.text
    removed = mounting.mount(mounting.mount(model, window()), neutral)
    assert mounting.plan_of(removed) == () and not any(wrappers(removed).values())


def test_order_of_nodes_does_not_matter(mounting, window, other):
    model = build_model()
    one = mounting.mount(mounting.mount(model, window()), other)
    two = mounting.mount(mounting.mount(model, other), window())
    assert mounting.plan_of(one) == mounting.plan_of(two) == (other, window())
    assert mounting.mount(one, window(start_percent=1.0)).model_options["transformer_options"][
        "frame_thrift_plan"
    ] == (other,)


def test_plan_is_frozen_and_journal_is_shared_by_clones(mounting, window):
    model = mounting.mount(build_model(), window())
    with pytest.raises(dataclasses.FrozenInstanceError):
        mounting.plan_of(model)[0].window = 5
    assert mounting.journal_of(model.clone()) is mounting.journal_of(model)
    assert mounting.plan_of(model.clone()) == mounting.plan_of(model)


def test_journal_keeps_the_last_runs_and_hands_out_copies(pack):
    journal = pack("patches.journal").Journal(length=2)
    for number in range(3):
        journal.add({"run": [number]})
    journal.records()[0]["run"].append("changed")
    assert journal.records() == [{"run": [1]}, {"run": [2]}]


@pytest.mark.parametrize(
    "bad",
    [
        {"window": 0}, {"window": 33}, {"sink_frames": -1}, {"sink_frames": 9}, {"dense_blocks": -1},
        {"dense_blocks": 17}, {"window": 1.5}, {"window": True}, {"window": "2"}, {"end_percent": None}, {"start_percent": -0.1}, {"end_percent": 1.1},
    ],
)  # fmt: skip
def test_nonsense_is_rejected_by_name(window, bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        window(**bad)


def test_clock(pack):
    part = pack("patches.clock").Schedule
    clock = pack("patches.clock").SigmaClock((1.0, 0.9, 0.5, 0.1, 0.0), lambda percent: 1 - percent)
    assert clock.steps == 4
    assert clock.steps_within(part()) == [0, 1, 2, 3]
    assert clock.steps_within(part(0.1, 0.5)) == [1, 2]
    assert clock.steps_within(part(0.2, 0.4)) == []
    assert clock.is_within(14.6, part(0.0, 0.1)), "percent 0 has no upper end"
    assert clock.percent(0.5) == pytest.approx(0.5)
    nearest = next(clock.other_parts(part(0.2, 0.4)))
    assert nearest in (("start_percent", part(0.1, 0.4)), ("end_percent", part(0.2, 0.5)))
    assert next(clock.other_parts(part(0.92, 0.95))) == ("start_percent", part(0.9, 0.95))
    assert [clock.step_at(s) for s in (1.5, 1.0, 0.95, 0.9, 0.5, 0.3, 0.05)] == [0, 0, 0, 1, 2, 2, 3]


def test_the_node_form(pack):
    schema = pack("nodes").ApplyTemporalWindow.define_schema()
    assert schema.node_id == "ApplyTemporalWindow"
    ranges = {i.id: (i.min, i.max, i.default) for i in schema.inputs if hasattr(i, "min")}
    assert ranges == {
        "window": (1, 32, 4),
        "sink_frames": (0, 8, 1),
        "start_percent": (0.0, 1.0, 0.5),
        "end_percent": (0.0, 1.0, 1.0),
        "dense_blocks": (0, 16, 0),
    }
    assert [i.id for i in schema.inputs] == ["model", *ranges]
    assert all(i.tooltip for i in schema.inputs)
    assert schema.inputs[-1].extra_dict == {"advanced": True}


def test_the_form_of_the_freeze(pack):
    schema = pack("nodes").ScheduleSpatialFreeze.define_schema()
    assert schema.node_id == "ScheduleSpatialFreeze"
    assert [i.id for i in schema.inputs] == [
        "model", "start_percent", "end_percent", "refresh_every", "scope", "forecast", "blocks_kept", "cache_device",
        "cache_limit_gb", "cache_dtype",
    ]  # fmt: skip
    # A graph that was saved without it keeps working.
    assert [i.id for i in schema.inputs if i.optional] == ["cache_dtype"]
    defaults = {i.id: i.default for i in schema.inputs if hasattr(i, "default")}
    assert defaults["start_percent"] == 0.6 and defaults["end_percent"] == 1.0
    assert defaults["refresh_every"] == 3 and defaults["cache_device"] == "auto"
    advanced = [i.id for i in schema.inputs if (i.extra_dict or {}).get("advanced")]
    assert advanced == ["forecast", "blocks_kept", "cache_device", "cache_limit_gb", "cache_dtype"]
    assert all(i.tooltip for i in schema.inputs)
