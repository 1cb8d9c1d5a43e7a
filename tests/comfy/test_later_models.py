"""What only LTX-2.3 and LTX-2.5 have: that the tiny models of their form have it, too, and keyframe slots."""

from __future__ import annotations

import pytest
import torch
from freezing import SCOPES, SIGMAS
from reference import close, freezing_model, masked_model, visible
from tiny_models import FORMS, build_model, conditioning, noise_like, sample

later = pytest.mark.skipif("ltx-2.3" not in FORMS, reason="this tree has no LTX-2.3")
latest = pytest.mark.skipif("ltx-2.5" not in FORMS, reason="this tree has no LTX-2.5")


def weights(family):
    return dict(build_model(family, blocks=1).model.diffusion_model.named_parameters())


@later
def test_ltx_2_3_has_gates_and_modulates_text():
    names = weights("ltx-2.3")
    assert any("attn1.to_gate_logits" in name for name in names)
    assert "prompt_adaln_single.linear.weight" in names
    assert names["transformer_blocks.0.scale_shift_table"].shape[0] == 9


@latest
def test_ltx_2_5_has_a_marker_and_no_bias_in_its_feed_forward():
    names = weights("ltx-2.5")
    forward = [name for name in names if name.startswith("transformer_blocks.0.ff.")]
    assert forward and not any(name.endswith("bias") for name in forward)
    assert "keyframes_abs_pos_embedding" in names


def with_slots(frames=9, slots=2, grid=(2, 3)):
    """A clip with keyframe slots behind it, as the node that adds generated keyframes makes it; they are denoised."""
    height, width = grid
    starts = torch.tensor([16.0, 40.0])[:slots]
    t, y, x = torch.meshgrid(starts, torch.arange(height) * 32.0, torch.arange(width) * 32.0, indexing="ij")
    corner = torch.stack([t, y, x]).flatten(1)
    coordinates = torch.stack([corner, corner + torch.tensor([[1.0], [32.0], [32.0]])], dim=-1)[None]
    noted = {"first_latent_frame": frames, "num_keyframes": slots, "tokens_per_frame": height * width}
    values = {"keyframe_idxs": coordinates, "generated_keyframes": noted}
    conds = {
        "positive": conditioning("ltx-2.5", **values),
        "negative": conditioning("ltx-2.5", seed=7, **values),
    }
    mask = torch.ones(1, 1, frames + slots, 1, 1)
    return {"noise": noise_like("ltx-2.5", (frames + slots, height, width)), "noise_mask": mask, **conds}


@latest
def test_slots_are_marked():
    model, given = build_model("ltx-2.5"), with_slots()
    marked = sample(model, "ltx-2.5", **given)
    for cond in (*given["positive"], *given["negative"]):
        del cond[1]["generated_keyframes"]
    assert not close(marked, sample(model, "ltx-2.5", **given))


@latest
def test_slots_see_all_and_are_seen_by_all_in_a_window(windowed, last_run):
    model, given = build_model("ltx-2.5"), with_slots()
    ours = windowed(model)
    result = sample(ours, "ltx-2.5", **given)
    reference = masked_model(model, visible(9, 6, 1, 0, guides=12))
    assert close(result, sample(reference, "ltx-2.5", **given))
    assert not close(result, sample(model, "ltx-2.5", **given))
    assert last_run(ours)["taken"] == 9 and not last_run(ours)["declined"]


@latest
@pytest.mark.parametrize("scope", SCOPES)
def test_freeze_takes_slots_along(scope, frozen, record):
    model, given = build_model("ltx-2.5"), with_slots()
    ours = frozen(model, scope=scope, forecast="hold")
    result = sample(ours, "ltx-2.5", sigmas=SIGMAS, **given)
    reference = freezing_model(model, scope, (0, 3, 6, 7), False, SIGMAS.tolist())
    assert close(result, sample(reference, "ltx-2.5", sigmas=SIGMAS, **given), 1e-4)
    assert not close(result, sample(model, "ltx-2.5", sigmas=SIGMAS, **given))
    assert record(ours)["taken"] == 4
