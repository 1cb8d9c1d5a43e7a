"""Whole recipes with tiny models on the CPU, and the report that several processes make together."""

from __future__ import annotations

import contextlib
import copy
import json
import sys

import pytest
import tiny_models
import torch


@pytest.fixture(scope="module")
def recipes(bench):
    return bench("recipes")


@pytest.fixture(scope="module")
def report(bench):
    return bench("recipes_report")


@pytest.fixture
def run(recipes, monkeypatch, tmp_path):
    """Runs the script with tiny models; returns what it wrote."""
    monkeypatch.setattr(
        recipes.ltx2, "build_ltx2", lambda device, blocks: tiny_models.build_model("ltxav", blocks)
    )
    monkeypatch.setattr(recipes.ltx2, "conditioning", lambda device: tiny_models.conditioning("ltxav"))

    def run(*arguments):
        out = tmp_path / "recipes.json"
        asked = ["recipes.py", "--device", "cpu", "--small", "--out", str(out), *arguments]
        monkeypatch.setattr(sys, "argv", asked)
        recipes.main()
        return json.loads(out.read_text(encoding="utf-8")), out

    return run


def test_two_stages_take_the_parts_of_their_graph(run, recipes, monkeypatch):
    """And what is sampled has the sizes and lengths that it should have."""
    sampled = []
    sample = recipes.Recipes.sample

    def noted(self, part, model, latent, *given):
        sampled.append((part, tuple(latent["samples"].unbind()[0].shape[2:])))
        return sample(self, part, model, latent, *given)

    monkeypatch.setattr(recipes.Recipes, "sample", noted)
    names = ["dense", "no second stage", "routed", "stride 4", "first stage at stride 2, then 4"]
    written, out = run("--only", *names)
    warm_up = [("stage 1", (5, 2, 2)), ("stage 2", (3, 4, 4))]
    full, thinned = ("stage 2", (9, 4, 4)), ("stage 2", (3, 4, 4))
    assert sampled == [*warm_up, ("stage 1", (9, 2, 2)), full, full, thinned, ("stage 1", (5, 2, 2)), thinned]
    rows = {row["recipe"]: row for row in written["two_stage"]}
    assert list(rows) == [name for name in names if name != "routed"]
    (left_out,) = written["left_out"]
    assert (
        left_out.startswith("8 multiprocessors, 65 f 128×128, routed: RuntimeError")
        and "NO_KERNEL" in left_out
    )
    refined = {"stage 1", "upscale", "stage 2", "decode"}
    assert rows["dense"]["parts"].keys() == refined
    assert rows["no second stage"]["parts"].keys() == refined - {"stage 2"}
    for name in names[3:]:
        assert rows[name]["parts"].keys() == refined | {"decode small", "encode", "in-betweening"}
    assert rows["dense"]["parts"]["stage 1"] == rows["stride 4"]["parts"]["stage 1"]
    assert rows["dense"]["parts"]["stage 1"] != rows[names[-1]]["parts"]["stage 1"]
    for row in rows.values():
        assert row["seconds"] == pytest.approx(sum(row["parts"].values())) and row["is_finite"]
        assert row["of_dense"] == pytest.approx(row["seconds"] / rows["dense"]["seconds"])
    assert "| 65 f 128×128 | stride 4 |" in out.with_name("recipes_two_stage.md").read_text(encoding="utf-8")


def test_in_betweening_looks_at_the_film_and_at_the_first_stages_frames(run, recipes, monkeypatch):
    seen = []
    restore = recipes.Recipes.restore

    def noted(self, latent, stride, *given, **more):
        latent, frames = restore(self, latent, stride, *given, **more)
        seen.append((more["reference"], frames, self.film_of(self.clip)))
        return latent, frames

    monkeypatch.setattr(recipes.Recipes, "restore", noted)
    run("--only", "both stages at stride 2, blind", "stride 4")
    _, (stride_4, frames, film), (blind, *_) = seen
    assert blind is None and stride_4.shape == (65, 64, 64, 3)
    expected = torch.empty(1, 17, 128, 128, 3)
    film.show(expected, 4)
    torch.testing.assert_close(frames[::4], expected[0])
    small = torch.empty(1, 65, 64, 64, 3)
    film.show(small, 1)
    torch.testing.assert_close(stride_4, small[0])


def test_single_stage_rows_and_steps_that_stand_for_all(run, recipes, monkeypatch):
    ran = []
    sampler = recipes.comfy.sample.sample_custom

    def counted(*given, **more):
        ran.append(len(given[4]) - 1)
        return sampler(*given, **more)

    monkeypatch.setattr(recipes.comfy.sample, "sample_custom", counted)
    frozen = next(name for name in recipes.IN_FULL if name in recipes.SINGLE_STAGE)
    written, _ = run("--parts", "single", "--first-steps", "2", "--only", "dense", "stride 4, motion", frozen)
    assert ran[2:] == [2, 2, 8], "after the warm-up"
    assert [row["steps_timed"] for row in written["rows"]] == [2, 2, None]
    assert [set(row["parts"]) for row in written["rows"]] == [
        {"sampling", "decode"},
        {"sampling", "decode", "in-betweening"},
        {"sampling", "decode"},
    ]


def test_smaller_frames_of_the_film_are_means_of_the_large_ones_and_move_along(recipes):
    film = recipes.Film(recipes.ltx2.Clip(17, 64, 32))
    large, small, strided = (
        torch.empty(1, frames, 32 // scale, 64 // scale, 3) for frames, scale in ((17, 1), (17, 2), (9, 1))
    )
    film.show(large, 1), film.show(small, 1), film.show(strided, 4)
    means = torch.nn.functional.avg_pool2d(large[0].movedim(-1, 1), 2).movedim(1, -1)
    torch.testing.assert_close(small[0], means)
    torch.testing.assert_close(large[0, 1:, :, : -recipes.PAN], large[0, :-1, :, recipes.PAN :])
    assert not torch.equal(large[0, 0], large[0, 1])
    assert torch.equal(strided[0, :5], large[0, ::4]) and torch.equal(
        strided[0, 5:], large[0, -1:].expand(4, -1, -1, -1)
    )


def test_a_part_does_not_count_what_others_within_it_take(recipes, monkeypatch):
    clock = iter([0.0, 1.0, 4.0, 10.0, 20.0, 22.0])
    monkeypatch.setattr(recipes.time, "perf_counter", lambda: next(clock))
    spent = recipes.Spent(is_cuda=False)
    with spent.on("in-betweening"), spent.on("decode"):
        pass
    with contextlib.suppress(RuntimeError), spent.on("decode"):
        raise RuntimeError("what fails has taken its time too")
    assert spent.seconds == {"decode": 3.0 + 2.0, "in-betweening": 7.0}


def made(report, **more):
    same = {
        "gpu": "card",
        "torch": "2",
        "comfyui": "0.30",
        "device": "cuda",
        "sigmas": [1, 0],
        "second_sigmas": [1, 0],
    }
    return {**same, "processes": [{}], report.SINGLE: [], report.TWO: [], "left_out": [], **more}


def row_of(recipe, seconds, order, peak, clip="121 f 1280×704", ground="8 multiprocessors", timed=None):
    parts = {"stage 1": seconds / 2, "decode": seconds / 2}
    row = {
        "ground": ground,
        "clip": clip,
        "recipe": recipe,
        "order": order,
        "seconds": seconds,
        "parts": parts,
    }
    return {**row, "peak_gib": peak, "steps_timed": timed}


def test_reports_of_several_processes_become_one(report):
    late = row_of("stride 4", 40.0, 4, 45.0, timed=2)
    reports = [
        made(
            report,
            two_stage=[late, row_of("stride 8", 9.0, 5, 41.0)],
            left_out=["8 multiprocessors, 121 f 1280×704, dense: OutOfMemoryError: none left"],
        ),
        made(
            report,
            two_stage=[
                row_of("dense", 80.0, 0, 50.0),
                row_of("dense", 200.0, 0, 60.0, clip="241 f 1280×704"),
            ],
        ),
        made(
            report,
            two_stage=[row_of("stride 8", 20.0, 5, 42.0)],
            left_out=["8 multiprocessors, 241 f 1280×704, routed: no"],
        ),
    ]
    out = report.merged(copy.deepcopy(reports))
    assert [(row["clip"][:3], row["recipe"]) for row in out["two_stage"]] == [
        ("121", "dense"),
        ("121", "stride 4"),
        ("121", "stride 8"),
        ("241", "dense"),
    ]
    assert [row["of_dense"] for row in out["two_stage"]] == [1, 0.5, 0.25, 1], (
        "of a row measured twice the later"
    )
    assert out["left_out"] == ["8 multiprocessors, 241 f 1280×704, routed: no"] and len(out["processes"]) == 3
    table = report.two_stage_table(out)
    assert (
        "| 121 f 1280×704 | stride 4\\* | 40.0 | 50% | 20.0 | – | – | – | – | 20.0 | – | -5.0 GiB |" in table
    )
    again = report.merged([copy.deepcopy(out)])
    assert again == out
    reports[1]["gpu"] = "another"
    with pytest.raises(ValueError, match="gpu: expected the same in every report, got 'card' and 'another'"):
        report.merged(reports)


def test_rows_are_held_against_dense_of_their_own_ground(report):
    rows = [
        row_of("dense", 10.0, 0, None, ground="streamed"),
        row_of("stride 4", 5.0, 4, None, ground="streamed"),
        row_of("stride 4", 5.0, 4, 1.0),
    ]
    out = report.merged([made(report, two_stage=rows)])
    assert [(row["ground"], row["of_dense"]) for row in out["two_stage"]] == [
        ("8 multiprocessors", None),
        ("streamed", 1),
        ("streamed", 0.5),
    ]
    assert "| 121 f 1280×704, streamed | stride 4 | 5.0 | 50% |" in report.two_stage_table(out)


def test_tables_are_those_of_the_json(report, pack):
    folder = pack.root / "benchmarks"
    content = json.loads((folder / "recipes.json").read_text(encoding="utf-8"))
    tables = {
        "recipes.md": report.single_table(content, report.SINGLE),
        "recipes_guided.md": report.single_table(content, report.GUIDED),
        "recipes_two_stage.md": report.two_stage_table(content),
    }
    for name, table in tables.items():
        assert table == (folder / name).read_text(encoding="utf-8") and table.count("\n") > 2
