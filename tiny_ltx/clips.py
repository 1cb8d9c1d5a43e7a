"""Procedural clips: a bright shape, sometimes a dark one too, bouncing over a panning wave. No ComfyUI import.

Motion is per second, so a clip at a low frame rate shows larger steps from frame to frame. Clips have one of two sizes. The
large one shows the texture of the bright shape, which is fixed to it and finer than anything the small one can show.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from .captions import DIRECTIONS, SHAPES, SPEEDS, TEXTURES

# Pixels to a side. Places and lengths below count pixels of the small size.
SMALL, FULL = 32, 64
# Latent frames of the clips that training sees.
LENGTHS = {SMALL: (3, 4, 5, 7, 9, 13, 17, 25), FULL: (3, 5, 9, 13, 17)}
FPS_RANGE = (3.0, 30.0)
HIGH_FPS_RANGE = (20.0, 30.0)
USUAL_FPS = 24.0
USUAL_SHARE = 0.4
SECOND_SHARE = 0.2
# Pixels per second of the 32-pixel clip, one per word of SPEEDS.
SPEED_PX = (2.5, 6.0, 14.0)
SPEED_SPREAD = 0.1
BRIGHT, BRIGHT_SPREAD = 0.8, 0.06
DARK_SPREAD = 0.08
# Textures in pixels of the large size: along one axis at least a wave is shorter than two pixels of the small one.
CONTRAST = 0.2
STRIPES, STRIPES_ANGLE = 3.2, math.pi / 6
DOTS = 3.5
CHECKS = 3.8


@dataclass(frozen=True)
class Clips:
    """pixels [B, F, size, size] in 0..1; ids [B, 5] caption word indices; fps [B] frames per second.

    places [B, F, 2]: where the middle of the bright shape lies, x before y, in pixels of the clip's size from its edge.
    """

    pixels: torch.Tensor
    ids: torch.Tensor
    fps: torch.Tensor
    places: torch.Tensor


def video_frames(latent_frames: int) -> int:
    """Video frames of a clip of so many latent frames: the first holds one, every other eight."""
    return 8 * (latent_frames - 1) + 1


def draw_fps(batch: int, fps_range: tuple[float, float], generator: torch.Generator) -> torch.Tensor:
    """[B] frame rates: two in five at 24 fps (if the range holds it), the others log-uniform over the range."""
    low, high = fps_range
    device = generator.device
    spread = torch.rand(batch, generator=generator, device=device)
    fps = torch.exp(math.log(low) + (math.log(high) - math.log(low)) * spread)
    if low <= USUAL_FPS <= high:
        usual = torch.rand(batch, generator=generator, device=device) < USUAL_SHARE
        fps = torch.where(usual, USUAL_FPS, fps)
    return fps


def draw_ids(batch: int, generator: torch.Generator, second_share: float = SECOND_SHARE) -> torch.Tensor:
    """[B, 5] caption word indices, uniform over the words; a second shape in `second_share` of the captions."""
    device = generator.device

    def pick(count: int) -> torch.Tensor:
        return torch.randint(count, (batch,), generator=generator, device=device)

    has_second = torch.rand(batch, generator=generator, device=device) < second_share
    second = torch.where(has_second, 1 + pick(len(SHAPES)), 0)
    words = [pick(len(SHAPES)), second, pick(len(DIRECTIONS)), pick(len(SPEEDS)), pick(len(TEXTURES))]
    return torch.stack(words, dim=1)


def _bounce(start: torch.Tensor, travelled: torch.Tensor, margin: torch.Tensor) -> torch.Tensor:
    """Position after moving `travelled` pixels between two walls `margin` away from the borders."""
    span = SMALL - 2 * margin
    phase = torch.remainder(start * span + travelled, 2 * span)
    return margin + span - (phase - span).abs()


def _coverage(
    kind: torch.Tensor, x: torch.Tensor, y: torch.Tensor, r: torch.Tensor, zoom: float
) -> torch.Tensor:
    """Coverage 0..1 of a shape of radius r, soft over one of `zoom` pixels; x, y relative to its middle, y pointing down."""
    far = torch.sqrt(x * x + y * y + 1e-6)
    ax, ay = x.abs(), y.abs()
    disc = far - 0.92 * r
    ring = (far - 0.86 * r).abs() - 1.25
    cross = torch.minimum(torch.maximum(ax - r, ay - 1.5), torch.maximum(ay - r, ax - 1.5))
    triangle = torch.maximum(y - 0.75 * r, 0.894 * ax - 0.447 * (y + r))
    edge = torch.where(kind == 0, disc, torch.where(kind == 1, ring, torch.where(kind == 2, cross, triangle)))
    return (0.5 - edge * zoom).clamp(0, 1)


def draw_texture(kind: torch.Tensor, x: torch.Tensor, y: torch.Tensor, phases: torch.Tensor) -> torch.Tensor:
    """-1..1 at places x, y relative to the middle of the shape, in pixels of the large size; phases [2, ...] in turns."""
    a, b = 2 * math.pi * phases
    along = math.cos(STRIPES_ANGLE) * x + math.sin(STRIPES_ANGLE) * y
    stripes = torch.cos(2 * math.pi / STRIPES * along + a)
    dots = (torch.cos(2 * math.pi / DOTS * x + a) + torch.cos(2 * math.pi / DOTS * y + b)) / 2
    checks = torch.cos(2 * math.pi / CHECKS * x + a) * torch.cos(2 * math.pi / CHECKS * y + b)
    drawn = torch.where(kind == 1, stripes, torch.where(kind == 2, dots, checks))
    return drawn * (kind > 0)


@dataclass(frozen=True)
class Scene:
    """What a clip shows, whatever its size: ids [B, 5], fps [B], and chance [26, B, 1] for everything else."""

    ids: torch.Tensor
    fps: torch.Tensor
    chance: torch.Tensor


def draw_scene(
    batch: int,
    generator: torch.Generator,
    fps_range: tuple[float, float] = FPS_RANGE,
    ids: torch.Tensor | None = None,
    fps: torch.Tensor | None = None,
) -> Scene:
    """ids and fps are drawn where they are not given."""
    ids = draw_ids(batch, generator) if ids is None else ids
    fps = draw_fps(batch, fps_range, generator) if fps is None else fps
    # One draw for everything: few kernels, so that clips cost little beside a training step.
    return Scene(ids, fps, torch.rand(26, batch, 1, generator=generator, device=generator.device))


def draw_clips(
    batch: int,
    latent_frames: int,
    generator: torch.Generator,
    fps_range: tuple[float, float] = FPS_RANGE,
    ids: torch.Tensor | None = None,
    fps: torch.Tensor | None = None,
    size: int = SMALL,
) -> Clips:
    """Draws `batch` clips of `latent_frames` latent frames on the generator's device.

    ids [B, 5] and fps [B] are drawn where they are not given. The same generator state gives the same clips, at either size.
    """
    return render(draw_scene(batch, generator, fps_range, ids, fps), latent_frames, size)


def render(scene: Scene, latent_frames: int, size: int = SMALL) -> Clips:
    """The clips of a scene. Nothing in it waits for the host, so it can be part of a CUDA graph."""
    ids, fps, u = scene.ids, scene.fps, scene.chance
    device = u.device
    seconds = torch.arange(video_frames(latent_frames), device=device) / fps[:, None]

    speed = ids[:, 3:4]
    base = torch.where(speed == 0, SPEED_PX[0], torch.where(speed == 1, SPEED_PX[1], SPEED_PX[2]))
    is_x = (ids[:, 2:3] != 1).float()
    is_y = (ids[:, 2:3] != 0).float()
    per_axis = torch.rsqrt(is_x + is_y)

    zoom = size / SMALL
    grid = (torch.arange(size, device=device) + 0.5) / zoom
    col, row = grid.view(1, 1, 1, size), grid.view(1, 1, size, 1)

    angle, wave = 2 * math.pi * u[0], 2 * math.pi / (12 + 12 * u[1])
    kx, ky = wave * torch.cos(angle), wave * torch.sin(angle)
    pan = (kx * (8 * u[2] - 4) + ky * (8 * u[3] - 4)) * seconds
    phase = (2 * math.pi * u[4] - pan)[..., None, None]
    pixels = 0.45 + 0.1 * torch.sin(kx[..., None, None] * col + ky[..., None, None] * row + phase)

    # The dark shape first, so that the bright one passes in front of it.
    for slot, offset in ((1, 14), (0, 6)):
        v = u[offset : offset + 8]
        radius = 5.5 + 1.5 * v[0]
        margin = radius + 0.5
        travelled = base * (1 + SPEED_SPREAD * (2 * v[1] - 1)) * per_axis * seconds
        # A start in 0..2 spans covers both ways of moving along an axis.
        x = _bounce(2 * v[2], travelled * is_x, margin)
        y = _bounce(2 * v[3], travelled * is_y, margin)
        dx, dy = col - x[..., None, None], row - y[..., None, None]
        kind = (ids[:, slot] - slot).view(-1, 1, 1, 1)
        tone = (DARK_SPREAD * v[4] if slot == 1 else BRIGHT - BRIGHT_SPREAD * v[4])[..., None, None]
        if slot == 0 and size == FULL:
            texture = ids[:, 4].view(-1, 1, 1, 1)
            tone = tone + CONTRAST * draw_texture(texture, dx * zoom, dy * zoom, u[24:26, ..., None, None])
        cover = _coverage(kind, dx, dy, radius[..., None, None], zoom) * (kind >= 0)
        pixels = pixels + (tone - pixels) * cover
    # The bright shape was drawn last.
    return Clips(pixels=pixels, ids=ids, fps=fps, places=torch.stack((x, y), dim=-1) * zoom)
