"""Beside stand-ins, written by us, for what other packs do to a MODEL. The order of patching must not matter."""

from __future__ import annotations

import copy

import comfy.context_windows
import comfy.lora
import comfy.samplers
import pytest
import torch
from reference import SLOT, close, equal, masked_model, set_slot, visible
from tiny_models import CUT, FAMILIES, FORMS, build_model, context_windows, noise_like, sample, sample_with


class Backend:
    """Another pack's attention in the override slot, put there without looking for an earlier one."""

    def __init__(self):
        self.calls = 0

    def __call__(self, func, q, k, v, heads, *args, **kwargs):
        self.calls += 1
        assert kwargs["_inside_attn_wrapper"], "every keyword is handed on"
        return func(q, k, v * 1.5, heads, *args, **kwargs)

    def __deepcopy__(self, memo):
        return self  # 0.9.2 copies model_options deeply


@pytest.mark.parametrize("family", FORMS)
@pytest.mark.parametrize("order", ["before us", "after us"])
def test_attention_slot_overwritten(family, order, windowed, last_run):
    model, backend = build_model(family), Backend()
    if order == "before us":
        both = windowed(set_slot(model, backend))
    else:
        both = set_slot(windowed(model), backend)
    result = sample(both, family)
    assert backend.calls and last_run(both)["taken"] == 9

    def reference(func, q, k, v, heads, *args, **kwargs):
        return masked(func, q, k, v * 1.5, heads, *args, **kwargs)

    masked_clone = masked_model(model, visible(9, 6, 1, 0))
    masked = masked_clone.model_options["transformer_options"]["optimized_attention_override"]
    assert close(result, sample(set_slot(masked_clone, reference), family))


@pytest.mark.parametrize("family", FAMILIES)
def test_block_slots_overwritten_when_the_guider_is_built(family, windowed, last_run):
    model = build_model(family)
    seen = []

    def own_block(args, extra):
        seen.append(1)
        return extra["original_block"](args)

    class Guider(comfy.samplers.CFGGuider):
        def __init__(self, patcher):
            clone = patcher.clone()
            for index in range(3):
                clone.set_model_patch_replace(own_block, "dit", "double_block", index)
            super().__init__(clone)

    ours = windowed(model)
    assert equal(sample_with(Guider(ours), family), sample_with(comfy.samplers.CFGGuider(ours), family))
    assert seen and last_run(ours)["taken"] == 9


@pytest.mark.parametrize("family", FAMILIES)
def test_one_cond_evaluated_twice_a_step_with_other_options(family, windowed, last_run):
    """As guiders with a perturbed pass do; the window acts in both passes, so that it cancels in their difference."""
    model = build_model(family)

    class Perturbed(comfy.samplers.CFGGuider):
        def predict_noise(self, x, timestep, model_options, seed=None):
            conds = [self.conds["positive"]]
            calc = comfy.samplers.calc_cond_batch
            plain = calc(self.inner_model, conds, x, timestep, model_options)[0]
            options = comfy.model_patcher.create_model_options_clone(model_options)
            options["transformer_options"] |= {"stg_indexes": [1], "a2v_cross_attn": False, "ptb_index": 0}
            perturbed = calc(self.inner_model, conds, x, timestep, options)[0]
            return plain + 0.5 * (plain - perturbed)

    ours = windowed(model)
    reference = masked_model(model, visible(9, 6, 1, 0))
    assert close(sample_with(Perturbed(ours), family), sample_with(Perturbed(reference), family))
    assert last_run(ours)["taken"] == 2 * 9


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("order", ["before us", "after us"])
def test_module_forwards_replaced(family, order, windowed, last_run):
    model = build_model(family)
    blocks = model.model.diffusion_model.transformer_blocks
    calls = []

    def replaced(forward, name):
        def chunked(*args, **kwargs):
            calls.append(name)
            return forward(*args, **kwargs)

        return chunked

    def patch(patcher):
        clone = patcher.clone()
        for index, block in enumerate(blocks):
            for name in ("ff", "attn1"):
                path = f"diffusion_model.transformer_blocks.{index}.{name}.forward"
                clone.add_object_patch(path, replaced(getattr(block, name).forward, name))
        return clone

    plain = sample(windowed(model), family)
    both = windowed(patch(model)) if order == "before us" else patch(windowed(model))
    assert equal(sample(both, family), plain)
    assert calls.count("ff") == calls.count("attn1") == 9 and last_run(both)["taken"] == 9


def test_self_attention_that_never_reaches_comfyui_is_a_warning(windowed, last_run, caplog):
    model = build_model()
    ours = windowed(model)
    for index in range(3):
        path = f"diffusion_model.transformer_blocks.{index}.attn1.forward"
        ours.add_object_patch(path, lambda x, **kwargs: x * 0.5)
    with caplog.at_level("INFO"):
        sample(ours)
    assert last_run(ours) == last_run(ours) | {"taken": 0, "declined": {}}
    warnings = [
        r.getMessage() for r in caplog.records if r.levelname == "WARNING" and "FrameThrift" in r.getMessage()
    ]
    assert len(warnings) == 1 and "never reached" in warnings[0] and "attn1.forward" in warnings[0]


def test_a_block_of_another_pack_that_hands_options_over_by_position(windowed, last_run, caplog):
    model = build_model()
    for index, block in enumerate(model.model.diffusion_model.transformer_blocks):

        def own(x, attn1=block.attn1, **kwargs):
            return x + attn1(x, None, None, kwargs["pe"], None, kwargs["transformer_options"])

        model.add_object_patch(f"diffusion_model.transformer_blocks.{index}.forward", own)
    ours = windowed(model)
    with caplog.at_level("WARNING"):
        assert equal(sample(ours), sample(model))
    assert any("no effect, declined: NO_OPTIONS ×9;" in r.getMessage() for r in caplog.records)
    assert last_run(ours)["taken"] == 0


def test_transformer_options_replaced_after_us(windowed, caplog):
    model = build_model()
    ours = windowed(model).clone()
    ours.model_options["transformer_options"] = {}
    with caplog.at_level("WARNING"):
        assert equal(sample(ours), sample(model))
    assert any("another node replaced" in r.getMessage() for r in caplog.records)


def test_options_copied_deeply_during_a_run(windowed, last_run):
    class Copying(comfy.samplers.CFGGuider):
        def predict_noise(self, x, timestep, model_options, seed=None):
            options = copy.deepcopy(model_options)
            return super().predict_noise(x, timestep, options, seed)

    ours = windowed(build_model())
    expected = sample_with(comfy.samplers.CFGGuider(ours), "ltxv")
    assert equal(sample_with(Copying(ours), "ltxv"), expected)
    assert last_run(ours)["taken"] == 9


def test_clones_and_lora(windowed, last_run):
    model = build_model()
    weight = "diffusion_model.transformer_blocks.1.attn1.to_v.weight"
    generator = torch.Generator().manual_seed(4)
    delta = 0.1 * torch.randn(128, 128, generator=generator)

    def with_lora(patcher):
        clone = patcher.clone()
        assert clone.add_patches({weight: ("diff", (delta,))}, 1.0)
        return clone.clone()

    one, other = with_lora(windowed(model)), windowed(with_lora(model))
    result = sample(one)
    assert equal(result, sample(other))
    assert close(result, sample(masked_model(with_lora(model), visible(9, 6, 1, 0))))
    assert not close(result, sample(windowed(model)))
    assert last_run(one)["taken"] == 9


@pytest.mark.parametrize("family", CUT)
@pytest.mark.parametrize("order", ["before us", "after us"])
def test_context_windows(family, order, windowed, last_run):
    model, noise = build_model(family), noise_like(family, (15, 2, 2))
    stock = sample(context_windows(model), family, noise=noise)

    def both(window):
        if order == "before us":
            return windowed(context_windows(model), window=window)
        return context_windows(windowed(model, window=window))

    narrow = both(1)
    result = sample(narrow, family, noise=noise)
    assert not close(result, stock)
    assert last_run(narrow)["taken"] == 3 * 3 * 3 and not last_run(narrow)["declined"]

    # Newer releases put the frame before the window in front of it; it then sees and is seen by all.
    anchors = []
    full = visible(7, 4, 1, 0)
    with_anchor = visible(8, 4, 1, 0, anchors=1)

    def override(func, q, k, v, heads, *args, **kwargs):
        sees = full if q.shape[1] == 28 else with_anchor
        anchors.append(q.shape[1] == 32)
        reference = masked_model(model, sees).model_options["transformer_options"][
            "optimized_attention_override"
        ]
        return reference(func, q, k, v, heads, *args, **kwargs)

    reference = set_slot(masked_model(context_windows(model), full), override)
    assert close(result, sample(reference, family, noise=noise))
    assert equal(sample(both(4), family, noise=noise), stock)
    if hasattr(comfy.context_windows.IndexListContextHandler, "_get_guide_entries"):
        assert any(anchors), "this release anchors its windows; the test must have met one"


def test_foreign_wrapper_inside_ours_may_overwrite_the_slot_too(windowed, last_run):
    model, backend = build_model(), Backend()
    ours = windowed(model)

    def overwrite(executor, *args, **kwargs):
        args[5]["optimized_attention_override"] = backend
        return executor(*args, **kwargs)

    ours.add_wrapper_with_key("diffusion_model", "somebody", overwrite)
    sample(ours)
    assert backend.calls and last_run(ours)["taken"] == 9


class Inlined(torch.nn.Module):
    """Self-attention as a rewritten block computes it: by the module's weights, past its forward."""

    def __init__(self, module):
        super().__init__()
        self.held = [module]

    def forward(self, *args, **kwargs):
        module = self.held[0]
        return type(module).forward(module, *args, **kwargs)


def rewritten_blocks(patcher):
    """As KJNodes' LTX2 attention tuner puts them: a block's forward replaced by one that calls attention itself."""
    clone = patcher.clone()
    for index, block in enumerate(patcher.model.diffusion_model.transformer_blocks):

        def own(*args, block=block, **kwargs):
            module = block.attn1
            block.attn1 = Inlined(module)
            try:
                return type(block).forward(block, *args, **kwargs)
            finally:
                block.attn1 = module

        clone.add_object_patch(f"diffusion_model.transformer_blocks.{index}.forward", own)
    return clone


@pytest.mark.parametrize("family", FAMILIES)
def test_blocks_that_call_attention_themselves(family, windowed, frozen, last_run, record):
    """The window and freeze's share of attention reach them, other calls of the block pass untouched, in both orders."""
    model = build_model(family)
    expected = sample(windowed(model), family)
    for ours in (windowed(rewritten_blocks(model)), rewritten_blocks(windowed(model))):
        assert equal(sample(ours, family), expected)
        assert last_run(ours)["taken"] == 9 and not last_run(ours)["declined"]
    assert not equal(expected, sample(model, family))
    share = {"scope": "spatial attention", "refresh_every": 2}
    ours = frozen(rewritten_blocks(model), **share)
    assert equal(sample(ours, family), sample(frozen(model, **share), family)) and record(ours)["taken"] == 3


def test_foreign_overrides_below_blocks_that_call_attention_themselves(windowed, last_run):
    seen = []

    def foreign(func, q, k, v, heads, *args, **kwargs):
        assert kwargs["transformer_options"][SLOT] is foreign
        seen.append(k.shape[1])
        return func(q, k, v, heads, *args, **kwargs)

    model = build_model()
    ours = windowed(rewritten_blocks(set_slot(model, foreign)))
    assert equal(sample(ours), sample(windowed(model)))
    # Text, and windows of three frames of six tokens; nothing dense.
    assert set(seen) == {5, 18} and last_run(ours)["taken"] == 9


def test_a_text_as_long_as_the_video_is_told_apart_or_left_alone(windowed, last_run):
    """Nothing but the length tells a block's own call for text from that for video."""
    model = build_model()
    text = torch.randn(1, 54, 16, generator=torch.Generator().manual_seed(3))
    values = {"attention_mask": torch.ones(1, 54, dtype=torch.long), "frame_rate": 24.0}
    conds = {"positive": [[text, values]], "negative": [[text * 0.5, values]]}
    ours = windowed(rewritten_blocks(model))
    assert equal(sample(ours, **conds), sample(model, **conds))
    assert last_run(ours)["declined"] == {"UNCLEAR_CALL": 9}


def test_a_kernel_past_comfyui_is_one_place_and_one_advice(windowed, caplog):
    """As KJNodes' memory-efficient sage attention puts it into every block."""
    model = build_model()
    for index, block in enumerate(model.model.diffusion_model.transformer_blocks):

        def direct(x, *args, module=block.attn1, **kwargs):
            q, k, v = module.to_q(x), module.to_k(x), module.to_v(x)
            return module.to_out(torch.nn.functional.scaled_dot_product_attention(q, k, v))

        model.add_object_patch(f"diffusion_model.transformer_blocks.{index}.attn1.forward", direct)
    ours = windowed(model)
    with caplog.at_level("WARNING"):
        assert equal(sample(ours), sample(model))
    line = next(r.getMessage() for r in caplog.records if "never reached" in r.getMessage())
    assert "transformer_blocks.*.attn1.forward (×3)" in line and line.count("attn1") == 1
    assert "Patch Sage Attention KJ" in line


def test_attention_that_tells_comfyui_nothing(windowed, caplog):
    """As LTXVideo's ModifyLTXModel rewrites the model's classes."""
    model = build_model()

    class Deaf(type(model.model.diffusion_model.transformer_blocks[0].attn1)):
        def forward(self, x, *args, transformer_options=None, **kwargs):
            return super().forward(x, *args, **kwargs)

    for block in model.model.diffusion_model.transformer_blocks:
        block.attn1.__class__ = Deaf
    ours = windowed(model)
    with caplog.at_level("WARNING"):
        assert equal(sample(ours), sample(model))
    assert any("calls attention without telling ComfyUI" in r.getMessage() for r in caplog.records)


def test_a_model_told_to_compute_sound_only(windowed, frozen, last_run, record, caplog):
    """As LTXVideo's audio-only node tells it."""
    model = build_model("ltxav")
    model.model_options.setdefault("transformer_options", {})["run_vx"] = False
    ours = frozen(windowed(model))
    with caplog.at_level("WARNING"):
        assert equal(sample(ours, "ltxav"), sample(model, "ltxav"))
    assert last_run(ours)["declined"].keys() == record(ours)["declined"].keys() == {"NO_VIDEO"}
    assert "told to compute sound only" in caplog.text
