"""Runs begin and end clean: interrupts, errors, reruns, threads, other samplers around us."""

from __future__ import annotations

import gc
import logging
import threading
import weakref

import comfy.model_management
import comfy.nested_tensor
import comfy.samplers
import pytest
import torch
from reference import close, equal
from tiny_models import FAMILIES, TEXT_TOKENS, build_model, conditioning, noise_like, sample


def is_untouched(model, pack):
    """No shadowed forward, no run object, nothing of ours in the options but the plan."""
    for module in model.model.diffusion_model.modules():
        assert "forward" not in vars(module)
    ours = [key for key in model.model_options["transformer_options"] if key.startswith("frame_thrift")]
    assert ours == [pack("patches.plan").PLAN]
    return True


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("error", [comfy.model_management.InterruptProcessingException, RuntimeError])
def test_interrupt_and_error_leave_nothing_behind(family, error, pack, windowed, caplog):
    model = windowed(build_model(family))
    expected = sample(model, family)

    def stop(step, x0, x, total):
        if step == 1:
            raise error("stop")

    with pytest.raises(error), caplog.at_level(logging.INFO):
        sample(model, family, callback=stop)
    assert "no effect" not in caplog.text
    assert is_untouched(model, pack)
    assert equal(sample(model, family), expected)
    records = pack("patches.mount").journal_of(model).records()
    assert [(record["forwards"], record["finished"]) for record in records] == [
        (3, True),
        (2, False),
        (3, True),
    ]


def test_error_inside_a_block(pack, windowed):
    stock = build_model()
    model = windowed(stock)
    broken = model.clone()

    def fail(*args, **kwargs):
        raise RuntimeError("inside")

    broken.add_object_patch("diffusion_model.transformer_blocks.1.ff.forward", fail)
    with pytest.raises(RuntimeError, match="inside"):
        sample(broken)
    for block in stock.model.diffusion_model.transformer_blocks:
        assert "forward" not in vars(block.attn1)
    assert not close(sample(model), sample(stock))


def test_the_run_and_its_tensors_die_with_the_run(pack, windowed, monkeypatch):
    wrappers = pack("patches.wrappers")
    runs, tensors = [], []

    class Watched(wrappers.Run):
        def __init__(self, *args):
            super().__init__(*args)
            runs.append(weakref.ref(self))

    read_layout = wrappers.read_layout

    def watching(model, x, *args):
        tensors.append(weakref.ref(x))
        return read_layout(model, x, *args)

    monkeypatch.setattr(wrappers, "Run", Watched)
    monkeypatch.setattr(wrappers, "read_layout", watching)
    sample(windowed(build_model()))
    gc.collect()
    assert runs and tensors
    assert all(ref() is None for ref in runs + tensors)


def test_a_model_is_called_without_a_sampler(windowed):
    model = build_model()

    def call(patcher):
        options = {**patcher.model_options.get("transformer_options", {}), "wrappers": patcher.wrappers}
        x = noise_like(shape=(9, 2, 2))
        mask = torch.ones(1, TEXT_TOKENS, dtype=torch.long)
        context = torch.randn(1, TEXT_TOKENS, 16, generator=torch.Generator().manual_seed(0))
        return patcher.model.apply_model(
            x,
            torch.ones(1),
            c_crossattn=context,
            transformer_options=options,
            attention_mask=mask,
            frame_rate=24.0,
        )

    with torch.no_grad():
        assert not torch.equal(call(windowed(model)), call(model))
        assert torch.equal(call(windowed(model, window=4)), call(model))


def test_threads_share_only_the_plan_and_the_journal(pack, windowed):
    """As core's MultiGPU split does: deep clones of the module, one set of options, forwards at the same time."""
    wrappers = pack("patches.wrappers")
    one = windowed(build_model())
    run = wrappers.Run(pack("patches.mount").plan_of(one), (1.0, 0.5, 0.0), lambda percent: 1 - percent)
    modules = [one.model, build_model().model]
    options = {
        **one.model_options["transformer_options"],
        "wrappers": one.wrappers,
        wrappers.RUN: run,
        "sigmas": torch.ones(1),
    }
    mask = torch.ones(1, TEXT_TOKENS, dtype=torch.long)
    context = torch.randn(1, TEXT_TOKENS, 16, generator=torch.Generator().manual_seed(0))
    inputs = [noise_like(seed=seed) for seed in range(2)]

    def forward(index):
        with torch.no_grad():
            return modules[index].apply_model(
                inputs[index], torch.ones(1), c_crossattn=context, transformer_options=dict(options),
                attention_mask=mask, frame_rate=24.0,
            )  # fmt: skip

    expected = [forward(0), forward(1)]
    results = {}

    def work(index):
        results[index] = [forward(index) for _ in range(6)]

    threads = [threading.Thread(target=work, args=(index,)) for index in range(2)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    for index in range(2):
        assert all(torch.equal(out, expected[index]) for out in results[index])
    assert run.record()["techniques"]["temporal window"]["taken"] == 3 * (2 + 12)
    assert run.record()["forwards"] == 14


def test_summary_line_and_record(windowed, pack, caplog):
    model = windowed(build_model(), sink_frames=1, start_percent=0.4)
    with caplog.at_level(logging.INFO):
        sample(model, steps=4)
    lines = [r.getMessage() for r in caplog.records if r.getMessage().startswith("FrameThrift")]
    assert len(lines) == 1
    record = pack("patches.mount").journal_of(model).records()[-1]
    entry = record["techniques"]["temporal window"]
    first = entry["steps"][0] + 1
    assert f"steps {first}–4 of 4; {entry['taken']} attention calls taken" in lines[0]
    assert f"OUTSIDE_RANGE ×{entry['declined']['OUTSIDE_RANGE']}" in lines[0]
    share = record["attention_share"]
    assert f"{share:.0%} of dense" in lines[0] and 0 < share < 1
    assert record["evaluations"] == record["forwards"] == 4


def test_evaluations_that_another_cache_skips_show(windowed, pack):
    model = windowed(build_model())

    def skip(executor, x, timestep, *args, **kwargs):
        return executor(x, timestep, *args, **kwargs) if timestep[0] > 0.9 else x * 0.5

    model.add_wrapper_with_key("predict_noise", "somebody's cache", skip)
    sample(model, steps=4)
    record = pack("patches.mount").journal_of(model).records()[-1]
    assert (record["evaluations"], record["forwards"]) == (4, 1)


def test_split_sigmas_keep_their_place_in_the_schedule(windowed, pack):
    """As SplitSigmas and two-stage graphs do: one MODEL, each run with its own piece of the schedule."""
    model = windowed(build_model(), start_percent=0.4)
    sigmas = torch.linspace(1, 0, 7)
    for piece in (sigmas, sigmas[:4], sigmas[3:]):
        sample(model, sigmas=piece)
    whole, first, second = (
        record["techniques"]["temporal window"]
        for record in pack("patches.mount").journal_of(model).records()
    )
    assert first["steps"] and len(first["steps"]) + len(second["steps"]) == len(whole["steps"])
    assert first["taken"] + second["taken"] == whole["taken"] > 0


def test_a_range_without_steps_is_a_warning_that_names_what_would_work(windowed, caplog):
    model = windowed(build_model(), start_percent=0.5, end_percent=0.6)
    with caplog.at_level(logging.WARNING):
        sample(model, steps=4)
    texts = [r.getMessage() for r in caplog.records if r.levelname == "WARNING"]
    assert len(texts) == 1
    assert "covers none of the 4 steps" in texts[0]
    nearest = texts[0].split("nearest that does: ")[1].rstrip(".")
    name, value = nearest.split(" ")
    value = float(value.rstrip("."))
    settings = {"start_percent": 0.5, "end_percent": 0.6, name: value}
    again = windowed(build_model(), **settings)
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        sample(again, steps=4)
    assert not [r for r in caplog.records if "covers none" in r.getMessage()]


def test_torch_compile_beside_us(windowed, last_run):
    """Core's compile wrapper swaps the module inside our call; the window must act and give the same picture."""
    from comfy_api.torch_helpers import set_torch_compile_wrapper

    model = windowed(build_model(blocks=2))
    plain = sample(model)
    compiled = model.clone()
    set_torch_compile_wrapper(compiled, backend="eager")
    result = sample(compiled)
    assert last_run(compiled)["taken"] == 6
    assert close(result, plain)


class Telling(comfy.samplers.Sampler):
    """Euler's steps, and a callback that is told what it likes."""

    def __init__(self, tell):
        self.tell = tell

    def sample(self, model, sigmas, extra_args, callback, noise, *args, **kwargs):
        x = noise * sigmas[0]
        for step in range(len(sigmas) - 1):
            denoised = model(x, sigmas[step] * x.new_ones([x.shape[0]]), **extra_args)
            callback(step, self.tell(denoised), x, len(sigmas) - 1)
            x = x + (denoised - x) * (1 - sigmas[step + 1] / sigmas[step])
        return x


@pytest.mark.parametrize("tell", [lambda x0: None, lambda x0: [x0], lambda x0: "nothing"])
def test_a_sampler_that_tells_no_x0_loses_no_run(tell, windowed, pack):
    model = windowed(build_model())
    guider = comfy.samplers.CFGGuider(model)
    guider.set_conds(conditioning(), conditioning(seed=7))
    noise, sigmas = noise_like(), torch.linspace(1, 0, 4)
    out = guider.sample(
        noise,
        torch.zeros_like(noise),
        Telling(tell),
        sigmas,
        callback=lambda *_: None,
        disable_pbar=True,
        seed=3,
    )
    assert out.isfinite().all()
    record = pack("patches.mount").journal_of(model).records()[-1]
    assert record["finished"] and len(record["output"]["samples"]) == 1 and "x0" not in record["output"]
    assert record["techniques"]["temporal window"]["taken"] == 9


def test_callbacks_by_keyword_and_latents_of_two_parts(windowed, pack):
    """As other packs call and wrap outer_sample."""
    model, seen = windowed(build_model()), []

    def wrap(executor, noise, latent, sampler, sigmas, mask, callback, *args, **kwargs):
        callback(step=0, x0=noise, x=noise, total_steps=3)
        out = executor(noise, latent, sampler, sigmas, mask, callback, *args, **kwargs)
        return comfy.nested_tensor.NestedTensor((out, out * 2))

    model.add_wrapper_with_key("outer_sample", "others", wrap)
    out = sample(model, callback=lambda step, x0, x, total_steps: seen.append(step))
    assert seen == [0, 0, 1, 2] and len(out) == 2
    record = pack("patches.mount").journal_of(model).records()[-1]
    output = record["output"]
    assert record["techniques"]["temporal window"]["taken"] == 9
    assert output["samples"] == pack("patches.journal").fingerprints(out) and output["x0"]


@pytest.mark.parametrize("family", FAMILIES)
def test_modules_of_others_cost_no_run(family, windowed, frozen, pack):
    """An attention that cannot be priced, as one with q, k and v in one."""
    model = build_model(family)

    class Other(torch.nn.Module):
        def __init__(self, inside):
            super().__init__()
            self.inside = inside

        def forward(self, *args, **kwargs):
            return self.inside(*args, **kwargs)

    expected = sample(windowed(frozen(model)), family)
    for block in model.model.diffusion_model.transformer_blocks:
        block.attn2 = Other(block.attn2)
    ours = windowed(frozen(model))
    assert equal(sample(ours, family), expected)
    record = pack("patches.mount").journal_of(ours).records()[-1]
    assert record["work_share"] is None and all(entry["taken"] for entry in record["techniques"].values())


@pytest.mark.parametrize("start_percent", [0.0, 0.5])
def test_attention_that_is_never_reached_is_said_whatever_else_was_declined(start_percent, windowed, caplog):
    """A function of another pack that calls a kernel past ComfyUI; the window's range begins later by default."""
    model = build_model()
    clone = model.clone()
    for index, block in enumerate(model.model.diffusion_model.transformer_blocks):
        clone.add_object_patch(
            f"diffusion_model.transformer_blocks.{index}.attn1.forward",
            lambda x, *args, module=block.attn1, **kwargs: module.to_out(module.to_v(x)),
        )
    ours = windowed(clone, start_percent=start_percent)
    with caplog.at_level(logging.INFO):
        assert equal(sample(ours), sample(clone))
    said = [r for r in caplog.records if r.getMessage().startswith("FrameThrift")]
    assert [r.levelname for r in said] == ["WARNING"]
    assert "never reached" in said[0].getMessage() and "attn1.forward (×3)" in said[0].getMessage()


@pytest.mark.parametrize("ends", ["normally", "with an error"])
def test_runs_and_their_tensors_need_no_collector(ends, windowed, frozen, pack, monkeypatch):
    wrappers, runs, timesteps = pack("patches.wrappers"), [], []

    class Watched(wrappers.Run):
        def __init__(self, *args):
            super().__init__(*args)
            runs.append(weakref.ref(self))

        def begin_step(self, timestep):
            timesteps.append(weakref.ref(timestep))
            return super().begin_step(timestep)

    def stop(step, x0, x, total):
        if ends != "normally" and step == 1:
            raise RuntimeError("stop")

    monkeypatch.setattr(wrappers, "Run", Watched)
    ours = windowed(frozen(build_model()))
    gc.collect()
    gc.disable()
    try:
        caught = None
        try:
            sample(ours, callback=stop)
        except RuntimeError as error:
            caught = error
        assert runs and timesteps and all(ref() is None for ref in timesteps)
        assert (caught is None) is (ends == "normally")
        assert caught is not None or runs[0]() is None
        forwards = pack("patches.mount").journal_of(ours).records()[-1]["forwards"]
        assert forwards == (3 if ends == "normally" else 2)
    finally:
        gc.enable()


def test_a_window_before_whose_range_blocks_are_frozen(windowed, frozen, pack):
    """Self-attention that was never computed counts neither way, be the window in its range or not."""

    for start_percent in (0.0, 0.85):
        ours = windowed(frozen(build_model()), start_percent=start_percent)
        sample(ours, sigmas=torch.linspace(1, 0, 9), cfg=1.0)
        record = pack("patches.mount").journal_of(ours).records()[-1]
        steps = {name: entry["steps"] for name, entry in record["techniques"].items()}
        full = [step for step in range(8) if step not in steps["spatial freeze"]]
        # Frames see three of nine.
        narrow = [step for step in full if step in steps["temporal window"]]
        assert len(full) == 4 and (len(narrow) == 4) is (start_percent == 0.0) and narrow
        assert record["attention_share"] == pytest.approx(1 - len(narrow) / len(full) * 2 / 3)
