"""Pauses between and within forwards: the same bits, a cool GPU, and no more waiting than allowed."""

from __future__ import annotations

import itertools
import logging
import threading
import time
from dataclasses import dataclass
from types import SimpleNamespace

import comfy.model_management
import pytest
import torch
from laptop import Laptop
from reference import equal
from tiny_models import FAMILIES, build_model, sample

ONLY_DUTY = {"target_temperature": 0}
BLOCKS = 3


@pytest.fixture(scope="module")
def paced(pack):
    """`paced(model, max_duty=...)`: the model as the node returns it."""
    node = pack("nodes").ThriftPaceGPU
    return lambda model, **settings: node.execute(model, **settings).args[0]


@pytest.fixture
def record(pack):
    journal_of = pack("patches.mount").journal_of
    return lambda model: journal_of(model).records()[-1]["techniques"]["GPU pacing"]


@pytest.fixture
def told(record):
    """What the last run says of its one device."""

    def tell(model):
        (device,) = record(model)["devices"].values()
        return device

    return tell


@pytest.fixture
def on(pack):
    """`on(laptop, model, …)`: the model paced on that laptop; its sensors, or functions that are read before its own."""
    pacing, mount = pack("patches.techniques.pacing"), pack("patches.mount").mount

    def make(laptop, model, *readings, has_sensor=True, **settings):
        @dataclass(frozen=True)
        class Simulated(pacing.GpuPacing):
            def begin(self, run):
                def sensors(device):
                    if has_sensor:
                        yield from laptop.sensors(pack("patches.sensors").Sensor, *readings)

                return pacing.Pacing(self, run, lambda device: laptop, sensors)

        return mount(model, Simulated(**settings))

    return make


def lines(caplog, *words):
    return [r.getMessage() for r in caplog.records if all(word in r.getMessage() for word in words)]


def busy_share(laptop):
    return laptop.busy / laptop.clock


# Duty.


@pytest.mark.parametrize("seconds", [0.05, 0.4, 2.0])
@pytest.mark.parametrize("duty", [0.1, 0.4, 0.7, 0.95])
@pytest.mark.parametrize("lead", [None, 0.001, 0.02])
def test_it_is_busy_for_its_share_however_far_ahead_the_host_is(lead, duty, seconds, on, told):
    """Blocks from 50 ms to 2 s."""
    laptop, model = Laptop(lead=lead), build_model(blocks=BLOCKS)
    steps = max(4, round(6 / seconds / BLOCKS))
    ours = on(laptop, laptop.heat(model, seconds), max_duty=duty, max_pause=600.0, **ONLY_DUTY)
    sample(ours, steps=steps, cfg=1.0)
    laptop.drain()
    assert laptop.busy == pytest.approx(seconds * BLOCKS * steps)
    # What is left at the end is less than a slice.
    owed = told(ours)["paused"]["duty"]
    assert laptop.busy - owed / (1 / duty - 1) < 0.25 + seconds * BLOCKS
    assert owed / (1 / duty - 1) <= laptop.busy * 1.001
    assert busy_share(laptop) == pytest.approx(duty, abs=0.05)


@pytest.mark.parametrize("lead", [None, 0.001])
def test_long_calls_are_paced_in_slices(lead, on):
    """Of 0.25 s and what the host was ahead: never many seconds of load at a stretch."""
    laptop, model = Laptop(lead=lead), build_model(blocks=24)
    sample(on(laptop, laptop.heat(model, 0.1), max_duty=0.5, **ONLY_DUTY), steps=2, cfg=1.0)
    parts = [(busy, list(part)) for busy, part in itertools.groupby(laptop.trace, lambda point: point[2])]
    ends = [0.0, *(part[-1][0] for _, part in parts)]
    stretches = [
        after - before for (busy, _), before, after in zip(parts, ends, ends[1:], strict=False) if busy
    ]
    longest = max(stretches)
    assert 0.25 <= longest <= 0.8 and len(stretches) > 5


def test_idle_time_between_calls_is_none_of_its_work(on, told):
    """A preview that takes as long as the step itself."""
    laptop, model = Laptop(), build_model(blocks=BLOCKS)
    ours = on(laptop, laptop.heat(model, 0.1), max_duty=0.5, **ONLY_DUTY)
    sample(ours, steps=10, cfg=1.0, callback=lambda *_: laptop.sleep(0.3))
    assert told(ours)["paused"]["duty"] == pytest.approx(laptop.busy, abs=0.3)


@pytest.mark.parametrize("has_sensor", [True, False])
def test_nothing_to_do_costs_no_pause_and_no_waiting(has_sensor, on, told, record):
    laptop, model = Laptop(rise=20.0), build_model()
    ours = on(laptop, laptop.heat(model, 1.0), has_sensor=has_sensor, max_duty=1.0 if has_sensor else 0.99)
    sample(ours, cfg=1.0)
    assert record(ours)["taken"] == 3 and bool(told(ours)["paused"]) is not has_sensor
    assert bool(laptop.drained) is not has_sensor


def test_the_steps_of_the_record_say_what_were_pauses(on, told):
    laptop, model = Laptop(), build_model(blocks=BLOCKS)
    ours = on(laptop, laptop.heat(model, 1.0), max_duty=0.5, **ONLY_DUTY)
    sample(ours, cfg=1.0)
    assert told(ours)["paused_by_step"] == {step: pytest.approx(3.0) for step in "012"}
    assert sum(told(ours)["paused_by_step"].values()) == pytest.approx(told(ours)["paused"]["duty"])


@pytest.mark.parametrize("sampler", ["euler", "heun"])
@pytest.mark.parametrize("cfg", [1.0, 2.0])
def test_no_step_pauses_longer_than_max_pause(sampler, cfg, on, told, caplog):
    """Whatever else a step evaluates."""
    laptop, model = Laptop(), build_model(blocks=BLOCKS)
    ours = on(laptop, laptop.heat(model, 1.0), max_duty=0.1, max_pause=5.0)
    with caplog.at_level(logging.INFO):
        sample(ours, steps=4, cfg=cfg, sampler=sampler)
    assert list(told(ours)["paused_by_step"].values()) == [pytest.approx(5.0)] * 4
    assert sum(told(ours)["paused"].values()) <= 5.0 * 4 + 1e-6
    assert len(lines(caplog, "all of max_pause")) == 1


# Temperature.


def run_hot(on, laptop, steps=40, seconds=0.5, **settings):
    model = laptop.heat(build_model(blocks=BLOCKS), seconds)
    ours = on(laptop, model, **settings)
    sample(ours, steps=steps, cfg=1.0)
    return ours


@pytest.mark.parametrize("lead", [None, 0.001])
@pytest.mark.parametrize("resolution", [0.001, 1.0])
@pytest.mark.parametrize(("target", "below"), [(75, 5), (60, 3), (80, 10), (70, 1)])
def test_the_temperature_stays_below_the_target(target, below, resolution, lead, on, told, caplog):
    laptop = Laptop(resolution=resolution, lead=lead, start=50.0)
    ours = run_hot(on, laptop, 130, 0.15, target_temperature=target, resume_below=below)
    highest = max(temperature for _, temperature, _ in laptop.trace)
    assert target - 1 < highest < target + 1, "after warming up it is used to the full"
    assert not lines(caplog, "all of max_pause") and told(ours)["paused"]["temperature"] > 5
    assert told(ours)["hottest"] <= target + 1 and told(ours)["sensor"] == "sensor 1"
    # No oscillation faster than the hysteresis: from a rest's end to the next's, the die goes down by `below` degrees.
    rests = [
        [t for _, t, _ in part] for busy, part in itertools.groupby(laptop.trace, lambda p: p[2]) if not busy
    ]
    assert len(rests) > 2 and all(max(rest) - min(rest) > below - resolution - 0.3 for rest in rests)


def test_a_hot_room_hangs_no_run(on, told, caplog):
    """Idle it is hotter than the target: each step waits for max_pause, and one line says so."""
    laptop = Laptop(ambient=85.0, rise=10.0)
    ours = run_hot(on, laptop, 6, target_temperature=75, max_pause=4.0)
    assert told(ours)["paused"] == {"temperature": pytest.approx(24.0)}
    assert all(seconds <= 4.0 + 1e-6 for seconds in told(ours)["paused_by_step"].values())
    (line,) = lines(caplog, "all of max_pause")
    assert "step 1" in line and "°C" in line


def test_cooling_counts_for_the_duty(on, told):
    """A GPU that waits is idle, for whatever reason."""
    laptop = Laptop(rise=140.0)
    ours = run_hot(on, laptop, 60, target_temperature=75, max_duty=0.9)
    paused = told(ours)["paused"]
    assert paused["temperature"] > 3 * paused["duty"] and busy_share(laptop) < 0.9


def test_the_closing_line_tells_pauses_and_temperatures(on, caplog):
    with caplog.at_level(logging.INFO):
        run_hot(on, Laptop(), target_temperature=75, max_duty=0.9)
    (line,) = lines(caplog, "taken")
    assert "GPU pacing (cools from 75 °C to 70 °C, busy 90% of the time): steps 1–40 of 40" in line
    assert "40 forwards taken, declined: none; paused " in line and "s for duty, " in line
    assert "s for temperature, 75 °C at most, 7" in line and line.endswith("°C last by sensor 1).")


# Sensors that cannot be believed.


def broken():
    raise OSError("no such device")


@pytest.mark.parametrize(
    ("reading", "why"),
    [
        (lambda: 0, "says 0 °C"),
        (lambda: 255, "says 255 °C"),
        (lambda: 131, "says 131 °C"),
        (lambda: -3, "says -3 °C"),
        (lambda: float("nan"), "says nan °C"),
        (broken, "fails (no such device)"),
    ],
)
@pytest.mark.parametrize("has_other", [True, False])
def test_a_sensor_that_fails_or_lies_is_dropped_with_one_line(
    reading, why, has_other, on, told, caplog, record
):
    laptop = Laptop(rise=140.0)
    readings = [reading] if has_other else [reading, broken]
    model = laptop.heat(build_model(blocks=BLOCKS), 0.5)
    ours = on(laptop, model, *readings)
    if not has_other:
        laptop.reading = broken
    sample(ours, steps=20, cfg=1.0)
    (line,) = lines(caplog, "drops sensor 1 of cpu", why)
    assert "sensor 2 is asked instead" in line
    if has_other:
        assert told(ours)["sensor"] == "sensor 2" and told(ours)["paused"]["temperature"]
        assert len(lines(caplog, "drops")) == 1 and told(ours)["hottest"] < 80
    else:
        assert lines(caplog, "drops sensor 3", "nothing paces")
        assert record(ours)["declined"] == {"NO_SENSOR": 19} and record(ours)["taken"] == 1


def test_a_sensor_may_fail_in_the_middle_of_a_run(on, told, caplog):
    laptop = Laptop()
    model = laptop.heat(build_model(blocks=BLOCKS), 0.5)

    def read():
        return laptop.reading() if laptop.clock < 20 else broken()

    ours = on(laptop, model, read, has_sensor=True, max_duty=0.9)
    sample(ours, steps=40, cfg=1.0)
    assert len(lines(caplog, "drops sensor 1")) == 1 and told(ours)["sensor"] == "sensor 2"


def test_a_frozen_sensor_is_dropped_with_one_line(on, told, caplog):
    """Hot and never cooler: after a minute's rest and work in between it is known."""
    laptop = Laptop()
    model = laptop.heat(build_model(blocks=BLOCKS), 1.0)
    ours = on(laptop, model, lambda: 81)
    sample(ours, steps=12, cfg=1.0)
    (line,) = lines(caplog, "drops sensor 1")
    assert "81 °C through" in line and told(ours)["sensor"] == "sensor 2"
    assert told(ours)["paused"]["temperature"] < 5 * 60


@pytest.mark.parametrize("resolution", [1.0, 2.0, 5.0])
@pytest.mark.parametrize("duty", [1.0, 0.5])
def test_a_steady_temperature_is_no_frozen_sensor(duty, resolution, on, told, caplog):
    """Twenty minutes at a balance below the target, whatever the sensor can tell apart."""
    laptop = Laptop(rise=40.0, resolution=resolution)
    model = laptop.heat(build_model(blocks=BLOCKS), 1.0)
    ours = on(laptop, model, max_duty=duty)
    sample(ours, steps=400, cfg=1.0)
    assert not lines(caplog, "drops") and told(ours)["sensor"] == "sensor 1" and laptop.clock >= 1200


def test_a_coarse_sensor_at_the_target_is_no_frozen_one(on, told, caplog):
    laptop = Laptop(resolution=5.0)
    ours = run_hot(on, laptop, 200, target_temperature=75, resume_below=5)
    assert not lines(caplog, "drops") and told(ours)["paused"]["temperature"] > 30


# Without a sensor.


def test_without_a_sensor_there_is_nothing_to_do(paced, record, told, caplog):
    """A CPU has none that is read."""
    model = build_model()
    ours = paced(model)
    with caplog.at_level(logging.INFO):
        assert equal(sample(ours), sample(model))
    assert record(ours)["declined"] == {"NO_SENSOR": 3} and not record(ours)["taken"]
    assert len(lines(caplog, "finds no temperature sensor for cpu", "max_duty is 1")) == 1
    assert lines(caplog, "no effect, declined: NO_SENSOR ×3")


def test_without_a_sensor_duty_works(paced, record, told, caplog):
    ours = paced(build_model(), max_duty=0.5)
    sample(ours)
    assert record(ours)["taken"] == 3 and told(ours)["sensor"] is None
    assert len(lines(caplog, "only max_duty paces")) == 1


def test_cooling_by_more_than_the_target_is_refused(paced):
    """Nothing is as cool as that."""
    with pytest.raises(
        ValueError, match=r"resume_below is 30; it takes fewer degrees than target_temperature"
    ):
        paced(build_model(), target_temperature=20, resume_below=30)


def test_neutral_settings_are_not_mounted(paced, pack):
    model = build_model()
    assert paced(model, target_temperature=0, max_duty=1.0) is model
    both = paced(paced(model, max_duty=0.5), target_temperature=0)
    assert pack("patches.mount").plan_of(both) == ()


# By the real clock.


def slowed(model, seconds=0.1):
    for block in model.model.diffusion_model.transformer_blocks:
        block.register_forward_pre_hook(lambda *_: time.sleep(seconds))
    return model


def test_pauses_are_real(paced, told):
    model = slowed(build_model())
    ours = paced(model, max_duty=0.5, **ONLY_DUTY)
    begun = time.perf_counter()
    sample(ours, cfg=1.0)
    seconds = time.perf_counter() - begun
    paused = told(ours)["paused"]["duty"]
    assert 0.6 < paused < seconds - 0.9 and seconds > 1.6


@pytest.mark.parametrize("where", ["within a call", "after a call"])
def test_cancel_answers_at_once(where, paced, told, pack):
    """Within a fifth of a second, and the next run is as the one before."""
    model = build_model()
    expected = sample(model, cfg=1.0)
    hooks = [
        block.register_forward_pre_hook(lambda *_: time.sleep(0.3 if where == "within a call" else 0.09))
        for block in model.model.diffusion_model.transformer_blocks
    ]
    ours = paced(model, max_duty=0.1, **ONLY_DUTY)
    asked = []

    def cancel():
        asked.append(time.perf_counter())
        comfy.model_management.interrupt_current_processing()

    timer = threading.Timer(0.6, cancel)
    timer.start()
    try:
        with pytest.raises(comfy.model_management.InterruptProcessingException):
            sample(ours, cfg=1.0)
        answered = time.perf_counter()
    finally:
        timer.join()
        comfy.model_management.interrupt_current_processing(False)
    assert answered - asked[0] < 0.2
    paused = told(ours)["paused"]["duty"]
    assert 0.2 < paused < 0.6
    for hook in hooks:
        hook.remove()
    assert all("forward" not in vars(module) for module in model.model.diffusion_model.modules())
    keys = [key for key in ours.model_options["transformer_options"] if key.startswith("frame_thrift")]
    assert keys == [pack("patches.plan").PLAN]
    assert equal(sample(ours, cfg=1.0), expected) and told(ours)["paused"] == {}


# The same bits, beside whatever else.


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("cfg", [1.0, 2.0])
@pytest.mark.parametrize("sampler", ["euler", "heun"])
def test_results_are_the_same_bits(sampler, cfg, family, on, told):
    laptop, model = Laptop(start=45.0), build_model(family)
    expected = sample(model, family, cfg=cfg, sampler=sampler)
    ours = on(laptop, laptop.heat(model, 0.3), max_duty=0.5, target_temperature=40)
    assert equal(sample(ours, family, cfg=cfg, sampler=sampler), expected)
    paused = told(ours)["paused"]
    assert paused["temperature"] > 1 and paused["temperature"] + paused.get("duty", 0.0) > 2.5


@pytest.mark.parametrize("order", list(itertools.permutations(("window", "freeze", "stride", "pace"))))
def test_beside_all_other_nodes_in_every_order(order, on, told, windowed, frozen, pack):
    laptop, model = Laptop(), build_model("ltxav")
    latent = {"samples": torch.zeros(1, 128, 17, 2, 3)}
    nodes = {
        "window": lambda m: windowed(m),
        "freeze": lambda m: frozen(m, refresh_every=2),
        "stride": lambda m: pack("nodes").KeyframeStride.execute(m, latent, 2).args[0],
    }
    stock = sample(model, "ltxav", steps=6)
    without = model
    for name in order:
        without = nodes[name](without) if name in nodes else without
    expected = sample(without, "ltxav", steps=6)
    laptop.heat(model, 0.3)
    ours = model
    for name in order:
        ours = nodes[name](ours) if name in nodes else on(laptop, ours, max_duty=0.5, **ONLY_DUTY)
    assert equal(sample(ours, "ltxav", steps=6), expected) and not equal(expected, stock)
    # Blocks that are frozen take no time, and no pause.
    assert told(ours)["paused"]["duty"] == pytest.approx(laptop.busy, abs=0.6)


# Where nobody may wait.


def test_while_a_stream_is_captured_nothing_happens(on, record, monkeypatch):
    laptop, model = Laptop(), build_model()
    laptop.is_captured = lambda: True
    ours = on(laptop, laptop.heat(model, 1.0), max_duty=0.5, **ONLY_DUTY)
    expected = sample(model, cfg=1.0)
    before = laptop.drained
    assert equal(sample(ours, cfg=1.0), expected)
    assert record(ours)["declined"] == {"STREAM_CAPTURED": 3} and laptop.drained == before


@pytest.mark.parametrize("is_active", [True, False])
@pytest.mark.parametrize("says_where", [True, False])
def test_within_a_recorded_scope_it_waits_after_calls_only(
    says_where, is_active, on, told, pack, monkeypatch
):
    """Newer releases record what blocks allocate: their scope spans all blocks of a call."""
    laptop, model = Laptop(), build_model("ltxav")
    graph = SimpleNamespace(_comfy_active=is_active)
    core = SimpleNamespace(malloc_graph_enabled=lambda device: is_active)
    if says_where:
        core.MALLOC_GRAPHS = {threading.get_ident(): graph}
    monkeypatch.setattr(pack("patches.reuse.recorder"), "model_prefetch", core)
    within = []
    sleep = laptop.sleep
    laptop.sleep = lambda seconds: (within.append(is_within[0]), sleep(seconds))
    is_within = [False]
    network = model.model.diffusion_model
    process = network._process_transformer_blocks

    def watched(*args, **kwargs):
        is_within[0] = True
        try:
            return process(*args, **kwargs)
        finally:
            is_within[0] = False

    monkeypatch.setattr(network, "_process_transformer_blocks", watched)
    ours = on(laptop, laptop.heat(model, 1.0), max_duty=0.5, **ONLY_DUTY)
    sample(ours, "ltxav", cfg=1.0)
    assert any(within) is not is_active and within
    assert told(ours)["paused"]["duty"] == pytest.approx(9.0, abs=0.1)


def test_threads_have_a_pace_each(pack):
    """As core's multi-GPU does: one device a thread, one State."""
    pacing = pack("patches.techniques.pacing")
    run = pack("patches.call").Sampling(
        pack("patches.clock").SigmaClock((1.0, 0.0), lambda percent: 1 - percent)
    )
    laptops = {torch.device("cpu"): Laptop(), torch.device("meta"): Laptop(rise=140.0)}

    def sensors(device):
        return laptops[device].sensors(pack("patches.sensors").Sensor)

    state = pacing.Pacing(pacing.GpuPacing(max_duty=0.5), run, laptops.__getitem__, sensors)

    def forwards(device):
        call = SimpleNamespace(device=device, step=0, acting=[state])
        for _ in range(50):
            assert state.call(call) == {}
            laptops[device].work(0.5)
            assert state.called(call, None) == [None]

    threads = [threading.Thread(target=forwards, args=[device]) for device in laptops]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    cold, hot = (state.record()["devices"][name] for name in ("cpu", "meta"))
    assert cold["paused"] == {"duty": pytest.approx(25.0, abs=0.5)}
    assert hot["paused"]["temperature"] > 5 and hot["hottest"] > cold["hottest"]
