"""Guiders that evaluate a cond again and perturb it: spatio-temporal and multimodal guidance, passes left out."""

from __future__ import annotations

import comfy.model_patcher
import comfy.samplers
import pytest
import torch
from freezing import EVERY, Counted
from guiding import Perturbing, run
from recorder import play_recorder
from reference import equal
from tiny_models import FAMILIES, build_model, conditioning, noise_like, zeros_like


def distance(a, b):
    return max(
        float((x - y).pow(2).mean().sqrt() / y.pow(2).mean().sqrt()) for x, y in zip(a, b, strict=True)
    )


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("scope", EVERY)
def test_the_same_calls_are_perturbed_with_and_without_freeze(family, scope, frozen, record):
    model = build_model(family)
    plain, ours = Perturbing(model), Perturbing(frozen(model, scope=scope))
    stock = run(plain, family)
    result = run(ours, family)
    assert plain.seen and ours.seen == plain.seen
    assert all(q == k for q, k in ours.seen)
    assert record(ours.model_patcher)["taken"] and not equal(result, stock)
    # A perturbed attention call never comes to where its own-frame share would be reused.
    assert ("ATTENTION_EXCHANGED" in record(ours.model_patcher)["declined"]) is (scope != "spatial attention")


@pytest.mark.parametrize("family", FAMILIES)
def test_a_block_that_was_perturbed_before_the_range_stays_fresh_within_it(family, frozen, record):
    class Early(Perturbing):
        """Perturbs in the first step only, as guiders with a schedule do."""

        def predict_noise(self, x, timestep, model_options, seed=None):
            if float(timestep.flatten()[0]) > 0.95:
                return super().predict_noise(x, timestep, model_options, seed)
            positive = self.evaluate("positive", x, timestep, model_options)
            negative = self.evaluate("negative", x, timestep, model_options)
            return negative + 2 * (positive - negative)

    model = build_model(family)
    counted = Counted(model, "attn1.to_q")
    guider = Early(counted.watch(frozen(model, start_percent=0.9, forecast="hold")))
    run(guider, family)
    told = record(guider.model_patcher)
    first = told["steps"][0] - 1
    assert first > 0 and told["taken"] == 2 * len(told["steps"])
    assert told["declined"]["ATTENTION_EXCHANGED"] == told["taken"]
    # Three blocks in three passes, then in two; frozen ones compute the flagged block.
    assert counted.by_step() == [9, *(2 if step in told["steps"] else 6 for step in range(1, 8))]


@pytest.mark.parametrize("place", ["gpu", "cpu"])
@pytest.mark.parametrize("scope", EVERY)
def test_perturbed_passes_keep_no_memory_of_a_block(scope, place, frozen, record, pack, monkeypatch):
    """By the rules of ComfyUI's recorder, which newer releases have."""
    model = build_model("ltxav")
    ours = Perturbing(frozen(model, scope=scope, cache_device=place))
    expected = run(ours, "ltxav")
    with play_recorder(pack, monkeypatch, model, has_streams=place == "cpu") as recorder:
        result = run(ours, "ltxav")
    assert recorder.blocks and not recorder.faults and equal(result, expected)
    assert record(ours.model_patcher)["taken"]


@pytest.mark.parametrize("family", FAMILIES)
def test_what_a_guider_subtracts_holds_no_error_of_the_forecast(family, frozen, record):
    """All three passes freeze in the same steps, so the error is no multiple of that with CFG alone."""
    model = build_model(family, blocks=4)

    class Unguided(Perturbing):
        def predict_noise(self, x, timestep, model_options, seed=None):
            return comfy.samplers.CFGGuider.predict_noise(self, x, timestep, model_options, seed)

    ours = Perturbing(frozen(model), 4)
    error = distance(run(ours, family), run(Perturbing(model, 4), family))
    alone = distance(run(Unguided(frozen(model), 4), family), run(Unguided(model, 4), family))
    assert 0 < error < 1.5 * alone
    assert record(ours.model_patcher)["taken"] == 3 * 4


@pytest.mark.parametrize(
    "options",
    [
        {"stg_self_attn_blocks": frozenset({1})},
        {"a2v_cross_attn": False, "v2a_cross_attn": False},
        {"stg_indexes": [], "ptb_index": 0},
    ],
)
def test_passes_told_apart_by_options_keep_their_own(options, frozen, record):
    """As core's guidance nodes do, and the multimodal guider: one evaluation is left out from some step on."""
    model = build_model("ltxav")

    class Passing(Perturbing):
        def evaluate(self, cond, x, timestep, model_options, **changes):
            self.is_perturbing = False
            return super().evaluate(cond, x, timestep, model_options, **changes)

    class Shorter(Passing):
        """The perturbed pass comes first, and not in every step."""

        def predict_noise(self, x, timestep, model_options, seed=None):
            if float(timestep.flatten()[0]) > 0.6:
                self.evaluate("positive", x, timestep, model_options, **options)
            return self.evaluate("positive", x, timestep, model_options)

    class Alone(Passing):
        def predict_noise(self, x, timestep, model_options, seed=None):
            return self.evaluate("positive", x, timestep, model_options)

    one, other = Shorter(frozen(model)), Alone(frozen(model))
    assert equal(run(one, "ltxav"), run(other, "ltxav"))
    assert record(one.model_patcher)["taken"] > record(other.model_patcher)["taken"] == 4
    assert not equal(run(Alone(frozen(model)), "ltxav"), run(Alone(model), "ltxav"))


class Skipping(comfy.samplers.CFGGuider):
    """Leaves the negative pass out in every other evaluation, as the multimodal guider's skip_step does."""

    turn, last = 0, None

    def predict_noise(self, x, timestep, model_options, seed=None):
        calc = comfy.samplers.calc_cond_batch
        positive = calc(self.inner_model, [self.conds["positive"]], x, timestep, model_options)[0]
        if self.turn % 2 == 0:
            self.last = calc(self.inner_model, [self.conds["negative"]], x, timestep, model_options)[0]
        self.turn += 1
        return self.last + 2 * (positive - self.last)


@pytest.mark.parametrize("scope", EVERY)
def test_a_pass_that_is_left_out_finds_what_it_left(scope, frozen, record):
    """Steps 0, 2, 4, 6 of the negative pass: 0 and 4 are full (two steps after 4 is still near), 2 and 6 frozen."""
    model = build_model()
    counted = Counted(model, "attn1.to_q")
    guider = Skipping(counted.watch(frozen(model, scope=scope)))
    run(guider, "ltxv")
    calls = 3 if scope == "spatial attention" else 1
    assert record(guider.model_patcher)["taken"] == (4 + 2) * calls
    if scope == "whole blocks":
        # 3 blocks; the positive pass in steps 0, 3, 6, 7, the negative one in 0 and 4.
        assert counted.by_step() == [6, 0, 0, 3, 3, 0, 3, 3]


def test_what_left_out_passes_have_kept_makes_room(frozen, record):
    """Within the limit the pass that was not seen for longest goes first: what still comes finds room."""

    class Changing(comfy.samplers.CFGGuider):
        """One cond for the first three steps, another one after them."""

        turn = 0

        def predict_noise(self, x, timestep, model_options, seed=None):
            cond = "positive" if self.turn < 3 else "negative"
            self.turn += 1
            return comfy.samplers.calc_cond_batch(
                self.inner_model, [self.conds[cond]], x, timestep, model_options
            )[0]

    model = build_model()
    size = 54 * 128 * 4
    ours = frozen(model, forecast="hold", cache_limit_gb=1.5 * size / 2**30)
    run(Changing(ours), "ltxv")
    # The other cond finds no room in the step that it comes in first, and does in the next one.
    assert record(ours)["taken"] == 4 and record(ours)["declined"]["CACHE_FULL"] == 1
    assert sum(record(ours)["cache_gib"].values()) * 2**30 == size


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("scope", EVERY)
def test_a_schedule_that_rises(family, scope, frozen, record):
    """As inversion samplers run it: steps are told by sigma there, too, and only one of them is the last."""
    model = build_model(family)

    def climb(guided, x, sigmas, extra_args=None, callback=None, disable=None):
        for sigma, after in zip(sigmas, sigmas[1:], strict=False):
            denoised = guided(x, sigma * x.new_ones([x.shape[0]]), **extra_args)
            x = x + (x - denoised) * (after - sigma)
        return x

    def invert(patcher):
        guider = comfy.samplers.CFGGuider(patcher)
        guider.set_conds(conditioning(family), conditioning(family, seed=7))
        guider.set_cfg(1.0)
        noise = noise_like(family)
        rising = torch.linspace(0.1, 1, 9)
        out = guider.sample(
            noise, zeros_like(noise), comfy.samplers.KSAMPLER(climb), rising, disable_pbar=True, seed=3
        )
        return list(out.unbind()) if out.is_nested else [out]

    ours = frozen(model, scope=scope)
    result = invert(ours)
    calls = 3 if scope == "spatial attention" else 1
    assert record(ours)["taken"] == 4 * calls
    assert record(ours)["declined"] == {"FULL_STEP": 3 * calls, "LAST_STEP": calls}
    assert not equal(result, invert(model))
