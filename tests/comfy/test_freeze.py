"""ScheduleSpatialFreeze on real models, ModelPatchers and samplers."""

from __future__ import annotations

import logging

import comfy.context_windows
import comfy.sample
import comfy.samplers
import pytest
import torch
from freezing import EVERY, SCOPES, SIGMAS, Counted
from reference import SLOT, close, equal, freezing_model, set_slot
from tiny_models import (
    FAMILIES,
    FORMS,
    build_model,
    conditioning,
    noise_like,
    sample,
    zeros_like,
)
from torch.utils.flop_counter import FlopCounterMode


@pytest.mark.parametrize("family", FORMS)
@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("forecast", ["hold", "linear"])
@pytest.mark.parametrize("cfg", [1.0, 2.0])
def test_equals_a_reference_that_stores_and_adds_again(family, scope, forecast, cfg, frozen, record):
    model = build_model(family)
    ours = frozen(model, scope=scope, forecast=forecast)
    result = sample(ours, family, sigmas=SIGMAS, cfg=cfg)
    full = (0, 3, 6, 7)
    reference = freezing_model(model, scope, full, forecast == "linear", SIGMAS.tolist())
    assert close(result, sample(reference, family, sigmas=SIGMAS, cfg=cfg), 1e-4)
    assert not close(result, sample(model, family, sigmas=SIGMAS, cfg=cfg)), "the freeze has no effect"
    assert record(ours)["steps"] == [1, 2, 4, 5]
    assert record(ours)["taken"] == 4
    assert record(ours)["declined"] == {"FULL_STEP": 3, "LAST_STEP": 1}


@pytest.mark.parametrize("forecast", ["hold", "linear"])
def test_a_range_in_the_middle(forecast, frozen, record):
    """The first step in it is full; a forecast may look back to the step before it."""
    model = build_model()
    start = build_model().model.model_sampling
    clock_range = {"start_percent": 0.1, "end_percent": 0.95}
    within = [
        i for i in range(8)
        if start.percent_to_sigma(0.95) <= float(SIGMAS[i]) <= start.percent_to_sigma(0.1)
    ]  # fmt: skip
    assert 3 < len(within) < 8
    ours = frozen(model, refresh_every=2, forecast=forecast, **clock_range)
    result = sample(ours, sigmas=SIGMAS)
    stale = [i for place, i in enumerate(within) if place % 2 and i != 7]
    assert record(ours)["steps"] == stale and record(ours)["taken"] == len(stale)
    full = [i for i in range(8) if i not in stale and (i >= within[0] - (forecast == "linear"))]
    reference = freezing_model(model, "whole blocks", full, forecast == "linear", SIGMAS.tolist())
    assert close(result, sample(reference, sigmas=SIGMAS), 1e-4)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("scope", EVERY)
def test_neutral_settings_are_stock(family, scope, frozen):
    model = build_model(family)
    for neutral in ({"refresh_every": 1}, {"start_percent": 0.5, "end_percent": 0.5}, {"start_percent": 0.9, "end_percent": 0.1}):  # fmt: skip
        assert frozen(model, scope=scope, **neutral) is model
        again = frozen(frozen(model, scope=scope), scope=scope, **neutral)
        assert equal(sample(again, family), sample(model, family))


@pytest.mark.parametrize(
    ("scope", "path", "expected"),
    [
        ("whole blocks", "attn1.to_q", [3, 0, 0, 3, 0, 0, 3, 3]),
        ("whole blocks", "audio_ff.net.0.proj", [3] * 8),
        ("whole blocks", "audio_to_video_attn.to_q", [3, 0, 0, 3, 0, 0, 3, 3]),
        ("per-frame work", "ff.net.0.proj", [3, 0, 0, 3, 0, 0, 3, 3]),
        ("per-frame work", "attn2.to_q", [3, 0, 0, 3, 0, 0, 3, 3]),
        ("per-frame work", "attn1.to_q", [3] * 8),
        ("per-frame work", "audio_attn2.to_q", [3] * 8),
    ],
)
def test_what_is_not_called(scope, path, expected, frozen, record):
    model = build_model("ltxav")
    counted, ours = Counted(model, path), frozen(model, scope=scope)
    sample(counted.watch(ours), "ltxav", sigmas=SIGMAS)
    assert counted.by_step() == expected and record(ours)["taken"] == 4


@pytest.mark.parametrize("family", FORMS)
@pytest.mark.parametrize("scope", EVERY)
def test_the_work_is_really_not_done(family, scope, frozen, record):
    model = build_model(family)
    grid = noise_like(family, (4, 2, 3))

    def flops(patcher):
        with FlopCounterMode(display=False) as counter:
            sample(patcher, family, noise=grid, sigmas=SIGMAS, cfg=1.0)
        return counter.get_total_flops()

    patched = frozen(model, scope=scope, refresh_every=16)
    dense, ours = flops(model), flops(patched)
    if scope == "spatial attention":
        # A full step computes the share within frames once more, to keep it; frozen ones do without.
        full = flops(frozen(model, scope=scope, refresh_every=16, cache_limit_gb=1e-8))
        assert record(patched)["taken"] == 6 * 3 and ours < full
    else:
        assert ours < dense * {"whole blocks": 0.75, "per-frame work": 0.85}[scope]


def test_blocks_kept(frozen):
    model = build_model(blocks=4)
    counted = Counted(model, "attn1.to_q")
    sample(counted.watch(frozen(model, blocks_kept=1)), sigmas=SIGMAS)
    assert counted.by_step() == [4, 2, 2, 4, 2, 2, 4, 4]


@pytest.mark.parametrize("scope", SCOPES)
def test_all_blocks_kept(scope, frozen, record):
    model = build_model()
    ours = frozen(model, scope=scope, blocks_kept=2)
    assert equal(sample(ours, sigmas=SIGMAS), sample(model, sigmas=SIGMAS))
    assert record(ours)["declined"] == {"KEPT_BLOCK": 8}


@pytest.mark.parametrize("scope", EVERY)
@pytest.mark.parametrize(
    "sampler", ["euler", "heun", "dpm_2", "dpmpp_2m", "euler_ancestral", "res_multistep"]
)
def test_the_step_comes_from_sigma(scope, sampler, frozen, record):
    """A sampler that evaluates a step more than once freezes it as often."""
    model = build_model()
    ours = frozen(model, scope=scope)
    result = sample(ours, sigmas=SIGMAS, sampler=sampler)
    assert record(ours)["taken"] and record(ours)["steps"] == [1, 2, 4, 5]
    assert torch.isfinite(result[0]).all()
    again = sample(ours, sigmas=SIGMAS, sampler=sampler)
    assert equal(result, again)
    if sampler == "heun" and scope == "whole blocks":
        counted = Counted(model, "attn1.to_q")
        sample(counted.watch(ours), sigmas=SIGMAS, sampler=sampler)
        # Step i+1 is evaluated twice, once as the end of step i.
        assert counted.by_step() == [3, 0, 0, 6, 0, 0, 6, 6]


@pytest.mark.parametrize("sampler", ["dpm_2", "dpmpp_2s_ancestral", "dpmpp_sde"])
def test_a_forecast_spans_steps_not_evaluations(sampler, frozen, pack, monkeypatch):
    """Samplers that evaluate a step at two sigmas: a line through both would point anywhere."""
    entry, spans = pack("patches.reuse.entry"), []
    at = entry.Entry.at

    def watching(self, sigma):
        if self.older is not None:
            spans.append(self.older_sigma - self.sigma)
        return at(self, sigma)

    monkeypatch.setattr(entry.Entry, "at", watching)
    sample(frozen(build_model(), forecast="linear", refresh_every=2), sigmas=SIGMAS, sampler=sampler)
    assert spans and min(spans) > 0.1


def test_partial_denoise_and_the_stock_ksampler(frozen, record):
    model = build_model()
    ours = frozen(model)
    for sigmas in (torch.linspace(0.909, 0, 7), torch.linspace(0.4, 0, 7)):
        sample(ours, sigmas=sigmas)
        assert record(ours)["taken"] == len(record(ours)["steps"]) > 0
    noise = noise_like()
    for denoise in (1.0, 0.5):
        comfy.sample.sample(
            ours, noise, 6, 2.0, "euler", "simple", conditioning(), conditioning(seed=7), zeros_like(noise),
            denoise=denoise, disable_pbar=True, seed=3,
        )  # fmt: skip
        assert record(ours)["taken"] == len(record(ours)["steps"]) > 0


@pytest.mark.parametrize("order", [(0, 1, 2, 3, 1, 2, 3, 4, 5, 6, 7), (0, 1, 2, 1, 2, 3, 4, 5, 6, 7)])
def test_a_sampler_that_jumps_back_in_sigma(order, frozen, record):
    """Above the last full step, or among frozen ones: what was kept belongs to a course that is given up."""
    model = build_model()
    ours = frozen(model)

    def jumping(guided, x, sigmas, extra_args=None, callback=None, disable=None):
        ones = x.new_ones([x.shape[0]])
        for step in order:
            denoised = guided(x, sigmas[step] * ones, **extra_args)
            x = x + (denoised - x) * 0.1
        return x

    guider = comfy.samplers.CFGGuider(ours)
    sampler = comfy.samplers.KSAMPLER(jumping)
    guider.set_conds(conditioning(), conditioning(seed=7))
    guider.set_cfg(2.0)
    noise = noise_like()
    guider.sample(noise, zeros_like(noise), sampler, SIGMAS, disable_pbar=True, seed=3)
    assert record(ours)["declined"]["SIGMA_ROSE"] == 1 and record(ours)["taken"]


def test_a_range_that_freezes_nothing_names_what_would(frozen, record, caplog):
    sigmas = torch.tensor([1.0, 0.99375, 0.9875, 0.98125, 0.975, 0.909, 0.725, 0.422, 0.0])
    model = build_model()
    with caplog.at_level(logging.WARNING):
        result = sample(frozen(model, start_percent=0.6), sigmas=sigmas)
    warnings = [r.getMessage() for r in caplog.records if "freezes none" in r.getMessage()]
    assert len(warnings) == 1 and equal(result, sample(model, sigmas=sigmas))
    name, value = warnings[0].split("nearest that does: ")[1].rstrip(".").split(" ")
    again = frozen(model, **{"start_percent": 0.6, name: float(value)})
    sample(again, sigmas=sigmas)
    assert record(again)["taken"]


class TestSpatialAttention:
    def reference(self, model, full):
        """Own-frame logits' sum and output of the last full step, others fresh; in float64, written by hand."""
        clone, held, now = model.clone(), {}, {"calls": 0}
        own = torch.eye(9, dtype=torch.bool).repeat_interleave(6, 0).repeat_interleave(6, 1)

        def override(func, q, k, v, heads, *args, **kwargs):
            if q.shape[1] != k.shape[1]:
                return func(q, k, v, heads, *args, **kwargs)
            sigma = float(kwargs["transformer_options"]["sigmas"][0])
            step = min(range(8), key=lambda i: abs(float(SIGMAS[i]) - sigma))
            block = now["calls"] % 3
            now["calls"] += 1
            x, y, z = (t.double().unflatten(-1, (heads, -1)).transpose(1, 2) for t in (q, k, v))
            weights = (x @ y.transpose(-1, -2) * x.shape[-1] ** -0.5).exp()
            inside, outside = weights * own, weights * ~own
            fresh = (inside @ z, inside.sum(-1, keepdim=True))
            if step in full:
                held[block] = fresh
            top, bottom = held.get(block, fresh)
            out = (top + outside @ z) / (bottom + outside.sum(-1, keepdim=True))
            return out.transpose(1, 2).flatten(2).to(q.dtype)

        clone.model_options.setdefault("transformer_options", {})[SLOT] = override
        return clone

    def test_equals_a_reference(self, frozen, record):
        model = build_model()
        ours = frozen(model, scope="spatial attention", forecast="hold")
        result = sample(ours, sigmas=SIGMAS, cfg=1.0)
        assert close(result, sample(self.reference(model, (0, 3, 6, 7)), sigmas=SIGMAS, cfg=1.0), 1e-3)
        assert not close(result, sample(model, sigmas=SIGMAS, cfg=1.0), 1e-3)
        assert record(ours)["taken"] == 4 * 3

    def test_declines(self, frozen, record, windowed, pack, monkeypatch):
        model = build_model()

        def passing(func, *args, **kwargs):
            return func(*args, **kwargs)

        ours = frozen(set_slot(model, passing), scope="spatial attention")
        assert equal(sample(ours, sigmas=SIGMAS), sample(model, sigmas=SIGMAS))
        assert record(ours)["declined"]["FOREIGN_OVERRIDE"] == 24 and not record(ours)["taken"]

        both = windowed(frozen(model, scope="spatial attention"))
        assert equal(sample(both, sigmas=SIGMAS), sample(windowed(model), sigmas=SIGMAS))
        assert record(both)["declined"] == {"OTHER_TECHNIQUE": 15, "FULL_STEP": 6, "LAST_STEP": 3}

        one = frozen(model, scope="spatial attention")
        noise = noise_like(shape=(1, 2, 3))
        assert equal(sample(one, noise=noise, sigmas=SIGMAS), sample(model, noise=noise, sigmas=SIGMAS))
        assert record(one)["declined"] == {"ONE_FRAME": 24}

        values = {"keyframe_idxs": torch.zeros(1, 3, 6, 2)}
        conds = {"positive": conditioning(**values), "negative": conditioning(seed=7, **values)}
        mask = torch.ones(1, 1, 9, 1, 1)
        guided = frozen(model, scope="spatial attention")
        sample(guided, sigmas=SIGMAS, noise_mask=mask, **conds)
        assert record(guided)["taken"] == 12, "guides are tokens behind the frames"

        kept = frozen(model, scope="spatial attention", blocks_kept=2)
        assert equal(sample(kept, sigmas=SIGMAS), sample(model, sigmas=SIGMAS))
        assert record(kept)["declined"] == {"KEPT_BLOCK": 24}

        monkeypatch.setattr(pack("patches.techniques.spatial_freeze"), "has_lse", lambda *_: False)
        none = frozen(model, scope="spatial attention")
        assert equal(sample(none, sigmas=SIGMAS), sample(model, sigmas=SIGMAS))
        assert record(none)["declined"] == {"NO_LSE": 15, "FULL_STEP": 6, "LAST_STEP": 3}


@pytest.mark.parametrize(
    "bad",
    [{"refresh_every": 0}, {"refresh_every": 17}, {"scope": "all"}, {"forecast": "none"}, {"blocks_kept": -1}, {"cache_device": "disk"}, {"cache_limit_gb": -1}, {"start_percent": 2}],
)  # fmt: skip
def test_nonsense_is_rejected_by_name(bad, frozen):
    with pytest.raises(ValueError, match=next(iter(bad))):
        frozen(build_model(), **bad)


@pytest.mark.parametrize("scope", SCOPES)
def test_a_model_called_without_a_sampler_is_stock(scope, frozen):
    model = build_model()

    def call(patcher):
        options = {**patcher.model_options.get("transformer_options", {}), "wrappers": patcher.wrappers}
        mask = torch.ones(1, 5, dtype=torch.long)
        context = torch.randn(1, 5, 16, generator=torch.Generator().manual_seed(0))
        return patcher.model.apply_model(
            noise_like(), torch.ones(1), c_crossattn=context, transformer_options=options, attention_mask=mask,
            frame_rate=24.0,
        )  # fmt: skip

    with torch.no_grad():
        assert torch.equal(call(frozen(model, scope=scope)), call(model))


def test_frozen_steps_of_half_precision_stay_finite(frozen, record):
    """The second block takes 50000 to -50000, a difference that float16 has not; the third brings it back."""
    model = build_model(dtype=torch.float16)
    blocks = [
        lambda x: torch.where(x > 0, 5e4, -5e4).to(x.dtype) + x,
        lambda x: -x,
        lambda x: x / 5e4,
    ]

    def swing(patcher):
        clone = patcher.clone()
        for index, compute in enumerate(blocks):

            def own(x, *args, compute=compute, **kwargs):
                return x.copy_(compute(x))

            clone.add_object_patch(f"diffusion_model.transformer_blocks.{index}.forward", own)
            # A stretch of its own for every block.
            clone.set_model_patch_replace(
                lambda args, extra: extra["original_block"](args), "dit", "double_block", index
            )
        return clone

    noise = noise_like().half()
    stock = sample(swing(model), noise=noise, sigmas=SIGMAS)
    ours = swing(frozen(model))
    result = sample(ours, noise=noise, sigmas=SIGMAS)
    assert stock[0].isfinite().all() and result[0].isfinite().all()
    assert record(ours)["taken"] and not equal(stock, result)
