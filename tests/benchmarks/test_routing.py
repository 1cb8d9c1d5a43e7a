"""The arithmetic of routing.py."""

from __future__ import annotations

import pytest
import torch


def test_many_settings_at_once_are_the_reference(bench):
    routing = bench("routing")
    routed, tokens = routing.routed, routing.VideoTokens.grid(5, 3, 7, guides=3)
    packing = routed.pack_tokens(tokens, 3, 7, 1, 16)
    generator = torch.Generator().manual_seed(0)
    given = [torch.randn(1, tokens.total, 2 * 8, generator=generator, dtype=torch.float64) for _ in range(3)]
    q, k, v = (packing.pack(x).unflatten(-1, (2, 8)).transpose(1, 2)[0] for x in given)
    settings = [(0.3, 0.0), (0.0, 0.7), (0.0, -1e9)]
    shares = []
    for setting, out, exact in routing.attended(q, k, v, packing, settings):
        expected = routed.attend_reference(*given, 2, None, packing, *setting)
        torch.testing.assert_close(packing.unpack(out.transpose(0, 1).flatten(1)[None]), expected)
        shares.append(routing.kept_share(packing, exact))
    assert shares[0] < 1 and shares[1] < 1 and shares[2] == pytest.approx(1)


def test_the_share_at_equal_error_lies_between_what_was_measured(bench):
    def row(order, kept, error):
        return {
            "block": 16,
            "frames": 13,
            "sink_frames": 0,
            "order": order,
            "keep": kept,
            "kept": kept,
            "error": error,
        }

    rows = [row("compact", 0.1, 0.4), row("compact", 0.4, 0.1), row("rows", 0.5, 0.2), row("rows", 0.9, 0.05)]
    inside, outside = bench("routing").at_equal_error(rows, "keep")
    assert inside["compact_keeps"] == pytest.approx(0.2) and inside["ratio"] == pytest.approx(0.4)
    assert outside["compact_keeps"] is None and outside["ratio"] is None


def test_frame_major_blocks_are_two_rows_and_ours_are_compact(bench):
    orders = bench("routing").orders(13, 1, 16)
    assert orders["rows"].order.tolist() == list(range(13 * 64))
    assert orders["compact"].shape == (2, 2, 4)
    first = orders["4×2×2"].order[64:80] - 64
    t, r, c = torch.unravel_index(first, (12, 8, 8))
    assert [len(x.unique()) for x in (t, r, c)] == [4, 2, 2]
    assert all(sorted(packing.order.tolist()) == list(range(13 * 64)) for packing in orders.values())
