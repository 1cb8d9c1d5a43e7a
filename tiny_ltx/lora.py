"""A difference of low rank on the linear layers of a model (Hu et al., 2021, https://arxiv.org/abs/2106.09685)."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrize

from .model import DOWN, PREFIX, UP

RANK = 32
# What turns words and times into vectors stays as it is.
EMBEDDINGS = ("caption_projection", "timestep_embedder")


class LowRank(nn.Module):
    """weight + up @ down, where up [out, rank] begins at zero."""

    def __init__(self, weight: torch.Tensor, rank: int, generator: torch.Generator) -> None:
        super().__init__()
        rows, columns = weight.shape
        down = torch.randn(rank, columns, generator=generator) / math.sqrt(columns)
        self.down = nn.Parameter(down.to(weight))
        self.up = nn.Parameter(weight.new_zeros(rows, rank))

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return weight + self.up @ self.down


def add_lora(model: Any, seed: int, rank: int = RANK) -> list[nn.Parameter]:
    """Freezes `model`, gives its linear layers a difference each, and returns what can be trained."""
    generator = torch.Generator().manual_seed(seed)
    model.requires_grad_(False)
    for _, layer in _linear_layers(model):
        parametrize.register_parametrization(layer, "weight", LowRank(layer.weight, rank, generator))
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def lora_of(model: Any) -> dict[str, torch.Tensor]:
    """The differences of `model`, keyed as ComfyUI's own LoRA loader reads them."""
    out = {}
    for name, layer in _linear_layers(model):
        part = layer.parametrizations.weight[0]
        out[f"{PREFIX}{name}{DOWN}"], out[f"{PREFIX}{name}{UP}"] = part.down.detach(), part.up.detach()
    return out


def _linear_layers(model: Any) -> list[tuple[str, nn.Linear]]:
    return [
        (name, layer)
        for name, layer in model.named_modules()
        if isinstance(layer, nn.Linear) and not any(part in name for part in EMBEDDINGS)
    ]
