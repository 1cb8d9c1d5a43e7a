"""In-between pictures: motion beats mixing where things move, and never harms where they stand."""

from __future__ import annotations

import importlib
import math
import sys

import pytest
import torch
import torch.nn.functional as F

SIZE = 96


@pytest.fixture
def motion(pack):
    return pack("latents.motion")


def texture(size=2 * SIZE, seed=0):
    """A picture with detail at several scales, in 0..1."""
    generator = torch.Generator().manual_seed(seed)
    out = torch.zeros(1, 1, size, size)
    for side in (6, 12, 24, 48):
        noise = torch.randn(1, 1, side, side, generator=generator)
        out += F.interpolate(noise, (size, size), mode="bicubic", align_corners=False) / side**0.5
    return (out - out.min()) / (out.max() - out.min())


def seen(picture, matrix, shift=(0.0, 0.0)):
    """`picture` through an affine view: 96 x 96 pixels around its middle."""
    theta = torch.zeros(1, 2, 3)
    theta[0, :, :2] = torch.tensor(matrix) / 2
    theta[0, :, 2] = torch.tensor(shift) * 2 / (2 * SIZE)
    grid = F.affine_grid(theta, (1, 1, SIZE, SIZE), align_corners=False)
    return F.grid_sample(picture, grid, mode="bicubic", align_corners=False)


def turned(degrees, zoom=1.0):
    c, s = math.cos(math.radians(degrees)) * zoom, math.sin(math.radians(degrees)) * zoom
    return [[c, -s], [s, c]]


def crossing(t):
    """Two textured layers passing each other: a disc over a background, opposite ways."""
    back = seen(texture(seed=1), turned(0), (4 * t, 0))
    front = seen(texture(seed=2), turned(0), (-6 * t, 0))
    x = torch.arange(SIZE).view(1, 1, 1, -1) - (SIZE / 2 - 3 + 6 * t)
    y = torch.arange(SIZE).view(1, 1, -1, 1) - SIZE / 2
    disc = (20 - (x.square() + y.square()).sqrt()).clamp(0, 1)
    return back + (front - back) * disc


SCENES = {
    "translation": lambda t: seen(texture(), turned(0), (6 * t, -4 * t)),
    "rotation": lambda t: seen(texture(), turned(8 * t)),
    "zoom": lambda t: seen(texture(), turned(0, 1 - 0.12 * t)),
    "two layers crossing": crossing,
}


def psnr(a, b):
    return -10 * torch.log10((a - b).square().mean()).item()


def between(motion, a, b, t, estimate=None):
    estimate = estimate or motion.estimate_motion
    return motion.blend(a, b, estimate(a, b), estimate(b, a), t)


@pytest.fixture(scope="module")
def raft(pack):
    """The small RAFT of the test model, in place of torchvision's weights."""
    sys.modules["comfyui_tree"].load_tiny()
    net = pack("latents.raft").Raft(importlib.import_module("tiny_ltx.flow").load_flow().model)
    return lambda a, b: net(a.expand(-1, 3, -1, -1), b.expand(-1, 3, -1, -1))


@pytest.mark.parametrize("scene", SCENES)
@pytest.mark.parametrize("t", [0.25, 0.5])
@pytest.mark.parametrize("method", ["motion", "optical_flow"])
def test_motion_beats_mixing(motion, raft, method, scene, t):
    a, b, truth = (SCENES[scene](time) for time in (0.0, 1.0, t))
    # The rim shows what neither end has seen.
    inner = (..., slice(8, -8), slice(8, -8))
    moved = between(motion, a, b, t, raft if method == "optical_flow" else None)
    ours, mixed = (psnr(out[inner], truth[inner]) for out in (moved, a.lerp(b, t)))
    # Where layers part, neither end has seen what appears.
    assert ours > mixed + (0.5 if "crossing" in scene else 10)


@pytest.mark.parametrize("shift", [(1.0, 0.0), (5.0, -3.0), (0.5, 2.5)])
@pytest.mark.parametrize("method", ["motion", "optical_flow"])
def test_a_known_translation_is_placed_within_half_a_pixel(motion, raft, method, shift):
    a, b = seen(texture(), turned(0)), seen(texture(), turned(0), shift)
    estimate = raft if method == "optical_flow" else motion.estimate_motion
    # The view moves by shift, so what it shows moves by minus shift.
    flow = estimate(a, b)[..., 12:-12, 12:-12]
    error = (flow + torch.tensor(shift).view(1, 2, 1, 1)).square().sum(dim=1).sqrt()
    assert error.mean() < 0.25 and error.quantile(0.95) < 0.5
    middle = between(motion, a, b, 0.5, estimate)
    halves = [seen(texture(), turned(0), (shift[0] / 2 + dx, shift[1] / 2)) for dx in (-0.5, 0.0, 0.5)]
    scores = [psnr(middle[..., 12:-12, 12:-12], half[..., 12:-12, 12:-12]) for half in halves]
    assert scores[1] == max(scores)


@pytest.mark.parametrize("stride", [4, 8])
def test_clips_of_the_test_model_at_large_steps(motion, raft, stride):
    """Shapes bouncing over a panning wave, the fast ones: both methods against plain mixing."""
    clips = importlib.import_module("tiny_ltx.clips")
    generator = torch.Generator().manual_seed(0)
    ids = torch.tensor([[shape, 0, way, 2] for shape in range(4) for way in range(3)])
    pixels = clips.draw_clips(12, 4, generator, ids=ids, fps=torch.full((12,), 24.0)).pixels
    errors = dict.fromkeys(("linear", "motion", "optical_flow"), 0.0)
    for k in range(0, 24, stride):
        a, b, truth = (pixels[:, i : i + 1] for i in (k, k + stride, k + stride // 2))
        made = {"linear": a.lerp(b, 0.5), "motion": between(motion, a, b, 0.5)}
        made["optical_flow"] = between(motion, a, b, 0.5, raft)
        for name, out in made.items():
            errors[name] += (out - truth).square().mean().item()
    assert errors["motion"] < errors["linear"] / 2 and errors["optical_flow"] < errors["linear"] / 2


def test_what_stands_still_stays_as_it_is(motion):
    a = texture(SIZE)
    noisy = a + 0.01 * torch.randn(a.shape, generator=torch.Generator().manual_seed(3))
    assert motion.estimate_motion(a, a).abs().max() < 1e-4
    assert torch.allclose(between(motion, a, a, 0.3), a, atol=1e-6)
    assert motion.estimate_motion(a, noisy).abs().max() < 0.5
    assert torch.allclose(between(motion, a, noisy, 0.5), a.lerp(noisy, 0.5), atol=1e-6)


def test_items_of_a_batch_do_not_see_each_other(motion):
    pairs = [(scene(0.0), scene(1.0)) for scene in SCENES.values()]
    a, b = (torch.cat(side) for side in zip(*pairs, strict=True))
    together = between(motion, a, b, 0.4)
    for i, (one, other) in enumerate(pairs):
        assert torch.allclose(together[i : i + 1], between(motion, one, other, 0.4), atol=1e-5)


def test_small_and_ragged_pictures(motion):
    for height, width in ((3, 5), (9, 31), (8, 8), (1, 1)):
        a, b = torch.rand(2, 4, height, width), torch.rand(2, 4, height, width)
        out = between(motion, a, b, 0.5)
        assert out.shape == a.shape and out.isfinite().all()


def test_large_pictures_are_matched_on_smaller_ones(motion, monkeypatch):
    a, b = seen(texture(), turned(0)), seen(texture(), turned(0), (6.0, 2.0))
    monkeypatch.setattr(motion, "WORKING_PIXELS", SIZE * SIZE // 4)
    flow = motion.estimate_motion(a, b)
    assert flow.shape == (1, 2, SIZE, SIZE)
    assert (flow[..., 12:-12, 12:-12].mean(dim=(2, 3)) + torch.tensor([[6.0, 2.0]])).abs().max() < 0.5


def test_splat_keeps_sums_and_moves_whole_pixels(motion):
    values = torch.rand(1, 2, 6, 7)
    moved = motion.splat(values, torch.tensor([2.0, -1.0]).view(1, 2, 1, 1).expand(1, 2, 6, 7))
    assert torch.allclose(moved[:, :, :-1, 2:], values[:, :, 1:, :-2])
    half = motion.splat(values, torch.full((1, 2, 6, 7), 0.5))
    assert half.sum() < values.sum() and half[..., 1:-1, 1:-1].isfinite().all()


@pytest.mark.parametrize("mode", ["bilinear", "bicubic"])
def test_gathering_is_what_grid_sample_does(motion, mode, monkeypatch):
    """For devices that cannot do the latter, far beyond the edges too."""
    generator = torch.Generator().manual_seed(1)
    for size in ((13, 17), (2, 3), (1, 5), (1, 1)):
        picture = torch.randn(2, 3, *size, generator=generator)
        flow = torch.randn(2, 2, *size, generator=generator) * 8
        flow[0, :, 0, 0], flow[1, :, 0, 0] = 1e6, -1e6
        flow[0, :, -1, -1] = 0.0
        with monkeypatch.context() as patched:
            usual = motion.warp(picture, flow, mode)
            patched.setattr(motion, "_has_grid_sample", lambda *_: False)
            patched.setattr(F, "grid_sample", lambda *_, **__: pytest.fail("not there"))
            assert torch.allclose(motion.warp(picture, flow, mode), usual, atol=1e-4)


def test_without_grid_sample_the_pictures_are_the_same(motion, monkeypatch):
    a, b = SCENES["rotation"](0.0), SCENES["rotation"](1.0)
    usual = between(motion, a, b, 0.5)
    grid_sample, asked = F.grid_sample, []

    def refused(picture, *args, **kwargs):
        asked.append(kwargs["mode"])
        raise NotImplementedError("MPS: unsupported")

    monkeypatch.setattr(F, "grid_sample", refused)
    motion._has_grid_sample.cache_clear()
    try:
        assert torch.allclose(between(motion, a, b, 0.5), usual, atol=1e-3)
        assert sorted(asked) == ["bicubic", "bilinear"], "each mode is tried once"
    finally:
        monkeypatch.setattr(F, "grid_sample", grid_sample)
        motion._has_grid_sample.cache_clear()


def test_the_median_is_that_of_nine(motion):
    flow = torch.randn(2, 2, 7, 9, generator=torch.Generator().manual_seed(0)).round(decimals=1)
    padded = F.pad(flow, (1, 1, 1, 1), mode="replicate")
    around = [padded[..., y : y + 7, x : x + 9] for y in range(3) for x in range(3)]
    assert torch.equal(motion._median(flow), torch.stack(around, dim=2).median(dim=2).values)


def test_a_way_found_on_smaller_pictures_leads_to_nearly_the_same(motion):
    a, b = (SCENES["translation"](time) for time in (0.0, 1.0))
    small_a, small_b = (F.avg_pool2d(p, 2) for p in (a, b))
    flows = motion.estimate_motion(small_a, small_b), motion.estimate_motion(small_b, small_a)
    made = motion.along(a, b, motion.way_at(*flows, 0.5, 2.0).enlarged(a.shape[-2:]))
    truth, inner = SCENES["translation"](0.5), (..., slice(8, -8), slice(8, -8))
    assert psnr(made[inner], truth[inner]) > psnr(between(motion, a, b, 0.5)[inner], truth[inner]) - 2
