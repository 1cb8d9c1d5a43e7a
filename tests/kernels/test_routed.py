"""Blocks that are compact, attention through them against its definition, and against the package that has the kernel."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from plain_attention import HEADS, attend, tensors


@pytest.fixture(scope="module")
def kernel(pack):
    return pack("patches.kernels.routed")


@pytest.fixture(scope="module")
def Tokens(pack):
    return pack("patches.kernels.tokens").VideoTokens


@pytest.fixture(scope="module")
def kitchen():
    kitchen = pytest.importorskip("comfy_kitchen")
    if not hasattr(kitchen, "sol_attn"):
        pytest.skip("needs comfy-kitchen 0.2.40 or newer: nox -s routed")
    return kitchen


layouts = st.fixed_dictionaries(
    {
        "frames": st.integers(1, 9),
        "height": st.integers(1, 7),
        "width": st.integers(1, 9),
        "guides": st.integers(0, 70),
        "anchors": st.integers(0, 2),
    }
)


@settings(max_examples=60, deadline=None)
@given(layout=layouts, sinks=st.integers(0, 3), block=st.sampled_from([16, 64]))
@example(layout={"frames": 3, "height": 5, "width": 7, "guides": 0, "anchors": 0}, sinks=0, block=16)
@example(layout={"frames": 3, "height": 5, "width": 7, "guides": 35, "anchors": 1}, sinks=1, block=16)
def test_packing_is_undone_to_the_bit_and_special_tokens_come_first(pack, layout, sinks, block):
    layout["anchors"] = min(layout["anchors"], layout["frames"])
    tokens = pack("patches.kernels.tokens").VideoTokens.grid(**layout)
    packing = pack("patches.kernels.routed").pack_tokens(
        tokens, layout["height"], layout["width"], sinks, block
    )
    x = torch.randn(2, tokens.total, 3)
    packed = packing.pack(x)
    assert torch.equal(packing.unpack(packed), x)
    assert sorted(packing.order.tolist()) == list(range(tokens.total))
    first = tokens.offsets[min(layout["anchors"] + sinks, tokens.frames)]
    special = [*range(first), *range(tokens.offsets[-1], tokens.total)]
    assert packing.order[: len(special)].tolist() == special
    assert packing.exact == math.ceil(len(special) / block)


def places(packing, tokens, height, width):
    """(frame, row, column) of the tokens of each block behind the exact ones."""
    rest = packing.order[packing.exact * packing.block :]
    return [
        torch.stack(torch.unravel_index(part, (tokens.frames, height, width)), -1)
        for part in rest.split(packing.block)
    ]


@pytest.mark.parametrize(("sinks", "guides"), [(0, 0), (1, 0), (1, 10), (1, 64)])
def test_where_blocks_divide_the_grid_each_is_a_cuboid(kernel, Tokens, sinks, guides):
    tokens = Tokens.grid(12 + sinks, 8, 12, guides)
    packing = kernel.pack_tokens(tokens, 8, 12, sinks)
    assert packing.shape == (4, 4, 4)
    blocks = places(packing, tokens, 8, 12)
    # Where the exact blocks are filled up, that many tokens are missing at the end.
    ragged = (-(sinks * 96 + guides)) % 64 > 0
    for at in blocks[: -1 if ragged else None]:
        assert (at.amax(0) - at.amin(0) + 1).tolist() == [4, 4, 4] and len(at.unique(dim=0)) == 64


@pytest.mark.parametrize("grid", [(15, 22, 40), (12, 14, 32), (30, 22, 40), (7, 17, 30)])
def test_without_padding_blocks_are_nearly_as_compact_as_cubes_and_follow_their_neighbours(
    kernel, Tokens, grid
):
    tokens = Tokens.grid(*grid)
    packing = kernel.pack_tokens(tokens, *grid[1:], 0)
    assert packing.blocks == math.ceil(tokens.total / 64)
    cube = (2 + kernel.FRAME_STEP**2) * (4**2 - 1) / 12
    assert cube <= kernel.spread(packing.order, grid, 64) < 1.3 * cube
    blocks = places(packing, tokens, *grid[1:])
    for one, two in zip(blocks, blocks[1:], strict=False):
        assert (one[:, None] - two).abs().sum(-1).min() == 1


def test_frames_with_dropped_tokens_are_refused_unless_they_are_sinks(kernel, Tokens):
    kernel.pack_tokens(Tokens((0, 4, 10, 16), 16), 2, 3, 1, 4)
    with pytest.raises(ValueError, match=r"expected 6 tokens in each frame \(2×3\)"):
        kernel.pack_tokens(Tokens((0, 6, 10, 16), 16), 2, 3, 1, 4)


def test_a_packing_is_put_where_the_tensors_are(kernel, Tokens):
    packing = kernel.pack_tokens(Tokens.grid(9, 4, 4), 4, 4, 1, 16)
    there = packing.on(torch.device("meta"))
    assert there.order.is_meta and there.places.is_meta and there.exact == packing.exact


def definition(q, k, v, packing, keep, threshold):
    """The method in float64, one block of queries and one query after the other, as the paper has it. One head."""
    scale, block = q.shape[-1] ** -0.5, packing.block
    rows = [packing.order[at : at + block] for at in range(0, packing.total, block)]
    keys = torch.stack([k[each].mean(0) for each in rows])
    middle = keys.mean(0)
    keys, k = keys - middle, k - middle
    out = torch.empty_like(v)
    for i, queries in enumerate(rows):
        mean = q[queries].mean(0)
        scores = [float(mean @ key) * scale for key in keys]
        others = range(packing.exact, len(rows))
        if keep:
            count = max(0, min(len(others) - 1, max(1, round(keep * len(others)))))
            chosen = set(sorted(others, key=lambda j: -scores[j])[:count])
        else:
            deviation = (mean.square() @ keys.square().mean(0)).sqrt() * scale
            chosen = {j for j in others if scores[j] > threshold * deviation}
        seen = {
            j for j in range(len(rows)) if abs(i - j) <= 1 or j < packing.exact or i < packing.exact
        } | chosen
        for query in queries:
            weights, values = [], []
            for j, members in enumerate(rows):
                if j in seen:
                    weights += [(q[query] @ k[member] * scale).exp() for member in members]
                    values += [v[member] for member in members]
                else:
                    weights.append(len(members) * math.exp(scores[j]))
                    values.append(v[members].mean(0))
            weight = torch.stack([torch.as_tensor(w, dtype=torch.float64) for w in weights])
            out[query] = (weight[:, None] * torch.stack(values)).sum(0) / weight.sum()
    return out


ASKED = [(0.1, 0.0), (0.4, 0.0), (0.0, 0.5), (0.0, 1.0)]


@pytest.mark.parametrize(("keep", "threshold"), ASKED)
@pytest.mark.parametrize(
    ("layout", "sinks"),
    [
        ({"frames": 7, "height": 3, "width": 5}, 1),
        ({"frames": 6, "height": 4, "width": 4, "guides": 5, "anchors": 1}, 0),
    ],
)
def test_the_reference_equals_the_definition(kernel, Tokens, layout, sinks, keep, threshold):
    tokens = Tokens.grid(**layout)
    packing = kernel.pack_tokens(tokens, layout["height"], layout["width"], sinks, 8)
    q, k, v = (2 * x for x in tensors(tokens.total, batch=2))
    out = kernel.attend_reference(q, k, v, HEADS, None, packing, keep, threshold)
    for item in range(2):
        for head in range(HEADS):
            part = slice(head * 8, head * 8 + 8)
            one = [x[item, :, part] for x in (q, k, v)]
            torch.testing.assert_close(out[item, :, part], definition(*one, packing, keep, threshold))


def test_seeing_every_block_is_dense_attention(kernel, Tokens):
    tokens = Tokens.grid(7, 3, 5, guides=4)
    q, k, v = tensors(tokens.total, batch=2)
    packing = kernel.pack_tokens(tokens, 3, 5, 1, 8)
    assert not packing.is_dense
    out = kernel.attend_reference(q, k, v, HEADS, None, packing, 0.0, -1e9)
    torch.testing.assert_close(out, attend(q, k, v))
    few = kernel.attend_reference(q, k, v, HEADS, None, packing, 0.1, 0.0)
    assert (few - out).abs().max() > 1e-2


def test_where_neighbours_are_all_there_is_every_setting_is_dense(kernel, Tokens):
    tokens = Tokens.grid(3, 2, 4)
    packing = kernel.pack_tokens(tokens, 2, 4, 1, 8)
    assert packing.is_dense and packing.blocks == 3
    q, k, v = tensors(tokens.total)
    torch.testing.assert_close(
        kernel.attend_reference(q, k, v, HEADS, None, packing, 0.1, 0.0), attend(q, k, v)
    )


def test_special_tokens_see_all_and_are_seen_by_all_exactly(kernel, Tokens):
    tokens = Tokens.grid(9, 4, 4, guides=6, anchors=1)
    packing = kernel.pack_tokens(tokens, 4, 4, 1, 8)
    q, k, v = tensors(tokens.total)
    out = kernel.attend_reference(q, k, v, HEADS, None, packing, 0.05, 0.0)
    dense = attend(q, k, v)
    special = [*range(32), *range(144, 150)]
    torch.testing.assert_close(out[:, special], dense[:, special])
    others = packing.order[packing.exact * 8 :]
    assert (out - dense).abs().amax(-1)[0, others].min() > 1e-6
    k2, v2 = k.clone(), v.clone()
    k2[:, 146], v2[:, 146] = 0, 100
    moved = kernel.attend_reference(q, k2, v2, HEADS, None, packing, 0.05, 0.0)
    torch.testing.assert_close(moved[:, special], attend(q, k2, v2)[:, special])


def test_batch_items_do_not_see_each_other_and_pieces_make_no_difference(kernel, Tokens, monkeypatch):
    tokens = Tokens.grid(9, 4, 4, guides=3)
    packing = kernel.pack_tokens(tokens, 4, 4, 1, 16)
    q, k, v = tensors(tokens.total, batch=2)
    both = kernel.attend_reference(q, k, v, HEADS, None, packing, 0.2, 0.0)
    monkeypatch.setattr(kernel, "REFERENCE_BYTES", 1)
    torch.testing.assert_close(kernel.attend_reference(q, k, v, HEADS, None, packing, 0.2, 0.0), both)
    k[1], v[1] = torch.nan, torch.nan
    assert torch.equal(kernel.attend_reference(q, k, v, HEADS, None, packing, 0.2, 0.0)[0], both[0])


def test_half_precision_is_computed_in_float32(kernel, Tokens):
    tokens = Tokens.grid(9, 4, 4)
    packing = kernel.pack_tokens(tokens, 4, 4, 1, 16)
    given = tensors(tokens.total, dtype=torch.bfloat16)
    out = kernel.attend_reference(*given, HEADS, None, packing, 0.2, 0.0)
    wide = kernel.attend_reference(*(x.float() for x in given), HEADS, None, packing, 0.2, 0.0)
    assert out.dtype == torch.bfloat16 and torch.equal(out, wide.bfloat16())


@pytest.mark.parametrize("keep", [0.05, 0.3, 0.9])
def test_pairs_are_those_of_the_routing(kernel, Tokens, keep):
    tokens = Tokens.grid(17, 8, 8, guides=20)
    packing = kernel.pack_tokens(tokens, 8, 8, 1, 16)
    # Neighbours in a line are the best blocks of each other, so that nothing comes on top of what is kept.
    turn = torch.linspace(0, 3, packing.blocks).repeat_interleave(16)[: packing.total, None]
    q = torch.cat([turn.cos(), turn.sin()], dim=1)[None].double()
    _, exact = kernel.route(q, q, 1.0, packing, keep, 0.0)
    sizes = kernel.block_sizes(packing, q.device)
    counted = int((exact * (sizes[:, None] * sizes)).sum()) + packing.blocks**2
    assert packing.pairs(keep) == pytest.approx(counted, rel=0.02)
    assert packing.pairs(keep) < tokens.total**2 + packing.blocks**2


def test_pairs_by_threshold_are_not_known_before(kernel, Tokens):
    assert kernel.pack_tokens(Tokens.grid(9, 4, 4), 4, 4, 1, 16).pairs(0.0) is None


@pytest.mark.parametrize(
    ("dtype", "width", "reason"),
    [
        (torch.bfloat16, 64, "HEAD_WIDTH"),
        (torch.float32, 128, "DTYPE"),
        (torch.bfloat16, 128, "NO_KERNEL"),
        (torch.float16, 128, "NO_KERNEL"),
    ],
)
def test_what_keeps_the_kernel_from_serving_here(kernel, dtype, width, reason):
    assert kernel.why_not(torch.device("cpu"), dtype, width) == reason


# With the package that has the kernel, whose slow form runs on a CPU.


@pytest.mark.parametrize(("keep", "threshold"), [*ASKED, (0.9, 0.0), (0.0, -1e9)])
@pytest.mark.parametrize("width", [128, 64])
def test_the_reference_equals_the_package(kernel, Tokens, kitchen, keep, threshold, width):
    from comfy_kitchen.backends.eager.sol_attn import sol_attn

    tokens = Tokens.grid(9, 9, 11, guides=70)
    packing = kernel.pack_tokens(tokens, 9, 11, 1)
    assert tokens.total % 64 and packing.exact == 3
    q, k, v = (2 * x.float() for x in tensors(tokens.total, batch=2, width=HEADS * width))
    # As what is not asked for is zero, heads of 64 fit into those of 128.
    rows = [
        torch.nn.functional.pad(packing.pack(x).unflatten(-1, (HEADS, width)), (0, 128 - width))
        for x in (q, k, v)
    ]
    exact = [0, packing.exact]
    theirs = sol_attn(*rows, threshold, width**-0.5, exact, exact, topk_ratio=keep)
    theirs = packing.unpack(theirs[..., :width].flatten(2))
    ours = kernel.attend_reference(q, k, v, HEADS, None, packing, keep, threshold)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("keep", "threshold"), ASKED)
def test_the_call_of_the_kernel_is_right_about_order_settings_and_scale(
    kernel, Tokens, kitchen, keep, threshold
):
    """On a CPU the package serves it by its slow form, which the product never comes to: `why_not` gives a reason."""
    tokens = Tokens.grid(9, 9, 11, guides=70)
    packing = kernel.pack_tokens(tokens, 9, 11, 1)
    q, k, v = (2 * x.float() for x in tensors(tokens.total, width=HEADS * 128))
    for scale in (None, 0.05):
        out = kernel.attend_routed(q, k, v, HEADS, scale, packing, keep, threshold, 0)
        expected = kernel.attend_reference(q, k, v, HEADS, scale, packing, keep, threshold)
        torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)
    straight = replace(packing, order=torch.arange(tokens.total), places=torch.arange(tokens.total))
    assert not torch.allclose(out, kernel.attend_routed(q, k, v, HEADS, 0.05, straight, keep, threshold, 0))
