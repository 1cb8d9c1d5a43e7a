"""What the demo shows: a video, a contact sheet and a plot."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from fractions import Fraction
from functools import cache
from pathlib import Path

import av
import matplotlib
import numpy as np
from figures import Clip, usual_seconds
from graph import Setting
from matplotlib.font_manager import findfont
from PIL import Image, ImageDraw, ImageFont

matplotlib.use("Agg")

import matplotlib.pyplot as plt

INK, GREY, FILLED = "#202020", "#707070", "#e07b00"
COLORS = ("#4c78a8", "#bab0ac", "#72b7b2", FILLED)
MARGIN, GAP = 16, 8
# Pixels of the picture that a pixel of the clip becomes.
LARGE, SMALL = 8, 3
# Some of them keyframes at stride 2, some in between.
SHOWN = (5, 28, 53, 76, 101, 124)


@cache
def font(size: int, is_bold: bool = False) -> ImageFont.FreeTypeFont:
    # matplotlib brings this one along, so that it is there on every system.
    return ImageFont.truetype(findfont(f"DejaVu Sans{':bold' if is_bold else ''}"), size)


def enlarged(frame: np.ndarray, zoom: int) -> Image.Image:
    return Image.fromarray(frame).resize(
        [zoom * side for side in frame.shape[::-1]], Image.Resampling.NEAREST
    )


def is_filled_in(setting: Setting, frame: int) -> bool:
    """Whether no sampler of the second stage has made this video frame."""
    return frame % setting.second != 0


def side_by_side(
    settings: Sequence[Setting], clips: Sequence[Clip], title: str, below: Sequence[str]
) -> Iterator[Image.Image]:
    """One picture a frame: the same caption in all settings, `below` a line to each."""
    side = LARGE * clips[0].frames.shape[-1]
    top, bottom = 80, 40
    page = Image.new("RGB", (2 * MARGIN + len(clips) * (side + GAP) - GAP, top + side + bottom), "white")
    pen = ImageDraw.Draw(page)
    pen.text((MARGIN, 10), title, fill=GREY, font=font(20))
    lefts = [MARGIN + i * (side + GAP) for i in range(len(clips))]
    for left, setting, words in zip(lefts, settings, below, strict=True):
        pen.text((left, 44), setting.name, fill=INK, font=font(22, True))
        pen.text((left, top + side + 8), words, fill=INK, font=font(18))
    for frame in range(len(clips[0].frames)):
        picture = page.copy()
        for left, clip in zip(lefts, clips, strict=True):
            picture.paste(enlarged(clip.frames[frame], LARGE), (left, top))
        yield picture


def write_video(path: Path, pictures: Iterable[Image.Image], frame_rate: int) -> None:
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=Fraction(frame_rate), options={"crf": "14"})
        stream.pix_fmt = "yuv420p"
        for number, picture in enumerate(pictures):
            if number == 0:
                stream.width, stream.height = picture.size
            container.mux(stream.encode(av.VideoFrame.from_image(picture)))
        container.mux(stream.encode())


def contact_sheet(
    settings: Sequence[Setting], clips: dict[str, list[Clip]], titles: Sequence[str]
) -> Image.Image:
    """A block for each caption: a row for each setting, a column for each of some frames."""
    first = clips[settings[0].name][0].frames
    shown = [frame for frame in SHOWN if frame < len(first)]
    cell, label, line, head, foot = SMALL * first.shape[-1], 220, 30, 44, 44
    block = line + len(settings) * (cell + GAP) + line
    sheet = Image.new(
        "RGB", (label + len(shown) * (cell + GAP) + MARGIN, head + len(titles) * block + foot), "white"
    )
    pen = ImageDraw.Draw(sheet)
    pen.text((MARGIN, 12), "Caption and seed are the same within a block.", fill=GREY, font=font(15))
    for i, title in enumerate(titles):
        top = head + i * block + line
        pen.text((MARGIN, top - line + 6), title, fill=INK, font=font(17, True))
        for setting in settings:
            pen.multiline_text(
                (MARGIN, top + cell // 2 - 20), setting.name.replace(", ", ",\n"), fill=INK, font=font(15)
            )
            for column, frame in enumerate(shown):
                left = label + column * (cell + GAP)
                if is_filled_in(setting, frame):
                    pen.rectangle((left - 4, top - 4, left + cell + 3, top + cell + 3), fill=FILLED)
                sheet.paste(enlarged(clips[setting.name][i].frames[frame], SMALL), (left, top))
            top += cell + GAP
        for column, frame in enumerate(shown):
            pen.text((label + column * (cell + GAP), top - 2), f"frame {frame}", fill=GREY, font=font(13))
    legend = sheet.height - foot + 10
    pen.rectangle((MARGIN, legend + 2, MARGIN + 16, legend + 18), fill=FILLED)
    pen.text(
        (MARGIN + 26, legend),
        "filled in between its neighbours; all other frames come out of the second stage's sampler",
        fill=INK,
        font=font(15),
    )
    return sheet


def plot_time(settings: Sequence[Setting], clips: dict[str, list[Clip]], path: Path, about: str) -> None:
    """Stacked bars, one a setting."""
    parts = {setting.name: usual_seconds(clips[setting.name]) for setting in settings}
    totals = {name: sum(seconds.values()) for name, seconds in parts.items()}
    dense = totals[settings[0].name]
    figure, axis = plt.subplots(figsize=(10, 3.8))
    left = np.zeros(len(parts))
    for part, color in zip(next(iter(parts.values())), COLORS, strict=True):
        widths = np.array([seconds[part] for seconds in parts.values()])
        label = part if widths.max() > 0.01 * dense else f"{part}: {widths.max():.2f} s at most"
        bars = axis.barh(list(parts), widths, left=left, color=color, edgecolor="white", label=label)
        # A number needs some room.
        words = [f"{width:.1f}" if width > 0.04 * dense else "" for width in widths]
        axis.bar_label(bars, words, label_type="center", color="white", fontsize=11)
        left += widths
    for place, total in enumerate(totals.values()):
        axis.text(
            total + 0.01 * dense, place, f"{total:.1f} s ({total / dense:.0%})", va="center", fontsize=11
        )
    axis.invert_yaxis()
    axis.set_xlim(0, 1.2 * max(totals.values()))
    axis.set_xlabel("seconds a clip on this CPU")
    axis.spines[["top", "right", "left"]].set_visible(False)
    axis.tick_params(axis="y", length=0, labelsize=11)
    figure.text(0.01, 0.92, "Where the time went", fontsize=14, fontweight="bold")
    figure.legend(loc="upper left", bbox_to_anchor=(0, 0.92), ncols=len(COLORS), frameon=False)
    figure.text(0.99, 0.01, about, ha="right", fontsize=8, color=GREY)
    figure.tight_layout(rect=(0, 0.03, 1, 0.85))
    figure.savefig(path, dpi=120)
    plt.close(figure)
