"""No preset breaks the picture: the tiny model's clips under each, by length, number of steps and stage, beside full ones."""

from __future__ import annotations

import pytest
import torch

CLIPS, SEED = 4, 5
PRESETS = ("quality", "balanced", "fast", "cool laptop")
# (model, steps, latent frames): distilled and short, long enough for the largest stride, enough steps for freezing.
RUNS = [("student", 8, 7), ("student", 8, 10), ("teacher", 12, 7)]


@pytest.fixture(scope="module")
def maker(bench, pack):
    return Maker(bench, pack)


class Maker:
    """Makes clips the way a graph would, and reads them with the probe."""

    def __init__(self, bench, pack):
        self.sampling, self.runs, self.quality = bench("sampling"), bench("two_stage_runs"), bench("quality")
        self.rows = bench("rows")
        self.model = bench("tiny_ltx.model")
        self.codec = bench("tiny_ltx.codec")
        self.vae = bench("tiny_ltx.vae").CodecVAE(zoom=1)
        self.ids = bench("tiny_ltx.clips").draw_ids(CLIPS, torch.Generator().manual_seed(SEED))
        self.preset = pack("nodes.preset").ThriftPreset.execute
        self.fill = pack("nodes.latent_flow_interpolate").LatentFlowInterpolate.execute
        self.name = self.quality.PACK
        self.models = {}
        self.full = {}

    def load(self, name):
        if name not in self.models:
            self.models[name] = self.model.load_model(name)
        return self.models[name]

    def sample(self, model, recipe, noise, start):
        return self.sampling.sample_stage(
            self.name, model, recipe, (), self.ids, recipe.sigmas, noise, start, SEED
        )[0]

    def single(self, preset, name, steps, frames):
        """Pixels [B, F, 32, 32]; of the full run without a preset."""
        recipe = self.model.STUDENT_RECIPE if name == "student" else self.model.TEACHER_RECIPE
        recipe = self.model.Recipe(self.rows.resampled(recipe.sigmas, steps, self.model.SHIFT), recipe.cfg)
        model, noise = self.load(name), self.sampling.draw_noise(CLIPS, frames, SEED)
        latent = {"samples": torch.zeros_like(noise)}
        if preset is not None:
            model, latent, *_ = self.preset(model, latent, preset, sigmas=torch.tensor(recipe.sigmas)).args
        short = latent["samples"].shape[2]
        sampled = self.sample(model, recipe, noise[:, :, :short], latent["samples"])
        if preset is None:
            return self.sampling.decode(sampled)
        images = self.fill({**latent, "samples": sampled}, "motion", vae=self.vae, encode=False).args[1]
        return images[..., 0].unflatten(0, (CLIPS, -1))

    def two_stages(self, preset, frames, first="first"):
        """Pixels [B, F, 64, 64]."""
        runs, tiny = self.runs, self.model
        noise = runs.draw_noise(CLIPS, frames, 32, SEED)
        model, latent, shown = self.load("student"), {"samples": torch.zeros_like(noise)}, None
        if preset is not None and first is not None:
            model, latent, *_ = self.preset(model, latent, preset, first).args
        stride = latent.get("frame_thrift_stride", {}).get("stride", 1)
        kept = runs.kept(noise, latent["samples"].shape[2], stride)
        sampled = self.sample(model, tiny.STUDENT_RECIPE, kept, latent["samples"])
        latent, model = {**latent, "samples": sampled}, self.load("refiner")
        if preset is not None:
            model, latent, shown, _ = self.preset(model, latent, preset, vae=self.vae).args
        codec = self.codec.Codec(zoom=1)
        video = self.codec.upscaled(codec, latent["samples"].float())
        stride = latent.get("frame_thrift_stride", {}).get("stride", 1)
        kept = runs.kept(runs.draw_noise(CLIPS, frames, 64, SEED), video.shape[2], stride)
        recipe = tiny.Recipe(tiny.REFINER_SIGMAS["ltx-2"], 1.0)
        video = self.sample(model, recipe, kept, video)
        if preset is None:
            return codec.decode_pixels(video.float())[:, 0].clamp(0, 1)
        images = self.fill(
            {**latent, "samples": video}, "motion", vae=self.vae, encode=False, reference=shown
        )
        return images.args[1][..., 0].unflatten(0, (CLIPS, -1))


def drift_of(bench, pixels):
    return bench("metrics").drift(pixels).mean()


def detail_of(bench, pixels):
    return bench("two_stage_figures").detail(pixels).mean()


def captions_read(bench, maker, pixels):
    """Share of clips whose shapes, direction and speed the probe reads as asked for."""
    probe = bench("tiny_ltx.probe")
    path = {} if pixels.shape[-1] == 32 else {"path": probe.FULL_PROBE}
    words, _ = probe.read_clips(probe.load_probe(*path.values()), pixels, torch.full((CLIPS,), 24.0))
    return (words[:, :4] == maker.ids[:, :4]).all(dim=1).float().mean()


def check(bench, maker, pixels, full):
    assert pixels.shape == full.shape and pixels.isfinite().all()
    assert drift_of(bench, pixels) <= 1.5 * drift_of(bench, full)
    assert detail_of(bench, pixels) >= 0.8 * detail_of(bench, full)
    # Of so few clips; ruined ones are read as nothing that was asked for.
    assert captions_read(bench, maker, pixels) >= 0.5 * captions_read(bench, maker, full)


@pytest.mark.parametrize("run", RUNS, ids=str)
@pytest.mark.parametrize("preset", PRESETS[:3])
def test_one_stage(bench, maker, preset, run):
    if run not in maker.full:
        maker.full[run] = maker.single(None, *run)
    check(bench, maker, maker.single(preset, *run), maker.full[run])


@pytest.mark.parametrize(
    ("preset", "first"), [("quality", "first"), ("balanced", "first"), ("balanced", None), ("fast", "first")]
)
def test_two_stages(bench, maker, preset, first):
    """Also behind a first stage that knows of no preset."""
    if "two" not in maker.full:
        maker.full["two"] = maker.two_stages(None, 7)
    check(bench, maker, maker.two_stages(preset, 7, first), maker.full["two"])


def test_the_cool_one_makes_the_picture_of_the_fast_one(maker):
    run = RUNS[1]
    assert torch.equal(maker.single("cool laptop", *run), maker.single("fast", *run))
