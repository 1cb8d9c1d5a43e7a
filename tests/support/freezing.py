"""What the tests of frozen steps have in common: a schedule of eight steps, the scopes, a counter of calls."""

from __future__ import annotations

from typing import Any

import torch

SIGMAS = torch.linspace(1, 0, 9)
SCOPES = ("per-frame work", "whole blocks")
EVERY = ("spatial attention", *SCOPES)


class Counted:
    """Calls of one sub-module of every block, by the step they came in."""

    def __init__(self, model: Any, path: str) -> None:
        self.steps: list[int] = []
        self.step = -1
        for block in model.model.diffusion_model.transformer_blocks:
            block.get_submodule(path).register_forward_pre_hook(lambda *_: self.steps.append(self.step))

    def watch(self, model: Any) -> Any:
        clone = model.clone()

        def note(executor: Any, x: Any, t: Any, *args: Any, **kwargs: Any) -> Any:
            sigma = float(args[3]["sigmas"][0])
            self.step = min(range(8), key=lambda i: abs(float(SIGMAS[i]) - sigma))
            return executor(x, t, *args, **kwargs)

        clone.add_wrapper_with_key("apply_model", "counter", note)
        return clone

    def by_step(self) -> list[int]:
        return [self.steps.count(step) for step in range(8)]
