"""One real ComfyUI server for all end-to-end tests, with this pack, the tiny model and an odd model in it."""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

REPO = Path(__file__).resolve().parent.parent.parent


def _load(path: Path) -> ModuleType:
    name = f"frame_thrift_{path.stem}"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, path)
        assert spec is not None and spec.loader is not None
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


@pytest.fixture(scope="session")
def driver() -> ModuleType:
    """comfy_server.py: the server and its exceptions."""
    return _load(REPO / "comfy_server.py")


@pytest.fixture(scope="session")
def graphs() -> ModuleType:
    """one_stage.py: the tiny model's graph."""
    return _load(Path(__file__).parent / "one_stage.py")


@pytest.fixture(scope="session")
def ui_graph() -> ModuleType:
    """ui_graph.py: from the frontend's file format to the API's."""
    return _load(Path(__file__).parent / "ui_graph.py")


@pytest.fixture(scope="session")
def server(driver: ModuleType) -> Iterator[Any]:
    tree = _load(REPO / "comfyui_tree.py")
    packs = {
        "frame-thrift": REPO,
        "tiny_ltx": REPO / "tiny_ltx",
        "odd_model": Path(__file__).parent / "odd_model",
    }
    release = os.environ.get("FRAMETHRIFT_COMFYUI") or None
    with driver.ComfyServer(tree.find_comfyui(release), packs) as running:
        yield running


@pytest.fixture(scope="session")
def frontend() -> ModuleType:
    """comfy_frontend.py: what a browser does, and where it shows nodes."""
    return _load(REPO / "comfy_frontend.py")


@pytest.fixture(scope="session")
def browser(frontend: ModuleType, server: Any) -> Iterator[Any]:
    with frontend.chromium(server) as running:
        yield running


@pytest.fixture
def page(browser: Any) -> Iterator[Any]:
    """A visitor of whom the frontend remembers nothing, so that it opens its default graph."""
    page = browser.new_page(viewport={"width": 1800, "height": 1000})
    yield page
    page.context.close()


@pytest.fixture(scope="session")
def object_info(server: Any) -> dict[str, Any]:
    return server.object_info()


@pytest.fixture
def new_log(server: Any) -> Callable[[], str]:
    """What the server has logged since the test began."""
    before = len(server.log_text())
    return lambda: server.log_text()[before:]
