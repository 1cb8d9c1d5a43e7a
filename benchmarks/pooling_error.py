"""What pooled far frames cost an attention call: error against dense on activations of the small trained model.

    python benchmarks/pooling_error.py             # on a CPU, some minutes
    python benchmarks/pooling_error.py --table

q, k and v of every block of the teacher at three of its 24 sigmas. Beside what the node does: groups that grow with distance,
and keys whose rotation is undone before they are pooled and done again at the mean position of their group, which the node
cannot do, for blocks are handed cosines and sines without the positions.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

from runtime import PACK  # isort: split

import lab
import results
import torch
from comfy.ldm.lightricks.model import apply_rotary_emb
from routing import CLIPS, STEPS, captured
from rows import DENSE, pooled_name
from sampling import GRID, sample_clips

from tiny_ltx.clips import draw_ids
from tiny_ltx.model import TEACHER_RECIPE, load_model

coarse, segments_of, tokens_of = (
    importlib.import_module(f"{PACK}.patches.kernels.{name}") for name in ("coarse", "segments", "tokens")
)
# near, pool, spatial
SETTINGS = ((1, 2, 1), (2, 2, 1), (1, 4, 1), (1, 2, 2))
BEYOND = 4
AS_IT_IS, GROWING, UNROTATED = "pooled", f"twice as long beyond ±{BEYOND}", "un-rotated before"


@contextmanager
def positions_of(model: Any) -> Iterator[dict[str, Any]]:
    """The positions that a sampling run of `model` gives its tokens, and how it makes rotations of positions."""
    inner, seen = model.model.diffusion_model, {}
    rotations = inner._prepare_positional_embeddings

    def noting(coordinates: torch.Tensor, frame_rate: Any, dtype: torch.dtype) -> Any:
        seen.update(at=coordinates[:1].float().clone(), rate=frame_rate, make=rotations)
        return rotations(coordinates, frame_rate, dtype)

    with mock.patch.object(inner, "_prepare_positional_embeddings", noting):
        yield seen


def pooled_unrotated(seen: dict[str, Any], keys: torch.Tensor) -> Callable[..., list[torch.Tensor]]:
    """Stands in for `Grid.pooled`: values as they are, `keys` at the mean positions of their groups."""
    pooled, rate = coarse.Grid.pooled, seen["rate"]
    rate = rate[:1] if isinstance(rate, torch.Tensor) else rate

    def rotation(at: torch.Tensor) -> Any:
        return seen["make"](at.clone(), rate, torch.float32)

    def stand_in(grid: Any, x: torch.Tensor) -> list[torch.Tensor]:
        if x is not keys:
            return pooled(grid, x)
        at = seen["at"]
        matrix, is_split = rotation(at)
        plain = apply_rotary_emb(x, (matrix.transpose(-1, -2).contiguous(), is_split))
        # Positions [1, 3, N, …] as tokens of a few numbers.
        means = pooled(grid, at.movedim(2, 1).flatten(2))
        out = []
        for means_BNC, key in zip(means, pooled(grid, plain), strict=True):
            middle = means_BNC.unflatten(2, (at.shape[1], *at.shape[3:])).movedim(1, 2)
            out.append(apply_rotary_emb(key, rotation(middle)))
        return out

    return stand_in


def segments(variant: str, tokens: Any, near: int, pool: int, spatial: int) -> Any:
    dense = segments_of.Segments.dense(tokens.total, tokens.total)
    if variant == GROWING:
        dense = coarse.coarsened(dense, tokens, BEYOND, 1, 2 * pool, spatial)
    return coarse.coarsened(dense, tokens, near, 1, pool, spatial)


def measure(frames: int) -> list[dict[str, Any]]:
    model = load_model()
    ids = draw_ids(CLIPS, torch.Generator().manual_seed(1000))
    with positions_of(model) as seen, captured(model, frames) as (watched, calls):
        sample_clips(PACK, watched, TEACHER_RECIPE, DENSE, ids, frames, seed=0)
    tokens, rows = tokens_of.VideoTokens.grid(frames, *GRID), []
    for setting in SETTINGS:
        for variant in (AS_IT_IS, GROWING, UNROTATED):
            seen_by = segments(variant, tokens, *setting)
            errors = sizes = 0.0
            for call in calls:
                q, k, v = call["qkv"]
                dense = attend(q, k, v, call["heads"], segments_of.Segments.dense(tokens.total, tokens.total))
                stand_in = pooled_unrotated(seen, k) if variant == UNROTATED else coarse.Grid.pooled
                with mock.patch.object(coarse.Grid, "pooled", stand_in):
                    out = attend(q, k, v, call["heads"], seen_by)
                errors += float((out - dense).square().sum())
                sizes += float(dense.square().sum())
            row = {"frames": frames, "setting": pooled_name(*setting), "variant": variant}
            row["error"] = (errors / sizes) ** 0.5
            row["keys"] = seen_by.pairs(range(tokens.total)) / tokens.total**2
            rows.append(row)
            print(row, flush=True)
    return rows


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, heads: int, seen: Any) -> torch.Tensor:
    return coarse.attend_merged(q, k, v, heads, None, range(q.shape[1]), seen)


def table(report: dict[str, Any]) -> str:
    """Markdown: relative error, and the share of keys in brackets."""
    variants = (AS_IT_IS, GROWING, UNROTATED)
    lines = []
    cells = {(row["frames"], row["setting"], row["variant"]): row for row in report["rows"]}
    for frames, setting in dict.fromkeys((row["frames"], row["setting"]) for row in report["rows"]):
        shown = [cells[frames, setting, variant] for variant in variants]
        figures = [f"{row['error']:.1%} ({row['keys']:.0%})" for row in shown]
        lines.append([str(frames), setting, *figures])
    return results.table(["latent frames", "setting", *variants], lines) + "\n"


def main() -> None:
    parser = results.asking(__doc__, "pooling_error", table=True)
    parser.add_argument("--frames", type=int, nargs="+", default=[13, 25])
    options = parser.parse_args()
    if options.table:
        report = results.read(options.out)
    else:
        report = {**lab.versions(), "clips": CLIPS, "steps": STEPS}
        with torch.inference_mode():
            report["rows"] = [row for frames in options.frames for row in measure(frames)]
        results.save(report, options.out)
    results.write_tables(options.out, {"": table(report)})
    print(table(report))


if __name__ == "__main__":
    main()
