"""Thinning a LATENT and bringing it back: lengths, contents, masks, notes, and errors that say what to do."""

from __future__ import annotations

import re

import comfy.nested_tensor
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st


@pytest.fixture
def stride(pack):
    return pack("latents.stride")


@pytest.fixture
def restore(pack):
    return pack("latents.restore")


def empty(frames=9, batch=1, grid=(2, 3), **more):
    return {"samples": torch.zeros(batch, 128, frames, *grid), **more}


def with_audio(latent, audio):
    return {**latent, "samples": comfy.nested_tensor.NestedTensor((latent["samples"], audio))}


@given(st.integers(2, 200), st.integers(1, 8))
def test_lengths(pack, frames, step):
    length = pack("latents.stride").strided_length(frames, step)
    # Long enough to cover the clip, and no longer than that takes.
    assert (length - 1) * step >= frames - 1 > (length - 2) * step


def test_an_empty_latent(stride):
    latent = empty(batch_index=[4], downscale_ratio_spacial=32)
    before = dict(latent)
    thinned = stride.thin(latent, 3)
    assert thinned["samples"].shape == (1, 128, 4, 2, 3) and not thinned["samples"].any()
    assert thinned["batch_index"] == [4] and thinned["downscale_ratio_spacial"] == 32
    assert thinned[stride.NOTE] == {"stride": 3, "frames": 9, "strided_frames": 4}
    assert latent == before and latent["samples"] is before["samples"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_first_frame_keeps_its_image_and_mask(stride, restore, dtype):
    latent = empty(batch=2)
    latent["samples"] = latent["samples"].to(dtype)
    latent["samples"][:, :, 0] = torch.randn(2, 128, 2, 3).to(dtype)
    mask = torch.ones(2, 1, 9, 1, 1)
    mask[:, :, 0] = 0.0
    mask[:, :, 4:] = 0.7
    latent["noise_mask"] = mask
    thinned = stride.thin(latent, 2)
    assert thinned["samples"].dtype == dtype
    assert torch.equal(thinned["samples"][:, :, 0], latent["samples"][:, :, 0])
    assert thinned["noise_mask"].flatten(2)[0, 0].tolist() == pytest.approx([0.0, 1.0, 0.7, 0.7, 0.7])

    note = stride.StrideNote.read(thinned)
    full = restore.restored(thinned, note, torch.randn(2, 128, 9, 2, 3))
    assert torch.equal(full["samples"][:, :, 0], latent["samples"][:, :, 0])
    assert full["noise_mask"].flatten(2)[0, 0].tolist() == pytest.approx([0.0, 1, 1] + [0.7] * 6)
    assert full["samples"].dtype == dtype and stride.NOTE not in full


def test_masks_of_another_shape_are_left_to_core(stride):
    mask = torch.rand(1, 64, 96)
    assert stride.thin(empty(noise_mask=mask), 2)["noise_mask"] is mask


def test_audio_keeps_its_length(stride):
    audio = torch.randn(1, 8, 33, 16)
    masks = comfy.nested_tensor.NestedTensor((torch.ones(1, 1, 9, 1, 1), torch.ones(1, 1, 33, 16)))
    thinned = stride.thin({**with_audio(empty(), audio), "noise_mask": masks}, 4)
    video, kept = thinned["samples"].unbind()
    assert video.shape[2] == 3 and kept is audio
    assert [tuple(mask.shape[2:]) for mask in thinned["noise_mask"].unbind()] == [(3, 1, 1), (33, 16)]


def test_a_video_is_decoded_thinned_and_encoded(stride):
    """Latent frames whose eight values are numbers of video frames, in a codec that just regroups them."""
    numbers = torch.arange(65.0)
    latent = empty()
    latent["samples"][:, :8, 0] = numbers[0]
    latent["samples"][:, :8, 1:] = numbers[1:].view(8, 8).T[None, :, :, None, None]

    def reencode(video, thin_frames):
        frames = torch.cat((video[:, :1, 0], video[:, :8, 1:].transpose(1, 2).flatten(1, 2)), dim=1)
        frames = thin_frames(frames[..., None].expand(-1, -1, -1, -1, 3))[..., 0]
        out = torch.zeros(1, 128, (frames.shape[1] - 1) // 8 + 1, 2, 3)
        out[:, :8, 1:] = frames[:, 1:].unflatten(1, (-1, 8)).transpose(1, 2)
        return out

    latent["samples"][:, 8:] = 0.0
    thinned = stride.thin(latent, 2, reencode)["samples"]
    assert torch.equal(thinned[:, :, 0], latent["samples"][:, :, 0])
    assert thinned[0, :8, 1:, 0, 0].T.flatten().tolist() == list(range(2, 66, 2))
    # Three does not divide 64: the clip's last frame fills up the end.
    assert stride.thin(latent, 3, reencode)["samples"][0, :8, -1, 0, 0].tolist() == [
        51,
        54,
        57,
        60,
        63,
        64,
        64,
        64,
    ]


def test_a_video_of_another_number_of_frames_a_latent(stride):
    """Nine latent frames of four: 33 video frames, of which seventeen stay."""
    seen = []

    def reencode(video, thin_frames):
        seen.extend(thin_frames(torch.arange(33).view(1, 33, 1, 1, 1)).flatten().tolist())
        return torch.ones(1, 128, 5, 2, 3)

    video = {"samples": torch.ones(1, 128, 9, 2, 3)}
    assert stride.thin(video, 2, reencode, frames_a_latent=4)[stride.NOTE]["strided_frames"] == 5
    assert seen == list(range(0, 33, 2))
    seen.clear()
    with pytest.raises(ValueError, match="expected 4 latent frames from 13 video frames, got 5"):
        stride.thin(video, 3, reencode, frames_a_latent=4)
    assert seen == [0, 3, 6, 9, 12, 15, 18, 21, 24, 27, 30, 32, 32]


def test_a_note_says_frames_a_latent_only_where_they_are_not_the_usual_ones(stride):
    usual = {"stride": 3, "frames": 9, "strided_frames": 4}
    assert stride.thin(empty(), 3, frames_a_latent=8)[stride.NOTE] == usual
    thinned = stride.thin(empty(), 3, frames_a_latent=4)
    assert thinned[stride.NOTE] == {**usual, "frames_a_latent": 4}
    assert stride.StrideNote.read(thinned) == stride.StrideNote(3, 9, 4, frames_a_latent=4)
    assert stride.StrideNote.read({**thinned, stride.NOTE: usual}).frames_a_latent == 8


@pytest.mark.parametrize(
    ("frames", "step", "words"),
    [(1, 2, "single latent frame.* 9 video frames or more"), (3, 3, r"\(9 video frames\).* 13 video frames")],
)
def test_errors_count_video_frames_as_the_model_does(stride, frames, step, words):
    with pytest.raises(ValueError, match=words):
        stride.thin(empty(frames), step, frames_a_latent=4)


@pytest.mark.parametrize(
    ("make", "step", "words"),
    [
        (lambda: empty(1), 2, "single latent frame.*17 video frames or more"),
        (lambda: empty(1), 8, "single latent frame.*65 video frames or more"),
        (lambda: empty(3), 3, "Set it to 2 or less.*25 video frames"),
        (lambda: {"samples": torch.zeros(1, 4, 8, 8)}, 2, "expected a video latent"),
        (lambda: {"samples": torch.ones(1, 128, 9, 2, 3)}, 2, "Connect vae"),
    ],
)
def test_errors_say_what_to_do(stride, make, step, words):
    with pytest.raises(ValueError, match=words):
        stride.thin(make(), step)


def test_latents_with_guides_are_refused(stride):
    guided = empty(10)
    guided["samples"][:, :, -1] = 1.0
    guided["noise_mask"] = torch.ones(1, 1, 10, 1, 1)
    guided["noise_mask"][:, :, -1] = 0.0
    with pytest.raises(ValueError, match="add guides after KeyframeStride"):
        stride.thin(guided, 2)
    video = {**guided, "samples": torch.ones(1, 128, 10, 2, 3)}
    with pytest.raises(ValueError, match="add guides after KeyframeStride"):
        stride.thin(video, 2, lambda *_: torch.zeros(1))


def test_a_length_that_an_error_advises_works(stride):
    for step in range(2, 9):
        assert stride.thin(empty(step + 1), step)["samples"].shape[2] == 2


@given(st.integers(3, 200), st.sampled_from([(2, 4), (2, 6), (2, 8), (4, 8), (3, 6), (1, 5), (4, 4)]))
def test_a_clip_that_is_thinned_twice_is_as_long_as_one_thinned_at_once(pack, frames, strides):
    length, (made, stride) = pack("latents.stride").strided_length, strides
    assert length(length(frames, made), stride // made) == length(frames, stride)


@pytest.mark.parametrize("frames", [9, 16, 17])
@pytest.mark.parametrize(("made", "whole"), [(2, 4), (2, 8), (4, 8), (3, 6)])
def test_a_strided_latent_is_thinned_further(stride, restore, frames, made, whole):
    """The whole stride against the full length; an empty clip with an image is the same either way."""
    latent = empty(frames, batch=2)
    latent["samples"][:, :, 0] = torch.randn(2, 128, 2, 3)
    mask = torch.ones(2, 1, frames, 1, 1)
    mask[:, :, 0] = 0.3
    latent["noise_mask"] = mask
    once, twice = stride.thin(latent, whole), stride.thin(stride.thin(latent, made), whole)
    assert once.keys() == twice.keys() and once[stride.NOTE] == twice[stride.NOTE]
    assert twice[stride.NOTE]["stride"] == whole and twice[stride.NOTE]["frames"] == frames
    for key in ("samples", "noise_mask"):
        assert torch.equal(once[key], twice[key])
    assert restore.note_for(twice, whole, stride.video_frames(frames)).frames == frames


@pytest.mark.parametrize(
    ("made", "whole", "frames", "kept"),
    [(2, 4, 9, list(range(0, 33, 2))), (2, 8, 17, list(range(0, 65, 4))),
     # Sixteen latent frames, nine at stride 2 and five at 4: what was sampled past the end is used.
     (2, 4, 16, list(range(0, 65, 2))),
     # Six latent frames, four at stride 2: where the strided clip itself ends, its last frame stands still.
     (2, 4, 6, [*range(0, 25, 2), 24, 24, 24, 24])],
)  # fmt: skip
def test_a_strided_video_is_thinned_by_what_is_left(stride, made, whole, frames, kept):
    short, seen = stride.strided_length(frames, made), []

    def reencode(video, thin_frames):
        assert video.shape[2] == short
        numbers = torch.arange(stride.video_frames(short))
        seen.extend(thin_frames(numbers.view(1, -1, 1, 1, 1)).flatten().tolist())
        return torch.ones(1, 128, stride.strided_length(frames, whole), 2, 3)

    video = {"samples": torch.ones(1, 128, short, 2, 3)}
    noted = stride.StrideNote(made, frames, short).write(video)
    assert stride.thin(noted, whole, reencode)[stride.NOTE]["frames"] == frames
    assert seen == kept


def test_the_stride_that_a_latent_has_hands_it_on(stride):
    def never(*_):
        raise AssertionError

    noted = stride.StrideNote(2, 9, 5).write({"samples": torch.randn(1, 128, 5, 2, 3)})
    assert stride.thin(noted, 2, never)["samples"] is noted["samples"]
    assert stride.thin(noted, 2)[stride.NOTE] == noted[stride.NOTE]


@pytest.mark.parametrize(("made", "whole"), [(2, 3), (4, 6), (4, 2)])
def test_a_stride_that_the_one_there_does_not_divide_is_an_error_that_names_both(stride, made, whole):
    with pytest.raises(
        ValueError,
        match=rf"^stride: {whole} is set, but the latent was strided by {made} already.*multiple of {made}",
    ):
        stride.thin(stride.thin(empty(17), made), whole)


def test_a_stride_beyond_the_full_length_is_an_error_for_a_strided_latent_too(stride):
    with pytest.raises(ValueError, match=r"^stride: 8 is too large for 8 latent frames \(57 video frames\)"):
        stride.thin(stride.thin(empty(8), 2), 8)


@pytest.mark.parametrize(
    ("frames", "step", "words"),
    [
        (16, 2, r"15 latent frames after the first.* 8 video frames past.*: 113 and 129"),
        (16, 4, r"8 video frames past.*: 97 and 129"),
        (16, 8, r"8 video frames past.*: 65 and 129"),
        (18, 8, r"56 video frames past.*: 129 and 193"),
        (4, 2, r"8 video frames past.*: 17 and 33"),
        (17, 2, None), (17, 8, None), (33, 8, None), (16, 5, None), (9, 1, None),
    ],
)  # fmt: skip
def test_a_clip_that_ends_within_a_latent_frame_is_warned_about_once(stride, caplog, frames, step, words):
    stride.warn_of_tail(stride.StrideNote(step, frames, stride.strided_length(frames, step)))
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == (words is not None)
    if words is not None:
        assert re.search(words, lines[0]) and "\n" not in lines[0]


def test_the_lengths_that_the_warning_names_are_counted_as_the_vae_counts(stride, caplog):
    stride.warn_of_tail(stride.StrideNote(2, 16, 9, frames_a_latent=4))
    assert "4 video frames past" in caplog.text and "57 and 65" in caplog.text


def test_latents_of_another_family_are_refused(stride):
    with pytest.raises(ValueError, match="^latent: expected 128 channels.*got 16"):
        stride.thin({"samples": torch.zeros(1, 16, 9, 2, 3)}, 2, channels=128)


OLD = {"stride": 2, "frames": 9, "strided_frames": 5}


def test_without_a_note_the_length_is_not_guessed(stride, restore):
    """Two seconds of video beside four of sound are worse than an error."""
    for latent in (empty(5), {**empty(5), stride.NOTE: "odd"}, {**empty(4), stride.NOTE: OLD}):
        assert stride.StrideNote.read(latent) is None
        with pytest.raises(ValueError, match=r"^stride: .*set stride and length.*never strided, set 1"):
            restore.note_for(latent)
        assert restore.note_for(latent, 1) is None


def test_what_a_note_calls_the_full_length_is_handed_on(stride, restore):
    """The video that was brought back meets its sound, which still carries the note."""
    assert restore.note_for({**empty(9), stride.NOTE: OLD}) is None


@pytest.mark.parametrize("given_stride", [0, 2])
def test_guides_and_keyframes_behind_a_strided_clip_are_told_by_its_note(stride, restore, given_stride):
    longer = {**empty(7), stride.NOTE: OLD, "noise_mask": torch.ones(1, 1, 7, 1, 1)}
    with pytest.raises(ValueError, match=r"^latent: .*5 latent frames, and it has 7.*crop or separate"):
        restore.note_for(longer, given_stride)
    assert restore.note_for(longer, 2, 97).frames == 13


@pytest.mark.parametrize("given_stride", [1, 3])
def test_a_stride_against_the_note_is_an_error(stride, restore, given_stride):
    noted = {**empty(5), stride.NOTE: OLD}
    with pytest.raises(ValueError, match=r"^stride: .*strided by 2.*Set 0 or 2"):
        restore.note_for(noted, given_stride)
    assert restore.note_for(noted, 2) == restore.note_for(noted) == stride.StrideNote(2, 9, 5)


def test_a_note_that_sound_brings_along_is_believed_only_where_it_can_be_true(stride):
    separate, concat = separate_and_concat()
    thinned = stride.thin(with_audio(empty(grid=(4, 6)), torch.zeros(1, 8, 67, 16)), 2)
    video, audio = separate(thinned)
    # A node that knows no notes has put an image into the video: the sound's is the only one, and right.
    replaced = {"samples": video["samples"] + 1}
    read = stride.StrideNote.read
    assert read(concat(replaced, audio)).frames == 9 and read(video).frames == 9
    # Made larger in between.
    assert read(concat({"samples": torch.zeros(1, 128, 5, 8, 12)}, audio)).frames == 9
    for other in (
        concat({"samples": torch.zeros(1, 128, 9, 4, 6)}, audio),
        concat({"samples": torch.zeros(1, 128, 5, 6, 4)}, audio),
        concat(replaced, {**audio, "samples": audio["samples"][:, :, :35]}),
        concat(replaced, {"samples": audio["samples"]}),
    ):
        assert read(other) is None
        # Such a clip may be strided.
        assert read(stride.thin({**other, "samples": other["samples"] * 0}, 2)).stride == 2


def separate_and_concat():
    """What core's nodes do, those of releases that import them."""
    try:
        from comfy_extras.nodes_lt import LTXVConcatAVLatent, LTXVSeparateAVLatent
    except ImportError:
        pytest.skip("this tree has no LTX nodes")
    return (lambda av: LTXVSeparateAVLatent.execute(av).args), (
        lambda v, a: LTXVConcatAVLatent.execute(v, a).args[0]
    )


def test_notes_of_three_numbers_are_read(stride):
    assert stride.StrideNote.read({**empty(5), stride.NOTE: OLD}) == stride.StrideNote(2, 9, 5)
    assert stride.StrideNote.read({**empty(5), stride.NOTE: {**OLD, "seed": 1}}) is None


@given(st.integers(1, 200), st.integers(1, 8))
def test_a_thinned_guide_covers_the_thinned_clip(pack, latent_frames, step):
    """Of T latent frames, picked as the clip's own frames are; images and odd lengths lose nothing."""
    stride = pack("latents.stride")
    whole = stride.video_frames(latent_frames)
    kept = stride.guide_frames(whole, step)
    assert len(kept) == stride.video_frames(stride.strided_length(latent_frames, step))
    assert kept.tolist() == [min(i * step, whole - 1) for i in range(len(kept))]
    for more in range(1, 8):
        odd = stride.guide_frames(whole + more, step)
        assert len(odd) >= len(kept) and odd[-1] <= whole + more - 1
        assert odd[: -(-(whole + more) // step)].tolist() == list(range(0, whole + more, step))
    assert stride.guide_frames(1, step).tolist() == [0]


def test_a_guide_for_latent_frames_of_four(stride):
    # Eight latent frames hold 29 video frames; strided by three they are four, of 13.
    assert stride.guide_frames(29, 3, 4).tolist() == [0, 3, 6, 9, 12, 15, 18, 21, 24, 27, 28, 28, 28]


@pytest.mark.parametrize("rate", [float("nan"), float("inf"), -24.0])
def test_what_is_no_frame_rate_is_an_error(stride, rate):
    with pytest.raises(ValueError, match="^frame_rate: "):
        stride.low_rate(rate, 2)
    assert stride.low_rate(24.0, 2) == 12.0 and stride.low_rate(0.0, 2) == 0.0


@pytest.mark.parametrize(
    ("given_stride", "length", "frames"),
    [(2, 0, 9), (0, 65, 9), (2, 57, 8), (2, 65, 9), (4, 0, 17), (3, 90, 12)],
)
def test_stride_and_length_by_hand(stride, restore, given_stride, length, frames):
    note = restore.note_for(empty(5), given_stride, length)
    assert note.frames == frames and note.strided_frames == 5


@pytest.mark.parametrize(
    ("given_stride", "length", "frames"), [(2, 0, 9), (0, 33, 9), (2, 29, 8), (3, 46, 12), (0, 36, 9)]
)
def test_length_by_hand_in_frames_of_another_vae(stride, restore, given_stride, length, frames):
    note = restore.note_for(empty(5), given_stride, length, 4)
    assert (note.frames, note.strided_frames, note.frames_a_latent) == (frames, 5, 4)
    # A note of this clip knows better than the VAE that is connected.
    noted = stride.StrideNote(note.stride, frames, 5, frames_a_latent=4).write(empty(5))
    assert restore.note_for(noted, given_stride, length, 8) == note


@pytest.mark.parametrize(
    ("given_stride", "length", "words"),
    [(2, 97, "97 video frames at stride 2 make 13 .*between 29 and 33"), (0, 801, "801 video frames .*of 50; 8 is")],
)  # fmt: skip
def test_a_length_of_another_vae_that_does_not_fit(restore, given_stride, length, words):
    with pytest.raises(ValueError, match=words):
        restore.note_for(empty(5), given_stride, length, 4)


def test_a_length_that_does_not_fit_names_those_that_do(restore):
    with pytest.raises(ValueError, match="between 57 and 65"):
        restore.note_for(empty(5), 2, 97)


@pytest.mark.parametrize(
    ("frames", "given_stride", "length", "words"),
    [(5, 0, 801, "stride of 25; 8 is the largest"), (1, 2, 0, "nothing in between"), (1, 0, 9, "nothing in between")],
)  # fmt: skip
def test_what_cannot_be_restored_says_why(restore, frames, given_stride, length, words):
    with pytest.raises(ValueError, match=words):
        restore.note_for(empty(frames), given_stride, length)


def test_guides_have_to_be_cropped_first(stride, restore):
    """A guide would be taken for the clip's last frame, and blended into it."""
    guided = {**empty(6), "noise_mask": torch.ones(1, 1, 6, 1, 1)}
    guided["noise_mask"][:, :, -1] = 0.0
    with pytest.raises(ValueError, match="crops guides before this one, or set length"):
        restore.note_for(guided, 2, 0)
    # In-place conditioning of the last frame looks the same; with a length, or a note, nothing is guessed.
    held = {**empty(5), "noise_mask": torch.ones(1, 1, 5, 1, 1)}
    held["noise_mask"][:, :, [0, -1]] = 0.0
    assert restore.note_for(held, 2, 65).frames == 9
    assert restore.note_for(stride.StrideNote(2, 9, 5).write(held)).frames == 9
    first = {**empty(5), "noise_mask": torch.ones(1, 1, 5, 1, 1)}
    first["noise_mask"][:, :, 0] = 0.0
    assert restore.note_for(first, 2, 0).frames == 9


@pytest.mark.parametrize(("frames", "given_stride", "length"), [(5, 1, 0), (5, 1, 33), (5, 0, 33), (1, 1, 0)])
def test_a_full_length_needs_nothing(restore, frames, given_stride, length):
    assert restore.note_for(empty(frames), given_stride, length) is None


@pytest.mark.parametrize("method", ["linear", "smooth", "motion"])
def test_latents_come_back_at_the_right_times(pack, restore, stride, method):
    """A latent that rises with time, thinned at the times of a stride, comes back as it was."""
    times = pack("latents.interpolate").latent_times
    note = stride.StrideNote(2, 9, 5)
    rising = times(5, 2).float().view(1, 1, 5, 1, 1).expand(1, 128, 5, 2, 3) / 50
    latent = note.write({"samples": rising})
    seen = []
    estimate = pack("latents.motion").estimate_motion
    out = restore.restore_latents(
        latent, note, method, estimate, torch.device("cpu"), lambda *at: seen.append(at)
    )
    # The middle of the last long latent frame is the last there is to know.
    expected = times(9).clamp(max=57).float() / 50
    assert torch.allclose(out["samples"][0, 0, :, 0, 0], expected, atol=1e-5)
    assert seen == [(i + 1, 9) for i in range(9)]


@pytest.mark.parametrize(
    ("frames_a_latent", "middles"), [(4, [0, 2.5, 6.5, 10.5]), (8, [0, 4.5, 12.5, 20.5]), (1, [0, 1, 2, 3])]
)
def test_middles_of_latent_frames(pack, frames_a_latent, middles):
    times = pack("latents.interpolate").latent_times
    assert times(4, frames_a_latent=frames_a_latent).tolist() == middles
    assert times(4, 3, frames_a_latent).tolist() == [3 * time for time in middles]


@pytest.mark.parametrize("method", ["linear", "smooth", "motion"])
@pytest.mark.parametrize("step", [2, 3])
def test_frames_come_back_at_the_right_times(pack, restore, stride, method, step):
    frames, short = 7, stride.strided_length(7, step)
    note = stride.StrideNote(step, frames, short)
    low = (torch.arange(8 * short - 7) * step / 64).view(1, -1, 1, 1, 1).expand(2, -1, 4, 5, 3)
    estimate = pack("latents.motion").estimate_motion
    full = restore.restore_frames(low, note, method, estimate, torch.device("cpu"), lambda *_: None)
    assert full.shape == (2, 49, 4, 5, 3)
    assert torch.allclose(full[0, :, 0, 0, 0], torch.arange(49) / 64, atol=1e-5)
    # Frames that were there are not touched.
    assert torch.equal(full[:, ::step], low[:, : full[:, ::step].shape[1]])


def test_smooth_has_no_kinks_and_no_overshoot(pack):
    module = pack("latents.interpolate")
    clip = torch.tensor([0.0, 0.0, 1.0, 1.0, 0.2]).view(1, 1, 5, 1, 1)
    times, wanted = module.frame_times(5, 8), torch.arange(0, 32.01, 0.25, dtype=torch.float64)
    out = torch.cat([p.flatten() for _, p in module.in_between(clip, times, wanted, "smooth")])
    assert out.min() >= 0 and out.max() <= 1
    slopes = out.diff() / 0.25
    assert slopes.diff().abs().max() < 0.03
    linear = torch.cat([p.flatten() for _, p in module.in_between(clip, times, wanted, "linear")])
    assert (linear.diff() / 0.25).diff().abs().max() > 0.1


def test_an_error_in_the_callback_stops_the_work(restore, stride):
    def stop(done, total):
        raise InterruptedError

    note = stride.StrideNote(2, 9, 5)
    with pytest.raises(InterruptedError):
        restore.restore_latents(note.write(empty(5)), note, "linear", None, torch.device("cpu"), stop)
