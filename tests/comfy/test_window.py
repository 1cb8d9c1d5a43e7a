"""ApplyTemporalWindow on real models, ModelPatchers and samplers: exact where it says so."""

from __future__ import annotations

import comfy.samplers
import pytest
import tiny_models
import torch
from reference import close, equal, masked_model, visible
from tiny_models import (
    FAMILIES,
    FORMS,
    build_model,
    conditioning,
    guides,
    noise_like,
    sample,
    sample_with,
    zeros_like,
)
from torch.utils.flop_counter import FlopCounterMode

GRIDS = [(9, 2, 3), (7, 3, 5)]


@pytest.mark.parametrize("family", FORMS)
@pytest.mark.parametrize("cfg", [1.0, 2.0])
def test_a_window_over_the_whole_clip_is_stock_bit_for_bit(family, cfg, windowed, last_run):
    model = build_model(family)
    wide = windowed(model, window=4, sink_frames=1)
    assert equal(sample(wide, family, cfg=cfg), sample(model, family, cfg=cfg))
    assert set(last_run(wide)["declined"]) == {"WINDOW_COVERS_CLIP"}


@pytest.mark.parametrize("family", FORMS)
@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize(("window", "sinks"), [(1, 0), (1, 2), (2, 1)])
@pytest.mark.parametrize("batch", [1, 2])
def test_equals_a_masked_reference(family, grid, window, sinks, batch, windowed, last_run):
    model = build_model(family)
    noise = noise_like(family, grid, batch)
    ours = windowed(model, window=window, sink_frames=sinks)
    result = sample(ours, family, noise=noise)
    reference = masked_model(model, visible(grid[0], grid[1] * grid[2], window, sinks))
    assert close(result, sample(reference, family, noise=noise))
    assert not close(result, sample(model, family, noise=noise)), "the window has no effect"
    assert last_run(ours)["taken"] == 3 * 3 and not last_run(ours)["declined"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("head_width", [64, 128])
@pytest.mark.parametrize("family", FAMILIES)
def test_types_and_head_widths(family, dtype, head_width, windowed, last_run):
    model = build_model(family, dtype=dtype, head_width=head_width)
    ours = windowed(model, sink_frames=1)
    tolerance = 1e-3 if dtype == torch.float32 else 0.1
    assert close(sample(ours, family), sample(masked_model(model, visible(9, 6, 1, 1)), family), tolerance)
    assert last_run(ours)["taken"]
    assert equal(sample(windowed(model, window=4), family), sample(model, family))


@pytest.mark.parametrize("family", FORMS)
def test_cfg_batched_and_split(family, windowed, monkeypatch):
    model = build_model(family)
    batched = sample(windowed(model), family)
    sizes = []
    apply_model = model.model.apply_model
    monkeypatch.setattr(
        model.model, "apply_model", lambda x, *a, **k: (sizes.append(len(x)), apply_model(x, *a, **k))[1]
    )
    sample(windowed(model), family)
    assert set(sizes) == {2}
    sizes.clear()
    # Texts of different length cannot be batched: core then evaluates one cond after the other.
    negative = conditioning(family, seed=7)
    text = negative[0][0]
    negative[0][0] = torch.cat([text, torch.zeros_like(text)], dim=1)
    if "attention_mask" in negative[0][1]:
        negative[0][1]["attention_mask"] = torch.cat([torch.ones(1, 5), torch.zeros(1, 5)], dim=1).long()
    split = sample(windowed(model), family, negative=negative)
    assert set(sizes) == {1}
    reference = sample(masked_model(model, visible(9, 6, 1, 0)), family, negative=negative)
    assert close(split, reference)
    if family == "ltxv":
        assert close(split, batched), "the mask hides the added text"


@pytest.mark.parametrize("name", ["euler", "heun", "res_multistep", "dpmpp_2m", "euler_ancestral"])
def test_range_follows_sigma_in_every_sampler(name, windowed, last_run):
    model = build_model()
    sampling = model.get_model_object("model_sampling")
    start, end = 0.3, 0.8
    high, low = sampling.percent_to_sigma(start), sampling.percent_to_sigma(end)
    ours = windowed(model, start_percent=start, end_percent=end)
    result = sample(ours, steps=6, sampler=name)
    reference = masked_model(model, visible(9, 6, 1, 0), lambda sigma, block: low <= sigma <= high)
    assert close(result, sample(reference, steps=6, sampler=name))
    steps = [i for i in range(6) if low <= 1 - i / 6 <= high]
    assert last_run(ours)["steps"] == steps
    assert last_run(ours)["taken"] and last_run(ours)["declined"].keys() == {"OUTSIDE_RANGE"}


def test_dense_blocks_stay_dense(windowed, last_run):
    model = build_model(blocks=4)
    ours = windowed(model, dense_blocks=1)
    reference = masked_model(model, visible(9, 6, 1, 0), lambda sigma, block: block in (1, 2))
    assert close(sample(ours), sample(reference))
    assert last_run(ours) == {
        "settings": {
            "window": 1,
            "sink_frames": 0,
            "dense_blocks": 1,
            "schedule": {"start_percent": 0.0, "end_percent": 1.0},
        },
        "described": "±1 latent frames, 0 sink, 1 dense blocks at each end",
        "unit": "attention calls",
        "is_expected": False,
        "is_reached": True,
        "steps": [0, 1, 2],
        "taken": 6,
        "declined": {"DENSE_BLOCK": 6},
    }
    assert equal(sample(windowed(model, dense_blocks=2)), sample(model))


@pytest.mark.parametrize("family", FAMILIES)
def test_guiders_and_ksampler(family, windowed):
    model = build_model(family)
    noise = noise_like(family)
    reference = masked_model(model, visible(9, 6, 1, 0))

    def guided(patcher):
        return sample_with(comfy.samplers.CFGGuider(patcher), family)

    def ksampled(patcher):
        out = tiny_models.comfy.sample.sample(
            patcher, noise, 4, 2.0, "euler", "simple", conditioning(family), conditioning(family, seed=7),
            zeros_like(noise), denoise=0.7, disable_pbar=True, seed=3,
        )  # fmt: skip
        return list(out.unbind()) if out.is_nested else [out]

    for run in (guided, ksampled):
        assert close(run(windowed(model)), run(reference))
        assert equal(run(windowed(model, window=4)), run(model))


def test_guides_see_all_and_are_seen_by_all(windowed, last_run):
    model = build_model()
    noise, mask, conds = guides()
    ours = windowed(model)
    result = sample(ours, noise=noise, noise_mask=mask, **conds)
    reference = masked_model(model, visible(9, 6, 1, 0, guides=6))
    assert close(result, sample(reference, noise=noise, noise_mask=mask, **conds))
    assert last_run(ours)["taken"] == 9 and not last_run(ours)["declined"]


def test_guide_strength_masks_stay_in_force(windowed, last_run):
    model = build_model()
    noise, mask, conds = guides(strength=0.4)
    ours = windowed(model)
    result = sample(ours, noise=noise, noise_mask=mask, **conds)
    reference = masked_model(model, visible(9, 6, 1, 0, guides=6))
    assert close(result, sample(reference, noise=noise, noise_mask=mask, **conds))
    assert last_run(ours)["taken"] == 9
    # Releases that split the queries ask once more for the guides alone, which see everything.
    declined = last_run(ours)["declined"]
    splits = hasattr(tiny_models.comfy.ldm.lightricks.model, "GuideAttentionMask")
    assert declined == ({"GUIDE_QUERIES": 9} if splits else {})
    wide = windowed(model, window=4)
    assert equal(
        sample(wide, noise=noise, noise_mask=mask, **conds),
        sample(model, noise=noise, noise_mask=mask, **conds),
    )


def test_dropped_guide_tokens(windowed, last_run):
    model = build_model()
    noise, _, conds = guides()
    mask = torch.ones(1, 1, 10, 2, 3)
    mask[:, :, -1] = 0.0
    mask[:, :, -1, 0, :2] = -1.0
    ours = windowed(model)
    result = sample(ours, noise=noise, noise_mask=mask, **conds)
    reference = masked_model(model, visible(9, 6, 1, 0, guides=4))
    assert close(result, sample(reference, noise=noise, noise_mask=mask, **conds))
    assert last_run(ours)["taken"] == 9 and not last_run(ours)["declined"]


def test_image_to_video_mask(windowed):
    model = build_model()
    mask = torch.ones(1, 1, 9, 1, 1)
    mask[:, :, 0] = 0.0
    reference = masked_model(model, visible(9, 6, 1, 1))
    assert close(sample(windowed(model, sink_frames=1), noise_mask=mask), sample(reference, noise_mask=mask))


@pytest.mark.parametrize("family", FORMS)
def test_the_work_is_really_not_done(family, pack, windowed):
    model, per_frame, frames, steps, blocks, width = build_model(family), 6, 9, 3, 3, 128

    def products(patcher):
        with FlopCounterMode(display=False) as counter:
            sample(patcher, family, cfg=1.0)
        counts = counter.get_flop_counts()["Global"]
        return sum(counts.get(op, 0) for op in (torch.ops.aten.bmm, torch.ops.aten.baddbmm))

    saved = products(model) - products(windowed(model))
    pairs = (frames * per_frame) ** 2 - frames * 3 * per_frame**2
    assert saved == 4 * pairs * width * blocks * steps
    technique = pack("patches.techniques.temporal_window").TemporalWindow(window=1, sink_frames=0)
    tokens = pack("patches.kernels.tokens").VideoTokens.grid(frames, 2, 3)
    work = technique.cost(pack("patches.layouts.work").Work(tokens, blocks, 5))
    left = [segments.pairs(range(tokens.total)) for segments in work.segments.values()]
    assert left == [tokens.total**2 - pairs] * blocks
