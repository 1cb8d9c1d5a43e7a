"""Both nodes of a strided clip where a latent frame holds four video frames: by the MODEL, the VAE, or the note."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from regroups import Regroups
from tiny_models import build_model


def rising(frames, step=1):
    """[F, 4, 5, 3]: as grey as the time is late."""
    return (torch.arange(0, frames, step) / 64).view(-1, 1, 1, 1).expand(-1, 4, 5, 3)


@pytest.fixture
def model():
    """Latent frames of four by its own word."""
    model = build_model()
    model.model.diffusion_model.vae_scale_factors = (4, 32, 32)
    return model


def test_a_clip_goes_and_comes_back(model, stride, interpolate):
    vae = Regroups(4)
    latent = {"samples": vae.encode(rising(33))}
    assert latent["samples"].shape[2] == 9
    strided = stride(model, latent, 2, vae=vae).args[1]
    assert torch.equal(vae.decode(strided["samples"])[0], rising(33, 2))
    full, frames = interpolate(strided, "linear", vae=vae).args
    assert torch.allclose(frames, rising(33), atol=1e-6)
    assert torch.allclose(full["samples"], latent["samples"], atol=1e-6)


def test_latents_alone_come_back_at_the_times_of_the_note(model, stride, interpolate):
    strided = stride(model, {"samples": torch.zeros(1, 128, 9, 2, 3)}, 2).args[1]
    # The middles of 0, 1 to 4, 5 to 8 ... when each lasts twice as long.
    middles = torch.tensor([0.0, 5.0, 13.0, 21.0, 29.0])
    strided["samples"] = middles.view(1, 1, 5, 1, 1).expand(1, 128, 5, 2, 3) / 64
    out = interpolate(strided, "linear").args[0]["samples"][0, 0, :, 0, 0] * 64
    assert out.tolist() == pytest.approx([0, 2.5, 6.5, 10.5, 14.5, 18.5, 22.5, 26.5, 29], abs=1e-4)


def test_without_a_note_the_vae_tells(interpolate):
    vae = Regroups(4)
    strided = {"samples": vae.encode(rising(33, 2))}
    frames = interpolate(strided, "linear", vae=vae, length=33).args[1]
    assert torch.allclose(frames, rising(33), atol=1e-6)
    assert len(interpolate(strided, "linear", vae=vae, stride=1).args[1]) == 17


def test_where_the_model_does_not_tell_the_vae_does(model, stride, pack, monkeypatch):
    ltx = pack("patches.layouts.ltx")
    silent = SimpleNamespace(read=ltx.read, stream_of=ltx.stream_of)
    monkeypatch.setattr(pack("patches.layouts"), "FAMILIES", (silent,))
    vae = Regroups(4)
    strided = stride(model, {"samples": vae.encode(rising(33))}, 2, vae=vae).args[1]
    assert torch.equal(vae.decode(strided["samples"])[0], rising(33, 2))
    assert strided[pack("latents.stride").NOTE]["frames_a_latent"] == 4


def test_a_vae_that_fits_neither_model_nor_note_is_refused(model, stride, interpolate):
    words = "^vae: expected .*latent frame of 4 video frames, got 128 channels and 8 video frames"
    with pytest.raises(ValueError, match=words):
        stride(model, {"samples": torch.ones(1, 128, 9, 2, 3)}, 2, vae=Regroups(8))
    strided = stride(model, {"samples": torch.zeros(1, 128, 9, 2, 3)}, 2).args[1]
    with pytest.raises(ValueError, match=words):
        interpolate(strided, "linear", vae=Regroups(8))
    strided.pop("frame_thrift_stride")
    images = Regroups(None)
    words = "^vae: expected .*latent frame of 8 video frames, got 128 channels and no video frames"
    with pytest.raises(ValueError, match=words):
        interpolate(strided, "linear", vae=images, stride=2)


def test_a_vae_of_other_frames_than_it_says_is_refused(interpolate):
    vae = Regroups(4)
    vae.temporal_compression_decode = lambda: 2
    with pytest.raises(ValueError, match="^vae: expected 9 video frames from 5 latent frames, got 17"):
        interpolate({"samples": torch.zeros(1, 128, 5, 4, 5)}, "linear", vae=vae, stride=2)
