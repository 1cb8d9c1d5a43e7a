"""What the LTX layout reads off real forwards: roles by module, frames, guides, dropped tokens, query slices."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from tiny_models import FAMILIES, build_model


@pytest.fixture
def read(pack):
    return pack("patches.layouts").read_layout


def video(*grid):
    return torch.zeros(1, 128, *grid)


def model(family="ltxv"):
    return build_model(family, blocks=2).model.diffusion_model


@pytest.mark.parametrize("family", FAMILIES)
def test_sites_come_from_modules(family, read, pack):
    Role = pack("patches.layouts.layout").Role
    diffusion_model = model(family)
    sites = {id(module): site for module, site in read(diffusion_model, video(3, 2, 2), {}, {}).sites()}
    for index, block in enumerate(diffusion_model.transformer_blocks):
        site = sites[id(block.attn1)]
        assert (site.role, site.block, site.blocks) == (Role.VIDEO_SELF, index, 2)
        assert sites[id(block.attn2)].role is Role.VIDEO_TEXT
        if family == "ltxav":
            assert sites[id(block.audio_attn1)].role is Role.AUDIO_SELF
            assert sites[id(block.audio_attn2)].role is Role.AUDIO_TEXT
            assert sites[id(block.audio_to_video_attn)].role is Role.VIDEO_AUDIO
            assert sites[id(block.video_to_audio_attn)].role is Role.AUDIO_VIDEO
    assert len(sites) == 2 * (2 if family == "ltxv" else 6)


def test_subclasses_and_compiled_modules_are_known_and_others_are_not(read, pack):
    class Sub(type(model())):
        pass

    known = model()
    known.__class__ = Sub
    for candidate in (known, SimpleNamespace(_orig_mod=known)):
        assert read(candidate, video(3, 2, 2), {}, {}).video_tokens().frames == 3
    unclear = read(torch.nn.Linear(1, 1), video(3, 2, 2), {}, {})
    assert unclear == pack("patches.layouts.layout").Unclear("UNKNOWN_MODEL")


def test_frames_a_latent_are_what_the_model_says(pack):
    frames_a_latent, known = pack("patches.layouts").frames_a_latent, model()
    assert frames_a_latent(known) == frames_a_latent(model("ltxav")) == 8
    known.vae_scale_factors = (4, 32, 32)
    assert frames_a_latent(known) == frames_a_latent(SimpleNamespace(_orig_mod=known)) == 4
    assert frames_a_latent(torch.nn.Linear(1, 1)) is frames_a_latent(None) is None


def test_frames_of_plain_and_packed_latents(read):
    assert read(model(), video(3, 5, 7), {}, {}).video_tokens().offsets == (0, 35, 70, 105)
    shapes = [torch.Size((1, 128, 4, 2, 3)), torch.Size((1, 8, 24, 16))]
    packed = torch.zeros(1, 1, 128 * 24 + 8 * 24 * 16)
    tokens = read(model("ltxav"), packed, {}, {"latent_shapes": shapes}).video_tokens()
    assert tokens.offsets == (0, 6, 12, 18, 24) and tokens.guides == 0


def test_unclear_shapes(read):
    shapes = [torch.Size((1, 128, 4, 2, 3)), torch.Size((1, 8, 24, 16))]
    for x, conds in [
        (torch.zeros(1, 1, 17), {"latent_shapes": shapes}),
        (torch.zeros(1, 1, 17), {}),
        (video(3, 2, 2), {"keyframe_idxs": torch.zeros(1, 3, 5, 2)}),
        (video(3, 2, 2), {"keyframe_idxs": torch.zeros(1, 3, 12, 2)}),
        (
            video(3, 2, 2),
            {"keyframe_idxs": torch.zeros(1, 3, 4, 2), "denoise_mask": torch.ones(1, 1, 3, 1, 1)},
        ),
    ]:
        assert read(model(), x, {}, conds).video_tokens().reason == "UNCLEAR_SHAPE"


def test_guides_and_dropped_tokens(read):
    conds = {"keyframe_idxs": torch.zeros(1, 3, 4, 2), "denoise_mask": torch.ones(1, 1, 4, 2, 2)}
    tokens = read(model(), video(4, 2, 2), {}, conds).video_tokens()
    assert tokens.offsets == (0, 4, 8, 12) and tokens.guides == 4
    conds["denoise_mask"][0, 0, 3, 0, 0] = -1
    conds["denoise_mask"][0, 0, 1, 1, :] = -1
    tokens = read(model(), video(4, 2, 2), {}, conds).video_tokens()
    assert tokens.offsets == (0, 4, 6, 10) and tokens.guides == 3


def test_anchor_of_a_context_window(read):
    for anchor, expected in [(None, 0), (-1, 0), (0, 1), (5, 1)]:
        options = {"context_window": SimpleNamespace(causal_anchor_index=anchor)}
        assert read(model(), video(4, 2, 2), options, {}).video_tokens().anchors == expected
    assert (
        read(model(), video(4, 2, 2), {"context_window": SimpleNamespace()}, {}).video_tokens().anchors == 0
    )


def test_query_slices_are_known_by_their_mask(read):
    layout = read(model(), video(4, 2, 2), {}, {"keyframe_idxs": torch.zeros(1, 3, 8, 2)})
    tokens = layout.video_tokens()
    assert (tokens.offsets[-1], tokens.total) == (8, 16)
    whole = SimpleNamespace(
        guide_start=8,
        tracked_count=5,
        noisy_mask=torch.zeros(1, 1, 1, 16),
        tracked_mask=torch.zeros(1, 1, 5, 16),
    )

    def rows(count, mask):
        return layout.query_rows(torch.zeros(1, count, 4), mask, whole, tokens)

    assert rows(16, None) == range(16)
    assert rows(8, whole.noisy_mask) == range(8)
    assert rows(5, whole.tracked_mask) == range(8, 13)
    assert rows(3, None) == range(13, 16)
    # The same numbers of rows without the mask that says so are not guessed at.
    for count, mask in [(8, None), (8, whole.noisy_mask.clone()), (5, None), (7, None)]:
        assert rows(count, mask).reason == "UNCLEAR_QUERY"


@pytest.mark.parametrize(
    ("told", "lacking"), [("has_other_streams", "given_video, returned_video"), ("cut", "put_back")]
)
def test_a_family_that_tells_half_is_refused_before_any_run(told, lacking, pack):
    with pytest.raises(TypeError, match=f"tells {told} tells {lacking}"):
        type("Half", (pack("patches.layouts.layout").Layout,), {told: lambda self, *_: False})
