"""What a windowed model should compute, written down without any part of the pack, and stand-ins' tools."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

SLOT = "optimized_attention_override"


def equal(a: Sequence[torch.Tensor], b: Sequence[torch.Tensor]) -> bool:
    """Whether two samples agree bit for bit."""
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def close(a: Sequence[torch.Tensor], b: Sequence[torch.Tensor], tolerance: float = 1e-3) -> bool:
    """Whether two samples agree up to a share of the largest value."""
    return all((x - y).abs().max() < tolerance * y.abs().max() for x, y in zip(a, b, strict=True))


def visible(
    frames: int, per_frame: int, window: int, sinks: int, guides: int = 0, anchors: int = 0
) -> torch.Tensor:
    """[N, N] bool written down from the semantics, with no code of the pack."""
    clip = frames - anchors
    sees = torch.zeros(frames, frames, dtype=torch.bool)
    for frame in range(clip):
        low = min(max(frame - window, 0), clip - 2 * window - 1)
        sees[anchors + frame, anchors + low : anchors + low + 2 * window + 1] = True
        sees[anchors + frame, anchors : anchors + sinks] = True
    sees[:anchors] = True
    sees[:, :anchors] = True
    tokens = sees.repeat_interleave(per_frame, 0).repeat_interleave(per_frame, 1)
    everything = torch.ones(tokens.shape[0] + guides, tokens.shape[0] + guides, dtype=torch.bool)
    everything[: tokens.shape[0], : tokens.shape[1]] = tokens
    return everything


def masked_model(
    model: Any, sees: torch.Tensor, active: Callable[[float, int], bool] = lambda sigma, block: True
) -> Any:
    """A clone whose video self-attention is masked by `sees` in float64, without any part of the pack.

    `active(sigma, block)` says where; query slices and masks already given are respected.
    """

    def override(
        func: Any, q: Any, k: Any, v: Any, heads: int, mask: Any = None, **kwargs: Any
    ) -> torch.Tensor:
        block = kwargs["transformer_options"].get("reference_block")
        sigma = float(kwargs["transformer_options"]["sigmas"][0])
        if block is None or not active(sigma, block):
            return func(q, k, v, heads, mask=mask, **kwargs)
        rows = sees
        if q.shape[1] != k.shape[1]:
            # Query slices of guide strengths: the noisy tokens first, then the guides.
            rows = sees[: q.shape[1]] if mask is not None and mask.shape[-2] == 1 else sees[-q.shape[1] :]
        bias = torch.zeros(rows.shape, dtype=torch.float64).masked_fill(~rows, -torch.inf)
        if mask is not None:
            bias = bias + mask.double()
        split = [x.double().unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v)]
        logits = split[0] @ split[1].transpose(-1, -2) * split[0].shape[-1] ** -0.5 + bias
        return (logits.softmax(-1) @ split[2]).transpose(1, 2).flatten(2).to(q.dtype)

    return in_marked_blocks(model, override)


def in_marked_blocks(model: Any, override: Callable[..., Any]) -> Any:
    """A clone with this in the override slot, which video self-attention tells its block as `reference_block`."""
    clone = set_slot(model, override)
    for index, block in enumerate(model.model.diffusion_model.transformer_blocks):
        clone.add_object_patch(
            f"diffusion_model.transformer_blocks.{index}.attn1.forward", marking(block.attn1.forward, index)
        )
    return clone


def marking(forward: Callable[..., Any], index: Any) -> Callable[..., Any]:
    def marked(*args: Any, **kwargs: Any) -> Any:
        options = {**kwargs["transformer_options"], "reference_block": index}
        return forward(*args, **{**kwargs, "transformer_options": options})

    return marked


def set_slot(model: Any, override: Callable[..., Any]) -> Any:
    """A clone whose override slot another pack has filled without looking."""
    clone = model.clone()
    clone.model_options.setdefault("transformer_options", {})[SLOT] = override
    return clone


def freezing_model(
    model: Any, scope: str, full: Sequence[int], forecast: bool, sigmas: Sequence[float]
) -> Any:
    """A clone that stores and re-adds what blocks or their sub-modules put out, in float64, one run long.

    full: the steps computed in full and stored; the others from the first of them on reuse. Written by hand, with
    nothing of the pack.
    """
    clone = model.clone()
    now: dict[str, Any] = {}
    stored: dict[Any, list[tuple[float, torch.Tensor]]] = {}

    def note(executor: Any, x: Any, t: Any, *args: Any, **kwargs: Any) -> Any:
        options = args[3]
        now["sigma"] = float(options["sigmas"][0])
        now["step"] = min(range(len(sigmas) - 1), key=lambda i: abs(sigmas[i] - now["sigma"]))
        now["conds"] = tuple(options["uuids"])
        return executor(x, t, *args, **kwargs)

    clone.add_wrapper_with_key("apply_model", "reference", note)

    def recall(place: str) -> torch.Tensor | None:
        values = stored.get((now["conds"], place))
        if now["step"] in full or not values:
            return None
        (sigma, value) = values[-1]
        if forecast and len(values) > 1:
            earlier, before = values[-2]
            value = value + (value - before) * min((now["sigma"] - sigma) / (sigma - earlier), 1)
        return value

    def remember(place: str, value: torch.Tensor) -> None:
        if now["step"] in full:
            stored.setdefault((now["conds"], place), []).append((now["sigma"], value.double()))

    def module(forward: Any, place: str) -> Any:
        def patched(x: Any, *args: Any, **kwargs: Any) -> Any:
            value = recall(place)
            if value is not None:
                return value.to(x.dtype)
            out = forward(x, *args, **kwargs)
            remember(place, out)
            return out

        return patched

    def block(forward: Any, place: str) -> Any:
        def patched(stream: Any, *args: Any, **kwargs: Any) -> Any:
            is_pair = isinstance(stream, tuple)
            video = stream[0] if is_pair else stream
            before, value = video.double().clone(), recall(place)
            if value is None:
                out = forward(stream, *args, **kwargs)
                remember(place, (out[0] if is_pair else out).double() - before)
                return out
            added = (before + value).to(video.dtype)
            if not is_pair:
                return added
            options = {**kwargs["transformer_options"], "run_vx": False}
            return added, forward(stream, *args, **{**kwargs, "transformer_options": options})[1]

        return patched

    for index, each in enumerate(model.model.diffusion_model.transformer_blocks):
        path = f"diffusion_model.transformer_blocks.{index}"
        if scope == "whole blocks":
            clone.add_object_patch(f"{path}.forward", block(each.forward, path))
        else:
            for name in ("attn2", "ff"):
                clone.add_object_patch(
                    f"{path}.{name}.forward", module(getattr(each, name).forward, f"{path}.{name}")
                )
    return clone


def casting_model(model: Any, types: dict[str, torch.dtype]) -> Any:
    """A clone that computes attention of modules by name (attn1, attn2) in other types, cast by hand call by call."""
    clone = model.clone()

    def override(
        func: Any, q: Any, k: Any, v: Any, heads: int, mask: Any = None, **kwargs: Any
    ) -> torch.Tensor:
        dtype = types.get(kwargs["transformer_options"].get("reference_block"))
        if dtype is None:
            return func(q, k, v, heads, mask=mask, **kwargs)
        if mask is not None:
            mask = mask.double().clamp(min=torch.finfo(dtype).min / 2).to(dtype)
        out = func(q.to(dtype), k.to(dtype), v.to(dtype), heads, mask=mask, **kwargs)
        return out.to(q.dtype)

    clone.model_options.setdefault("transformer_options", {})[SLOT] = override
    for index, block in enumerate(model.model.diffusion_model.transformer_blocks):
        for name in types:
            path = f"diffusion_model.transformer_blocks.{index}.{name}.forward"
            clone.add_object_patch(path, marking(getattr(block, name).forward, name))
    return clone
