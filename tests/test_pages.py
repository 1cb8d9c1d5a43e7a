"""README and docs are what benchmarks/pages/ and the JSONs beside it make of them, and say what the figures say."""

from __future__ import annotations

import importlib
import json
import re
import sys

import pytest


@pytest.fixture(scope="module")
def render(pack):
    sys.path.append(str(pack.root / "benchmarks"))
    yield importlib.import_module("render")
    sys.path.remove(str(pack.root / "benchmarks"))


@pytest.fixture(scope="module")
def pages(render):
    return render.pages()


def test_pages_are_rendered(pack, pages):
    for name, text in pages.items():
        assert (pack.root / name).read_text(encoding="utf-8") == text, f"{name}: run nox -s docs"
    here = {path.relative_to(pack.root).as_posix() for path in (pack.root / "docs").rglob("*.md")}
    assert here <= pages.keys()


def test_every_node_has_its_page_of_help(pack, pages):
    ids = {node.GET_SCHEMA().node_id for node in pack("nodes").NODES}
    assert {f"docs/docs/{name}.md" for name in ids} <= pages.keys()
    assert pack.module.WEB_DIRECTORY == "docs"
    assert not [path for path in (pack.root / "docs").rglob("*") if path.suffix not in (".md", ".png", "")]


def test_the_readme_is_short(pages):
    assert pages["README.md"].count("\n") <= 150


def test_links_lead_somewhere(pack, pages):
    for name, text in pages.items():
        for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", text):
            if not target.startswith("http"):
                assert ((pack.root / name).parent / target).exists(), f"{name}: {target}"


def scaled(found, by):
    if isinstance(found, dict):
        return {key: scaled(value, by) for key, value in found.items()}
    if isinstance(found, list):
        return [scaled(value, by) for value in found]
    return found * by if isinstance(found, float) else found


def told(render, monkeypatch, by):
    """The pages as they would be with all figures of all JSONs multiplied by some factor; of one that fails the error."""

    def content(name):
        return scaled(json.loads((render.HERE / f"{name}.json").read_text(encoding="utf-8")), by)

    monkeypatch.setattr(render, "content", content)
    render.group.cache_clear()
    templates = render.environment()
    out = {}
    for path in render.PAGES.rglob("*.md"):
        name = path.relative_to(render.PAGES).as_posix()
        try:
            out[name] = templates.get_template(name).render()
        except (LookupError, ValueError) as error:
            out[name] = str(error)
    return out


def test_no_figure_is_typed(pages, render, monkeypatch):
    """Other figures make another page, or one whose claims no longer hold."""
    try:
        assert told(render, monkeypatch, 1.0) == pages
        others = told(render, monkeypatch, 1.3)
        quoting = [name for name in pages if "{{" in (render.PAGES / name).read_text(encoding="utf-8")]
        assert len(quoting) > 5 and all(others[name] != pages[name] for name in quoting)
    finally:
        render.group.cache_clear()


def test_a_false_claim_does_not_pass(render):
    with pytest.raises(ValueError, match="claims what the figures do not say"):
        render.environment().from_string("{{ claim(1 > 2) }}").render()
    assert render.environment().from_string("{{ claim(2 > 1) }}x").render() == "x"


def test_a_row_that_is_not_there_is_named(render):
    with pytest.raises(LookupError, match="no row 'stride 9' of teacher"):
        render.quality("teacher", 13, "stride 9")
    with pytest.raises(LookupError, match="found 0"):
        render.find("pacing", row="none")
    with pytest.raises(LookupError, match="no row 'none'"):
        render.table("pacing", ["none"])
