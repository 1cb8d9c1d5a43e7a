"""Guiders of others, by stand-ins."""

from __future__ import annotations

from contextlib import contextmanager

import comfy.ldm.modules.attention as attention
import comfy.model_patcher
import comfy.samplers
from freezing import SIGMAS
from tiny_models import conditioning, noise_like, zeros_like

FLAGGED = 1


class Perturbing(comfy.samplers.CFGGuider):
    """Spatio-temporal guidance as LTXVideo's stg.py does it: a wrapper around every block, and in a flagged one attention
    is exchanged for a function that counts its calls and answers some of them with the values."""

    perturbed_calls = (0,)
    options: dict = {"ptb_index": 0}

    def __init__(self, model, blocks=3):
        super().__init__(model.clone())
        self.is_perturbing, self.seen = False, []
        for index in range(blocks):
            self.model_patcher.set_model_patch_replace(self.wrapper(index), "dit", "double_block", index)

    def wrapper(self, index):
        def wrapped(args, extra):
            if not self.is_perturbing or index != FLAGGED:
                return extra["original_block"](args)
            with self.exchanged():
                return extra["original_block"](args)

        return wrapped

    @contextmanager
    def exchanged(self):
        real, count = attention.optimized_attention, [-1]

        def counting(q, k, v, heads, *args, **kwargs):
            count[0] += 1
            if count[0] in self.perturbed_calls:
                self.seen.append((tuple(q.shape), tuple(k.shape)))
                return v
            return real(q, k, v, heads, *args, **kwargs)

        attention.optimized_attention = counting
        try:
            yield
        finally:
            attention.optimized_attention = real

    def evaluate(self, cond, x, timestep, model_options, **changes):
        options = comfy.model_patcher.create_model_options_clone(model_options)
        options["transformer_options"] |= changes
        return comfy.samplers.calc_cond_batch(self.inner_model, [self.conds[cond]], x, timestep, options)[0]

    def predict_noise(self, x, timestep, model_options, seed=None):
        positive = self.evaluate("positive", x, timestep, model_options)
        negative = self.evaluate("negative", x, timestep, model_options)
        self.is_perturbing = True
        perturbed = self.evaluate("positive", x, timestep, model_options, **self.options)
        self.is_perturbing = False
        return negative + 2 * (positive - negative) + 2 * (positive - perturbed)


def run(guider, family, sigmas=SIGMAS, noise=None):
    guider.set_conds(conditioning(family), conditioning(family, seed=7))
    guider.set_cfg(2.0)
    # Sound of another length than the video, so that the calls can be told apart.
    if noise is None:
        noise = noise_like(family)
        if noise.is_nested:
            noise = type(noise)([noise.unbind()[0], noise.unbind()[1][:, :, :40]])
    sampler = comfy.samplers.sampler_object("euler")
    out = guider.sample(noise, zeros_like(noise), sampler, sigmas, disable_pbar=True, seed=3)
    return list(out.unbind()) if out.is_nested else [out]
