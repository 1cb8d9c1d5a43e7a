"""The workflow templates: offered by the server, and runnable as a person would run them."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import av
import pytest
import torch
from safetensors.torch import load_file

WORKFLOWS = Path(__file__).resolve().parent.parent.parent / "workflows"
TEMPLATES = sorted(path.stem for path in WORKFLOWS.glob("*.json"))
BYPASSED, MUTED = 4, 2
LATENT_FILE = "latent file"
# Stand-ins for what a template loads, by its output slots.
CAPTION = {"shape": "ring", "direction": "horizontal", "speed": "medium", "second_shape": "none"}
STAND_INS: dict[str, dict[int, list[Any]]] = {
    "CheckpointLoaderSimple": {0: ["tiny", 0], 2: ["tiny", 3]},
    "LatentUpscaleModelLoader": {0: ["upscaler", 0]},
    "FrameInterpolationModelLoader": {0: ["interpolator", 0]},
    "VAELoader": {0: ["tiny", 3]},
    "LoadImage": {0: ["picture", 0]},
}
WITH_SOUND = {
    "CheckpointLoaderSimple": {0: ["sound", 0], 2: ["tiny", 3]},
    "UNETLoader": {0: ["sound", 0]},
    "LoraLoaderModelOnly": {0: ["sound", 0]},
    "LTXVEmptyLatentAudio": {0: ["sound", 3]},
    "LTXVAudioVAEDecode": {0: ["silence", 0]},
}
NEW = {
    "tiny": {"class_type": "ThriftTinyLTX", "inputs": CAPTION},
    "upscaler": {"class_type": "ThriftOddUpscaler", "inputs": {"is_temporal": True}},
    "picture": {
        "class_type": "EmptyImage",
        "inputs": {"width": 80, "height": 64, "batch_size": 1, "color": 0x4080C0},
    },
    "interpolator": {"class_type": "ThriftOddInterpolator", "inputs": {}},
    "sound": {"class_type": "ThriftOddSound", "inputs": {"form": "ltxav"}},
    "silence": {"class_type": "EmptyAudio", "inputs": {"duration": 4.0, "sample_rate": 44100, "channels": 2}},
}
# What the length of a two-stage template is, and what it is here.
LENGTH, SHORT = 129, 33
# Of a template with Thrift Preset, which leaves shorter clips their frames.
PRESET_LENGTH = 97
PRESETS = {"quality": 1, "balanced": 2, "fast": 3, "cool laptop": 3}
PRESET_TEMPLATES = [name for name in TEMPLATES if name.startswith("preset")]
# Enough for Thrift Preset to freeze some.
STEPS = {"ScheduleSpatialFreeze": 8, "ThriftPreset": 12}
LEFT_OUT = ("CLIPLoader", "CLIPTextEncode", "LTXAVTextEncoderLoader", "LTXVAudioVAELoader")


def read(name: str) -> dict[str, Any]:
    return json.loads((WORKFLOWS / f"{name}.json").read_text(encoding="utf-8"))


def with_mode(graph: dict[str, Any], kind: str, mode: int) -> dict[str, Any]:
    """The graph after a person has bypassed or muted the nodes of one kind."""
    graph = copy.deepcopy(graph)
    for node in graph["nodes"]:
        if node["type"] == kind:
            node["mode"] = mode
    return graph


def is_two_stage(prompt: dict[str, Any]) -> bool:
    """Whether it is one of the graphs with an upscale in space, whose length is wired."""
    kinds = {node["class_type"] for node in prompt.values()}
    return {"LTXVLatentUpsampler", "PrimitiveInt"} <= kinds


def length_of(prompt: dict[str, Any]) -> int:
    """Of a graph with one length for picture and sound."""
    return next(node["inputs"]["value"] for node in prompt.values() if node["class_type"] == "PrimitiveInt")


def asks_for_a_low_rate(prompt: dict[str, Any]) -> bool:
    """Whether Keyframe Stride is told of a frame rate, and makes less than 24 of it."""
    given = [node["inputs"] for node in prompt.values() if node["class_type"] == "KeyframeStride"]
    stride_of = {key: node["inputs"].get("value") for key, node in prompt.items()}
    strides = [stride_of.get(entry["stride"][0]) if isinstance(entry["stride"], list) else entry["stride"] for entry in given]  # fmt: skip
    return any(entry["frame_rate"] / stride < 24 for entry, stride in zip(given, strides, strict=True))


def last_separated(prompt: dict[str, Any]) -> str:
    return [key for key, node in prompt.items() if node["class_type"] == "LTXVSeparateAVLatent"][-1]


def dry(prompt: dict[str, Any]) -> dict[str, Any]:
    """The prompt with small models in place of the files, few steps, and its last latent saved."""
    kinds = {key: node["class_type"] for key, node in prompt.items()}
    has_sound = "LTXVEmptyLatentAudio" in kinds.values()
    stand_ins = STAND_INS | (WITH_SOUND if has_sound else {})
    conditioning = next(node for node in prompt.values() if node["class_type"] == "LTXVConditioning")[
        "inputs"
    ]
    text = {conditioning[name][0]: slot for name, slot in (("positive", 1), ("negative", 2))}
    small = copy.deepcopy(NEW)
    small["upscaler"]["inputs"]["is_temporal"] = not is_two_stage(prompt)
    if "UNETLoader" in kinds.values():
        small["sound"]["inputs"]["form"] = "ltx-2.5"
    elif is_two_stage(prompt):
        small["sound"]["inputs"]["form"] = "ltx-2.3"
    for key, node in copy.deepcopy(prompt).items():
        if kinds[key] in stand_ins or kinds[key] in LEFT_OUT:
            continue
        for name, value in node["inputs"].items():
            if not isinstance(value, list):
                continue
            if value[0] in text:
                node["inputs"][name] = ["sound" if has_sound else "tiny", text[value[0]]]
            elif kinds[value[0]] in stand_ins:
                node["inputs"][name] = stand_ins[kinds[value[0]]][value[1]]
        if kinds[key] == "EmptyLTXVLatentVideo":
            node["inputs"].update(width=128, height=128, length=97)
            if is_two_stage(prompt):
                node["inputs"].update(width=64, height=64, length=prompt[key]["inputs"]["length"])
        if kinds[key] == "PrimitiveInt" and node["inputs"]["value"] == LENGTH:
            node["inputs"]["value"] = SHORT
        if kinds[key] == "LTXVScheduler":
            # The freeze needs steps between full ones.
            node["inputs"]["steps"] = max(
                [2, *(steps for kind, steps in STEPS.items() if kind in kinds.values())]
            )
        if kinds[key] == "SplitSigmas":
            node["inputs"]["step"] = 1
        small[key] = node
    sampler = [key for key, kind in kinds.items() if kind.startswith("SamplerCustom")][-1]
    latent: list[Any] = [sampler, 0]
    if has_sound:
        latent = [last_separated(prompt), 0]
    if is_two_stage(prompt):
        fill = next(key for key, kind in kinds.items() if kind == "LatentFlowInterpolate")
        latent = prompt[fill]["inputs"]["latent"]
    inputs = {"samples": latent, "filename_prefix": "latents/template"}
    return {**small, LATENT_FILE: {"class_type": "SaveLatent", "inputs": inputs}}


def frames_in(path: Path) -> int:
    with av.open(str(path)) as video:
        return sum(1 for _ in video.decode(video=0))


def run(server: Any, prompt: dict[str, Any]) -> torch.Tensor:
    result = server.queue(dry(prompt))
    videos = [key for key, node in prompt.items() if node["class_type"] == "SaveVideo"]
    assert all(server.output_path(result, key).stat().st_size > 0 for key in videos)
    if is_two_stage(prompt):
        assert frames_in(server.output_path(result, videos[0])) == length_of(dry(prompt))
    return load_file(server.output_path(result, LATENT_FILE, "latents"))["latent_tensor"]


@pytest.mark.parametrize("name", TEMPLATES)
def test_template_is_offered_with_a_thumbnail(server: Any, name: str) -> None:
    assert name in server.get("/workflow_templates")["frame-thrift"]
    status, picture = server.request("GET", f"/api/workflow_templates/frame-thrift/{name}.jpg")
    assert status == 200 and picture.startswith(b"\xff\xd8")
    assert len(picture) <= 150_000


@pytest.mark.parametrize("name", TEMPLATES)
def test_template_knows_all_its_nodes(object_info: dict[str, Any], name: str) -> None:
    kinds = {node["type"] for node in read(name)["nodes"]}
    assert kinds - set(object_info) <= {"Note", "MarkdownNote"}


@pytest.mark.parametrize("name", TEMPLATES)
def test_template_runs_dry(
    server: Any, object_info: dict[str, Any], ui_graph: Any, name: str, new_log: Any
) -> None:
    prompt = ui_graph.to_prompt(read(name), object_info)
    for node in prompt.values():
        if node["class_type"] == "RandomNoise":
            # Else the server may remember the first stage of the template before.
            node["inputs"]["noise_seed"] += 100 * TEMPLATES.index(name)
    latent = run(server, prompt)
    assert torch.isfinite(latent).all()
    told = lines_of_ours(new_log())
    # The note asks for the comparison that this line asks for.
    low = [line for line in told if "compare one clip of the same seed" in line]
    assert len(low) == asks_for_a_low_rate(prompt)
    followed = [line for line in told if "Latent Flow Interpolate: at " in line]
    lines = [line for line in told if line not in low + followed]
    if name.startswith("two_stage"):
        assert latent.shape[2:] == (3, 4, 4), "every second of five latent frames, at twice the size"
        # That it followed the reference; how far the random second stage is from the first is no matter.
        assert sum("keyframes the reference is shifted by" in line for line in followed) == 1
        assert len(lines) == 1
    assert "taken" in lines[0] and all("taken" in line or "not needed" in line for line in lines)


def lines_of_ours(log: str) -> list[str]:
    """But for what the pack has to say of a server on a CPU."""
    lines = [line for line in log.splitlines() if "FrameThrift:" in line]
    return [line for line in lines if "finds no temperature sensor for cpu" not in line]


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("name", PRESET_TEMPLATES)
def test_every_preset_runs_in_its_templates(
    server: Any, object_info: dict[str, Any], ui_graph: Any, name: str, preset: str, new_log: Any
) -> None:
    prompt = dry(ui_graph.to_prompt(read(name), object_info))
    for node in prompt.values():
        if node["class_type"] == "ThriftPreset":
            node["inputs"]["preset"] = preset
        if node["class_type"] == "RandomNoise":
            # Else the server may remember a stage of another test.
            node["inputs"]["noise_seed"] += 1000 + list(PRESETS).index(preset)
    result = server.queue(prompt)
    latent = load_file(server.output_path(result, LATENT_FILE, "latents"))["latent_tensor"]
    assert latent.shape[2] == (PRESET_LENGTH - 1) // 8 // PRESETS[preset] + 1
    assert torch.isfinite(latent).all() and latent.std() > 0.01
    videos = [key for key, node in prompt.items() if node["class_type"] == "SaveVideo"]
    assert [frames_in(server.output_path(result, key)) for key in videos] == [PRESET_LENGTH]
    lines = lines_of_ours(new_log())
    strided = f"each {PRESETS[preset]} times as long"
    stages = 2 if name.endswith("two_stage") else 1
    assert sum(strided in line and " taken" in line for line in lines) == (
        stages if PRESETS[preset] > 1 else 0
    )
    assert sum("temporal window" in line and " taken" in line for line in lines) == (stages if preset == "quality" else 0)  # fmt: skip
    assert not any("does not divide" in line for line in lines)


def test_a_preset_after_a_full_first_stage_follows_that_one(
    server: Any, object_info: dict[str, Any], ui_graph: Any, new_log: Any
) -> None:
    """As the note says: quality first, then fast, whose frames in between have a reference."""
    prompt = dry(ui_graph.to_prompt(read("preset_two_stage"), object_info))
    for node in prompt.values():
        if node["class_type"] == "ThriftPreset":
            node["inputs"]["preset"] = "quality" if node["inputs"]["stage"] == "first" else "fast"
        if node["class_type"] == "RandomNoise":
            node["inputs"]["noise_seed"] += 2000
    result = server.queue(prompt)
    latent = load_file(server.output_path(result, LATENT_FILE, "latents"))["latent_tensor"]
    assert latent.shape[2] == 5
    assert sum("keyframes the reference is shifted by" in line for line in lines_of_ours(new_log())) == 1


@pytest.mark.parametrize("name", ["keyframe_stride", "stride_refine_undistilled"])
def test_stride_1_makes_the_full_clip(
    server: Any, object_info: dict[str, Any], ui_graph: Any, name: str
) -> None:
    """As the notes say: set in both nodes."""
    prompt = ui_graph.to_prompt(read(name), object_info)
    for node in prompt.values():
        if node["class_type"] in ("KeyframeStride", "LatentFlowInterpolate"):
            node["inputs"]["stride"] = 1
    assert run(server, prompt).shape[2] == 13


@pytest.mark.parametrize("name", [name for name in TEMPLATES if name.startswith("two_stage")])
def test_two_stages_at_stride_1_are_stock(
    server: Any, object_info: dict[str, Any], ui_graph: Any, name: str, new_log: Any
) -> None:
    """The frames, before they are a video, and the sound: against the graph without either of our nodes."""
    ours = dry(ui_graph.to_prompt(read(name), object_info))
    kinds = {node["class_type"]: key for key, node in ours.items()}
    stride, fill = kinds["KeyframeStride"], kinds["LatentFlowInterpolate"]
    for node in ours.values():
        if node["class_type"] == "PrimitiveInt" and node["inputs"]["value"] != SHORT:
            node["inputs"]["value"] = 1
    stock = copy.deepcopy(ours)
    given = ours[stride]["inputs"]
    without = {(stride, 0): given["model"], (stride, 1): given["latent"], (fill, 1): ["plain decode", 0]}
    for node in stock.values():
        for input_name, value in node["inputs"].items():
            if isinstance(value, list) and tuple(value) in without:
                node["inputs"][input_name] = without[tuple(value)]
    decoded = {"samples": stock[fill]["inputs"]["latent"], "vae": stock[fill]["inputs"]["vae"]}
    stock["plain decode"] = {"class_type": "VAEDecode", "inputs": decoded}
    del stock[stride], stock[fill]

    def frames_and_sound(prompt: dict[str, Any]) -> list[torch.Tensor]:
        images = prompt[kinds["CreateVideo"]]["inputs"]["images"]
        # The codec keeps every value, unlike a picture file.
        encode = {"pixels": images, "vae": ["tiny", 3]}
        kept = {"frames file": ["encoded", 0], "sound file": [last_separated(prompt), 1]}
        saved = {
            key: {
                "class_type": "SaveLatent",
                "inputs": {"samples": samples, "filename_prefix": f"latents/{key}"},
            }
            for key, samples in kept.items()
        }
        prompt = {**prompt, **saved, "encoded": {"class_type": "VAEEncode", "inputs": encode}}
        result = server.queue(prompt)
        return [load_file(server.output_path(result, key, "latents"))["latent_tensor"] for key in kept]

    plain = frames_and_sound(stock)
    assert "FrameThrift:" not in new_log()
    assert plain[0].shape[2] == (SHORT - 1) // 8 + 1 and plain[0].std() > 0.01
    assert all(torch.equal(*pair) for pair in zip(frames_and_sound(ours), plain, strict=True))


@pytest.mark.parametrize(
    ("length", "stride", "full", "strided"),
    [(129, 2, "128", "64"), (121, 2, "120", "60"), (121, 8, "120", "15"), (126, 4, "120", "30"), (65, 1, "64", "64")],
)  # fmt: skip
def test_the_last_image_is_guided_where_the_clip_really_ends(
    server: Any, object_info: dict[str, Any], ui_graph: Any, length: int, stride: int, full: str, strided: str
) -> None:
    """By the numbers that the template's own nodes hand to its guides, half size and full size; never −1."""
    prompt = ui_graph.to_prompt(read("two_stage_first_last_frame"), object_info)
    prompt = {key: node for key, node in prompt.items() if node["class_type"] != "SaveVideo"}
    guides = [node["inputs"] for node in prompt.values() if node["class_type"] == "LTXVAddGuide"]
    first, last, first_again, last_again = guides
    assert first["frame_idx"] == first_again["frame_idx"] == 0
    assert [guide["strength"] for guide in guides] == [0.7, 0.7, 1.0, 1.0]
    for node in prompt.values():
        if node["class_type"] == "PrimitiveInt":
            node["inputs"]["value"] = length if node["inputs"]["value"] == LENGTH else stride
    for key, guide in (("half", last), ("whole", last_again)):
        prompt[key] = {"class_type": "PreviewAny", "inputs": {"source": guide["frame_idx"]}}
    shown = server.queue(prompt).outputs
    assert (shown["half"]["text"], shown["whole"]["text"]) == ([full], [strided])


def test_a_length_that_the_stride_does_not_divide_still_comes_back(
    server: Any, object_info: dict[str, Any], ui_graph: Any, new_log: Any
) -> None:
    prompt = dry(ui_graph.to_prompt(read("two_stage_first_last_frame"), object_info))
    for node in prompt.values():
        if node["class_type"] == "PrimitiveInt" and node["inputs"]["value"] == SHORT:
            node["inputs"]["value"] = SHORT + 8
    result = server.queue(prompt)
    saved = next(key for key, node in prompt.items() if node["class_type"] == "SaveVideo")
    assert frames_in(server.output_path(result, saved)) == SHORT + 8
    assert new_log().count("8 video frames past") == 1


def test_bypassed_node_gives_the_stock_result(
    server: Any, object_info: dict[str, Any], ui_graph: Any, new_log: Any
) -> None:
    graph = read("apply_temporal_window")
    prompt = ui_graph.to_prompt(with_mode(graph, "ApplyTemporalWindow", BYPASSED), object_info)
    kinds = {node["class_type"]: key for key, node in prompt.items()}
    assert "ApplyTemporalWindow" not in kinds
    assert prompt[kinds["CFGGuider"]]["inputs"]["model"] == [kinds["CheckpointLoaderSimple"], 0]
    bypassed = run(server, prompt)
    assert "FrameThrift:" not in new_log()
    windowed = run(server, ui_graph.to_prompt(graph, object_info))
    assert "FrameThrift:" in new_log()
    assert not torch.equal(bypassed, windowed)


def test_muted_node_is_refused_plainly_and_harms_nothing(
    server: Any, driver: Any, object_info: dict[str, Any], ui_graph: Any
) -> None:
    graph = read("apply_temporal_window")
    prompt = ui_graph.to_prompt(with_mode(graph, "ApplyTemporalWindow", MUTED), object_info)
    with pytest.raises(driver.PromptRejected) as caught:
        server.queue(dry(prompt))
    guider = next(key for key, node in prompt.items() if node["class_type"] == "CFGGuider")
    errors = caught.value.node_errors[guider]["errors"]
    assert [(e["type"], e["extra_info"]["input_name"]) for e in errors] == [
        ("required_input_missing", "model")
    ]
    assert torch.isfinite(run(server, ui_graph.to_prompt(graph, object_info))).all()
