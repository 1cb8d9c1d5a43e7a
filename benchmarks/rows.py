"""The settings that the quality table compares. A new one is one line in ROWS.

No ComfyUI import: a row is a schedule and a list of nodes with their inputs.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from typing import Any

TEACHER, STUDENT, PESSIMIST = "teacher", "student", "pessimist"
BOTH = (TEACHER, STUDENT)
ALL = (TEACHER, STUDENT, PESSIMIST)

UNIFORM, TAIL = "uniform", "tail"


@dataclass(frozen=True)
class Striding:
    """Fewer latent frames, and how the others are made.

    method, has_vae: of LatentFlowInterpolate. until: the first stage stops at the step nearest to this sigma and its
    clean estimate is filled in (coarse to fine). again_from: the finished clip is filled in, noised up to there and
    refined.
    nodes: of the second stage. is_stretched: whether the model knows of the stride.
    """

    stride: int
    method: str = "motion"
    has_vae: bool = True
    is_stretched: bool = True
    until: float | None = None
    again_from: float | None = None
    nodes: tuple[tuple[str, dict[str, Any]], ...] = ()

    @property
    def has_second_stage(self) -> bool:
        return self.until is not None or self.again_from is not None


@dataclass(frozen=True)
class Row:
    """One setting.

    kind: what the picture colours by. nodes: (node id, inputs) from the loader to the sampler. steps: of a
    dense run, None for the model's own schedule; merged: where a shorter schedule takes its larger steps.
    sigmas: a schedule of its own instead.
    """

    name: str
    kind: str
    nodes: tuple[tuple[str, dict[str, Any]], ...] = ()
    steps: int | None = None
    merged: str = UNIFORM
    sigmas: tuple[float, ...] | None = None
    striding: Striding | None = None
    models: tuple[str, ...] = BOTH

    @property
    def definition(self) -> dict[str, Any]:
        """What has to be the same for a measured row to be kept, as JSON has it."""
        out = asdict(self)
        del out["models"]
        if self.striding is None:
            del out["striding"]
        return json.loads(json.dumps(out))

    def schedule(self, own: tuple[float, ...], shift: float) -> tuple[float, ...]:
        """Sigmas of this row for a model whose own are `own`, ending in 0."""
        if self.sigmas is not None:
            return self.sigmas
        if self.steps is None:
            return own
        if self.merged == UNIFORM:
            return resampled(own, self.steps, shift)
        return tuple(merged_from_end(list(own), self.steps))


def resampled(sigmas: tuple[float, ...], steps: int, shift: float) -> tuple[float, ...]:
    """The same curve in `steps` steps of even length, in the time that a schedule shift bends."""
    times = [s / (shift - (shift - 1) * s) for s in sigmas]
    out = []
    for i in range(steps + 1):
        place = i * (len(times) - 1) / steps
        left = min(int(place), len(times) - 2)
        time = times[left] + (place - left) * (times[left + 1] - times[left])
        out.append(shift * time / (1 + (shift - 1) * time))
    return tuple(out)


def scheduled_for(tokens: int, steps: int = 24) -> tuple[float, ...]:
    """As core's LTXVScheduler with its default settings and a latent of so many tokens."""
    exponent = math.exp(0.95 + (2.05 - 0.95) * (tokens - 1024) / (4096 - 1024))
    line = [1 - i / steps for i in range(steps)]
    shifted = [exponent / (exponent + 1 / time - 1) for time in line]
    # The last one before 0 is stretched to lie at 0.1.
    return (*(1 - (1 - s) * 0.9 / (1 - shifted[-1]) for s in shifted), 0.0)


def merged_from_end(sigmas: list[float], steps: int) -> list[float]:
    """`steps` steps, made by joining neighbours two by two from the end; where that is not enough, again."""
    while len(sigmas) - 1 > steps:
        present = len(sigmas) - 1
        pairs = min(present - steps, present // 2)
        kept = present - 2 * pairs
        sigmas = sigmas[:kept] + sigmas[kept::2]
    return sigmas


def strided(
    stride: int,
    method: str = "motion",
    models: tuple[str, ...] = ALL,
    steps: int | None = None,
    tokens: int = 0,
    then: Row | None = None,
    **more: Any,
) -> Row:
    """KeyframeStride and what brings the frames back. then: its nodes lie before the first sampler."""
    striding = Striding(stride, method, **more)
    name = f"stride {stride}, {method}" + ("" if striding.has_vae else " on latents")
    name += "" if striding.is_stretched else ", times not stretched"
    name += f", {steps} steps" if steps is not None else ""
    name += f", LTXVScheduler for {tokens // 880}×880" if tokens else ""
    if striding.until is not None:
        name += f", full length from σ {striding.until:g}"
    if striding.again_from is not None:
        name += f", refined from σ {striding.again_from:g}"
    kind = "stride + full length" if striding.has_second_stage else "stride"
    name += " with a window" if striding.nodes else ""
    sigmas = scheduled_for(tokens) if tokens else None
    row = Row(name, kind, steps=steps, sigmas=sigmas, striding=striding, models=models)
    if then is not None:
        row = replace(row, name=f"{name} + {then.name}", kind=f"{kind} + {then.kind}", nodes=then.nodes)
    return row


def fewer(model: str, counts: Iterable[int], merged: str) -> list[Row]:
    names = {UNIFORM: "", TAIL: ", larger at the end"}
    return [
        Row(f"{n} steps{names[merged]}", "fewer steps", steps=n, merged=merged, models=(model,))
        for n in counts
    ]


def window(size: int, sink: int, start: float = 0.0, edge: int = 0) -> Row:
    inputs = {
        "window": size,
        "sink_frames": sink,
        "start_percent": start,
        "end_percent": 1.0,
        "dense_blocks": edge,
    }
    name = f"±{size}, {sink} sink" + (f", from {start:g}" if start else "") + (", dense edge" if edge else "")
    return Row(name, "window", (("ApplyTemporalWindow", inputs),))


def frozen(
    scope: str,
    forecast: str,
    start: float,
    every: int,
    end: float = 1.0,
    then: Row | None = None,
    models: tuple[str, ...] = (TEACHER,),
    precision: str = "",
) -> Row:
    """ScheduleSpatialFreeze, and behind it the nodes of another row.

    The student has three steps below σ 0.95, so that later starts freeze none of its steps.
    """
    inputs = {
        "start_percent": start,
        "end_percent": end,
        "refresh_every": every,
        "scope": scope,
        "forecast": forecast,
        "blocks_kept": 0,
        "cache_device": "auto",
        "cache_limit_gb": 0.0,
    }
    if precision:
        inputs["cache_dtype"] = precision
    span = f"from {start:g}" + (f" to {end:g}" if end < 1 else "")
    often = "never refreshed" if every == NEVER else f"every {every}."
    name, kind, nodes = (
        f"{scope}, {forecast}, {span}, {often}" + (f", kept as {precision}" if precision else ""),
        "freeze",
        (("ScheduleSpatialFreeze", inputs),),
    )
    if then is not None:
        name, kind, nodes = f"{name} + {then.name}", f"freeze + {then.kind}", (*nodes, *then.nodes)
    return Row(name, kind, nodes, models=models)


def pooled_name(near: int, pool: int, spatial: int) -> str:
    return f"pooled {pool}" + (f"×{spatial}²" if spatial > 1 else "") + f", ±{near}"


def pooled(
    near: int,
    pool: int,
    spatial: int = 1,
    edge: int = 0,
    start: float = 0.0,
    beyond: int | None = None,
) -> Row:
    """ThriftLowRankAttention, far frames pooled; one sink. beyond: so far away twice as many, a variant of the node."""
    inputs = {
        "far": "pooled",
        "near_frames": near,
        "pool": pool,
        "spatial_pool": spatial,
        "sink_frames": 1,
        "dense_blocks": edge,
        "start_percent": start,
        "end_percent": 1.0,
    }
    name = pooled_name(near, pool, spatial)
    name += (", dense edge" + (f" of {edge}" if edge > 1 else "")) if edge else ""
    name += f", from {start:g}" if start else ""
    if beyond is not None:
        name += f", {2 * pool} beyond ±{beyond}"
        return Row(name, "low rank", (("GrowingPool", {**inputs, "beyond": beyond}),))
    return Row(name, "low rank", (("ThriftLowRankAttention", inputs),))


def routed(keep: float = 0.0, threshold: float = 0.0, edge: int = 0, start: float = 0.0) -> Row:
    """ThriftLowRankAttention, far frames routed; one sink. By threshold, its FLOPs are priced as those of stock."""
    inputs = {
        "far": "routed",
        "keep": keep,
        "threshold": threshold,
        "sink_frames": 1,
        "extra_tokens": 0,
        "dense_blocks": edge,
        "start_percent": start,
        "end_percent": 1.0,
    }
    name = f"routed {keep:.0%}" if keep else f"routed by threshold {threshold:g}"
    name += (", dense edge" if edge else "") + (f", from {start:g}" if start else "")
    return Row(name, "low rank", (("ThriftLowRankAttention", inputs),))


def interleaved(edge: int = 1, start: float = 0.0, models: tuple[str, ...] = BOTH) -> Row:
    """Every other latent frame in every other block, a variant that is no node."""
    inputs = {"every": 2, "edge": edge, "start_percent": start, "end_percent": 1.0}
    name = f"every 2. frame in turns, dense edge of {edge}" + (f", from {start:g}" if start else "")
    return Row(name, "interleaved", (("InterleavedFrames", inputs),), models=models)


def attending_in(dtype: str, which: str) -> Row:
    """ThriftAttentionPrecision for self-attention, for that to the text, or for both; the tiny models compute in fp32."""
    inputs = {
        "self_attention": "fp32" if which == "text" else dtype,
        "text_attention": "fp32" if which == "self" else dtype,
    }
    name = {"self": "self-attention", "text": "text attention", "both": "attention"}[which]
    return Row(f"{name} in {dtype}", "precision", (("ThriftAttentionPrecision", inputs),))


def cached(model: str, threshold: float, then: Row | None = None) -> Row:
    """Core's EasyCache, and behind it the nodes of another row."""
    inputs = {"reuse_threshold": threshold, "start_percent": 0.15, "end_percent": 0.95, "verbose": False}
    name, kind, nodes = f"EasyCache {threshold:g}", "cache", (("EasyCache", inputs),)
    if then is not None:
        name, kind, nodes = f"{name} + {then.name}", f"cache + {then.kind}", (*nodes, *then.nodes)
    return Row(name, kind, nodes, models=(model,))


FP8 = "fp8_e4m3fn"
NEVER = 16
WORK, BLOCKS, ATTENTION = "per-frame work", "whole blocks", "spatial attention"
DENSE = Row("dense", "dense", models=ALL)
WINDOWS = (
    window(2, 1),
    window(4, 1),
    window(4, 1, edge=1),
    window(4, 1, start=0.25),
    window(4, 1, start=0.5),
)
LONG_CLIP_WINDOW = window(4, 1, edge=1).nodes
EVERY_OTHER_STEP = frozen(BLOCKS, "linear", 0.2, 2)

ROWS: tuple[Row, ...] = (
    DENSE,
    *fewer(TEACHER, (20, 16, 12, 8, 6, 4), UNIFORM),
    *fewer(TEACHER, (22, 18, 14, 10), TAIL),
    *fewer(STUDENT, (6, 5, 4, 3, 2), UNIFORM),
    *fewer(STUDENT, (7, 6, 5, 4), TAIL),
    *fewer(PESSIMIST, (12, 8, 4), UNIFORM),
    *WINDOWS,
    *(cached(TEACHER, threshold) for threshold in (0.024, 0.05)),
    cached(STUDENT, 0.05),
    *(strided(stride) for stride in (2, 4)),
    strided(3, models=BOTH),
    *(
        strided(stride, method, models=(TEACHER,))
        for stride in (2, 4)
        for method in ("linear", "optical_flow")
    ),
    strided(2, models=(TEACHER,), has_vae=False),
    strided(2, models=(TEACHER,), is_stretched=False),
    strided(2, steps=12, models=(TEACHER,)),
    *(strided(stride, steps=8, again_from=0.8, models=(TEACHER,)) for stride in (2, 3, 4)),
    strided(4, steps=8, again_from=0.7, models=(TEACHER,)),
    strided(2, steps=12, again_from=0.7, models=(TEACHER,)),
    strided(2, again_from=0.7, models=BOTH),
    strided(2, again_from=0.7, nodes=LONG_CLIP_WINDOW, models=(TEACHER,)),
    strided(2, until=0.75),
    strided(2, until=0.9, models=(PESSIMIST,)),
    strided(2, until=0.75, nodes=LONG_CLIP_WINDOW, models=(TEACHER,)),
    *(
        strided(stride, steps=steps, until=0.75, models=(TEACHER,))
        for stride, steps in ((2, 16), (3, 12), (4, 8))
    ),
    *(strided(2, models=(TEACHER,), tokens=frames * 880) for frames in (16, 9)),
    *(
        frozen(BLOCKS, "linear", start, every)
        for start, every in ((0.2, 2), (0.2, 3), (0.4, 2), (0.4, 3), (0.6, 3), (0.4, NEVER))
    ),
    frozen(BLOCKS, "linear", 0.4, 3, precision=FP8),
    frozen(BLOCKS, "hold", 0.4, 3),
    frozen(WORK, "linear", 0.4, 3),
    frozen(ATTENTION, "hold", 0.4, 3),
    frozen(BLOCKS, "linear", 0.4, 2, then=window(4, 1, start=0.5)),
    *(frozen(BLOCKS, forecast, 0.2, 2, models=(STUDENT,)) for forecast in ("linear", "hold")),
    frozen(BLOCKS, "linear", 0.0, 2, models=(STUDENT,)),
    frozen(WORK, "linear", 0.2, 2, models=(STUDENT,)),
    *(
        pooled(1, 2, edge=edge, start=start)
        for edge, start in ((0, 0.0), (1, 0.0), (1, 0.25), (2, 0.25), (1, 0.4))
    ),
    pooled(2, 2, edge=1, start=0.25),
    pooled(1, 2, spatial=2, edge=1, start=0.25),
    pooled(1, 4, edge=1, start=0.25),
    pooled(1, 2, edge=1, start=0.25, beyond=4),
    *(routed(keep, edge=1, start=0.25) for keep in (0.1, 0.3, 0.5)),
    *(attending_in("fp16", which) for which in ("self", "text", "both")),
    attending_in("bf16", "both"),
    *(strided(stride, models=(TEACHER,), then=EVERY_OTHER_STEP) for stride in (2, 3, 4)),
    *(strided(stride, models=(TEACHER,), then=cached(TEACHER, 0.024)) for stride in (2, 3)),
    *(strided(3, steps=steps, models=(TEACHER,)) for steps in (16, 12)),
    strided(3, steps=12, again_from=0.8, models=(TEACHER,)),
    strided(3, steps=12, again_from=0.8, models=(TEACHER,), then=EVERY_OTHER_STEP),
    *(
        replace(EVERY_OTHER_STEP, name=f"{steps} steps + {EVERY_OTHER_STEP.name}", steps=steps)
        for steps in (16, 12)
    ),
    *(interleaved(edge, start) for edge, start in ((1, 0.0), (1, 0.4), (4, 0.4))),
)
