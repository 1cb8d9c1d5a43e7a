"""FLOPs of whole two-stage runs at LTX-2 size, as a share of the full one."""

from __future__ import annotations

import statistics
from typing import Any

import ltx2
from price import PriceList
from quality import price_stage
from two_stage_rows import DENSE, REFINER
from two_stage_runs import recipe_of

from tiny_ltx.model import STUDENT_RECIPE, TRANSFORMER_CONFIG

# The standard run: half the size, then full size.
PRICED = tuple((ltx2.Clip(frames, 640, 352), ltx2.Clip(frames, 1280, 704)) for frames in (121, 241))


def price_rows(pack: str, report: dict[str, Any]) -> None:
    """Steps and blocks that ran and all decoding and encoding; the upscaler and the search for motion are not in it."""
    prices = PriceList(pack, TRANSFORMER_CONFIG["num_layers"], report["flops_of_a_forward"])
    for entry in report["rows"]:
        passes = 1 if entry["base"] == REFINER else 2
        entry["cost"] = {}
        for small, large in PRICED:
            totals = [
                price(prices, small, large, entry["definition"], stages, passes) for stages in entry["runs"]
            ]
            steps = full_steps(entry["base"])
            dense = price(prices, small, large, DENSE.definition, steps, passes)
            entry["cost"][f"{large.frames} f"] = statistics.mean(totals) / dense


def full_steps(base: str) -> dict[str, Any]:
    """What the samplers of the full run of this model do."""
    counts = {"first": STUDENT_RECIPE, "second": recipe_of(base, DENSE.sigmas)}
    return {
        name: {"executed": list(range(len(recipe.sigmas) - 1)), "covered": {}}
        for name, recipe in counts.items()
    }


def price(
    prices: PriceList,
    small: ltx2.Clip,
    large: ltx2.Clip,
    definition: dict[str, Any],
    stages: dict[str, Any],
    passes: int,
) -> float:
    """FLOPs of one run. passes: forwards a step of the second stage takes; the first one runs without CFG."""
    first, second = definition["first"], definition["second"]
    total = price_stage(prices, strided(small, first), (), stages["first"])
    if second > first:
        total += prices.vae(strided(small, first), "decode") + prices.vae(strided(small, second), "encode")
    if "second" in stages:
        total += passes * price_stage(prices, strided(large, second), definition["nodes"], stages["second"])
    total += prices.vae(strided(large, second), "decode")
    if "again" in stages:
        total += prices.vae(large, "encode") + prices.vae(large, "decode")
        total += passes * price_stage(prices, large, (), stages["again"])
    return total


def strided(clip: ltx2.Clip, stride: int) -> ltx2.Clip:
    return clip if stride == 1 else clip.strided(stride)
