"""Training-side forward of ComfyUI's LTXVModel: the same modules, no in-place updates, clips of mixed length.

The stock blocks update their input in place, which autograd refuses. Here every latent frame is a row of tokens, so clips
of one size and all lengths go through the linear layers together and part only for self-attention.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from operator import attrgetter
from typing import Any

import torch
import torch.nn.functional as F

_BLOCK_WEIGHTS = (
    "scale_shift_table",
    *(
        f"{attn}.{name}"
        for attn in ("attn1", "attn2")
        for name in (
            *(f"{p}.{kind}" for p in ("to_q", "to_k", "to_v", "to_out.0") for kind in ("weight", "bias")),
            "q_norm.weight",
            "k_norm.weight",
        )
    ),
    *(f"ff.net.{layer}.{kind}" for layer in ("0.proj", "2") for kind in ("weight", "bias")),
)


def _rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Interleaved rotary embedding of x [f, n, heads, 64] by cos, sin [f, n, heads, 32]."""
    even, odd = x.unflatten(-1, (-1, 2)).unbind(dim=-1)
    return torch.stack([cos * even - sin * odd, sin * even + cos * odd], dim=-1).flatten(-2)


def make_block(
    groups: tuple[tuple[int, int], ...], heads: int, dtype: torch.dtype
) -> Callable[..., torch.Tensor]:
    """The forward of one block for clips packed as `groups` of (clips, latent frames); matmuls run in `dtype`."""

    def block(
        x: torch.Tensor,
        modulation: torch.Tensor,
        context: torch.Tensor,
        frame_clip: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        *weights: torch.Tensor,
    ) -> torch.Tensor:
        w = {name: weights[i] for i, name in enumerate(_BLOCK_WEIGHTS)}
        dim = x.shape[-1]

        def linear(name: str, value: torch.Tensor) -> torch.Tensor:
            return F.linear(value.to(dtype), w[f"{name}.weight"].to(dtype), w[f"{name}.bias"].to(dtype))

        def normed(name: str, value: torch.Tensor) -> torch.Tensor:
            return F.rms_norm(value.float(), (dim,), w[f"{name}.weight"], 1e-5)

        table = w["scale_shift_table"][None, None] + modulation.view(-1, 1, 6, dim)
        shift_a, scale_a, gate_a, shift_f, scale_f, gate_f = table.unbind(dim=2)

        y = F.rms_norm(x, (dim,), eps=1e-6) * (1 + scale_a) + shift_a
        q = normed("attn1.q_norm", linear("attn1.to_q", y)).unflatten(-1, (heads, -1))
        k = normed("attn1.k_norm", linear("attn1.to_k", y)).unflatten(-1, (heads, -1))
        q, k = _rotate(q, cos, sin), _rotate(k, cos, sin)
        v = linear("attn1.to_v", y).unflatten(-1, (heads, -1))
        parts, start = [], 0
        for clips, frames in groups:
            end = start + clips * frames
            q_g, k_g, v_g = (
                t[start:end].to(dtype).reshape(clips, frames * t.shape[1], heads, -1).transpose(1, 2)
                for t in (q, k, v)
            )
            out = F.scaled_dot_product_attention(q_g, k_g, v_g).transpose(1, 2)
            parts.append(out.reshape(end - start, x.shape[1], dim))
            start = end
        x = x + linear("attn1.to_out.0", torch.cat(parts)) * gate_a

        q = normed("attn2.q_norm", linear("attn2.to_q", x)).unflatten(-1, (heads, -1))
        k = normed("attn2.k_norm", linear("attn2.to_k", context)).unflatten(-1, (heads, -1))[frame_clip]
        v = linear("attn2.to_v", context).unflatten(-1, (heads, -1))[frame_clip]
        score = torch.einsum("fnhd,fmhd->fnhm", q, k) * q.shape[-1] ** -0.5
        seen = torch.einsum("fnhm,fmhd->fnhd", score.softmax(dim=-1), v.float())
        x = x + linear("attn2.to_out.0", seen.flatten(-2))

        y = F.rms_norm(x, (dim,), eps=1e-6) * (1 + scale_f) + shift_f
        y = linear("ff.net.2", F.gelu(linear("ff.net.0.proj", y), approximate="tanh"))
        return x + y * gate_f

    return block


class Twin:
    """Runs a stock LTXVModel on clips packed as `groups` of (clips, latent frames), all of one h x w grid."""

    def __init__(
        self,
        model: Any,
        groups: tuple[tuple[int, int], ...],
        grid: tuple[int, int],
        device: torch.device,
        dtype: torch.dtype = torch.float32,
        compile_blocks: bool = False,
    ) -> None:
        from comfy.ldm.lightricks.symmetric_patchifier import latent_to_pixel_coords

        self.model, self.groups, self.grid = model, groups, grid
        self.dtype, self.is_compiled = dtype, compile_blocks
        block = make_block(groups, model.num_attention_heads, dtype)
        self.block = torch.compile(block, dynamic=False) if compile_blocks else block
        clip_frames = [frames for clips, frames in groups for _ in range(clips)]
        self.clips = len(clip_frames)
        self.frame_clip = torch.repeat_interleave(torch.arange(self.clips), torch.tensor(clip_frames)).to(
            device
        )
        self.coords = []
        for _, frames in groups:
            coords = model.patchifier.get_latent_coords(frames, *grid, 1, device)
            coords = latent_to_pixel_coords(
                coords, model.vae_scale_factors, model.causal_temporal_positioning
            )
            self.coords.append(coords.float())

    def pack(self, latents: list[torch.Tensor]) -> torch.Tensor:
        """Latents [b, 128, T, h, w], one per group -> rows [all frames, h w, 128]."""
        return torch.cat([x.permute(0, 2, 3, 4, 1).flatten(0, 1).flatten(1, 2) for x in latents])

    def unpack(self, rows: torch.Tensor) -> list[torch.Tensor]:
        """Rows [all frames, h w, C] -> latents [b, C, T, h, w], one per group."""
        parts = rows.split([clips * frames for clips, frames in self.groups])
        return [
            part.reshape(clips, frames, *self.grid, -1).permute(0, 4, 1, 2, 3)
            for part, (clips, frames) in zip(parts, self.groups, strict=True)
        ]

    def rotation(self, fps: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """cos, sin [all frames, h w, heads, 32] of the stock positions at each clip's frame rate."""
        cos, sin, start = [], [], 0
        for coords, (clips, frames) in zip(self.coords, self.groups, strict=True):
            rate = fps[start : start + clips].view(-1, 1, 1)
            start += clips
            pe, is_split = self.model._prepare_positional_embeddings(
                coords.repeat(clips, 1, 1, 1), rate, torch.float32
            )
            if is_split:
                raise ValueError(
                    "The twin rotates interleaved pairs only; got a model with split rotary pairs."
                )
            pe = pe.reshape(clips * frames, -1, *pe.shape[2:])
            cos.append(pe[..., 0, 0])
            sin.append(pe[..., 1, 0])
        return torch.cat(cos), torch.cat(sin)

    def __call__(
        self, rows: torch.Tensor, sigma: torch.Tensor, context: torch.Tensor, fps: torch.Tensor
    ) -> torch.Tensor:
        """Velocity of noisy rows [all frames, h w, 128].

        sigma: [all frames], one noise level per latent frame. context: [clips, 5, 32]. fps: [clips].
        """
        model = self.model
        cos, sin = self.rotation(fps)
        modulation, embedded = model.adaln_single(
            sigma * model.timestep_scale_multiplier,
            {"resolution": None, "aspect_ratio": None},
            batch_size=sigma.shape[0],
            hidden_dtype=torch.float32,
        )
        text = model.caption_projection(context)
        x = model.patchify_proj(rows)
        for block in model.transformer_blocks:
            # By attribute: a weight may be made of others, as that of a low-rank difference is.
            weights = (attrgetter(name)(block) for name in _BLOCK_WEIGHTS)
            x = self.block(x, modulation, text, self.frame_clip, cos, sin, *weights)
        shift, scale = (model.scale_shift_table[None, None] + embedded[:, None, None]).unbind(dim=2)
        x = F.layer_norm(x, (x.shape[-1],), eps=1e-6) * (1 + scale) + shift
        return model.proj_out(x)


@torch.no_grad()
def check_twin(model: Any, device: torch.device) -> float:
    """Difference of twin and stock forward (float32): largest element relative to the largest output, summed
    over two clip lengths."""
    generator = torch.Generator(device).manual_seed(1)
    # Fresh weights hold zeros, which would hide differences.
    model = copy.deepcopy(model)
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=generator, device=device)
        parameter.add_(noise / parameter.shape[-1] ** 0.5)
    groups = ((2, 3), (1, 5))
    twin = Twin(model, groups, (2, 3), device)
    latents = [
        torch.randn(clips, model.in_channels, frames, 2, 3, generator=generator, device=device)
        for clips, frames in groups
    ]
    context = torch.randn(3, 5, model.caption_channels, generator=generator, device=device)
    fps = torch.tensor([24.0, 24.0, 7.0], device=device)
    sigma = torch.tensor([0.3, 0.9, 0.6], device=device)
    ours = twin.unpack(twin(twin.pack(latents), sigma[twin.frame_clip], context, fps))
    worst, start = 0.0, 0
    for latent, out in zip(latents, ours, strict=True):
        part = slice(start, start + latent.shape[0])
        start += latent.shape[0]
        stock = model(latent.clone(), sigma[part], context[part], None, frame_rate=float(fps[part][0]))
        worst += float((out - stock).abs().max() / stock.abs().max())
    return worst
