"""Makes the scripts importable."""

from __future__ import annotations

import importlib
import sys

import pytest


@pytest.fixture(scope="module")
def bench(pack):
    """Imports a module of benchmarks/."""
    sys.modules["comfyui_tree"].load_tiny()
    sys.path.append(str(pack.root / "benchmarks"))
    yield importlib.import_module
    sys.path.remove(str(pack.root / "benchmarks"))
