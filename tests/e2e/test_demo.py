"""The demo: its graph on a real server, its figures, what it draws, and a short one from end to end."""

from __future__ import annotations

import dataclasses
import importlib
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import av
import numpy as np
import pytest
from PIL import Image

REPO = Path(__file__).resolve().parent.parent.parent
CAPTION = {
    "shape": "disc",
    "direction": "diagonal",
    "speed": "fast",
    "second_shape": "none",
    "texture": "stripes",
}


@pytest.fixture(scope="module")
def demo() -> ModuleType:
    """demo/run.py. Its folders are on the path for the import only: ours has a `nodes` as ComfyUI has."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(REPO / "demo"))
        return importlib.import_module("run")


@pytest.fixture(scope="module")
def report() -> dict[str, Any]:
    return json.loads((REPO / "benchmarks" / "two_stage.json").read_text(encoding="utf-8"))


def clip_of(demo: ModuleType, seed: int, seconds: float) -> Any:
    frames = np.random.default_rng(seed).integers(0, 256, (9, 64, 64), dtype=np.uint8)
    return demo.Clip(frames, dict.fromkeys(demo.seconds_of_parts({}), seconds))


@pytest.fixture
def clips(demo: ModuleType) -> dict[str, list[Any]]:
    """Two of each setting; the second ones took three times as long."""
    return {
        setting.name: [clip_of(demo, 10 * i + j, 1.0 + i + 2 * (1.0 + i) * j) for j in range(2)]
        for i, setting in enumerate(demo.SETTINGS)
    }


@pytest.mark.slow
@pytest.mark.parametrize(("first", "second", "strided"), [(1, 1, 0), (1, 2, 1), (2, 2, 2)])
def test_the_graph_runs_with_the_strides_it_is_given(
    server: Any, demo: ModuleType, new_log: Any, first: int, second: int, strided: int
) -> None:
    setting = demo.Setting("any", first, second)
    # Seeds that no other run has, as this server remembers what it made.
    result = server.queue(demo.build_graph(setting, CAPTION, frames=17, seed=100 + 10 * first + second))
    paths = server.output_paths(result, demo.FRAMES_IMAGES)
    assert [Image.open(path).size for path in paths] == [(64, 64)] * 17
    lines = [line for line in new_log().splitlines() if "FrameThrift: keyframe stride" in line]
    assert len(lines) == strided
    assert all("(2 instead of 3 latent frames" in line and "declined: none" in line for line in lines)
    assert new_log().count("keyframes the reference is shifted by") == int(second > first)
    parts = demo.seconds_of_parts(result.node_seconds)
    assert list(parts) == ["first stage", "upscale, encode, decode", "second stage", "in-betweening"]
    assert parts["first stage"] > 0 and parts["second stage"] > 0
    assert (parts["in-betweening"] > 0) == (second > 1)
    assert 0.5 * result.seconds < sum(result.node_seconds.values()) <= result.seconds


@pytest.mark.slow
def test_node_seconds_are_of_the_node_that_ran(server: Any, demo: ModuleType) -> None:
    """Many more steps take longer in the second stage, and only there."""
    graph = demo.build_graph(demo.SETTINGS[0], CAPTION, frames=17, seed=300)
    usual = server.queue(graph)
    graph["second sigmas"]["inputs"]["sigmas"] = ", ".join(str(1 - i / 15) for i in range(16))
    longer = server.queue(graph)
    assert longer.node_seconds["second"] > 2 * usual.node_seconds["second"]
    assert "first" in usual.node_seconds and "first" not in longer.node_seconds and "first" in longer.cached


def test_every_setting_has_its_row_in_the_lab(demo: ModuleType, report: dict[str, Any]) -> None:
    kinds = [demo.lab_row(report, setting)["definition"]["kind"] for setting in demo.SETTINGS]
    assert kinds == ["dense", "blind", "fewer steps"]
    blind = demo.lab_row(report, demo.Setting("any", 2, 2))
    assert blind["row"] == "both stages at stride 2, blind"
    guided = demo.lab_row(report, demo.Setting("any", 1, 4))
    assert guided["row"] == "stride 4"
    with pytest.raises(LookupError, match="strides 1 and 3"):
        demo.lab_row(report, demo.Setting("any", 1, 3))


def test_the_table_tells_this_run_from_the_lab(
    demo: ModuleType, report: dict[str, Any], clips: dict[str, list[Any]]
) -> None:
    dense, ours, fewer = demo.SETTINGS
    # One grey level everywhere is a known distance.
    near = np.where(clips[dense.name][0].frames < 255, clips[dense.name][0].frames + 1, 254).astype(np.uint8)
    clips[ours.name] = [dataclasses.replace(clips[ours.name][0], frames=near)]
    clips = {name: own[:1] for name, own in clips.items()}
    lines = demo.table(demo.SETTINGS, clips, report, "0.30.0").splitlines()
    rows = {
        cells[0]: cells[1:]
        for cells in ([cell.strip() for cell in line.split("|")[1:-1]] for line in lines)
        if cells
    }
    lab = {setting.name: demo.lab_row(report, setting) for setting in demo.SETTINGS}
    assert rows[dense.name][:3] == ["4.0 s", "–", "100%"]
    assert rows[ours.name][:3] == ["8.0 s", "48.1 dB", f"{lab[ours.name]['cost']['121 f']:.0%}"]
    assert rows[fewer.name][3:] == [
        f"{lab[fewer.name]['figures']['frechet_all']:.1f}",
        f"{lab[fewer.name]['figures']['drift']:.4f}",
        f"{lab[fewer.name]['figures']['detail']:.2f}",
    ]
    assert rows["run"][2:] and rows[""] == ["here", "here", "lab", "lab", "lab", "lab"]
    assert len({len(line) for line in lines if line.startswith("|")}) == 1
    assert any("over 384 clips" in line for line in lines)


def test_the_sheet_marks_what_was_filled_in(demo: ModuleType, clips: dict[str, list[Any]]) -> None:
    """Of nine frames it shows frame 5, which is a keyframe where nothing is strided. One mark a caption."""
    clips = {
        name: [dataclasses.replace(clip, frames=0 * clip.frames) for clip in own]
        for name, own in clips.items()
    }
    sheet = np.asarray(demo.contact_sheet(demo.SETTINGS, clips, ["one", "two"])).astype(int)
    is_cell = (sheet == 0).all(axis=2).sum(axis=1) == 3 * 64
    is_orange = (sheet == [0xE0, 0x7B, 0x00]).all(axis=2)
    edges = np.flatnonzero(np.diff(is_cell.astype(int), prepend=0, append=0)).reshape(-1, 2)
    assert len(edges) == 2 * 3
    marked = [bool(is_orange[(begin + end) // 2].any()) for begin, end in edges]
    assert marked == [False, True, False] * 2


def test_the_video_shows_every_pixel_as_it_is(demo: ModuleType, clips: dict[str, list[Any]]) -> None:
    shown = [own[0] for own in clips.values()]
    pages = list(demo.side_by_side(demo.SETTINGS, shown, "title", ["a", "b", "c"]))
    assert len(pages) == 9
    page = np.asarray(pages[7])
    assert page.shape[0] % 2 == page.shape[1] % 2 == 0
    for i, clip in enumerate(shown):
        left = 16 + i * (512 + 8)
        assert (page[80 + 4 : 80 + 512 : 8, left + 4 : left + 512 : 8, 0] == clip.frames[7]).all()


@pytest.mark.slow
def test_a_short_demo_leaves_everything(
    demo: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(demo, "OUTPUT", tmp_path / "out")
    monkeypatch.setattr(demo, "FRAMES", 17)
    monkeypatch.setattr(demo, "CAPTIONS", demo.CAPTIONS[:2])
    plot, made = demo.plot_time, []
    monkeypatch.setattr(demo, "plot_time", lambda *given: (made.append(given[1]), plot(*given)))
    demo.main()
    # Each whole: what one setting has in common with the one before is not taken from it.
    clips = [clip for own in made[0].values() for clip in own]
    assert len(clips) == 2 * 3 and all(clip.seconds["first stage"] > 0 for clip in clips)
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert names == ["contact_sheet.png", "side_by_side.mp4", "table.md", "time.png"]
    with av.open(str(tmp_path / "out" / "side_by_side.mp4")) as video:
        assert sum(1 for _ in video.decode(video=0)) == 2 * 17
    table = (tmp_path / "out" / "table.md").read_text(encoding="utf-8")
    assert capsys.readouterr().out.rstrip().endswith(table.rstrip())
    assert all(setting.name in table for setting in demo.SETTINGS)
