"""What newer ComfyUI releases have and those on the Python registry lack, played by stand-ins."""

from __future__ import annotations

from types import SimpleNamespace

import comfy.nested_tensor
import pytest
import torch
from freezing import EVERY, SIGMAS
from recorder import play_recorder
from reference import SLOT, close, equal, freezing_model, masked_model, set_slot, visible
from tiny_models import FAMILIES, TEXT_TOKENS, build_model, conditioning, noise_like, sample

PLACES = ("gpu", "cpu")
GUIDED = {"keyframe_idxs": torch.zeros(1, 3, 6, 2)}


def mask_of(family, noise, last=1.0):
    """A noise mask whose last video frame is held to this share."""
    video = noise.unbind()[0] if noise.is_nested else noise
    mask = torch.ones(1, 1, video.shape[2], 1, 1)
    mask[:, :, -1] = last
    if not noise.is_nested:
        return mask
    return comfy.nested_tensor.NestedTensor((mask, torch.ones(1, 1, noise.unbind()[1].shape[2], 1)))


def recorded(model, ours, family, pack, monkeypatch, place="gpu", **given):
    with play_recorder(pack, monkeypatch, model, has_streams=place == "cpu") as recorder:
        result = sample(ours, family, sigmas=SIGMAS, **given)
    assert recorder.blocks
    return result, recorder.faults


@pytest.mark.parametrize("family", FAMILIES)
def test_the_recorder_finds_nothing_in_stock(family, pack, monkeypatch):
    model = build_model(family)
    assert recorded(model, model, family, pack, monkeypatch)[1] == []


@pytest.mark.parametrize("precision", ["default", "fp8_e4m3fn"])
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("forecast", ["hold", "linear"])
@pytest.mark.parametrize("scope", EVERY)
def test_nothing_that_is_kept_is_memory_of_a_block(
    scope, forecast, place, precision, frozen, record, pack, monkeypatch
):
    model = build_model("ltxav")
    ours = frozen(model, scope=scope, forecast=forecast, cache_device=place, cache_dtype=precision)
    expected = sample(ours, "ltxav", sigmas=SIGMAS)
    result, faults = recorded(model, ours, "ltxav", pack, monkeypatch, place)
    assert not faults and equal(result, expected) and record(ours)["taken"]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("scope", EVERY)
def test_nor_with_guides_and_every_other_node(
    scope, place, family, frozen, windowed, record, pack, monkeypatch
):
    model = build_model(family)
    guided = {
        "positive": conditioning(family, **GUIDED),
        "negative": conditioning(family, seed=7, **GUIDED),
    }
    guided["noise_mask"] = mask_of(family, noise_like(family), 0.5)
    blocks = 3 if scope == "spatial attention" else 0
    ours = windowed(frozen(model, scope=scope, cache_device=place), sink_frames=1, dense_blocks=blocks)
    expected = sample(ours, family, sigmas=SIGMAS, **guided)
    result, faults = recorded(model, ours, family, pack, monkeypatch, place, **guided)
    assert not faults and equal(result, expected)
    assert not equal(result, sample(model, family, sigmas=SIGMAS, **guided))


def doubled(q, k, v, heads, *args, **kwargs):
    """An attention that a checkpoint might name: nothing that another would compute."""
    import comfy.ldm.modules.attention as attention

    kwargs.pop("transformer_options", None)
    return 2 * attention.attention_sub_quad(q, k, v, heads, *args, **kwargs)


@pytest.mark.parametrize("dense_blocks", [0, 2])
def test_the_checkpoints_own_attention_is_the_backend(dense_blocks, windowed, last_run):
    """Where the window acts and where it declines; after ComfyAttention in comfy/ldm/modules/attention.py of 0.38."""
    calls = []

    def own(*args, **kwargs):
        calls.append(args[0].shape)
        return doubled(*args, **kwargs)

    model = build_model()
    slot = set_slot(model, lambda func, *args, **kwargs: doubled(*args, **kwargs))
    for block in model.model.diffusion_model.transformer_blocks:
        block.attn1.comfy_attention = SimpleNamespace(config=None, function=own)
    ours = windowed(model, dense_blocks=dense_blocks)
    result = sample(ours)
    assert calls and bool(last_run(ours)["taken"]) is (dense_blocks == 0)
    # Only video self-attention has one here: the same by a foreign override that looks at nothing else.
    only_self = set_slot(
        build_model(),
        lambda func, q, k, v, *args, **kwargs: (func if k.shape[1] == TEXT_TOKENS else doubled)(
            q, k, v, *args, **kwargs
        ),
    )
    expected = sample(windowed(only_self, dense_blocks=dense_blocks))
    assert equal(result, expected)
    assert not equal(result, sample(windowed(build_model(), dense_blocks=dense_blocks)))
    # Who fills the slot goes before the checkpoint, as in core.
    calls.clear()
    sample(windowed(slot, dense_blocks=dense_blocks))
    assert not calls and SLOT


def slots(family, first, count, noise=None, per_frame=6, **values):
    """What to sample with generated keyframes at the end of a latent, after nodes_lt_keyframes.py of 0.38."""
    grid = torch.zeros(1, 3, count * per_frame, 2)
    grid[:, 0, :, 1] = 1
    generated = {"first_latent_frame": first, "num_keyframes": count, "tokens_per_frame": per_frame}
    given = {"keyframe_idxs": grid, "generated_keyframes": generated, **values}
    noise = noise_like(family) if noise is None else noise
    return {
        "noise": noise,
        "noise_mask": mask_of(family, noise),
        "positive": conditioning(family, **given),
        "negative": conditioning(family, seed=7, **given),
    }


@pytest.mark.parametrize("family", FAMILIES)
def test_keyframe_slots_see_everything_and_are_seen_in_a_window(family, windowed, last_run):
    model = build_model(family)
    given = slots(family, 8, 1)
    ours = windowed(model)
    result = sample(ours, family, **given)
    reference = masked_model(model, visible(8, 6, 1, 0, guides=6))
    assert last_run(ours)["taken"] and close(result, sample(reference, family, **given))
    assert not close(result, sample(model, family, **given))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("scope", ["whole blocks", "per-frame work"])
def test_freeze_takes_keyframe_slots_along(family, scope, frozen, record):
    model = build_model(family)
    given = slots(family, 8, 1)
    ours = frozen(model, scope=scope, forecast="hold")
    reference = freezing_model(model, scope, (0, 3, 6, 7), False, SIGMAS.tolist())
    expected = sample(reference, family, sigmas=SIGMAS, **given)
    assert close(sample(ours, family, sigmas=SIGMAS, **given), expected, 1e-4) and record(ours)["taken"]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_stride_after_keyframe_slots_is_refused(family, pack):
    """A latent of 9 frames and 2 slots, thinned to 6."""
    node = pack("nodes").KeyframeStride
    model, noise = build_model(family), noise_like(family, (6, 2, 3))
    ours = node.execute(model, {"samples": torch.zeros(1, 128, 11, 2, 3)}, 2).args[0]
    with pytest.raises(ValueError, match="model: .*keyframes.*after Keyframe Stride"):
        sample(ours, family, **slots(family, 9, 2, noise))


@pytest.mark.parametrize("family", FAMILIES)
def test_keyframe_slots_after_a_stride_are_at_the_low_rate(family, pack):
    node = pack("nodes").KeyframeStride
    model, noise = build_model(family), noise_like(family, (6, 2, 3))
    ours = node.execute(model, {"samples": torch.zeros(1, 128, 9, 2, 3)}, 2).args[0]
    result = sample(ours, family, **slots(family, 5, 1, noise, frame_rate=24.0))
    assert equal(result, sample(model, family, **slots(family, 5, 1, noise, frame_rate=12.0)))
    assert not equal(result, sample(model, family, **slots(family, 5, 1, noise, frame_rate=24.0)))
