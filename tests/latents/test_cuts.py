"""Cuts: no double exposures across one, and nothing that moves, fades or flickers is taken for one."""

from __future__ import annotations

import importlib
import math
import sys
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from orders import Orders

METHODS = ("linear", "smooth", "motion")
STRIDES = (2, 4, 8)


@pytest.fixture
def cuts(pack):
    return pack("latents.cuts")


@pytest.fixture
def clips():
    sys.modules["comfyui_tree"].load_tiny()
    return importlib.import_module("tiny_ltx.clips")


def cut_after(cuts, clip):
    """For every frame but the last of [B, C, N, H, W] whether a cut follows it [B, N - 1]."""
    found = cuts.Cuts(lambda places: tuple(
        clip[:, :, [k + d for k in places]].movedim(2, 0).flatten(0, 1) for d in (0, 1)
    ), clip.shape[2], 4).after(list(range(clip.shape[2] - 1)))  # fmt: skip
    return torch.stack(found, dim=1)


def is_cut(cuts, a, b):
    return bool(cut_after(cuts, torch.stack((a, b), dim=2)))


def layers(height, width, seed=0, sides=(3, 6, 12, 24, 48)):
    """A picture with detail at several scales, in 0..1."""
    generator = torch.Generator().manual_seed(seed)
    out = torch.zeros(1, 3, height, width)
    for side in sides:
        noise = torch.randn(1, 3, side, max(1, round(side * width / height)), generator=generator)
        out += F.interpolate(noise, (height, width), mode="bicubic", align_corners=False) / side**0.5
    return (out - out.min()) / (out.max() - out.min())


def grains(height, width, seed=0):
    return torch.rand(1, 3, height, width, generator=torch.Generator().manual_seed(seed))


def stripes(height, width, seed=0):
    angle = math.pi * torch.rand(1, generator=torch.Generator().manual_seed(seed))
    y, x = torch.arange(height).view(-1, 1) / height, torch.arange(width) / height
    waves = torch.sin(2 * math.pi * (x * angle.cos() + y * angle.sin()) / 0.05)
    return (0.5 + 0.3 * waves).expand(1, 3, height, width)


def discs(height, width, seed=0):
    generator = torch.Generator().manual_seed(seed)
    y, x = torch.arange(height).view(-1, 1) / height, torch.arange(width) / height
    out = torch.rand(1, 3, 1, 1, generator=generator).expand(1, 3, height, width)
    for _ in range(12):
        at_x, at_y, radius = torch.rand(3, generator=generator) * torch.tensor([width / height, 1, 0.2])
        cover = ((radius - ((x - at_x) ** 2 + (y - at_y) ** 2).sqrt()) * height / 2).clamp(0, 1)
        out = out + (torch.rand(1, 3, 1, 1, generator=generator) - out) * cover
    return out


SCENES = {"layers": layers, "grains": grains, "stripes": stripes, "discs": discs}


def seen(picture, degrees=0.0, zoom=1.0):
    """The middle half of `picture`, turned and magnified."""
    c, s = math.cos(math.radians(degrees)) * zoom / 2, math.sin(math.radians(degrees)) * zoom / 2
    height, width = picture.shape[-2] // 2, picture.shape[-1] // 2
    theta = torch.tensor([[[c, -s * height / width, 0.0], [s * width / height, c, 0.0]]])
    grid = F.affine_grid(theta, (1, 3, height, width), align_corners=False)
    return F.grid_sample(picture, grid, mode="bicubic", align_corners=False)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("stride", STRIDES)
def test_no_double_exposure_at_a_cut(pack, stride, method):
    """Two still scenes, one after the other: every frame that comes out is one of the two."""
    restore, motion = pack("latents.restore"), pack("latents.motion")
    note = pack("latents.stride").StrideNote(stride, 4 * stride + 1, 5)
    first, second = layers(64, 96, 1), layers(64, 96, 2)
    low = torch.cat((first.expand(14, -1, -1, -1), second.expand(19, -1, -1, -1))).movedim(1, -1)[None]
    full = restore.restore_frames(
        low, note, method, motion.estimate_motion, torch.device("cpu"), lambda *_: None
    )
    # The earlier of both where they are equally near.
    begin = 13 * stride + stride // 2 + 1
    assert (full[0, :begin] - low[0, 0]).abs().max() < 1e-5
    assert (full[0, begin:] - low[0, -1]).abs().max() < 1e-5


@pytest.mark.parametrize("method", METHODS)
def test_beside_a_cut_everything_is_as_without_it(pack, method):
    """Also the slopes of `smooth`, which look at the neighbours."""
    interpolate, motion = pack("latents.interpolate"), pack("latents.motion")
    pans = [torch.stack([layers(64, 160, s)[..., 2 * k : 2 * k + 96] for k in range(5)], dim=2) for s in (1, 2)]  # fmt: skip

    def filled(clip):
        times, wanted = interpolate.frame_times(clip.shape[2], 4), interpolate.frame_times(4 * clip.shape[2] - 3)  # fmt: skip
        return [p for _, p in interpolate.in_between(clip, times, wanted, method, motion.estimate_motion)]

    joined, alone = filled(torch.cat(pans, dim=2)), [filled(pan) for pan in pans]
    assert all(torch.allclose(x, y, atol=1e-6) for x, y in zip(joined[:17], alone[0], strict=True))
    assert all(torch.allclose(x, y, atol=1e-6) for x, y in zip(joined[20:], alone[1], strict=True))


@pytest.mark.parametrize("kind", SCENES)
@pytest.mark.parametrize(("height", "at_704"), [(704, 30), (352, 30), (64, 30), (352, 84), (64, 80)])
def test_a_pan_is_no_cut(cuts, kind, height, at_704):
    """30 pixels at 704 rows are asked for, an eighth of the shorter side is what the page of Latent Flow Interpolate promises."""
    fastest = round(at_704 * height / 704)
    width = height * 3 // 2
    canvas = SCENES[kind](height + 2 * fastest, width + 2 * fastest, 3)
    still = canvas[..., fastest : fastest + height, fastest : fastest + width]
    ways = [(fastest, 0), (0, -fastest), (fastest * 7 // 10, fastest * 7 // 10), (-fastest // 2, fastest // 3), (1, 0)]  # fmt: skip
    for right, down in ways:
        top, left = fastest + down, fastest + right
        assert not is_cut(cuts, still, canvas[..., top : top + height, left : left + width]), (right, down)


@pytest.mark.parametrize("kind", SCENES)
@pytest.mark.parametrize("size", [(352, 640), (64, 96)])
def test_another_scene_of_the_same_kind_is_a_cut(cuts, kind, size):
    scenes = [SCENES[kind](*size, seed) for seed in range(4)]
    for one, other in pairwise(scenes):
        assert is_cut(cuts, one, other)
    assert is_cut(cuts, scenes[0], torch.zeros(1, 3, *size))
    assert is_cut(cuts, torch.ones(1, 3, *size), scenes[0])


@pytest.mark.parametrize("size", [(352, 640), (64, 96)])
def test_dark_scenes_are_cut_too(cuts, size):
    assert is_cut(cuts, 0.05 + 0.2 * layers(*size, 1), 0.05 + 0.2 * layers(*size, 2))


def thrown(size, place):
    """A textured ball on a grey ground or over a scene."""
    y, x = torch.arange(size[0]).view(-1, 1) / size[0], torch.arange(size[1]) / size[0]
    cover = ((0.18 - ((x - place) ** 2 + (y - 0.5) ** 2).sqrt()) * size[0]).clamp(0, 1)
    return cover, layers(*size, 9)


NO_CUTS = {
    "turned": lambda size: (seen(layers(2 * size[0], 2 * size[1])), seen(layers(2 * size[0], 2 * size[1]), 15)),
    "nearer": lambda size: (seen(layers(2 * size[0], 2 * size[1])), seen(layers(2 * size[0], 2 * size[1]), 0, 0.85)),
    "fading": lambda size: (layers(*size), 0.15 * layers(*size)),
    "flash": lambda size: (layers(*size), (layers(*size) + 0.5).clamp(0, 1)),
    "lights go out in an empty room": lambda size: (torch.full((1, 3, *size), 0.8), torch.zeros(1, 3, *size)),
    "noise on a scene": lambda size: tuple(layers(*size) + 0.05 * (grains(*size, s) - 0.5) * 3.5 for s in (1, 2)),
    "noise in the dark": lambda size: tuple(0.05 + 0.03 * (grains(*size, s) - 0.5) * 3.5 for s in (1, 2)),
    "a ball over a scene": lambda size: tuple(
        layers(*size).lerp(ball, cover) for cover, ball in (thrown(size, 0.3), thrown(size, 1.2))
    ),
    "a ball on grey": lambda size: tuple(
        torch.full((1, 3, *size), 0.4).lerp(ball, cover) for cover, ball in (thrown(size, 0.3), thrown(size, 1.2))
    ),
}  # fmt: skip


@pytest.mark.parametrize("size", [(352, 640), (64, 96)])
@pytest.mark.parametrize("change", NO_CUTS)
def test_what_is_no_cut(cuts, change, size):
    a, b = NO_CUTS[change](size)
    assert not is_cut(cuts, a, b) and not is_cut(cuts, b, a)


def test_clips_of_the_test_model(cuts, clips):
    """Between two clips nearly always; within one never, but once in a hundred where shapes jump a seventh of the picture."""
    generator = torch.Generator().manual_seed(5)
    pixels = clips.draw_clips(32, 5, generator, fps=torch.full((32,), 24.0)).pixels[:, None]
    joined = torch.cat((pixels[:, :, :17], pixels.roll(1, 0)[:, :, 17:]), dim=2)
    for stride in STRIDES:
        most = 0.01 if stride == 8 else 0
        assert cut_after(cuts, pixels[:, :, ::stride]).float().mean() <= most
        found = cut_after(cuts, joined[:, :, ::stride])
        assert found[:, 16 // stride].float().mean() > 0.75
        found[:, 16 // stride] = False
        assert found.float().mean() <= most


def test_items_of_a_batch_are_cut_each_on_its_own(pack, cuts):
    interpolate = pack("latents.interpolate")
    one, other = (torch.stack([layers(64, 96, s) for s in seeds], dim=2) for seeds in ((1, 1, 2), (1, 2, 2)))
    assert cut_after(cuts, torch.cat((one, other))).tolist() == [[False, True], [True, False]]
    times, wanted = interpolate.frame_times(3, 2), interpolate.frame_times(5)
    out = [p for _, p in interpolate.in_between(torch.cat((one, other)), times, wanted, "linear")]
    assert torch.equal(out[1], torch.cat((one[:, :, 0], other[:, :, 0])))
    assert torch.equal(out[3], torch.cat((one[:, :, 1], other[:, :, 1])))


def test_a_cut_between_latents(pack):
    restore, stride = pack("latents.restore"), pack("latents.stride")
    generator = torch.Generator().manual_seed(1)
    scenes = torch.randn(2, 1, 128, 1, 16, 24, generator=generator)
    note = stride.StrideNote(2, 9, 5)
    video = torch.cat((scenes[0].expand(-1, -1, 3, -1, -1), scenes[1].expand(-1, -1, 2, -1, -1)), dim=2)
    for method in METHODS:
        out = restore.restore_latents(
            {"samples": video}, note, method, pack("latents.motion").estimate_motion, torch.device("cpu"), lambda *_: None
        )["samples"]  # fmt: skip
        for k in range(9):
            assert (out[:, :, k] - scenes[int(k > 4), :, :, 0]).abs().max() < 1e-5, (method, k)


BAD = {"nan": torch.nan, "inf": torch.inf}


@pytest.mark.parametrize(
    ("method", "kind"), [*((m, k) for m in METHODS for k in BAD), ("optical_flow", "nan")]
)
def test_one_bad_pixel_stays_one_bad_pixel(pack, method, kind, caplog):
    """The frame that has it keeps it, the others are whole, frames away from it are the same bit for bit."""
    restore = pack("latents.restore")
    note = pack("latents.stride").StrideNote(2, 5, 3)
    low = torch.stack([layers(64, 112, 1)[0, :, :, k : k + 80].movedim(0, -1) for k in range(17)])[None]
    low = torch.cat((low, low.flip(1)))
    broken = low.clone()
    broken[0, 6, 20, 30, 1] = BAD[kind]

    def filled(frames):
        return restore.restore_frames(
            frames, note, method, estimator(pack, method), torch.device("cpu"), lambda *_: None
        )

    good, out = filled(low), filled(broken)
    assert torch.equal(out[:, ::2].nan_to_num(-1, -2), broken.nan_to_num(-1, -2))
    assert out[:, 1::2].isfinite().all() and torch.equal(out[1], good[1])
    # A slope of `smooth` reaches one segment further.
    near = range(8, 17) if method == "smooth" else range(10, 15)
    assert all(torch.equal(out[0, k], good[0, k]) for k in range(33) if k not in near)
    assert (out[0, 11] - good[0, 11]).abs().mean() < 1e-3
    assert "video frame 12 holds" in caplog.text


@pytest.mark.parametrize("method", [*METHODS, "optical_flow"])
def test_whole_bad_frames_and_latents(pack, method, caplog):
    restore = pack("latents.restore")
    note = pack("latents.stride").StrideNote(2, 9, 5)
    video = torch.randn(1, 16, 5, 8, 9, generator=torch.Generator().manual_seed(2))
    video[:, :, 2] = torch.nan
    out = restore.restore_latents(
        {"samples": video}, note, method, estimator(pack, method), torch.device("cpu"), lambda *_: None
    )["samples"]
    assert out.isfinite().all() and "latent frame 2 holds" in caplog.text
    video[:, :, 3] = torch.nan
    out = restore.restore_latents(
        {"samples": video}, note, method, estimator(pack, method), torch.device("cpu"), lambda *_: None
    )["samples"]
    # Between two frames of which nothing is known nothing can be told.
    assert out[:, :, 5].isnan().all() and out[:, :, [0, 1, 2, 8]].isfinite().all()
    assert "latent frames 2, 3 hold " in caplog.text


def estimator(pack, method):
    if method != "optical_flow":
        return pack("latents.motion").estimate_motion
    from torchvision.models.optical_flow import raft_small

    torch.manual_seed(0)
    return pack("latents.raft").Raft(raft_small(weights=None, progress=False).eval())


def test_many_cuts_are_no_more_work_to_order(cuts):
    """Everything that might be a cut is held against its mirror images together, with few looks at the device."""

    def orders(batch):
        clip = torch.stack([torch.cat([layers(64, 64, 2 * i + s) for i in range(batch)]) for s in (0, 1)], dim=2)  # fmt: skip
        with Orders() as seen:
            assert cut_after(cuts, clip).all()
        return seen

    few, many = orders(1), orders(8)
    assert many.count < 1.5 * few.count and many.looks <= few.looks + 2
