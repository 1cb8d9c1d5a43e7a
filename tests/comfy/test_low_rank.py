"""ThriftLowRankAttention on real models, ModelPatchers and samplers: `pooled` against its definition."""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace

import comfy.context_windows
import pytest
import tiny_models
import torch
from guiding import Perturbing
from guiding import run as run_guider
from pooling import groups_seen, pooled_model
from recorder import play_recorder
from reference import SLOT, close, equal, set_slot
from tiny_models import CUT, FORMS, TEXT_TOKENS, build_model, context_windows, guides, noise_like, sample

GRIDS = [(9, 2, 3), (7, 3, 5)]


@pytest.fixture(scope="module")
def coarse(pack):
    """`coarse(model, near_frames=1, ...)`: the model as the node returns it."""
    node = pack("nodes").ThriftLowRankAttention
    defaults = {"near_frames": 1, "dense_blocks": 0, "start_percent": 0.0}
    return lambda model, **settings: node.execute(model, **{**defaults, **settings}).args[0]


@pytest.fixture(scope="module")
def entry(pack):
    journal_of = pack("patches.mount").journal_of
    return lambda model: journal_of(model).records()[-1]["techniques"]["low-rank attention"]


def by_definition(grid, near=1, sinks=1, pool=2, spatial=1, guide_tokens=0, window=None):
    """What each token sees."""
    frames, height, width = grid

    def seen(token):
        frame, sees = token // (height * width), None
        if frame >= frames:
            frame = None
        elif window is not None:
            low = min(max(frame - window[0], 0), frames - 2 * window[0] - 1)
            sees = {*range(low, low + 2 * window[0] + 1), *range(window[1])}
        return groups_seen(frame, *grid, near, sinks, pool, spatial, guide_tokens, 0, sees)

    return seen


@pytest.mark.parametrize("family", FORMS)
@pytest.mark.parametrize("cfg", [1.0, 2.0])
def test_near_frames_over_the_clip_are_stock_bit_for_bit(family, cfg, coarse, entry):
    model = build_model(family)
    wide = coarse(model, near_frames=8)
    assert equal(sample(wide, family, cfg=cfg), sample(model, family, cfg=cfg))
    assert set(entry(wide)["declined"]) == {"NOTHING_FAR"}
    assert coarse(model, pool=1) is model


@pytest.mark.parametrize("family", FORMS)
@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize(
    "settings",
    [
        {"near_frames": 1, "sink_frames": 1, "pool": 2, "spatial_pool": 1},
        {"near_frames": 0, "sink_frames": 0, "pool": 4, "spatial_pool": 2},
        {"near_frames": 1, "sink_frames": 2, "pool": 1, "spatial_pool": 3},
    ],
)
@pytest.mark.parametrize("batch", [1, 2])
def test_equals_the_definition(family, grid, settings, batch, coarse, entry):
    model, noise = build_model(family), noise_like(family, grid, batch)
    ours = coarse(model, **settings)
    result = sample(ours, family, noise=noise)
    reference = pooled_model(model, by_definition(grid, **renamed(settings)))
    assert close(result, sample(reference, family, noise=noise))
    assert not close(result, sample(model, family, noise=noise)), "it has no effect"
    assert entry(ours)["taken"] == 3 * 3 and not entry(ours)["declined"]


def renamed(settings):
    names = {"near_frames": "near", "sink_frames": "sinks", "pool": "pool", "spatial_pool": "spatial"}
    return {names[name]: value for name, value in settings.items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("head_width", [64, 128])
def test_types_and_head_widths(dtype, head_width, coarse, entry):
    model = build_model(dtype=dtype, head_width=head_width)
    ours = coarse(model)
    tolerance = 1e-3 if dtype == torch.float32 else 0.1
    assert close(sample(ours), sample(pooled_model(model, by_definition(GRIDS[0]))), tolerance)
    assert entry(ours)["taken"]


@pytest.mark.parametrize("family", FORMS)
def test_masked_where_there_is_no_lse(family, pack, coarse, entry, monkeypatch):
    model = build_model(family)
    merged = sample(coarse(model, spatial_pool=2), family)
    monkeypatch.setattr(pack("patches.attention"), "has_lse", lambda *_: False)
    ours = coarse(model, spatial_pool=2)
    masked = sample(ours, family)
    assert close(masked, merged) and not equal(masked, merged) and entry(ours)["taken"] == 9


def test_an_attention_not_known_to_take_masks_is_not_given_any(pack, coarse, entry, monkeypatch):
    """Where there is no LSE: builds of sage attention drop them without a word."""
    import comfy.ldm.modules.attention as attention

    model = build_model()
    monkeypatch.setattr(pack("patches.techniques.low_rank"), "has_lse", lambda *_: False)
    monkeypatch.setattr(pack("patches.attention"), "has_lse", lambda *_: False)

    def attention_sage(q, k, v, heads, mask=None, *args, **kwargs):
        return attention.attention_sub_quad(q, k, v, heads, mask, *args, **kwargs)

    for name in ("optimized_attention", "optimized_attention_masked"):
        monkeypatch.setattr(attention, name, attention_sage)
    ours = coarse(model)
    assert equal(sample(ours), sample(model)) and entry(ours)["declined"] == {"NO_LSE": 9}


@pytest.mark.parametrize("family", FORMS)
def test_with_the_window_in_either_order(family, coarse, windowed, entry, last_run):
    """The window says which frames are seen, this how the far ones among them are."""
    model = build_model(family)
    first, second = (windowed(coarse(model), window=3), coarse(windowed(model, window=3)))
    result = sample(first, family)
    assert equal(result, sample(second, family))
    assert close(result, sample(pooled_model(model, by_definition(GRIDS[0], window=(3, 0))), family))
    assert not close(result, sample(windowed(model, window=3), family))
    assert not close(result, sample(coarse(model), family))
    assert entry(first)["taken"] == last_run(first)["taken"] == 9


def test_range_and_dense_blocks(coarse, entry):
    model = build_model(blocks=4)
    low = model.get_model_object("model_sampling").percent_to_sigma(0.5)
    ours = coarse(model, dense_blocks=1, end_percent=0.5)
    reference = pooled_model(
        model, by_definition(GRIDS[0]), lambda sigma, block: sigma >= low * (1 - 1e-5) and block in (1, 2)
    )
    assert close(sample(ours, steps=4), sample(reference, steps=4))
    steps = len(entry(ours)["steps"])
    assert entry(ours)["taken"] == 2 * steps and 0 < steps < 4
    assert entry(ours)["declined"] == {"DENSE_BLOCK": 2 * steps, "OUTSIDE_RANGE": 4 * (4 - steps)}


def test_guides_see_all_and_are_seen_by_all(coarse, entry):
    model = build_model()
    noise, mask, conds = guides()
    ours = coarse(model)
    result = sample(ours, noise=noise, noise_mask=mask, **conds)
    reference = pooled_model(model, by_definition(GRIDS[0], guide_tokens=6))
    assert close(result, sample(reference, noise=noise, noise_mask=mask, **conds))
    assert entry(ours)["taken"] == 9 and not entry(ours)["declined"]


def test_guide_strengths_come_with_masks(coarse, entry):
    """Where the release knows of strengths: older ones compute every guide at full strength."""
    model = build_model()
    noise, mask, conds = guides(strength=0.4)
    ours = coarse(model)
    result = sample(ours, noise=noise, noise_mask=mask, **conds)
    has_masks = hasattr(tiny_models.comfy.ldm.lightricks.model, "GuideAttentionMask")
    assert equal(result, sample(model, noise=noise, noise_mask=mask, **conds)) is has_masks
    assert entry(ours)["declined"] == ({"MASKED": 9, "GUIDE_QUERIES": 9} if has_masks else {})


def test_dropped_tokens(coarse, entry):
    """Where guide tokens are dropped frames are whole; where tokens of frames are, nothing is pooled."""
    model = build_model()
    noise, _, conds = guides()
    mask = torch.ones(1, 1, 10, 2, 3)
    mask[:, :, -1] = 0.0
    mask[:, :, -1, 0, :2] = -1.0
    ours = coarse(model)
    result = sample(ours, noise=noise, noise_mask=mask, **conds)
    reference = pooled_model(model, by_definition(GRIDS[0], guide_tokens=4))
    assert close(result, sample(reference, noise=noise, noise_mask=mask, **conds))
    assert entry(ours)["taken"] == 9
    mask[:, :, 3, 0, 0] = -1.0
    assert equal(
        sample(ours, noise=noise, noise_mask=mask, **conds),
        sample(model, noise=noise, noise_mask=mask, **conds),
    )
    assert entry(ours)["declined"] == {"DROPPED_TOKENS": 9}


@pytest.mark.parametrize("family", CUT)
def test_context_windows(family, coarse, entry):
    """Newer releases put a frame from before the window in front of it; it then sees and is seen by all."""
    model, noise = build_model(family), noise_like(family, (15, 2, 2))
    ours = coarse(context_windows(model))
    result = sample(ours, family, noise=noise)
    assert entry(ours)["taken"] == 3 * 3 * 3 and not entry(ours)["declined"]
    anchored, met = context_windows(model), []

    def seen(token):
        return groups_seen(token // 4, 7, 2, 2, 1, 1, 2, 1)

    def seen_behind_anchor(token):
        return groups_seen(token // 4 - 1 if token >= 4 else None, 8, 2, 2, 1, 1, 2, 1, 0, 1)

    references = {
        length: pooled_model(model, see).model_options["transformer_options"][SLOT]
        for length, see in ((28, seen), (32, seen_behind_anchor))
    }

    def override(func, q, k, v, heads, *args, **kwargs):
        met.append(q.shape[1])
        return references.get(q.shape[1], references[28])(func, q, k, v, heads, *args, **kwargs)

    reference = set_slot(pooled_model(anchored, seen), override)
    assert close(result, sample(reference, family, noise=noise))
    if hasattr(comfy.context_windows.IndexListContextHandler, "_get_guide_entries"):
        assert 32 in met, "this release anchors its windows; the test must have met one"


def test_a_foreign_override_is_not_told_of_pooled_keys(coarse, entry):
    """Until one is shown to take masks, it computes what it computed before."""
    model, seen = build_model(), []

    def foreign(func, q, k, v, heads, *args, **kwargs):
        seen.append(k.shape[1])
        return 2 * func(q, k, v, heads, *args, **kwargs)

    ours = coarse(set_slot(model, foreign))
    assert equal(sample(ours), sample(set_slot(model, foreign)))
    assert entry(ours)["declined"] == {"FOREIGN_OVERRIDE": 9} and set(seen) == {54, TEXT_TOKENS}


def test_nor_is_the_checkpoints_own_attention(coarse, entry):
    """After ComfyAttention in comfy/ldm/modules/attention.py of 0.38."""
    model, calls = build_model(), []

    def own(q, k, v, heads, *args, **kwargs):
        calls.append(k.shape[1])
        import comfy.ldm.modules.attention as attention

        kwargs.pop("transformer_options", None)
        return attention.attention_sub_quad(q, k, v, heads, *args, **kwargs)

    for block in model.model.diffusion_model.transformer_blocks:
        block.attn1.comfy_attention = SimpleNamespace(config=None, function=own)
    ours = coarse(model)
    sample(ours)
    assert entry(ours)["declined"] == {"CHECKPOINT_ATTENTION": 9} and calls == [54] * 9


@pytest.mark.parametrize("family", ["ltxv", "ltxav"])
def test_a_block_whose_attention_is_exchanged_is_left_alone(family, coarse, entry):
    """Guiders count calls there."""
    model = build_model(family)
    stock, ours = Perturbing(model), Perturbing(coarse(model))
    expected, result = run_guider(stock, family), run_guider(ours, family)
    assert ours.seen == stock.seen and not equal(result, expected)
    own = entry(ours.model_patcher)
    assert own["taken"] and set(own["declined"]) <= {"ATTENTION_EXCHANGED"}


@pytest.mark.parametrize("family", FORMS)
def test_the_recorder_finds_nothing(family, coarse, entry, pack, monkeypatch):
    model = build_model(family)
    ours = coarse(model, spatial_pool=2)
    expected = sample(ours, family)
    with play_recorder(pack, monkeypatch, model, has_streams=False) as recorder:
        result = sample(ours, family)
    assert recorder.blocks and not recorder.faults and equal(result, expected) and entry(ours)["taken"] == 9


@pytest.mark.parametrize("scope", ["whole blocks", "per-frame work", "spatial attention"])
def test_with_frozen_steps_in_either_order(scope, coarse, frozen, entry):
    """The softmax share of a frame is frozen only where every key is seen as it is."""
    model = build_model()
    freeze = partial(frozen, scope=scope, refresh_every=2)
    first, second = freeze(coarse(model)), coarse(freeze(model))
    result = sample(first, steps=8)
    assert equal(result, sample(second, steps=8)) and entry(first)["taken"]
    assert equal(result, sample(coarse(model), steps=8)) is (scope == "spatial attention")
    assert not equal(result, sample(freeze(model), steps=8))


def test_settings_outside_their_range_are_named(coarse):
    model = build_model()
    for name, value in (("pool", 9), ("spatial_pool", 0), ("near_frames", -1), ("keep", 1.5), ("far", "x")):
        with pytest.raises(ValueError, match=name):
            coarse(model, **{name: value})


def test_routed_without_its_kernel_is_stock(coarse, entry, caplog):
    """The product never runs the slow form of it: on a CPU it declines, whatever is installed."""
    model = build_model()
    ours = coarse(model, far="routed")
    with caplog.at_level("WARNING"):
        result = sample(ours)
    assert equal(result, sample(model)) and entry(ours)["declined"] == {"NO_KERNEL": 9}
    assert "NO_KERNEL ×9" in caplog.text and "needs comfy-kitchen 0.2.40" in caplog.text
    assert coarse(model, far="routed", keep=1.0) is model


@pytest.fixture
def routed(pack, coarse, monkeypatch):
    """`routed(model, ...)` where the kernel is played by its reference, in blocks of 8."""
    kernel, technique = pack("patches.kernels.routed"), pack("patches.techniques.low_rank")
    monkeypatch.setattr(technique, "attend_routed", kernel.attend_reference)
    monkeypatch.setattr(technique, "why_not", lambda *_: None)
    monkeypatch.setattr(technique, "pack_tokens", partial(kernel.pack_tokens, block=8))
    return partial(coarse, far="routed", keep=0.1, sink_frames=0)


def routing_model(pack, model, tokens, keep):
    """A clone whose video self-attention is the reference, called by hand."""
    kernel = pack("patches.kernels.routed")
    packing = kernel.pack_tokens(tokens, *tokens.size, 0, 8)

    def override(func, q, k, v, heads, *args, **kwargs):
        if k.shape[1] != tokens.total or "reference_block" not in kwargs["transformer_options"]:
            return func(q, k, v, heads, *args, **kwargs)
        return kernel.attend_reference(q, k, v, heads, None, packing, keep, 1.0)

    return set_slot(pooled_model(model, by_definition(GRIDS[0])), override)


@pytest.mark.parametrize("family", FORMS)
def test_routed_by_its_reference(family, pack, routed, entry):
    model = build_model(family)
    ours = routed(model)
    result = sample(ours, family)
    tokens = pack("patches.kernels.tokens").VideoTokens.grid(9, 2, 3)
    assert close(result, sample(routing_model(pack, model, tokens, 0.1), family))
    assert not close(result, sample(model, family)) and entry(ours)["taken"] == 9


def test_routed_beside_the_window_and_with_guides(pack, routed, windowed, entry):
    model = build_model()
    ours = windowed(routed(model))
    assert equal(sample(ours), sample(windowed(model)))
    assert entry(ours)["declined"] == {"OTHER_TECHNIQUE": 9}
    noise, mask, conds = guides()
    ours = routed(model)
    result = sample(ours, noise=noise, noise_mask=mask, **conds)
    tokens = pack("patches.kernels.tokens").VideoTokens.grid(9, 2, 3, guides=6)
    reference = routing_model(pack, model, tokens, 0.1)
    assert close(result, sample(reference, noise=noise, noise_mask=mask, **conds))
    assert entry(ours)["taken"] == 9


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"dense_blocks": 3}, "DENSE_BLOCK"),
        ({"start_percent": 0.9, "end_percent": 0.95}, "OUTSIDE_RANGE"),
        ({"sink_frames": 8}, "NOTHING_FAR"),
    ],
)
def test_routed_declines(settings, reason, routed, entry):
    model = build_model()
    ours = routed(model, **settings)
    assert equal(sample(ours), sample(model)) and entry(ours)["declined"] == {reason: 9}


def test_why_the_kernel_cannot_serve_is_counted(pack, routed, entry, monkeypatch):
    """Asked once a forward for what the card has, and at each call for what it is given."""
    kernel, technique = pack("patches.kernels.routed"), pack("patches.techniques.low_rank")
    given = iter([None, "DTYPE"] * 100)
    monkeypatch.setattr(
        technique, "why_not", lambda device, dtype, width: None if width == 128 else next(given)
    )
    model = build_model()
    ours = routed(model)
    sample(ours)
    assert entry(ours)["taken"] == 5 and entry(ours)["declined"] == {"DTYPE": 4}
    assert kernel.why_not(torch.device("cpu"), torch.float32, 128) == "DTYPE"
    assert kernel.why_not(torch.device("cpu"), torch.float16, 64) == "HEAD_WIDTH"
