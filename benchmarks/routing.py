"""Block-sparse attention: what an order that is compact in space and time saves, and what the kernel takes.

    python benchmarks/routing.py --part error     # on a CPU, 20 minutes: activations of the small trained model
    python benchmarks/routing.py --part gpu       # a GPU, with comfy-kitchen 0.2.40 or newer on PYTHONPATH
    python benchmarks/routing.py --part table

`error`: q, k and v of every block of the teacher at three of its 24 sigmas, in blocks of 16 and of 8, as its frames have 8 × 8 tokens.
`gpu`: one attention of LTX-2's size, 32 heads of 128 in bf16, on random data, whose best blocks are hardly better than the
others.
"""

from __future__ import annotations

import importlib
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from importlib.metadata import version
from itertools import product
from pathlib import Path
from typing import Any

from runtime import PACK  # isort: split

import lab
import numpy as np
import results
import torch
import torch.nn.functional as F
from einops import rearrange
from rows import DENSE
from sampling import GRID, sample_clips
from throttle import throttled
from torch.nn.attention import SDPBackend, sdpa_kernel

from tiny_ltx.clips import draw_ids
from tiny_ltx.model import TEACHER_RECIPE, load_model

routed = importlib.import_module(f"{PACK}.patches.kernels.routed")
VideoTokens = importlib.import_module(f"{PACK}.patches.kernels.tokens").VideoTokens

Settings = list[tuple[float, float]]
# (keep, threshold); keep 0: by threshold.
SETTINGS: Settings = [(keep, 0.0) for keep in (0.05, 0.1, 0.2, 0.3, 0.5)]
SETTINGS += [(0.0, threshold) for threshold in (0.25, 0.5, 0.75, 1.0, 1.3, 1.6)]

CLIPS, STEPS, SMALL_BLOCKS = 2, (4, 12, 20), (16, 8)
ROWS, COMPACT = "rows", "compact"
PLACE = ("block", "frames", "sink_frames")
# Frames, rows and columns of a block, by its tokens.
SHAPES = {16: ((1, 4, 4), (2, 2, 4), (4, 2, 2), (8, 1, 2)), 8: ((1, 2, 4), (4, 1, 2))}

HEADS, WIDTH = 32, 128
FRAMES, FRAME = (16, 31, 61), (22, 40)
TIMED: Settings = [
    (0.0, 0.5),
    (0.0, 0.75),
    (0.0, 1.0),
    (0.0, 1.3),
    (0.1, 0.0),
    (0.2, 0.0),
    (0.3, 0.0),
    (0.5, 0.0),
]
CORE = {"tau": 1.3, "token_aug": 256}


def name_of(keep: float, threshold: float) -> str:
    return f"keep {keep:g}" if keep else f"threshold {threshold:g}"


# Error on activations


@contextmanager
def captured(model: Any, frames: int) -> Iterator[tuple[Any, list[dict[str, Any]]]]:
    """A clone of the model and what its video self-attention is given, at `STEPS` and for the captions alone."""
    calls: list[dict[str, Any]] = []
    sigmas = torch.tensor(TEACHER_RECIPE.sigmas)
    tokens = frames * GRID[0] * GRID[1]

    def override(func: Any, q: Any, k: Any, v: Any, heads: int, *args: Any, **kwargs: Any) -> torch.Tensor:
        options = kwargs["transformer_options"]
        step = int((sigmas[:-1] - float(options["sigmas"][0])).abs().argmin())
        if step in STEPS and q.shape[1] == k.shape[1] == tokens:
            conds = options["cond_or_uncond"]
            given = [x.chunk(len(conds))[conds.index(0)].float().clone() for x in (q, k, v)]
            calls.append({"step": step, "heads": heads, "qkv": given})
        return func(q, k, v, heads, *args, **kwargs)

    yield lab.attending(model, override), calls


def orders(frames: int, sinks: int, block: int) -> dict[str, Any]:
    """Packings by name: frame-major, as the pack makes it, and all behind the sinks in blocks of one shape."""
    tokens = VideoTokens.grid(frames, *GRID)
    compact = routed.pack_tokens(tokens, *GRID, sinks, block)
    straight = torch.arange(tokens.total)
    rows = replace(compact, order=straight, places=straight, shape=(1, block // GRID[1], GRID[1]))
    out = {ROWS: rows, COMPACT: compact}
    if not sinks:
        return out
    first = compact.exact * block
    for shape in SHAPES[block]:
        order, _ = routed.tube_order((frames - sinks, *GRID), block, (0, 1, 2), *shape[:2])
        order = torch.cat([straight[:first], first + order])
        out["×".join(map(str, shape))] = replace(compact, order=order, places=order.argsort(), shape=shape)
    return out


def kept_share(packing: Any, exact: torch.Tensor) -> float:
    """Share of query-key pairs that are in blocks seen exactly."""
    sizes = routed.block_sizes(packing, exact.device).double()
    return float((exact * (sizes[:, None] * sizes)).sum((-1, -2)).mean() / packing.total**2)


def measure_errors(
    report: dict[str, Any], out: Path, lengths: tuple[int, ...], blocks: tuple[int, ...]
) -> None:
    """Replaces what the report has of these lengths and blocks."""
    model = load_model()
    ids = draw_ids(CLIPS, torch.Generator().manual_seed(1000))
    part: dict[str, Any] = {"rows": [], **report.get("error", {})}
    part |= {"model": "teacher", "clips": CLIPS, "steps": STEPS, **lab.versions()}
    report["error"] = part
    for frames in lengths:
        with captured(model, frames) as (watched, calls):
            sample_clips(PACK, watched, TEACHER_RECIPE, DENSE, ids, frames, seed=0)
        expected = len(STEPS) * len(model.model.diffusion_model.transformer_blocks)
        if len(calls) != expected:
            raise RuntimeError(f"expected {expected} calls of video self-attention, got {len(calls)}.")
        for block, sinks in product(blocks, (0, 1)):
            for name, packing in orders(frames, sinks, block).items():
                here = {"frames": frames, "block": block, "sink_frames": sinks, "order": name}
                part["rows"] = [row for row in part["rows"] if any(row[key] != here[key] for key in here)]
                found = [errors_of(call, packing) for call in calls]
                for setting in SETTINGS:
                    row = {**here, "keep": setting[0], "threshold": setting[1]}
                    row |= summed_up([each[setting] for each in found], [call["step"] for call in calls])
                    part["rows"].append(row)
                    print(f"{tuple(here.values())} {name_of(*setting)}: {row['kept']:.3f} {row['error']:.4f}")
                print(flush=True)
                results.save(report, out)


def summed_up(found: list[tuple[float, float, float]], steps: list[int]) -> dict[str, Any]:
    """Of many calls the mean of the share kept, and the relative error, of all and of each step."""

    def relative(step: int | None = None) -> float:
        errors, sizes, _ = zip(
            *(one for one, at in zip(found, steps, strict=True) if step in (None, at)), strict=True
        )
        return (sum(errors) / sum(sizes)) ** 0.5

    return {
        "kept": statistics.mean(kept for *_, kept in found),
        "error": relative(),
        "error_by_step": {step: relative(step) for step in STEPS},
    }


@torch.inference_mode()
def errors_of(call: dict[str, Any], packing: Any) -> dict[tuple[float, float], tuple[float, float, float]]:
    """Of one attention call, by setting: the squared error of its output, the squared size of that, the share kept."""
    q, k, v = (rearrange(packing.pack(x), "b n (h d) -> (b h) n d", h=call["heads"]) for x in call["qkv"])
    dense, out = F.scaled_dot_product_attention(q, k, v).double(), {}
    for setting, output, exact in attended(q, k, v, packing, SETTINGS):
        error = (output.double() - dense).square().sum()
        out[setting] = float(error), float(dense.square().sum()), kept_share(packing, exact)
    return out


def attended(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, packing: Any, settings: Settings
) -> Iterator[tuple[tuple[float, float], torch.Tensor, torch.Tensor]]:
    """What the reference gives for packed q, k and v [P, N, D], for many settings at little more than the price of one.

    The exponentials are the same for all of them. Also gives what is exact.
    """
    block, scale = packing.block, q.shape[-1] ** -0.5
    missing = packing.blocks * block - packing.total
    sizes = routed.block_sizes(packing, q.device)
    padded = (F.pad(x, (0, 0, 0, missing)) for x in (q, k, v))
    q_rows, k_rows, v_rows = (rearrange(x, "p (n s) d -> p n s d", s=block) for x in padded)
    middle = (k_rows.sum(2) / sizes[:, None]).mean(1)[:, None, None]
    near = torch.einsum("pisd,pjtd->pisjt", q_rows, k_rows - middle) * scale
    near[..., -1, block - missing :] = -torch.inf
    score = routed.route(q, k, scale, packing, *settings[0])[0]
    top = torch.maximum(near.amax((-1, -2)), score.amax(-1)[..., None])[..., None]
    weights = near.sub_(top[..., None]).exp_()
    far_weights = (score[:, :, None] - top).exp() * sizes
    values, means = v_rows.flatten(1, 2), v_rows.sum(2) / sizes[:, None]
    for setting in settings:
        exact = routed.route(q, k, scale, packing, *setting)[1]
        is_near = exact[:, :, None].to(q.dtype)
        near_part = (weights * is_near[..., None]).flatten(-2).flatten(1, 2)
        far_part = (far_weights * (1 - is_near)).flatten(1, 2)
        out = near_part @ values + far_part @ means
        out /= near_part.sum(-1, keepdim=True) + far_part.sum(-1, keepdim=True)
        yield setting, out[:, : packing.total], exact


def at_equal_error(rows: list[dict[str, Any]], by: str) -> list[dict[str, Any]]:
    """For every frame-major setting the share that the compact order keeps at that error, by interpolation.

    Shares are interpolated over errors, both in logarithms; None where the compact order was not measured at that error.
    """
    out = []
    for place, here in by_place(rows).items():
        lines: dict[str, list[dict[str, Any]]] = defaultdict(list)
        for row in here:
            if row[by]:
                lines[row["order"]].append(row)
        compact = sorted((np.log(row["error"]), np.log(row["kept"])) for row in lines[COMPACT])
        errors, shares = zip(*compact, strict=True)
        for row in lines[ROWS]:
            error = np.log(row["error"])
            is_within = errors[0] <= error <= errors[-1]
            kept = float(np.exp(np.interp(error, errors, shares))) if is_within else None
            entry = dict(zip(PLACE, place, strict=True))
            entry |= {by: row[by], "error": row["error"], "rows_keep": row["kept"], "compact_keeps": kept}
            out.append({**entry, "ratio": None if kept is None else kept / row["kept"]})
    return out


def by_place(rows: list[dict[str, Any]]) -> dict[tuple[int, ...], list[dict[str, Any]]]:
    """Rows that differ in order and setting only."""
    places: dict[tuple[int, ...], list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        places[tuple(row[name] for name in PLACE)].append(row)
    return dict(sorted(places.items(), reverse=True))


# Time of the kernel


def milliseconds(work: Callable[[], Any], device: str, least: float = 200, most: int = 20) -> float:
    """Median of single runs after one that warms up, so many as take `least` milliseconds, three at least."""
    work()
    times: list[float] = []
    while len(times) < 3 or (sum(times) < least and len(times) < most):
        times.append(lab.milliseconds(work, device))
    return statistics.median(times)


def peak_mib(work: Callable[[], Any], device: str) -> float | None:
    peak = lab.peak_gib(work, device)
    return None if peak is None else 1024 * peak


@torch.inference_mode()
def measure_times(
    report: dict[str, Any], out: Path, seconds: float, frames: tuple[int, ...], device: str
) -> None:
    begun = time.monotonic()
    is_gpu = device == "cuda"
    reason = routed.why_not(torch.device(device), torch.bfloat16, WIDTH)
    # On a CPU the package's slow form shows whether this script runs.
    if is_gpu and reason is not None:
        raise RuntimeError(
            f"the kernel does not run here ({reason}). Put comfy-kitchen 0.2.40 or newer on PYTHONPATH and take a GPU "
            "of compute capability 8.0 or newer."
        )
    part: dict[str, Any] = {
        **lab.machine(device),
        "kitchen": version("comfy-kitchen"),
        "heads": HEADS,
        "width": WIDTH,
        "dtype": "bfloat16",
        "sink_frames": 1,
        "check": check_kernel(device),
        "rows": [],
        "left_out": [],
    }
    report["gpu"] = part
    for multiprocessors, count in product((8, None) if is_gpu else (None,), frames):
        tokens = VideoTokens.grid(count, *FRAME)
        packing = routed.pack_tokens(tokens, *FRAME, 1).on(device)
        q, k, v = (
            torch.randn(1, tokens.total, HEADS * WIDTH, device=device, dtype=torch.bfloat16) for _ in range(3)
        )
        works: list[tuple[str, dict[str, Any], Callable[[], Any]]] = [
            ("flash", {}, lambda q=q, k=k, v=v: flash(q, k, v)),
            ("frame-major, as core", dict(CORE), lambda q=q, k=k, v=v: as_core(q, k, v)),
            (
                "order and back",
                {},
                lambda q=q, k=k, v=v, p=packing: (p.pack(q), p.pack(k), p.pack(v), p.unpack(q)),
            ),
        ]
        for (keep, threshold), extra in [*((s, 0) for s in TIMED), ((0.0, 1.3), 256)]:
            settings = (keep, threshold, extra)
            works.append(
                (
                    "packed",
                    {"keep": keep, "threshold": threshold, "extra_tokens": extra},
                    lambda q=q, k=k, v=v, p=packing, s=settings: routed.attend_routed(
                        q, k, v, HEADS, None, p, *s
                    ),
                )
            )
        with throttled(multiprocessors):
            for name, settings, work in works:
                row = {
                    "multiprocessors": multiprocessors,
                    "frames": count,
                    "tokens": tokens.total,
                    "name": name,
                }
                row |= settings
                if time.monotonic() - begun > seconds:
                    part["left_out"].append(row)
                    continue
                row["ms"] = milliseconds(work, device)
                row["peak_mib"] = peak_mib(work, device)
                if name == "packed":
                    row["kept"] = kept_of(q, k, packing, settings["keep"], settings["threshold"])
                    row["pairs"] = packing.pairs(settings["keep"])
                part["rows"].append(row)
                print(row, flush=True)
                results.save(report, out)
    part["seconds"] = time.monotonic() - begun
    results.save(report, out)


def flash(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION if q.is_cuda else SDPBackend.MATH):
        split = [x.unflatten(-1, (HEADS, WIDTH)).transpose(1, 2) for x in (q, k, v)]
        return F.scaled_dot_product_attention(*split).transpose(1, 2).flatten(2)


def as_core(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """As core's node calls it on a model whose layout it does not know."""
    from comfy_kitchen import sol_attn

    return sol_attn(*(x.unflatten(-1, (HEADS, WIDTH)) for x in (q, k, v)), **CORE).flatten(2)


def kept_of(q: torch.Tensor, k: torch.Tensor, packing: Any, keep: float, threshold: float) -> float:
    """Share kept, by the reference's routing on the data of this call, four heads of it."""
    rows = [
        rearrange(packing.pack(x)[..., : 4 * WIDTH], "b n (h d) -> (b h) n d", h=4).float() for x in (q, k)
    ]
    return kept_share(packing, routed.route(*rows, WIDTH**-0.5, packing, keep, threshold)[1])


def check_kernel(device: str) -> list[dict[str, Any]]:
    """Relative errors of kernel against reference, and of both against dense, on data that is smooth in the grid."""
    tokens = VideoTokens.grid(5, 18, 26, guides=70)
    packing = routed.pack_tokens(tokens, 18, 26, 1).on(device)
    generator = torch.Generator(device).manual_seed(0)
    coarse = torch.randn(3, 4 * WIDTH, 3, 5, 7, device=device, generator=generator)
    smooth = F.interpolate(coarse, (5, 18, 26), mode="trilinear").flatten(2).mT
    given = 2 * torch.cat([smooth, torch.randn(3, 70, 4 * WIDTH, device=device, generator=generator)], 1)
    q, k, v = (x[None] for x in given.bfloat16())
    split = [x.double().unflatten(-1, (4, WIDTH)).transpose(1, 2) for x in (q, k, v)]
    dense = F.scaled_dot_product_attention(*split).transpose(1, 2).flatten(2)
    out = []
    for keep, threshold in [(0.1, 0.0), (0.3, 0.0), (0.0, 1.0), (0.0, -1e9)]:
        args = (4, None, packing, keep, threshold)
        kernel = routed.attend_routed(q, k, v, *args, 0).double()
        reference = routed.attend_reference(q, k, v, *args).double()
        row = {"keep": keep, "threshold": threshold}
        row["kernel_to_reference"] = float((kernel - reference).norm() / reference.norm())
        row["kernel_to_dense"] = float((kernel - dense).norm() / dense.norm())
        row["reference_to_dense"] = float((reference - dense).norm() / dense.norm())
        out.append(row)
        print(row, flush=True)
    return out


# Tables


def tables(report: dict[str, Any]) -> str:
    out: list[str] = []
    if "error" in report:
        out += error_tables(report["error"])
    if "gpu" in report:
        out += time_tables(report["gpu"])
    return "\n".join(out) + "\n"


def error_tables(part: dict[str, Any]) -> list[str]:
    out = [
        "## Error against dense on activations of the teacher",
        "",
        "Of the attention's output, relative; in brackets the share of query-key pairs in blocks that are seen exactly, sinks",
        "and neighbours included. Rows: frame-major, two rows of a frame (16 tokens) or one (8). Compact: as the pack orders.",
        "",
        "### Share kept at equal error",
        "",
    ]
    head = ["block", "latent frames", "sinks", "frame-major", "error", "keeps", "compact keeps", "of that"]
    lines = []
    for by in ("keep", "threshold"):
        for entry in part["at_equal_error"][by]:
            kept, ratio = entry["compact_keeps"], entry["ratio"]
            lines.append(
                [
                    *(str(entry[name]) for name in PLACE),
                    f"{by} {entry[by]:g}",
                    f"{entry['error']:.4f}",
                    f"{entry['rows_keep']:.1%}",
                    "–" if kept is None else f"{kept:.1%}",
                    "–" if ratio is None else f"{ratio:.0%}",
                ]
            )
    out += [results.table(head, lines), ""]
    for (block, frames, sinks), here in by_place(part["rows"]).items():
        names = list(dict.fromkeys(row["order"] for row in here))
        found = {(row["order"], row["keep"], row["threshold"]): row for row in here}
        lines = []
        for setting in SETTINGS:
            shown = [found.get((name, *setting)) for name in names]
            cells = ["–" if row is None else f"{row['error']:.4f} ({row['kept']:.1%})" for row in shown]
            lines.append([name_of(*setting), *cells])
        out += [f"### Blocks of {block}, {frames} latent frames, {sinks} sink frames: error (kept)", ""]
        out += [results.table(["", *names], lines), ""]
    return out


def time_tables(part: dict[str, Any]) -> list[str]:
    out = [f"## One attention of {part['heads']} × {part['width']} in bf16 on {part['gpu']}", ""]
    rows = part["rows"]
    frames = sorted({row["frames"] for row in rows})
    for multiprocessors in dict.fromkeys(row["multiprocessors"] for row in rows):
        here = [row for row in rows if row["multiprocessors"] == multiprocessors]
        flash_ms = {row["frames"]: row["ms"] for row in here if row["name"] == "flash"}
        lines: dict[str, dict[int, str]] = defaultdict(dict)
        for row in here:
            label = row["name"]
            if label == "packed":
                label += f", {name_of(row['keep'], row['threshold'])}"
                label += f", {row['extra_tokens']} extra tokens" if row["extra_tokens"] else ""
            cell = f"{row['ms']:.1f} ms ({row['ms'] / flash_ms[row['frames']]:.0%})"
            lines[label][row["frames"]] = cell + (f", kept {row['kept']:.0%}" if "kept" in row else "")
        out += [f"### {f'{multiprocessors} multiprocessors' if multiprocessors else 'the full card'}", ""]
        head = ["", *(f"{count}×{FRAME[0] * FRAME[1]}" for count in frames)]
        cells_of = [[label, *(cells.get(c, "–") for c in frames)] for label, cells in lines.items()]
        out += [results.table(head, cells_of), ""]
    out += ["### Kernel and reference", ""]
    head = ["", "kernel to reference", "kernel to dense", "reference to dense"]
    lines_of_check = [
        [name_of(row["keep"], row["threshold"]), *(f"{row[k]:.4f}" for k in row if "_to_" in k)]
        for row in part["check"]
    ]
    return [*out, results.table(head, lines_of_check), ""]


def main() -> None:
    # Time and device are those of the part gpu; --device cpu for a look, with --frames 2.
    parser = results.asking(__doc__, "routing", seconds=90, device="cuda")
    parser.add_argument("--part", choices=("error", "gpu", "table"), default="error")
    parser.add_argument("--frames", type=int, nargs="+", help="latent frames, fewer for a look")
    parser.add_argument("--blocks", type=int, nargs="+", choices=SMALL_BLOCKS, default=SMALL_BLOCKS)
    options = parser.parse_args()
    report = results.read(options.out, {})
    if options.part == "error":
        measure_errors(report, options.out, tuple(options.frames or (13, 25)), tuple(options.blocks))
    if options.part == "gpu":
        measure_times(
            report,
            options.out,
            options.seconds,
            tuple(options.frames or FRAMES),
            options.device,
        )
    if "error" in report:
        report["error"]["at_equal_error"] = {
            by: at_equal_error(report["error"]["rows"], by) for by in ("keep", "threshold")
        }
    results.save(report, options.out)
    results.write_tables(options.out, {"": tables(report)})
    print(tables(report))


if __name__ == "__main__":
    main()
