"""Draws graphs/*.png: the recipes of the README as ComfyUI's own frontend shows them, from the templates in workflows/.

    nox -s graphs

Only the nodes that make the recipe are shown, close together; those of every graph are folded to their titles, or left out.
"""

from __future__ import annotations

import hashlib
import io
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
FOLDER = HERE / "graphs"
sys.path.insert(0, str(ROOT))

from PIL import Image, PngImagePlugin

import comfyui_tree
from comfy_frontend import chromium, open_template
from comfy_server import ComfyServer

# Pixels of the picture that one of the canvas becomes, so that it stays sharp where a page makes it smaller.
SHARPNESS = 2
MARGIN, COLORS = 24, 96
# From the top; each node by its title, type or number.
Stack = list[str]


@dataclass(frozen=True)
class Picture:
    """rows: stacks of nodes from left to right. folded: those of which only the title is shown, and that title."""

    template: str
    rows: list[list[Stack]]
    folded: dict[str, str]


MODEL, LATENT, VIDEO = "CheckpointLoaderSimple", "EmptyLTXVLatentVideo", "CreateVideo"
ENDS = {MODEL: "model", LATENT: "latent", VIDEO: "video"}
PICTURES = {
    "refined": Picture(
        "stride_refine_undistilled",
        [
            [
                [MODEL, LATENT],
                ["KeyframeStride", "LTXVScheduler"],
                ["ScheduleSpatialFreeze", "The last steps again"],
                ["Some steps frozen", "Every third frame", "No step frozen"],
                ["LatentFlowInterpolate", "All frames, refined"],
            ]
        ],
        ENDS,
    ),
    "strided": Picture(
        "keyframe_stride",
        [
            [
                [MODEL, LATENT],
                ["KeyframeStride"],
                ["CFGGuider", "LTXVScheduler"],
                ["SamplerCustomAdvanced"],
                ["LatentFlowInterpolate"],
                [VIDEO],
            ]
        ],
        {**ENDS, "CFGGuider": "guider", "LTXVScheduler": "sigmas"},
    ),
    "two_stages": Picture(
        "preset_two_stage",
        [
            [
                ["LoraLoaderModelOnly", "LTXVConcatAVLatent", "The 8 distilled steps"],
                ["Preset, first stage"],
                ["CFGGuider"],
                ["First stage, half size"],
            ],
            [
                ["The second stage"],
                ["Preset, second stage"],
                ["LTXVSeparateAVLatent", "LTXVLatentUpsampler", "24", "25"],
                ["Second stage, full size", "28"],
                ["LatentFlowInterpolate"],
            ],
        ],
        {
            "LoraLoaderModelOnly": "model",
            "LTXVConcatAVLatent": "latent",
            "The 8 distilled steps": "sigmas",
            "The second stage": "sigmas",
            "CFGGuider": "guider",
            "LTXVSeparateAVLatent": "separate",
            "LTXVLatentUpsampler": "upscale",
            "24": "join",
            "25": "guider",
            "28": "separate",
        },
    ),
}

ARRANGE = """
([rows, folded, margin]) => {
  const {graph} = app;
  const named = (name) => graph.nodes.find((node) => [node.title, node.type, `${node.id}`].includes(name));
  const stacks = rows.map((row) => row.map((stack) => stack.map((name) => [named(name), folded[name]])));
  const kept = new Set(stacks.flat(2).map(([node]) => node));
  for (const node of [...graph.nodes]) if (!kept.has(node)) graph.remove(node);
  const title = LiteGraph.NODE_TITLE_HEIGHT;
  const widthOf = ([node, fold]) => (fold ? 45 + 8 * fold.length : Math.max(228, node.computeSize()[0]));
  const gap = {across: 40, down: 26};
  let top = margin;
  let right = 0;
  for (const row of stacks) {
    let bottom = top;
    row.forEach((stack, column) => {
      const before = stacks.map((other) => other.slice(0, column).map((each) => Math.max(...each.map(widthOf))));
      const x = margin + Math.max(...before.map((widths) => widths.reduce((sum, width) => sum + width + gap.across, 0)));
      let y = top;
      for (const [node, fold] of stack) {
        node.pos = [x, y + title];
        // The model files are not here, which does not belong in the picture.
        node.strokeStyles = {};
        if (fold) [node.title, node.flags.collapsed] = [fold, true];
        else node.size = [widthOf([node]), node.computeSize()[1]];
        y += title + (fold ? 0 : node.size[1]) + gap.down;
        right = Math.max(right, x + widthOf([node, fold]));
      }
      bottom = Math.max(bottom, y);
    });
    top = bottom;
  }
  app.canvas.ds.scale = 1;
  app.canvas.ds.offset = [0, 0];
  app.canvas.show_info = false;
  app.canvas.background_image = null;
  app.canvas.setDirty(true, true);
  return [right + margin, top - gap.down + margin];
}
"""
ONLY_THE_CANVAS = "body * {visibility: hidden} #graph-canvas {visibility: visible}"


def template_of(picture: Picture) -> Path:
    return ROOT / "workflows" / f"{picture.template}.json"


def digest_of(picture: Picture) -> str:
    """Tells whether a picture is of the template as it is."""
    text = template_of(picture).read_text(encoding="utf-8") + repr(picture)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def draw(page: Any, server: Any, picture: Picture) -> bytes:
    """The PNG of a picture."""
    open_template(page, server, picture.template)
    page.add_style_tag(content=ONLY_THE_CANVAS)
    width, height = page.evaluate(ARRANGE, [picture.rows, picture.folded, MARGIN])
    # The links know their ends once the nodes were drawn.
    page.wait_for_timeout(500)
    return page.screenshot(clip={"x": 0, "y": 0, "width": width, "height": height})


def main() -> None:
    FOLDER.mkdir(exist_ok=True)
    packs = {"frame-thrift": ROOT}
    with ComfyServer(comfyui_tree.find_comfyui(), packs) as server, chromium(server) as browser:
        for name, picture in PICTURES.items():
            page = browser.new_page(viewport={"width": 2400, "height": 1200}, device_scale_factor=SHARPNESS)
            shot = Image.open(io.BytesIO(draw(page, server, picture))).convert("RGB")
            page.context.close()
            about = PngImagePlugin.PngInfo()
            about.add_text("graph", digest_of(picture))
            path = FOLDER / f"{name}.png"
            shot.quantize(COLORS, dither=Image.Dither.NONE).save(path, optimize=True, pnginfo=about)
            print(
                f"{path.relative_to(ROOT)}: {shot.width}×{shot.height}, {path.stat().st_size / 1000:.0f} KB"
            )


if __name__ == "__main__":
    main()
