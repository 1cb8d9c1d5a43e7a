"""Clips sampled piece by piece, and schedules sampled piece by piece."""

from __future__ import annotations

import logging

import comfy.nested_tensor
import pytest
import torch
from freezing import SIGMAS
from reference import equal
from tiny_models import FAMILIES, build_model, conditioning, noise_like, sample

FULL, STRIDED = 17, 9


@pytest.fixture
def strided(pack):
    """A MODEL for 9 latent frames in the place of 17."""
    node = pack("nodes").KeyframeStride
    return lambda model: node.execute(model, {"samples": torch.zeros(1, 128, FULL, 2, 2)}, 2).args[0]


def piece(family, frames, seconds=None):
    """Noise of so many latent frames, with sound of that length at 25 latents a second."""
    noise = noise_like(family, (frames, 2, 2))
    if seconds is None:
        return noise
    sound = torch.randn(1, 8, round(25 * seconds), 16, generator=torch.Generator().manual_seed(4))
    return comfy.nested_tensor.NestedTensor((noise.unbind()[0], sound))


def run(model, family, noise, rate=24.0):
    given = {
        "positive": conditioning(family, frame_rate=rate),
        "negative": conditioning(family, 7, frame_rate=rate),
    }
    return sample(model, family, noise, **given)


@pytest.mark.parametrize("frames", [2, 5, 8])
def test_a_short_piece_of_unknown_rate_is_refused(frames, strided):
    with pytest.raises(
        ValueError, match=f"model: .*stride 2.*piece of {frames},.*MODEL from before Keyframe Stride"
    ):
        run(strided(build_model()), "ltxv", piece("ltxv", frames))


@pytest.mark.parametrize("frames", [1, 10, 13, 17, 25])
def test_pictures_and_pieces_longer_than_the_strided_clip_are_stock(frames, strided, pack):
    model, noise = build_model(), piece("ltxv", frames)
    ours = strided(model)
    assert equal(run(ours, "ltxv", noise), run(model, "ltxv", noise))
    entry = pack("patches.mount").journal_of(ours).records()[-1]["techniques"]["keyframe stride"]
    reason = "FULL_LENGTH" if frames == FULL else "OTHER_LENGTH"
    assert entry["declined"] == {reason: 3} and not entry["taken"]


@pytest.mark.parametrize("frames", [5, 8, 9, 13])
def test_sound_tells_the_rate_of_a_piece(frames, strided):
    """As long as the piece at the low rate, or at the full one."""
    model, seconds = build_model("ltxav"), (8 * (frames - 1) + 1) / 24
    low = piece("ltxav", frames, 2 * seconds)
    result = run(strided(model), "ltxav", low)
    assert equal(result, run(model, "ltxav", low, 12.0)) and not equal(result, run(model, "ltxav", low))
    if frames != STRIDED:
        full = piece("ltxav", frames, seconds)
        assert equal(run(strided(model), "ltxav", full), run(model, "ltxav", full))


def test_sound_of_another_length_tells_nothing(strided):
    with pytest.raises(ValueError, match="piece of 5"):
        run(strided(build_model("ltxav")), "ltxav", piece("ltxav", 5, 6.0))


def test_the_full_length_alone_says_what_to_do(strided, caplog):
    """A sampler that makes its own latent of the full length leaves the stride unused."""
    ours = strided(build_model())
    with caplog.at_level(logging.INFO):
        run(ours, "ltxv", piece("ltxv", FULL))
    assert "No run with this MODEL was strided so far" in caplog.text
    caplog.clear()
    run(ours, "ltxv", piece("ltxv", STRIDED))
    with caplog.at_level(logging.INFO):
        run(ours, "ltxv", piece("ltxv", FULL))
    assert "not needed here" in caplog.text and "No run with this MODEL" not in caplog.text


def in_pieces(patcher, cuts=(3, 6)):
    """KJNodes' audio-normalising sampling takes the schedule so: the rest of OUTER_SAMPLE once for every piece."""
    clone = patcher.clone()

    def wrapper(executor, noise, latent_image, sampler, sigmas, *args, **kwargs):
        for start, end in zip((0, *cuts), (*cuts, len(sigmas) - 1), strict=True):
            latent_image = (
                executor(noise, latent_image, sampler, sigmas[start : end + 1], *args, **kwargs) * 0.9
            )
        return latent_image

    clone.add_wrapper_with_key("outer_sample", "pieces", wrapper)
    return clone


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("scope", ["whole blocks", "per-frame work", "spatial attention"])
def test_pieces_within_one_run_are_one_run_in_either_order(family, scope, frozen, record, pack):
    model = build_model(family)
    one, other = in_pieces(frozen(model, scope=scope)), frozen(in_pieces(model), scope=scope)
    result = sample(one, family, sigmas=SIGMAS)
    assert equal(result, sample(other, family, sigmas=SIGMAS))
    assert not equal(result, sample(in_pieces(model), family, sigmas=SIGMAS))
    for ours in (one, other):
        records = pack("patches.mount").journal_of(ours).records()
        assert [entry["steps"] for entry in records] == [8]
        assert record(ours)["steps"] == [1, 2, 4, 5] and record(ours)["taken"]


@pytest.mark.parametrize("place", ["gpu", "cpu"])
def test_what_is_kept_counts_once_when_a_run_comes_in_pieces(place, frozen, pack, monkeypatch):
    """Every piece asks what room there is."""
    model, size = build_model("ltxav"), 54 * 128 * 4
    ours = in_pieces(frozen(model, forecast="hold", cache_device=place), cuts=(2, 4))
    journal_of = pack("patches.mount").journal_of

    def get_free_memory(device=None, torch_free_too=False):
        """Room for the values of three blocks, twice as much being free; none of it once they are kept."""
        free = 0 if kept else 2 * 3 * size
        return (free, free) if torch_free_too else free

    kept: list[bool] = []
    model.model.diffusion_model.register_forward_hook(lambda *_: kept.append(True))
    monkeypatch.setattr(pack("patches.wrappers").mm, "get_free_memory", get_free_memory)
    sample(ours, "ltxav", sigmas=SIGMAS, cfg=1.0)
    entry = journal_of(ours).records()[-1]["techniques"]["spatial freeze"]
    assert "CACHE_FULL" not in entry["declined"] and entry["taken"] == 4


def test_runs_of_their_own_say_so_and_warn_only_if_none_of_them_acts(windowed, frozen, caplog, pack):
    """As LTXVideo's normalising sampler makes them: a sampler of its own for every piece."""

    def sampled(ours):
        caplog.clear()
        with caplog.at_level(logging.INFO):
            for start, end in ((0, 3), (3, 6), (6, 8)):
                sample(ours, sigmas=SIGMAS[start : end + 1])
        told = [record for record in caplog.records if " none of the " in record.getMessage()]
        return [(record.levelno, "piece of a schedule" in record.getMessage()) for record in told]

    early = windowed(build_model(), start_percent=0.0, end_percent=0.3)
    assert sampled(early) == [(logging.INFO, True)] * 2
    records = pack("patches.mount").journal_of(early).records()
    assert [bool(entry["techniques"]["temporal window"]["taken"]) for entry in records] == [
        True,
        False,
        False,
    ]
    assert sampled(windowed(build_model(), start_percent=0.5, end_percent=0.505)) == [
        (logging.INFO, True),
        (logging.INFO, True),
        (logging.WARNING, False),
    ]
    assert sampled(frozen(build_model(), start_percent=0.0, end_percent=0.2))


def test_a_second_stage_is_no_piece(windowed, last_run, caplog):
    """It begins where no run has ended, and a range that covers none of it is news."""
    ours = windowed(build_model(), start_percent=0.0, end_percent=0.2)
    sample(ours, sigmas=SIGMAS)
    assert last_run(ours)["taken"]
    caplog.clear()
    sample(ours, sigmas=SIGMAS[5:])
    assert [record.levelno for record in caplog.records if " none of the " in record.getMessage()] == [
        logging.WARNING
    ]
