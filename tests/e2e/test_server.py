"""The pack in a real ComfyUI server, over its HTTP and WebSocket API."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

import av
import pytest
import torch
from safetensors.torch import load_file

NARROW = {"window": 1, "sink_frames": 1, "start_percent": 0.0, "end_percent": 1.0, "dense_blocks": 0}
# 8 latent frames of 4 × 4 tokens: a window of 1 leaves most of them out.
SMALL = {"frames": 57, "size": 128, "steps": 2}
LATENT = "latent file"


def keep_latent(graph: dict[str, Any], graphs: Any) -> dict[str, Any]:
    """The graph with its sampled latent saved, which unlike a video can be compared bit for bit."""
    inputs = {"samples": [graphs.SAMPLER, 0], "filename_prefix": "latents/test"}
    return {**graph, LATENT: {"class_type": "SaveLatent", "inputs": inputs}}


def latent_of(server: Any, result: Any) -> torch.Tensor:
    return load_file(server.output_path(result, LATENT, "latents"))["latent_tensor"]


def test_object_info_shows_every_input_with_tooltip_and_range(object_info: dict[str, Any]) -> None:
    info = object_info["ApplyTemporalWindow"]
    assert info["category"] == "FrameThrift"
    assert info["output"] == ["MODEL"]
    inputs = info["input"]["required"]
    assert list(inputs) == ["model", "window", "sink_frames", "start_percent", "end_percent", "dense_blocks"]
    assert all(len(options["tooltip"]) > 20 for _, options in inputs.values())
    ranges = {name: (kind, o["min"], o["max"]) for name, (kind, o) in inputs.items() if name != "model"}
    assert ranges == {
        "window": ("INT", 1, 32),
        "sink_frames": ("INT", 0, 8),
        "start_percent": ("FLOAT", 0.0, 1.0),
        "end_percent": ("FLOAT", 0.0, 1.0),
        "dense_blocks": ("INT", 0, 16),
    }
    assert all(o["min"] <= o["default"] <= o["max"] for name, (_, o) in inputs.items() if name != "model")
    assert inputs["dense_blocks"][1]["advanced"] is True


def test_every_node_has_help(server: Any, object_info: dict[str, Any]) -> None:
    """Where the frontend looks for it: in the web folder of the pack that the node is of."""
    ours = {name: info for name, info in object_info.items() if info["category"] == "FrameThrift"}
    assert len(ours) >= 9
    for name, info in ours.items():
        folder = info["python_module"].removeprefix("custom_nodes.")
        status, page = server.request("GET", f"/extensions/{folder}/docs/{name}.md")
        assert status == 200 and page.decode().startswith(f"# {info['display_name']}\n"), name


def test_graph_runs_and_the_log_says_what_the_window_did(server: Any, graphs: Any, new_log: Any) -> None:
    steps = []
    graph = graphs.build_graph(NARROW, seed=11, **SMALL)
    result = server.queue(graph, lambda node, done, total: steps.append((node, done, total)))
    with av.open(str(server.output_path(result, graphs.VIDEO))) as video:
        assert sum(1 for _ in video.decode(video=0)) == SMALL["frames"]
    assert (graphs.SAMPLER, 2, 2) in steps
    lines = [line for line in new_log().splitlines() if "FrameThrift:" in line]
    assert len(lines) == 1
    assert "steps 1–2 of 2" in lines[0]
    assert "taken, declined: none" in lines[0]


def test_window_changes_the_picture_and_a_wide_one_does_not(server: Any, graphs: Any) -> None:
    def sample(window: dict[str, Any] | None) -> torch.Tensor:
        graph = keep_latent(graphs.build_graph(window, seed=12, **SMALL), graphs)
        return latent_of(server, server.queue(graph))

    stock = sample(None)
    assert torch.isfinite(stock).all()
    assert not torch.equal(sample(NARROW), stock)
    assert torch.equal(sample({**NARROW, "window": 4}), stock)


def test_second_queueing_takes_from_the_cache_what_did_not_change(server: Any, graphs: Any) -> None:
    def sample(seed: int) -> tuple[frozenset[str], torch.Tensor]:
        result = server.queue(keep_latent(graphs.build_graph(NARROW, seed=seed, **SMALL), graphs))
        return result.cached, latent_of(server, result)

    _, first = sample(13)
    cached, again = sample(13)
    assert {graphs.WINDOW, graphs.SAMPLER} <= cached
    assert torch.equal(again, first)
    cached, other = sample(14)
    assert graphs.WINDOW in cached and graphs.SAMPLER not in cached
    assert not torch.equal(other, first)
    _, back = sample(13)
    assert torch.equal(back, first)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("window", 0),
        ("window", 33),
        ("sink_frames", -1),
        ("sink_frames", 9),
        ("start_percent", -0.1),
        ("start_percent", 1.5),
        ("end_percent", 1.5),
        ("dense_blocks", 17),
    ],
)
def test_out_of_range_value_is_rejected_by_name(
    server: Any, driver: Any, graphs: Any, name: str, value: float
) -> None:
    with pytest.raises(driver.PromptRejected) as caught:
        server.queue(graphs.build_graph({**NARROW, name: value}, **SMALL))
    assert caught.value.status == 400
    errors = caught.value.node_errors[graphs.WINDOW]["errors"]
    assert [error["extra_info"]["input_name"] for error in errors] == [name]


def test_interrupt_leaves_a_healthy_server(server: Any, driver: Any, graphs: Any) -> None:
    asked = []

    def stop(node: str, done: int, total: int) -> None:
        if node == graphs.SAMPLER and done >= 2 and not asked:
            asked.append(done)
            server.interrupt()

    before = latent_of(
        server, server.queue(keep_latent(graphs.build_graph(NARROW, seed=15, **SMALL), graphs))
    )
    with pytest.raises(driver.ExecutionInterrupted):
        server.queue(graphs.build_graph(NARROW, seed=16, **{**SMALL, "steps": 200}), stop)
    assert asked and asked[0] < 100
    # Another graph in between, so that the repetition is computed and not taken from the cache.
    server.queue(graphs.build_graph(None, seed=17, **SMALL))
    changed = graphs.build_graph({**NARROW, "sink_frames": 2}, seed=15, **SMALL)
    server.queue(keep_latent(changed, graphs))
    again = server.queue(keep_latent(graphs.build_graph(NARROW, seed=15, **SMALL), graphs))
    assert torch.equal(latent_of(server, again), before)


def with_pace(graphs: Any, **settings: Any) -> dict[str, Any]:
    graph = graphs.build_graph(None, seed=18, **{**SMALL, "steps": 100})
    inputs = {"model": ["tiny", 0], "resume_below": 5, "max_pause": 60.0, **settings}
    graph["pace"] = {"class_type": "ThriftPaceGPU", "inputs": inputs}
    graph["guider"]["inputs"]["model"] = ["pace", 0]
    return graph


def test_cancel_ends_a_pause_at_once(server: Any, driver: Any, graphs: Any, new_log: Any) -> None:
    """Nine tenths of the time it pauses."""
    asked: list[float] = []

    def cancel() -> None:
        asked.append(time.perf_counter())
        server.interrupt()

    def begin(node: str, done: int, total: int) -> None:
        if node == graphs.SAMPLER and done == 1:
            threading.Timer(3.0, cancel).start()

    with pytest.raises(driver.ExecutionInterrupted):
        server.queue(with_pace(graphs, target_temperature=75, max_duty=0.1), begin)
    # 0.2 s, and what a busy server takes to say so; a pause is two seconds long or more.
    assert time.perf_counter() - asked[0] < 1.0
    assert new_log().count("GPU pacing finds no temperature sensor for cpu; only max_duty paces.") == 1


def test_unknown_model_runs_unharmed_and_the_log_says_why(server: Any, new_log: Any) -> None:
    def sample(window: dict[str, Any] | None) -> torch.Tensor:
        inputs = {"seed": 3, "steps": 2, "cfg": 2.0, "sampler_name": "euler", "scheduler": "simple"}
        graph: dict[str, Any] = {
            "odd": {"class_type": "ThriftOddModel", "inputs": {}},
            "empty": {
                "class_type": "EmptyLatentImage",
                "inputs": {"width": 64, "height": 64, "batch_size": 1},
            },
            "sample": {
                "class_type": "KSampler",
                "inputs": {
                    **inputs,
                    "denoise": 1.0,
                    "model": ["odd", 0],
                    "positive": ["odd", 1],
                    "negative": ["odd", 1],
                    "latent_image": ["empty", 0],
                },
            },
            LATENT: {
                "class_type": "SaveLatent",
                "inputs": {"samples": ["sample", 0], "filename_prefix": "odd"},
            },
        }
        if window is not None:
            graph["window"] = {"class_type": "ApplyTemporalWindow", "inputs": {"model": ["odd", 0], **window}}
            graph["sample"]["inputs"]["model"] = ["window", 0]
        return latent_of(server, server.queue(graph))

    stock = sample(None)
    assert torch.isfinite(stock).all() and stock.std() > 0
    assert "FrameThrift:" not in new_log()
    assert torch.equal(sample(NARROW), stock)
    lines = [line for line in new_log().splitlines() if "FrameThrift:" in line]
    assert len(lines) == 1
    assert "declined" in lines[0] and "UNKNOWN_MODEL" in lines[0]


NODES = {
    "KeyframeStride": (
        ["MODEL", "LATENT", "FLOAT", "IMAGE"],
        ["model", "latent", "stride", "frame_rate", "vae"],
        set(),
    ),
    "LatentFlowInterpolate": (
        ["LATENT", "IMAGE"],
        ["latent", "method", "vae", "optical_flow", "encode", "stride", "length", "reference"],
        {"stride", "length"},
    ),
    "ScheduleSpatialFreeze": (
        ["MODEL"],
        [
            *("model", "start_percent", "end_percent", "refresh_every", "scope"),
            *("forecast", "blocks_kept", "cache_device", "cache_limit_gb", "cache_dtype"),
        ],
        {"forecast", "blocks_kept", "cache_device", "cache_limit_gb", "cache_dtype"},
    ),
    "ThriftLoadOpticalFlow": (["OPTICAL_FLOW"], ["model_name"], set()),
    "ThriftPaceGPU": (
        ["MODEL"],
        ["model", "target_temperature", "resume_below", "max_duty", "max_pause"],
        set(),
    ),
    "ThriftThinGuide": (["IMAGE"], ["image", "stride"], set()),
}


@pytest.mark.parametrize("name", NODES)
def test_object_info_of_the_other_nodes(object_info: dict[str, Any], name: str) -> None:
    outputs, names, advanced = NODES[name]
    info = object_info[name]
    assert info["category"] == "FrameThrift" and info["output"] == outputs and len(info["description"]) > 80
    inputs = {**info["input"]["required"], **info["input"].get("optional", {})}
    assert sorted(inputs) == sorted(names)
    for key, (kind, options) in inputs.items():
        assert len(options["tooltip"]) > 20, key
        assert bool(options.get("advanced")) == (key in advanced), key
        if kind in ("INT", "FLOAT"):
            assert options["min"] <= options["default"] <= options["max"], key


def with_stride(graphs: Any, stride: dict[str, Any], fill: dict[str, Any]) -> dict[str, Any]:
    """The graph with KeyframeStride before the sampler and LatentFlowInterpolate behind it."""
    graph = graphs.build_graph(None, **SMALL)
    sampler = graph[graphs.SAMPLER]["inputs"]
    guider = graph[sampler["guider"][0]]["inputs"]
    node = {"model": guider["model"], "latent": sampler["latent_image"], **stride}
    graph["stride"] = {"class_type": "KeyframeStride", "inputs": node}
    guider["model"], sampler["latent_image"] = ["stride", 0], ["stride", 1]
    decode = next(key for key, node in graph.items() if node["class_type"] == "VAEDecode")
    inputs = {"latent": [graphs.SAMPLER, 0], "vae": graph[decode]["inputs"]["vae"], **fill}
    graph["fill"] = {"class_type": "LatentFlowInterpolate", "inputs": inputs}
    graph[decode]["inputs"]["samples"] = ["fill", 0]
    return graph


def test_a_strided_clip_comes_back_at_its_length(server: Any, graphs: Any, new_log: Any) -> None:
    progress = []
    graph = with_stride(graphs, {"stride": 2, "frame_rate": 24.0}, {"method": "motion"})
    result = server.queue(graph, lambda node, done, total: progress.append((node, done, total)))
    with av.open(str(server.output_path(result, graphs.VIDEO))) as video:
        assert sum(1 for _ in video.decode(video=0)) == SMALL["frames"]
    assert ("fill", SMALL["frames"], SMALL["frames"]) in progress
    lines = [line for line in new_log().splitlines() if "FrameThrift:" in line]
    assert any("12 frames a second" in line for line in lines) and any("taken" in line for line in lines)


@pytest.mark.parametrize(
    ("stride", "fill", "node", "name"),
    [
        ({"stride": 9}, {"method": "motion"}, "stride", "stride"),
        ({"stride": 2, "frame_rate": -1.0}, {"method": "motion"}, "stride", "frame_rate"),
        ({"stride": 2}, {"method": "slerp"}, "fill", "method"),
        ({"stride": 2}, {"method": "motion", "stride": 9}, "fill", "stride"),
    ],
)
def test_what_a_stride_cannot_be_is_rejected_by_name(
    server: Any, driver: Any, graphs: Any, stride: Any, fill: Any, node: str, name: str
) -> None:
    with pytest.raises(driver.PromptRejected) as caught:
        server.queue(with_stride(graphs, stride, fill))
    errors = caught.value.node_errors[node]["errors"]
    assert [error["extra_info"]["input_name"] for error in errors] == [name]


@pytest.mark.parametrize(
    ("fill", "words"),
    [
        ({"method": "optical_flow"}, "Load Optical Flow Model"),
        ({"method": "motion", "encode": False}, "turn encode on"),
        ({"method": "motion", "length": 97}, "set length between"),
    ],
)
def test_what_is_missing_reaches_the_user_in_words(
    server: Any, driver: Any, graphs: Any, fill: Any, words: str
) -> None:
    with pytest.raises(driver.ExecutionFailed, match=words):
        server.queue(with_stride(graphs, {"stride": 2}, fill))


def test_pack_that_does_not_import_is_said_plainly_and_leaves_no_server(
    driver: Any, server: Any, tmp_path: Path
) -> None:
    (tmp_path / "__init__.py").write_text("raise ValueError('broken on purpose')\n")
    broken = driver.ComfyServer(server.tree, {"broken": tmp_path})
    with pytest.raises(driver.ServerFailed, match="(?s)could not import a pack.*broken on purpose"):
        broken.__enter__()
    assert broken.process.poll() is not None
    assert not broken.base.exists()
