"""Attention in other types than the model's: how far off it is, and what it takes in time and memory.

    python benchmarks/precision.py --part error [--out FILE]                       # on a CPU, a minute
    python benchmarks/precision.py --part gpu [--out FILE] [--seconds 85]          # on a GPU with 40 GB or more
    python benchmarks/precision.py --part gpu --device cpu --clips 17x96x64        # for a look
    python benchmarks/precision.py --table                                         # only writes the tables again

error: q, k and v of every video attention of the tiny teacher's blocks, from a run in fp32 at a few sigmas, as they are and
with values 1e5 and 1e6 times as large; the output against float64. Root mean square of the difference as a share of that of
the output: the middle one of all calls, and the worst.

gpu: attention alone, and a step of LTXAVModel of LTX-2's width with a few blocks, random weights, without CFG; first on eight
multiprocessors (`throttle.py`), which is a laptop's share, then on the whole card. Attention alone goes through the pack's
kernel, casts and the count of results that are not finite included; "own" is plain attention in the type of the inputs. A
time is the median of up to three after one more; where one takes longer than a second, it is that one. Peak memory is
what lies above inputs and weights.
"""

from __future__ import annotations

import importlib
import math
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import runtime  # isort: split

import comfy.ldm.modules.attention as attention
import lab
import ltx2
import results
import torch
from overhead import Ticks
from sampling import draw_noise, patch, sample_stage
from throttle import throttled

from tiny_ltx.captions import CAPTION_TOKENS
from tiny_ltx.model import TEACHER_RECIPE, load_model

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
OWN = "own"
ROLES = ("self", "text")
SIZES = (1.0, 1e5, 1e6)
SIGMAS = 4
HEADS, WIDTH = 32, 4096
LAPTOP = 8

kernel = importlib.import_module(f"{runtime.PACK}.patches.kernels.precision")


def attend(heads: int) -> Callable[..., torch.Tensor]:
    return lambda q, k, v, mask: attention.attention_pytorch(q, k, v, heads, mask=mask)


class Captured:
    """Inputs of the video attention of every block in some steps of a run of the tiny teacher in float32."""

    def __init__(self, clips: int, frames: int) -> None:
        self.calls: list[
            tuple[str, float, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None, int]
        ] = []
        sigmas = TEACHER_RECIPE.sigmas
        self.kept = [sigmas[round(i * (len(sigmas) - 2) / (SIGMAS - 1))] for i in range(SIGMAS)]
        noise = draw_noise(clips, frames, 0)
        ids = torch.zeros(clips, CAPTION_TOKENS, dtype=torch.int64)
        ids[:, 0] = torch.arange(clips) % 4
        model = lab.attending(load_model(), self.keep)
        start = torch.zeros_like(noise)
        sample_stage(runtime.PACK, model, TEACHER_RECIPE, (), ids, sigmas, noise, start, 0)

    def __deepcopy__(self, memo: dict[int, Any]) -> Captured:
        return self

    def keep(
        self, func: Any, q: Any, k: Any, v: Any, heads: int, mask: Any = None, **kwargs: Any
    ) -> torch.Tensor:
        sigma = float(kwargs["transformer_options"]["sigmas"][0])
        if any(math.isclose(sigma, kept, rel_tol=1e-4) for kept in self.kept):
            role = "self" if q.shape[1] == k.shape[1] else "text"
            self.calls.append((role, sigma, q, k, v, mask, heads))
        out: torch.Tensor = func(q, k, v, heads, mask=mask, **kwargs)
        return out


def errors(clips: int, frames: int) -> dict[str, Any]:
    captured = Captured(clips, frames)
    largest = {
        name: max(float(call[index].abs().max()) for call in captured.calls)
        for index, name in ((2, "q"), (3, "k"), (4, "v"))
    }
    rows = []
    for role in ROLES:
        calls = [call for call in captured.calls if call[0] == role]
        for size in SIZES:
            found: dict[str, list[float]] = {name: [] for name in DTYPES}
            plain: list[bool] = []
            for _, _, q, k, v, mask, heads in calls:
                exact = kernel.attend_in_float64(q, k, v * size, mask, heads)
                for name, dtype in DTYPES.items():
                    out, is_broken = kernel.attend_in(dtype, attend(heads), q, k, v * size, mask)
                    assert not bool(is_broken), (role, size, name)
                    found[name].append(
                        float((out - exact).square().mean().sqrt() / exact.square().mean().sqrt())
                    )
                half = attend(heads)(
                    q.half(), k.half(), (v * size).half(), kernel.cast_mask(mask, torch.float16)
                )
                plain.append(bool(half.isfinite().all()))
            rows += [
                {
                    "attention": role,
                    "values_times": size,
                    "setting": name,
                    "calls": len(calls),
                    "median": statistics.median(found[name]),
                    "worst": max(found[name]),
                    **({"finite_without_scaling": sum(plain)} if name == "fp16" else {}),
                }
                for name in DTYPES
            ]
    return {
        "clips": clips,
        "latent_frames": frames,
        "sigmas": captured.kept,
        "largest": largest,
        "rows": rows,
    }


class Gpu:
    """Measures what there is time for, the most telling first, and saves as it goes."""

    def __init__(
        self, device: str, clips: list[ltx2.Clip], blocks: int, seconds: float, save: Callable[..., None]
    ):
        self.device, self.clips, self.blocks = device, clips, blocks
        self.end, self.save = time.monotonic() + seconds, save
        self.is_cuda = device == "cuda"
        self.report: dict[str, Any] = {
            **lab.machine(device),
            "blocks": blocks,
            "text_tokens": ltx2.TEXT_TOKENS,
            "attention": [],
            "steps": [],
            "left_out": [],
        }

    def measure(self) -> dict[str, Any]:
        for multiprocessors in (LAPTOP, None):
            try:
                with throttled(multiprocessors if self.is_cuda else None):
                    for clip in self.clips:
                        self.attention(clip, multiprocessors)
            except (ImportError, RuntimeError) as error:
                self.report["left_out"].append(f"{multiprocessors} multiprocessors, attention: {error}")
        for own in ("bf16", "fp32"):
            model = ltx2.build_ltx2(self.device, DTYPES[own], self.blocks)
            for multiprocessors in (LAPTOP, None):
                try:
                    with throttled(multiprocessors if self.is_cuda else None):
                        for clip in self.clips:
                            self.steps(model, own, clip, multiprocessors)
                except (ImportError, RuntimeError) as error:
                    self.report["left_out"].append(f"{multiprocessors} multiprocessors, steps: {error}")
            del model
            self.free()
        return self.report

    def settings(self, own: str) -> Iterator[str]:
        yield OWN
        yield from (name for name in DTYPES if name != own)

    def is_late(self, expected: float, *what: Any) -> bool:
        if time.monotonic() + expected < self.end:
            return False
        self.report["left_out"].append(", ".join(map(str, what)))
        return True

    def attention(self, clip: ltx2.Clip, multiprocessors: int | None) -> None:
        frames, rows, columns = clip.grid
        tokens = frames * rows * columns
        for role in ROLES:
            keys = tokens if role == "self" else ltx2.TEXT_TOKENS
            for own, dtype in DTYPES.items():
                if own == "fp16":
                    continue
                torch.manual_seed(0)
                q = torch.randn(1, tokens, WIDTH, device=self.device, dtype=dtype)
                k, v = (torch.randn(1, keys, WIDTH, device=self.device, dtype=dtype) for _ in range(2))
                for setting in self.settings(own):
                    what = clip.name, multiprocessors, f"{role} of a {own} model", setting
                    if self.is_late(self.guess(tokens * keys, multiprocessors), *what):
                        continue

                    def once(setting: str = setting, q: Any = q, k: Any = k, v: Any = v) -> Any:
                        if setting == OWN:
                            return attend(HEADS)(q, k, v, None)
                        return kernel.attend_in(DTYPES[setting], attend(HEADS), q, k, v, None)

                    milliseconds, peak = self.timed(once)
                    self.add(
                        "attention", clip, multiprocessors, own, setting, milliseconds, peak, attention=role
                    )
                del q, k, v

    def guess(self, pairs: int, multiprocessors: int | None) -> float:
        """Seconds of one call, at the rate of float32 on eight multiprocessors or on all."""
        return 2 * 4 * pairs * WIDTH / (2e12 if multiprocessors and self.is_cuda else 3e13)

    def timed(self, once: Callable[[], Any]) -> tuple[float, float]:
        """Milliseconds and GiB above what was there."""
        self.free()
        before = self.peak()
        found = [self.seconds(once)]
        peak = self.peak() - before
        while found[0] < 1 and len(found) < 4:
            found.append(self.seconds(once))
        return 1000 * statistics.median(found[1:] or found), peak / 2**30

    def seconds(self, once: Callable[[], Any]) -> float:
        self.wait()
        begin = time.perf_counter()
        once()
        self.wait()
        return time.perf_counter() - begin

    def steps(self, model: Any, own: str, clip: ltx2.Clip, multiprocessors: int | None) -> None:
        frames, rows, columns = clip.grid
        tokens = frames * rows * columns
        for setting in self.settings(own):
            # Of a bf16 model, only what its attention costs in the other half type: stock is the point.
            if own == "bf16" and setting == "fp32" and multiprocessors:
                continue
            linear = 2 * 2.7e8 * tokens / (2e12 if multiprocessors and self.is_cuda else 3e13)
            expected = 2 * self.blocks * (self.guess(tokens * tokens, multiprocessors) + linear)
            if self.is_late(
                expected if own == "fp32" else expected / 5,
                clip.name,
                multiprocessors,
                f"step of a {own} model",
                setting,
            ):
                continue
            nodes = (
                []
                if setting == OWN
                else [("ThriftAttentionPrecision", {"self_attention": setting, "text_attention": setting})]
            )
            ours, ticks = patch(runtime.PACK, model, nodes), Ticks(self.device)
            self.free()
            before = self.peak()
            with torch.inference_mode():
                ltx2.sample(ours, clip, 2, self.device, ticks)
            self.add(
                "steps",
                clip,
                multiprocessors,
                own,
                setting,
                ticks.milliseconds()[-1],
                (self.peak() - before) / 2**30,
            )

    def add(
        self,
        kind: str,
        clip: ltx2.Clip,
        multiprocessors: int | None,
        own: str,
        setting: str,
        milliseconds: float,
        peak: float,
        **more: Any,
    ) -> None:
        self.report[kind].append(
            {
                "clip": clip.name,
                "grid": ltx2.size_of(clip.grid),
                "multiprocessors": multiprocessors,
                "model": own,
                **more,
                "setting": setting,
                "ms": milliseconds,
                "peak_gib": peak,
            }
        )
        self.save(self.report)

    def free(self) -> None:
        if self.is_cuda:
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()

    def wait(self) -> None:
        if self.is_cuda:
            torch.cuda.synchronize()

    def peak(self) -> int:
        return torch.cuda.max_memory_allocated() if self.is_cuda else 0


def tables(report: dict[str, Any]) -> str:
    """Markdown: errors, then attention alone and steps, where they were measured."""
    parts = [error_table(report["error"])] if "error" in report else []
    if "gpu" in report:
        parts += [gpu_table(report["gpu"], kind) for kind in ("attention", "steps") if report["gpu"][kind]]
    return "\n\n".join(parts) + "\n"


def error_table(report: dict[str, Any]) -> str:
    lines = []
    names = {"self": "video to itself", "text": "video to text"}
    for role in ROLES:
        for size in SIZES:
            found = {
                row["setting"]: row
                for row in report["rows"]
                if (row["attention"], row["values_times"]) == (role, size)
            }
            shown = "as they are" if size == 1 else f"× {size:.0e}".replace("e+0", "e")
            cells = [f"{found[name]['median']:.1e} ({found[name]['worst']:.1e})" for name in DTYPES]
            lines.append([names[role], shown, *cells])
    return results.table(["attention", "values", *DTYPES], lines)


def gpu_table(report: dict[str, Any], kind: str) -> str:
    """Times and peak memory in brackets, a column a setting."""
    first = ["model", "attention"] if kind == "attention" else ["model"]
    title = "attention alone" if kind == "attention" else f"a step of {report['blocks']} blocks"
    lines: dict[tuple[str, ...], dict[str, str]] = {}
    for row in report[kind]:
        place = f"{row['multiprocessors']} multiprocessors" if row["multiprocessors"] else "the whole card"
        line = lines.setdefault((row["grid"], place, *(row[name] for name in first)), {})
        line[row["setting"]] = f"{row['ms']:.3g} ms ({row['peak_gib']:.2f} GiB)"
    settings = (OWN, *DTYPES)
    rows = [[*key, *(cells.get(name, "–") for name in settings)] for key, cells in lines.items()]
    return results.table([f"{title}: T×tokens", "on", *first, *settings], rows)


def clip_of(text: str) -> ltx2.Clip:
    return ltx2.Clip(*map(int, text.split("x")))


def main() -> None:
    # Time and device are those of the part gpu.
    parser = results.asking(__doc__, "precision", seconds=85, device="cuda", table=True)
    parser.add_argument("--part", choices=("error", "gpu"), nargs="+", default=["error", "gpu"])
    parser.add_argument(
        "--clips", type=clip_of, nargs="+", help="FRAMESxWIDTHxHEIGHT; without: 16×880 and 31×880"
    )
    parser.add_argument("--blocks", type=int, default=2)
    parser.add_argument("--samples", type=int, default=2, help="clips of the tiny teacher")
    options = parser.parse_args()
    report = results.read(options.out, {})

    def save(part: str, found: dict[str, Any]) -> None:
        report[part] = found
        results.save(report, options.out)
        results.write_tables(options.out, {"": tables(report)})

    if not options.table and "error" in options.part:
        save("error", errors(options.samples, 13))
    if not options.table and "gpu" in options.part:
        clips = options.clips or [
            clip for clip in ltx2.CLIPS if clip.grid[0] in (16, 31) and clip.width == 1280
        ]
        gpu = Gpu(options.device, clips, options.blocks, options.seconds, lambda found: save("gpu", found))
        save("gpu", gpu.measure())
    results.write_tables(options.out, {"": tables(report)})
    print(tables(report))
    print("left out:", "; ".join(report.get("gpu", {}).get("left_out", [])) or "nothing")


if __name__ == "__main__":
    main()
