"""Fixtures of the in-process tests."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from typing import Any

import pytest


@pytest.fixture(scope="session")
def windowed(pack) -> Callable[..., Any]:
    """`windowed(model, window=1, ...)`: the model as the node returns it."""
    node = pack("nodes").ApplyTemporalWindow
    defaults = {"window": 1, "sink_frames": 0, "start_percent": 0.0, "end_percent": 1.0, "dense_blocks": 0}
    return lambda model, **settings: node.execute(model, **{**defaults, **settings}).args[0]


@pytest.fixture(scope="session")
def last_run(pack) -> Callable[[Any], dict[str, Any]]:
    """`last_run(model)`: the window's part of the last record in the journal."""
    journal_of = pack("patches.mount").journal_of
    return lambda model: journal_of(model).records()[-1]["techniques"]["temporal window"]


@pytest.fixture(scope="session")
def frozen(pack) -> Callable[..., Any]:
    """`frozen(model, scope=...)`: the model as ScheduleSpatialFreeze returns it."""
    node = pack("nodes").ScheduleSpatialFreeze
    defaults = {"start_percent": 0.0, "end_percent": 1.0, "refresh_every": 3, "scope": "whole blocks"}
    return lambda model, **settings: node.execute(model, **{**defaults, **settings}).args[0]


@pytest.fixture(scope="session")
def record(pack) -> Callable[[Any], dict[str, Any]]:
    """`record(model)`: the freeze's part of the last record in the journal."""
    journal_of = pack("patches.mount").journal_of
    return lambda model: journal_of(model).records()[-1]["techniques"]["spatial freeze"]


@pytest.fixture(scope="session")
def stride(pack) -> Callable[..., Any]:
    """KeyframeStride's outputs."""
    return pack("nodes.keyframe_stride").KeyframeStride.execute


@pytest.fixture(scope="session")
def interpolate(pack) -> Callable[..., Any]:
    """LatentFlowInterpolate's outputs."""
    return pack("nodes.latent_flow_interpolate").LatentFlowInterpolate.execute


@pytest.fixture(scope="module")
def tiny():
    """Imports a module of the test model."""
    sys.modules["comfyui_tree"].load_tiny()
    return lambda name: importlib.import_module(f"tiny_ltx.{name}")
