"""What ScheduleSpatialFreeze keeps: how much, where, and that nothing stays."""

from __future__ import annotations

import gc
import logging
import weakref

import comfy.context_windows
import comfy.sample
import comfy.samplers
import pytest
import torch
from freezing import EVERY, SIGMAS, Counted
from reference import equal
from tiny_models import (
    FAMILIES,
    build_model,
    sample,
)


@pytest.fixture
def buffers(pack, monkeypatch):
    """Weak references to every buffer that a run of this test has kept something in."""
    module, found = pack("patches.reuse.store"), []
    store = module.Store.store

    def watching(self, *args):
        stored = store(self, *args)
        found.extend(weakref.ref(buffer) for buffer in stored.buffers)
        return stored

    monkeypatch.setattr(module.Store, "store", watching)
    return found


@pytest.mark.parametrize("scope", EVERY)
def test_no_room(scope, frozen, record):
    model = build_model()
    ours = frozen(model, scope=scope, cache_limit_gb=1e-8)
    assert equal(sample(ours, sigmas=SIGMAS), sample(model, sigmas=SIGMAS))
    assert record(ours)["declined"]["CACHE_FULL"] and not record(ours)["taken"]


def test_memory_that_is_gone_when_it_is_asked_for(frozen, record, pack, monkeypatch):
    store, empty = pack("patches.reuse.store"), torch.empty_like

    def failing(tensor, **kwargs):
        if kwargs.get("memory_format") is torch.contiguous_format:
            raise torch.OutOfMemoryError("no memory")
        return empty(tensor, **kwargs)

    monkeypatch.setattr(store.torch, "empty_like", failing)
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
    taken = [sum(record(one)["cache_gib"].values()) for one in (packed, exact)]
    # The tiny model computes in fp32 with short vectors; the log-sum-exp of a softmax share stays as it is.
    assert taken[0] < 0.45 * taken[1]


def distance(left, right):
    return sum((a - b).square().sum() for a, b in zip(left, right, strict=True)).sqrt().item()


def test_host_memory_is_prepared_before_it_is_needed(frozen, record, pack, monkeypatch):
    store, asked = pack("patches.reuse.store"), []
    monkeypatch.setattr(store.Store, "make_ready", lambda self, share, piece: asked.append((share, piece)))
    ours = frozen(build_model(), start_percent=0.3)
    sample(ours, sigmas=torch.linspace(1, 0, 129))
    # The forecast begins two steps before the first frozen one.
    before = record(ours)["steps"][0] - 2
    assert before > 1 and asked == [
        # Two conds in a batch, of 9 frames of 6 tokens, 128 wide, in float32.
        ((step + 1) / before, 2 * 54 * 128 * 4)
        for step in range(before)
    ]


@pytest.mark.parametrize("precision", ["default", "fp8_e4m3fn"])
@pytest.mark.parametrize("scope", EVERY)
@pytest.mark.parametrize("family", ["ltxv", "ltxav"])
def test_host_memory_is_prepared_for_what_will_be_kept(family, scope, precision, frozen, pack, monkeypatch):
    wrappers, store, stores = pack("patches.wrappers"), pack("patches.reuse.store"), []
    monkeypatch.setattr(wrappers.mm, "is_device_cpu", lambda device: False)
    monkeypatch.setattr(store.Store, "close", lambda self: stores.append(self))
    ours = frozen(build_model(family), scope=scope, cache_device="cpu", cache_dtype=precision)
    for cfg in (1.0, 2.0):
        sample(ours, family, sigmas=SIGMAS, cfg=cfg)
    one, two = stores
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


@pytest.mark.parametrize("scope", EVERY)
@pytest.mark.parametrize("error", [comfy.model_management.InterruptProcessingException, RuntimeError])
def test_an_error_in_a_frozen_step_leaves_no_tensor(scope, error, frozen, buffers):
    model = build_model()
    ours = frozen(model, scope=scope)
    expected = sample(ours, sigmas=SIGMAS)
    gc.collect()
    assert buffers and all(ref() is None for ref in buffers)
    broken = ours.clone()

    def fail(executor, *args, **kwargs):
        options = next(a for a in args if isinstance(a, dict))
        if abs(float(options["sigmas"][0]) - float(SIGMAS[1])) < 1e-3:
            raise error("stop")
        return executor(*args, **kwargs)

    broken.add_wrapper_with_key("diffusion_model", "failing", fail)
    # ComfyUI keeps the error, and with it every frame that it passed, while it unloads models.
    with pytest.raises(error) as caught:
        sample(broken, sigmas=SIGMAS)
    gc.collect()
    assert caught.tb and all(ref() is None for ref in buffers)
    for module in model.model.diffusion_model.modules():
        assert "forward" not in vars(module)
    assert equal(sample(ours, sigmas=SIGMAS), expected)


def test_conds_that_are_batched_otherwise_from_some_step_on(frozen, record, pack, monkeypatch):
    """As core does when memory runs short: a full step then, and what the batch had left is let go."""
    model = build_model()
    ours = frozen(model, forecast="hold")
    whole = sample(ours, sigmas=SIGMAS)
    kept = pack("patches.mount").journal_of(ours).records()[-1]["techniques"]["spatial freeze"]["cache_gib"]
    required, sizes = model.model.memory_required, []

    def memory_required(shape, *args, **kwargs):
        sizes.append(1)
        return 1e30 if len(sizes) > 4 else required(shape, *args, **kwargs)

    monkeypatch.setattr(model.model, "memory_required", memory_required)
    result = sample(ours, sigmas=SIGMAS)
    assert result[0].shape == whole[0].shape and record(ours)["taken"]
    split = pack("patches.mount").journal_of(ours).records()[-1]["techniques"]["spatial freeze"]["cache_gib"]
    assert sum(split.values()) <= 2 * sum(kept.values())


def test_a_frozen_run_of_blocks_keeps_one_tensor(frozen, pack):
    ours = frozen(build_model(blocks=4), forecast="hold")
    sample(ours, sigmas=SIGMAS, cfg=1.0)
    kept = pack("patches.mount").journal_of(ours).records()[-1]["techniques"]["spatial freeze"]["cache_gib"]
    # 9 frames of 6 tokens, 128 wide, in float32: once, not once a block.
    assert sum(kept.values()) * 2**30 == 54 * 128 * 4


class Failing:
    """Raises out of memory at one call of a method, and counts."""

    def __init__(self, monkeypatch, owner, name, at):
        self.calls, original = 0, getattr(owner, name)

        def failing(*args, **kwargs):
            self.calls += 1
            if self.calls == at:
                raise torch.OutOfMemoryError("CUDA out of memory.")
            return original(*args, **kwargs)

        monkeypatch.setattr(owner, name, failing)


@pytest.mark.parametrize("scope", EVERY)
@pytest.mark.parametrize(
    ("owner", "name", "at"), [("StoredTensor", "tensor", 2), ("StoredTensor", "overwrite", 1)]
)
def test_memory_that_runs_out_in_the_middle_loses_no_run(
    owner, name, at, scope, frozen, record, buffers, pack, monkeypatch, caplog
):
    """In a frozen step, and in a full one that keeps: from there on everything is stock, and that is said."""
    store, model = pack("patches.reuse.store"), build_model("ltxav")
    ours = frozen(model, scope=scope, forecast="hold")
    expected = sample(ours, "ltxav", sigmas=SIGMAS)
    with monkeypatch.context() as patch:
        failing = Failing(patch, getattr(store, owner), name, at)
        with caplog.at_level(logging.WARNING):
            result = sample(ours, "ltxav", sigmas=SIGMAS, cfg=2.0)
    assert failing.calls == at and all(torch.isfinite(part).all() for part in result)
    assert record(ours)["declined"]["OUT_OF_MEMORY"] >= 4
    said = [r.getMessage() for r in caplog.records if "memory ran out" in r.getMessage()]
    assert len(said) == 1 and "cache_device" in said[0] and "CUDA out of memory." in said[0]
    gc.collect()
    assert buffers and all(ref() is None for ref in buffers)
    assert equal(sample(ours, "ltxav", sigmas=SIGMAS), expected)


def test_memory_that_runs_out_without_us_is_an_error_as_ever(frozen, pack):
    """Nothing is kept yet: there is nothing to let go of, and no second try."""
    ours, tries = frozen(build_model()).clone(), []

    def fail(executor, *args, **kwargs):
        tries.append(1)
        raise torch.OutOfMemoryError("CUDA out of memory.")

    ours.add_wrapper_with_key("diffusion_model", "failing", fail)
    with pytest.raises(torch.OutOfMemoryError):
        sample(ours, sigmas=SIGMAS)
    assert len(tries) == pack("patches.mount").journal_of(ours).records()[-1]["forwards"] == 1


@pytest.mark.parametrize("family", FAMILIES)
def test_the_run_goes_on_as_stock_after_memory_ran_out(family, frozen, record, pack, monkeypatch):
    """From the first frozen step on: bit for bit what stock makes."""
    model = build_model(family)
    ours, stock = frozen(model), sample(model, family, sigmas=SIGMAS)
    assert not equal(sample(ours, family, sigmas=SIGMAS), stock)
    Failing(monkeypatch, pack("patches.reuse.store").StoredTensor, "tensor", 1)
    assert equal(sample(ours, family, sigmas=SIGMAS), stock)
    assert record(ours)["declined"]["OUT_OF_MEMORY"] and not record(ours)["taken"]
