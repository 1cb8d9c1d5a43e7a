"""Keyframe Stride between two stages, with core's own nodes around it: every graph that the templates draw."""

from __future__ import annotations

import inspect
import logging

import comfy.nested_tensor
import comfy.samplers
import pytest
import torch
from reference import equal
from regroups import Regroups
from tiny_models import build_model, conditioning, sample

FRAMES, SHORT, GRID, RATE = 9, 5, (2, 3), 24.0
FIRST, SECOND = [1.0, 0.909375, 0.421875, 0.0], [0.85, 0.4219, 0.0]


@pytest.fixture(scope="module")
def core():
    """Core's nodes; the oldest release's do not import without a server."""
    return pytest.importorskip("comfy_extras.nodes_lt", reason="this tree has no LTX nodes")


@pytest.fixture
def last(pack):
    journal_of = pack("patches.mount").journal_of
    return lambda model: journal_of(model).records()[-1]["techniques"]["keyframe stride"]


@pytest.fixture(scope="module")
def vae(tiny):
    pytest.importorskip("comfy.sd", reason="this ComfyUI tree has no VAE", exc_type=ImportError)
    return tiny("vae").CodecVAE()


@pytest.fixture(scope="module")
def model():
    return build_model("ltxav", blocks=2)


@pytest.fixture(scope="module")
def upscale(vae):
    """Core's node with the makers' network, its weights random."""
    node = pytest.importorskip("comfy_extras.nodes_lt_upsampler").LTXVLatentUpsampler
    import comfy.ldm.lightricks.latent_upsampler as upsampler
    import comfy.model_patcher
    import comfy.ops

    config = {"in_channels": 128, "dims": 3, "mid_channels": 32, "num_blocks_per_stage": 1}
    from_config = upsampler.LatentUpsampler.from_config
    is_managed = "operations" in inspect.signature(from_config).parameters
    network = from_config(config, **({"operations": comfy.ops.disable_weight_init} if is_managed else {}))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.05)
    network.eval().requires_grad_(False)
    cpu = torch.device("cpu")
    # Older releases take the network as it is.
    loaded = (
        comfy.model_patcher.ModelPatcher(network, load_device=cpu, offload_device=cpu)
        if is_managed
        else network
    )
    return lambda latent: node.execute(latent, loaded, vae).args[0]


def clip(frames=FRAMES, grid=GRID):
    return {"samples": torch.zeros(1, 128, frames, *grid)}


def sound(frames=FRAMES):
    return {"samples": torch.zeros(1, 8, round(25 * (8 * (frames - 1) + 1) / RATE), 16)}


def conds(rate=RATE):
    return conditioning("ltxav", frame_rate=rate), conditioning("ltxav", seed=7, frame_rate=rate)


def refined(model, latent, sigmas, positive, negative, seed):
    """What core's SamplerCustomAdvanced does with a CFGGuider at 1."""
    nodes = pytest.importorskip("comfy_extras.nodes_custom_sampler")
    guider = nodes.Guider_Basic(model)
    guider.set_conds(positive)
    sampler, noise = comfy.samplers.sampler_object("euler"), nodes.Noise_RandomNoise(seed)
    return nodes.SamplerCustomAdvanced.execute(noise, guider, sampler, torch.tensor(sigmas), latent).args[0]


def joined(core, video, audio):
    return core.LTXVConcatAVLatent.execute(video, audio).args[0]


def apart(core, latent):
    return core.LTXVSeparateAVLatent.execute(latent).args


def held(core, vae, image, latent, strength):
    return core.LTXVImgToVideoInplace.execute(vae, image, latent, strength).args[0]


def video_of(latent):
    return latent["samples"].unbind()[0] if latent["samples"].is_nested else latent["samples"]


@pytest.fixture
def picture():
    return torch.rand(1, 128, 192, 3, generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize(("by", "first", "has_image"), [(2, 1, False), (4, 1, True), (4, 2, True)])
def test_text_and_image(
    core, stride, interpolate, last, vae, model, upscale, picture, by, first, has_image, caplog
):
    """The second stage is stock's at the low rate, bit for bit, and the sound hands the note past the image."""
    caplog.set_level(logging.INFO)
    positive, negative = conds()
    video = held(core, vae, picture, clip(SHORT), 0.7) if has_image else clip(SHORT)
    stage, latent = model, joined(core, video, sound(SHORT))
    if first > 1:
        stage, latent, *_ = stride(model, latent, first, RATE).args
    done = refined(stage, latent, FIRST, positive, negative, 1)
    ours, thinned, _, frames = stride(model, done, by, RATE, vae).args
    small, audio = apart(core, thinned)
    kept = len(range(0, SHORT, first))
    assert video_of(small).shape[2] == len(range(0, SHORT, by))
    assert frames.shape == (8 * (kept - 1) + 1, 64, 96, 3)
    assert torch.equal(frames, vae.decode(video_of(done))[0])

    large = upscale(small)
    if has_image:
        large = held(core, vae, picture, large, 1.0)
    given = joined(core, large, audio)
    result = refined(ours, given, SECOND, positive, negative, 2)
    assert last(ours)["taken"] == 2 and not last(ours)["declined"]
    low = refined(model, given, SECOND, *conds(RATE / by), 2)
    assert equal(list(result["samples"].unbind()), list(low["samples"].unbind()))
    unstretched = refined(model, given, SECOND, positive, negative, 2)
    assert not equal(list(result["samples"].unbind()), list(unstretched["samples"].unbind()))

    final, heard = apart(core, result)
    assert torch.equal(heard["samples"], result["samples"].unbind()[1]) and heard["samples"].shape[2] == 34
    if has_image:
        assert torch.allclose(final["samples"][:, :, :1], vae.encode(picture), atol=1e-4)
    images, blind = (
        interpolate(final, "linear", vae=vae, encode=False, reference=reference).args[1]
        for reference in (frames, None)
    )
    assert images.shape == (33, 128, 192, 3) and torch.isfinite(images).all()
    assert torch.equal(images[::by], blind[::by])
    assert caplog.text.count("keyframes the reference is shifted by") == 1


@pytest.mark.parametrize(("frames", "by", "first"), [(5, 2, 1), (6, 4, 1), (6, 4, 2)])
def test_with_guides(core, stride, interpolate, last, vae, model, upscale, picture, frames, by, first):
    """Conditioning from before the first stage, the last image at the strided frame of the real end."""
    base, end = conds(), 8 * (frames - 1)

    def guided(latent, positions):
        positive, negative = base
        for at in positions:
            positive, negative, latent = core.LTXVAddGuide.execute(
                positive, negative, vae, latent, picture, at, 0.7
            ).args
        return positive, negative, latent

    stage, empty, audio = model, clip(frames), sound(frames)
    if first > 1:
        stage, strided, *_ = stride(model, joined(core, empty, audio), first, RATE).args
        empty, audio = apart(core, strided)
    positive, negative, video = guided(empty, [0, end // first])
    done = refined(stage, joined(core, video, audio), FIRST, positive, negative, 1)
    small, audio = apart(core, done)
    small = core.LTXVCropGuides.execute(positive, negative, small).args[2]
    if first > 1:
        # Cropping has dropped the note; the sound has it still.
        small = joined(core, small, audio)
    ours, thinned, _, reference = stride(model, small, by, RATE, vae).args
    small = apart(core, thinned)[0] if first > 1 else thinned
    short = video_of(small).shape[2]
    assert short == -(-(frames - 1) // by) + 1

    positive, negative, large = guided(upscale(small), [0, end // by])
    assert large["samples"].shape[2] == short + 2
    given = joined(core, large, audio)
    result = refined(ours, given, SECOND, positive, negative, 2)
    assert last(ours)["taken"] == 2 and not last(ours)["declined"]
    # Stock at the low rate has the guides at the same frames.
    rate = [[[text, {**values, "frame_rate": RATE / by}] for text, values in c] for c in (positive, negative)]
    low = refined(model, given, SECOND, *rate, 2)
    assert equal(list(result["samples"].unbind()), list(low["samples"].unbind()))
    final = apart(core, result)[0]
    final = core.LTXVCropGuides.execute(positive, negative, final).args[2]
    assert final["samples"].shape[2] == short
    images = interpolate(
        final, "linear", vae=vae, encode=False, stride=by, length=end + 1, reference=reference
    )
    assert images.args[1].shape[0] == end + 1


@pytest.mark.parametrize("family", ["ltxv", "ltxav"])
def test_the_model_of_the_second_stage_leaves_the_first_alone(stride, last, family, caplog):
    """A full first stage, and one that is strided less: neither is stretched, and the reason has a name."""
    model = build_model(family, blocks=2)
    full = clip() if family == "ltxv" else with_sound(clip(), 68)
    ours = stride(model, full, 4, RATE).args[0]
    for frames, reason in ((FRAMES, "FULL_LENGTH"), (5, "OTHER_LENGTH")):
        noise = torch.randn(1, 128, frames, *GRID, generator=torch.Generator().manual_seed(2))
        noise = noise if family == "ltxv" else with_sound({"samples": noise}, 68)["samples"]
        positive, negative = (
            conditioning(family, seed=seed, frame_rate=RATE) for seed in (1, 7)
        )  # fmt: skip
        given = {"noise": noise, "positive": positive, "negative": negative}
        with caplog.at_level(logging.WARNING):
            assert equal(sample(ours, family, **given), sample(model, family, **given))
        assert last(ours)["declined"] == {reason: 3} and not last(ours)["taken"]
        assert (reason in caplog.text) == (reason == "OTHER_LENGTH")


def with_sound(latent, length):
    audio = torch.randn(1, 8, length, 16, generator=torch.Generator().manual_seed(4))
    return {**latent, "samples": comfy.nested_tensor.NestedTensor((latent["samples"], audio))}


class Counting(Regroups):
    def __init__(self):
        super().__init__(8)
        self.decoded = []

    def decode(self, video):
        self.decoded.append(super().decode(video))
        return self.decoded[-1]


@pytest.mark.parametrize("by", [2, 4])
def test_frames_are_all_that_was_decoded(stride, by):
    """Once, at the rate of the latent that came in, a batch one clip after the other."""
    vae, video = Counting(), {"samples": torch.randn(2, 128, FRAMES, *GRID)}
    _, latent, _, frames = stride(build_model(), video, by, RATE, vae).args
    assert len(vae.decoded) == 1 and frames.shape == (130, *GRID, 3)
    assert torch.equal(frames, vae.decoded[0].flatten(0, 1))
    _, again, _, frames = stride(build_model(), latent, 2 * by, RATE, vae).args
    assert len(vae.decoded) == 2 and torch.equal(frames, vae.decoded[1].flatten(0, 1))
    assert again["samples"].shape[2] == 1 + 4 // by
    assert torch.equal(again["samples"][1:, :, 1:], vae.encode(vae.decoded[1][1, ::2])[:, :, 1:])


@pytest.mark.parametrize("by", [1, 2])
def test_nothing_decoded_is_no_reference(stride, by):
    vae = Counting()
    assert stride(build_model(), clip(), by, RATE, vae).args[3] is None and not vae.decoded
    video = {"samples": torch.randn(1, 128, FRAMES, *GRID)}
    assert (stride(build_model(), video, by, RATE, vae).args[3] is None) == (by == 1)


def test_a_latent_that_has_the_stride_gets_its_model(stride, last):
    """The second stage at the rate of the first: nothing is decoded, and the MODEL is the first stage's."""
    model, vae = build_model(blocks=2), Counting()
    one, latent, *_ = stride(model, clip(), 2, RATE).args
    latent = {**latent, "samples": torch.randn(1, 128, 5, *GRID)}
    other, same, _, frames = stride(model, latent, 2, RATE, vae).args
    assert same["samples"] is latent["samples"] and frames is None and not vae.decoded
    noise = latent["samples"]
    assert equal(sample(one, noise=noise), sample(other, noise=noise)) and last(other)["taken"]


def test_a_tail_is_told_of_by_the_node(stride, caplog):
    stride(build_model(), clip(16), 2, 48.0)
    assert caplog.text.count("8 video frames past") == 1 and len(caplog.records) == 1
    caplog.clear()
    stride(build_model(), clip(17), 2, 48.0)
    assert not caplog.records


def test_a_note_that_sound_kept_from_another_stride_is_not_believed(core, pack, stride, model):
    """The first stage's note in the sound, beside a video that was thinned without it."""
    note = pack("latents.stride").StrideNote
    _, first, *_ = stride(model, joined(core, clip(17), sound(17)), 2, RATE).args
    small, audio = apart(core, first)
    small = {**small, "samples": torch.randn(1, 128, 9, *GRID)}
    _, thinned, *_ = stride(model, small, 4, RATE, Regroups(8)).args
    assert note.read(thinned).stride == 4
    both = joined(core, thinned, audio)
    assert note.found(both).stride == 2 and note.read(both) is None
    with pytest.raises(ValueError, match="no note of this clip"):
        pack("latents.restore").note_for(both)
    assert note.read(apart(core, both)[0]) is None
