"""Prices at LTX-2's width against PyTorch's counter; the meta device computes nothing."""

from __future__ import annotations

import comfy.ldm.modules.attention
import pytest

SCHEDULE = {"start_percent": 0.0, "end_percent": 1.0}
WINDOW = "ApplyTemporalWindow", {"window": 1, "sink_frames": 1, "dense_blocks": 0, **SCHEDULE}
FREEZE = {"refresh_every": 2, "forecast": "hold", **SCHEDULE}


@pytest.fixture
def prices(bench, monkeypatch):
    # The default backend of a CPU slices its work by free memory, which the meta device does not have.
    backend = comfy.ldm.modules.attention
    monkeypatch.setattr(backend, "optimized_attention", backend.attention_pytorch)
    return bench("price")


@pytest.fixture
def ltx2(bench):
    return bench("ltx2")


@pytest.fixture
def clips(ltx2):
    """Five latent frames, with sound of the clip's length and of another."""
    return ltx2.Clip(33, 96, 64), ltx2.Clip(33, 96, 64, sounds_for=97)


@pytest.mark.parametrize("blocks", [1, 2])
def test_dense(blocks, prices, ltx2, clips, pack):
    model, name = ltx2.build_ltx2("meta", blocks=blocks), pack.module.__name__
    for clip in clips:
        assert prices.priced(model, clip, (), name) == prices.count(model, clip, name)


PATCHES = {
    "per-frame work": [("ScheduleSpatialFreeze", {**FREEZE, "scope": "per-frame work"})],
    "whole blocks": [("ScheduleSpatialFreeze", {**FREEZE, "scope": "whole blocks"})],
    "spatial attention": [("ScheduleSpatialFreeze", {**FREEZE, "scope": "spatial attention"})],
    "window": [WINDOW],
    "window, per-frame work": [WINDOW, ("ScheduleSpatialFreeze", {**FREEZE, "scope": "per-frame work"})],
}


@pytest.mark.parametrize("nodes", PATCHES.values(), ids=PATCHES)
def test_what_techniques_say_they_cost_is_what_they_cost(nodes, prices, ltx2, clips, pack, monkeypatch):
    # The meta device has no attention that tells its log-sum-exp; the counter is told what it would cost.
    freeze = pack("patches.techniques.spatial_freeze")
    monkeypatch.setattr(freeze, "has_lse", lambda *_: True)
    model, name = ltx2.build_ltx2("meta", blocks=2), pack.module.__name__
    patched = prices.patch(name, model, nodes)
    plan = pack("patches.mount").plan_of(patched)
    for clip in clips:
        priced = prices.priced(patched, clip, plan, name)
        assert priced == prices.count(patched, clip, name) != prices.priced(model, clip, (), name)


def test_a_strided_clip_costs_what_the_short_one_does(prices, ltx2, clips, pack):
    model, name = ltx2.build_ltx2("meta", blocks=1), pack.module.__name__
    stride = pack("patches.techniques.keyframe_stride").StretchedTimes(5, 3, stride=2)
    work = stride.cost(pack("patches.layouts.work").Work(tokens(pack, 5), 1, 7))
    assert work.tokens == tokens(pack, 3) and stride.cost(work) == work
    assert prices.priced(model, clips[0], [stride], name) < prices.priced(model, clips[0], (), name)


def tokens(pack, frames):
    return pack("patches.kernels.tokens").VideoTokens.grid(frames, 2, 3)


def test_another_type_costs_as_many_flops(prices, ltx2, clips, pack):
    name = pack.module.__name__
    precision = "ThriftAttentionPrecision", {"self_attention": "fp16", "text_attention": "bf16"}
    found = prices.PriceList(name, 1, {})
    assert found.forward(clips[0], [precision]) == found.forward(clips[0], [])
    assert found.forward(clips[0], [precision, WINDOW]) == found.forward(clips[0], [WINDOW])
