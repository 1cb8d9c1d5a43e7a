"""The benchmark of in-betweening on film: its figures on made-up clips, and one row of it."""

from __future__ import annotations

import argparse
import json

import pytest
import torch
import torch.nn.functional as F


@pytest.fixture(scope="module")
def script(bench):
    return bench("inbetween")


def moving(frames=9, height=48, width=64):
    """A texture that slides by two pixels a frame."""
    generator = torch.Generator().manual_seed(1)
    wide = F.interpolate(
        torch.rand(1, 3, 12, 24, generator=generator), size=(height, 2 * width), mode="bicubic"
    )
    return torch.cat([wide[..., 2 * i : 2 * i + width] for i in range(frames)]).clamp(0, 1)


def test_figures_know_the_answer(script):
    clip = moving()
    assert script.psnr(clip, (clip + 0.1)).mean() == pytest.approx(20, abs=0.01)
    assert script.ssim(clip, clip).mean() == pytest.approx(1)
    # Frames in between that are blurred pulse once a gap; those that are the film's do not.
    soft = clip.clone()
    between = [i for i in range(9) if i % 4]
    soft[between] = script.blurred(clip, 1.5)[between]
    same, pulsing = (script.figures(made, clip, 4) for made in (clip, soft))
    assert same["detail"] == pytest.approx(1) and same["pulse"] == pytest.approx(0, abs=1e-6)
    assert pulsing["detail"] < 0.8 and pulsing["pulse"] > 0.1


def test_a_row_is_measured_as_the_node_makes_it(script, monkeypatch):
    monkeypatch.setattr(script, "window_of", lambda *_: moving())
    options = argparse.Namespace(
        references=["clean"], gaps=[4], only=["Bunny, fast"], frames=9, device=torch.device("cpu")
    )
    rows = {row["method"]: row for row in script.measure(options, set())}
    assert rows["guided"]["followed"] == 6 and rows["guided"]["unlike"] < 0.01
    assert rows["guided"]["psnr"] > rows["linear"]["psnr"] + 3
    assert not list(
        script.measure(options, {(row["segment"], "fast", 4, "clean", m) for m, row in rows.items()})
    )


def test_what_the_pages_say_of_film(script, pack):
    report = json.loads((pack.root / "benchmarks" / "inbetween.json").read_text(encoding="utf-8"))
    rows = [
        row for row in report["rows"] if row["method"] == "guided" and row["reference"] not in script.WRONG
    ]
    gains = {(row["segment"], row["gap"], row["reference"]): script.gain(report, row) for row in rows}
    assert len(rows) == 12 * 3 * 9, "every window, gap and damage"
    assert min(gains.values()) > -0.15
    assert min(found for key, found in gains.items() if key[2] == "clean") > 0
    assert 0.79 < min(row["detail"] for row in rows) < 0.81
    every = [row for row in report["rows"] if row["method"] == "guided"]
    told = {
        kind: [row for row in every if row["reference"] in kind]
        for kind in (("another clip",), tuple(set(script.DAMAGES) - set(script.WRONG)))
    }
    other, damaged = told.values()
    assert len(other) == 36 and min(row["unlike"] for row in other) > 2.4
    assert 0.25 < max(row["unlike"] for row in damaged) < 0.3 and all(row["followed"] for row in damaged)
    late = [row for row in every if row["reference"] == "two frames late"]
    assert len(late) == 36 and not any(row["followed"] for row in late)
    assert max(row["lag"] for row in damaged) < 1.05 and min(row["lag"] for row in late) > 1.15
