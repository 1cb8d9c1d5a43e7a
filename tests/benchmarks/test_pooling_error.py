"""Undone and redone rotations of the pooling benchmark."""

from __future__ import annotations

import inspect

import comfy.ldm.lightricks.model as lightricks
import pytest
import torch
from tiny_models import build_model


@pytest.mark.skipif(
    "rotation_matrix" not in inspect.getsource(lightricks.apply_rotary_emb),
    reason="rotations of another form",
)
def test_groups_of_one_come_back_as_they_were_and_larger_ones_do_not(bench, pack):
    pooling, inner = bench("pooling_error"), build_model().model.diffusion_model
    Grid = pack("patches.kernels.coarse").Grid
    at = torch.cartesian_prod(*(torch.arange(n, dtype=torch.float32) * 8 for n in (5, 2, 3))).T[None]
    at = torch.stack([at, at + 8], dim=-1)
    seen = {"at": at, "rate": 24.0, "make": inner._prepare_positional_embeddings}
    keys = torch.randn(2, 30, 128)
    pooled = pooling.pooled_unrotated(seen, keys)
    (alone,) = pooled(Grid(0, 5, 2, 3, 1, 1), keys)
    torch.testing.assert_close(alone, keys, rtol=1e-4, atol=1e-4)
    pairs = Grid(0, 4, 2, 3, 2, 1)
    values = torch.randn_like(keys)
    assert torch.equal(pooled(pairs, values)[0], pairs.pooled(values)[0])
    # Tokens of one position lose nothing by it; others come out elsewhere than their mean.
    same = {**seen, "at": at[:, :, :1].expand_as(at)}
    torch.testing.assert_close(
        pooling.pooled_unrotated(same, keys)(pairs, keys)[0], pairs.pooled(keys)[0], rtol=1e-4, atol=1e-4
    )
    assert (pooled(pairs, keys)[0] - pairs.pooled(keys)[0]).abs().max() > 0.1
