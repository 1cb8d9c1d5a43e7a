"""The stand-ins of the lab, as a technique meets them that has taken its kernel by name."""

from __future__ import annotations

import importlib
import sys
from types import ModuleType

import torch

NAMES = ("attend_routed", "pack_tokens", "why_not")


def test_routed_attention_is_the_reference_in_small_blocks_and_only_inside(bench, pack, monkeypatch):
    name, kernel = pack.module.__name__, pack("patches.kernels.routed")
    technique = ModuleType(f"{name}.patches.techniques.low_rank")
    technique.__dict__.update({each: getattr(kernel, each) for each in NAMES})
    monkeypatch.setitem(sys.modules, technique.__name__, technique)
    assert importlib.import_module(technique.__name__) is technique
    tokens = pack("patches.kernels.tokens").VideoTokens.grid(5, 4, 4)
    x = torch.randn(2, tokens.total, 8)
    assert technique.why_not(x.device, x.dtype, 4) == "HEAD_WIDTH"
    with bench("lab").small_blocks(name):
        assert technique.why_not(x.device, x.dtype, 4) is None
        packing = technique.pack_tokens(tokens, 4, 4, 1)
        out = technique.attend_routed(x, x, x, 2, None, packing, 0.2, 1.0, 0)
    assert packing.block == 16
    assert torch.equal(out, kernel.attend_reference(x, x, x, 2, None, packing, 0.2, 1.0))
    assert [getattr(technique, each) for each in NAMES] == [getattr(kernel, each) for each in NAMES]
