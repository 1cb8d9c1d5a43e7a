"""Both stages of a strided clip through core's samplers: what the templates wire, number for number."""

from __future__ import annotations

import comfy.nested_tensor
import comfy.samplers
import pytest
import torch
from reference import close, equal
from tiny_models import FORMS, build_model, conditioning, noise_like

core = pytest.importorskip(
    "comfy_extras.nodes_custom_sampler", reason="this tree has no sampler nodes", exc_type=ImportError
)

SHAPE = (9, 2, 3)
SIGMAS = torch.linspace(1, 0, 7)
SWITCH = 4


def sampled(model, family, rate, latent, sigmas, seed):
    """(output, denoised_output) of SamplerCustomAdvanced."""
    guider = comfy.samplers.CFGGuider(model)
    guider.set_conds(conditioning(family, frame_rate=rate), conditioning(family, seed=7, frame_rate=rate))
    guider.set_cfg(2.0)
    sampler = comfy.samplers.sampler_object("euler")
    noise = core.Noise_RandomNoise(seed)
    return core.SamplerCustomAdvanced.execute(noise, guider, sampler, sigmas, latent).args


def parts(latent):
    samples = latent["samples"]
    return list(samples.unbind()) if samples.is_nested else [samples]


@pytest.mark.parametrize("family", FORMS)
@pytest.mark.parametrize("is_finished", [False, True], ids=["coarse to fine", "refined"])
def test_both_stages_are_stock_at_their_own_rate(family, is_finished, pack):
    """One MODEL: the first stage is the stock graph at the low rate, the second the stock graph at the full one."""
    nodes = pack("nodes")
    model = build_model(family)
    empty = noise_like(family, SHAPE)
    zeros = [torch.zeros_like(part) for part in (empty.unbind() if empty.is_nested else [empty])]

    def latent_of(video):
        samples = comfy.nested_tensor.NestedTensor([video, *zeros[1:]]) if zeros[1:] else video
        return {"samples": samples}

    ours, strided, *_ = nodes.KeyframeStride.execute(model, latent_of(zeros[0]), 2, 24.0).args
    first = SIGMAS if is_finished else SIGMAS[: SWITCH + 1]
    second = SIGMAS[SWITCH:]
    output, denoised = sampled(ours, family, 24.0, strided, first, 1)
    by_hand = sampled(model, family, 12.0, latent_of(torch.zeros(1, 128, 5, *SHAPE[1:])), first, 1)
    assert equal(parts(output), parts(by_hand[0])) and equal(parts(denoised), parts(by_hand[1]))
    assert is_finished == close(parts(output), parts(denoised), 1e-4)

    handed_on = output if is_finished else denoised
    filled = nodes.LatentFlowInterpolate.execute(handed_on, "linear").args[0]
    assert parts(filled)[0].shape[2] == 9 and equal(parts(filled)[1:], parts(handed_on)[1:])
    plain = {"samples": filled["samples"]}
    result = sampled(ours, family, 24.0, filled, second, 2)[0]
    assert equal(parts(result), parts(sampled(model, family, 24.0, plain, second, 2)[0]))
    assert not equal(parts(result), parts(sampled(model, family, 12.0, plain, second, 2)[0]))
    records = pack("patches.mount").journal_of(ours).records()
    mine, theirs = (record["techniques"]["keyframe stride"] for record in records[-2:])
    assert mine["taken"] and not mine["declined"]
    assert not theirs["taken"] and theirs["declined"].keys() == {"FULL_LENGTH"}
