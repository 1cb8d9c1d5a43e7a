"""ComfyUI's real frontend in Chromium, and a workflow template opened in it. Needs Playwright: `nox -s browser`."""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

CHROMES = ("chromium", "chromium-browser", "google-chrome")
PACK = "frame-thrift"
# Title, x, y, width, height.
Place = tuple[str, float, float, float, float]
# They are known once a node was drawn.
PLACES = """
() => {
  const {nodes, inputNode, outputNode} = app.canvas.graph;
  const drawn = [...nodes, inputNode, outputNode].filter(Boolean);
  const places = drawn.map((node) => [node.title, ...node.boundingRect]);
  return places.every((place) => place[3] > 0) && places;
}
"""


@contextmanager
def chromium(server: Any) -> Iterator[Any]:
    """A browser for a running ComfyServer: that of this machine, or the one that Playwright has fetched."""
    from playwright.sync_api import sync_playwright

    # Else a first visit opens the templates, and the panel of the last one stands open.
    settings = {"Comfy.TutorialCompleted": True, "Comfy.RightSidePanel.IsOpen": False}
    server.request("POST", "/settings", settings)
    found = next(filter(None, map(shutil.which, CHROMES)), None)
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=found, args=["--no-sandbox", "--no-proxy-server"])
        yield browser
        browser.close()


def open_template(page: Any, server: Any, name: str) -> None:
    """As a link to a template does; the frontend replaces its own first graph by it."""
    page.goto(f"{server.url}/?template={name}&source={PACK}")
    page.wait_for_function(
        "name => window.app?.vueAppReady && app.extensionManager.workflow.activeWorkflow?.filename === name && "
        "app.graph.nodes.length",
        arg=name,
    )


def places(page: Any) -> list[Place]:
    """Of all nodes of the graph that is shown, and of the ends of a subgraph."""
    return [tuple(place) for place in page.wait_for_function(PLACES).json_value()]


def overlapping(nodes: list[Place]) -> list[tuple[Place, Place]]:
    return [pair for pair in itertools.combinations(nodes, 2) if _meet(*pair)]


def _meet(one: Place, two: Place) -> bool:
    (x, y, width, height), (u, v, other_width, other_height) = one[1:], two[1:]
    return x < u + other_width and u < x + width and y < v + other_height and v < y + height
