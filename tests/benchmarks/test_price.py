"""Prices at LTX-2's width against PyTorch's counter; the meta device computes nothing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import comfy.ldm.modules.attention
import pytest

SCHEDULE = {"start_percent": 0.0, "end_percent": 1.0}
WINDOW = "ApplyTemporalWindow", {"window": 1, "sink_frames": 1, "dense_blocks": 0, **SCHEDULE}
FREEZE = {"refresh_every": 2, "forecast": "hold", **SCHEDULE}


@dataclass
class Costing:
    """A technique as a price sees it."""

    cost: Callable[[Any], Any]


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


@pytest.mark.parametrize("scope", ["per-frame work", "whole blocks"])
def test_what_is_left_out(scope, prices, ltx2, clips, pack):
    parts = ("attn2", "ff") if scope == "per-frame work" else ("video",)

    def cost(work):
        for block in range(work.blocks):
            for part in parts:
                work = work.without(block, part)
        return work

    model, name = ltx2.build_ltx2("meta", blocks=2), pack.module.__name__
    frozen = prices.patch(name, model, [("ScheduleSpatialFreeze", {**FREEZE, "scope": scope})])
    for clip in clips:
        assert prices.priced(model, clip, [Costing(cost)], name) == prices.count(frozen, clip, name)


def test_what_is_not_seen(prices, ltx2, clips, pack):
    kernel, Role = pack("patches.kernels.segments"), pack("patches.layouts.layout").Role

    def cost(work):
        """The three nearest of five frames, and the first."""
        (at, *_), total = work.tokens.offsets[1:], work.tokens.total
        keys = (((0, 3 * at),), ((0, 4 * at),), ((0, at), (2 * at, 5 * at)))
        stretches = ((0, 2), (2, 3), (3, 5))
        parts = [kernel.Segment(a * at, b * at, k) for (a, b), k in zip(stretches, keys, strict=True)]
        for block in range(work.blocks):
            work = work.with_segments(Role.VIDEO_SELF, block, kernel.Segments(tuple(parts), total))
        return work

    model, name = ltx2.build_ltx2("meta", blocks=2), pack.module.__name__
    windowed = prices.patch(name, model, [WINDOW])
    for clip in clips:
        assert prices.priced(model, clip, [Costing(cost)], name) == prices.count(windowed, clip, name)


def test_costs_are_folded_in_the_order_of_the_plan(prices, ltx2, clips, pack):
    def narrow(work):
        assert (0, "ff") in work.left_out
        return work.without(0, "attn2")

    model, name = ltx2.build_ltx2("meta", blocks=1), pack.module.__name__
    plan = Costing(lambda work: work.without(0, "ff")), Costing(narrow)
    both, _ = prices.priced(model, clips[0], plan, name)
    assert both < prices.priced(model, clips[0], plan[:1], name)[0]
