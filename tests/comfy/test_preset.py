"""ThriftPreset sets what the other nodes would, by stage and schedule, and says so."""

from __future__ import annotations

import logging

import pytest
import torch
from reference import equal
from tiny_models import FAMILIES, build_model, noise_like, sample, zeros_like

GRID = (13, 2, 3)
DISTILLED = torch.tensor([1.0, 0.99375, 0.9875, 0.98125, 0.975, 0.909375, 0.725, 0.421875, 0.0])
MANY = torch.linspace(1, 0, 13)
SECOND = torch.tensor([0.909375, 0.725, 0.421875, 0.0])


@pytest.fixture
def node(pack):
    return pack("nodes.preset").ThriftPreset


@pytest.fixture
def table(pack):
    return pack("presets.table")


@pytest.fixture
def plan(pack):
    plan_of = pack("patches.mount").plan_of
    return lambda model: {technique.name: technique for technique in plan_of(model)}


@pytest.fixture(scope="module")
def vae(tiny):
    pytest.importorskip("comfy.sd", reason="this ComfyUI tree has no VAE", exc_type=ImportError)
    return tiny("vae").CodecVAE()


def empty(family="ltxv", frames=13):
    return {"samples": zeros_like(noise_like(family, (frames, *GRID[1:])))}


def clip(family="ltxv", frames=13):
    return {"samples": noise_like(family, (frames, *GRID[1:]))}


def frames_of(latent):
    samples = latent["samples"]
    return (samples.unbind()[0] if samples.is_nested else samples).shape[2]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("preset", ["quality", "balanced", "fast", "cool laptop"])
def test_it_is_the_other_nodes(node, table, pack, plan, family, preset):
    """Bit for bit what KeyframeStride and the mounted settings make, and a run of few steps freezes nothing."""
    model, given = build_model(family), empty(family)
    ours, latent, frames, text = node.execute(model, given, preset).args
    recipe = table.TABLE[preset, "single"]
    theirs = model
    if recipe.stride > 1:
        theirs, expected, *_ = (
            pack("nodes.keyframe_stride").KeyframeStride.execute(model, given, recipe.stride).args
        )
        assert frames_of(latent) == frames_of(expected) < 13
        assert plan(ours)["keyframe stride"] == plan(theirs)["keyframe stride"]
    else:
        assert latent["samples"] is given["samples"] and "frame_thrift_full" not in given
    for technique in recipe.techniques:
        theirs = pack("patches.mount").mount(theirs, technique)
        assert plan(ours)[technique.name] == technique
    assert frames is None and preset in text.lower() and not plan(model)
    assert plan(ours) == plan(theirs)
    if preset != "cool laptop":
        noise = noise_like(family, (frames_of(latent), *GRID[1:]))
        assert equal(sample(ours, family, noise), sample(theirs, family, noise))


@pytest.mark.parametrize(("steps", "freezes"), [(8, False), (11, False), (12, True), (20, True)])
def test_only_schedules_of_many_steps_freeze(node, pack, steps, freezes, caplog):
    model = node.execute(build_model("ltxv"), empty(), "balanced").args[0]
    noise = noise_like("ltxv", (7, *GRID[1:]))
    with caplog.at_level(logging.WARNING):
        sample(model, "ltxv", noise, sigmas=torch.linspace(1, 0, steps + 1))
    told = pack("patches.mount").journal_of(model).records()[-1]["techniques"]
    assert bool(told["spatial freeze"]["taken"]) == freezes
    assert told["keyframe stride"]["taken"]
    # The preset knows that it may find few steps; nobody has to hear of it.
    assert "freezes none" not in caplog.text


def test_auto_sees_the_stage(node, vae):
    model = build_model("ltxv")
    assert "single stage" in node.execute(model, empty(), "balanced").args[3]
    assert "second stage" in node.execute(model, clip(), "balanced", vae=vae, sigmas=SECOND).args[3]
    pictured = empty()
    pictured["samples"] = pictured["samples"].clone()
    pictured["samples"][:, :, 0] = 1.0
    assert "single stage" in node.execute(model, pictured, "balanced").args[3]
    early = torch.tensor([0.987, 0.5, 0.0])
    assert "single stage" in node.execute(model, empty(), "balanced", sigmas=early).args[3]
    rising = torch.tensor([0.0, 0.5, 1.0])
    assert "single stage" in node.execute(model, empty(), "balanced", sigmas=rising).args[3]
    assert "first stage" in node.execute(model, empty(), "balanced", "first", sigmas=DISTILLED).args[3]


@pytest.mark.parametrize("stage", ["auto", "single", "first"])
def test_sigmas_of_a_second_stage_on_an_empty_latent_are_refused(node, stage):
    with pytest.raises(ValueError, match=r"sigmas: they start at 0\.909.*empty.*before the upscaler"):
        node.execute(build_model("ltxv"), empty(), "balanced", stage, sigmas=SECOND)


def test_an_empty_second_stage_is_refused(node):
    with pytest.raises(ValueError, match=r"stage is second.*empty.*first one's result"):
        node.execute(build_model("ltxv"), empty(), "balanced", "second")


def test_other_models_are_refused(node):
    class Other:
        model = torch.nn.Linear(1, 1)

    with pytest.raises(ValueError, match="expected LTX-Video or LTX-2, got Linear.*leave Thrift Preset out"):
        node.execute(Other(), empty(), "balanced")


def test_a_clip_without_vae_keeps_its_frames_and_the_text_says_so(node, plan):
    given = clip()
    model, latent, frames, text = node.execute(build_model("ltxv"), given, "fast").args
    assert latent["samples"] is given["samples"] and frames is None and "keyframe stride" not in plan(model)
    assert "No keyframe stride: the latent holds a clip, and without vae it cannot be strided" in text
    assert "was not measured" in text and "measured on a small model" not in text.lower()


@pytest.mark.parametrize(
    ("preset", "stride"), [("quality", 1), ("balanced", 2), ("fast", 3), ("cool laptop", 3)]
)
def test_a_finished_first_stage_is_thinned_and_shown(node, vae, preset, stride):
    given = clip()
    _, latent, frames, _ = node.execute(build_model("ltxv"), given, preset, vae=vae).args
    assert frames_of(latent) == 12 // stride + 1
    assert (frames is None) == (stride == 1)
    if frames is not None:
        assert frames.shape[0] == 97


@pytest.mark.parametrize("has_vae", [False, True])
@pytest.mark.parametrize("preset", ["quality", "balanced", "fast"])
def test_a_strided_first_stage_keeps_its_stride(node, plan, vae, preset, has_vae):
    """Whatever this stage's preset would thin to: the MODEL is stretched for the frames that are there."""
    model = build_model("ltxv")
    first = node.execute(model, empty(), "balanced", "first").args[1]
    sampled = {**first, "samples": torch.randn_like(first["samples"])}
    ours, latent, frames, text = node.execute(model, sampled, preset, vae=vae if has_vae else None).args
    assert frames_of(latent) == 7 and frames is None and equal(latent["samples"], sampled["samples"])
    assert plan(ours)["keyframe stride"].stride == 2
    assert ("strided already" in text) == (preset != "balanced")


@pytest.mark.parametrize(("frames", "stride"), [(1, 1), (2, 1), (4, 1), (6, 1), (7, 2), (9, 2), (10, 3)])
def test_short_clips_are_strided_less(node, frames, stride):
    _, latent, _, text = node.execute(build_model("ltxv"), empty(frames=frames), "fast").args
    assert frames_of(latent) == (frames if stride == 1 else -(-(frames - 1) // stride) + 1)
    assert ("as the clip is short" in text) == (stride != 3)


def test_nodes_behind_it_override_it_also_back_to_neutral(node, pack, plan):
    nodes = {each.define_schema().node_id: each for each in pack("nodes").NODES}
    model, latent, *_ = node.execute(build_model("ltxv"), empty(), "quality").args
    other = nodes["ApplyTemporalWindow"].execute(model, 7, 1, 0.0, 1.0, 0).args[0]
    assert plan(other)["temporal window"].window == 7
    none = nodes["ScheduleSpatialFreeze"].execute(model, refresh_every=1).args[0]
    assert "spatial freeze" not in plan(none)
    model, latent, *_ = node.execute(build_model("ltxv"), empty(), "balanced").args
    with pytest.raises(ValueError, match="strided already"):
        nodes["KeyframeStride"].execute(model, latent, 1)
    further = nodes["KeyframeStride"].execute(model, latent, 4).args
    assert frames_of(further[1]) == 4 and plan(further[0])["keyframe stride"].stride == 4


@pytest.mark.parametrize("preset", ["quality", "balanced", "fast", "cool laptop"])
def test_interpolation_behind_it_gives_every_frame(node, interpolate, vae, preset):
    latent = node.execute(build_model("ltxv"), empty(), preset).args[1]
    sampled = {**latent, "samples": torch.randn_like(latent["samples"])}
    assert interpolate(sampled, "motion", vae=vae, encode=False).args[1].shape[0] == 97


def test_the_text_has_the_evidence_of_such_schedules(node):
    model = build_model("ltxv")
    few, many, both = (
        node.execute(model, empty(), "balanced", sigmas=sigmas).args[3] for sigmas in (DISTILLED, MANY, None)
    )
    assert "8 steps" in few and "24 steps" not in few
    assert "24 steps" in many and "8 steps" not in many
    assert "24 steps" in both and "8 steps" in both
    assert "Keyframe stride 2: 7 latent frames." in few


def test_the_text_of_a_second_stage_is_that_of_its_first(node, vae):
    model = build_model("ltxv")
    full = node.execute(model, clip(), "balanced", vae=vae).args[3]
    assert "69%" in full and "51%" not in full and "a clip of 97 frames that was not strided before" in full
    first = node.execute(model, empty(), "balanced", "first").args[1]
    sampled = {**first, "samples": torch.randn_like(first["samples"])}
    strided = node.execute(model, sampled, "balanced", vae=vae).args[3]
    assert "51%" in strided and "69%" not in strided and "not strided before" not in strided
    many = node.execute(model, sampled, "balanced", vae=vae, sigmas=MANY).args[3]
    assert "was not measured" in many


@pytest.mark.parametrize("has_vae", [False, True])
def test_a_short_clip_is_not_promised_more_with_vae(node, vae, has_vae):
    text = node.execute(build_model("ltxv"), clip(frames=4), "balanced", vae=vae if has_vae else None).args[3]
    assert "as the clip is short" in text and "Connect vae" not in text


def test_a_window_that_covers_the_clip_is_not_set(node, plan):
    model, _, _, text = node.execute(build_model("ltxv"), empty(frames=9), "quality").args
    assert "temporal window" not in plan(model) and "was not measured" in text
    assert "temporal window" in plan(node.execute(build_model("ltxv"), empty(frames=10), "quality").args[0])


def test_a_preset_behind_a_preset_replaces_all_of_it(node, plan, pack):
    """Also its stride: a full-length stage on the same MODEL is not stretched."""
    model = node.execute(build_model("ltxv"), empty(), "cool laptop").args[0]
    assert {"keyframe stride", "spatial freeze", "GPU pacing"} <= plan(model).keys()
    again = node.execute(model, empty(frames=5), "quality").args[0]
    assert plan(again).keys() == {"spatial freeze"}
    noise = noise_like("ltxv", (5, *GRID[1:]))
    assert equal(sample(again, "ltxv", noise), sample(build_model("ltxv"), "ltxv", noise))
    # What was set by hand and no preset sets stays.
    precise = pack("nodes.attention_precision").ThriftAttentionPrecision.execute(model).args[0]
    kept = plan(node.execute(precise, empty(), "fast").args[0])
    assert kept.keys() == {"keyframe stride", "spatial freeze", *(plan(precise).keys() - plan(model).keys())}


@pytest.mark.parametrize("preset", ["quality", "balanced"])
def test_a_strided_latent_with_added_guides_is_refused(node, pack, preset):
    """Its note is not true any more; as a full clip it would be sampled at the wrong times."""
    first = node.execute(build_model("ltxv"), empty(), "balanced").args[1]
    longer = {**first, "samples": torch.randn(1, 128, 8, *GRID[1:])}
    with pytest.raises(ValueError, match="strided to 7 latent frames and has 8 now.*Crop or separate"):
        node.execute(build_model("ltxv"), longer, preset)
    with pytest.raises(ValueError, match="strided to 7 latent frames and has 8 now"):
        pack("nodes.keyframe_stride").KeyframeStride.execute(build_model("ltxv"), longer, 1)


def test_sound_that_was_not_strided_hides_no_note(node, interpolate, vae):
    """Core's node that joins sound and video lets the sound's entries win."""
    model = build_model("ltxav")
    joined = node.execute(model, clip("ltxav"), "quality").args[1]
    video = {**joined, "samples": joined["samples"].unbind()[0]}
    sound = {**joined, "samples": joined["samples"].unbind()[1]}
    thin = node.execute(model, video, "balanced", "second", vae=vae).args[1]
    both = {**thin, **{name: value for name, value in sound.items() if name != "samples"}}
    assert interpolate(both, "motion", vae=vae, encode=False).args[1].shape[0] == 97
    # A mark tells nothing of another length, and what is set by hand counts.
    longer = {**joined, "samples": torch.randn(1, 128, 25, *GRID[1:])}
    with pytest.raises(ValueError, match="no note"):
        interpolate(longer, "motion", vae=vae, encode=False)
    assert interpolate(longer, "motion", vae=vae, encode=False, stride=1).args[1].shape[0] == 193
    assert interpolate(video, "motion", vae=vae, encode=False, stride=2).args[1].shape[0] == 193
