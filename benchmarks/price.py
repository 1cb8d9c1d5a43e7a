"""FLOPs of one forward at LTX-2 size, counted through the nodes on the meta device."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import ltx2
import torch
from sampling import patch
from torch.utils.flop_counter import FlopCounterMode

Nodes = Sequence[tuple[str, dict[str, Any]]]


def count(model: Any, clip: ltx2.Clip) -> tuple[float, float]:
    """(all, attention) FLOPs of one forward."""
    latent = ltx2.noise(clip, "meta").unbind()
    packed = torch.cat([part.flatten(1) for part in latent], dim=1)[:, None]
    options = {
        **model.model_options.get("transformer_options", {}),
        "wrappers": model.wrappers,
        "sigmas": torch.ones(1),
    }
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.model.apply_model(
            packed,
            torch.ones(1, device="meta"),
            c_crossattn=torch.empty(1, ltx2.TEXT_TOKENS, 2 * 3840, device="meta"),
            transformer_options=options,
            frame_rate=24.0,
            latent_shapes=[part.shape for part in latent],
        )
    by_op = counter.get_flop_counts()["Global"]
    # On the meta device attention falls apart into batched products, and nothing else in the model uses those.
    attention = by_op[torch.ops.aten.bmm]
    return counter.get_total_flops(), attention


class PriceList:
    """Counts forwards and remembers them in `known`: clip name, then the nodes that act, to FLOPs.

    Blocks at the edges cost something else than blocks in the middle, so the model is as deep as the tiny one,
    and its blocks count `ltx2.BLOCKS` / `blocks` times: one dense block of 8 stands for 6 of 48.
    """

    def __init__(self, pack: str, blocks: int, known: dict[str, dict[str, float]]) -> None:
        self.pack, self.blocks, self.known = pack, blocks, known
        self.models: dict[int, Any] = {}

    def forward(self, clip: ltx2.Clip, nodes: Nodes) -> float:
        """FLOPs of one forward in which all of `nodes` act, whatever part of the schedule they are set to."""
        acting = [(name, {**inputs, "start_percent": 0.0, "end_percent": 1.0}) for name, inputs in nodes]
        key = " + ".join(f"{name} {shown(inputs)}" for name, inputs in acting) or "dense"
        prices = self.known.setdefault(clip.name, {})
        if key not in prices:
            one, two = (count(self.model(blocks), clip)[0] for blocks in (1, 2))
            beside_blocks = 2 * one - two
            whole = count(patch(self.pack, self.model(self.blocks), acting), clip)[0]
            prices[key] = beside_blocks + (whole - beside_blocks) * ltx2.BLOCKS / self.blocks
        return prices[key]

    def model(self, blocks: int) -> Any:
        if blocks not in self.models:
            self.models[blocks] = ltx2.build_ltx2("meta", blocks=blocks)
        return self.models[blocks]


def shown(inputs: dict[str, Any]) -> str:
    """Inputs as a key, without the part of the schedule."""
    return ", ".join(f"{k}={v:g}" for k, v in sorted(inputs.items()) if not k.endswith("_percent"))
