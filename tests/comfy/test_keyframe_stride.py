"""KeyframeStride is the stock graph with a shorter latent and a lower frame rate, bit for bit, and nothing more."""

from __future__ import annotations

import logging

import pytest
import torch
from reference import equal
from tiny_models import FAMILIES, build_model, conditioning, noise_like, sample, zeros_like

SHAPE = (9, 2, 3)


@pytest.fixture
def node(pack):
    return pack("nodes.keyframe_stride").KeyframeStride


@pytest.fixture
def last(pack):
    journal_of = pack("patches.mount").journal_of
    return lambda model: journal_of(model).records()[-1]["techniques"]["keyframe stride"]


def shortened(noise, frames):
    """The noise of the strided latent: its own draw, with the full-length audio."""
    video = noise_like("ltxv", (frames, *SHAPE[1:]), seed=11)
    return type(noise)([video, noise.unbind()[1]]) if noise.is_nested else video


def at_rate(family, rate, **values):
    return {
        "positive": conditioning(family, frame_rate=rate, **values),
        "negative": conditioning(family, seed=7, frame_rate=rate, **values),
    }


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("stride", "frames"), [(2, 5), (3, 4), (8, 2)])
@pytest.mark.parametrize("cfg", [1.0, 2.0])
def test_it_is_the_stock_graph_at_the_low_rate(node, last, family, stride, frames, cfg):
    model, noise = build_model(family), noise_like(family, SHAPE)
    ours, latent, low, _ = node.execute(model, {"samples": zeros_like(noise)}, stride, 24.0).args
    video = latent["samples"].unbind()[0] if noise.is_nested else latent["samples"]
    assert video.shape[2] == frames and low == 24.0 / stride
    short = shortened(noise, frames)
    result = sample(ours, family, short, cfg=cfg, **at_rate(family, 24.0))
    assert equal(result, sample(model, family, short, cfg=cfg, **at_rate(family, 24.0 / stride)))
    assert not equal(result, sample(model, family, short, cfg=cfg, **at_rate(family, 24.0)))
    assert last(ours)["taken"] and not last(ours)["declined"]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_full_length_is_left_alone(node, last, family, caplog):
    model, noise = build_model(family), noise_like(family, SHAPE)
    ours = node.execute(model, {"samples": zeros_like(noise)}, 2).args[0]
    with caplog.at_level(logging.INFO):
        assert equal(sample(ours, family, noise), sample(model, family, noise))
    assert last(ours)["declined"].keys() == {"FULL_LENGTH"} and not last(ours)["taken"]
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


def test_another_length_is_left_alone_and_warned_about(node, last, caplog):
    model, noise = build_model(), noise_like(shape=(7, 2, 3))
    ours = node.execute(model, {"samples": torch.zeros(1, 128, *SHAPE)}, 2).args[0]
    assert equal(sample(ours, noise=noise), sample(model, noise=noise))
    assert last(ours)["declined"].keys() == {"OTHER_LENGTH"}
    assert "OTHER_LENGTH" in caplog.text


@pytest.mark.parametrize("stride", [2, 4])
def test_guides_land_on_the_right_second(node, last, stride):
    """A guide put on the low-rate clip at its middle, seen from inside the model: seconds of every token."""
    model = build_model()
    ours, latent, *_ = node.execute(model, {"samples": torch.zeros(1, 128, *SHAPE)}, stride, 24.0).args
    frames, (height, width) = latent["samples"].shape[2], SHAPE[1:]
    middle = 32 // stride
    y, x = torch.meshgrid(torch.arange(height) * 32.0, torch.arange(width) * 32.0, indexing="ij")
    starts = torch.stack([torch.full_like(y, float(middle)), y, x]).flatten(1)
    coordinates = torch.stack([starts, starts + torch.tensor([[1.0], [32.0], [32.0]])], dim=-1)[None]
    entry = {"pre_filter_count": height * width, "strength": 1.0, "pixel_mask": None}
    entry["latent_shape"] = [1, height, width]
    values = {"keyframe_idxs": coordinates, "guide_attention_entries": [entry]}
    noise = noise_like(shape=(frames + 1, height, width))
    mask = torch.ones(1, 1, frames + 1, 1, 1)
    mask[:, :, -1] = 0.0

    seconds = []
    inside = model.model.diffusion_model
    prepare = inside._prepare_positional_embeddings

    def watch(pixel_coords, frame_rate, *args):
        assert frame_rate == 24.0 / stride
        seconds.append(pixel_coords[0, 0].float() / frame_rate)
        return prepare(pixel_coords, frame_rate, *args)

    inside._prepare_positional_embeddings = watch
    try:
        sample(ours, noise=noise, noise_mask=mask, **at_rate("ltxv", 24.0, **values))
    finally:
        del inside._prepare_positional_embeddings
    # Both conds, every step: the guide at the second at which the full clip's frame 32 lies.
    assert len(seconds) >= 3
    for times in seconds:
        assert torch.allclose(times[-height * width :, 0], torch.tensor(32 / 24))
        # The clip itself is as long as the full one, up to the eight frames of the last latent frame.
        assert abs(times[: -height * width].max() - 65 / 24) <= 8 * stride / 24
    assert last(ours)["taken"] and not last(ours)["declined"]


def test_context_windows_of_the_strided_clip_are_stretched(node, last):
    context_windows = pytest.importorskip("comfy.context_windows")
    model = build_model()
    ours, latent, *_ = node.execute(model, {"samples": torch.zeros(1, 128, 17, 2, 3)}, 2, 24.0).args
    frames = latent["samples"].shape[2]

    def windowed(patcher):
        clone = patcher.clone()
        clone.model_options["context_handler"] = context_windows.IndexListContextHandler(
            context_schedule=context_windows.get_matching_context_schedule("standard_static"),
            fuse_method=context_windows.get_matching_fuse_method("pyramid"),
            context_length=5,
            context_overlap=2,
            dim=2,
        )
        return clone

    noise = noise_like(shape=(frames, 2, 3))
    result = sample(windowed(ours), noise=noise, **at_rate("ltxv", 24.0))
    assert equal(result, sample(windowed(model), noise=noise, **at_rate("ltxv", 12.0)))
    assert last(ours)["taken"] and not last(ours)["declined"]


def test_beside_the_window_in_both_orders(node, windowed, pack):
    model, latent = build_model(), {"samples": torch.zeros(1, 128, *SHAPE)}
    one = windowed(node.execute(model, latent, 2).args[0])
    other = node.execute(windowed(model), latent, 2).args[0]
    plan_of = pack("patches.mount").plan_of
    assert plan_of(one) == plan_of(other) and len(plan_of(one)) == 2
    noise = noise_like(shape=(5, 2, 3))
    low = at_rate("ltxv", 12.0)
    result = sample(one, noise=noise)
    assert equal(result, sample(other, noise=noise))
    assert equal(result, sample(windowed(model), noise=noise, **low))


def test_stride_1_hands_on_what_came(node):
    model, latent = build_model(), {"samples": torch.zeros(1, 128, *SHAPE)}
    out = node.execute(model, latent, 1, 24.0).args
    assert out[0] is model and out[1] is latent and out[2] == 24.0


@pytest.mark.parametrize("stride", [1, 2])
def test_a_rate_that_was_not_given_does_not_come_out_as_0(node, stride):
    """A video of no frames a second would be made of it: whatever is connected is told instead."""
    blocker = node.execute(build_model(), {"samples": torch.zeros(1, 128, *SHAPE)}, stride).args[2]
    assert type(blocker).__name__ == "ExecutionBlocker" and "set frame_rate" in blocker.message


@pytest.mark.parametrize("rate", [float("nan"), float("inf"), -1.0])
@pytest.mark.parametrize("stride", [1, 2])
def test_what_is_no_frame_rate_is_refused_by_name(node, stride, rate):
    with pytest.raises(ValueError, match="^frame_rate: "):
        node.execute(build_model(), {"samples": torch.zeros(1, 128, *SHAPE)}, stride, rate)


def test_models_and_latents_of_another_family_are_refused_by_name(node):
    """The model would decline and the clip would play too fast; stride 1 changes nothing on any."""

    class Other(torch.nn.Module):
        pass

    model, latent = build_model(), {"samples": torch.zeros(1, 128, *SHAPE)}
    strange = {"samples": torch.zeros(1, 16, *SHAPE)}
    with pytest.raises(ValueError, match="^latent: expected 128 channels"):
        node.execute(model, strange, 2)
    model.model.diffusion_model = Other()
    with pytest.raises(ValueError, match="^model: expected LTX-Video or LTX-2"):
        node.execute(model, latent, 2)
    for given in (latent, strange):
        out = node.execute(model, given, 1, 24.0).args
        assert out[0] is model and out[1] is given


def test_stride_1_does_not_keep_a_short_latent(node):
    """It would take the stretched times off and leave half the frames."""
    ours, latent, *_ = node.execute(build_model(), {"samples": torch.zeros(1, 128, *SHAPE)}, 2, 24.0).args
    with pytest.raises(ValueError, match=r"^stride: 1 is the full length.*5 latent frames instead of 9"):
        node.execute(ours, latent, 1, 24.0)


def test_stride_1_takes_an_earlier_stride_off(node, pack):
    latent = {"samples": torch.zeros(1, 128, *SHAPE)}
    strided = node.execute(build_model(), latent, 2).args[0]
    assert pack("patches.mount").plan_of(strided)
    assert not pack("patches.mount").plan_of(node.execute(strided, latent, 1).args[0])


@pytest.mark.parametrize(("told", "is_news"), [(24.0, False), (0.0, False), (48.0, True)])
def test_two_frame_rates_that_do_not_agree_are_warned_about_once(node, last, caplog, told, is_news):
    """As when the low rate is wired into the conditioning: times would be stretched twice."""
    ours, latent, *_ = node.execute(build_model(), {"samples": torch.zeros(1, 128, *SHAPE)}, 2, told).args
    noise = noise_like(shape=(latent["samples"].shape[2], 2, 3))
    sample(ours, noise=noise, **at_rate("ltxv", 24.0))
    assert caplog.text.count("the model is told 24 frames a second") == is_news and last(ours)["taken"]


def test_a_clip_beyond_the_models_seconds_is_warned_about_once(node, caplog):
    model = build_model()
    ours, latent, *_ = node.execute(model, {"samples": torch.zeros(1, 128, *SHAPE)}, 4).args
    noise = noise_like(shape=(latent["samples"].shape[2], 2, 3))
    sample(ours, noise=noise, **at_rate("ltxv", 24.0))
    assert "20 s" not in caplog.text
    sample(ours, noise=noise, **at_rate("ltxv", 3.0))
    assert caplog.text.count("positions up to 20 s") == 1


@pytest.mark.parametrize(("rate", "stride", "is_low"), [(48.0, 2, False), (24.0, 2, True), (0.0, 2, False)])
def test_a_low_frame_rate_gets_one_honest_line(node, caplog, rate, stride, is_low):
    node.execute(build_model(), {"samples": torch.zeros(1, 128, *SHAPE)}, stride, rate)
    assert caplog.text.count("depends on the weights") == is_low


def test_a_model_without_a_frame_rate_declines(node, last, pack, monkeypatch):
    ltx = pack("patches.layouts.ltx")
    monkeypatch.setattr(ltx.LtxLayout, "frame_rate", None)
    model, noise = build_model(), noise_like(shape=(5, 2, 3))
    ours = node.execute(model, {"samples": torch.zeros(1, 128, *SHAPE)}, 2).args[0]
    assert equal(sample(ours, noise=noise), sample(model, noise=noise))
    assert last(ours)["declined"].keys() == {"NO_FRAME_RATE"}


@pytest.mark.parametrize(("latent_frames", "stride"), [(16, 2), (9, 2), (9, 3), (16, 4), (16, 7)])
def test_a_guide_as_long_as_the_clip_guides_all_of_it(node, tiny, pack, latent_frames, stride):
    guides = pytest.importorskip("comfy_extras.nodes_lt", reason="this tree has no LTX nodes").LTXVAddGuide
    frames = torch.rand(8 * latent_frames - 7, 64, 64, 3)
    image = pack("nodes.thin_guide").ThriftThinGuide.execute(frames, stride).args[0]
    empty = {"samples": torch.zeros(1, 128, latent_frames, 2, 2)}
    latent = node.execute(build_model(), empty, stride, 24.0).args[1]
    conds = at_rate("ltxv", 24.0)
    guided = guides.execute(
        conds["positive"], conds["negative"], tiny("vae").CodecVAE(), latent, image, 0, 1.0
    )
    assert guided.args[2]["samples"].shape[2] == 2 * latent["samples"].shape[2]
    assert pack("nodes.thin_guide").ThriftThinGuide.execute(frames, 1).args[0] is frames
    one = pack("nodes.thin_guide").ThriftThinGuide.execute(frames[:1], stride).args[0]
    assert torch.equal(one, frames[:1])


@pytest.mark.parametrize("guide_frames", [1, 17])
def test_a_guide_added_by_core_behind_it(guide_frames, node, last, tiny, pack):
    """Its frame number and its positions are those of the short clip at the low rate; a video is thinned to it."""
    guides = pytest.importorskip("comfy_extras.nodes_lt", reason="this tree has no LTX nodes").LTXVAddGuide
    model, vae = build_model(), tiny("vae").CodecVAE()
    clip = torch.zeros(1, 128, 9, 2, 3)
    frames = torch.rand(2 * guide_frames - 1, 64, 96, 3, generator=torch.Generator().manual_seed(5))
    image = pack("nodes.thin_guide").ThriftThinGuide.execute(frames, 2).args[0]
    assert torch.equal(image, frames[torch.arange(guide_frames) * 2])
    ours, latent, *_ = node.execute(model, {"samples": clip}, 2, 24.0).args

    def sampled(patched, rate, samples):
        conds = at_rate("ltxv", rate)
        positive, negative, guided = guides.execute(
            conds["positive"], conds["negative"], vae, {"samples": samples}, image, 16, 1.0
        ).args
        behind = guided["samples"].shape[2] - 5
        assert behind and (behind > 1) == (guide_frames > 1), "the guide stands behind the frames of the clip"
        noise = noise_like("ltxv", tuple(guided["samples"].shape[2:]), seed=11)
        mask = guided["noise_mask"]
        return sample(patched, noise=noise, positive=positive, negative=negative, noise_mask=mask)

    result = sampled(ours, 24.0, latent["samples"])
    assert equal(result, sampled(model, 12.0, torch.zeros(1, 128, 5, 2, 3)))
    assert not equal(result, sampled(model, 24.0, torch.zeros(1, 128, 5, 2, 3)))
    assert last(ours)["taken"] == 3 and not last(ours)["declined"]
