"""The workflow templates in the real frontend: each opens, whole, and no node lies on another.

`nox -s browser` runs it; it needs Playwright and a Chromium.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("playwright.sync_api", reason="Playwright is not here: `nox -s browser`")

WORKFLOWS = Path(__file__).resolve().parent.parent.parent / "workflows"
TEMPLATES = sorted(path.stem for path in WORKFLOWS.glob("*.json"))
SHOWN = """
() => app.graph.nodes.map((node) => ({
  id: Number(node.id),
  type: node.type,
  values: (node.widgets ?? []).map((widget) => widget.value),
  fed: Object.fromEntries(
    node.inputs.filter((input) => input.link != null).map((input) => {
      const link = app.graph.getLink(input.link);
      return [input.name, [Number(link.origin_id), link.origin_slot]];
    })
  ),
  known: node.type in LiteGraph.registered_node_types,
}))
"""


@pytest.mark.parametrize("name", TEMPLATES)
def test_template_opens_whole(page: Any, server: Any, frontend: Any, name: str) -> None:
    graph = json.loads((WORKFLOWS / f"{name}.json").read_text(encoding="utf-8"))
    source = {link[0]: link[1:3] for link in graph["links"]}
    frontend.open_template(page, server, name)
    assert frontend.overlapping(frontend.places(page)) == []
    shown = {node["id"]: node for node in page.evaluate(SHOWN)}
    assert shown.keys() == {node["id"] for node in graph["nodes"]}
    for node in graph["nodes"]:
        own = shown[node["id"]]
        assert own["known"] and own["type"] == node["type"]
        wired = {
            entry["name"]: source[entry["link"]] for entry in node["inputs"] if entry["link"] is not None
        }
        assert own["fed"] == wired, node["type"]
        values = node.get("widgets_values") or []
        assert own["values"][: len(values)] == values, node["type"]
