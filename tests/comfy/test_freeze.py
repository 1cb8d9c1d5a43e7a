"""ScheduleSpatialFreeze on real models, ModelPatchers and samplers."""

from __future__ import annotations

import gc
import logging
import weakref

import comfy.context_windows
import comfy.sample
import comfy.samplers
import pytest
import torch
from reference import SLOT, close, equal, freezing_model, set_slot
from tiny_models import (
    CUT,
    FAMILIES,
    build_model,
    conditioning,
    context_windows,
    noise_like,
    sample,
    sample_with,
    zeros_like,
)
from torch.utils.flop_counter import FlopCounterMode

SIGMAS = torch.linspace(1, 0, 9)
SCOPES = ("per-frame work", "whole blocks")
EVERY = ("spatial attention", *SCOPES)


@pytest.fixture(scope="session")
def frozen(pack):
    node = pack("nodes").ScheduleSpatialFreeze
    defaults = {"start_percent": 0.0, "end_percent": 1.0, "refresh_every": 3, "scope": "whole blocks"}
    return lambda model, **settings: node.execute(model, **{**defaults, **settings}).args[0]


@pytest.fixture(scope="session")
def record(pack):
    journal_of = pack("patches.mount").journal_of
    return lambda model: journal_of(model).records()[-1]["techniques"]["spatial freeze"]


class Counted:
    """Calls of one sub-module of every block, by the step they came in."""

    def __init__(self, model, path):
        self.steps, self.step = [], None
        for block in model.model.diffusion_model.transformer_blocks:
            block.get_submodule(path).register_forward_pre_hook(lambda *_: self.steps.append(self.step))

    def watch(self, model):
        clone = model.clone()

        def note(executor, x, t, *args, **kwargs):
            sigma = float(args[3]["sigmas"][0])
            self.step = min(range(8), key=lambda i: abs(float(SIGMAS[i]) - sigma))
            return executor(x, t, *args, **kwargs)

        clone.add_wrapper_with_key("apply_model", "counter", note)
        return clone

    def by_step(self):
        return [self.steps.count(step) for step in range(8)]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("forecast", ["hold", "linear"])
@pytest.mark.parametrize("cfg", [1.0, 2.0])
def test_equals_a_reference_that_stores_and_adds_again(family, scope, forecast, cfg, frozen, record):
    model = build_model(family)
    ours = frozen(model, scope=scope, forecast=forecast)
    result = sample(ours, family, sigmas=SIGMAS, cfg=cfg)
    full = (0, 3, 6, 7)
    reference = freezing_model(model, scope, full, forecast == "linear", SIGMAS.tolist())
    assert close(result, sample(reference, family, sigmas=SIGMAS, cfg=cfg), 1e-4)
    assert not close(result, sample(model, family, sigmas=SIGMAS, cfg=cfg)), "the freeze has no effect"
    assert record(ours)["steps"] == [1, 2, 4, 5]
    assert record(ours)["taken"] == 4
    assert record(ours)["declined"] == {"FULL_STEP": 3, "LAST_STEP": 1}


@pytest.mark.parametrize("forecast", ["hold", "linear"])
def test_a_range_in_the_middle(forecast, frozen, record):
    """The first step in it is full; a forecast may look back to the step before it."""
    model = build_model()
    start = build_model().model.model_sampling
    clock_range = {"start_percent": 0.1, "end_percent": 0.95}
    within = [
        i for i in range(8)
        if start.percent_to_sigma(0.95) <= float(SIGMAS[i]) <= start.percent_to_sigma(0.1)
    ]  # fmt: skip
    assert 3 < len(within) < 8
    ours = frozen(model, refresh_every=2, forecast=forecast, **clock_range)
    result = sample(ours, sigmas=SIGMAS)
    stale = [i for place, i in enumerate(within) if place % 2 and i != 7]
    assert record(ours)["steps"] == stale and record(ours)["taken"] == len(stale)
    full = [i for i in range(8) if i not in stale and (i >= within[0] - (forecast == "linear"))]
    reference = freezing_model(model, "whole blocks", full, forecast == "linear", SIGMAS.tolist())
    assert close(result, sample(reference, sigmas=SIGMAS), 1e-4)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("scope", EVERY)
def test_neutral_settings_are_stock(family, scope, frozen):
    model = build_model(family)
    for neutral in ({"refresh_every": 1}, {"start_percent": 0.5, "end_percent": 0.5}, {"start_percent": 0.9, "end_percent": 0.1}):  # fmt: skip
        assert frozen(model, scope=scope, **neutral) is model
        again = frozen(frozen(model, scope=scope), scope=scope, **neutral)
        assert equal(sample(again, family), sample(model, family))


@pytest.mark.parametrize(
    ("scope", "path", "expected"),
    [
        ("whole blocks", "attn1.to_q", [3, 0, 0, 3, 0, 0, 3, 3]),
        ("whole blocks", "audio_ff.net.0.proj", [3] * 8),
        ("whole blocks", "audio_to_video_attn.to_q", [3, 0, 0, 3, 0, 0, 3, 3]),
        ("per-frame work", "ff.net.0.proj", [3, 0, 0, 3, 0, 0, 3, 3]),
        ("per-frame work", "attn2.to_q", [3, 0, 0, 3, 0, 0, 3, 3]),
        ("per-frame work", "attn1.to_q", [3] * 8),
        ("per-frame work", "audio_attn2.to_q", [3] * 8),
    ],
)
def test_what_is_not_called(scope, path, expected, frozen):
    model = build_model("ltxav")
    counted = Counted(model, path)
    sample(counted.watch(frozen(model, scope=scope)), "ltxav", sigmas=SIGMAS)
    assert counted.by_step() == expected


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("scope", EVERY)
def test_the_work_is_really_not_done(family, scope, frozen, record):
    model = build_model(family)
    grid = noise_like(family, (4, 2, 3))

    def flops(patcher):
        with FlopCounterMode(display=False) as counter:
            sample(patcher, family, noise=grid, sigmas=SIGMAS, cfg=1.0)
        return counter.get_total_flops()

    dense, ours = flops(model), flops(frozen(model, scope=scope, refresh_every=16))
    if scope != "spatial attention":
        assert ours < dense * {"whole blocks": 0.75, "per-frame work": 0.85}[scope]


def test_blocks_kept(frozen):
    model = build_model(blocks=4)
    counted = Counted(model, "attn1.to_q")
    sample(counted.watch(frozen(model, blocks_kept=1)), sigmas=SIGMAS)
    assert counted.by_step() == [4, 2, 2, 4, 2, 2, 4, 4]


@pytest.mark.parametrize("scope", SCOPES)
def test_all_blocks_kept(scope, frozen, record):
    model = build_model()
    ours = frozen(model, scope=scope, blocks_kept=2)
    assert equal(sample(ours, sigmas=SIGMAS), sample(model, sigmas=SIGMAS))
    assert record(ours)["declined"] == {"KEPT_BLOCK": 8}


def test_a_frozen_run_of_blocks_keeps_one_tensor(frozen, pack):
    ours = frozen(build_model(blocks=4), forecast="hold")
    sample(ours, sigmas=SIGMAS, cfg=1.0)
    kept = pack("patches.mount").journal_of(ours).records()[-1]["cache_gib"]
    # 9 frames of 6 tokens, 128 wide, in float32: once, not once a block.
    assert sum(kept.values()) * 2**30 == 54 * 128 * 4


@pytest.mark.parametrize("scope", EVERY)
@pytest.mark.parametrize(
    "sampler", ["euler", "heun", "dpm_2", "dpmpp_2m", "euler_ancestral", "res_multistep"]
)
def test_the_step_comes_from_sigma(scope, sampler, frozen, record):
    """A sampler that evaluates a step more than once freezes it as often."""
    model = build_model()
    ours = frozen(model, scope=scope)
    result = sample(ours, sigmas=SIGMAS, sampler=sampler)
    assert record(ours)["taken"] and record(ours)["steps"] == [1, 2, 4, 5]
    assert torch.isfinite(result[0]).all()
    again = sample(ours, sigmas=SIGMAS, sampler=sampler)
    assert equal(result, again)
    if sampler == "heun" and scope == "whole blocks":
        counted = Counted(model, "attn1.to_q")
        sample(counted.watch(ours), sigmas=SIGMAS, sampler=sampler)
        # Step i+1 is evaluated twice, once as the end of step i.
        assert counted.by_step() == [3, 0, 0, 6, 0, 0, 6, 6]


def test_partial_denoise_and_the_stock_ksampler(frozen, record):
    model = build_model()
    ours = frozen(model)
    for sigmas in (torch.linspace(0.909, 0, 7), torch.linspace(0.4, 0, 7)):
        sample(ours, sigmas=sigmas)
        assert record(ours)["taken"] == len(record(ours)["steps"]) > 0
    noise = noise_like()
    for denoise in (1.0, 0.5):
        comfy.sample.sample(
            ours, noise, 6, 2.0, "euler", "simple", conditioning(), conditioning(seed=7), zeros_like(noise),
            denoise=denoise, disable_pbar=True, seed=3,
        )  # fmt: skip
        assert record(ours)["taken"] == len(record(ours)["steps"]) > 0


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
    assert equal(sample(one, sigmas=SIGMAS), sample(other, sigmas=SIGMAS))


def test_a_sampler_that_jumps_back_in_sigma(frozen, record):
    model = build_model()
    ours = frozen(model)

    def jumping(guided, x, sigmas, extra_args=None, callback=None, disable=None):
        ones = x.new_ones([x.shape[0]])
        for sigma in [*sigmas[:4], *sigmas[1:-1]]:
            denoised = guided(x, sigma * ones, **extra_args)
            x = x + (denoised - x) * 0.1
        return x

    guider = comfy.samplers.CFGGuider(ours)
    sampler = comfy.samplers.KSAMPLER(jumping)
    guider.set_conds(conditioning(), conditioning(seed=7))
    guider.set_cfg(2.0)
    noise = noise_like()
    guider.sample(noise, zeros_like(noise), sampler, SIGMAS, disable_pbar=True, seed=3)
    assert record(ours)["declined"]["SIGMA_ROSE"] == 1 and record(ours)["taken"]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("scope", EVERY)
def test_a_cond_evaluated_twice_and_perturbed(family, scope, frozen, record):
    """Each pass keeps its own; a perturbed one is computed in full, and counts calls inside blocks as ever."""
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
    assert record(ours)["declined"]["PERTURBED"] == 3 * calls
    assert record(ours)["taken"] == 2 * calls


@pytest.mark.parametrize("family", CUT)
def test_context_windows_that_stay_and_that_move(family, frozen, record, pack):
    model, noise = build_model(family), noise_like(family, (15, 2, 2))
    still = frozen(context_windows(model))
    sample(still, family, noise=noise, sigmas=SIGMAS)
    assert record(still)["taken"] == 4 * 3 and "WINDOW_MOVED" not in record(still)["declined"]

    moving = context_windows(model)
    handler = moving.model_options["context_handler"]
    windows = comfy.context_windows
    handler.context_schedule = windows.get_matching_context_schedule(
        windows.ContextSchedules.UNIFORM_STANDARD
    )
    ours = frozen(moving)
    result = sample(ours, family, noise=noise, sigmas=SIGMAS)
    assert record(ours)["declined"]["WINDOW_MOVED"] and result
    kept = pack("patches.mount").journal_of(ours).records()[-1]["cache_gib"]
    still_kept = pack("patches.mount").journal_of(still).records()[-1]["cache_gib"]
    assert sum(kept.values()) <= 2 * sum(still_kept.values())


def test_conds_that_are_batched_otherwise_from_some_step_on(frozen, record, pack, monkeypatch):
    """As core does when memory runs short: a full step then, and what the batch had left is let go."""
    model = build_model()
    ours = frozen(model, forecast="hold")
    whole = sample(ours, sigmas=SIGMAS)
    kept = pack("patches.mount").journal_of(ours).records()[-1]["cache_gib"]
    required, sizes = model.model.memory_required, []

    def memory_required(shape, *args, **kwargs):
        sizes.append(1)
        return 1e30 if len(sizes) > 4 else required(shape, *args, **kwargs)

    monkeypatch.setattr(model.model, "memory_required", memory_required)
    result = sample(ours, sigmas=SIGMAS)
    assert result[0].shape == whole[0].shape and record(ours)["taken"]
    split = pack("patches.mount").journal_of(ours).records()[-1]["cache_gib"]
    assert sum(split.values()) <= 2 * sum(kept.values())


@pytest.mark.parametrize("scope", EVERY)
def test_no_room(scope, frozen, record):
    model = build_model()
    ours = frozen(model, scope=scope, cache_limit_gb=1e-8)
    assert equal(sample(ours, sigmas=SIGMAS), sample(model, sigmas=SIGMAS))
    assert record(ours)["declined"]["CACHE_FULL"] and not record(ours)["taken"]


def test_memory_that_is_gone_when_it_is_asked_for(frozen, record, pack, monkeypatch):
    cache, empty = pack("patches.cache"), torch.empty_like

    def failing(tensor, **kwargs):
        if kwargs.get("memory_format") is torch.contiguous_format:
            raise torch.OutOfMemoryError("no memory")
        return empty(tensor, **kwargs)

    monkeypatch.setattr(cache.torch, "empty_like", failing)
    model = build_model()
    ours = frozen(model)
    assert equal(sample(ours, sigmas=SIGMAS), sample(model, sigmas=SIGMAS))
    assert record(ours)["declined"]["CACHE_FULL"] and not record(ours)["taken"]


@pytest.mark.parametrize("scope", EVERY)
def test_fp8_takes_less_and_comes_near(scope, frozen, record, pack):
    model = build_model()
    exact, packed = frozen(model, scope=scope), frozen(model, scope=scope, cache_dtype="fp8_e4m3fn")
    stock, wanted, result = (sample(one, sigmas=SIGMAS) for one in (model, exact, packed))
    assert record(packed)["taken"] == record(exact)["taken"]
    assert distance(result, wanted) < 0.5 * distance(stock, wanted)
    assert not equal(result, wanted)
    taken = [
        sum(pack("patches.mount").journal_of(one).records()[-1]["cache_gib"].values())
        for one in (packed, exact)
    ]
    # The tiny model computes in fp32 with short vectors; the log-sum-exp of a softmax share stays as it is.
    assert taken[0] < 0.45 * taken[1]


def distance(left, right):
    return sum((a - b).square().sum() for a, b in zip(left, right, strict=True)).sqrt().item()


def test_host_memory_is_prepared_before_it_is_needed(frozen, record, pack, monkeypatch):
    cache, asked = pack("patches.cache"), []
    monkeypatch.setattr(cache.Shelf, "make_ready", lambda self, share: asked.append(share))
    ours = frozen(build_model(), start_percent=0.3)
    sample(ours, sigmas=torch.linspace(1, 0, 129))
    # The forecast begins two steps before the first frozen one.
    before = record(ours)["steps"][0] - 2
    assert before > 1 and asked == [(step + 1) / before for step in range(before)]


@pytest.mark.parametrize("precision", ["default", "fp8_e4m3fn"])
@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("family", ["ltxv", "ltxav"])
def test_host_memory_is_prepared_for_what_will_be_kept(family, scope, precision, frozen, pack, monkeypatch):
    mount, cache, shelves = pack("patches.mount"), pack("patches.cache"), []
    monkeypatch.setattr(mount.mm, "is_device_cpu", lambda device: False)
    monkeypatch.setattr(cache.Shelf, "close", lambda self: shelves.append(self))
    ours = frozen(build_model(family), scope=scope, cache_device="cpu", cache_dtype=precision)
    for cfg in (1.0, 2.0):
        sample(ours, family, sigmas=SIGMAS, cfg=cfg)
    one, two = shelves
    assert two.expected == 2 * one.expected
    # Scales come on top of fp8; packed audio, half of the tiny latent, is counted with the video.
    assert (0.75 if family == "ltxv" else 0.4) * one.expected <= one.most["cpu"] <= 1.25 * one.expected


def test_room_for_some_blocks(frozen, record):
    model = build_model("ltxav")
    counted = Counted(model, "attn1.to_q")
    ours = frozen(model, forecast="hold", cache_limit_gb=2 * 54 * 128 * 4 / 2**30)
    sample(counted.watch(ours), "ltxav", sigmas=SIGMAS, cfg=1.0)
    assert counted.by_step() == [3, 1, 1, 3, 1, 1, 3, 3]
    assert record(ours)["declined"]["CACHE_FULL"] and record(ours)["taken"] == 4


def test_a_range_that_freezes_nothing_names_what_would(frozen, record, caplog):
    sigmas = torch.tensor([1.0, 0.99375, 0.9875, 0.98125, 0.975, 0.909, 0.725, 0.422, 0.0])
    model = build_model()
    with caplog.at_level(logging.WARNING):
        result = sample(frozen(model, start_percent=0.6), sigmas=sigmas)
    warnings = [r.getMessage() for r in caplog.records if "freezes none" in r.getMessage()]
    assert len(warnings) == 1 and equal(result, sample(model, sigmas=sigmas))
    name, value = warnings[0].split("nearest that does: ")[1].rstrip(".").split(" ")
    again = frozen(model, **{"start_percent": 0.6, name: float(value)})
    sample(again, sigmas=sigmas)
    assert record(again)["taken"]


@pytest.mark.parametrize("scope", EVERY)
@pytest.mark.parametrize("error", [comfy.model_management.InterruptProcessingException, RuntimeError])
def test_an_error_in_a_frozen_step_leaves_no_tensor(scope, error, frozen, pack, monkeypatch):
    cache = pack("patches.cache")
    tensors = []
    keep = cache.Shelf.keep

    def watching(self, *args):
        kept = keep(self, *args)
        tensors.extend(weakref.ref(buffer) for buffer in kept.buffers)
        return kept

    monkeypatch.setattr(cache.Shelf, "keep", watching)
    model = build_model()
    ours = frozen(model, scope=scope)
    expected = sample(ours, sigmas=SIGMAS)
    gc.collect()
    assert tensors and all(ref() is None for ref in tensors)
    broken = ours.clone()

    def fail(executor, *args, **kwargs):
        options = next(a for a in args if isinstance(a, dict))
        if options.get("frame_thrift_frozen"):
            raise error("stop")
        return executor(*args, **kwargs)

    broken.add_wrapper_with_key("diffusion_model", "failing", fail)
    with pytest.raises(error):
        sample(broken, sigmas=SIGMAS)
    gc.collect()
    assert all(ref() is None for ref in tensors)
    for module in model.model.diffusion_model.modules():
        assert "forward" not in vars(module)
    assert equal(sample(ours, sigmas=SIGMAS), expected)


@pytest.mark.parametrize("scope", EVERY)
def test_torch_compile(scope, frozen, record):
    from comfy_api.torch_helpers import set_torch_compile_wrapper

    model = frozen(build_model(blocks=2), scope=scope)
    plain = sample(model, sigmas=SIGMAS)
    compiled = model.clone()
    set_torch_compile_wrapper(compiled, backend="eager")
    result = sample(compiled, sigmas=SIGMAS)
    assert record(compiled)["taken"] and close(result, plain)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("scope", EVERY)
def test_with_the_window_in_any_order(family, scope, frozen, windowed):
    model = build_model(family)
    one, other = windowed(frozen(model, scope=scope)), frozen(windowed(model), scope=scope)
    assert equal(sample(one, family, sigmas=SIGMAS), sample(other, family, sigmas=SIGMAS))


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


class TestSpatialAttention:
    def reference(self, model, full):
        """Own-frame logits' sum and output of the last full step, others fresh; in float64, written by hand."""
        clone, held, now = model.clone(), {}, {"calls": 0}
        own = torch.eye(9, dtype=torch.bool).repeat_interleave(6, 0).repeat_interleave(6, 1)

        def override(func, q, k, v, heads, *args, **kwargs):
            if q.shape[1] != k.shape[1]:
                return func(q, k, v, heads, *args, **kwargs)
            sigma = float(kwargs["transformer_options"]["sigmas"][0])
            step = min(range(8), key=lambda i: abs(float(SIGMAS[i]) - sigma))
            block = now["calls"] % 3
            now["calls"] += 1
            x, y, z = (t.double().unflatten(-1, (heads, -1)).transpose(1, 2) for t in (q, k, v))
            weights = (x @ y.transpose(-1, -2) * x.shape[-1] ** -0.5).exp()
            inside, outside = weights * own, weights * ~own
            fresh = (inside @ z, inside.sum(-1, keepdim=True))
            if step in full:
                held[block] = fresh
            top, bottom = held.get(block, fresh)
            out = (top + outside @ z) / (bottom + outside.sum(-1, keepdim=True))
            return out.transpose(1, 2).flatten(2).to(q.dtype)

        clone.model_options.setdefault("transformer_options", {})[SLOT] = override
        return clone

    def test_equals_a_reference(self, frozen, record):
        model = build_model()
        ours = frozen(model, scope="spatial attention", forecast="hold")
        result = sample(ours, sigmas=SIGMAS, cfg=1.0)
        assert close(result, sample(self.reference(model, (0, 3, 6, 7)), sigmas=SIGMAS, cfg=1.0), 1e-3)
        assert not close(result, sample(model, sigmas=SIGMAS, cfg=1.0), 1e-3)
        assert record(ours)["taken"] == 4 * 3

    def test_declines(self, frozen, record, windowed, pack, monkeypatch):
        model = build_model()

        def passing(func, *args, **kwargs):
            return func(*args, **kwargs)

        ours = frozen(set_slot(model, passing), scope="spatial attention")
        assert equal(sample(ours, sigmas=SIGMAS), sample(model, sigmas=SIGMAS))
        assert record(ours)["declined"]["FOREIGN_OVERRIDE"] == 24 and not record(ours)["taken"]

        both = windowed(frozen(model, scope="spatial attention"))
        assert equal(sample(both, sigmas=SIGMAS), sample(windowed(model), sigmas=SIGMAS))
        assert record(both)["declined"]["OTHER_TECHNIQUE"] == 24

        one = frozen(model, scope="spatial attention")
        noise = noise_like(shape=(1, 2, 3))
        assert equal(sample(one, noise=noise, sigmas=SIGMAS), sample(model, noise=noise, sigmas=SIGMAS))
        assert record(one)["declined"] == {"ONE_FRAME": 24}

        values = {"keyframe_idxs": torch.zeros(1, 3, 6, 2)}
        conds = {"positive": conditioning(**values), "negative": conditioning(seed=7, **values)}
        mask = torch.ones(1, 1, 9, 1, 1)
        guided = frozen(model, scope="spatial attention")
        sample(guided, sigmas=SIGMAS, noise_mask=mask, **conds)
        assert record(guided)["taken"] == 12, "guides are tokens behind the frames"

        kept = frozen(model, scope="spatial attention", blocks_kept=2)
        assert equal(sample(kept, sigmas=SIGMAS), sample(model, sigmas=SIGMAS))
        assert record(kept)["declined"] == {"KEPT_BLOCK": 24}

        monkeypatch.setattr(pack("patches.freeze"), "has_lse", lambda *_: False)
        none = frozen(model, scope="spatial attention")
        assert equal(sample(none, sigmas=SIGMAS), sample(model, sigmas=SIGMAS))
        assert record(none)["declined"] == {"NO_LSE": 24}


@pytest.mark.parametrize(
    "bad",
    [{"refresh_every": 0}, {"refresh_every": 17}, {"scope": "all"}, {"forecast": "none"}, {"blocks_kept": -1}, {"cache_device": "disk"}, {"cache_limit_gb": -1}, {"start_percent": 2}],
)  # fmt: skip
def test_nonsense_is_rejected_by_name(bad, frozen):
    with pytest.raises(ValueError, match=next(iter(bad))):
        frozen(build_model(), **bad)


@pytest.mark.parametrize("scope", SCOPES)
def test_a_model_called_without_a_sampler_is_stock(scope, frozen):
    model = build_model()

    def call(patcher):
        options = {**patcher.model_options.get("transformer_options", {}), "wrappers": patcher.wrappers}
        mask = torch.ones(1, 5, dtype=torch.long)
        context = torch.randn(1, 5, 16, generator=torch.Generator().manual_seed(0))
        return patcher.model.apply_model(
            noise_like(), torch.ones(1), c_crossattn=context, transformer_options=options, attention_mask=mask,
            frame_rate=24.0,
        )  # fmt: skip

    with torch.no_grad():
        assert torch.equal(call(frozen(model, scope=scope)), call(model))
