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
            node["inputs"]["steps"] = 8 if "ScheduleSpatialFreeze" in kinds.values() else 2
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


def run(server: Any, prompt: dict[str, Any]) -> torch.Tensor:
    result = server.queue(dry(prompt))
    videos = [key for key, node in prompt.items() if node["class_type"] == "SaveVideo"]
    assert all(server.output_path(result, key).stat().st_size > 0 for key in videos)
    if is_two_stage(prompt):
        with av.open(str(server.output_path(result, videos[0]))) as video:
            assert sum(1 for _ in video.decode(video=0)) == SHORT
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
    if is_two_stage(prompt):
        assert latent.shape[2:] == (3, 4, 4), "every second of five latent frames, at twice the size"
    lines = [line for line in new_log().splitlines() if "FrameThrift:" in line]
    # The server runs on a CPU.
    lines = [line for line in lines if "finds no temperature sensor for cpu" not in line]
    if is_two_stage(prompt):
        # Half of 24 or 25: the note asks for the comparison that this line asks for.
        assert sum("compare one clip of the same seed" in line for line in lines) == 1
        lines = [line for line in lines if "compare one clip of the same seed" not in line]
    assert "taken" in lines[0] and all("taken" in line or "not needed" in line for line in lines)


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
