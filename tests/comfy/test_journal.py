"""The record of a run: what it says of itself, of each step, and of what it has put out."""

from __future__ import annotations

import json

import comfy.model_management
import comfy.nested_tensor
import comfy.samplers
import pytest
import torch
from freezing import SIGMAS
from tiny_models import FAMILIES, build_model, conditioning, noise_like, sample, zeros_like


@pytest.fixture
def records(pack):
    return lambda model: pack("patches.mount").journal_of(model).records()


def sampled(model, family, sigmas=SIGMAS, **latent):
    """(output, denoised_output) of ComfyUI's own SamplerCustomAdvanced, where its tree has nodes."""
    module = pytest.importorskip("comfy_extras.nodes_custom_sampler", exc_type=ImportError)
    guider = comfy.samplers.CFGGuider(model)
    guider.set_conds(conditioning(family), conditioning(family, seed=7))
    guider.set_cfg(2.0)

    class Noise:
        seed = 3

        def generate_noise(self, latent):
            return noise_like(family)

    sampler = comfy.samplers.sampler_object("euler_ancestral")
    latent = {"samples": zeros_like(noise_like(family)), **latent}
    out = module.SamplerCustomAdvanced.execute(Noise(), guider, sampler, sigmas, latent)
    return [part["samples"] for part in out.args]


def parts(latent):
    return list(latent.unbind()) if latent.is_nested else [latent]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("has_mask", [False, True])
@pytest.mark.parametrize("sigmas", [SIGMAS, SIGMAS[:4]], ids=["whole", "piece"])
def test_fingerprints_are_of_what_lands_in_the_latent(family, has_mask, sigmas, windowed, records, pack):
    fingerprints, ours = pack("patches.journal").fingerprints, windowed(build_model(family))
    mask = torch.ones(1, 1, 9, 2, 3)
    mask[:, :, 0] = 0
    output, denoised = sampled(ours, family, sigmas, **({"noise_mask": mask} if has_mask else {}))
    assert records(ours)[-1]["techniques"]["temporal window"]["taken"] == 3 * (len(sigmas) - 1)
    told = records(ours)[-1]["output"]
    assert told == {"samples": fingerprints(parts(output)), "x0": fingerprints(parts(denoised))}
    assert len(told["samples"]) == (2 if family == "ltxav" else 1)
    assert len(sigmas) == 9 or told["samples"] != told["x0"]


def test_a_fingerprint_tells_bits_shapes_and_types_apart(pack):
    fingerprint = pack("patches.journal").fingerprint
    one = torch.arange(24.0).reshape(2, 3, 4)
    other = one.clone()
    other[0, 0, 0] = -0.0
    assert fingerprint(one) == fingerprint(one.clone()) == fingerprint(one.mT.contiguous().mT)
    different = [one, other, one.reshape(3, 2, 4), one.to(torch.float16), one.to(torch.bfloat16), one.mT]
    assert len({fingerprint(each) for each in different}) == len(different)


def test_a_run_says_which_it_was_and_what_became_of_each_step(windowed, frozen, records):
    ours = frozen(windowed(build_model(), start_percent=0.6), start_percent=0.6)
    for _ in range(2):
        sample(ours, sigmas=SIGMAS)
    one, other = records(ours)
    assert one["id"] != other["id"] and one["output"] == other["output"]
    json.dumps(one)
    assert [step["step"] for step in one["by_step"]] == list(range(8))
    assert [step["sigma"] for step in one["by_step"]] == pytest.approx(SIGMAS[:-1].tolist())
    assert all(0 < step["seconds"] < 60 for step in one["by_step"])
    for name, entry in one["techniques"].items():
        outcomes = [step["outcomes"][name] for step in one["by_step"]]
        assert sum(outcome["taken"] for outcome in outcomes) == entry["taken"] > 0
        assert [index for index, outcome in enumerate(outcomes) if outcome["taken"]] == [
            step for step in entry["steps"] if name != "temporal window" or step not in frozen_steps(one)
        ]
    assert one["techniques"]["spatial freeze"]["settings"]["refresh_every"] == 3
    assert one["techniques"]["temporal window"]["settings"]["schedule"]["start_percent"] == 0.6
    assert one["memory"] == {}, "PyTorch counts no memory on a CPU"


def frozen_steps(record):
    return record["techniques"]["spatial freeze"]["steps"]


@pytest.mark.parametrize("scope", ["whole blocks", "per-frame work"])
def test_the_share_of_work_is_that_of_the_parts_that_were_left_out(scope, frozen, records):
    """Eight forwards alike, half of them without the work of all blocks, or of their text attention and feed-forward."""
    ours = frozen(build_model(), scope=scope)
    sample(ours, sigmas=SIGMAS, cfg=1.0)
    share = records(ours)[-1]["work_share"]
    assert share == pytest.approx(0.5) if scope == "whole blocks" else 0.5 < share < 0.8


def test_an_interrupted_run_has_a_record_without_output(windowed, records):
    ours = windowed(build_model())

    def stop(step, x0, x, total):
        if step == 1:
            raise comfy.model_management.InterruptProcessingException

    with pytest.raises(comfy.model_management.InterruptProcessingException):
        sample(ours, callback=stop)
    told = records(ours)[-1]
    assert not told["finished"] and told["output"] == {} and len(told["by_step"]) == told["forwards"] == 2


def test_a_callback_of_the_sampler_still_comes(windowed, last_run):
    seen, ours = [], windowed(build_model())
    sample(ours, callback=lambda step, x0, x, total: seen.append((step, x0.shape, total)))
    assert last_run(ours)["taken"] == 9
    assert seen == [(step, (1, 128, 9, 2, 3), 3) for step in range(3)]
