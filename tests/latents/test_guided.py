"""Pictures that follow a small reference: they show what it shows, as sharp as the keyframes, and never less than blind."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from orders import Orders

HEIGHT, WIDTH = 64, 96


@pytest.fixture
def guided(pack):
    return pack("latents.guided")


def texture(height, width, seed):
    """A picture with detail at several scales, in 0.1..0.9."""
    generator = torch.Generator().manual_seed(seed)
    out = torch.zeros(1, 3, height, width)
    for side in (6, 12, 24, 48, 96):
        noise = torch.randn(1, 3, side, side, generator=generator)
        out += F.interpolate(noise, (height, width), mode="bicubic", align_corners=False) / side**0.5
    return 0.1 + 0.8 * (out - out.min()) / (out.max() - out.min())


def film(path, seed=0, frames=9, height=HEIGHT, width=WIDTH):
    """[F, 3, H, W]: a textured disc that goes along path(frame) = (x, y), whole pixels, over a texture."""
    back, front = texture(height, width, seed), texture(64, 64, seed + 1)
    y, x = torch.arange(64).view(-1, 1) - 31.5, torch.arange(64) - 31.5
    disc = (14 - (x**2 + y**2).sqrt()).clamp(0, 1)
    out = []
    for f in range(frames):
        right, down = path(f)
        pads = (right, width + 64 - right, down, height + 64 - down)
        cover, object_ = (
            F.pad(p, pads)[..., 64 : 64 + height, 64 : 64 + width] for p in (disc[None, None], front)
        )
        out.append(back + (object_ - back) * cover)
    return torch.cat(out)


def there_and_back(f, far=20):
    """Away and back within a gap of 8: both keyframes show the same, and only the reference tells."""
    return (48 + round(far * math.sin(math.pi * f / 8)), 64)


def small(clip):
    return F.avg_pool2d(clip, 2)


def follow(pack, frames, gap, reference, step=1, comparison=None, **names):
    """[F, 3, H, W] with every gap-th frame -> at the reference's times, and what the comparison says."""
    guided, interpolate, motion = (pack(f"latents.{name}") for name in ("guided", "interpolate", "motion"))
    clip = as_clip(frames)[:, :, ::gap]
    comparison = guided.Comparison()
    times = interpolate.frame_times(clip.shape[2], gap)

    def blind(some, items):
        at = torch.tensor(some, dtype=torch.float64)
        made = interpolate.in_between(clip[items], times, at, "motion", motion.estimate_motion)
        return (picture for _, picture in made)

    wanted = list(range(0, frames.shape[-4], step))
    followed = guided.follow(clip, gap, guided.Reference(as_clip(reference), step), wanted, blind, comparison)
    out = dict(followed)
    assert list(out) == wanted
    return torch.stack([out[time] for time in wanted], dim=1).squeeze(0), comparison


def as_clip(frames):
    """[F, 3, H, W] or [B, F, 3, H, W] -> [B, 3, F, H, W]"""
    return (frames[None] if frames.ndim == 4 else frames).movedim(2, 1)


def blindly(pack, frames, gap):
    interpolate, motion = pack("latents.interpolate"), pack("latents.motion")
    clip = as_clip(frames)[:, :, ::gap]
    times, wanted = interpolate.frame_times(clip.shape[2], gap), interpolate.frame_times(len(frames))
    made = interpolate.in_between(clip, times, wanted, "motion", motion.estimate_motion)
    return torch.cat([picture for _, picture in made])


def psnr(a, b):
    return -10 * torch.log10((a - b).square().mean()).item()


def noise_like(picture, seed=0):
    return torch.randn(picture.shape, generator=torch.Generator().manual_seed(seed))


def test_what_only_the_reference_shows_is_in_the_pictures(pack):
    frames = film(there_and_back)
    out, comparison = follow(pack, frames, 8, small(frames))
    blind = blindly(pack, frames, 8)
    alone = F.interpolate(small(frames), scale_factor=2, mode="bicubic", align_corners=False)
    others = max(psnr(blind[1:8], frames[1:8]), psnr(alone[1:8], frames[1:8]))
    assert psnr(out[1:8], frames[1:8]) > others + 1.5
    assert torch.equal(out[::8], frames[::8]), "keyframes bit for bit"
    assert comparison.followed == 7 and not comparison.disagreeing


@pytest.mark.parametrize("gap", [2, 4, 8])
def test_a_still_clip_comes_back(pack, gap):
    frames = film(lambda f: (48, 64))
    out, comparison = follow(pack, frames, gap, small(frames))
    assert (out - frames).abs().max() < 2e-3
    assert max(comparison.shifts.values()) < 0.1 and max(comparison.unlike.values()) < 0.01


def test_a_pan_by_whole_pixels_comes_back(pack):
    """Two pixels a frame are one of the reference, so that nothing is interpolated but the rim."""
    large = texture(HEIGHT, WIDTH + 32, 3)
    frames = torch.cat([large[..., 2 * f : 2 * f + WIDTH] for f in range(9)])
    out, _ = follow(pack, frames, 4, small(frames))
    inner = (slice(None), slice(None), slice(8, -8), slice(20, -20))
    assert psnr(out[inner], frames[inner]) > 40


def test_colours_and_blur_of_the_reference_do_not_matter(pack):
    frames = film(there_and_back)
    clean, _ = follow(pack, frames, 8, small(frames))
    gain, offset = torch.tensor([0.8, 0.9, 0.7]).view(3, 1, 1), torch.tensor([0.1, 0.0, 0.2]).view(3, 1, 1)
    shifted, comparison = follow(pack, frames, 8, small(frames) * gain + offset)
    assert abs(psnr(shifted[1:8], frames[1:8]) - psnr(clean[1:8], frames[1:8])) < 0.7
    assert not comparison.disagreeing


def test_a_filter_is_found_and_is_what_a_convolution_does(guided):
    """Of a picture that is a linear filter of its reference."""
    reference = torch.rand(2, 3, 20, 24, generator=torch.Generator().manual_seed(0))
    taps = noise_like(torch.empty(2, 3, 4, guided.TAPS**2), 1) / 5
    bias = torch.tensor([0.1, -0.1, 0.05, 0.0])
    padded = F.pad(reference, (2,) * 4, mode="replicate")
    plain = torch.stack([
        torch.stack([F.conv2d(padded[b, c][None, None], taps[b, c].view(4, 1, 5, 5))[0] for c in range(3)])
        for b in range(2)
    ]) + bias.view(4, 1, 1)  # fmt: skip
    picture = F.pixel_shuffle(plain.flatten(1, 2), 2)
    upsample = guided.Upsampler()
    upsample.learn(reference, picture)
    upsample.fit()
    assert (upsample(reference) - picture).abs().max() < 0.02
    assert torch.allclose(upsample.levelled(reference), small(upsample(reference)), atol=1e-5)
    # Several pictures of both items, one after the other, as in a chunk.
    assert torch.allclose(upsample(torch.cat((reference, reference)))[2:], upsample(reference), atol=1e-6)


def test_where_nothing_tells_the_filter_copies(guided):
    upsample = guided.Upsampler()
    flat = torch.full((1, 3, 8, 8), 0.5)
    upsample.learn(flat, torch.full((1, 3, 16, 16), 0.5))
    upsample.fit()
    other = torch.rand(1, 3, 8, 8)
    assert (upsample(other) - F.interpolate(other, scale_factor=2)).abs().max() < 0.05


def test_a_smooth_shift_between_keyframe_and_reference_is_found(guided, pack):
    picture = small(texture(160, 200, 5))
    warp = pack("latents.motion").warp
    flow = torch.zeros(1, 2, 80, 100)
    flow[:, 0], flow[:, 1] = 0.6, -0.9 * torch.linspace(0, 1, 100)
    found = guided.shift_between(picture, warp(picture, -flow, "bicubic"))
    assert (found - flow)[..., 8:-8, 8:-8].square().sum(dim=1).sqrt().mean() < 0.12


def test_noise_is_not_taken_for_a_shift(guided):
    picture = texture(64, 96, 5)
    upsample = guided.Upsampler()
    noisy = small(picture) + 0.05 * noise_like(small(picture))
    upsample.learn(noisy, picture)
    upsample.fit()
    shift = guided.keyframe(picture, noisy, upsample).shift
    assert shift.abs().mean() < 0.02, shift.abs().max()


def test_keyframes_that_are_each_off_do_not_blur_what_lies_between(pack):
    """Moved by a pixel, each its own way: in between things go evenly from one's place to the other's."""
    warp = pack("latents.motion").warp
    # Away and back, so that the keyframes alone do not tell.
    frames = film(lambda f: (48 + 5 * (2 - abs(2 - f)), 64), frames=5)
    moved = frames.clone()
    for k, x in ((0, 0.8), (4, -0.8)):
        flow = torch.zeros(1, 2, HEIGHT, WIDTH)
        flow[:, 0] = x
        moved[k] = warp(frames[k : k + 1], flow, "bicubic")[0]
    out, comparison = follow(pack, moved, 4, small(frames))
    assert 0.5 < min(comparison.shifts.values()) < 1.1
    fine = pack("latents.guided").fine
    inner = (..., slice(8, -8), slice(8, -8))
    energy = fine(out)[inner].square().mean(dim=(1, 2, 3))
    assert energy[1:4].min() > 0.91 * energy[[0, 4]].mean(), "no pulse"
    assert psnr(out[2][inner], frames[2][inner]) > 32, "half way, both are right"
    mixed = fine((moved[:1] + moved[4:]) / 2)[inner].square().mean()
    assert mixed < 0.75 * energy[[0, 4]].mean(), "a mixture is blurred"


@pytest.mark.parametrize("noise", [0.016, 0.024])
def test_on_a_calm_clip_a_poor_reference_does_little_harm(pack, noise):
    clean = film(lambda f: (48 + f, 64))
    frames = clean + 0.004 * noise_like(clean, 1)
    out, _ = follow(pack, frames, 4, (small(frames) + noise * noise_like(small(frames), 2)).clamp(0, 1))
    missing = [1, 2, 3, 5, 6, 7]
    assert psnr(out[missing], frames[missing]) > psnr(blindly(pack, frames, 4)[missing], frames[missing]) - 1


def test_a_reference_of_another_clip_is_not_followed(pack):
    frames = film(there_and_back)
    out, comparison = follow(pack, frames, 4, small(film(there_and_back, seed=7)))
    assert torch.equal(out, blindly(pack, frames, 4))
    assert comparison.disagreeing == [0, 4, 8] and comparison.followed == 0


def test_where_one_keyframe_is_unlike_its_reference_both_gaps_beside_are_blind(pack):
    frames = film(lambda f: (40 + 2 * f, 64), frames=17)
    reference = small(frames)
    reference[7:10] = small(film(there_and_back, seed=7))[:3]
    out, comparison = follow(pack, frames, 4, reference)
    blind = blindly(pack, frames, 4)
    assert comparison.disagreeing == [8] and comparison.followed == 6
    assert torch.equal(out[4:13], blind[4:13]) and not torch.equal(out[1:4], blind[1:4])


@pytest.mark.parametrize("cut", [1, 3, 7])
def test_across_a_cut_no_picture_shows_both_scenes(pack, cut):
    one, other = film(lambda f: (30 + 2 * f, 64)), film(lambda f: (60 - 2 * f, 70), seed=20)
    frames = torch.cat((one[:cut], other[cut:]))
    out, _ = follow(pack, frames, 8, small(frames))
    for f in range(1, 8):
        right, wrong = (one[f], other[f]) if f < cut else (other[f], one[f])
        assert psnr(out[f], right) > 26, f
        # Nothing of the other scene's detail is left in it.
        fine = pack("latents.guided").fine
        detail, of_wrong = fine(out[f : f + 1] - right).flatten(), fine(wrong[None]).flatten()
        assert abs(float(detail @ of_wrong) / float(of_wrong @ of_wrong)) < 0.05, f


@pytest.mark.parametrize("size", [(63, 95), (32, 33), (9, 31), (5, 3), (2, 2), (1, 1)])
def test_ragged_and_tiny_pictures(pack, size):
    frames = torch.rand(5, 3, *size, generator=torch.Generator().manual_seed(0))
    half = (max(1, size[0] // 2), max(1, size[1] // 2))
    out, _ = follow(pack, frames, 4, F.interpolate(frames, size=half, mode="bilinear", antialias=True))
    assert out.shape == frames.shape and out.isfinite().all() and out.min() >= 0 and out.max() <= 1
    assert torch.equal(out[::4], frames[::4])


def test_odd_sizes_lose_nothing(pack):
    frames = film(there_and_back)[..., :63, :95]
    reference = F.interpolate(frames, size=(32, 48), mode="bicubic", antialias=True, align_corners=False)
    out, _ = follow(pack, frames, 8, reference)
    assert psnr(out[1:8], frames[1:8]) > 32


@pytest.mark.parametrize("zoom", [1, 2, 3, 4])
def test_references_of_other_sizes_are_brought_to_half(pack, zoom):
    frames = film(there_and_back)
    size = (HEIGHT // zoom, WIDTH // zoom)
    out, comparison = follow(
        pack, frames, 8, F.interpolate(frames, size=size, mode="bicubic", antialias=True, align_corners=False)
    )
    assert psnr(out[1:8], frames[1:8]) > (27 if zoom == 4 else 31) and comparison.followed == 7


def test_the_last_reference_picture_stays(guided):
    reference = guided.Reference(torch.arange(5.0).view(1, 1, 5, 1, 1).expand(1, 3, 5, 2, 2) / 8, 2)
    places = [reference.place(time) for time in (0, 2, 8, 10, 64)]
    assert places == [0, 1, 4, 4, 4]
    assert reference.at([2, 64], (4, 4), None)[:, 0, 0, 0].tolist() == [1 / 8, 4 / 8]


def test_keyframes_past_the_end_of_the_reference_repeat_its_last_picture(pack):
    """As where the stride does not divide the clip: its last picture is repeated, and so is the reference's."""
    frames = film(lambda f: (40 + 3 * min(f, 6), 64), frames=9)
    whole, _ = follow(pack, frames, 4, small(frames))
    short, comparison = follow(pack, frames, 4, small(frames[:7]))
    assert torch.equal(short, whole) and comparison.followed == 6


def test_pictures_without_numbers_are_made_blindly_and_touch_no_others(pack):
    frames = film(there_and_back, frames=17)
    whole, _ = follow(pack, frames, 8, small(frames))
    reference = small(frames)
    reference[3, :, 4, 5] = torch.nan
    out, comparison = follow(pack, frames, 8, reference)
    blind = blindly(pack, frames, 8)
    assert torch.equal(out[3], blind[3]) and comparison.followed == 13
    others = [f for f in range(17) if f != 3]
    assert torch.equal(out[others], whole[others])
    broken = frames.clone()
    broken[16, 0, 3, 3] = torch.inf
    out, comparison = follow(pack, broken, 8, small(frames))
    assert comparison.followed == 7 and torch.equal(out[9:16], blindly(pack, broken, 8)[9:16])


def test_items_of_a_batch_do_not_see_each_other(pack):
    clips = torch.stack([film(there_and_back), film(lambda f: (70 - 3 * f, 60), seed=4)])
    references = torch.stack([small(clip) for clip in clips])
    # The second item's reference is another clip's: it alone is made blindly.
    references[1] = small(film(there_and_back, seed=9))
    both, comparison = follow(pack, clips, 4, references)
    assert comparison.followed == 6 and comparison.disagreeing == [0, 4, 8]
    alone, _ = follow(pack, clips[0], 4, references[0])
    assert torch.allclose(both[0].movedim(0, 0), alone, atol=1e-5)
    assert torch.equal(both[1], blindly(pack, clips[1], 4))


@pytest.mark.parametrize("at_once", [1, 10**9])
def test_pieces_make_the_same_pictures(pack, guided, monkeypatch, at_once):
    frames = film(there_and_back)
    whole, _ = follow(pack, frames, 8, small(frames))
    monkeypatch.setattr(guided, "PIXELS_AT_ONCE", at_once)
    again, _ = follow(pack, frames, 8, small(frames))
    assert (again - whole).abs().max() < 1e-5


def test_the_same_input_makes_the_same_bits(pack):
    frames = film(there_and_back)
    assert torch.equal(*(follow(pack, frames, 4, small(frames))[0] for _ in range(2)))


def test_only_the_times_of_a_strided_reference_are_made(pack):
    frames = film(there_and_back)
    out, comparison = follow(pack, frames, 8, small(frames)[::2], step=2)
    assert len(out) == 5 and comparison.followed == 3
    assert psnr(out[1:4], frames[2:8:2]) > 33


def test_without_one_whole_keyframe_all_is_blind(pack):
    """Nothing is left to fit the upsampler to, on either side."""
    guided = pack("latents.guided")
    generator = torch.Generator().manual_seed(4)
    clip, reference = (
        torch.rand(1, 3, 3, 32, 32, generator=generator),
        torch.rand(1, 3, 9, 16, 16, generator=generator),
    )
    asked = []

    def blind(times, items):
        asked.extend(times)
        return (clip[:, :, time // 4] for time in times)

    for spoil in ("clip", "reference"):
        asked.clear()
        bad = clip.clone(), reference.clone()
        bad[spoil == "reference"][..., 0, 0] = torch.nan
        comparison = guided.Comparison()
        made = dict(guided.follow(bad[0], 4, guided.Reference(bad[1], 1), list(range(9)), blind, comparison))
        assert len(made) == 9 and asked == [1, 2, 3, 5, 6, 7] and comparison.followed == 0


def test_across_a_cut_no_blind_picture_is_mixed_in(pack, monkeypatch):
    guided = pack("latents.guided")
    generator = torch.Generator().manual_seed(5)
    scenes = [
        F.interpolate(torch.rand(1, 3, 12, 12, generator=generator), size=(96, 96), mode="bicubic")
        for _ in (0, 1)
    ]
    clip = torch.stack((scenes[0], scenes[1]), dim=2).clamp(0, 1)
    whole = torch.stack([scenes[int(time > 2)] for time in range(5)], dim=2).clamp(0, 1)
    reference = guided.Reference(F.avg_pool3d(whole, (1, 2, 2)), 1)

    def made(share):
        monkeypatch.setattr(guided, "_blind_share", lambda rest, *_: torch.full_like(rest[:, :1], share))
        return dict(guided.follow(clip, 4, reference, list(range(5)), lambda *_: {}, guided.Comparison()))

    never, always = made(0.0), made(1.0)
    assert all(torch.equal(never[time], always[time]) for time in range(5))
    for time in (1, 2, 3):
        assert (never[time] - whole[:, :, time]).abs().mean() < 0.02


def test_more_gaps_and_clips_are_no_more_work_to_order(pack):
    """Small clips go through all their gaps together: a device is told the same few things, whatever their number."""

    def orders(batch, gaps):
        whole = film(lambda f: (20 + 3 * f, 60), frames=2 * gaps + 1, height=32, width=48)
        clips = whole.expand(batch, -1, -1, -1, -1)
        with Orders() as seen:
            follow(pack, clips, 2, torch.stack([small(clip) for clip in clips]))
        return seen.count

    assert orders(4, 16) < 1.1 * orders(1, 8)


def test_of_a_large_clip_one_gap_goes_at_a_time(guided):
    assert guided.gaps_at_once((1, 3, 9, 704, 1280)) == 1
    assert guided.gaps_at_once((4, 3, 9, 64, 64)) > 8


def test_only_items_that_the_reference_is_unlike_are_made_blindly(pack, guided):
    frames = film(there_and_back)
    clip = as_clip(frames)[:, :, ::4].expand(3, -1, -1, -1, -1)
    reference = as_clip(torch.stack([small(frames), small(film(there_and_back, seed=9)), small(frames)]))
    asked = []

    def blind(times, items):
        asked.append((times, items))
        return (clip[items, :, 0] for _ in times)

    list(guided.follow(clip, 4, guided.Reference(reference, 1), list(range(9)), blind, guided.Comparison()))
    assert asked == [([1, 2, 3, 5, 6, 7], [1])]


INNER = (..., slice(8, -8), slice(8, -8))


def test_how_far_the_reference_is_off_is_capped(pack):
    """Where a picture is like neither keyframe, all that differs would pass for an error of the reference."""
    frames = film(lambda f: (40 + 3 * f, 64))
    frames[4] = film(lambda f: (48, 60), seed=9, frames=1)[0]
    out, _ = follow(pack, frames, 8, small(frames))
    assert psnr(out[4], frames[4]) > 31


def test_what_only_the_reference_shows_has_no_detail_of_the_keyframes(pack):
    """A plain disc that is there within the gap alone."""
    frames = film(lambda f: (48, 64))
    y, x = torch.arange(HEIGHT).view(-1, 1) - 32, torch.arange(WIDTH) - 30
    away = (x**2 + y**2).sqrt()
    frames[4] = torch.where(away < 14, torch.tensor([0.9, 0.2, 0.1]).view(3, 1, 1), frames[4])
    out, _ = follow(pack, frames, 8, small(frames))
    fine = pack("latents.guided").fine
    ghost, there = ((fine(p[None]) * (away < 9)).square().sum() for p in (out[4], frames[0]))
    assert ghost < 0.02 * there


def test_the_search_goes_one_pixel_far_on_the_full_picture_of_the_pyramid(pack, guided, monkeypatch):
    """Nine places for each: what goes further costs as much as all else. Cuts are told with a search of their own."""
    motion = pack("latents.motion")
    estimate, matched = guided.estimate_motion, motion._matched
    seen, begun = [], []

    def estimated(a, *rest, **names):
        begun.append(a.shape[-2:])
        with monkeypatch.context() as patch:
            patch.setattr(motion, "_matched", spy)
            return estimate(a, *rest, **names)

    def spy(a, b, flow, radius):
        seen.append((a.shape[-2:] == begun[-1], radius))
        return matched(a, b, flow, radius)

    monkeypatch.setattr(guided, "estimate_motion", estimated)
    frames = film(there_and_back)
    follow(pack, frames, 8, small(frames))
    assert len(begun) == 2 and set(seen) == {(True, 1), (False, motion.RADIUS)}


def test_a_clean_reference_is_what_the_pictures_show_small(pack):
    frames = film(there_and_back)
    out, _ = follow(pack, frames, 8, small(frames))
    assert (small(out) - small(frames)).square().mean().sqrt() < 0.5 / 255


def test_a_difference_that_the_references_errors_explain_is_left(guided):
    picture = texture(32, 48, 3)
    error = 0.03 * noise_like(small(picture), 1)
    offs = [0.03 * noise_like(error, seed) for seed in (2, 3)]
    assert torch.equal(guided._laid(picture, small(picture) + error, offs), picture)
    moved = guided._laid(picture, small(picture) + 0.3, offs) - picture
    assert (moved - 0.3).abs().max() < 0.02


def test_the_blind_picture_knows_fractions_of_a_pixel(pack, guided):
    """It is searched on pictures of half the size, which tell of them half as well."""
    warp = pack("latents.motion").warp
    wide = texture(HEIGHT, WIDTH, 5)
    moved = warp(wide, torch.full((1, 2, HEIGHT, WIDTH), 0.75), "bicubic")
    upsample = guided.Upsampler()
    upsample.learn(small(wide), wide)
    upsample.fit()
    ends = tuple(guided.keyframe(p, small(p), upsample) for p in (wide, moved))
    forth, back = guided._blind_flows(ends)
    assert (2 * forth + 0.75)[INNER].abs().mean() < 0.04 and (2 * back - 0.75)[INNER].abs().mean() < 0.04


@pytest.mark.parametrize("late", [-3, -1, 2])
def test_a_reference_at_other_times_is_told_and_not_followed(pack, late):
    frames = film(lambda f: (40 + f, 64), frames=25)
    reference = small(frames)[[min(max(f - late, 0), 24) for f in range(25)]]
    out, comparison = follow(pack, frames, 4, reference)
    assert comparison.late == {0: late} and comparison.followed == 0
    assert torch.equal(out, blindly(pack, frames, 4))


@pytest.mark.parametrize("far", [0, 1])
def test_a_damaged_reference_is_not_late(pack, far):
    """Nor that of a still clip, in which all times fit alike."""
    frames = film(lambda f: (40 + far * f, 64), frames=17)
    _, comparison = follow(pack, frames, 4, small(frames) + 0.02 * noise_like(small(frames)))
    assert comparison.lag < 1.05 and not comparison.late and comparison.followed == 12


@pytest.mark.parametrize("gaps", [4, 7, 8, 16])
def test_one_keyframe_alone_makes_no_reference_late(pack, gaps):
    """In a clip that stands still, where the others have no say."""
    frames = film(lambda f: (48, 64), frames=4 * gaps + 1)
    reference = small(frames)
    reference[11:14] = small(film(there_and_back, seed=7))[:3]
    _, comparison = follow(pack, frames, 4, reference)
    assert not comparison.late and comparison.disagreeing == [12] and comparison.followed == 3 * (gaps - 2)


def test_of_two_clips_the_late_one_alone_is_blind(pack):
    frames = film(lambda f: (40 + f, 64), frames=25)
    clips = torch.stack([frames, frames])
    references = torch.stack([small(frames), small(frames)[[max(f - 2, 0) for f in range(25)]]])
    out, comparison = follow(pack, clips, 4, references)
    assert comparison.late == {1: 2} and comparison.followed == 18
    assert torch.equal(out[1], blindly(pack, frames, 4)) and not torch.equal(out[0], out[1])


def test_blind_pictures_are_made_one_by_one(guided):
    """So that a run can be stopped between them, though many gaps of small clips go together."""
    clip, made = torch.rand(1, 3, 9, 32, 32), []

    def blind(times, items):
        return (made.append(time) or clip[items, :, 0] for time in times)

    reference = guided.Reference(torch.full((1, 3, 33, 16, 16), torch.nan), 1)
    followed = guided.follow(clip, 4, reference, list(range(33)), blind, guided.Comparison())
    assert [next(followed)[0] for _ in range(3)] == [0, 1, 2] and made == [1, 2]
