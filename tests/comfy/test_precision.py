"""ThriftAttentionPrecision on real models, ModelPatchers and samplers."""

from __future__ import annotations

import functools
import gc
import itertools
import logging
import weakref
from types import SimpleNamespace

import comfy.ldm.lightricks.model
import comfy.ldm.modules.attention as attention
import comfy.model_management as mm
import pytest
import torch
from freezing import SIGMAS
from recorder import play_recorder
from reference import casting_model, close, equal, set_slot
from tiny_models import (
    FAMILIES,
    FORMS,
    HEAD_WIDTH,
    HEADS,
    build_model,
    conditioning,
    guides,
    noise_like,
    sample,
)

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
# Of the largest number of a sample, after three steps with CFG.
BOUNDS = {"fp16": 5e-3, "bf16": 3e-2, "fp32": 1e-5}
CALLS = 2 * 9
SELF, TEXT = "video self-attention", "video to text"
SPLITS = hasattr(comfy.ldm.lightricks.model, "GuideAttentionMask")


@pytest.fixture(scope="module")
def cast(pack):
    """`cast(model, self_attention, text_attention)`: the model as the node returns it."""
    node = pack("nodes.attention_precision").ThriftAttentionPrecision
    return lambda model, *settings: node.execute(model, *settings).args[0]


@pytest.fixture(scope="module")
def told(pack):
    """`told(model)`: the technique's part of the last record in the journal."""
    journal_of = pack("patches.mount").journal_of
    return lambda model: journal_of(model).records()[-1]["techniques"]["attention precision"]


@pytest.mark.parametrize("family", FORMS)
@pytest.mark.parametrize("name", DTYPES)
@pytest.mark.parametrize("cfg", [1.0, 2.0])
def test_the_models_own_type_is_stock_bit_for_bit(family, name, cfg, cast, told, caplog):
    model = build_model(family, dtype=DTYPES[name])
    stock = sample(model, family, cfg=cfg)
    for setting in (name, "auto"):
        ours = cast(model, setting, setting)
        with caplog.at_level(logging.INFO):
            assert equal(sample(ours, family, cfg=cfg), stock)
        assert told(ours)["declined"] == {"SAME_DTYPE": CALLS} and not told(ours)["taken"]
        assert "not needed here (SAME_DTYPE" in caplog.text and "leave the node out" in caplog.text
    assert not [record for record in caplog.records if record.levelno > logging.INFO]


@pytest.mark.parametrize("family", FORMS)
@pytest.mark.parametrize(("own", "name"), itertools.permutations(DTYPES, 2))
@pytest.mark.parametrize("roles", ["self", "text", "both"])
def test_equals_casting_by_hand(family, own, name, roles, cast, told):
    model, noise = build_model(family, dtype=DTYPES[own]), noise_like(family, batch=2)
    ours = cast(model, own if roles == "text" else name, own if roles == "self" else name)
    by_hand = {"self": ("attn1",), "text": ("attn2",), "both": ("attn1", "attn2")}[roles]
    result = sample(ours, family, noise=noise)
    reference = casting_model(model, dict.fromkeys(by_hand, DTYPES[name]))
    assert equal(result, sample(reference, family, noise=noise))
    stock = sample(model, family, noise=noise)
    assert not equal(result, stock)
    assert close(result, stock, max(BOUNDS[own], BOUNDS[name]) * 3)
    taken = CALLS if roles == "both" else 9
    assert told(ours)["taken"] == taken and told(ours)["declined"] == (
        {} if roles == "both" else {"SAME_DTYPE": 9}
    )
    types = {SELF: [str(DTYPES[name])[6:]], TEXT: [str(DTYPES[name])[6:]]}
    assert told(ours)["types"] == {
        role: kind for role, kind in types.items() if roles in ("both", {SELF: "self", TEXT: "text"}[role])
    }


@pytest.mark.parametrize("name", ["fp16", "bf16"])
@pytest.mark.parametrize("strength", [1.0, 0.4])
def test_guides_with_and_without_masks(name, strength, cast, told):
    """Guides of their own strength bring masks, and in newer releases query slices."""
    model = build_model()
    noise, mask, conds = guides(strength=strength)
    given = {"noise": noise, "noise_mask": mask, **conds}
    ours = cast(model, name, name)
    result = sample(ours, **given)
    reference = casting_model(model, {"attn1": DTYPES[name], "attn2": DTYPES[name]})
    assert equal(result, sample(reference, **given)) and not equal(result, sample(model, **given))
    sliced = 9 if strength < 1 and SPLITS else 0
    assert told(ours)["taken"] == CALLS + sliced and not told(ours)["declined"]


@pytest.mark.parametrize("name", ["fp16", "bf16"])
def test_texts_with_padding_are_masked_as_before(name, cast, told):
    """Of five tokens two are padding: stock adds the largest negative number of its type to them."""
    model = build_model()
    given = {"positive": conditioning(), "negative": conditioning(seed=7)}
    for entry in given.values():
        entry[0][1]["attention_mask"] = torch.tensor([[1, 1, 1, 0, 0]])
    ours = cast(model, "auto", name)
    result, stock = sample(ours, **given), sample(model, **given)
    assert close(result, stock, BOUNDS[name]) and not equal(result, stock)
    # All of it padding: every token is seen alike.
    for entry in given.values():
        entry[0][1]["attention_mask"] = torch.zeros(1, 5, dtype=torch.long)
    result, stock = sample(ours, **given), sample(model, **given)
    assert close(result, stock, BOUNDS[name]) and not equal(result, stock)
    assert told(ours)["taken"] == 9 and not told(ours)["nonfinite"]


def enlarge(model, size):
    """Values of attention times `size`, and what is made of them divided by it."""
    with torch.no_grad():
        for block in model.model.diffusion_model.transformer_blocks:
            for module in (block.attn1, block.attn2):
                module.to_v.weight *= size
                module.to_v.bias *= size
                module.to_out[0].weight /= size
    return model


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("size", [1e5, 1e6])
def test_large_values_in_float16(family, size, cast, told):
    model = enlarge(build_model(family), size)
    by_hand = casting_model(model, {"attn1": torch.float16, "attn2": torch.float16})
    assert not all(part.isfinite().all() for part in sample(by_hand, family))
    ours = cast(model, "fp16", "fp16")
    result, stock = sample(ours, family), sample(model, family)
    assert close(result, stock, BOUNDS["fp16"]) and not equal(result, stock)
    assert told(ours)["taken"] == CALLS and told(ours)["nonfinite"] == 0


def test_results_that_are_not_finite_are_counted_and_warned_about(cast, told, caplog):
    model = build_model()
    with torch.no_grad():
        model.model.diffusion_model.transformer_blocks[1].attn1.q_norm.weight *= 1e6
    assert sample(model)[0].isfinite().all()
    ours = cast(model, "fp16", "fp16")
    with caplog.at_level(logging.INFO):
        assert not sample(ours)[0].isfinite().all()
    # What comes after the first one had such numbers already.
    assert told(ours)["nonfinite"] == 1 and told(ours)["taken"] == CALLS
    (warning,) = [record for record in caplog.records if record.levelno == logging.WARNING]
    assert "1 attention calls came out with numbers that are not finite" in warning.getMessage()
    assert "18 attention calls taken" in warning.getMessage()
    assert told_of(cast(model, "bf16", "bf16"), told)["nonfinite"] == 0


def told_of(model, told):
    sample(model)
    return told(model)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_what_came_in_broken_is_not_ours(bad, cast, told):
    model, noise = build_model(), noise_like()
    noise[0, 0, 4, 1, 1] = bad
    ours = cast(model, "fp16", "fp16")
    assert not sample(ours, noise=noise)[0].isfinite().all()
    assert told(ours)["taken"] == CALLS and told(ours)["nonfinite"] == 0


def cast_video(func, q, k, v, heads, mask=None, **kwargs):
    if q.shape[-1] != HEADS * HEAD_WIDTH:
        return func(q, k, v, heads, mask=mask, **kwargs)
    mask = None if mask is None else mask.clamp(min=-3e4).half()
    return func(q.half(), k.half(), v.half(), heads, mask=mask, **kwargs).to(q.dtype)


@pytest.mark.parametrize("family", FORMS)
def test_with_a_window_in_both_orders(family, cast, told, windowed, last_run):
    model = build_model(family)
    one, other = cast(windowed(model), "fp16", "fp16"), windowed(cast(model, "fp16", "fp16"))
    result = sample(one, family)
    assert equal(result, sample(other, family))
    # By hand below the window, whose pieces are as wide as the video stream; sound is narrower.
    below = set_slot(model, cast_video)
    assert equal(result, sample(windowed(below), family))
    for less in (model, windowed(model), cast(model, "fp16", "fp16")):
        assert not equal(result, sample(less, family))
    assert told(other)["taken"] == CALLS and last_run(other)["taken"] == 9


@pytest.mark.parametrize("scope", ["per-frame work", "whole blocks", "spatial attention"])
def test_with_frozen_steps_in_both_orders(scope, cast, told, frozen, record):
    """Frozen steps compute less, and what they reuse is not cast again."""
    model = build_model()
    one = cast(frozen(model, scope=scope), "fp16", "fp16")
    other = frozen(cast(model, "fp16", "fp16"), scope=scope)
    result = sample(one, sigmas=SIGMAS)
    assert equal(result, sample(other, sigmas=SIGMAS))
    assert not equal(result, sample(frozen(model, scope=scope), sigmas=SIGMAS))
    full = 3 * (8 - len(record(one)["steps"]))
    if scope == "spatial attention":
        # Nobody is asked where an earlier stage has the answer itself: counted, as everything else.
        assert told(one)["declined"] == {"ANSWERED_BEFORE": 24 - full} and told(one)["taken"] == 24 + full
    else:
        text = full
        own = 24 if scope == "per-frame work" else full
        assert told(one)["taken"] == text + own and not told(one)["declined"]


def test_other_types_are_left_alone(cast, told):
    model = build_model()

    def in_double(module):
        def forward(x, context=None, mask=None, pe=None, transformer_options=None, **kwargs):
            given = (part(x).double() for part in (module.to_q, module.to_k, module.to_v))
            out = attention.optimized_attention(*given, module.heads, transformer_options=transformer_options)
            return module.to_out(out.to(x.dtype))

        return forward

    patched = model.clone()
    for index, block in enumerate(model.model.diffusion_model.transformer_blocks):
        path = f"diffusion_model.transformer_blocks.{index}.attn1.forward"
        patched.add_object_patch(path, in_double(block.attn1))
    ours = cast(patched, "fp16", "fp32")
    assert equal(sample(ours), sample(patched))
    assert told(ours)["declined"] == {"OTHER_DTYPE": 9, "SAME_DTYPE": 9} and not told(ours)["taken"]


def halves(func, q, *args, **kwargs):
    """A kernel of another pack that takes half types only, as sage attention does."""
    assert q.dtype in (torch.float16, torch.bfloat16)
    return 1.5 * func(q, *args, **kwargs)


@pytest.mark.parametrize("order", ["before us", "after us"])
def test_overrides_of_others_get_half_types_only(order, cast, told):
    model = build_model(dtype=torch.float16)

    def both(name):
        if order == "before us":
            return cast(set_slot(model, halves), name, name)
        return set_slot(cast(model, name, name), halves)

    stock, ours = sample(set_slot(model, halves)), both("fp32")
    assert equal(sample(ours), stock)
    assert told(ours)["declined"] == {"FOREIGN_OVERRIDE": CALLS} and not told(ours)["taken"]
    ours = both("bf16")
    assert not equal(sample(ours), stock) and told(ours)["taken"] == CALLS
    # A float32 model could not use it at all.
    full = build_model()
    ours = cast(set_slot(full, halves), "fp16", "fp16")
    assert not equal(sample(ours), sample(full)) and told(ours)["taken"] == CALLS


def test_attention_in_force_may_have_no_name(cast, told, monkeypatch):
    """As a partial of it, which another pack may have put there."""
    model = build_model(dtype=torch.bfloat16)
    for name in ("optimized_attention", "optimized_attention_masked"):
        monkeypatch.setattr(attention, name, functools.partial(getattr(attention, name)))
    ours = cast(model, "fp32", "fp32")
    assert not equal(sample(ours), sample(model)) and told(ours)["taken"] == CALLS


def test_attention_of_the_checkpoint_gets_half_types_only(cast, told):
    model = build_model(dtype=torch.bfloat16)
    seen = []

    def own(q, *args, **kwargs):
        seen.append(q.dtype)
        kwargs.pop("transformer_options", None)
        return attention.attention_sub_quad(q, *args, **kwargs)

    for block in model.model.diffusion_model.transformer_blocks:
        block.attn1.comfy_attention = SimpleNamespace(config=None, function=own)
    ours = cast(model, "fp32", "fp32")
    assert not equal(sample(ours), sample(model)), "text attention is cast"
    assert told(ours)["declined"] == {"CHECKPOINT_ATTENTION": 9} and told(ours)["taken"] == 9
    assert set(seen) == {torch.bfloat16}
    sample(cast(model, "fp16", "fp16"))
    assert torch.float16 in seen


@pytest.mark.parametrize(
    ("name", "is_half"), [("attention_sage", True), ("attention_flash", True), ("attention_split", False)]
)
def test_kernels_of_comfyui_that_take_half_types_only(name, is_half, cast, told, monkeypatch):
    stand_in = functools.wraps(attention.attention_basic)(lambda *a, **k: attention.attention_basic(*a, **k))
    stand_in.__name__ = name
    for place in ("optimized_attention", "optimized_attention_masked"):
        monkeypatch.setattr(attention, place, stand_in)
    model = build_model(dtype=torch.float16)
    ours = cast(model, "fp32", "fp32")
    assert equal(sample(ours), sample(model)) is is_half
    assert told(ours)["declined"] == ({"HALF_BACKEND": CALLS} if is_half else {})
    assert told(ours)["taken"] == (0 if is_half else CALLS)


@pytest.mark.parametrize(
    "function", ["attention_basic", "attention_split", "attention_sub_quad", "attention_pytorch"]
)
def test_float32_is_float32_in_every_kernel(function, cast, told, monkeypatch):
    """In a half model, whatever ComfyUI computes attention with: as near to float64 as float32 is, unlike stock."""
    for place in ("optimized_attention", "optimized_attention_masked"):
        monkeypatch.setattr(attention, place, getattr(attention, function))
    model, errors = build_model(dtype=torch.float16), []
    kernel = getattr(attention, function)

    def exact(func, q, k, v, heads, mask=None, **kwargs):
        kwargs.pop("transformer_options"), kwargs.pop("_inside_attn_wrapper")
        out = kernel(q, k, v, heads, mask=mask, **kwargs)
        split = [x.double().unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v)]
        logits = split[0] @ split[1].transpose(-1, -2) * split[0].shape[-1] ** -0.5
        logits = logits if mask is None else logits + mask.double()
        wanted = (logits.softmax(-1) @ split[2]).transpose(1, 2).flatten(2)
        errors.append(float((out - wanted).abs().max() / wanted.abs().max()))
        return out

    sample(set_slot(model, exact))
    assert max(errors) > 1e-4, "half, as the model comes"
    errors.clear()
    # What is asked below us counts as foreign, so the seam is the kernel itself.
    for place in ("optimized_attention", "optimized_attention_masked"):
        monkeypatch.setattr(attention, place, attention.wrap_attn(named(function, exact, kernel)))
    ours = cast(model, "fp32", "fp32")
    sample(ours)
    assert told(ours)["taken"] == CALLS and len(errors) == CALLS and max(errors) < 2e-6


def named(name, exact, kernel):
    def function(q, k, v, heads, mask=None, **kwargs):
        return exact(kernel, q, k, v, heads, mask=mask, **kwargs)

    function.__name__ = name
    return function


def test_upcasting_that_comfyui_forces_is_said(cast, told, monkeypatch, caplog):
    monkeypatch.setattr(attention, "FORCE_UPCAST_ATTENTION_DTYPE", {torch.float16: torch.float32})
    model = build_model()
    plain = cast(model, "fp16", "fp16")
    with caplog.at_level(logging.INFO):
        sample(plain)
    assert told(plain)["is_upcast"] and "its logits are float32 nevertheless" in caplog.text
    assert not told_of(cast(model, "bf16", "bf16"), told)["is_upcast"]
    monkeypatch.setattr(attention, "optimized_attention", attention.attention_pytorch)
    assert not told_of(cast(model, "fp16", "fp16"), told)["is_upcast"]


@pytest.mark.parametrize(
    ("card", "own", "wanted"),
    [
        ("RTX 30", "fp32", "bf16"),
        ("RTX 30", "bf16", "bf16"),
        ("RTX 30", "fp16", "fp16"),
        ("RTX 20", "fp32", "fp16"),
        ("RTX 20", "bf16", "fp16"),
        ("GTX 16", "fp32", "fp32"),
        ("GTX 16", "bf16", "fp32"),
        ("Mac", "fp32", "bf16"),
        ("old Mac, upcasting", "fp32", "fp32"),
    ],
)
def test_what_auto_takes(card, own, wanted, pack, monkeypatch):
    """The judgement of ComfyUI is played, for a device that is not there; runs on the CPU keep the model's type."""
    fast = {"RTX 30": (True, True), "RTX 20": (False, True), "GTX 16": (False, False), "Mac": (True, True)}
    bf16, fp16 = fast.get(card, (False, True))
    monkeypatch.setattr(mm, "should_use_bf16", lambda device: bf16)
    monkeypatch.setattr(mm, "should_use_fp16", lambda device: fp16)
    if "upcasting" in card:
        monkeypatch.setattr(attention, "FORCE_UPCAST_ATTENTION_DTYPE", {torch.float16: torch.float32})
    backend = pack("patches.backend")
    assert backend.fast_dtype(torch.device("cuda"), DTYPES[own]) == DTYPES[wanted]
    assert backend.fast_dtype(torch.device("cpu"), DTYPES[own]) == DTYPES[own]


def test_auto_on_a_card_without_bf16(cast, told, pack, monkeypatch):
    """Within a run, by the judgement of a card that is played."""
    backend = pack("patches.backend")
    monkeypatch.setattr(mm, "should_use_bf16", lambda device: False)
    monkeypatch.setattr(mm, "should_use_fp16", lambda device: True)
    fast = backend.fast_dtype
    monkeypatch.setattr(backend, "fast_dtype", lambda device, own: fast(torch.device("cuda"), own))
    model = build_model()
    ours = cast(model)
    result = sample(ours)
    assert equal(result, sample(cast(model, "fp16", "fp16"))) and not equal(result, sample(model))
    assert told(ours)["types"] == {SELF: ["float16"], TEXT: ["float16"]}


@pytest.mark.parametrize("family", FAMILIES)
def test_nothing_that_is_kept_is_memory_of_a_block(family, cast, told, pack, monkeypatch):
    model = build_model(family)
    ours = cast(model, "fp16", "bf16")
    expected = sample(ours, family)
    with play_recorder(pack, monkeypatch, model, has_streams=False) as recorder:
        result = sample(ours, family)
    assert recorder.blocks and recorder.faults == []
    assert equal(result, expected) and told(ours)["taken"] == CALLS


@pytest.mark.parametrize("ends", ["normally", "interrupted"])
def test_no_tensor_outlives_a_run(ends, cast, told, pack, monkeypatch):
    technique, counters = pack("patches.techniques.attention_precision"), []
    counter = technique.Casting._counter

    def watching(self, device):
        found = counter(self, device)
        counters.append(weakref.ref(found))
        return found

    def stop(step, x0, x, total):
        if ends == "interrupted" and step == 1:
            raise mm.InterruptProcessingException

    monkeypatch.setattr(technique.Casting, "_counter", watching)
    model = build_model()
    with torch.no_grad():
        model.model.diffusion_model.transformer_blocks[1].attn1.q_norm.weight *= 1e6
    ours = cast(model, "fp16", "fp16")
    try:
        sample(ours, callback=stop)
    except mm.InterruptProcessingException:
        assert ends == "interrupted"
    gc.collect()
    assert counters and all(ref() is None for ref in counters)
    assert told(ours)["nonfinite"] == 1, "read before they go"


def test_the_later_node_wins_and_defaults_are_auto(cast, pack):
    plan_of = pack("patches.mount").plan_of
    model = build_model()
    (one,) = plan_of(cast(cast(model, "fp16", "fp16"), "bf16"))
    assert one.describe() == "self-attention bf16, text attention auto"
    with pytest.raises(ValueError, match="text_attention is 'fp8'"):
        cast(model, "auto", "fp8")
