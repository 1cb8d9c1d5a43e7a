"""Whole two-stage runs: their figures on clips whose answer is known, their rows, prices and report, and one small run."""

from __future__ import annotations

import json
import math

import pytest
import torch

SIDE = 64


@pytest.fixture(scope="module")
def figures(bench):
    return bench("two_stage_figures")


@pytest.fixture(scope="module")
def rows(bench):
    return bench("two_stage_rows")


@pytest.fixture(scope="module")
def report(bench):
    return bench("two_stage_report")


def stripes(offsets, period=4.0):
    """[1, F, 64, 64]: upright stripes, those of each frame so many pixels further right."""
    x = torch.arange(SIDE).view(1, 1, 1, SIDE) - torch.as_tensor(offsets, dtype=torch.float32).view(
        1, -1, 1, 1
    )
    return (0.5 + 0.2 * torch.cos(2 * math.pi * x / period)).expand(-1, -1, SIDE, -1)


def along_x(offsets):
    """places [1, F, 2]"""
    x = torch.as_tensor(offsets, dtype=torch.float32)
    return torch.stack((x, torch.zeros_like(x)), dim=-1)[None]


@pytest.fixture
def inside():
    """[1, 17, 64, 64]: without the edges, beyond which a blur finds no stripes."""
    mask = torch.zeros(1, 17, SIDE, SIDE, dtype=torch.bool)
    mask[..., 8:-8, 8:-8] = True
    return mask


def test_pictures_move_by_parts_of_a_pixel(figures):
    picture = torch.rand(2, 8, 8, generator=torch.Generator().manual_seed(0))
    by = torch.tensor([[3.0, -2.0], [0.0, 1.0]])
    wanted = torch.stack((picture[0].roll((-2, 3), (0, 1)), picture[1].roll(1, 0)))
    assert torch.allclose(figures.moved(picture, by), wanted, atol=1e-5)
    shifted = figures.moved(stripes([0.0])[0, 0], torch.tensor([0.7, 5.0]))
    assert torch.allclose(shifted, stripes([0.7])[0, 0], atol=1e-5)


def test_texture_that_follows_the_shape_does_not_slip(figures, inside):
    travelled = [0.3 * t for t in range(17)]
    between, keys = figures.followed(17)
    assert keys == [8, 16] and sorted([*between, *keys]) == list(range(1, 17))
    for times in (between, keys):
        assert float(figures.slip(stripes(travelled), along_x(travelled), inside, times)) < 0.05


@pytest.mark.parametrize("offset", [0.5, 1.0, 2.0])
def test_slip_of_a_texture_that_is_some_pixels_off(figures, inside, offset):
    """Between cos(x) and cos(x - d) lies 2 sin(d / 2) of the amplitude."""
    travelled = [0.3 * t for t in range(17)]
    off = [x + offset * (t % 8 > 0) for t, x in enumerate(travelled)]
    places = along_x(travelled)
    between, keys = figures.followed(17)
    found = float(figures.slip(stripes(off), places, inside, between))
    assert found == pytest.approx(2 * math.sin(math.pi * offset / 4), rel=0.03)
    assert float(figures.slip(stripes(off), places, inside, keys)) < 0.05


def test_slip_looks_where_the_texture_lies(figures):
    clip = stripes([0.0] * 9).clone()
    half = torch.zeros(1, 9, SIDE, SIDE, dtype=torch.bool)
    half[..., :32] = True
    clip[:, 1:8, :, 34:] = 0.5
    assert float(figures.slip(clip, along_x([0.0] * 9), half, range(1, 8))) < 1e-3
    assert float(figures.slip(clip, along_x([0.0] * 9), ~half, range(1, 8))) == pytest.approx(1, abs=0.1)
    none = torch.zeros_like(half)
    assert figures.slip(clip, along_x([0.0] * 9), none, range(1, 8)).isnan().all()


@pytest.mark.parametrize("stride", [2, 4, 8])
def test_pulse_of_clips_that_are_softer_in_between(figures, stride):
    clip = stripes([0.0] * 17).clone()
    is_key = torch.arange(17) % stride == 0
    clip[:, ~is_key] = 0.5 + 0.5 * (clip[:, ~is_key] - 0.5)
    energy = figures.detail(clip)
    assert figures.pulse(energy, stride) == pytest.approx(0.25, rel=1e-4)
    assert figures.pulse(figures.detail(stripes([0.0] * 17)), stride) == pytest.approx(1, rel=1e-4)


def moving(speed, size=SIDE, frames=13, seed=0):
    """[2, F, size, size]: a smooth pattern that goes right by `speed` pixels a frame, at this size."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randn(2, 1, 16, 16, generator=generator)
    pattern = torch.nn.functional.interpolate(coarse, SIDE, mode="bicubic", align_corners=False)[:, 0]
    clip = torch.stack([0.5 + 0.15 * pattern.roll(round(speed * t), dims=-1) for t in range(frames)], dim=1)
    return torch.nn.functional.avg_pool2d(clip, SIDE // size)


@pytest.mark.parametrize("step", [1, 2])
def test_motion_error_is_the_distance_from_the_first_stages_motion(figures, step):
    first = moving(1, SIDE // 2)[:, ::step]
    follow = figures.Followed(first, 13, step, (SIDE, SIDE))
    assert follow.pairs == [pair for pair in ((0, 4), (3, 7), (6, 10)) if pair[0] % step == 0]
    assert follow.error(moving(1)).max() < 0.3
    # Flow is told between frames four apart.
    assert follow.error(moving(1.5)) == pytest.approx(torch.full((2,), 2.0), abs=0.5)
    assert follow.error(moving(0)) == pytest.approx(torch.full((2,), 4.0), abs=0.5)
    assert follow.error(torch.cat((moving(0)[:, :6], moving(1)[:, 6:]), dim=1), begins=6).max() < 0.3


def test_disocclusions_are_left_out(figures):
    pattern = moving(0)[:1]
    clip = pattern.clone()
    for t in range(13):
        clip[:, t, 20:44, 6 + 3 * t : 22 + 3 * t] = pattern[:, 0, 30:54, 40:56]
    seen = figures.Followed(torch.nn.functional.avg_pool2d(clip, 2), 13, 1, (SIDE, SIDE)).is_seen
    still = figures.Followed(torch.nn.functional.avg_pool2d(pattern, 2), 13, 1, (SIDE, SIDE)).is_seen
    assert still.all() and 0.5 < seen.float().mean() < 0.98
    # Nothing happens far from what moves.
    assert seen[..., 56:, :].all()


@pytest.mark.parametrize("step", [1, 2])
def test_clips_that_stray_from_their_first_stage(figures, step):
    clip = torch.rand(2, 9, SIDE, SIDE, generator=torch.Generator().manual_seed(0))
    small = torch.nn.functional.avg_pool2d(clip, 2)
    assert figures.strays(clip, small[:, ::step], step).max() < 1e-6
    # Noise explains nothing of noise: both add up.
    other = small.flip(-1)[:, ::step]
    assert figures.strays(clip, other, step) == pytest.approx(torch.full((2,), 2.0), abs=0.1)


def test_noise_of_the_kept_frames(bench):
    runs = bench("two_stage_runs")
    noise = torch.arange(16.0).view(1, 1, 16, 1, 1)
    assert runs.kept(noise, 9, 2).flatten().tolist() == [0, 2, 4, 6, 8, 10, 12, 14, 15]
    assert torch.equal(runs.kept(noise, 16, 1), noise)


@pytest.fixture(scope="module")
def runs(bench):
    """Runs of two captions, three latent frames; the real clips are noise."""
    made = bench("two_stage_runs")
    ids = torch.tensor([[0, 0, 2, 2, 1], [3, 0, 0, 1, 3]])
    noise = torch.randn(2, 128, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    return made.Runs(bench("runtime").PACK, {0: ids}, lambda frames, seed: noise)


def test_a_run_takes_the_nodes_of_its_row(runs, rows, bench, monkeypatch):
    """Both stages have the lengths they should, noise is that of the kept frames, and frames in between follow the first."""
    sampled, between = [], []
    made = bench("two_stage_runs")
    sample, node_class = made.sample_stage, made.node_class

    def noted(pack, model, recipe, nodes, ids, sigmas, noise, start, seed):
        sampled.append((tuple(start.shape[2:]), noise))
        return sample(pack, model, recipe, nodes, ids, sigmas, noise, start, seed)

    class Noted:
        @staticmethod
        def execute(*given, **named):
            between.append(named["reference"])
            return node_class(runs.pack, "LatentFlowInterpolate").execute(*given, **named)

    monkeypatch.setattr(made, "sample_stage", noted)
    monkeypatch.setattr(
        made,
        "node_class",
        lambda pack, name: Noted if name == "LatentFlowInterpolate" else node_class(pack, name),
    )
    own = runs.make(rows.ours(2), rows.REFINER, 3, 0)
    assert [shape for shape, _ in sampled] == [(3, 8, 8), (2, 16, 16)]
    assert torch.equal(sampled[1][1], runs.noise(3, 64, 0)[:, :, ::2])
    assert own.pixels.shape == (2, 17, 64, 64) and own.first.shape == (2, 17, 32, 32)
    (reference,) = between
    assert torch.allclose(reference[..., 0].view(2, 17, 32, 32), own.first, atol=1e-5)
    blind = runs.make(rows.blind(2), rows.REFINER, 3, 0)
    assert between[1] is None and len(sampled) == 3, "the first stage is sampled once"
    assert torch.equal(blind.pixels[:, ::2], own.pixels[:, ::2])
    half = runs.make(rows.ours(2, first=2), rows.REFINER, 3, 0, is_real=True)
    assert sampled[3][0] == (2, 16, 16) and half.first.shape == (2, 9, 32, 32), "real clips are not sampled"
    assert half.stages["first"]["executed"] == []


def test_the_second_stage_is_the_rows(runs, rows):
    """Other noise, thinner attention, fewer steps and none: each makes another clip, of the same first stage."""
    narrow = rows.under(rows.ROUTED.nodes, "narrow")
    dense = runs.make(rows.DENSE, rows.REFINER, 3, 0)
    assert dense.stages["second"] == {"executed": [0, 1, 2], "covered": {}}
    others = {
        row.name: runs.make(row, rows.REFINER, 3, 0)
        for row in (rows.ceiling("ltx-2"), narrow, rows.fewer((0.909375, 0.0)), rows.UPSCALED)
    }
    for name, other in others.items():
        assert torch.equal(other.first, dense.first) and not torch.equal(other.pixels, dense.pixels), name
    assert others["narrow"].stages["second"]["covered"] == {"ThriftLowRankAttention": [0, 1, 2]}
    assert others["1 step from σ 0.909375"].stages["second"]["executed"] == [0]
    assert "second" not in others["upscaled only"].stages


def test_the_last_step_may_have_the_full_length(runs, rows, monkeypatch):
    """It takes over what the strided ones expect at the end, not their noisy state."""
    given, sample = [], runs.sample
    monkeypatch.setattr(runs, "sample", lambda *args: given.append(args[-1]) or sample(*args))
    own = runs.make(rows.handed_over(2), rows.REFINER, 3, 0)
    assert (own.stages["second"]["executed"], own.stages["again"]["executed"]) == ([0, 1], [0])
    taken = runs.decoded(given[-1])
    assert own.pixels.shape == taken.shape == (2, 17, 64, 64)
    assert (taken[:, ::2, 1:] - taken[:, ::2, :-1]).abs().mean() < 0.06


def test_a_node_without_effect_is_no_row(runs, rows):
    """A window that holds the whole clip would be measured as dense and priced as a window."""
    wide = next(row for row in rows.ROWS if row.name == "±4, 1 sink")
    with pytest.raises(RuntimeError, match="WINDOW_COVERS_CLIP"):
        runs.make(wide, rows.REFINER, 3, 0)


def test_models_of_many_steps_refine_with_the_end_of_their_own(bench, rows):
    runs, model = bench("two_stage_runs"), bench("tiny_ltx.model")
    sigmas = model.REFINER_SIGMAS["ltx-2"]
    assert runs.recipe_of(rows.REFINER, sigmas) == model.Recipe(sigmas, 1.0)
    teacher = runs.recipe_of(rows.TEACHER, sigmas)
    assert (
        teacher.cfg == model.REFINING_CFG
        and teacher.sigmas == model.TEACHER_RECIPE.sigmas[-len(teacher.sigmas) :]
    )
    assert teacher.sigmas[0] == pytest.approx(sigmas[0], abs=0.02)


def test_rows_have_names_of_their_own_and_a_dense_run_beside_them(rows):
    jobs = [(row.name, base, frames) for row in rows.ROWS for base in row.bases for frames in row.lengths]
    assert len(jobs) == len(set(jobs))
    dense = {
        (row.schedule, base, frames)
        for row in rows.ROWS
        if row.is_dense
        for base in row.bases
        for frames in row.lengths
    }
    assert {
        (row.schedule, base, frames) for row in rows.ROWS for base in row.bases for frames in row.lengths
    } == dense
    assert all(row.second % row.first == 0 for row in rows.ROWS)


def test_shares_are_everything_once(bench, rows):
    script = bench("two_stage")
    from argparse import Namespace

    def jobs(shard, only=None):
        options = Namespace(shard=shard, only=only, bases=(rows.REFINER, rows.PESSIMIST), lengths=(17, 16))
        return [(row.name, base, frames) for row, base, frames in script.jobs_of(options)]

    whole = jobs("1/1")
    shares = [jobs(f"{i}/4") for i in (1, 2, 3, 4)]
    assert sorted(sum(shares, [])) == sorted(whole) and max(map(len, shares)) - min(map(len, shares)) <= 1
    assert {name for name, *_ in jobs("1/1", ["dense"])} == {"dense"}


def made_up(row, rows, cost=None, **figures):
    """An entry as the JSON has it."""
    known = next(other for other in rows.ROWS if other.name == row)
    usual = dict.fromkeys(
        (
            "frechet",
            "drift",
            "caption",
            "speed",
            "texture",
            "pulse",
            "slip",
            "slip_of_keyframes",
            "motion",
            "strays",
        ),
        0.5,
    )
    return {
        "base": rows.REFINER,
        "row": row,
        "frames": rows.USUAL,
        "clips": 6,
        "definition": known.definition,
        "figures": {**usual, "frechet_all": 4.0, "detail": 1.0, **figures},
        "cost": {"121 f": cost or 1.0},
    }


def test_verdict_and_gate_say_what_was_reached(rows, report):
    entries = [
        made_up("dense", rows, frechet_all=4.0, detail=0.95, texture=0.93),
        made_up("upscaled only", rows, detail=0.7),
        made_up("stride 2", rows, cost=0.7, frechet_all=4.2, detail=0.92, slip=0.4, motion=0.6),
        made_up("stride 4", rows, cost=0.55, frechet_all=5.2, detail=0.80),
        made_up("DFR-like round", rows, cost=1.3),
    ]
    content = {"real": {"17": {"figures": entries[0]["figures"]}}, "rows": entries}
    assert report.gate(content) == [
        "gate: detail of upscaled only 0.700 (≤ 0.6): FAIL",
        "gate: detail of dense 0.950 (≥ 0.9): pass",
        "gate: texture of dense 0.930 (≥ 0.9): pass",
    ]
    lines = report.verdict(content)
    assert "stride 2: distance of dense 1.05, goal ≤ 1.10: reached" in lines
    assert "stride 2: detail of dense 0.97, goal ≥ 0.95: reached" in lines
    assert "stride 2: texture slip 0.40, goal ≤ 0.50: reached" in lines
    assert "stride 2: motion error 0.60, goal ≤ 0.50: missed" in lines
    assert "stride 4: distance of dense 1.30, goal ≤ 1.20: missed" in lines
    assert "stride 4: detail of dense 0.84, goal ≥ 0.92: missed" in lines
    assert "| stride 2 | 70 | 4.20 (1.05) | 0.92 |" in report.short_table(content)
    assert report.tables(content).startswith("- gate: ")


def test_reports_of_several_processes_become_one(bench, rows):
    script = bench("two_stage")
    one = {**script.new_report(), "rows": [made_up("dense", rows), made_up("stride 2", rows, detail=0.1)]}
    other = {**script.new_report(), "rows": [made_up("stride 2", rows, detail=0.2)]}
    both = script.merged([one, other])
    assert [(row["row"], row["figures"]["detail"]) for row in both["rows"]] == [
        ("dense", 1.0),
        ("stride 2", 0.2),
    ]
    other["rows"][0]["clips"] = 12
    with pytest.raises(SystemExit, match=r"\[6, 12\]"):
        script.merged([one, other])


def test_whole_runs_are_priced_part_by_part(bench, rows, monkeypatch):
    """A forward costs its tokens here, a decode 1000 and an encode 100 a latent frame."""
    price = bench("two_stage_price")

    class Prices:
        def __init__(self, *_):
            pass

        def forward(self, clip, nodes):
            return math.prod(clip.grid) * (0.5 if nodes else 1)

        def vae(self, clip, work):
            return {"decode": 1000, "encode": 100}[work] * clip.grid[0]

    monkeypatch.setattr(price, "PriceList", Prices)

    def steps(count, covered=()):
        return {"executed": list(range(count)), "covered": {name: list(range(count)) for name in covered}}

    small, large = 11 * 20, 22 * 40
    dense = 16 * (8 * small + 3 * large + 1000)
    names = {
        "dense": ({"second": steps(3)}, dense),
        # 9 of 16 latent frames: the first stage's 16 are decoded and the 9 encoded, for the thinning.
        "stride 2": ({"second": steps(3)}, 16 * (8 * small + 1000) + 9 * (3 * large + 1000 + 100)),
        "upscaled only": ({}, 16 * (8 * small + 1000)),
        "±2, 1 sink": ({"second": steps(3, ["ApplyTemporalWindow"])}, 16 * (8 * small + 1.5 * large + 1000)),
        "DFR-like round": ({"again": steps(4)}, 9 * (8 * small + 1000) + 16 * (100 + 4 * large + 1000)),
    }
    entries = [
        made_up(name, rows) | {"runs": [{"first": steps(8), **stages}]} for name, (stages, _) in names.items()
    ]
    content = {"rows": entries, "flops_of_a_forward": {}}
    price.price_rows("", content)
    for entry, (_, wanted) in zip(entries, names.values(), strict=True):
        assert entry["cost"]["121 f"] == pytest.approx(wanted / dense), entry["row"]
    # With CFG its own full run is the measure.
    guided = made_up("dense", rows) | {"base": rows.TEACHER}
    guided["runs"] = [
        {"first": steps(8), "second": steps(len(price.recipe_of(rows.TEACHER, rows.DENSE.sigmas).sigmas) - 1)}
    ]
    price.price_rows("", {"rows": [guided], "flops_of_a_forward": {}})
    assert guided["cost"] == {"121 f": 1.0, "241 f": 1.0}


@pytest.mark.slow
def test_script_measures_and_keeps_its_rows(bench, rows, monkeypatch, tmp_path, capsys):
    script, judge = bench("two_stage"), bench("two_stage_judge")
    runs = bench("two_stage_runs")
    for module in (script, judge):
        monkeypatch.setattr(module, "SEEDS", (0, 1))
    short = [rows.Row(**{**vars(row), "lengths": (3,)}) for row in (rows.DENSE, rows.ours(2))]
    monkeypatch.setattr(script, "ROWS", tuple(short))
    monkeypatch.setattr(script, "price_rows", lambda pack, report: None)
    out = tmp_path / "two_stage.json"
    asked = ["two_stage.py", "--clips", "4", "--lengths", "3", "--bases", "refiner", "--out", str(out)]
    monkeypatch.setattr("sys.argv", asked)
    script.main()
    report = json.loads(out.read_text(encoding="utf-8"))
    dense, own = report["rows"]
    assert (dense["row"], own["row"]) == ("dense", "stride 2") and "psnr" not in dense["figures"]
    assert 5 < own["figures"]["psnr"] < 60
    for row in (dense, own, report["real"]["3"]):
        assert all(math.isfinite(value) for value in row["figures"].values()), row
    real = report["real"]["3"]["figures"]
    assert real["slip"] < 0.4 and real["strays"] < 0.5 and real["texture"] > 0.8
    assert out.with_suffix(".md").read_text(encoding="utf-8").count("| stride 2 |") == 2 - 1
    before = out.read_text(encoding="utf-8")
    monkeypatch.setattr(
        runs.Runs, "make", lambda *_, **__: pytest.fail("a row that is there is measured again")
    )
    script.main()
    assert out.read_text(encoding="utf-8") == before
