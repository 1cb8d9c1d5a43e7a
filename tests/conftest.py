"""Loads ComfyUI and the pack the way ComfyUI does: by path, under a name that no import statement could use."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

REPO = Path(__file__).resolve().parent.parent


def _load_tree() -> ModuleType:
    spec = importlib.util.spec_from_file_location("comfyui_tree", REPO / "comfyui_tree.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["comfyui_tree"] = module
    spec.loader.exec_module(module)
    return module


_tree = _load_tree()
_tree.use_comfyui()
sys.path.append(str(REPO / "tests" / "support"))


class Pack:
    """The pack's modules by dotted name: `pack("patches.mount").mount`."""

    root = REPO
    module = _tree.load_pack()

    def __call__(self, name: str) -> ModuleType:
        return importlib.import_module(f"{self.module.__name__}.{name}")


@pytest.fixture(scope="session")
def pack() -> Pack:
    return Pack()
