"""The quality table: its arithmetic, and one small run of the script on the CPU."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch


def test_uniform_steps_are_the_shifted_ones(bench):
    rows, model = bench("rows"), bench("tiny_ltx.model")
    own = model.TEACHER_RECIPE.sigmas
    for steps in (6, 16, 23, 48):
        got = rows.Row("", "", steps=steps).schedule(own, model.SHIFT)
        assert got == pytest.approx(model.shifted_sigmas(steps))


@pytest.mark.parametrize("steps", [23, 20, 14, 10, 8])
def test_larger_steps_at_the_end_keep_the_start(bench, steps):
    rows, model = bench("rows"), bench("tiny_ltx.model")
    own = model.TEACHER_RECIPE.sigmas
    tail = rows.Row("", "", steps=steps, merged=rows.TAIL).schedule(own, model.SHIFT)
    assert len(tail) == steps + 1 and set(tail) <= set(own)
    kept = 24 - 2 * (24 - steps) if steps >= 12 else 0
    assert tail[: kept + 1] == own[: kept + 1] and tail[-1] == 0 and tail[0] == 1


@pytest.mark.parametrize("frames", [16, 9])
def test_schedules_for_a_length_are_those_of_core(bench, frames):
    core = pytest.importorskip("comfy_extras.nodes_lt", exc_type=ImportError).LTXVScheduler
    latent = {"samples": torch.zeros(1, 128, frames, 22, 40)}
    wanted = core.execute(24, 2.05, 0.95, True, 0.1, latent).args[0]
    assert bench("rows").scheduled_for(frames * 880) == pytest.approx(wanted.tolist(), abs=1e-5)


def test_rows_have_names_of_their_own(bench):
    rows = bench("rows")
    names = [(model, row.name) for row in rows.ROWS for model in row.models]
    assert len(names) == len(set(names)) and rows.ROWS[0] is rows.DENSE


def test_metrics_know_the_answer(bench):
    metrics = bench("metrics")
    still = torch.rand(2, 1, 6, 6).repeat(1, 17, 1, 1)
    assert metrics.drift(still).abs().max() == 0 and metrics.acceleration(still).abs().max() == 0
    # What moves keeps its grey values: no drift, but acceleration.
    moving = torch.stack([still[:, 0].roll(i, dims=-1) for i in range(17)], dim=1)
    assert metrics.drift(moving).abs().max() == 0 and metrics.acceleration(moving).min() > 0
    brighter = still.clone()
    brighter[:, -8:] += 0.1
    assert metrics.drift(brighter) == pytest.approx(torch.full((2,), 0.1))
    assert metrics.psnr(still + 0.1, still) == pytest.approx(torch.full((2,), 20.0), abs=1e-3)


def test_frechet_distance_of_diagonal_gaussians(bench):
    """Their closed form is |mean - mean|² + Σ (deviation - deviation)²; turning both sets changes nothing."""
    frechet = bench("tiny_ltx.probe").frechet_distance
    generator = torch.Generator().manual_seed(0)

    def drawn(mean, deviation, count):
        """Samples with exactly this mean and this diagonal covariance."""
        noise = torch.randn(count, len(mean), generator=generator, dtype=torch.float64)
        columns = torch.linalg.qr(noise - noise.mean(0)).Q
        return mean + columns * (count - 1) ** 0.5 * deviation

    means = torch.tensor([[0.0, 1.0, -2.0, 0.5], [1.0, 1.0, 2.0, 0.0]], dtype=torch.float64)
    deviations = torch.tensor([[1.0, 2.0, 0.5, 0.0], [1.0, 0.5, 3.0, 0.25]], dtype=torch.float64)
    a, b = (drawn(*given) for given in zip(means, deviations, (40, 60), strict=True))
    wanted = (means[0] - means[1]).square().sum() + (deviations[0] - deviations[1]).square().sum()
    turn = torch.linalg.qr(torch.randn(4, 4, generator=generator, dtype=torch.float64)).Q
    for left, right in ((a, b), (b, a), (a @ turn, b @ turn)):
        assert frechet(left, right) == pytest.approx(wanted.item(), abs=1e-6)
    assert frechet(a, a) == pytest.approx(0, abs=1e-6)


def test_rival_lies_between_measured_step_counts(bench):
    report = bench("report")

    def entry(cost, psnr, merged):
        return {
            "cost": {"any": cost},
            "figures": {"psnr": psnr, "frechet": 10 - 5 * cost},
            "definition": {"kind": "fewer steps", "sigmas": None, "merged": merged},
        }

    rival = report.Rival([entry(0.5, 30, "uniform"), entry(0.7, 40, "uniform"), entry(0.6, 38, "tail")])
    assert rival.at(0.6)["psnr"] == pytest.approx(38)
    assert rival.at(0.65)["psnr"] == pytest.approx(38)
    assert rival.at(0.7)["psnr"] == 40 and rival.at(0.99)["psnr"] == 40
    assert rival.at(0.5)["psnr"] == 30 and rival.at(0.4) is None


def test_rows_that_only_fill_in_otherwise_share_a_sampling(bench, monkeypatch):
    rows, model, sampling = bench("rows"), bench("tiny_ltx.model"), bench("sampling")
    pack_name = bench("runtime").PACK
    patcher, ids = (
        model.load_model("student"),
        torch.zeros(2, 5, dtype=int),
    )
    calls = []
    original = sampling.sample_stage
    monkeypatch.setattr(sampling, "sample_stage", lambda *args: calls.append(args) or original(*args))

    def pixels(row, **kept):
        return sampling.sample_clips(pack_name, patcher, model.STUDENT_RECIPE, row, ids, 5, 0, **kept)[0]

    kept = {}
    moved, mixed = (pixels(rows.strided(4, method), strided_stages=kept) for method in ("motion", "linear"))
    assert len(calls) == 1 and not torch.equal(moved, mixed)
    assert torch.equal(mixed, pixels(rows.strided(4, "linear")))
    assert len(calls) == 2
    for other in (rows.strided(2, "linear"), rows.strided(4, "linear", is_stretched=False)):
        assert not torch.equal(pixels(other, strided_stages=kept), mixed)
    assert len(calls) == 4


@pytest.mark.slow
def test_script_runs_keeps_its_rows_and_draws(pack, tmp_path):
    out = tmp_path / "quality.json"
    command = [sys.executable, str(pack.root / "benchmarks" / "quality.py"), "--out", str(out)]
    strided = "stride 2, motion, full length from σ 0.75"
    only = [
        "--only",
        "dense",
        "±2, 1 sink",
        "7 steps, larger at the end",
        "stride 4, motion",
        "stride 2, motion",
        strided,
    ]
    run = ["--models", "student", "--frames", "13", "--clips", "6", *only]
    subprocess.run([*command, *run], check=True, timeout=600)
    report = json.loads(out.read_text())
    rows = {row["row"]: row for row in report["rows"]}
    assert len(rows) == 6
    dense, window, seven = rows["dense"], rows["±2, 1 sink"], rows["7 steps, larger at the end"]
    assert set(dense["cost"].values()) == {1.0} and "psnr" not in dense["figures"]
    assert [len(run["executed"]) for run in seven["runs"]] == [7, 7, 7]
    assert set(seven["cost"].values()) == {7 / 8}
    # The counted FLOPs are those of the FLOP table.
    flops = json.loads((pack.root / "benchmarks" / "flops.json").read_text())["rows"]
    wanted = {row["clip"]: row["window 2 sink 1"]["step"] for row in flops}
    for clip, cost in window["cost"].items():
        assert cost == pytest.approx(wanted[clip], rel=1e-6)
    assert 10 < window["figures"]["psnr"] < seven["figures"]["psnr"] < 60
    assert out.with_suffix(".md").read_text().count("\n| ") == 7 and out.with_suffix(".png").is_file()

    # A quarter of the tokens leaves less than a third of the work; the second stage has 2 of 8 steps at full length.
    assert all(0.1 < cost < 0.33 for cost in rows["stride 4, motion"]["cost"].values())
    both = rows[strided]
    assert [len(run["second"]["executed"]) for run in both["runs"]] == [2, 2, 2]
    for clip, cost in both["cost"].items():
        assert cost > 2 / 8 + 6 / 8 * rows["stride 2, motion"]["cost"][clip]

    before = out.read_text()
    again = subprocess.run([*command, *run], check=True, timeout=600, capture_output=True, text=True)
    assert out.read_text() == before and "student 13" not in again.stdout
