"""FLOPs by `Work`, without a tensor, against PyTorch's counter around one real forward."""

from __future__ import annotations

from types import SimpleNamespace

import comfy.nested_tensor
import pytest
import torch
from pooling import groups_seen
from tiny_models import FORMS, TEXT_TOKENS, build_model, conditioning, noise_like, sample
from torch.utils.flop_counter import FlopCounterMode

FRAMES, PER_FRAME, AUDIO = 9, 6, 11
SIGMAS = torch.linspace(1, 0, 5)
FLASH = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu


def flops_of_flash(q, k, *_, **__):
    """The counter has no formula of its own for attention with LSE on the CPU."""
    batch, heads, rows, width = q
    return 4 * batch * heads * rows * k[2] * width


def counted(patcher, family, has_audio, **given):
    """FLOPs of the second of four forwards: the one that reuses what the first has left."""
    clone, totals = patcher.clone(), []

    def count(executor, *args, **kwargs):
        if len(totals) != 1:
            totals.append(0)
            return executor(*args, **kwargs)
        with FlopCounterMode(display=False, custom_mapping={FLASH: flops_of_flash}) as counter:
            out = executor(*args, **kwargs)
        totals.append(counter.get_total_flops())
        return out

    clone.add_wrapper_with_key("apply_model", "counter", count)
    sample(clone, family, noise=noise(has_audio), sigmas=SIGMAS, cfg=1.0, **given)
    assert len(totals) == 4
    return totals[1]


def noise(has_audio):
    """Audio of another length than the video and the text, so that none stands in for another."""
    video = noise_like("ltxv", (FRAMES, 2, 3))
    if not has_audio:
        return video
    return comfy.nested_tensor.NestedTensor((video, torch.randn(1, 8, AUDIO, 16)))


@pytest.fixture
def agree(pack):
    """Checks that `flops` of one block equals what one block more adds to the counter."""
    layouts, Work = pack("patches.layouts"), pack("patches.layouts.work").Work
    VideoTokens = pack("patches.kernels.tokens").VideoTokens

    def check(
        family, patch=lambda model: model, change=lambda work, block: work, guides=0, has_audio=True, **given
    ):
        has_audio = has_audio and family != "ltxv"
        tokens = VideoTokens.grid(FRAMES - guides, 2, 3, guides=guides * PER_FRAME)
        by_counter, by_work = [], []
        for blocks in (2, 3):
            model = build_model(family, blocks=blocks)
            work = Work(tokens, blocks, TEXT_TOKENS, AUDIO if has_audio else 0)
            for block in range(blocks):
                work = change(work, block)
            by_counter.append(counted(patch(model), family, has_audio, **given))
            by_work.append(layouts.flops(model.model.diffusion_model, work))
        assert by_work[1] - by_work[0] == by_counter[1] - by_counter[0]
        assert by_work[1] * 2 == by_work[0] * 3
        return by_work[1]

    return check


@pytest.fixture
def windowed(pack):
    settings = {"window": 1, "start_percent": 0.0, "end_percent": 1.0}
    node = pack("nodes").ApplyTemporalWindow

    def patched(model, sinks, dense_blocks=0):
        return node.execute(model, sink_frames=sinks, dense_blocks=dense_blocks, **settings).args[0]

    return patched


@pytest.fixture
def frozen(pack):
    settings = {"start_percent": 0.0, "end_percent": 1.0, "refresh_every": 2}
    node = pack("nodes").ScheduleSpatialFreeze
    return lambda model, scope: node.execute(model, scope=scope, **settings).args[0]


@pytest.mark.parametrize("family", FORMS)
def test_dense(family, agree):
    assert agree(family) > 0


def seen_from(frame, window, sinks, frames=FRAMES):
    low = min(max(frame - window, 0), frames - 2 * window - 1)
    return sorted({*range(low, low + 2 * window + 1), *range(sinks)})


@pytest.fixture
def self_attention(pack):
    """Changes a work so that every frame of every block sees the frames `seen[frame]` and the guides, and these all."""
    kernel = pack("patches.kernels.segments")
    role = pack("patches.layouts.role").Role.VIDEO_SELF

    def tokens(frame):
        return frame * PER_FRAME, (frame + 1) * PER_FRAME

    def changed(seen):
        clip, total = len(seen), FRAMES * PER_FRAME
        guides = [tokens(frame) for frame in range(clip, FRAMES)]
        parts = [kernel.Segment(*tokens(t), (*map(tokens, seen[t]), *guides)) for t in range(clip)]
        parts += [kernel.Segment(*guide, ((0, total),)) for guide in guides]
        segments = kernel.Segments(tuple(parts), total)
        return lambda work, block: work.with_segments(role, block, segments)

    return changed


@pytest.mark.parametrize("family", FORMS)
@pytest.mark.parametrize("sinks", [0, 1])
def test_window(family, sinks, agree, windowed, self_attention):
    see = self_attention([seen_from(t, 1, sinks) for t in range(FRAMES)])
    ours = agree(family, lambda model: windowed(model, sinks), see)
    assert ours < agree(family)


def test_a_window_in_one_block_of_three(pack, windowed, self_attention):
    layouts, Work = pack("patches.layouts"), pack("patches.layouts.work").Work
    model = build_model("ltxav")
    dense = Work(pack("patches.kernels.tokens").VideoTokens.grid(FRAMES, 2, 3), 3, TEXT_TOKENS, AUDIO)
    narrow = self_attention([seen_from(t, 1, 1) for t in range(FRAMES)])(dense, 1)
    by_counter = [counted(patcher, "ltxav", True) for patcher in (model, windowed(model, 1, dense_blocks=1))]
    by_work = [layouts.flops(model.model.diffusion_model, work) for work in (dense, narrow)]
    assert by_work[0] - by_work[1] == by_counter[0] - by_counter[1] > 0


def test_window_with_guides(agree, windowed, self_attention):
    values = {"keyframe_idxs": torch.zeros(1, 3, PER_FRAME, 2)}
    see = self_attention([seen_from(t, 1, 1, FRAMES - 1) for t in range(FRAMES - 1)])
    given = {
        "guides": 1,
        "positive": conditioning(**values),
        "negative": conditioning(seed=7, **values),
        "noise_mask": torch.ones(1, 1, FRAMES, 1, 1),
    }
    ours = agree("ltxv", lambda model: windowed(model, 1), see, **given)
    assert ours < agree("ltxv", **given)


@pytest.mark.parametrize("family", FORMS)
@pytest.mark.parametrize("spatial", [1, 2])
def test_pooled_far_frames(family, spatial, agree, pack):
    role = pack("patches.layouts.role").Role.VIDEO_SELF
    node, low_rank = pack("nodes").ThriftLowRankAttention, pack("patches.techniques.low_rank")
    given = {"near_frames": 1, "spatial_pool": spatial, "dense_blocks": 0}
    tokens = pack("patches.kernels.tokens").VideoTokens.grid(FRAMES, 2, 3)
    seen = [groups_seen(token // PER_FRAME, FRAMES, 2, 3, 1, 1, 2, spatial) for token in range(tokens.total)]
    pairs = sum(map(len, seen))
    ours = agree(
        family,
        lambda model: node.execute(model, start_percent=0.0, **given).args[0],
        lambda work, block: work.with_pairs(role, block, pairs),
    )
    assert ours < agree(family)
    work = low_rank.LowRankAttention(**given).cost(pack("patches.layouts.work").Work(tokens, 2, TEXT_TOKENS))
    assert [work.pairs_of(role, block, tokens.total, tokens.total) for block in (0, 1)] == [pairs] * 2


@pytest.mark.parametrize("family", FORMS)
@pytest.mark.parametrize(("scope", "part"), [("whole blocks", "video"), ("per-frame work", "per-frame work")])
def test_freeze(family, scope, part, agree, frozen):
    ours = agree(family, lambda model: frozen(model, scope), lambda work, block: work.without(block, part))
    assert ours < agree(family) and (ours == 0) == (scope == "whole blocks" and family == "ltxv")


@pytest.mark.parametrize("family", FORMS)
def test_freeze_of_the_share_within_a_frame(family, agree, frozen, self_attention):
    see = self_attention([sorted({*range(FRAMES)} - {t}) for t in range(FRAMES)])
    ours = agree(family, lambda model: frozen(model, "spatial attention"), see)
    assert ours < agree(family)


def test_freeze_under_the_window(agree, windowed, frozen, self_attention):
    see = self_attention([seen_from(t, 1, 1) for t in range(FRAMES)])

    def change(work, block):
        return see(work.without(block, "per-frame work"), block)

    ours = agree("ltxv", lambda model: windowed(frozen(model, "per-frame work"), 1), change)
    assert ours < agree("ltxv", lambda model: windowed(model, 1), see)


@pytest.mark.parametrize("family", FORMS[1:])
def test_video_alone_in_a_model_that_has_sound(family, agree):
    assert agree(family, has_audio=False) < agree(family)


def test_compiled_models_are_known_and_others_are_not(pack):
    layouts, Work = pack("patches.layouts"), pack("patches.layouts.work").Work
    work = Work(pack("patches.kernels.tokens").VideoTokens.grid(2, 2, 3), 1, TEXT_TOKENS)
    model = build_model(blocks=1).model.diffusion_model
    unknown = pack("patches.layouts.layout").Unclear("UNKNOWN_MODEL")
    assert layouts.flops(SimpleNamespace(_orig_mod=model), work) == layouts.flops(model, work) > 0
    assert [layouts.flops(other, work) for other in (torch.nn.Linear(1, 1), None)] == [unknown] * 2
