"""The subgraph blueprints: offered by the server, sound in themselves, and right when they run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

SUBGRAPHS = Path(__file__).resolve().parent.parent.parent / "subgraphs"
SAMPLER = "LTX Efficient Sampler"
TEXT, IMAGE = (f"LTX Efficient Two-Stage ({source})" for source in ("Text", "Image"))
BLUEPRINTS = (SAMPLER, TEXT, IMAGE)
PRESETS = ("quality", "balanced", "fast", "cool laptop")
STAGES = ["model", "positive", "negative", "vae", "audio_vae", "upscale_model"]
KNOBS = ["preset", "width", "height", "length", "frame_rate", "seed"]
INPUTS = {
    SAMPLER: [
        *("model", "positive", "negative", "noise", "sampler", "sigmas", "latent", "vae"),
        *("cfg", "preset", "stride", "window", "freeze"),
    ],
    TEXT: [*STAGES, *KNOBS],
    IMAGE: [*STAGES, "image", *KNOBS],
}
OUTPUTS = {
    SAMPLER: [("latent", "LATENT"), ("frames", "IMAGE"), ("audio_latent", "LATENT")],
    TEXT: [("frames", "IMAGE"), ("audio", "AUDIO"), ("frame_rate", "FLOAT")],
}
OUTPUTS[IMAGE] = OUTPUTS[TEXT]
CAPTION = {"shape": "ring", "direction": "horizontal", "speed": "medium", "second_shape": "none"}
RATE, STEPS = 24, 8


def read(name: str) -> dict[str, Any]:
    return json.loads((SUBGRAPHS / f"{name}.json").read_text(encoding="utf-8"))


def box_of(name: str) -> dict[str, Any]:
    return read(name)["definitions"]["subgraphs"][0]


def node(kind: str, **inputs: Any) -> dict[str, Any]:
    return {"class_type": kind, "inputs": inputs}


def around(length: int = 33, size: int = 64, steps: int = STEPS) -> dict[str, Any]:
    """What a graph has around SamplerCustomAdvanced, with the tiny model."""
    return {
        "tiny": node("ThriftTinyLTX", **CAPTION),
        "text": node("LTXVConditioning", positive=["tiny", 1], negative=["tiny", 2], frame_rate=float(RATE)),
        "empty": node("EmptyLTXVLatentVideo", width=size, height=size, length=length, batch_size=1),
        "sigmas": node(
            "LTXVScheduler", steps=steps, max_shift=2.05, base_shift=0.95, stretch=True, terminal=0.1, latent=["empty", 0]
        ),
        "euler": node("KSamplerSelect", sampler_name="euler"),
        "noise": node("RandomNoise", noise_seed=5),
    }  # fmt: skip


SOCKETS: dict[str, Any] = {
    "model": ["tiny", 0],
    "positive": ["text", 0],
    "negative": ["text", 1],
    "noise": ["noise", 0],
    "sampler": ["euler", 0],
    "sigmas": ["sigmas", 0],
    "latent": ["empty", 0],
    "vae": ["tiny", 3],
    "cfg": 2.0,
}


def chain(knobs: dict[str, Any], sockets: dict[str, Any] = SOCKETS) -> dict[str, Any]:
    """What the sampler stands for, as plain nodes in a row; its end is «restored»."""
    given = {"preset": "balanced", "stride": 0, "window": 0, "freeze": 0} | sockets | knobs
    model, latent, frames = ["preset", 0], ["preset", 1], ["preset", 2]
    nodes = {
        "preset": node(
            "ThriftPreset",
            stage="auto",
            **{name: given[name] for name in ("model", "latent", "vae", "sigmas", "preset")},
        )
    }
    if given["stride"]:
        nodes["stride"] = node(
            "KeyframeStride", model=model, latent=given["latent"], stride=given["stride"], vae=given["vae"]
        )
        model, latent, frames = ["stride", 0], ["stride", 1], ["stride", 3]
    if given["window"]:
        widgets = {"sink_frames": 1, "start_percent": 0.5, "end_percent": 1.0, "dense_blocks": 0}
        nodes["window"] = node("ApplyTemporalWindow", model=model, window=given["window"], **widgets)
        model = ["window", 0]
    if given["freeze"]:
        widgets = {"start_percent": 0.6, "end_percent": 1.0, "scope": "whole blocks", "forecast": "linear"}
        widgets |= {"blocks_kept": 0, "cache_device": "auto", "cache_limit_gb": 0.0}
        nodes["freeze"] = node("ScheduleSpatialFreeze", model=model, refresh_every=given["freeze"], **widgets)
        model = ["freeze", 0]
    both = {name: given[name] for name in ("positive", "negative", "cfg")}
    nodes["guider"] = node("CFGGuider", model=model, **both)
    rest = {name: given[name] for name in ("noise", "sampler", "sigmas")}
    nodes["sampled"] = node("SamplerCustomAdvanced", guider=["guider", 0], latent_image=latent, **rest)
    nodes["restored"] = node(
        "LatentFlowInterpolate", latent=["sampled", 1], method="motion", vae=given["vae"], reference=frames,
        stride=given["stride"],
    )  # fmt: skip
    return nodes


class Runs:
    """Runs a blueprint on the server and reads what it made."""

    def __init__(self, server: Any, object_info: dict[str, Any], ui_graph: Any) -> None:
        self.server, self.object_info, self.ui_graph = server, object_info, ui_graph

    def box(self, name: str, given: dict[str, Any]) -> tuple[dict[str, Any], dict[str, list[Any]]]:
        return self.ui_graph.box_to_prompt(read(name), self.object_info, given)

    def latents(self, nodes: dict[str, Any], **wanted: list[Any]) -> dict[str, torch.Tensor]:
        saved = {f"saved {name}": node("SaveLatent", samples=source, filename_prefix=f"latents/{name}")
                 for name, source in wanted.items()}  # fmt: skip
        result = self.server.queue({**nodes, **saved})
        files = {name: self.server.output_path(result, f"saved {name}", "latents") for name in wanted}
        return {name: load_file(path)["latent_tensor"] for name, path in files.items()}

    def sampler(
        self, knobs: dict[str, Any], nodes: dict[str, Any], sockets: dict[str, Any] = SOCKETS
    ) -> dict[str, torch.Tensor]:
        """The sampler's latent, its frames (encoded: the codec keeps every value), and what was sampled inside."""
        inner, made = self.box(SAMPLER, sockets | knobs)
        sampled = next(key for key, value in inner.items() if value["class_type"] == "SamplerCustomAdvanced")
        encoded = {"frames": node("VAEEncode", pixels=made["frames"], vae=["tiny", 3])}
        nodes = {**nodes, **inner, **encoded}
        return self.latents(nodes, latent=made["latent"], frames=["frames", 0], sampled=[sampled, 1])


@pytest.fixture(scope="session")
def runs(server: Any, object_info: dict[str, Any], ui_graph: Any) -> Runs:
    return Runs(server, object_info, ui_graph)


def test_these_are_all_and_the_server_offers_them_under_names_of_their_own(server: Any) -> None:
    assert sorted(path.stem for path in SUBGRAPHS.iterdir()) == sorted(BLUEPRINTS)
    offered = server.get("/global_subgraphs")
    ours = {
        entry["name"]: key
        for key, entry in offered.items()
        if entry["info"]["node_pack"] == "custom_nodes.frame-thrift"
    }
    assert sorted(ours) == sorted(BLUEPRINTS)
    for name, key in ours.items():
        assert json.loads(server.get(f"/global_subgraphs/{key}")["data"]) == read(name)
    # The frontend keeps them by name: of two alike one would be lost.
    names = [entry["name"].casefold() for entry in offered.values()]
    assert len(names) > len(BLUEPRINTS) and len(set(names)) == len(names)


@pytest.mark.parametrize("name", BLUEPRINTS)
def test_one_root_node_with_the_sockets_and_knobs_of_its_subgraph(name: str) -> None:
    blueprint, box = read(name), box_of(name)
    (root,) = blueprint["nodes"]
    assert len(blueprint["definitions"]["subgraphs"]) == 1 and blueprint["links"] == []
    assert root["type"] == box["id"] and root["title"] == box["name"] == name
    assert box["category"] == "FrameThrift" and len(box["description"]) > 100
    for side in ("inputs", "outputs"):
        shown = [(entry["name"], entry["type"]) for entry in root[side]]
        assert shown == [(entry["name"], entry["type"]) for entry in box[side]]
    assert [entry["name"] for entry in box["inputs"]] == INPUTS[name]
    assert [(entry["name"], entry["type"]) for entry in box["outputs"]] == OUTPUTS[name]
    knobs = [entry["name"] for entry in root["inputs"] if "widget" in entry]
    assert knobs == INPUTS[name][INPUTS[name].index("cfg" if name == SAMPLER else "preset") :]


@pytest.mark.parametrize("name", BLUEPRINTS)
def test_links_say_the_same_at_both_ends(name: str) -> None:
    """The frontend drops what does not fit, without a word."""
    box = box_of(name)
    nodes = {entry["id"]: entry for entry in box["nodes"]}
    ends = []
    for link in box["links"]:
        origin, target = link["origin_id"], link["target_id"]
        source = box["inputs"] if origin == -10 else nodes[origin]["outputs"]
        source = source[link["origin_slot"]]
        sink = (box["outputs"] if target == -20 else nodes[target]["inputs"])[link["target_slot"]]
        assert link["id"] in source.get("linkIds", source.get("links"))
        assert link["id"] in sink.get("linkIds", [sink.get("link")])
        assert source["type"] == link["type"] and link["type"] in sink["type"].split(",")
        ends += [link["id"]] * 2
    told = [number for entry in (*box["inputs"], *box["outputs"]) for number in entry["linkIds"]]
    for entry in nodes.values():
        told += [number for output in entry["outputs"] for number in output["links"]]
        told += [slot["link"] for slot in entry["inputs"] if slot["link"] is not None]
    assert sorted(told) == sorted(ends)


@pytest.mark.parametrize("name", BLUEPRINTS)
def test_inner_nodes_are_known_connected_and_hold_valid_values(runs: Runs, name: str) -> None:
    sockets = {entry["name"]: ["outside", 0] for entry in box_of(name)["inputs"]}
    knobs = [entry["name"] for entry in read(name)["nodes"][0]["inputs"] if "widget" in entry]
    prompt, _ = runs.box(name, {key: value for key, value in sockets.items() if key not in knobs})
    assert len(prompt) == len(box_of(name)["nodes"]), "an unknown node was left out"
    for key, inner in prompt.items():
        info = runs.object_info[inner["class_type"]]["input"]
        specs = info["required"] | info.get("optional", {})
        for wanted, (kind, *_) in info["required"].items():
            grown = kind == "COMFY_AUTOGROW_V3" and f"{wanted}.a" in inner["inputs"]
            assert wanted in inner["inputs"] or grown, f"{inner['class_type']} {key} lacks {wanted}"
        for entry, value in inner["inputs"].items():
            if isinstance(value, list):
                continue
            kind, options = (*specs[entry], {})[:2]
            choices = kind if isinstance(kind, list) else options.get("options")
            if choices is not None:
                assert value in choices, (inner["class_type"], entry, value)
            elif kind in ("INT", "FLOAT"):
                assert options.get("min", value) <= value <= options.get("max", value)


def test_knobs_reach_as_far_as_the_nodes_they_set(object_info: dict[str, Any]) -> None:
    """0 aside, which leaves it to the preset; freeze ends where pictures stayed near the full ones."""
    limits = {
        entry["title"].split()[0]: entry["properties"]
        for entry in box_of(SAMPLER)["nodes"]
        if entry["type"] == "PrimitiveInt"
    }
    kinds = {"stride": ("KeyframeStride", "stride"), "window": ("ApplyTemporalWindow", "window")}
    for knob, (kind, entry) in kinds.items():
        options = object_info[kind]["input"]["required"][entry][1]
        assert limits[knob]["min"] == 0 < options["min"] == 1
        assert limits[knob]["max"] == options["max"]
    options = object_info["ScheduleSpatialFreeze"]["input"]["required"]["refresh_every"][1]
    assert limits["freeze"]["min"] == 0 and 1 == options["min"] < limits["freeze"]["max"] < options["max"]


@pytest.mark.parametrize("preset", PRESETS)
def test_sampler_leaves_everything_to_the_preset(runs: Runs, preset: str, new_log: Any) -> None:
    made = runs.sampler({"preset": preset}, around())
    plain = runs.latents({**around(), **chain({"preset": preset})}, restored=["restored", 0])
    assert made["latent"].shape == made["frames"].shape == (1, 128, 5, 2, 2)
    assert torch.equal(made["latent"], plain["restored"])
    assert torch.isfinite(made["frames"]).all() and made["frames"].std() > 0.01
    assert "FrameThrift:" in new_log()


@pytest.mark.parametrize(
    ("knobs", "short", "line"),
    [
        ({"preset": "fast", "stride": 1}, 5, None),
        ({"preset": "quality", "stride": 2}, 3, "keyframe stride (3 instead of 5 latent frames, each 2 times as long)"),
        ({"preset": "fast", "stride": 4}, 2, "keyframe stride (2 instead of 5 latent frames, each 4 times as long)"),
        ({"stride": 1, "window": 1}, 5, "temporal window (±1 latent frames, 1 sink)"),
        ({"stride": 1, "freeze": 3}, 5, "spatial freeze (whole blocks, every 3. step full, linear)"),
        ({"preset": "cool laptop", "stride": 2, "window": 32, "freeze": 1}, 3, "keyframe stride (3 instead of 5"),
    ],
)  # fmt: skip
def test_knobs_replace_what_the_preset_chose(
    runs: Runs, knobs: dict[str, Any], short: int, line: str | None, new_log: Any
) -> None:
    made = runs.sampler(knobs, around())
    lines = [entry for entry in new_log().splitlines() if "FrameThrift:" in entry]
    plain = runs.latents({**around(), **chain(knobs)}, restored=["restored", 0])
    assert made["sampled"].shape[2] == short
    assert made["latent"].shape[2] == made["frames"].shape[2] == 5
    assert torch.equal(made["latent"], plain["restored"])
    if line is None:
        assert not any("times as long" in entry for entry in lines)
    else:
        assert sum(line in entry and " taken" in entry for entry in lines) == 1
    if knobs.get("freeze") == 1:
        assert not any("step full" in entry for entry in lines)


def test_a_stride_that_leaves_no_clip_is_refused_with_the_remedy(runs: Runs, driver: Any) -> None:
    with pytest.raises(
        driver.ExecutionFailed, match="8 is too large for 5 latent frames.*Set it to 4 or less"
    ):
        runs.sampler({"stride": 8}, around())


def test_a_schedule_that_ends_early_gives_the_clean_estimate(runs: Runs) -> None:
    """The sampler's own output still holds noise there, of which no frame can be made."""
    nodes = around() | {"split": node("SplitSigmas", sigmas=["sigmas", 0], step=4)}
    made = runs.sampler({"stride": 1}, nodes, SOCKETS | {"sigmas": ["split", 0]})
    assert torch.equal(made["latent"], made["sampled"])


@pytest.mark.parametrize("stride", [0, 2])
def test_sampler_refines_a_clip(runs: Runs, stride: int) -> None:
    nodes = around(steps=4) | {
        "clip": node("EmptyImage", width=64, height=64, batch_size=33, color=0x4080C0),
        "encoded": node("VAEEncode", pixels=["clip", 0], vae=["tiny", 3]),
        "late": node("SplitSigmas", sigmas=["sigmas", 0], step=2),
    }
    sockets = SOCKETS | {"latent": ["encoded", 0], "sigmas": ["late", 1]}
    made = runs.sampler({"stride": stride}, nodes, sockets)
    plain = runs.latents({**nodes, **chain({"stride": stride}, sockets)}, restored=["restored", 0])
    assert made["latent"].shape[2] == made["frames"].shape[2] == 5
    assert torch.equal(made["latent"], plain["restored"])


def with_sound(length: int) -> dict[str, Any]:
    return around(length, steps=2) | {
        "sound": node("ThriftOddSound", form="ltx-2.3"),
        "sound vae": node("ThriftOddSoundVAE"),
        "picture": node("EmptyImage", width=80, height=64, batch_size=1, color=0x4080C0),
        "upscaler": node("ThriftOddUpscaler", is_temporal=False),
    }


SOUND: dict[str, Any] = {"model": ["sound", 0], "positive": ["sound", 1], "negative": ["sound", 2]}


def test_sampler_hands_the_sound_on(runs: Runs) -> None:
    nodes = with_sound(17) | {
        "silence": node("LTXVEmptyLatentAudio", frames_number=17, frame_rate=24.0, batch_size=1, audio_vae=["sound vae", 0]),
        "both": node("LTXVConcatAVLatent", video_latent=["empty", 0], audio_latent=["silence", 0]),
    }  # fmt: skip
    inner, made = runs.box(SAMPLER, SOCKETS | SOUND | {"latent": ["both", 0], "stride": 2})
    nodes = {**nodes, **inner, "parts": node("LTXVSeparateAVLatent", av_latent=made["latent"])}
    got = runs.latents(nodes, audio=made["audio_latent"], video=["parts", 0], same=["parts", 1])
    assert got["video"].shape[2] == 3
    assert got["audio"].shape == (1, 8, 18, 16) and torch.equal(got["audio"], got["same"])
    assert got["audio"].std() > 0.01


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("name", [TEXT, IMAGE])
def test_two_stages_bring_back_every_frame_and_the_sound(
    runs: Runs, name: str, preset: str, new_log: Any
) -> None:
    length, width, height = 73, 192, 128
    given = SOUND | {"vae": ["tiny", 3], "audio_vae": ["sound vae", 0], "upscale_model": ["upscaler", 0]}
    if name == IMAGE:
        given["image"] = ["picture", 0]
    # A seed of its own, else the server remembers the first stage of another test.
    seed = 100 + PRESETS.index(preset)
    sizes = {"width": width + 40, "height": height, "length": length, "frame_rate": RATE}
    inner, made = runs.box(name, given | sizes | {"preset": preset, "seed": seed})
    encoded = node("VAEEncode", pixels=made["frames"], vae=["tiny", 3])
    sound = node("SaveAudio", audio=made["audio"], filename_prefix="audio/box")
    rate = node("PreviewAny", source=made["frame_rate"])
    saved = node("SaveLatent", samples=["encoded", 0], filename_prefix="latents/box")
    prompt = {**with_sound(length), **inner, "encoded": encoded, "wave": sound, "rate": rate, "saved": saved}
    result = runs.server.queue(prompt)
    frames = load_file(runs.server.output_path(result, "saved", "latents"))["latent_tensor"]
    assert frames.shape == (1, 128, 10, height // 32, width // 32)
    assert torch.isfinite(frames).all() and frames.std() > 0.01
    assert runs.server.output_path(result, "wave", "audio").stat().st_size > 0
    assert result.outputs["rate"]["text"] == [str(float(RATE))]
    runs_of_ours = [entry for entry in new_log().splitlines() if " taken" in entry]
    assert preset == "quality" or runs_of_ours


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_divides_the_length_that_two_stages_come_with(
    runs: Runs, preset: str, new_log: Any
) -> None:
    """Else the last frames end behind the sound."""
    (length,) = (
        entry["widgets_values"][0] for entry in box_of(TEXT)["nodes"] if entry.get("title") == "length"
    )
    nodes = around(length) | {
        "of the preset": node(
            "ThriftPreset", stage="first", preset=preset, model=["tiny", 0], latent=["empty", 0]
        )
    }
    made = runs.latents(nodes, strided=["of the preset", 1])
    assert made["strided"].shape[2] < (length - 1) // 8 + 1 or preset == "quality"
    assert "does not divide" not in new_log()


def test_the_image_is_the_first_frame(runs: Runs) -> None:
    given = SOUND | {"vae": ["tiny", 3], "audio_vae": ["sound vae", 0], "upscale_model": ["upscaler", 0]}
    sizes = {"width": 128, "height": 128, "length": 17, "frame_rate": RATE, "preset": "balanced"}
    inner, made = runs.box(IMAGE, given | sizes | {"image": ["picture", 0]})
    nodes = with_sound(17) | {
        "large": node("EmptyImage", width=128, height=128, batch_size=1, color=0x4080C0),
        "expected": node("VAEEncode", pixels=["large", 0], vae=["tiny", 3]),
        "encoded": node("VAEEncode", pixels=made["frames"], vae=["tiny", 3]),
    }
    got = runs.latents({**nodes, **inner}, expected=["expected", 0], frames=["encoded", 0])
    # Core's preparation of the image compresses it.
    near = (got["frames"][:, :, :1] - got["expected"]).abs().mean()
    far = (got["frames"][:, :, 2:] - got["expected"]).abs().mean()
    assert near < 0.1 * far
