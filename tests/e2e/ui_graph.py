"""Turns a graph as the frontend saves it into a prompt as the frontend sends it."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

MUTED, BYPASSED = 2, 4
# What a subgraph's links name as the origin of its inputs.
INPUTS, OUTPUTS = -10, -20
WIDGET_TYPES = {"INT", "FLOAT", "STRING", "BOOLEAN", "COMBO", "COMFY_DYNAMICCOMBO_V3"}


def to_prompt(graph: dict[str, Any], object_info: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The API prompt of a litegraph graph (version 0.4): no notes, no muted nodes, bypassed ones wired through."""
    nodes = {node["id"]: node for node in graph["nodes"]}
    links = {link[0]: (link[1], link[2]) for link in graph["links"]}
    prompt = {}
    for node in graph["nodes"]:
        kind = node["type"]
        if kind not in object_info or node.get("mode") in (MUTED, BYPASSED):
            continue
        inputs = dict(_widgets(object_info[kind], list(node.get("widgets_values") or [])))
        for entry in node["inputs"]:
            source = _source(entry.get("link"), nodes, links)
            if source is not None:
                inputs[entry["name"]] = [str(source[0]), source[1]]
        prompt[str(node["id"])] = {"class_type": kind, "inputs": inputs}
    return prompt


def box_to_prompt(
    blueprint: dict[str, Any], object_info: dict[str, Any], given: dict[str, Any]
) -> tuple[dict[str, dict[str, Any]], dict[str, list[Any]]]:
    """The API prompt of a blueprint's inner nodes, and where each of its outputs comes from.

    given: values or links by the names of its inputs. A knob that is left out keeps its value; a socket does not.
    """
    box = copy.deepcopy(blueprint["definitions"]["subgraphs"][0])
    names = {
        link["id"]: box["inputs"][link["origin_slot"]]["name"]
        for link in box["links"]
        if link["origin_id"] == INPUTS
    }
    outside = []
    for node in box["nodes"]:
        for entry in node["inputs"]:
            if entry["link"] in names:
                outside.append((node["id"], entry["name"], names[entry["link"]], "widget" in entry))
                entry["link"] = None
    fields = ("id", "origin_id", "origin_slot", "target_id", "target_slot", "type")
    inner = {"nodes": box["nodes"], "links": [[link[field] for field in fields] for link in box["links"]]}
    prompt = to_prompt(inner, object_info)
    for node, entry, name, is_knob in outside:
        if name in given or not is_knob:
            prompt[str(node)]["inputs"][entry] = given[name]
    made = {
        box["outputs"][link["target_slot"]]["name"]: [str(link["origin_id"]), link["origin_slot"]]
        for link in box["links"]
        if link["target_id"] == OUTPUTS
    }
    return prompt, made


def _source(
    link: int | None, nodes: dict[int, dict[str, Any]], links: dict[int, tuple[int, int]]
) -> tuple[int, int] | None:
    """The node and slot that feed a link, behind bypassed nodes; None behind a muted one."""
    while link is not None:
        origin, slot = links[link]
        node = nodes[origin]
        mode = node.get("mode")
        if mode == MUTED:
            return None
        if mode != BYPASSED:
            return origin, slot
        kind = node["outputs"][slot]["type"]
        link = next((entry.get("link") for entry in node["inputs"] if entry["type"] == kind), None)
    return None


def _widgets(info: dict[str, Any], values: list[Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Name and value of each widget, in the order in which the frontend stores the values; eats `values`."""
    specs = info.get("input", info)
    for group in ("required", "optional"):
        for name, spec in specs.get(group, {}).items():
            kind, options = spec[0], spec[1] if len(spec) > 1 else {}
            is_widget = isinstance(kind, list) or kind in WIDGET_TYPES or "widgetType" in options
            if not is_widget or options.get("forceInput") or not values:
                continue
            value = values.pop(0)
            yield prefix + name, value
            if options.get("control_after_generate"):
                values.pop(0)
            if kind == "COMFY_DYNAMICCOMBO_V3":
                chosen = next(option for option in options["options"] if option["key"] == value)
                yield from _widgets(chosen["inputs"], values, f"{prefix}{name}.")
