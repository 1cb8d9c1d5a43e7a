"""What overhead.py mounts, and its arithmetic; the meta device computes nothing."""

from __future__ import annotations

import pytest


@pytest.mark.parametrize("frames", [1, 33])
def test_every_technique_is_mounted_and_none_acts(frames, bench, pack):
    overhead, ltx2 = bench("overhead"), bench("ltx2")
    stock, plan_of = ltx2.build_ltx2("meta", blocks=1), pack("patches.mount").plan_of
    clip = ltx2.Clip(frames, 96, 64, sounds_for=97)
    outside, covered = overhead.settings_of("here", pack.module.__name__, clip)
    plan = plan_of(outside.mounted(stock))
    assert {type(entry) for entry in plan} == set(pack("patches.techniques").TECHNIQUES)
    to_sigma = stock.get_model_object("model_sampling").percent_to_sigma
    sampled = pack("patches.clock").SigmaClock(tuple(ltx2.sigmas(24).tolist()), to_sigma)
    assert [entry.acting_steps(sampled) for entry in plan if entry.schedule] == [[], []]
    (window,) = plan_of(covered.mounted(stock))
    assert window.covers(pack("patches.kernels.tokens").VideoTokens.grid(*clip.grid))
    assert len(window.acting_steps(sampled)) == sampled.steps > 0


def test_ratios_are_those_of_each_round(bench):
    row = bench("overhead").summed_up({"ours_ms": [11.0, 30.0, 10.0], "stock_ms": [10.0, 20.0, 10.0]})
    assert row["ratios"] == pytest.approx([1.1, 1.5, 1.0])
    assert (row["lowest"], row["median"], row["highest"]) == pytest.approx((1.0, 1.1, 1.5))
