"""Times whole runs with ScheduleSpatialFreeze against dense at LTX-2 size on one GPU, and what it keeps where.

    python benchmarks/freeze.py [--out FILE] [--seconds 480]

LTXAVModel with 48 blocks and random bf16 weights, Euler, no CFG: 24 steps of LTXVScheduler's curve, and the 8
distilled sigmas. Rows of an earlier FILE are kept where they are not measured anew. Every clip starts with a warm-up
step and a dense run. What keeps values in host memory runs twice: as users have it, and with that memory asked for
beforehand; the hidden share of the transfers is 1 - (time of the latter over that with the GPU's memory) / (time that
the copies take alone). That is a lower bound: what is left of page-locking counts as time, and where steps freeze from
the start so does waiting for the memory. First of all a run is interrupted in a frozen step, and what is then
allocated is compared with what was before it.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import math
import time
from collections import Counter
from collections.abc import Iterator
from typing import Any
from unittest import mock

from runtime import PACK  # isort: split

import comfy.model_management as mm
import comfy.sample
import comfy.samplers
import lab
import ltx2
import results
import torch
from comfy.patcher_extension import WrappersMP
from rows import ATTENTION, BLOCKS, WORK, scheduled_for
from sampling import patch

from tiny_ltx.model import STUDENT_RECIPE

LONG, SHORT = {"start_percent": 0.4, "refresh_every": 3}, {"start_percent": 0.2, "refresh_every": 2}
WIDE, WHOLE = {"start_percent": 0.2, "refresh_every": 3}, {"start_percent": 0.0, "refresh_every": 2}
SHARED = {"end_percent": 1.0, "blocks_kept": 0, "cache_limit_gb": 0.0, "cache_dtype": "default"}
# What was run; an earlier row of the same setting gives way to a new one.
SETTING = ("clip", "steps", "scope", "forecast", "cache_device", *SHARED, *LONG)


def setting(scope: str, forecast: str, device: str, when: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {**SHARED, **when, "scope": scope, "forecast": forecast, "cache_device": device, **more}


SCOPES = (ATTENTION, WORK, BLOCKS)
PACKED = {"cache_dtype": "fp8_e4m3fn"}
# (clip of ltx2.py, steps, settings), most telling first. What lies in host memory comes behind its twin on the GPU.
PLAN: tuple[tuple[int, int, tuple[dict[str, Any], ...]], ...] = (
    *(
        (
            clip,
            24,
            (
                setting(BLOCKS, "linear", "gpu", WIDE),
                setting(BLOCKS, "linear", "cpu", WIDE),
                setting(BLOCKS, "linear", "gpu", WIDE, **PACKED),
                setting(BLOCKS, "linear", "cpu", WIDE, **PACKED),
                setting(BLOCKS, "linear", "gpu", LONG),
                setting(BLOCKS, "linear", "cpu", LONG),
                setting(BLOCKS, "linear", "gpu", SHORT),
                setting(WORK, "linear", "gpu", LONG),
                setting(WORK, "linear", "cpu", LONG),
                setting(ATTENTION, "hold", "gpu", LONG),
            ),
        )
        for clip in (1, 0)
    ),
    *(
        (
            clip,
            8,
            (
                setting(BLOCKS, "linear", "gpu", WHOLE),
                setting(BLOCKS, "linear", "cpu", WHOLE),
                setting(BLOCKS, "linear", "gpu", SHORT),
                setting(WORK, "linear", "gpu", SHORT),
                setting(ATTENTION, "hold", "gpu", SHORT),
            ),
        )
        for clip in (1, 0)
    ),
)


def run(model: Any, clip: ltx2.Clip, sigmas: tuple[float, ...], device: str) -> dict[str, float]:
    """Seconds and peak GiB above the weights of one sampler."""
    latent = ltx2.empty(clip, "cpu")
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    begun = time.perf_counter()
    comfy.sample.sample_custom(
        model,
        ltx2.noise(clip, "cpu"),
        1.0,
        comfy.samplers.sampler_object("euler"),
        torch.tensor(sigmas),
        ltx2.conditioning(device),
        ltx2.conditioning(device),
        latent,
        disable_pbar=True,
        seed=0,
    )
    if device != "cuda":
        return {"seconds": time.perf_counter() - begun, "peak_gib": 0.0}
    torch.cuda.synchronize()
    seconds = time.perf_counter() - begun
    weights = sum(p.nbytes for p in model.model.parameters() if p.is_cuda)
    return {"seconds": seconds, "peak_gib": (torch.cuda.max_memory_allocated() - weights) / 2**30}


def bandwidth() -> float:
    """Bytes a second from pinned host memory to the GPU."""
    host = torch.empty(2**28, dtype=torch.uint8, pin_memory=True)
    host.to("cuda", non_blocking=True)
    torch.cuda.synchronize()
    begun = time.perf_counter()
    for _ in range(8):
        host.to("cuda", non_blocking=True)
    torch.cuda.synchronize()
    return 8 * host.nbytes / (time.perf_counter() - begun)


@contextlib.contextmanager
def asked_beforehand(sizes: Counter[int]) -> Iterator[None]:
    """That many pieces of host memory of these bytes are asked for before the runs within, and stay until they are done."""
    store = importlib.import_module(f"{PACK}.patches.reuse.store")
    memory = store.PinnedMemory()
    for size, count in sizes.items():
        memory.grow(memory.size + count * size, size)
    with (
        contextlib.closing(memory),
        mock.patch.object(store, "PinnedMemory", lambda: memory),
        mock.patch.object(memory, "close", lambda: None),
    ):
        yield


@contextlib.contextmanager
def noting_pieces(sizes: Counter[int]) -> Iterator[None]:
    """Counts the pieces of host memory that the runs within take, by their bytes."""
    memory = importlib.import_module(f"{PACK}.patches.reuse.pinned").PinnedMemory
    take = memory.take

    def noted(self: Any, size: int) -> torch.Tensor:
        sizes[size] += 1
        return take(self, size)

    with mock.patch.object(memory, "take", noted):
        yield


def interrupted(patched: Any, clip: ltx2.Clip, sigmas: tuple[float, ...], device: str) -> dict[str, float]:
    """GiB allocated on the GPU before a run, in its first frozen step, and after the interrupt that comes there."""

    def allocated() -> float:
        gc.collect()
        return torch.cuda.memory_allocated() / 2**30 if device == "cuda" else 0.0

    found = {"before": allocated()}
    (technique,) = importlib.import_module(f"{PACK}.patches.mount").plan_of(patched)
    to_sigma = patched.get_model_object("model_sampling").percent_to_sigma
    clock = importlib.import_module(f"{PACK}.patches.clock").SigmaClock(sigmas, to_sigma)
    first = technique.acting_steps(clock)[0]

    def stop(executor: Any, *args: Any, **kwargs: Any) -> Any:
        options = next(given for given in (*args, *kwargs.values()) if isinstance(given, dict))
        if clock.step_at(float(options["sigmas"][0])) == first:
            found["within"] = allocated()
            raise mm.InterruptProcessingException
        return executor(*args, **kwargs)

    patched = patched.clone()
    patched.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, "interrupt", stop)
    with contextlib.suppress(mm.InterruptProcessingException):
        run(patched, clip, sigmas, device)
    return {**found, "after": allocated()}


def main() -> None:
    parser = results.asking(__doc__, "freeze", seconds=480, device="cuda")
    parser.add_argument("--blocks", type=int, default=ltx2.BLOCKS, help="fewer for a look on a CPU")
    options = parser.parse_args()
    begin = time.monotonic()
    model = ltx2.build_ltx2(options.device, blocks=options.blocks)
    journal_of = importlib.import_module(f"{PACK}.patches.mount").journal_of
    bytes_a_second = bandwidth() if options.device == "cuda" else None
    ground = {**lab.machine(options.device), "bytes_a_second": bytes_a_second}
    report: dict[str, Any] = {"gib_around_an_interrupt": {}, "rows": []}
    report |= results.read(options.out, {})
    with torch.inference_mode():
        clip = ltx2.CLIPS[0]
        sigmas = scheduled_for(math.prod(clip.grid))
        run(model, clip, sigmas[-2:], options.device)
        for place in ("gpu", "cpu"):
            patched = patch(PACK, model, [("ScheduleSpatialFreeze", setting(BLOCKS, "linear", place, SHORT))])
            report["gib_around_an_interrupt"][place] = interrupted(patched, clip, sigmas, options.device)
        print(report["gib_around_an_interrupt"], flush=True)
        for index, steps, settings in PLAN:
            clip = ltx2.CLIPS[index]
            tokens = math.prod(clip.grid)
            sigmas = STUDENT_RECIPE.sigmas if steps == 8 else scheduled_for(tokens, steps)
            if time.monotonic() - begin > options.seconds:
                break
            run(model, clip, sigmas[-2:], options.device)
            dense = run(model, clip, sigmas, options.device)
            for chosen in settings:
                if time.monotonic() - begin > options.seconds:
                    break
                patched = patch(PACK, model, [("ScheduleSpatialFreeze", chosen)])
                pieces: Counter[int] = Counter()
                with noting_pieces(pieces):
                    figures = run(patched, clip, sigmas, options.device)
                asked = None
                if pieces:
                    with asked_beforehand(pieces):
                        asked = run(patched, clip, sigmas, options.device)["seconds"]
                technique = journal_of(patched).records()[-1]["techniques"]["spatial freeze"]
                row = {
                    "clip": clip.name,
                    "steps": steps,
                    **chosen,
                    **figures,
                    "dense_seconds": dense["seconds"],
                    "dense_peak_gib": dense["peak_gib"],
                    "seconds_asked_beforehand": asked,
                    "of_dense": figures["seconds"] / dense["seconds"],
                    "frozen_steps": len(technique["steps"]),
                    "taken": technique["taken"],
                    "declined": technique["declined"],
                    "cache_gib": technique["cache_gib"],
                    **ground,
                }
                report["rows"] = sorted(results.latest([*report["rows"], row], *SETTING), key=place_of)
                print(row, flush=True)
                results.save(report, options.out)
    results.write_tables(options.out, {"": table(report)})
    print(table(report))


def setting_of(row: dict[str, Any]) -> dict[str, Any]:
    return {key: row[key] for key in SETTING}


def place_of(row: dict[str, Any]) -> tuple[Any, ...]:
    """Large clips first, and what is kept where behind the other settings."""
    names = [clip.name for clip in ltx2.CLIPS]
    return (
        *(-names.index(row["clip"]), -row["steps"], -SCOPES.index(row["scope"])),
        *(row["start_percent"], row["refresh_every"], row["cache_device"] == "cpu", row["cache_dtype"]),
    )


def hidden(row: dict[str, Any], report: dict[str, Any]) -> float | None:
    """The share of the transfers between GPU and host that other work hid; None without any or without a twin."""
    wanted = {**setting_of(row), "cache_device": "gpu"}
    twin = next(
        (old for old in report["rows"] if setting_of(old) == wanted and old["gpu"] == row["gpu"]), None
    )
    kept, seconds = row["cache_gib"].get("cpu", 0.0), row.get("seconds_asked_beforehand")
    if twin is None or not kept or not seconds:
        return None
    full = kept * 2**30 / (2 if row["forecast"] == "linear" else 1)
    # Each frozen step fetches everything; the full steps within the range (every refresh_every-th) write one value.
    writes = math.ceil(row["frozen_steps"] / (row["refresh_every"] - 1)) + (row["forecast"] == "linear")
    moved = row["frozen_steps"] * kept * 2**30 + writes * full
    alone = moved / row["bytes_a_second"]
    return 1 - max(0.0, seconds - twin["seconds"]) / alone


def table(report: dict[str, Any]) -> str:
    """Markdown, one row per setting."""
    head = ("clip, steps", "setting", "frozen steps", "time of dense", "on", "kept", "peak above dense")
    lines = []
    for row in report["rows"]:
        kept = ", ".join(
            f"{size:.1f} GiB {'on the GPU' if place == 'gpu' else 'in host memory'}"
            for place, size in row["cache_gib"].items()
        )
        share = hidden(row, report)
        cells = [
            f"{row['clip']}, {row['steps']}",
            f"{row['scope']}, {row['forecast']}, from {row['start_percent']:g}, every {row['refresh_every']}."
            + (", fp8" if row["cache_dtype"] == "fp8_e4m3fn" else ""),
            f"{row['frozen_steps']}",
            f"{row['of_dense']:.0%} of {row['dense_seconds']:.1f} s",
            row["gpu"].removeprefix("NVIDIA ").split()[0],
            kept,
            f"{row['peak_gib'] - row['dense_peak_gib']:+.2f} GiB",
            "–" if share is None else f"{max(share, 0):.0%}",
        ]
        lines.append(cells)
    return results.table([*head, "transfers hidden, at least"], lines) + "\n"


if __name__ == "__main__":
    main()
