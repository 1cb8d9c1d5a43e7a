"""Two-stage clips: dense, ours and with fewer steps, through a real ComfyUI server on the CPU; see demo_output/."""

from __future__ import annotations

import json
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

REPO = Path(__file__).resolve().parent.parent
OUTPUT = REPO / "demo_output"
FRAMES, FRAME_RATE, SEED = 129, 24, 0
# What ours is, the preset balanced: one frame in so many is diffused in the first and in the second stage. (1, 2) leaves the
# first stage full, which frames in between then follow. Choose strides that benchmarks/two_stage.json has a row for.
FIRST, SECOND = 2, 2

sys.path.insert(0, str(REPO))
import numpy as np
from figures import PRICED_AS, Clip, lab_row, seconds_of_parts, table, usual_seconds
from graph import FRAMES_IMAGES, HALF_FIRST_SIGMAS, Setting, build_graph
from pictures import contact_sheet, plot_time, side_by_side, write_video
from PIL import Image

import comfyui_tree
from comfy_server import ComfyServer, Progress


def name_ours() -> str:
    if FIRST == 1:
        return f"ours, second stage at stride {SECOND}"
    if FIRST == SECOND:
        return f"ours, both stages at stride {FIRST}"
    return f"ours, stages at strides {FIRST} and {SECOND}"


SETTINGS = (
    Setting("dense, 8 + 3 steps"),
    Setting(name_ours(), FIRST, SECOND),
    Setting("fewer steps, 4 + 2", first_sigmas=HALF_FIRST_SIGMAS, sigmas=(0.909375, 0.421875, 0.0)),
)
# Every speed and every texture once, as on the lab's contact sheet.
CAPTIONS = (
    {"shape": "disc", "direction": "diagonal", "speed": "fast", "texture": "stripes"},
    {"shape": "triangle", "direction": "horizontal", "speed": "medium", "texture": "checks"},
    {"shape": "disc", "direction": "vertical", "speed": "slow", "texture": "dots"},
)


def main() -> None:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    begun = time.perf_counter()
    OUTPUT.mkdir(exist_ok=True)
    report = json.loads((REPO / "benchmarks" / "two_stage.json").read_text(encoding="utf-8"))
    # A row that is not there is better missed before the clips are made.
    prices = [lab_row(report, setting)["cost"][PRICED_AS] for setting in SETTINGS]
    clips, release = make_clips()
    say("Drawing")
    write_video(OUTPUT / "side_by_side.mp4", pictures(clips, prices), FRAME_RATE)
    contact_sheet(SETTINGS, clips, [words(caption) for caption in CAPTIONS]).save(
        OUTPUT / "contact_sheet.png"
    )
    about = (
        f"medians of {len(CAPTIONS)} clips of the small model, ComfyUI {release}; loading and saving left out"
    )
    plot_time(SETTINGS, clips, OUTPUT / "time.png", about)
    text = table(SETTINGS, clips, report, release)
    (OUTPUT / "table.md").write_text(text, encoding="utf-8")
    say(
        f"Done in {time.perf_counter() - begun:.0f} s. Look at side_by_side.mp4, contact_sheet.png, time.png and table.md in "
        f"{OUTPUT.name}/.\n\n{text}"
    )


def make_clips() -> tuple[dict[str, list[Clip]], str]:
    """By setting, one for each caption; and the release of ComfyUI that made them."""
    say("Starting ComfyUI on the CPU")
    packs = {"frame-thrift": REPO, "tiny_ltx": REPO / "tiny_ltx"}
    # Nothing may come from the cache: the settings share nodes, and each is to be timed as a whole. And attention as on a GPU.
    arguments = ["--cache-none", "--use-pytorch-cross-attention"]
    clips: dict[str, list[Clip]] = {setting.name: [] for setting in SETTINGS}
    with ComfyServer(comfyui_tree.find_comfyui(), packs, arguments) as server:
        say(f"ComfyUI answers at {server.url}; warming up")
        # What samplers and nodes do once, and never again, is nobody's time.
        for setting in SETTINGS[:2]:
            server.queue(build_graph(setting, caption_inputs(CAPTIONS[0]), frames=FRAMES, seed=SEED))
        for caption in CAPTIONS:
            for setting in SETTINGS:
                graph = build_graph(
                    setting, caption_inputs(caption), frames=FRAMES, seed=SEED, frame_rate=FRAME_RATE
                )
                result = server.queue(graph, show_steps(f"{words(caption)}: {setting.name}"))
                frames = [
                    np.asarray(Image.open(path).convert("L"))
                    for path in server.output_paths(result, FRAMES_IMAGES)
                ]
                clips[setting.name].append(Clip(np.stack(frames), seconds_of_parts(result.node_seconds)))
        told = [line for line in server.log_text().splitlines() if "FrameThrift:" in line]
        for line in dict.fromkeys(told):
            say("ComfyUI's log: " + line[line.index("FrameThrift:") :])
        return clips, server.get("/system_stats")["system"]["comfyui_version"]


def pictures(clips: dict[str, list[Clip]], prices: list[float]) -> Iterator[Image.Image]:
    """The video's, one caption after the other."""
    below = [
        f"{sum(usual_seconds(clips[setting.name]).values()):.1f} s a clip here; {price:.0%} of the FLOPs at LTX-2's size"
        for setting, price in zip(SETTINGS, prices, strict=True)
    ]
    for i, caption in enumerate(CAPTIONS):
        title = f"“{words(caption)}”, the same seed in all; a small model's 64 × 64 pixels, enlarged"
        yield from side_by_side(SETTINGS, [clips[setting.name][i] for setting in SETTINGS], title, below)


def caption_inputs(caption: dict[str, str]) -> dict[str, str]:
    return {"second_shape": "none", **caption}


def words(caption: dict[str, str]) -> str:
    return "{speed} {direction} {shape} with {texture}".format(**caption)


def show_steps(name: str) -> Progress:
    """A progress callback that keeps one line on a terminal and writes one line a stage elsewhere."""
    begun = time.perf_counter()

    def show(node: str, done: int, total: int) -> None:
        if node in ("first", "second") and (sys.stdout.isatty() or done == total):
            line = f"  {name}: {node} stage, step {done} of {total}, {time.perf_counter() - begun:.0f} s"
            print(line.ljust(100), end="\r" if done < total else "\n", flush=True)

    return show


def say(message: str) -> None:
    print(message, flush=True)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("Stopped; the server is stopped too.")
