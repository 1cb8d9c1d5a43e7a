"""Times low-rank attention against dense and against windows, at LTX-2 size.

    python benchmarks/low_rank.py [--out FILE] [--seconds 200] [--parts attention steps]
    python benchmarks/low_rank.py --table
    python benchmarks/low_rank.py --device cpu --small --out DIR/low_rank.json        # for a look

attention: one call of 32 heads × 128 in bf16, dense by PyTorch's flash attention in the same run; time, its ratio to the
share of keys, peak memory, and the largest difference to the masked executor. steps: of a model of `BLOCKS` blocks with random
weights, sampled through ComfyUI with the node. On eight multiprocessors of the card, which is a laptop's size, and on all.
"""

from __future__ import annotations

import argparse
import importlib
import statistics
import time
from collections.abc import Callable
from typing import Any

from runtime import PACK  # isort: split

import comfy.ldm.modules.attention as comfy_attention
import comfy.ops
import lab
import ltx2
import results
import torch
from comfy.patcher_extension import WrappersMP
from rows import pooled_name
from sampling import patch
from throttle import throttled
from torch.nn.attention import SDPBackend

HEADS, WIDTH = 32, 128
BLOCKS = 8
THROTTLES = (8, None)
GRIDS = ((16, 22, 40), (31, 22, 40), (61, 22, 40))
# near, pool, spatial
POOLED = ((1, 2, 1), (2, 2, 1), (1, 4, 1), (1, 2, 2), (1, 4, 2))
WINDOWS = (1, 2, 4)
STEP_CLIPS = ((8, 1), (None, 1), (None, 2), (8, 2))
ROUTED: dict[str, dict[str, Any]] = {
    "routed 10%": {"keep": 0.1, "extra_tokens": 0},
    "routed 30%": {"keep": 0.3, "extra_tokens": 0},
    "routed 30%, 256 tokens": {"keep": 0.3, "extra_tokens": 256},
    "routed 50%": {"keep": 0.5, "extra_tokens": 0},
    "routed by threshold 0.5": {"keep": 0.0, "threshold": 0.5, "extra_tokens": 0},
    "routed by threshold 1": {"keep": 0.0, "threshold": 1.0, "extra_tokens": 0},
}
# What core's own node does to this model: the kernel on the tokens as they come, with its default settings.
CORE = "core's node"


def kernel(name: str) -> Any:
    return importlib.import_module(f"{PACK}.patches.kernels.{name}")


def milliseconds(work: Callable[[], Any], device: str, repeats: int) -> float:
    """Median over `repeats`, after one call that does not count."""
    work()
    return statistics.median(lab.milliseconds(work, device) for _ in range(repeats))


def calls(grid: tuple[int, int, int], device: str) -> dict[str, tuple[float, Callable[[], Any]]]:
    """By setting: the share of keys that is seen, and the attention call."""
    frames, height, width = grid
    tokens = kernel("tokens").VideoTokens.grid(*grid)
    dense = kernel("segments").Segments.dense(tokens.total, tokens.total)
    dtype = torch.bfloat16
    q, k, v = (torch.randn(1, tokens.total, HEADS * WIDTH, device=device, dtype=dtype) for _ in range(3))
    rows, coarse = range(tokens.total), kernel("coarse")

    def attend(q: Any, k: Any, v: Any, mask: Any) -> Any:
        return comfy_attention.optimized_attention(q, k, v, HEADS, mask=mask)

    def windowed(segments: Any) -> Callable[[], Any]:
        return lambda: kernel("segments").attend_batched(q, k, v, None, rows, segments, attend)

    def pooled(segments: Any) -> Callable[[], Any]:
        return lambda: coarse.attend_merged(q, k, v, HEADS, None, rows, segments)

    out: dict[str, tuple[float, Callable[[], Any]]] = {"dense": (1.0, windowed(dense))}
    whole = tokens.total**2
    for window in WINDOWS:
        if 2 * window + 1 < frames:
            segments = kernel("window").window_segments(tokens, window, 1)
            out[f"±{window}, 1 sink"] = segments.pairs(rows) / whole, windowed(segments)
    for near, pool, spatial in POOLED:
        segments = coarse.coarsened(dense, tokens, near, 1, pool, spatial)
        out[pooled_name(near, pool, spatial)] = segments.pairs(rows) / whole, pooled(segments)
    return out


def difference(device: str, grid: tuple[int, int, int]) -> float:
    """Largest difference between both executors on this device, relative to the largest value."""
    tokens, coarse = kernel("tokens").VideoTokens.grid(*grid), kernel("coarse")
    dense = kernel("segments").Segments.dense(tokens.total, tokens.total)
    segments = coarse.coarsened(dense, tokens, 1, 1, 2, 2)
    q, k, v = (torch.randn(1, tokens.total, 4 * WIDTH, device=device, dtype=torch.bfloat16) for _ in range(3))

    def attend(q: Any, k: Any, v: Any, mask: Any) -> Any:
        return comfy_attention.optimized_attention(q, k, v, 4, mask=mask)

    masked = coarse.attend_masked(q, k, v, range(tokens.total), segments, attend)
    merged = coarse.attend_merged(q, k, v, 4, None, range(tokens.total), segments)
    return ((masked - merged).abs().max() / masked.abs().max()).item()


def step_milliseconds(model: Any, clip: ltx2.Clip, device: str, repeats: int) -> tuple[float, float | None]:
    """Median of a step after the first, and the peak of a run beside the weights."""
    times: list[float] = []

    def timed(executor: Any, *args: Any, **kwargs: Any) -> Any:
        begin = time.perf_counter()
        out = executor(*args, **kwargs)
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(1000 * (time.perf_counter() - begin))
        return out

    model = model.clone()
    model.add_wrapper_with_key(WrappersMP.APPLY_MODEL, "benchmark", timed)
    peak = lab.peak_gib(lambda: ltx2.sample(model, clip, repeats + 1, device), device)
    return statistics.median(times[1:]), peak


def like_core(model: Any) -> Any:
    """`model` with a stand-in for core's Model Sparse Attention, which this ComfyUI lacks."""
    from comfy_kitchen import sol_attn

    def override(func: Any, q: Any, k: Any, v: Any, heads: int, mask: Any = None, **kwargs: Any) -> Any:
        if q.shape != k.shape or mask is not None or q.shape[-1] != heads * WIDTH:
            return func(q, k, v, heads, mask=mask, **kwargs)
        split = [x.unflatten(-1, (heads, -1)) for x in (q, k, v)]
        return sol_attn(*split, tau=1.3, token_aug=256).flatten(2)

    return lab.attending(model, override)


def routed_nodes(settings: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    inputs = {"far": "routed", "dense_blocks": 0, "start_percent": 0.0, **settings}
    return [("ThriftLowRankAttention", inputs)]


def nodes_of(near: int, pool: int, spatial: int) -> list[tuple[str, dict[str, Any]]]:
    inputs = {
        "near_frames": near,
        "pool": pool,
        "spatial_pool": spatial,
        "dense_blocks": 0,
        "start_percent": 0.0,
    }
    return [("ThriftLowRankAttention", inputs)]


def step_settings() -> dict[str, list[tuple[str, dict[str, Any]]]]:
    window = {"window": 4, "sink_frames": 1, "start_percent": 0.0}
    out = {"dense": [], "±4, 1 sink": [("ApplyTemporalWindow", window)]}
    out |= {pooled_name(*setting): nodes_of(*setting) for setting in POOLED[:4]}
    return out | {name: routed_nodes(settings) for name, settings in ROUTED.items()}


def check_it_acts(setting: str, model: Any) -> None:
    """Raises RuntimeError if a node had no effect in the last run: then its time is no time of it."""
    journal = importlib.import_module(f"{PACK}.patches.mount").journal_of(model)
    for name, entry in journal.records()[-1]["techniques"].items() if journal is not None else ():
        if not entry["taken"]:
            raise RuntimeError(f"{setting}: {name} declined everything: {entry['declined']}")


def table(report: dict[str, Any]) -> str:
    out = []
    for part, title in (("attention", "one attention call"), ("steps", f"a step of {BLOCKS} blocks")):
        rows = report[part]
        for sms in dict.fromkeys(row["multiprocessors"] for row in rows):
            own = [row for row in rows if row["multiprocessors"] == sms]
            grids = list(dict.fromkeys(row["grid"] for row in own))
            where = f"{sms} multiprocessors" if sms else "the whole card"
            lines = []
            for setting in dict.fromkeys(row["setting"] for row in own):
                cells = []
                for grid in grids:
                    row = next((r for r in own if (r["grid"], r["setting"]) == (grid, setting)), None)
                    if row is None:
                        cells.append("–")
                    elif setting == "dense":
                        cells.append(f"{row['ms']:.3g} ms")
                    elif part == "attention":
                        cells.append(f"{row['of_dense']:.0%} ({row['over_key_share']:.2f} × its keys)")
                    else:
                        cells.append(f"{row['of_dense']:.0%}")
                lines.append([setting, *cells])
            out += [f"{title.capitalize()}, {where}", "", results.table(["setting", *grids], lines), ""]
    return "\n".join(out)


def main() -> None:
    parser = results.asking(__doc__, "low_rank", seconds=300, device="cuda", table=True)
    parser.add_argument("--parts", nargs="+", default=["attention", "steps"])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--small", action="store_true", help="tiny sizes, to see that it runs")
    options = parser.parse_args()
    report = results.read(options.out, {})
    if not options.table:
        measure(options, report)
        results.save(report, options.out)
    results.write_tables(options.out, {"": table(report)})
    print(table(report))


def measure(options: argparse.Namespace, report: dict[str, Any]) -> None:
    device, begin = options.device, time.monotonic()
    comfy.ops.SDPA_BACKEND_PRIORITY = [
        SDPBackend.FLASH_ATTENTION,
        SDPBackend.EFFICIENT_ATTENTION,
        SDPBackend.MATH,
    ]
    grids = ((8, 2, 4), (9, 4, 4)) if options.small else GRIDS
    throttles = THROTTLES if device == "cuda" else (None,)
    report |= {
        **lab.machine(device),
        "merged_against_masked": difference(device, grids[0]),
        "left_out": [],
    }
    report.setdefault("attention", [])
    report.setdefault("steps", [])

    def save(part: str, row: dict[str, Any]) -> None:
        report[part] = results.latest([*report[part], row], "multiprocessors", "grid", "setting")
        results.save(report, options.out)
        print(part, row, flush=True)

    def is_late(*what: Any) -> bool:
        late = time.monotonic() - begin > options.seconds
        if late:
            report["left_out"].append(", ".join(map(str, what)))
        return late

    with torch.inference_mode():
        for sms in throttles if "attention" in options.parts else ():
            for grid in grids:
                with throttled(sms):
                    dense = 0.0
                    for setting, (share, work) in calls(grid, device).items():
                        if is_late("attention", sms, grid, setting):
                            continue
                        ms = milliseconds(work, device, options.repeats if sms else 3 * options.repeats)
                        dense = ms if setting == "dense" else dense
                        row = {"multiprocessors": sms, "grid": ltx2.size_of(grid), "setting": setting}
                        row |= {"ms": ms, "of_dense": ms / dense, "key_share": share}
                        row |= {"over_key_share": ms / dense / share, "peak_gib": lab.peak_gib(work, device)}
                        save("attention", row)
    if "steps" not in options.parts:
        return
    model = ltx2.build_ltx2(device, torch.bfloat16, 1 if options.small else BLOCKS)
    for sms, clip_number in STEP_CLIPS:
        clip = ltx2.Clip(65, 64, 64) if options.small else ltx2.CLIPS[clip_number]
        with throttled(sms if device == "cuda" else None):
            dense = 0.0
            patched = {name: patch(PACK, model, nodes) for name, nodes in step_settings().items()}
            if device == "cuda":
                patched[CORE] = like_core(model)
            for setting, ours in patched.items():
                if is_late("steps", sms, clip.name, setting):
                    continue
                try:
                    ms, peak = step_milliseconds(ours, clip, device, 1 if sms else options.repeats)
                    check_it_acts(setting, ours)
                except RuntimeError as error:
                    report["left_out"].append(f"steps, {sms}, {clip.name}, {setting}: {error}")
                    print(report["left_out"][-1], flush=True)
                    continue
                dense = ms if setting == "dense" else dense
                row = {"multiprocessors": sms, "grid": ltx2.size_of(clip.grid), "setting": setting}
                save("steps", row | {"ms": ms, "of_dense": ms / dense, "peak_gib": peak})


if __name__ == "__main__":
    main()
