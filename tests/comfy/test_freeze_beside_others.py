"""ScheduleSpatialFreeze together with other nodes, guiders and packs."""

from __future__ import annotations

import inspect

import comfy.context_windows
import comfy.sample
import comfy.samplers
import pytest
import torch
from freezing import EVERY, SCOPES, SIGMAS, Counted
from reference import SLOT, close, equal, freezing_model, set_slot
from tiny_models import (
    CUT,
    FAMILIES,
    FORMS,
    build_model,
    conditioning,
    context_windows,
    noise_like,
    sample,
    sample_with,
)


def test_another_cache_skips_our_refresh(frozen, record):
    """The next step that runs is then the full one."""
    model = build_model()
    counted = Counted(model, "attn1.to_q")
    ours = counted.watch(frozen(model))
    skipped = float(SIGMAS[3])

    def skip(executor, x, t, *args, **kwargs):
        return x * 0.1 if abs(counted.step - 3) < 0.5 else executor(x, t, *args, **kwargs)

    ours.add_wrapper_with_key("diffusion_model", "somebody's cache", skip)
    sample(ours, sigmas=SIGMAS)
    assert counted.by_step() == [3, 0, 0, 0, 3, 0, 0, 3] and skipped
    assert record(ours)["declined"]["NOT_REACHED"] == 1


def test_core_easycache_in_both_orders(frozen, record):
    nodes = pytest.importorskip("comfy_extras.nodes_easycache")
    model = build_model()

    def cached(patcher):
        return nodes.EasyCacheNode.execute(patcher, 0.2, 0.15, 0.95, False).args[0]

    one, other = cached(frozen(model)), frozen(cached(model))
    result = sample(one, sigmas=SIGMAS)
    assert record(one)["taken"] and not equal(result, sample(cached(model), sigmas=SIGMAS))
    assert equal(result, sample(other, sigmas=SIGMAS))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("scope", EVERY)
def test_a_cond_evaluated_twice_and_perturbed(family, scope, frozen, record):
    """Each pass keeps its own, and all of them freeze in the same steps."""
    model = build_model(family)
    attended = []

    class Twice(comfy.samplers.CFGGuider):
        def predict_noise(self, x, timestep, model_options, seed=None):
            conds, calc = [self.conds["positive"]], comfy.samplers.calc_cond_batch
            plain = calc(self.inner_model, conds, x, timestep, model_options)[0]
            other = calc(self.inner_model, conds, x * 0.5, timestep, model_options)[0]
            options = comfy.model_patcher.create_model_options_clone(model_options)
            options["transformer_options"] |= {"stg_indexes": [1], "a2v_cross_attn": False, "ptb_index": 0}
            attended.append(0)
            perturbed = calc(self.inner_model, conds, x, timestep, options)[0]
            return plain + 0.5 * (plain - perturbed) + 0.1 * other

    ours = frozen(model, scope=scope, refresh_every=2)
    result = sample_with(Twice(ours), family)
    assert not equal(result, sample_with(Twice(model), family))
    calls = 1 if scope != "spatial attention" else 3
    assert record(ours)["declined"] == {"FULL_STEP": 3 * calls, "LAST_STEP": 3 * calls}
    assert record(ours)["taken"] == 3 * calls


@pytest.mark.parametrize("family", CUT)
def test_context_windows_that_stay_and_that_move(family, frozen, record, pack):
    model, noise = build_model(family), noise_like(family, (15, 2, 2))
    still = frozen(context_windows(model))
    sample(still, family, noise=noise, sigmas=SIGMAS)
    assert record(still)["taken"] == 4 * 3 and "CONTEXT_MOVED" not in record(still)["declined"]

    moving = context_windows(model)
    handler = moving.model_options["context_handler"]
    windows = comfy.context_windows
    handler.context_schedule = windows.get_matching_context_schedule(
        windows.ContextSchedules.UNIFORM_STANDARD
    )
    ours = frozen(moving)
    result = sample(ours, family, noise=noise, sigmas=SIGMAS)
    assert record(ours)["declined"]["CONTEXT_MOVED"] and result
    kept = record(ours)["cache_gib"]
    still_kept = record(still)["cache_gib"]
    assert sum(kept.values()) <= 2 * sum(still_kept.values())


@pytest.mark.parametrize("scope", EVERY)
def test_torch_compile(scope, frozen, record):
    from comfy_api.torch_helpers import set_torch_compile_wrapper

    model = frozen(build_model(blocks=2), scope=scope)
    plain = sample(model, sigmas=SIGMAS)
    compiled = model.clone()
    set_torch_compile_wrapper(compiled, backend="eager")
    result = sample(compiled, sigmas=SIGMAS)
    assert record(compiled)["taken"] and close(result, plain)


@pytest.mark.parametrize("family", FORMS)
@pytest.mark.parametrize("scope", EVERY)
def test_with_the_window_in_any_order(family, scope, frozen, windowed):
    model = build_model(family)
    one, other = windowed(frozen(model, scope=scope)), frozen(windowed(model), scope=scope)
    result = sample(one, family, sigmas=SIGMAS)
    assert equal(result, sample(other, family, sigmas=SIGMAS))
    assert not close(result, sample(frozen(model, scope=scope), family, sigmas=SIGMAS)), "no window"
    # Attention within a frame is not frozen where the window takes the call.
    has_no_freeze = equal(result, sample(windowed(model), family, sigmas=SIGMAS))
    assert has_no_freeze == (scope == "spatial attention")


def test_module_forwards_of_other_packs_are_kept(frozen):
    """As chunked feed-forwards are: replaced by object patch, before or after us."""
    model = build_model()

    def patch(patcher):
        clone = patcher.clone()
        for index, block in enumerate(model.model.diffusion_model.transformer_blocks):
            forward = block.ff.forward
            clone.add_object_patch(
                f"diffusion_model.transformer_blocks.{index}.ff.forward", lambda x, f=forward: f(x) * 0.5
            )
        return clone

    one, other = patch(frozen(model, scope="per-frame work")), frozen(patch(model), scope="per-frame work")
    result = sample(one, sigmas=SIGMAS)
    assert equal(result, sample(other, sigmas=SIGMAS))
    assert not close(result, sample(frozen(model, scope="per-frame work"), sigmas=SIGMAS))
    assert not close(result, sample(patch(model), sigmas=SIGMAS))


@pytest.mark.parametrize("family", FAMILIES)
def test_what_other_packs_add_to_blocks_is_added_once(family, frozen, record):
    """A block replacement that adds something behind the block runs in frozen steps, too."""
    model = build_model(family)
    added = torch.randn(128, generator=torch.Generator().manual_seed(5))

    def patched(patcher):
        clone = patcher.clone()

        def own(args, extra):
            out = extra["original_block"](args)
            image = out["img"]
            out["img"] = image + added if family == "ltxv" else (image[0] + added, image[1])
            return out

        for index in range(3):
            clone.set_model_patch_replace(own, "dit", "double_block", index)
        return clone

    ours, base = patched(frozen(model, forecast="hold")), patched(model)
    result = sample(ours, family, sigmas=SIGMAS)
    reference = freezing_model(base, "whole blocks", (0, 3, 6, 7), False, SIGMAS.tolist())
    assert record(ours)["taken"] == 4
    assert close(result, sample(reference, family, sigmas=SIGMAS), 1e-4)


class SkippingLayers(comfy.samplers.CFGGuider):
    """A third pass with the second block left out, as core's SkipLayerGuidanceDiT makes it: same cond, same id."""

    def predict_noise(self, x, timestep, model_options, seed=None):
        def skip(args, extra):
            return args

        calc, patch = comfy.samplers.calc_cond_batch, comfy.model_patcher.set_model_options_patch_replace
        conds = [self.conds["positive"], self.conds["negative"]]
        positive, negative = calc(self.inner_model, conds, x, timestep, model_options)
        options = comfy.model_patcher.create_model_options_clone(model_options)
        options = patch(options, skip, "dit", "double_block", 1)
        skipped = calc(self.inner_model, conds[:1], x, timestep, options)[0]
        self.plain.append(positive.clone())
        return negative + 2 * (positive - negative) + (positive - skipped)


@pytest.mark.parametrize("scope", EVERY)
def test_a_pass_with_other_blocks_keeps_its_own(scope, frozen, record, monkeypatch):
    """A plain pass does not take what it has left, not even when CFG is split from some step on."""
    model = build_model()
    required = model.model.memory_required

    def run(patcher, split_from=99):
        guider = SkippingLayers(patcher)
        guider.plain = []

        def memory_required(shape, *args, **kwargs):
            return 1e30 if len(guider.plain) >= split_from else required(shape, *args, **kwargs)

        monkeypatch.setattr(model.model, "memory_required", memory_required)
        sample_with(guider, sigmas=SIGMAS)
        monkeypatch.setattr(model.model, "memory_required", required)
        return guider.plain

    ours = frozen(model, scope=scope, forecast="hold")
    run(ours)
    # Attention calls of the pass that leaves a block out, and of one that does not.
    skipping, calls = (1, 1) if scope != "spatial attention" else (2, 3)
    assert record(ours)["taken"] == 4 * calls + 4 * skipping
    # Where the batch falls apart, the plain pass is a full one: nothing of its own is there.
    plain = run(ours, split_from=1)
    assert close([plain[1]], [run(model)[1]], 1e-4)


@pytest.mark.parametrize("scope", EVERY)
def test_an_override_that_is_an_object_is_no_perturbation(scope, frozen, record):
    """Some releases copy such objects with the options."""

    class Passing:
        def __call__(self, func, *args, **kwargs):
            return func(*args, **kwargs)

    ours = frozen(set_slot(build_model(), Passing()), scope=scope)
    sample(ours, sigmas=SIGMAS)
    declined = record(ours)["declined"]
    if scope == "spatial attention":
        assert declined == {"FOREIGN_OVERRIDE": 24}
    else:
        assert record(ours)["taken"] == 4


def test_an_override_made_anew_for_every_call_is_no_perturbation(frozen, record):
    """Put there by a wrapper, so that it is not on the model when the run begins; in both orders."""

    def with_override(patcher):
        clone = patcher.clone()

        def wrapper(executor, x, t, c_concat, c_crossattn, control, options, **conds):
            def passing(func, *args, **kwargs):
                return func(*args, **kwargs)

            return executor(x, t, c_concat, c_crossattn, control, {**options, SLOT: passing}, **conds)

        clone.add_wrapper_with_key("apply_model", "foreign", wrapper)
        return clone

    model = build_model()
    for ours in (with_override(frozen(model)), frozen(with_override(model))):
        sample(ours, sigmas=SIGMAS)
        assert record(ours)["taken"] == 4


def test_passes_of_one_evaluation_at_two_sigmas_keep_their_own(frozen, record):
    """What another pass is given changes no bit of the plain one."""

    class Twice(comfy.samplers.CFGGuider):
        scale = 1.0

        def predict_noise(self, x, timestep, model_options, seed=None):
            calc, conds = comfy.samplers.calc_cond_batch, [self.conds["positive"]]
            plain = calc(self.inner_model, conds, x, timestep, model_options)[0]
            calc(self.inner_model, conds, x * self.scale, timestep * 0.95, model_options)
            return plain

    ours = frozen(build_model())
    one, other = Twice(ours), Twice(ours)
    other.scale = 0.5
    assert equal(sample_with(one, sigmas=SIGMAS), sample_with(other, sigmas=SIGMAS))
    assert record(ours)["taken"]


def test_a_guider_that_calls_past_the_samplers_seam(frozen, record, pack):
    """Its evaluations are not counted; sigma tells of a new one."""

    class Direct(comfy.samplers.CFGGuider):
        def outer_predict_noise(self, x, timestep, model_options=None, seed=None):
            return self.predict_noise(x, timestep, model_options or {}, seed)

    ours, direct = frozen(build_model()), frozen(build_model())
    kept = []
    for guider, model in ((comfy.samplers.CFGGuider, ours), (Direct, direct)):
        result = sample_with(guider(model), sigmas=SIGMAS)
        assert record(model)["taken"] == 4
        kept.append(record(model)["cache_gib"])
    assert result and kept[0] == kept[1]


def test_blocks_that_are_given_their_options_by_position(frozen, record):
    """Nobody can tell them to leave video out: computed, and said."""
    model = build_model("ltxav")
    blocks = list(model.model.diffusion_model.transformer_blocks)
    names = list(inspect.signature(type(blocks[0]).forward).parameters)[2:]

    def patched(patcher):
        clone = patcher.clone()
        for index, block in enumerate(blocks):

            def own(args, extra, block=block):
                return {"img": block(args["img"], *[args.get(name) for name in names])}

            clone.set_model_patch_replace(own, "dit", "double_block", index)
        return clone

    ours = patched(frozen(model))
    assert equal(sample(ours, "ltxav", sigmas=SIGMAS), sample(patched(model), "ltxav", sigmas=SIGMAS))
    assert record(ours)["declined"]["NO_OPTIONS"] == 4 and not record(ours)["taken"]


@pytest.mark.parametrize(
    ("settings", "ahead"),
    [
        ({"scope": "whole blocks"}, False),
        ({"scope": "per-frame work"}, False),
        ({"scope": "spatial attention"}, True),
        ({"scope": "whole blocks", "cache_limit_gb": 1e-8}, True),
    ],
)
def test_weights_are_fetched_ahead_only_where_all_are_needed(settings, ahead, frozen, record):
    ours, seen = frozen(build_model("ltxav"), **settings).clone(), []

    def stream(executor, *args, **kwargs):
        next(given for given in args if isinstance(given, dict))["prefetch_dynamic_vbars"] = True
        return executor(*args, **kwargs)

    def look(executor, *args, **kwargs):
        options = next(given for given in args if isinstance(given, dict))
        seen.append(options["prefetch_dynamic_vbars"])
        return executor(*args, **kwargs)

    for name, wrapper in (("look", look), ("stream", stream)):
        ours.add_wrapper_with_key("diffusion_model", name, wrapper)
    wrappers = ours.wrappers["diffusion_model"]
    first = wrappers.pop("stream")
    ours.wrappers["diffusion_model"] = {"stream": first, **wrappers}
    sample(ours, "ltxav", sigmas=SIGMAS, cfg=1.0)
    assert seen == [True, ahead, ahead, True, ahead, ahead, True, True]
    assert record(ours)["taken"] or "CACHE_FULL" in record(ours)["declined"]


@pytest.mark.parametrize("scope", SCOPES)
def test_guides(scope, frozen, record):
    model = build_model()
    values = {"keyframe_idxs": torch.zeros(1, 3, 6, 2)}
    mask = torch.ones(1, 1, 9, 1, 1)
    mask[:, :, -1] = 0.5
    given = {
        "positive": conditioning(**values),
        "negative": conditioning(seed=7, **values),
        "noise_mask": mask,
    }
    ours = frozen(model, scope=scope, forecast="hold")
    reference = freezing_model(model, scope, (0, 3, 6, 7), False, SIGMAS.tolist())
    assert close(sample(ours, sigmas=SIGMAS, **given), sample(reference, sigmas=SIGMAS, **given), 1e-4)
    assert record(ours)["taken"] == 4


@pytest.mark.parametrize("scope", EVERY)
def test_a_text_that_becomes_longer_is_computed_in_full(scope, frozen, record):
    model = build_model()
    ours = frozen(model, scope=scope, refresh_every=16, forecast="hold")
    short, values = conditioning()[0]
    long = torch.randn(1, 9, 16, generator=torch.Generator().manual_seed(3))
    longer = {**values, "attention_mask": torch.ones(1, 9, dtype=torch.long)}
    percent = 0.3
    positive = [
        [short, {**values, "start_percent": 0.0, "end_percent": percent}],
        [long, {**longer, "start_percent": percent, "end_percent": 1.0}],
    ]
    sample(ours, sigmas=SIGMAS, positive=positive, cfg=1.0)
    calls = 1 if scope != "spatial attention" else 3
    # The first of each text, and the last step.
    assert record(ours)["declined"] == {"FULL_STEP": 2 * calls, "LAST_STEP": calls}
    assert record(ours)["taken"] == 5 * calls


def test_another_model_is_stock(frozen, record, pack, monkeypatch):
    ltx, model = pack("patches.layouts.ltx"), build_model()
    expected = sample(model, sigmas=SIGMAS)
    monkeypatch.setattr(ltx, "CLASS_NAMES", set())
    ours = frozen(model)
    assert equal(sample(ours, sigmas=SIGMAS), expected)
    assert record(ours)["declined"] == {"UNKNOWN_MODEL": 8} and not record(ours)["taken"]
