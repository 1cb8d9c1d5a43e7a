"""One clip, stock and with ApplyTemporalWindow, through a real ComfyUI server on the CPU; see demo_output/."""

from __future__ import annotations

import importlib
import shutil
import signal
import sys
import time
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
from comfy_server import ComfyServer, Progress
from graph import SAMPLER, VIDEO, build_graph
from PIL import Image, ImageDraw

REPO = Path(__file__).resolve().parent.parent
OUTPUT = REPO / "demo_output"
FRAMES, SIZE, FRAME_RATE = 97, 256, 24
SETTINGS = {
    "window": 2,
    "sink_frames": 1,
    "start_percent": 0.0,
    "end_percent": 1.0,
    "dense_blocks": 0,
}

sys.path.insert(0, str(REPO))
import comfyui_tree


@dataclass
class Clip:
    """One of the two runs."""

    name: str
    settings: dict[str, Any] | None
    seconds: float = 0.0
    frames: np.ndarray | None = None
    attention_flops: float = 0.0


def main() -> None:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    begun = time.perf_counter()
    OUTPUT.mkdir(exist_ok=True)
    clips = [Clip("stock", None), Clip("window", SETTINGS)]
    render(clips)
    say("Counting attention FLOPs of one model call, stock and windowed")
    count_attention_flops(clips)

    stock, window = (read_video(OUTPUT / f"{clip.name}.mp4") for clip in clips)
    title = f"window {SETTINGS['window']}, sink {SETTINGS['sink_frames']}"
    write_video(OUTPUT / "side_by_side.mp4", side_by_side(stock, window, ("stock", title)))
    contact_sheet(stock, window, ("stock", title)).save(OUTPUT / "contact_sheet.png")
    table = describe(clips, psnr(stock, window))
    (OUTPUT / "table.md").write_text(table, encoding="utf-8")
    print(f"\n{table}", flush=True)
    say(
        f"Done in {time.perf_counter() - begun:.0f} s. Look into {OUTPUT.name}/: "
        + ", ".join(sorted(path.name for path in OUTPUT.iterdir() if not path.name.startswith(".")))
    )


def render(clips: list[Clip]) -> None:
    """Runs the graph once for each clip and keeps the videos and the wall times."""
    say("Starting ComfyUI on the CPU")
    packs = {"frame-thrift": REPO, "tiny_ltx": REPO / "tiny_ltx"}
    with ComfyServer(comfyui_tree.find_comfyui(), packs) as server:
        say(f"ComfyUI answers at {server.url}; warming up")
        # Loads the model and imports what samplers import, which is nobody's wall time.
        server.queue(build_graph(frames=FRAMES, size=SIZE, steps=1, name="warm-up"))
        for clip in clips:
            graph = build_graph(
                clip.settings, frames=FRAMES, size=SIZE, frame_rate=FRAME_RATE, name=clip.name
            )
            result = server.queue(graph, show_steps(clip.name))
            clip.seconds = result.seconds
            shutil.copy(server.output_path(result, VIDEO), OUTPUT / f"{clip.name}.mp4")
            say(f"{clip.name}: {clip.seconds:.1f} s")
        for line in server.log_text().splitlines():
            if "FrameThrift:" in line:
                say("ComfyUI's log: " + line[line.index("FrameThrift:") :])


def show_steps(name: str) -> Progress:
    """A progress callback that keeps one line on a terminal and writes one line a step elsewhere."""
    begun = time.perf_counter()

    def show(node: str, done: int, total: int) -> None:
        if node == SAMPLER:
            line = f"  {name}: step {done} of {total}, {time.perf_counter() - begun:.0f} s"
            end = "\r" if sys.stdout.isatty() and done < total else "\n"
            print(line.ljust(60), end=end, flush=True)

    return show


def count_attention_flops(clips: list[Clip]) -> None:
    """Counts, for each clip, the attention products of one forward of the demo's shape, in this process."""
    comfyui_tree.use_comfyui()
    from comfy.cli_args import args

    # ComfyUI's default on a CPU hides its products in chunks of its own; the count is of PyTorch's attention.
    args.use_pytorch_cross_attention = True
    import comfy.sample
    import node_helpers
    import torch
    from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

    aten = torch.ops.aten
    formulas = {
        aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *_, **__: sdpa_flop_count(q, k, v)
    }
    node = importlib.import_module(f"{comfyui_tree.load_pack().__name__}.nodes").ApplyTemporalWindow
    comfyui_tree.load_tiny()
    tiny = importlib.import_module("tiny_ltx.model")
    latent = torch.zeros(1, 128, (FRAMES - 1) // 8 + 1, SIZE // 32, SIZE // 32)
    noise = torch.randn(latent.shape, generator=torch.Generator().manual_seed(0))
    caption = tiny.encode_caption("ring", "horizontal", "medium")
    positive = node_helpers.conditioning_set_values(caption, {"frame_rate": FRAME_RATE})
    for clip in clips:
        model = tiny.load_model()
        if clip.settings is not None:
            model = node.execute(model, **clip.settings).args[0]
        with FlopCounterMode(display=False, custom_mapping=formulas) as counter:
            # cfg 1 leaves one conditioning, one step leaves one call.
            comfy.sample.sample(
                model, noise, 1, 1.0, "euler", "simple", positive, positive, latent, disable_pbar=True
            )
        by_operator = counter.get_flop_counts()["Global"]
        # The model multiplies batched matrices in attention only; its linears are addmm.
        clip.attention_flops = sum(
            flops for op, flops in by_operator.items() if "scaled_dot" in str(op) or "bmm" in str(op)
        )


def read_video(path: Path) -> np.ndarray:
    """All frames as uint8 [frames, height, width, 3]."""
    with av.open(str(path)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


def write_video(path: Path, frames: np.ndarray) -> None:
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=Fraction(FRAME_RATE), options={"crf": "16"})
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv420p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())


def side_by_side(left: np.ndarray, right: np.ndarray, titles: tuple[str, str]) -> np.ndarray:
    """Both clips in one picture, a line of text above each."""
    count, height, width, _ = left.shape
    bar, gap = 24, 8
    canvas = Image.new("RGB", (2 * width + gap, bar), "white")
    for title, x in zip(titles, (6, width + gap + 6), strict=True):
        ImageDraw.Draw(canvas).text((x, 6), title, fill="black")
    between = np.full((count, height, gap, 3), 255, np.uint8)
    top = np.broadcast_to(np.asarray(canvas), (count, bar, 2 * width + gap, 3))
    return np.concatenate([top, np.concatenate([left, between, right], axis=2)], axis=1)


def contact_sheet(
    left: np.ndarray, right: np.ndarray, titles: tuple[str, str], columns: int = 8
) -> Image.Image:
    """Rows: first clip, second clip, their difference, 4 times; columns: frames spread over the clip."""
    which = np.linspace(0, len(left) - 1, columns).round().astype(int)
    difference = np.abs(left.astype(np.int16) - right.astype(np.int16))
    rows = [left, right, (difference * 4).clip(0, 255).astype(np.uint8)]
    cell, margin, bar = 160, 4, 20
    sheet = Image.new("RGB", (columns * (cell + margin) + margin, len(rows) * (cell + bar) + bar), "white")
    draw = ImageDraw.Draw(sheet)
    for row, (frames, title) in enumerate(zip(rows, (*titles, "difference, 4 times"), strict=True)):
        top = row * (cell + bar)
        draw.text((margin, top + 4), title, fill="black")
        for column, frame in enumerate(which):
            tile = Image.fromarray(frames[frame]).resize((cell, cell), Image.Resampling.LANCZOS)
            sheet.paste(tile, (margin + column * (cell + margin), top + bar))
    for column, frame in enumerate(which):
        draw.text((margin + column * (cell + margin), sheet.height - bar + 4), f"frame {frame}", fill="black")
    return sheet


def psnr(reference: np.ndarray, other: np.ndarray) -> float:
    error = np.mean((reference.astype(np.float64) - other.astype(np.float64)) ** 2)
    return float("inf") if error == 0 else float(10 * np.log10(255**2 / error))


def describe(clips: list[Clip], window_psnr: float) -> str:
    """The table, in Markdown."""
    dense = clips[0].attention_flops
    lines = [
        "| run | wall time | attention FLOPs of one model call | PSNR against stock |",
        "|---|---|---|---|",
    ]
    for clip, quality in zip(clips, ("—", f"{window_psnr:.1f} dB"), strict=True):
        share = f"{clip.attention_flops / 1e9:.3f} GFLOP ({clip.attention_flops / dense:.0%})"
        lines.append(f"| {clip.name} | {clip.seconds:.1f} s | {share} | {quality} |")
    lines.append("")
    lines.append(
        f"{FRAMES} frames {SIZE}×{SIZE}, ComfyUI {comfyui_version()} on the CPU, the tiny test model. Wall time is one run "
        "each, with everything around the sampler. FLOPs are counted, not estimated, and include attention to "
        "the text; PSNR is of the saved videos."
    )
    return "\n".join(lines) + "\n"


def comfyui_version() -> str:
    from comfyui_version import __version__

    return str(__version__)


def say(message: str) -> None:
    print(message, flush=True)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("Stopped; the server is stopped too.")
