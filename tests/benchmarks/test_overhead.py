"""What overhead.py mounts, and its arithmetic; the meta device computes nothing."""

from __future__ import annotations

import pytest
from tiny_models import build_model, noise_like, sample


@pytest.mark.parametrize("frames", [1, 33])
def test_every_technique_is_mounted_and_none_acts(frames, bench, pack):
    overhead, ltx2 = bench("overhead"), bench("ltx2")
    stock, plan_of = ltx2.build_ltx2("meta", blocks=1), pack("patches.mount").plan_of
    clip = ltx2.Clip(frames, 96, 64, sounds_for=97)
    outside, covered, paced = overhead.settings_of("here", pack.module.__name__, clip)
    plan = plan_of(outside.mounted(stock))
    (pacing,) = plan_of(paced.mounted(stock))
    assert {type(entry) for entry in plan} == set(pack("patches.techniques").TECHNIQUES)
    assert pacing.target_temperature == 100 and pacing.max_duty == 1
    to_sigma = stock.get_model_object("model_sampling").percent_to_sigma
    sampled = pack("patches.clock").SigmaClock(tuple(ltx2.sigmas(24).tolist()), to_sigma)
    assert [entry.acting_steps(sampled) for entry in plan if entry.schedule] == [[], [], []]
    (window,) = plan_of(covered.mounted(stock))
    assert window.covers(pack("patches.kernels.tokens").VideoTokens.grid(*clip.grid))
    assert len(window.acting_steps(sampled)) == sampled.steps > 0


def test_every_other_step_is_stock(bench, pack):
    overhead = bench("overhead")
    name = pack.module.__name__
    model = build_model("ltxav")
    seen = []
    window = [("ApplyTemporalWindow", {**overhead.WINDOW, "start_percent": 0.0, "end_percent": 1.0})]
    ours = overhead.patch(name, model, window)
    ours.add_wrapper_with_key(
        "apply_model", "look", lambda executor, *a, **k: seen.append(1) or executor(*a, **k)
    )
    noise = noise_like("ltxav")
    sample(overhead.alternating(ours), "ltxav", noise=noise, steps=4, cfg=1.0)
    record = pack("patches.mount").journal_of(ours).records()[-1]
    assert len(seen) == 4 and record["forwards"] == 2
    assert record["techniques"]["temporal window"]["taken"] == 2 * 3


def test_the_ratio_is_that_of_the_lower_quartiles_and_lies_in_its_interval(bench):
    row = bench("overhead").summed_up([(10.0, 12.0), (20.0, 21.0), (30.0, 90.0)])
    assert (row["stock_ms"], row["ours_ms"]) == (10.0, 12.0) and row["ratio"] == pytest.approx(1.2)
    assert row["low"] <= row["ratio"] <= row["high"]
