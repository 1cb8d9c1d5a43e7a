"""The workflow templates: offered by the server, and runnable as a person would run them."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

WORKFLOWS = Path(__file__).resolve().parent.parent.parent / "workflows"
TEMPLATES = sorted(path.stem for path in WORKFLOWS.glob("*.json"))
BYPASSED, MUTED = 4, 2
# Stand-ins for what a template loads, by its output slots.
CAPTION = {"shape": "ring", "direction": "horizontal", "speed": "medium", "second_shape": "none"}
STAND_INS: dict[str, dict[int, list[Any]]] = {
    "CheckpointLoaderSimple": {0: ["tiny", 0], 2: ["tiny", 3]},
    "LatentUpscaleModelLoader": {0: ["upscaler", 0]},
    "FrameInterpolationModelLoader": {0: ["interpolator", 0]},
}
WITH_SOUND = {
    "CheckpointLoaderSimple": {0: ["sound", 0], 2: ["tiny", 3]},
    "LTXVEmptyLatentAudio": {0: ["sound", 3]},
    "LTXVAudioVAEDecode": {0: ["silence", 0]},
}
NEW = {
    "tiny": {"class_type": "ThriftTinyLTX", "inputs": CAPTION},
    "upscaler": {"class_type": "ThriftOddUpscaler", "inputs": {}},
    "interpolator": {"class_type": "ThriftOddInterpolator", "inputs": {}},
    "sound": {"class_type": "ThriftOddSound", "inputs": {}},
    "silence": {"class_type": "EmptyAudio", "inputs": {"duration": 4.0, "sample_rate": 44100, "channels": 2}},
}
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
        if kinds[key] == "LTXVScheduler":
            # The freeze needs steps between full ones.
            node["inputs"]["steps"] = 8 if "ScheduleSpatialFreeze" in kinds.values() else 2
        if kinds[key] == "SplitSigmas":
            node["inputs"]["step"] = 1
        small[key] = node
    sampler = [key for key, kind in kinds.items() if kind.startswith("SamplerCustom")][-1]
    latent: list[Any] = [sampler, 0]
    if has_sound:
        latent = [next(key for key, kind in kinds.items() if kind == "LTXVSeparateAVLatent"), 0]
    inputs = {"samples": latent, "filename_prefix": "latents/template"}
    return {**small, "latent file": {"class_type": "SaveLatent", "inputs": inputs}}


def run(server: Any, prompt: dict[str, Any]) -> torch.Tensor:
    result = server.queue(dry(prompt))
    videos = [key for key, node in prompt.items() if node["class_type"] == "SaveVideo"]
    assert all(server.output_path(result, key).stat().st_size > 0 for key in videos)
    return load_file(server.output_path(result, "latent file", "latents"))["latent_tensor"]


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
    lines = [line for line in new_log().splitlines() if "FrameThrift:" in line]
    # The server runs on a CPU.
    lines = [line for line in lines if "finds no temperature sensor for cpu" not in line]
    assert "taken" in lines[0] and all("taken" in line or "not needed" in line for line in lines)


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
