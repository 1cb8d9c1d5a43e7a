"""The blueprints in the real frontend: found in its node library, dropped on the canvas, connected and queued.

`nox -s browser` runs it; it needs Playwright and a Chromium.
"""

from __future__ import annotations

import time
from typing import Any

import pytest

pytest.importorskip("playwright.sync_api", reason="Playwright is not here: `nox -s browser`")

SAMPLER = "LTX Efficient Sampler"
TEXT, IMAGE = (f"LTX Efficient Two-Stage ({source})" for source in ("Text", "Image"))
LENGTH = 17
# Name, kind and what is set, then who feeds what: from, slot, to, input.
Graph = tuple[dict[str, tuple[str, dict[str, Any]]], list[tuple[str, int, str, str]]]

BUILD = """
([nodes, links]) => {
  const made = {box: app.graph.nodes.find((node) => node.isSubgraphNode())};
  for (const [name, [kind, values]] of Object.entries(nodes)) {
    if (kind) {
      made[name] = LiteGraph.createNode(kind);
      app.graph.add(made[name]);
    }
    for (const [widget, value] of Object.entries(values))
      made[name].widgets.find((entry) => entry.name === widget).value = value;
  }
  for (const [from, slot, to, input] of links) {
    const found = made[to].findInputSlot(input);
    if (found < 0 || !made[from].connect(slot, made[to], found)) throw Error(`${from} -> ${to}.${input}`);
  }
}
"""
OPEN = """
() => {
  const box = app.graph.nodes.find((node) => node.isSubgraphNode());
  app.canvas.openSubgraph(box.subgraph, box);
}
"""


def surroundings(name: str) -> Graph:
    """A small graph around the box, up to a preview of its frames."""
    tiny = {"shape": "ring", "direction": "horizontal", "speed": "medium", "second_shape": "none"}
    nodes: dict[str, tuple[str, dict[str, Any]]] = {
        "tiny": ("ThriftTinyLTX", tiny),
        "preview": ("PreviewImage", {}),
        "sound": ("ThriftOddSound", {"form": "ltx-2.3"}),
    }
    if name == SAMPLER:
        del nodes["sound"]
        nodes |= {
            "text": ("LTXVConditioning", {"frame_rate": 24}),
            "empty": ("EmptyLTXVLatentVideo", {"width": 64, "height": 64, "length": LENGTH}),
            "sigmas": ("LTXVScheduler", {"steps": 4}),
            "euler": ("KSamplerSelect", {"sampler_name": "euler"}),
            "noise": ("RandomNoise", {"noise_seed": 5}),
            "box": ("", {"preset": "quality", "stride": 2, "cfg": 2}),
        }
        links = [
            ("tiny", 1, "text", "positive"), ("tiny", 2, "text", "negative"), ("empty", 0, "sigmas", "latent"),
            ("tiny", 0, "box", "model"), ("text", 0, "box", "positive"), ("text", 1, "box", "negative"),
            ("noise", 0, "box", "noise"), ("euler", 0, "box", "sampler"), ("sigmas", 0, "box", "sigmas"),
            ("empty", 0, "box", "latent"), ("tiny", 3, "box", "vae"), ("box", 1, "preview", "images"),
        ]  # fmt: skip
        return nodes, links
    nodes |= {
        "sound vae": ("ThriftOddSoundVAE", {}),
        "upscaler": ("ThriftOddUpscaler", {"is_temporal": False}),
        "listen": ("PreviewAudio", {}),
        "box": ("", {"preset": "fast", "width": 128, "height": 128, "length": LENGTH, "frame_rate": 24, "seed": 9}),
    }  # fmt: skip
    links = [
        ("sound", 0, "box", "model"), ("sound", 1, "box", "positive"), ("sound", 2, "box", "negative"),
        ("tiny", 3, "box", "vae"), ("sound vae", 0, "box", "audio_vae"), ("upscaler", 0, "box", "upscale_model"),
        ("box", 0, "preview", "images"), ("box", 1, "listen", "audio"),
    ]  # fmt: skip
    if name == IMAGE:
        nodes["picture"] = ("EmptyImage", {"width": 80, "height": 64, "color": 0x4080C0})
        links.append(("picture", 0, "box", "image"))
    return nodes, links


def drop(page: Any, server: Any, name: str) -> None:
    """Opens the frontend, finds the blueprint in the node library, and drags it to the emptied canvas."""
    page.goto(server.url)
    page.wait_for_function("window.app?.vueAppReady && app.graph.nodes.length")
    page.evaluate("app.graph.clear()")
    page.locator("button.node-library-tab-button").click()
    page.get_by_placeholder("Search").first.fill("LTX Efficient")
    page.get_by_role("treeitem").filter(has_text="FrameThrift").wait_for()
    entry = page.get_by_role("treeitem").filter(has_text=name)
    entry.drag_to(page.locator("#graph-canvas"), target_position={"x": 900, "y": 300})
    page.wait_for_function("app.graph.nodes.length === 1")


def wait_for_the_end(server: Any, seen: set[str], seconds: float = 300) -> dict[str, Any]:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        done = [entry for key, entry in server.get("/history").items() if key not in seen]
        if done:
            return done[0]
        time.sleep(0.5)
    raise AssertionError(f"The server finished nothing in {seconds:g} s; was the prompt refused?")


@pytest.mark.parametrize("name", [SAMPLER, TEXT, IMAGE])
def test_blueprint_is_found_dropped_connected_and_run(page: Any, server: Any, name: str) -> None:
    drop(page, server, name)
    shown = page.evaluate(
        "app.graph.nodes.map((node) => [node.title, node.widgets.map((entry) => entry.name)])"
    )
    ((title, knobs),) = shown
    assert title == name
    assert knobs[:3] == (["cfg", "preset", "stride"] if name == SAMPLER else ["preset", "width", "height"])
    nodes, links = surroundings(name)
    page.evaluate(BUILD, [nodes, links])
    before = set(server.get("/history"))
    page.get_by_test_id("queue-button").click()
    run = wait_for_the_end(server, before)
    assert run["status"]["status_str"] == "success", run["status"]
    assert sorted(len(output.get("images", ())) for output in run["outputs"].values())[-1] == LENGTH
    presets = [entry["inputs"]["preset"] for entry in run["prompt"][2].values() if entry["class_type"] == "ThriftPreset"]  # fmt: skip
    assert presets == (["quality"] if name == SAMPLER else ["fast", "fast"])


@pytest.mark.parametrize("name", [SAMPLER, TEXT, IMAGE])
def test_no_inner_nodes_overlap(page: Any, server: Any, frontend: Any, name: str) -> None:
    drop(page, server, name)
    page.evaluate(OPEN)
    places = frontend.places(page)
    assert len(places) > 20
    assert frontend.overlapping(places) == []
