"""Pages of help as ComfyUI's frontend shows them: `nox -s browser`."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("playwright.sync_api", reason="Playwright is not here: `nox -s browser`")

REPO = Path(__file__).resolve().parent.parent.parent
ADD = """
(kind) => {
  const node = LiteGraph.createNode(kind);
  node.pos = [300, 300];
  app.graph.add(node);
}
"""
# Where to click on its title, once the node was drawn.
TITLE = """
() => {
  const [node] = app.canvas.visible_nodes ?? [];
  const {scale, offset} = app.canvas.ds, {x, y} = app.canvas.canvas.getBoundingClientRect();
  return node && [x + (node.pos[0] + offset[0] + 60) * scale, y + (node.pos[1] + offset[1] - 12) * scale];
}
"""


@pytest.mark.parametrize("kind", ["ThriftPreset", "KeyframeStride"])
def test_help_is_shown_with_tables_and_links_that_lead_to_the_repository(
    page: Any, server: Any, kind: str
) -> None:
    text = (REPO / "docs" / "docs" / f"{kind}.md").read_text(encoding="utf-8")
    page.goto(server.url)
    page.wait_for_function("window.app?.vueAppReady && app.graph.nodes.length")
    page.evaluate("app.graph.clear()")
    page.evaluate(ADD, kind)
    info = page.get_by_test_id("info-button")
    # A click right after the first drawing selects nothing yet.
    for _ in range(20):
        page.mouse.click(*page.wait_for_function(TITLE).json_value())
        page.wait_for_timeout(500)
        if info.is_visible():
            break
    info.click()
    shown = page.locator(".node-help-content")
    shown.locator("table").first.wait_for()
    assert shown.locator("h1").inner_text() == text.splitlines()[0].removeprefix("# ")
    rows = [line for line in text.splitlines() if line.startswith("|") and not line.startswith("|--")]
    assert shown.locator("tr").count() == len(rows) > 10
    links = [link.get_attribute("href") for link in shown.locator("a").all()]
    assert links == re.findall(r"\]\((https://[^)]+)\)", text) and links
    # Nothing outside this machine is asked.
    page.context.route(f"{links[0].partition('/blob/')[0]}/**", lambda route: route.fulfill(body="there"))
    with page.context.expect_page() as opened:
        shown.locator("a").first.click()
    opened.value.wait_for_load_state()
    assert (opened.value.url, opened.value.inner_text("body")) == (links[0], "there")
    assert page.url.startswith(server.url)
