"""The small model that judges techniques: its clips, its codec, its parts, and the training that made them."""

from __future__ import annotations

import argparse
import sys

import comfyui_version
import pytest
import torch
import torch.nn.functional as F


@pytest.fixture(scope="module")
def clips(tiny):
    return tiny("clips")


def drawn(clips, size, ids, frames=2, seed=3):
    fps = torch.full((len(ids),), 24.0)
    return clips.draw_clips(
        len(ids), frames, torch.Generator().manual_seed(seed), ids=ids, fps=fps, size=size
    )


def test_a_clip_is_the_same_at_both_sizes_but_for_its_texture(clips):
    ids = torch.tensor([[s, 0, s % 3, 2, 0] for s in range(4)])
    small, full = (drawn(clips, size, ids) for size in (clips.SMALL, clips.FULL))
    assert full.pixels.shape == (4, 9, 64, 64)
    assert torch.equal(full.places, 2 * small.places)
    assert (F.avg_pool2d(full.pixels, 2) - small.pixels).abs().mean() < 0.005
    ids[:, 4] = torch.tensor([1, 2, 3, 1])
    textured = drawn(clips, clips.FULL, ids)
    assert torch.equal(drawn(clips, clips.SMALL, ids).pixels, small.pixels)
    changed = (textured.pixels - full.pixels).abs()
    assert 0.1 < changed.amax() <= clips.CONTRAST + 1e-6 and (changed > 0).float().mean() < 0.2


@pytest.mark.parametrize("texture", [1, 2, 3])
def test_a_texture_moves_with_its_shape(clips, texture):
    """Pixels a whole number of texture waves and of pixels away from the middle look alike in every frame."""
    x, y = torch.meshgrid(torch.arange(-6.0, 7), torch.arange(-6.0, 7), indexing="xy")
    phases = torch.tensor([0.3, 0.7]).view(2, 1, 1)
    wave = {2: clips.DOTS, 3: clips.CHECKS}
    look = clips.draw_texture(torch.tensor(texture), x, y, phases)
    assert look.abs().max() <= 1 and look.std() > 0.3
    if texture in wave:
        again = clips.draw_texture(torch.tensor(texture), x + wave[texture], y - wave[texture], phases)
        assert torch.allclose(look, again, atol=1e-5)
    ids = torch.tensor([[0, 0, 0, 2, texture]])
    clip = drawn(clips, clips.FULL, ids, frames=3, seed=5)
    # Where the shape has moved by nearly whole pixels, moving the picture along brings its middle back.
    way = clip.places[0] - clip.places[0, :1]
    frame = min(range(6, 17), key=lambda f: float((way[f, 0] - way[f, 0].round()).abs()))
    across = int(way[frame, 0].round())
    x0, y0 = (int(v) for v in clip.places[0, 0])
    before = clip.pixels[0, 0, y0 - 4 : y0 + 5, x0 - 4 : x0 + 5]
    after = clip.pixels[0, frame, y0 - 4 : y0 + 5, x0 + across - 4 : x0 + across + 5]
    assert abs(across) > 2 and (before - after).abs().mean() < 0.05


def test_the_codec_is_exact_at_both_sizes_and_makes_larger(tiny):
    module = tiny("codec")
    codec = module.Codec(zoom=1)
    for size in (32, 64):
        pixels = torch.rand(2, 1, 17, size, size)
        latent = codec.encode_pixels(pixels)
        assert latent.shape == (2, 128, 3, size // 4, size // 4)
        assert torch.allclose(codec.decode_pixels(latent), pixels, atol=1e-5)
        assert codec.signal(size).sum() == module.SIGNAL_CHANNELS[size]
    flat = torch.full((1, 1, 9, 32, 32), 0.6)
    larger = codec.decode_pixels(module.upscaled(codec, codec.encode_pixels(flat)))
    assert larger.shape == (1, 1, 9, 64, 64) and torch.allclose(
        larger, torch.full_like(larger, 0.6), atol=1e-5
    )


def test_the_upscaling_node_makes_larger_and_keeps_the_note(tiny):
    latent = torch.randn(1, 128, 3, 8, 8, generator=torch.Generator().manual_seed(2))
    note = {"stride": 2, "frames": 5, "strided_frames": 3}
    larger = tiny("nodes").ThriftTinyUpscale.execute({"samples": latent, "frame_thrift_stride": note}).args[0]
    codec = tiny("codec").Codec(zoom=1)
    assert torch.equal(larger["samples"], tiny("codec").upscaled(codec, latent))
    assert larger["samples"].shape == (1, 128, 3, 16, 16) and larger["frame_thrift_stride"] == note


def test_the_loader_shows_pictures_as_large_as_it_is_asked_to(tiny):
    pytest.importorskip("comfy.sd", reason="this ComfyUI tree has no VAE", exc_type=ImportError)
    words = {"shape": "ring", "direction": "horizontal", "speed": "medium", "second_shape": "none"}
    for zoom, side in (({"zoom": 1}, 32), ({}, 256)):
        vae = tiny("nodes").ThriftTinyLTX.execute(**words, **zoom).args[3]
        assert vae.decode(torch.zeros(1, 128, 2, 8, 8)).shape[-3:] == (side, side, 3)


def test_differences_are_added_as_comfyui_adds_loras(tiny):
    model = tiny("model")
    try:
        from comfy.sd import load_lora_for_models
    except ImportError:
        pytest.skip("this tree has no LoRA loader")
    from safetensors.torch import load_file

    patched, _ = load_lora_for_models(
        model.load_model("pessimist"), None, load_file(str(model.file_of("low_rates"))), 1.0, 0.0
    )
    patched.patch_model()
    wanted = model.load_model("teacher").model.diffusion_model.state_dict()
    base = model.read_weights("pessimist")[0]
    changed = 0
    for key, value in patched.model.diffusion_model.state_dict().items():
        assert torch.allclose(value, wanted[key], atol=1e-5), key
        changed += not torch.equal(value, base[key])
    assert changed > 100


def test_unknown_names_are_refused(tiny):
    with pytest.raises(ValueError, match="pessimist, teacher, student, refiner"):
        tiny("model").read_weights("pupil")


@pytest.fixture
def few(tiny, monkeypatch, tmp_path):
    """Training of two blocks and a handful of clips: `few(part, steps)` returns what is reported."""
    if tuple(int(part) for part in comfyui_version.__version__.split(".")[:2]) < (0, 30):
        pytest.skip("the model is trained through the forward of ComfyUI 0.30")
    model, trainer, train = tiny("model"), tiny("trainer"), tiny("train")
    monkeypatch.setattr(model, "WEIGHTS", tmp_path)
    monkeypatch.setitem(model.TRANSFORMER_CONFIG, "num_layers", 2)
    monkeypatch.setattr(trainer, "CLIPS_PER_STEP", {32: {3: 2}, 64: {3: 1}})
    args = argparse.Namespace(
        out=tmp_path, seconds=1.0, save_every=1e9, resume=False, go_on=False, seed=0, rate=30.0, scale=1.0, no_compile=True, log_every=1000, steps=0
    )  # fmt: skip

    def run(part, steps, **changed):
        train.train(
            part, argparse.Namespace(**{**vars(args), "steps": steps, **changed}), tiny("workers").Workers()
        )
        return model

    return run


@pytest.mark.slow
def test_training_makes_every_part_and_goes_on_where_it_stopped(few, tiny, tmp_path):
    model = few("base", 20)
    once = model.read_weights("pessimist")[0]
    few("base", 10)
    first = torch.load(tmp_path / "base.state.pt", weights_only=True)
    model = few("base", 20, resume=True)
    second = torch.load(tmp_path / "base.state.pt", weights_only=True)
    assert (first["steps"], second["steps"]) == (10, 20)
    assert not torch.equal(first["parameters"][0], second["parameters"][0])
    assert once.keys() == model.read_weights("pessimist")[0].keys()
    # After so few steps it says nothing yet, from which nobody could learn.
    generator = torch.Generator().manual_seed(1)
    loud = {key: value + 0.05 * torch.randn(value.shape, generator=generator) for key, value in once.items()}
    tiny("train").save_weights(loud, model.file_of("base"))
    few("low_rates", 20)
    for part in ("student", "refiner"):
        few(part, 20)
        taught, base = (model.read_weights(name)[0] for name in (part, "teacher"))
        assert any(not torch.equal(taught[key], base[key]) for key in base)
        assert all(torch.equal(taught[key], base[key]) for key in base if "caption_projection" in key)
    assert sys.modules["tiny_ltx.lora"].RANK == 32
