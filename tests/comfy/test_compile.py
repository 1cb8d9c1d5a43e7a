"""Beside torch.compile as ComfyUI's and KJNodes' nodes set it up: without any guard on what blocks are told by options."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from laptop import Laptop
from reference import close, equal
from tiny_models import build_model, sample

torch_compile = pytest.importorskip("comfy_api.torch_helpers")

WHOLE = ["diffusion_model"]
BLOCKS = [f"diffusion_model.transformer_blocks.{index}" for index in range(2)]


def compiled(patcher, keys):
    """As comfy_extras/nodes_torch_compile.py does it, with the backend that only traces."""

    def without_options(guards):
        return ["transformer_options" not in guard.name for guard in guards]

    clone = patcher.clone()
    torch_compile.set_torch_compile_wrapper(
        clone, backend="eager", options={"guard_filter_fn": without_options}, keys=keys
    )
    return clone


def files_traced():
    """The files of which torch.compile has made code since it was reset."""
    return {Path(entry.co_filename) for entry in torch._dynamo.utils.get_compilation_metrics()}


@pytest.fixture(autouse=True)
def forgetful():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize(
    ("scope", "keys", "is_ours_first"),
    [
        ("whole blocks", WHOLE, True),
        ("whole blocks", BLOCKS, True),
        ("whole blocks", BLOCKS, False),
        ("per-frame work", BLOCKS, True),
    ],
)
def test_frozen_steps_are_told_to_compiled_blocks(scope, keys, is_ours_first, frozen, record, pack):
    """And what keeps and recalls is no part of what is compiled."""
    model = build_model("ltxav", blocks=2)
    settings = {"scope": scope, "refresh_every": 2}
    eager = sample(frozen(model, **settings), "ltxav", cfg=1.0)
    if is_ours_first:
        ours = compiled(frozen(model, **settings), keys)
    else:
        ours = frozen(compiled(model, keys), **settings)
    result = sample(ours, "ltxav", cfg=1.0)
    assert close(result, eager, 1e-5) and record(ours)["taken"] == 1
    assert not close(result, sample(model, "ltxav", cfg=1.0))
    files = files_traced()
    assert any(file.name == "av_model.py" for file in files)
    assert not [file for file in files if file.is_relative_to(pack.root / "patches")]


@pytest.mark.parametrize("is_ours_first", [True, False])
def test_the_window_in_compiled_blocks_comes_and_goes(is_ours_first, windowed, last_run):
    """In force in some steps only."""
    model = build_model(blocks=2)
    settings = {"start_percent": 0.5}
    eager = sample(windowed(model, **settings), cfg=1.0)
    if is_ours_first:
        ours = compiled(windowed(model, **settings), BLOCKS)
    else:
        ours = windowed(compiled(model, BLOCKS), **settings)
    assert close(sample(ours, cfg=1.0), eager, 1e-5)
    assert last_run(ours)["taken"] and last_run(ours)["declined"].keys() == {"OUTSIDE_RANGE"}
    assert not equal(eager, sample(model, cfg=1.0))


@pytest.mark.parametrize(("is_ours_first", "keys"), [(True, WHOLE), (False, BLOCKS)])
def test_a_compiled_model_is_paced_after_calls_only(is_ours_first, keys, pack):
    """And nothing of the pacing is compiled, nor breaks what is."""
    pacing = pack("patches.techniques.pacing")
    laptop, model = Laptop(), build_model("ltxav", blocks=2)

    @dataclass(frozen=True)
    class Simulated(pacing.GpuPacing):
        def begin(self, run):
            return pacing.Pacing(self, run, lambda device: laptop)

    def paced(patcher):
        return pack("patches.mount").mount(patcher, Simulated(0, max_duty=0.5))

    def work(executor, *args, **kwargs):
        laptop.work(1.0)
        return executor(*args, **kwargs)

    worked = model.clone()
    worked.add_wrapper_with_key("diffusion_model", "work", work)
    expected = sample(compiled(model, keys), "ltxav", cfg=1.0)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    within, ours = [], compiled(paced(worked), keys) if is_ours_first else paced(compiled(worked, keys))
    model.model.diffusion_model.transformer_blocks[1].register_forward_pre_hook(
        lambda block, _: within.append("forward" in vars(block))
    )
    assert equal(sample(ours, "ltxav", cfg=1.0), expected)
    (told,) = (
        pack("patches.mount").journal_of(ours).records()[-1]["techniques"]["GPU pacing"]["devices"].values()
    )
    assert told["paused"] == {"duty": pytest.approx(3.0)} and not any(within)
    assert not [file for file in files_traced() if file.is_relative_to(pack.root / "patches" / "techniques")]


@pytest.mark.parametrize("part", ["the model", "a block", "a block in its place"])
def test_what_is_compiled_is_noticed(part, pack):
    model = build_model(blocks=2).model.diffusion_model
    blocks, is_compiled = model.transformer_blocks, pack("patches.shadow").is_compiled
    assert not is_compiled(model, blocks, {})
    if part == "the model":
        model = torch.compile(model, backend="eager")
    elif part == "a block":
        blocks[1] = torch.compile(blocks[1], backend="eager")
    else:
        blocks[1].compile(backend="eager")
    assert is_compiled(model, blocks, {})
