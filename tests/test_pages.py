"""README and docs are what benchmarks/pages/ and the JSONs beside it make of them, and say what the figures say."""

from __future__ import annotations

import importlib
import json
import re
import sys
from functools import partial
from random import Random
from typing import Any, NamedTuple

import pytest
from PIL import Image

TEACHER, STUDENT = "teacher", "student"
LENGTHS = (13, 25)
FREEZE = "whole blocks, linear, from 0.2, every 2."
REFINED = "stride 3, motion, 12 steps, refined from σ 0.8"


@pytest.fixture(scope="module")
def render(pack):
    sys.path.append(str(pack.root / "benchmarks"))
    yield importlib.import_module("render")
    sys.path.remove(str(pack.root / "benchmarks"))


@pytest.fixture(scope="module")
def pages(render):
    return render.pages()


def test_pages_are_rendered(pack, pages):
    for name, text in pages.items():
        assert (pack.root / name).read_text(encoding="utf-8") == text, f"{name}: run nox -s docs"
    here = {path.relative_to(pack.root).as_posix() for path in (pack.root / "docs").rglob("*.md")}
    assert here <= pages.keys()


def test_every_node_has_its_page_of_help(pack, pages):
    ids = {node.GET_SCHEMA().node_id for node in pack("nodes").NODES}
    assert {f"docs/docs/{name}.md" for name in ids} <= pages.keys()
    assert pack.module.WEB_DIRECTORY == "docs"
    assert not [path for path in (pack.root / "docs").rglob("*") if path.suffix not in (".md", ".png", "")]


def test_the_readme_is_short(pages):
    assert pages["README.md"].count("\n") <= 150


def anchors(text):
    """Of the headings, as GitHub makes them."""
    titles = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}


def test_links_lead_somewhere(pack, render, pages):
    """Those to the repository's own address as well: pages of help have no others, as ComfyUI resolves none."""
    here = f"{render.repository()}/blob/HEAD/"
    assert f'"{render.repository()}"' in (pack.root / "pyproject.toml").read_text(encoding="utf-8")
    of_help = 0
    for name, text in pages.items():
        for mark, target, anchor in re.findall(r"(!?)\[[^]]*\]\(([^)#]*)(?:#([^)]*))?\)", text):
            is_help = name.startswith(render.HELP)
            of_help += is_help
            # An image is served if it lies beside the page.
            leads = ".." not in target if mark else target.startswith(here)
            assert leads or not is_help, f"{name}: {target} leads nowhere in ComfyUI"
            if target.startswith("http") and not target.startswith(here):
                continue
            path = pack.root / target.removeprefix(here)
            if not target.startswith(here):
                path = (pack.root / name).parent / target if target else pack.root / name
            assert path.exists(), f"{name}: {target}"
            if anchor:
                assert anchor in anchors(path.read_text(encoding="utf-8")), f"{name}: {target}#{anchor}"
    assert of_help > 20


def setting(technique):
    """A technique of the presets in the words of their page."""
    words = {
        "spatial freeze": lambda: f"every other step frozen from {technique.schedule.start_percent:g} on\\*",
        "temporal window": lambda: (
            f"window ±{technique.window}, {technique.sink_frames} sink, from {technique.schedule.start_percent:g} on"
        ),
        "GPU pacing": lambda: f"pauses from {technique.target_temperature} °C",
    }
    return words[technique.name]()


def test_the_page_of_presets_has_their_table_and_its_evidence(pack, pages):
    table, text = pack("presets.table"), pages["docs/docs/ThriftPreset.md"]
    for preset in table.PRESETS:
        cells = []
        for stage in (table.SINGLE, table.SECOND):
            recipe = table.TABLE[preset, stage]
            stride = [f"stride {recipe.stride}"] if recipe.stride > 1 else []
            cells.append("; ".join([*stride, *map(setting, recipe.techniques)]))
        assert f"| `{preset}` | {cells[0]} | {cells[1]} |" in text
        first, single = table.TABLE[preset, table.FIRST], table.TABLE[preset, table.SINGLE]
        assert first.stride == single.stride
        assert first.techniques == tuple(each for each in single.techniques if each.name != "spatial freeze")
    for (preset, _), recipe in table.TABLE.items():
        for each in recipe.evidence if preset != table.COOL else ():
            lines = [line for line in text.splitlines() if line.startswith(f"| `{preset}` |")]
            cost, distances = f"{100 * each.cost:.0f}", [f"{value:.2f}" for value in each.distances.values()]
            # Of whole runs one length stands there.
            told = all if each.first is None else any
            assert any(f"| {cost} " in line and told(d in line for d in distances) for line in lines), each


def test_pictures_of_graphs_show_the_templates_as_they_are(pack, pages):
    graphs = importlib.import_module("graphs")
    shown = {f"benchmarks/graphs/{name}.png": picture for name, picture in graphs.PICTURES.items()}
    assert set(re.findall(r"\]\((benchmarks/graphs/[^)]+)\)", pages["README.md"])) == shown.keys()
    for name, picture in shown.items():
        with Image.open(pack.root / name) as drawn:
            assert drawn.text["graph"] == graphs.digest_of(picture), f"{name}: run nox -s graphs"
        assert (pack.root / name).stat().st_size <= 120_000


def scaled(found, by):
    if isinstance(found, dict):
        return {key: scaled(value, by) for key, value in found.items()}
    if isinstance(found, list):
        return [scaled(value, by) for value in found]
    return found * by if isinstance(found, float) else found


def told(render, monkeypatch, by):
    """The pages as they would be with all figures of all JSONs multiplied by some factor; of one that fails the error."""

    def content(name):
        return scaled(json.loads((render.HERE / f"{name}.json").read_text(encoding="utf-8")), by)

    monkeypatch.setattr(render, "content", content)
    render.group.cache_clear()
    templates = render.environment()
    out = {}
    for path in render.PAGES.rglob("*.md"):
        name = path.relative_to(render.PAGES).as_posix()
        try:
            out[name] = render.page(name, templates)
        except (LookupError, ValueError) as error:
            out[name] = str(error)
    return out


def test_no_figure_is_typed(pages, render, monkeypatch):
    """Other figures make another page, or one whose claims no longer hold."""
    try:
        assert told(render, monkeypatch, 1.0) == pages
        others = told(render, monkeypatch, 1.3)
        quoting = [name for name in pages if "{{" in (render.PAGES / name).read_text(encoding="utf-8")]
        assert len(quoting) > 5 and all(others[name] != pages[name] for name in quoting)
    finally:
        render.group.cache_clear()


def test_a_false_claim_does_not_pass(render):
    with pytest.raises(ValueError, match="claims what the figures do not say"):
        render.environment().from_string("{{ claim(1 > 2) }}").render()
    assert render.environment().from_string("{{ claim(2 > 1) }}x").render() == "x"


def test_a_row_that_is_not_there_is_named(render):
    with pytest.raises(LookupError, match="no row 'stride 9' of teacher"):
        render.quality("teacher", 13, "stride 9")
    with pytest.raises(LookupError, match="found 0"):
        render.find("pacing", row="none")
    with pytest.raises(LookupError, match="no row 'none'"):
        render.table("pacing", ["none"])


class Said(NamedTuple):
    """A sentence of a node's own text or of a template's note, and whether the figures say so."""

    where: str
    words: str

    def holds(self, render: Any) -> bool:
        return bool(VERDICTS[self](render))


def cheaper_and_alike(render, more, less, most):
    """`less` costs clearly less than `more`, at most `most` times its distance, and hardly more drift."""
    pairs = [[render.quality(TEACHER, frames, name) for name in (more, less)] for frames in LENGTHS]
    return all(
        own.cost < 0.9 * of.cost and own.frechet_all < most * of.frechet_all and own.drift < 1.03 * of.drift
        for of, own in pairs
    )


def three_beats_four(render):
    rows = [
        [render.quality(model, frames, f"stride {stride}, motion") for stride in (3, 4)]
        for model in (TEACHER, STUDENT)
        for frames in LENGTHS
    ]
    return all(
        three.frechet_all < 0.8 * four.frechet_all and three.cost < four.cost + 0.08 for three, four in rows
    )


def between_stages(render):
    two, four = (render.two_stage(f"stride {stride}") for stride in (2, 4))
    rival, steps = (render.two_stage(f"{name} from σ 0.909375") for name in ("6 + 2 steps", "2 steps"))
    both = render.two_stage("both stages at stride 2, blind")
    return (
        all(abs(own.of_dense.frechet_all / two.of_dense.frechet_all - 1) < 0.15 for own in (rival, steps))
        and abs(rival.cost["121 f"] - two.cost["121 f"]) < 0.05
        and two.cost["121 f"] < steps.cost["121 f"] - 0.05
        and both.frechet_all < 0.8 * four.frechet_all
        and both.cost["121 f"] < four.cost["121 f"]
    )


def frozen_beats_fewer(render, names):
    rows = [render.quality(TEACHER, frames, name) for frames in LENGTHS for name in names]
    return all(own.psnr > own.fewer.psnr for own in rows)


def none_beats_fewer(render, kind, but):
    rows = [
        (row, render.quality(STUDENT, row["frames"], row["row"]))
        for row in render.content("quality")["rows"]
        if row["model"] == STUDENT and row["definition"]["kind"] == kind
    ]
    return len(rows) > 4 and all(
        own.psnr < 1.02 * own.fewer.psnr for row, own in rows if row["row"] not in but
    )


def frozen_share(render, start):
    rows = [
        row["of_dense"]
        for row in render.content("freeze")["rows"]
        if (row["steps"], row["scope"], row["refresh_every"]) == (24, "whole blocks", 3)
        and (row["start_percent"], row["cache_device"], row["cache_dtype"]) == (start, "gpu", "default")
    ]
    return [1 - share for share in rows]


def rounded(values, said):
    return [f"{value:.1f}" for value in values] == said.split()


def refined(render):
    return [render.quality(TEACHER, frames, f"{REFINED} + {FREEZE}") for frames in LENGTHS]


def best_recipe(render):
    return all(
        row.of_dense.frechet_all <= 1 and row.cost < 0.34 and row.of_dense.drift < 1.05
        for row in refined(render)
    )


def presets(render):
    """Balanced and fast in one stage of 24 steps, short and long: how far they come, and what they cost at the template's size."""
    rows = {(row["model"], row["frames"], row["row"]): row for row in render.content("quality")["rows"]}
    names = [f"stride {stride}, motion + {FREEZE}" for stride in (2, 3)]
    short, long = ([render.quality(TEACHER, frames, name).of_dense for name in names] for frames in LENGTHS)
    return short, long, [rows[TEACHER, 25, name]["cost"]["97 f 896×512"] for name in names]


def both_stages(render):
    """(row, the same by fewer steps that cost more) of balanced and of fast in two stages."""
    return [
        [
            render.two_stage(f"both stages at stride {stride}, blind", frames=frames),
            render.two_stage(f"{steps} from σ 0.909375", frames=frames),
        ]
        for stride, frames, steps in ((2, 17, "4 + 2 steps"), (3, 16, "4 + 1 step"))
    ]


def a_window_drifts(render):
    name = "stride 2, motion, full length from σ 0.75"
    rows = [
        [render.quality(TEACHER, frames, name + more) for more in ("", " with a window")]
        for frames in LENGTHS
    ]
    return all(
        own.frechet_all < 1.08 * of.frechet_all and own.drift > 1.05 * of.drift and own.cost < of.cost
        for of, own in rows
    )


def packed_costs(render):
    name = "whole blocks, linear, from 0.4, every 3."
    return [
        abs(
            render.quality(TEACHER, frames, name).psnr
            - render.quality(TEACHER, frames, f"{name}, kept as fp8_e4m3fn").psnr
        )
        for frames in LENGTHS
    ]


def film_and_second_stage(render):
    film = [
        render.find("inbetween", segment="Bunny, fast", gap=4, reference="clean", method=method).psnr
        for method in ("guided", "motion")
    ]
    gained = render.two_stage("stride 2").frechet_all / render.two_stage("stride 2, blind").frechet_all
    return film[0] > film[1] + 3 and 0.7 < gained < 0.95


TWO_STAGE = (
    "two_stage_text_to_video",
    "two_stage_image_to_video",
    "two_stage_first_last_frame",
    "two_stage_text_to_video_ltx_2_5",
    "two_stage_image_to_video_ltx_2_5",
)
MILDEST = tuple(f"pooled 2, ±1, dense edge{more}" for more in (", from 0.4", " of 2, from 0.25"))
VERDICTS = {
    Said("KeyframeStride", "stride 3 came closer than 4 for hardly more"): three_beats_four,
    Said("KeyframeStride", "3 much less than 4"): three_beats_four,
    Said(
        "KeyframeStride", "Between two stages stride 2 was about as good as fewer steps in both"
    ): between_stages,
    Said("KeyframeStride", "the same stride in both stages came closer"): between_stages,
    Said("LatentFlowInterpolate", "On film that gains much, behind a second stage"): film_and_second_stage,
    Said("ScheduleSpatialFreeze", "came closer to the full result than fewer steps"): lambda render: (
        frozen_beats_fewer(render, [FREEZE, "whole blocks, linear, from 0.4, every 3."])
    ),
    Said("ScheduleSpatialFreeze", "So it was with 16 and 12 steps"): lambda render: frozen_beats_fewer(
        render, [f"{steps} steps + {FREEZE}" for steps in (16, 12)]
    ),
    Said("ScheduleSpatialFreeze", "on top of Keyframe Stride it cost next to nothing"): lambda render: all(
        cheaper_and_alike(render, name, f"{name} + {FREEZE}", 1.03)
        for name in ("stride 2, motion", "stride 3, motion")
    ),
    Said("ScheduleSpatialFreeze", "one step less came closer"): lambda render: none_beats_fewer(
        render, "freeze", ()
    ),
    Said("ScheduleSpatialFreeze", "less than a tenth of a decibel"): lambda render: (
        max(packed_costs(render)) < 0.1
    ),
    Said("ScheduleSpatialFreeze", "0.4 saved about a quarter of the time, 0.2 a third"): lambda render: (
        all(0.2 < saved < 0.28 for saved in frozen_share(render, 0.4))
        and all(0.28 < saved < 0.37 for saved in frozen_share(render, 0.2))
    ),
    Said("ThriftLowRankAttention", "with 8 but for the mildest settings"): lambda render: none_beats_fewer(
        render, "low rank", MILDEST
    ),
    Said("ThriftLowRankAttention", "In the second stage of two it stayed near"): lambda render: all(
        render.two_stage(name).of_dense.frechet_all < 1.2 for name in ("pooled 2, ±2", "routed 30%")
    ),
    Said("keyframe_stride", "it came much closer for hardly more"): three_beats_four,
    Said("coarse_to_fine", "hardly costs distance, but the clip drifts more"): a_window_drifts,
    Said("schedule_spatial_freeze", "A fifth to a quarter of the sampling time"): lambda render: all(
        0.2 < saved < 0.25 for saved in frozen_share(render, 0.4)
    ),
    Said("schedule_spatial_freeze", "Take it with 12 steps or more"): lambda render: frozen_beats_fewer(
        render, [f"{steps} steps + {FREEZE}" for steps in (16, 12)]
    ),
    Said(
        "stride_refine_undistilled",
        "as near to real ones as all 24 steps at both lengths, for a third of their work",
    ): best_recipe,
    Said(
        "stride_refine_undistilled", "for the same work had 1.8 and 2.0 times the distance"
    ): lambda render: rounded([row.fewer.of_dense.frechet_all for row in refined(render)], "1.8 2.0"),
    Said("stride_refine_undistilled", "fast clips had 2.6 and 1.6 times the distance"): lambda render: (
        rounded([row.of_dense.fast for row in refined(render)], "2.6 1.6")
    ),
    Said("preset", "balanced takes a third of the computing of 24 steps and fast a quarter"): lambda render: (
        [round(12 * cost) for cost in presets(render)[2]] == [4, 3]
        and all(row.frechet_all < 1.05 for row in presets(render)[1])
    ),
    Said("preset", "With a short one they came less near, 1.4 and 1.5 times the distance"): lambda render: (
        rounded([row.frechet_all for row in presets(render)[0]], "1.4 1.5")
    ),
    Said("preset", "Fast clips lost"): lambda render: all(
        row.fast > 1.4 for rows in presets(render)[:2] for row in rows
    ),
    Said(
        "preset_two_stage",
        "half of the computing at 2.5 times the distance to real clips, fast a third at 3.3 times",
    ): lambda render: (
        rounded([own.of_dense.frechet_all for own, _ in both_stages(render)], "2.5 3.3")
        and [round(6 * own.cost["121 f"]) for own, _ in both_stages(render)] == [3, 2]
    ),
    Said("preset_two_stage", "nearly all of it at 1.05 times"): lambda render: (
        f"{render.two_stage('±4, 1 sink').of_dense.frechet_all:.2f}" == "1.05"
        and render.two_stage("±4, 1 sink").cost["121 f"] > 0.9
    ),
    Said(
        "preset_two_stage", "Four and two steps instead, or four and one, cost more and came less near"
    ): lambda render: all(
        own.frechet_all < rival.frechet_all and own.cost["121 f"] < rival.cost["121 f"]
        for own, rival in both_stages(render)
    ),
    **{
        Said(name, "six and two steps instead of eight and three did about as well"): between_stages
        for name in TWO_STAGE
    },
    **{
        Said(name, "3 came much closer than 4"): lambda render: (
            render.two_stage("stride 3", frames=16).frechet_all
            < 0.75 * render.two_stage("stride 4", frames=16).frechet_all
        )
        for name in TWO_STAGE
    },
}


def own_text(pack, name):
    """What a node says of itself, or the notes of a template."""
    for node in pack("nodes").NODES:
        schema = node.GET_SCHEMA()
        if schema.node_id == name:
            return " ".join([schema.description, *(field.tooltip or "" for field in schema.inputs)])
    graph = json.loads((pack.root / "workflows" / f"{name}.json").read_text(encoding="utf-8"))
    notes = [node["widgets_values"][0] for node in graph["nodes"] if node["type"] == "MarkdownNote"]
    return " ".join(notes)


@pytest.mark.parametrize("said", VERDICTS, ids=lambda said: f"{said.where}: {said.words}")
def test_nodes_and_templates_say_what_the_figures_say(pack, render, said):
    assert said.words in own_text(pack, said.where)
    assert said.holds(render)


def test_the_refining_template_is_what_was_measured(pack, render):
    """Its nodes have the settings of the row that its note quotes, and the second sampler the steps from the row's sigma on."""
    text = (pack.root / "workflows/stride_refine_undistilled.json").read_text(encoding="utf-8")
    values = {node["type"]: node.get("widgets_values") for node in json.loads(text)["nodes"]}
    name = f"{REFINED} + {FREEZE}"
    row = next(
        row for row in render.content("quality")["rows"] if (row["model"], row["row"]) == (TEACHER, name)
    )
    definition, striding = row["definition"], row["definition"]["striding"]
    ((node, inputs),) = definition["nodes"]
    assert values[node][: len(inputs)] == list(inputs.values())
    assert values["KeyframeStride"][0] == striding["stride"]
    assert values["LatentFlowInterpolate"][0] == striding["method"]
    assert values["LTXVScheduler"][0] == definition["steps"]
    width, height, length, _ = values["EmptyLTXVLatentVideo"]
    latent_frames = (length - 1) // 8 + 1
    assert (latent_frames - 1) % striding["stride"] == 0
    tokens = latent_frames * (width // 32) * (height // 32)
    sigmas = importlib.import_module("rows").scheduled_for(tokens, definition["steps"])
    begins = values["SplitSigmas"][0]
    assert min(sigmas, key=lambda sigma: abs(sigma - striding["again_from"])) == sigmas[begins]
    assert definition["steps"] - begins == len(row["runs"][0]["second"]["executed"])


def changed(found, by, within=False):
    """Figures and times as `by` makes them of a figure and of its row's place; prices stay."""
    if isinstance(found, dict):
        inside = ("figures", "by_speed", "of_dense", "psnr")
        return {key: changed(value, by, within or key in inside) for key, value in found.items()}
    if isinstance(found, list):
        return [changed(value, partial(by, place=place)) for place, value in enumerate(found)]
    return by(found) if within and isinstance(found, float) and found else found


# Rows that are alike are pulled apart by one of these.
FALSE = [lambda found, place=0: 1 / found] + [
    lambda found, place=0, seed=seed: found * Random(f"{seed} {place}").choice((1, 3)) for seed in range(3)
]


def test_every_verdict_falls_with_other_figures(render, monkeypatch):
    """Each of them with one of these falsifications at least."""
    real = {name: render.content(name) for name in ("quality", "two_stage", "freeze", "inbetween")}
    left = list(VERDICTS)
    try:
        for by in FALSE:
            false = {name: changed(found, by) for name, found in real.items()}
            monkeypatch.setattr(render, "content", false.get)
            render.group.cache_clear()
            left = [said for said in left if said.holds(render)]
        assert left == []
    finally:
        render.group.cache_clear()
