"""Where the window does not apply, stock runs, bit for bit, and the reason is counted and logged."""

from __future__ import annotations

import logging
import re

import comfy.ldm.modules.attention as attention
import comfy.model_base
import comfy.model_patcher
import comfy.supported_models
import pytest
import torch
from reference import equal
from tiny_models import build_model, conditioning, noise_like, sample


def replace_self_attention(patcher, make):
    """Put `make(module)` in the place of each attn1.forward, as other packs do."""
    clone = patcher.clone()
    for index, block in enumerate(patcher.model.diffusion_model.transformer_blocks):
        clone.add_object_patch(f"diffusion_model.transformer_blocks.{index}.attn1.forward", make(block.attn1))
    return clone


def projected(module, call):
    def forward(x, transformer_options, **kwargs):
        q, k, v = module.to_q(x), module.to_k(x), module.to_v(x)
        return module.to_out(call(q, k, v, module.heads, transformer_options))

    return forward


def extra_token(q, k, v, heads, options):
    k, v = (torch.cat([x, x[:, :1]], dim=1) for x in (k, v))
    return attention.optimized_attention(q, k, v, heads, transformer_options=options)


def halved_queries(q, k, v, heads, options):
    halves = q.split(q.shape[1] // 2, dim=1)
    parts = [attention.optimized_attention(half, k, v, heads, transformer_options=options) for half in halves]
    return torch.cat(parts, dim=1)


def split_heads(q, k, v, heads, options):
    q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2).contiguous() for x in (q, k, v))
    return attention.optimized_attention(q, k, v, heads, skip_reshape=True, transformer_options=options)


@pytest.mark.parametrize(
    ("call", "reason", "count"),
    [(extra_token, "TOKEN_COUNT", 9), (halved_queries, "UNCLEAR_QUERY", 18), (split_heads, "SPLIT_HEADS", 9)],
)
def test_self_attention_of_another_pack_that_we_cannot_read(call, reason, count, windowed, last_run, caplog):
    model = replace_self_attention(build_model(), lambda module: projected(module, call))
    ours = windowed(model)
    with caplog.at_level(logging.INFO):
        result = sample(ours)
    assert last_run(ours)["declined"] == {reason: count} and not last_run(ours)["taken"]
    assert equal(result, sample(model))
    assert any(f"no effect, declined: {reason} ×{count};" in r.getMessage() for r in caplog.records)


@pytest.mark.parametrize(
    ("settings", "declined", "taken"),
    [
        ({"window": 4}, {"WINDOW_COVERS_CLIP": 9}, 0),
        ({"window": 32, "sink_frames": 8}, {"WINDOW_COVERS_CLIP": 9}, 0),
        ({"dense_blocks": 16}, {"DENSE_BLOCK": 9}, 0),
        ({"start_percent": 0.5}, {"OUTSIDE_RANGE": 3}, 6),
    ],
)
def test_settings(settings, declined, taken, windowed, last_run):
    model = build_model()
    ours = windowed(model, **settings)
    result = sample(ours)
    assert last_run(ours)["declined"] == declined and last_run(ours)["taken"] == taken
    assert equal(result, sample(model)) is (not taken)


def test_guide_coordinates_that_fill_no_frame(windowed, last_run):
    values = {"keyframe_idxs": torch.zeros(1, 3, 4, 2)}
    conds = {"positive": conditioning(**values), "negative": conditioning(seed=7, **values)}
    mask = torch.ones(1, 1, 9, 1, 1)
    model = build_model()
    ours = windowed(model)
    try:
        expected = sample(model, noise_mask=mask, **conds)
    except ValueError as refused:
        # Newer releases refuse them by themselves, and do so with us.
        with pytest.raises(ValueError, match=re.escape(str(refused))):
            sample(ours, noise_mask=mask, **conds)
        return
    assert equal(sample(ours, noise_mask=mask, **conds), expected)
    assert last_run(ours)["declined"] == {"UNCLEAR_SHAPE": 9}


def test_a_single_frame_and_a_clip_as_long_as_the_window(windowed, last_run):
    model = build_model()
    for frames in (1, 3):
        noise = noise_like(shape=(frames, 2, 2))
        ours = windowed(model)
        assert equal(sample(ours, noise=noise), sample(model, noise=noise))
        assert last_run(ours)["declined"] == {"WINDOW_COVERS_CLIP": 9}


def test_unknown_model(windowed, last_run, caplog):
    config = {
        "image_size": 32, "in_channels": 4, "out_channels": 4, "model_channels": 32, "num_res_blocks": [1, 1],
        "channel_mult": [1, 2], "transformer_depth": [1, 1], "transformer_depth_output": [1, 1, 1, 1],
        "transformer_depth_middle": 1, "num_heads": 2, "context_dim": 16, "use_spatial_transformer": True,
        "use_linear_in_transformer": False, "legacy": False, "adm_in_channels": None,
        "use_temporal_attention": False, "dtype": torch.float32,
    }  # fmt: skip
    cpu = torch.device("cpu")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        inner = comfy.model_base.BaseModel(comfy.supported_models.SD15(config), device=cpu)
        for parameter in inner.parameters():
            torch.nn.init.normal_(parameter, std=0.05)
    model = comfy.model_patcher.ModelPatcher(inner, load_device=cpu, offload_device=cpu)
    cond = [[torch.randn(1, 4, 16), {"pooled_output": None}]]
    noise = torch.randn(1, 4, 8, 8)
    ours = windowed(model)
    with caplog.at_level(logging.INFO):
        result = sample(ours, noise=noise, positive=cond, negative=cond, cfg=1.0)
    assert equal(result, sample(model, noise=noise, positive=cond, negative=cond, cfg=1.0))
    assert last_run(ours)["declined"] == {"UNKNOWN_MODEL": 3}
    assert any("UNKNOWN_MODEL ×3" in r.getMessage() and r.levelname == "WARNING" for r in caplog.records)
